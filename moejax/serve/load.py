"""A trained model from a run folder, one of its checkpoints, or a Hugging Face folder."""

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array

from moejax.config import ONE_DEVICE, ConfigError, MeshConfig, ModelConfig, Precision, RunConfig
from moejax.data.tokens import Tokenizer, open_tokenizer
from moejax.mesh import BATCH_AXES, fit, make_mesh, one_device_mesh
from moejax.model.decoder import taken_apart
from moejax.model.hf import load_hf
from moejax.model.shards import gather_for_step, on_mesh, widened
from moejax.model.transformer import Transformer
from moejax.ops.linear import FLOATS
from moejax.serve.answers import Answers, Prompt, Stream
from moejax.serve.engine import Engine
from moejax.serve.generate import Options
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
    context: int  # tokens that the model was trained on; answers come from the newest ones
    dtype: DTypeLike  # of the compute

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """Scores of every next token: int32 [B, T] -> float32 [B, T, V]."""
        return np.asarray(self._all_scores(self.module, np.asarray(tokens, np.int32)))

    @overload
    def generate(self, prompt: str, **options: Any) -> str: ...

    @overload
    def generate(self, prompt: Sequence[Prompt], **options: Any) -> list[str]: ...

    def generate(self, prompt: str | Sequence[Prompt], **options: Any) -> str | list[str]:
        """Text that continues the prompt; of several prompts a list.

        Args:
            prompt: text, or several texts or lists of ids, which are answered together.
            options: max_tokens, temperature, top_k, top_p, seed, stop, speculative (`moejax.serve.generate.Options`).

        Raises:
            ConfigError: the model came without a tokenizer, or a setting that does not fit.
        """
        several = [prompt] if isinstance(prompt, str) else list(prompt)
        texts = self.answer(several, **options).texts
        if texts is None:
            raise ConfigError("prompt", prompt, "a model whose folder has a tokenizer.json; `answer` gives ids")
        return texts[0] if isinstance(prompt, str) else texts

    def answer(self, prompts: Sequence[Prompt], **options: Any) -> Answers:
        """The answers to several prompts, texts or lists of ids, with their ids and what they took; see `generate`."""
        stream = self.answering(prompts, **options)
        for _ in stream:
            pass
        return stream.answers

    def answering(self, prompts: Sequence[Prompt], **options: Any) -> Stream:
        """The same as they come: iterating gives `(number of the prompt, piece of text)`, `answers` what has come."""
        return Stream(self._engine, self.tokenizer, self.context, prompts, Options(**options))

    def stream(self, prompt: str, **options: Any) -> Iterator[str]:
        """The text of `generate`, piece by piece as it comes: `for piece in model.stream("import "): ...`."""
        return (piece for _, piece in self.answering([prompt], **options))

    @functools.cached_property
    def _engine(self) -> Engine:
        return Engine(taken_apart(self.module, self.mesh, self.dtype), self.mesh, self.dtype)

    def expert_counts(self, tokens: np.ndarray) -> np.ndarray:
        """How many of the tokens each expert of each main MoE layer gets: int32 [B, T] -> int32 [L, E]."""
        return np.asarray(self._counts(self.module, np.asarray(tokens, np.int32)))

    @functools.cached_property
    def _counts(self) -> Callable[[Transformer, np.ndarray], Array]:
        def counts(module: Transformer, tokens: Array) -> Array:
            stats = module.hidden(module.embed(tokens, self.dtype), None)[1]
            return jnp.concatenate([one.counts for one in stats])

        return self.compiled(counts)

    @functools.cached_property
    def _all_scores(self) -> Callable[[Transformer, np.ndarray], Array]:
        return self.compiled(lambda module, tokens: module.logits(tokens, self.dtype))

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function(model, *arrays)`, compiled; it stands in `jax.shard_map`, on whole weights, on every device alike.

        Given a `Transformer` as `module` and arrays; returns a pytree of arrays of numbers, on every device.
        """

        def on_each_device(module: Transformer, *inputs: Array) -> Any:
            """The same answer on every device; the maximum is that answer, known to be the same."""
            module, inputs = jax.tree.map(lambda x: vary_over(x, BATCH_AXES), (module, inputs))
            found = function(widened(gather_for_step(module, module.mesh, self.dtype)), *inputs)
            return jax.tree.map(lambda x: jax.lax.pmax(vary_over(x, BATCH_AXES), BATCH_AXES), found)

        def answer(module: Transformer, *inputs: Array) -> Any:
            specs = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, module)
            shared = jax.tree.map(lambda x: P(), inputs)
            return jax.shard_map(on_each_device, mesh=self.mesh, in_specs=(specs, *shared), out_specs=P())(
                module, *inputs
            )

        return CompiledTogether(jax.jit(answer))


def load(folder: str | Path, mesh: MeshConfig | None = None, precision: Precision | None = None) -> Model:
    """The model in a run folder (its newest whole checkpoint), a checkpoint folder or a Hugging Face folder.

    Args:
        folder: where it is.
        mesh: over which the weights, and the prompts that are answered together, are spread, whatever mesh the run
            had; a length of -1 takes the devices that are left. None: one device.
        precision: of the compute. None: the run's; FP32 of a Hugging Face folder.

    Raises:
        ConfigError: none of these is at `folder`, what is there is not whole, the model does not divide over `mesh`, or
            there is no such precision.
    """
    if precision is not None and precision not in FLOATS:
        raise ConfigError("precision", precision, f"one of {', '.join(FLOATS)}")
    path = Path(folder)
    if _is_hugging_face(path):
        return _load_hugging_face(path, mesh, precision or "fp32")
    wanted = "a run folder, one of its checkpoints/<step>, or a Hugging Face folder"
    config, checkpoints, step = open_source("RUN", path, wanted)
    with checkpoints:
        cfg, devices = _placement(mesh, config.model)
        config = replace(config, mesh=cfg, precision=precision or config.precision)
        state = abstract_state(config, devices)
        shapes = {"model": {"params": state.params, "router_bias": state.router_bias}}
        before = tuple(checkpoints.load_meta(step)["layer_of_slot"])
        finish = to_slots(before, layer_of_slot(config), shapes)
        model = checkpoints.load(step, stacked_as(before, shapes), finish=finish)["model"]
    return from_state(config, devices, model["params"], model["router_bias"])


def _placement(mesh: MeshConfig | None, model: ModelConfig) -> tuple[MeshConfig, Mesh]:
    if mesh is None:
        return ONE_DEVICE, one_device_mesh()
    cfg = fit(mesh, model, len(jax.devices()))
    if cfg.pipe > 1:
        raise ConfigError("mesh.pipe", cfg.pipe, "1: here every device has all layers")
    return cfg, make_mesh(cfg)


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


def _load_hugging_face(folder: Path, mesh: MeshConfig | None, precision: Precision) -> Model:
    config, module = load_hf(folder)
    cfg, devices = _placement(mesh, config)
    fp8 = precision == "fp8"
    spread = jax.eval_shape(lambda: Transformer(nnx.Rngs(params=jax.random.key(0)), config, cfg, fp8=fp8))
    placed = [jax.device_put(x, NamedSharding(devices, spec)) for x, spec in _leaves_and_specs(module, cfg)]
    module = jax.tree.unflatten(jax.tree.structure(spread), placed)
    file = folder / "tokenizer.json"
    tokenizer = open_tokenizer(str(file), vocab_size=config.vocab_size) if file.is_file() else None
    yarn = config.attention.yarn
    context = int(yarn.factor * yarn.original_length) if yarn is not None else 4096
    return Model(config, module, devices, tokenizer, context, FLOATS[precision])


def _leaves_and_specs(module: Transformer, cfg: MeshConfig) -> Iterator[tuple[Array, P]]:
    """The model's arrays, and how each lies on the mesh."""
    for variable in jax.tree.leaves(module, is_leaf=lambda x: isinstance(x, nnx.Variable)):
        array = variable.get_value()
        own = on_mesh(variable.spec, cfg) if isinstance(variable, nnx.Param) else P()
        yield array, P(*[None] * (array.ndim - len(own)), *own)
