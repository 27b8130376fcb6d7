"""A trained model from a run folder, one of its checkpoints, or a Hugging Face folder."""

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array

from moejax.config import ONE_DEVICE, ConfigError, ModelConfig, RunConfig
from moejax.data.tokens import Tokenizer, open_tokenizer
from moejax.mesh import BATCH_AXES, one_device_mesh
from moejax.model.hf import load_hf
from moejax.model.shards import gather_for_step, widened
from moejax.model.transformer import Transformer
from moejax.ops.linear import FLOATS
from moejax.serve.generate import sample_tokens
from moejax.train.source import open_source
from moejax.train.state import abstract_state, layer_of_slot, model_structure, restacked, stacked_as, to_slots
from moejax.train.together import CompiledTogether
from moejax.varying import vary_over


@dataclass(frozen=True)
class Model:
    """A model to ask."""

    config: ModelConfig
    module: Transformer = field(repr=False)  # on the devices of the mesh
    mesh: Mesh
    tokenizer: Tokenizer | None  # None: the folder has none, and only ids can be used
    context: int  # newest tokens that `generate` shows the model
    dtype: DTypeLike  # of the compute

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """Scores of every next token: int32 [B, T] -> float32 [B, T, V]."""
        return np.asarray(self._all_scores(self.module, np.asarray(tokens, np.int32)))

    def generate(
        self, prompt: str, *, max_tokens: int = 200, temperature: float = 1.0, top_p: float = 1.0, seed: int = 0
    ) -> str:
        """Text that continues the prompt; see `moejax.serve.generate.sample_tokens`.

        Raises:
            ConfigError: the model came without a tokenizer, or a setting that does not fit.
        """
        if self.tokenizer is None:
            raise ConfigError("prompt", prompt, "a model whose folder has a tokenizer.json")
        new = sample_tokens(
            functools.partial(self._next_scores, self.module),
            self.tokenizer.encode(prompt) or [self.tokenizer.end_id],  # which stands before every document
            max_tokens=max_tokens,
            context=self.context,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            stop=self.tokenizer.end_id,
        )
        return self.tokenizer.decode(new)

    def expert_counts(self, tokens: np.ndarray) -> np.ndarray:
        """How many of the tokens each expert of each main MoE layer gets: int32 [B, T] -> int32 [L, E]."""
        return np.asarray(self._counts(self.module, np.asarray(tokens, np.int32)))

    @functools.cached_property
    def _counts(self) -> Callable[[Transformer, np.ndarray], Array]:
        def counts(module: Transformer, tokens: Array) -> Array:
            stats = module.hidden(module.embed(tokens, self.dtype), None)[1]
            return jnp.concatenate([one.counts for one in stats])

        return self._compiled(counts)

    @functools.cached_property
    def _all_scores(self) -> Callable[[Transformer, np.ndarray], Array]:
        return self._compiled(lambda module, tokens: module.logits(tokens, self.dtype))

    @functools.cached_property
    def _next_scores(self) -> Callable[[Transformer, np.ndarray, int], Array]:
        return self._compiled(lambda module, tokens, last: module.next_logits(tokens, last, self.dtype)[0])

    def _compiled(self, function: Callable[..., Array]) -> Callable[..., Array]:
        def on_each_device(module: Transformer, *inputs: Array) -> Array:
            """The same answer on every device; their maximum is that answer, known to be the same."""
            module, inputs = jax.tree.map(lambda x: vary_over(x, BATCH_AXES), (module, inputs))
            weights = widened(gather_for_step(module, module.mesh, self.dtype))
            return jax.lax.pmax(function(weights, *inputs), BATCH_AXES)

        def answer(module: Transformer, *inputs: Array) -> Array:
            specs = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, module)
            shared = jax.tree.map(lambda x: P(), inputs)
            return jax.shard_map(on_each_device, mesh=self.mesh, in_specs=(specs, *shared), out_specs=P())(
                module, *inputs
            )

        return CompiledTogether(jax.jit(answer))


def load(folder: str | Path) -> Model:
    """The model in a run folder (its newest whole checkpoint), a checkpoint folder or a Hugging Face folder.

    Raises:
        ConfigError: none of these is at `folder`, or what is there is not whole.
    """
    path = Path(folder)
    if _is_hugging_face(path):
        return _load_hugging_face(path)
    wanted = "a run folder, one of its checkpoints/<step>, or a Hugging Face folder"
    config, checkpoints, step = open_source("RUN", path, wanted)
    with checkpoints:
        config, mesh = replace(config, mesh=ONE_DEVICE), one_device_mesh()
        state = abstract_state(config, mesh)
        shapes = {"model": {"params": state.params, "router_bias": state.router_bias}}
        before = tuple(checkpoints.load_meta(step)["layer_of_slot"])
        finish = to_slots(before, layer_of_slot(config), shapes)
        model = checkpoints.load(step, stacked_as(before, shapes), finish=finish)["model"]
    return from_state(config, mesh, model["params"], model["router_bias"])


def from_state(
    config: RunConfig, mesh: Mesh, params: nnx.State, router_bias: nnx.State, tokenizer: Tokenizer | None = None
) -> Model:
    """The model of a run's state; its tokenizer is opened if it is not given."""
    if tokenizer is None:
        tokenizer = open_tokenizer(config.data.tokenizer, vocab_size=config.model.vocab_size)
    if mesh.shape["pipe"] > 1:  # here every rank has all layers
        before, after = layer_of_slot(config), tuple(range(config.model.num_moe_layers))
        parts = params, router_bias
        shapes = stacked_as(after, jax.tree.map(_shape, parts), cut=False)
        params, router_bias = restacked(parts, before, after, shapes)
    module = nnx.merge(model_structure(config), params, router_bias)
    return Model(config.model, module, mesh, tokenizer, config.data.sequence_length, FLOATS[config.precision])


def _shape(x: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


def _is_hugging_face(folder: Path) -> bool:
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(settings, dict) and "model_type" in settings


def _load_hugging_face(folder: Path) -> Model:
    config, module = load_hf(folder)
    mesh = one_device_mesh()
    module = jax.device_put(module, NamedSharding(mesh, P()))
    file = folder / "tokenizer.json"
    tokenizer = open_tokenizer(str(file), vocab_size=config.vocab_size) if file.is_file() else None
    yarn = config.attention.yarn
    context = int(yarn.factor * yarn.original_length) if yarn is not None else 4096
    return Model(config, module, mesh, tokenizer, context, FLOATS["fp32"])
