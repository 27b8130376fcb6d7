"""What each device holds in a step, by part, for every rank of the pipeline, before any program is compiled.

The state is that of `plan/arrays.py`. What passes keep for each other has the shapes of the traced layer, as often as
the table of the schedule has entries in its pools; what a pass needs while it runs is read from its equations
(`liveness.py`). Every rank runs one program, which allocates what the rank needs that needs most of it.

Weights that are gathered once for the step are held in the dtype of the compute, and their gradients in float32.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from moejax.config import RunConfig
from moejax.ops.linear import FLOATS
from moejax.pipeline.backward import StageFunctions
from moejax.pipeline.carry import JOINED
from moejax.pipeline.layout import lay_out
from moejax.pipeline.stages import program_of, table_of
from moejax.plan.arrays import state_arrays
from moejax.plan.liveness import Peak, peak
from moejax.plan.traced import Shapes, beside, joined_layers, layer_functions
from moejax.plan.traffic import Platform
from moejax.plan.weights import weights_of

_STATE = {"params": "parameters", "router_bias": "parameters", "opt_state": "optimizer", "ema": "averaged weights"}


@dataclass(frozen=True)
class Part:
    """Bytes of one kind on each device of a pipeline rank."""

    rank: int
    name: str
    bytes: int  # that the program allocates: the same on every rank
    used: int  # of these, what the rank fills: it may have fewer layers than others, or fewer micro-batches in flight


def memory(config: RunConfig, platform: Platform = "gpu") -> list[Part]:
    """The parts of every rank; the bytes of a rank add up to the most that one of its devices holds at one time.

    `config` is a run whose mesh `mesh.resolve` has resolved. "dispatch buffers" and "working memory" are what one pass
    needs while it runs, of the pass that needs most: of a layer, or of what runs before the layers or after them.

    On CPUs two things more are there, as XLA has them: weights beside the stages that are gathered once and kept
    (`traffic`), and a copy of the optimizer's moments, whose new values take their place before they are last read.
    """
    sizes = _state(config) | (_piped(config) if config.mesh.pipe > 1 else _whole(config))
    if platform == "cpu":
        sizes |= {"copy of the optimizer": sizes["optimizer"], "weights beside the stages": _kept(config)}
    shares = _shares(config)
    return [
        Part(rank, name, size, round(size * shares[rank].get(name, 1)))
        for rank in range(config.mesh.pipe)
        for name, size in sizes.items()
        if size
    ]


def _state(config: RunConfig) -> dict[str, int]:
    """What a step is given."""
    found: dict[str, int] = {}
    for row in state_arrays(config):
        if row.part in _STATE:
            found[_STATE[row.part]] = found.get(_STATE[row.part], 0) + row.bytes_per_device
    tokens = config.data.batch_size // config.mesh.batch_shards * (config.data.sequence_length + 1)
    return found | {"batch": tokens * (9 if config.data.mask_documents else 5)}  # ids, mask and perhaps segments


# --------------------------------------------------------------------------------------------------------- a pipeline


def _piped(config: RunConfig) -> dict[str, int]:
    """What the executor keeps from slot to slot (`pipeline.carry`), and what a pass needs."""
    program, layout, weights, shapes = program_of(config), lay_out(config), weights_of(config), Shapes.of(config)
    table, layer, depth = table_of(program), layer_functions(shapes), layout.depth
    is_gathered, is_mirrored = config.mesh.sharding == "zero1", program.placement == "dual"
    stack = [w for w in weights if w.part == "moe_blocks"]
    extras = [w for w in weights if w.part not in ("moe_blocks", "guests")]
    copy = depth * layout.chunks * sum(w.whole * w.use_bytes if is_gathered else 4 * w.shard for w in stack)
    gradients = 4 * depth * layout.chunks * sum(w.whole if is_gathered else w.shard for w in stack)
    saved = zip(layer.residuals, layer.residual_inputs, strict=True)
    residuals, kept = sum(_size(r) for r, given in saved if not given), sum(map(_size, layer.kept))
    joined = JOINED in table.kinds
    hidden = shapes.rows * shapes.length * config.model.hidden_size * jnp.dtype(FLOATS[config.precision]).itemsize
    return {
        "gathered weights": copy * (is_gathered or is_mirrored),
        "second copy": copy * is_mirrored,
        "gradients": gradients * (1 + is_mirrored),
        "gradients beside the stages": 4 * sum(w.shard * w.layers for w in extras),
        "activations": residuals * (depth * table.num_residual + joined),
        "deferred weight gradients": kept * (depth * table.num_deferred + joined),
        "between stages": hidden * (table.num_hidden + 1),
        **_of_pass(_working(shapes, layer, joined)),
    }


def _kept(config: RunConfig) -> int:
    """Of the weights that XLA for CPUs gathers once and keeps: all that is not gathered for the step anyway."""
    if config.mesh.pipe == 1 and config.mesh.sharding == "zero1":
        return 0
    weights = [w for w in weights_of(config) if w.axes]
    after = sum(w.whole * w.layers for w in weights if w.part in ("norm", "mtp"))
    return 4 * (after + sum(w.whole * min(w.layers, 2) for w in weights if w.part == "dense_blocks"))


def _working(shapes: Shapes, layer: StageFunctions, joined: bool) -> Peak:
    """Of the pass that needs most; the two passes of a joined cell are woven."""
    alone = ((program, layer.num_params) for program in (layer.forward_jaxpr, layer.backward_jaxpr))
    of_layers = [joined_layers(shapes)] if joined else alone
    return max(peak(program, count) for program, count in (*of_layers, *beside(shapes).values()))


def _shares(config: RunConfig) -> list[dict[str, float]]:
    """What each rank fills of the parts that are not the same on all."""
    if config.mesh.pipe == 1:
        return [{}]
    table, layers, found = table_of(program_of(config)), lay_out(config).layers, []
    program = table.program
    for rank in range(program.num_ranks):
        own = [layers[program.stage(rank, chunk)] for chunk in range(program.num_chunks)]
        held, deep = sum(own) / (max(layers) * len(own)), max(own) / max(layers)
        entries = {name: np.unique(getattr(table.rows, f"{name}")[:, rank]) for name in ("f_residual", "b_deferred")}
        residual = np.count_nonzero(entries["f_residual"] < table.num_residual) / max(table.num_residual, 1)
        deferred = np.count_nonzero(entries["b_deferred"] < table.num_deferred) / max(table.num_deferred, 1)
        found.append(
            {
                "gathered weights": held,
                "second copy": held,
                "gradients": held,
                "activations": deep * residual,
                "deferred weight gradients": deep * deferred,
            }
        )
    return found


# ------------------------------------------------------------------------------------------------- without a pipeline


def _whole(config: RunConfig) -> dict[str, int]:
    """A micro-batch goes through the whole model and back; its gradients are added to those of the step."""
    weights, is_gathered = weights_of(config), config.mesh.sharding == "zero1"
    ((program, count),) = beside(Shapes.of(config)).values()
    gathered = sum(w.whole * w.layers * w.use_bytes for w in weights if w.axes and w.whole > w.shard)
    return {
        "gathered weights": gathered * is_gathered,
        "gradients": 4 * sum((w.whole if is_gathered else w.shard) * w.layers for w in weights),
        **_of_pass(peak(program, count)),
    }


def _of_pass(found: Peak) -> dict[str, int]:
    return {"dispatch buffers": found.exchanged, "working memory": found.bytes - found.exchanged}


def _size(x: jax.ShapeDtypeStruct) -> int:
    return x.size * x.dtype.itemsize
