"""How long a step takes, part by part: the cells of the pipeline, what of their communication is hidden, the rest.

A cell that runs alone waits for its communication. In a joined one (`pipeline.interleave`) the all-to-alls of a layer's
forward and of another's backward run beside the products of the other, in four phases:

    dispatch of B | attention of F      dispatch of F | experts of B      combine of B | experts of F
    combine of F  | attention of B

Each takes as long as the longer of its two sides; products beside an all-to-all have fewer multiprocessors. The step is
the replay of the table that the executor runs, with the cells' times, and what comes before and after it.
"""

import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from moejax.config import RunConfig
from moejax.mesh import AXES
from moejax.model.count import train_flops_per_token
from moejax.pipeline.layout import lay_out
from moejax.pipeline.replay import execute
from moejax.pipeline.schedule import Cell, Program
from moejax.pipeline.simulate import StageCosts, Timeline
from moejax.pipeline.stages import program_of, table_of
from moejax.plan.hardware import Hardware
from moejax.plan.parts import Parts
from moejax.plan.traffic import Transfer, passes
from moejax.plan.weights import weights_of
from moejax.plan.work import Operation, block, embedding, head, mtp_module

EXPOSED, HEAD = "all-to-all, exposed", "head and MTP"
OUTSIDE = {"mirror": "mirror", "weights": "gathers of weights", "gradients": "sums of gradients over devices"}
LATENCY = 50e-6  # seconds that a collective takes at least: DeepEP's smallest take 77 to 194 us with their data


@dataclass(frozen=True)
class Overlap:
    """An all-to-all of one micro-batch and the products of another that run beside it, in seconds."""

    name: str
    communication: float
    computation: float  # on the multiprocessors that the communication leaves


@dataclass(frozen=True)
class Timing:
    """A step's time, in seconds; by part or kind of cell it is the mean over the pipeline's ranks."""

    step: float
    parts: Parts  # they sum to `step`; bubble: what a rank waits for others
    cells: Parts  # 1F, 1B, 1W, 1F1B, bubble, and what is outside of the pipeline; they sum to `step` too
    bubble: tuple[float, ...]  # of each rank
    outside: float  # what is before and after the pipeline
    tokens: int  # of a step
    devices: int
    flops: float  # of the model, attention's causal half counted; nothing that is computed again
    peak: float  # FLOP/s of a device that MFU is relative to: BF16's
    timeline: Timeline = field(repr=False)
    overlaps: tuple[Overlap, ...] = ()  # the phases of a layer in a joined cell; none without a pipeline or experts

    @property
    def busy(self) -> tuple[float, ...]:
        """Seconds of the pipeline in which each rank works or waits for communication, not for another rank."""
        return tuple(self.step - self.outside - bubble for bubble in self.bubble)

    @property
    def tokens_per_second(self) -> float:
        """Of one device."""
        return self.tokens / self.step / self.devices

    @property
    def mfu(self) -> float:
        """Share of the BF16 peak."""
        return self.flops / self.step / self.devices / self.peak


def estimate(config: RunConfig, hardware: Hardware) -> Timing:
    """The time of a step with the full batch; `config` is resolved. Routing is balanced, no transfer fails."""
    cells = Cells(config, hardware)
    program = program_of(config)
    timeline = execute(table_of(program), cells.costs(program))
    outside = cells.outside()
    spent, kinds = Parts(), Parts()
    for rank, spans in enumerate(timeline.spans):
        for start, end, cell in spans:
            spent += cells.of(tuple(op.kind for op in cell), program.stages_of(rank, cell))
            kinds += Parts({_kind_of(cell, cells.piped): end - start})
    ranks = program.num_ranks
    parts, by_kind = spent * (1 / ranks), kinds * (1 / ranks)
    bubble = float(timeline.bubble.mean())
    parts += outside + Parts({"bubble": bubble})
    by_kind += Parts({"bubble": bubble, "outside": outside.total()})
    length, rows = config.data.sequence_length, config.data.batch_size
    return Timing(
        step=timeline.makespan + outside.total(),
        parts=parts,
        cells=by_kind,
        bubble=tuple(timeline.bubble.tolist()),
        outside=outside.total(),
        tokens=rows * length,
        devices=math.prod(getattr(config.mesh, axis) for axis in AXES),
        flops=train_flops_per_token(config.model, length) * rows * length,
        peak=hardware.bf16,
        timeline=timeline,
        overlaps=cells.overlaps() if cells.piped and config.model.num_moe_layers else (),
    )


class Cells:
    """The times of a config's cells on some hardware."""

    def __init__(self, config: RunConfig, hardware: Hardware):
        self.config, self.hardware = config, hardware
        self.transfers = passes(config, hardware.devices_per_node)
        self.layer = block(config, "moe") if config.model.num_moe_layers else []
        dense = block(config, "dense") * config.model.num_dense_layers
        self.enter = [*embedding(config), *dense]
        self.losses = head(config) * (1 + config.model.mtp.depth)
        self.mtp = mtp_module(config) * config.model.mtp.depth
        self.piped = config.mesh.pipe > 1
        self.layers = lay_out(config).layers if self.piped else (config.model.num_moe_layers,)

    # ------------------------------------------------------------------------------------------------------------ cells

    @functools.cache  # noqa: B019
    def of(self, kinds: tuple[str, ...], stages: tuple[int, ...]) -> Parts:
        """The time of a cell by part."""
        return self._joined(*stages) if len(stages) == 2 and self.piped else self._single(kinds, stages)

    def costs(self, program: Program) -> StageCosts:
        """The times of a program's cells, for the pipeline's simulators."""
        met = {
            (tuple(op.kind for op in cell), program.stages_of(rank, cell))
            for rank, cells in enumerate(program.cells)
            for cell in cells
        }
        time = {(kinds, stages): self.of(kinds, stages).total() for kinds, stages in met}
        pairs = [(stages[0], stages[1]) for _, stages in met if len(stages) == 2]
        single = {(kinds[0], stages[0]): time[kinds, stages] for kinds, stages in met if len(stages) == 1}
        joined = {(a, b): time[("F", "B"), (a, b)] for a, b in pairs}
        after = {(a, b): self._late.total() if self.piped and self._woven(a, b) else 0.0 for a, b in pairs}
        sends = [self.seconds(t) for t in self.transfers if t.place == "stages"]
        return StageCosts(single=single, joined=joined, after=after, send=max(sends, default=0.0))

    def _single(self, kinds: Sequence[str], stages: Sequence[int]) -> Parts:
        """Ops that run one after the other."""
        found = Parts()
        for kind, stage in zip(kinds, stages, strict=True):
            sides = {"F": "F", "I": "I", "W": "W", "B": "IW"}[kind]
            found += self._layer_alone(sides) * self.layers[stage]
            found += self._beside(kind, stage)
        return found

    def _joined(self, ahead: int, behind: int) -> Parts:
        """A forward of one stage with a backward of another; the layers that one has more run alone."""
        woven, late = self._woven(ahead, behind), self._late
        found = self._layer_woven("IW") * max(woven - 1, 0)
        found += self._layer_woven("I") + late if woven else Parts()
        found += self._layer_alone("F") * (self.layers[ahead] - woven)
        found += self._layer_alone("IW") * (self.layers[behind] - woven)
        return found + self._beside("F", ahead) + self._beside("B", behind)

    def _woven(self, ahead: int, behind: int) -> int:
        return min(self.layers[ahead], self.layers[behind])

    @functools.cached_property
    def _late(self) -> Parts:
        """The weight gradients that the last layer of a joined cell computes beside what is sent to other ranks."""
        return self._compute(self._select(self.layer, "W"))

    # ----------------------------------------------------------------------------------------------------------- layers

    @functools.cache  # noqa: B019
    def _layer_alone(self, sides: str) -> Parts:
        """A layer's pass that waits for its communication. Weight gradients need none but FSDP's."""
        found = self._compute(self._select(self.layer, sides))
        for side in sides:
            found += self._exposed("layer", {"I": "B"}.get(side, side))
        return found

    @functools.cache  # noqa: B019
    def _layer_woven(self, sides: str) -> Parts:
        """A forward of a layer beside a backward."""
        found = self._exposed("layer", "F", "weights") + self._exposed("layer", "B", "weights")
        found += self._exposed("layer", "W")
        for _, communication, operations in self._phases(sides):
            found += self._phase(communication, operations)
        return found

    def _phases(self, sides: str) -> Iterator[tuple[str, float, list[Operation]]]:
        """The phases of a woven layer: a name, seconds of what is sent, and what is computed meanwhile."""
        to_experts, back = ("dispatch", "choices", "rounds"), ("combine",)
        for name, sending, sent, computing, piece in (
            ("dispatch of B | attention of F", "B", back, "F", ("attention",)),
            ("dispatch of F | experts of B", "F", to_experts, sides, ("experts", "end")),
            ("combine of B | experts of F", "B", to_experts, "F", ("experts", "end")),
            ("combine of F | attention of B", "F", back, sides, ("attention",)),
        ):
            sent_seconds = self._sent("layer", sending, sent)
            yield name, sent_seconds, self._select(self.layer, computing, piece)

    def overlaps(self) -> tuple[Overlap, ...]:
        """The phases of a layer whose forward runs beside another micro-batch's backward."""
        sms = self.hardware.communication_sms
        return tuple(
            Overlap(name, sent, self._compute(operations, sms).total()) for name, sent, operations in self._phases("IW")
        )

    def _phase(self, communication: float, operations: list[Operation]) -> Parts:
        """Work beside communication: products are slower until that is done."""
        free, slowed = self._compute(operations), self._compute(operations, self.hardware.communication_sms)
        if slowed.total() <= communication:
            return slowed + Parts({EXPOSED: communication - slowed.total()})
        done = communication / slowed.total() if slowed else 0.0
        return Parts({name: done * slowed[name] + (1 - done) * free[name] for name in free})

    # -------------------------------------------------------------------------------------------- before and after them

    @functools.cache  # noqa: B019
    def _beside(self, kind: str, stage: int) -> Parts:
        """What runs with the first stage, and with the last, all of that in the backward pass's cell."""
        found, last, side = Parts(), len(self.layers) - 1, "F" if kind == "F" else "B"
        if stage == 0 and kind != "W":
            sides = "F" if kind == "F" else "FIW" if self.piped else "IW"  # a pipeline computes it again
            work = self._compute(self._select(self.enter, sides))
            found += work + self._prefetched("enter", side, work.total())
        if stage == last and kind in "BI":
            found += Parts({HEAD: self._compute(self.mtp).total()}) + self._exposed("leave", "B", but="head")
            found += self._losses
        if not self.piped and kind != "W":
            work = self._compute(self._select(self.layer, "F" if kind == "F" else "IW")) * self.layers[0]
            found += self._prefetched("stack", side, work.total())
        return found

    @functools.cached_property
    def _losses(self) -> Parts:
        """Both passes of all losses: but for the first chunk's columns, and the last one's gradient, they travel beside
        the products of other chunks (`ops.loss`).
        """
        own = [t for t in self.transfers if (t.place, t.what) == ("leave", "head")]
        chunks = own[0].times if own else 1
        first, *others = (self.seconds(t) for t in own) if own else (0.0, 0.0, 0.0)
        found, alone = Parts(), first + others[-1]
        for side, communication in (("F", (chunks - 1) * first), ("IW", chunks * sum(others) - others[-1])):
            beside = self._phase(communication, self._select(self.losses, side))
            alone += beside.pop(EXPOSED, 0.0)
            found += Parts({HEAD: beside.total()})
        return found + Parts({f"{HEAD}, communication": alone})

    def _prefetched(self, place: str, side: str, hiding: float) -> Parts:
        """Communication of layers whose weights are gathered a layer ahead (`model.prefetch`), beside their work.

        Nothing is beside the first gather, and in a backward pass the last sum of a gradient.
        """
        found = self._exposed(place, side)
        gathers = sum(found.pop(OUTSIDE[what], 0.0) for what in ("weights", "gradients"))
        own = {t.what: self.seconds(t) for t in self.transfers if (t.place, t.side) == (place, side) and t.times}
        alone = min(gathers, own.get("weights", 0.0) + own.get("gradients", 0.0))
        return found + Parts({OUTSIDE["weights"]: alone + max(0.0, gathers - alone - hiding)})

    def outside(self) -> Parts:
        """What comes before the pipeline and after it: the mirror, gathers, sums of gradients, the optimizer."""
        found = self._exposed("step", "")
        moment = 2 if self.config.optimizer.moments == "bf16" else 4
        per_number = 4 + 4 + 8 + 4 * moment + (8 if self.config.optimizer.ema_decay else 0)  # norm, gradient, weight
        numbers = sum(
            weight.shard * weight.layers / (self.config.mesh.pipe if weight.part == "moe_blocks" else 1)
            for weight in weights_of(self.config)
            if weight.trained
        )
        return found + Parts({"optimizer": self.hardware.seconds("memory", 0.0, per_number * numbers)})

    # ---------------------------------------------------------------------------------------------------------- seconds

    def _select(self, operations: Iterable[Operation], sides: str, pieces: Sequence[str] = ()) -> list[Operation]:
        return [op for op in operations if op.side in sides and (not pieces or op.piece in pieces)]

    def _compute(self, operations: Iterable[Operation], sms: int = 0) -> Parts:
        found = Parts()
        for op in operations:
            seconds = self.hardware.seconds(op.kind, op.flops, op.bytes, sms)
            found[op.name] = found.get(op.name, 0.0) + seconds
        return found

    def _sent(self, place: str, side: str, what: Sequence[str]) -> float:
        own = (t for t in self.transfers if (t.place, t.side) == (place, side) and t.what in what)
        return sum(self.seconds(t) * t.times for t in own)

    def _exposed(self, place: str, side: str, only: str = "", but: str = "") -> Parts:
        """Communication for which everything waits."""
        found = Parts()
        for t in self.transfers:
            if (t.place, t.side) == (place, side) and only in ("", t.what) and t.what != but:
                found += Parts({_part_of(t): self.seconds(t) * t.times})
        return found

    def seconds(self, transfer: Transfer) -> float:
        """One execution of a collective: as long as its slower way, inside nodes or between them."""
        hardware, share = self.hardware, transfer.inter_node_share
        size, local = self._group(transfer.axis)
        if transfer.kind in ("all-to-all", "collective-permute"):
            far, near = transfer.bytes * share, transfer.bytes * (1 - share)
        else:
            # rings that enter and leave a node once, by all of its network cards
            whole = transfer.bytes * (size if transfer.kind == "reduce-scatter" else 1)
            rounds = 2 if transfer.kind == "all-reduce" else 1
            far, near = rounds * whole * share / local, rounds * whole * (1 - 1 / size) * (local > 1)
        return max(LATENCY, far / hardware.inter_node, near / hardware.intra_node)

    @functools.cache  # noqa: B019
    def _group(self, axis: str) -> tuple[int, int]:
        """Devices of a collective along axes, and those of them on one node."""
        mesh, axes = self.config.mesh, axis.split(" x ")
        lengths = [getattr(mesh, axis) for axis in AXES]
        along = [slice(None) if axis in axes else 0 for axis in AXES]
        members = np.arange(math.prod(lengths)).reshape(lengths)[tuple(along)].ravel()
        nodes = members // self.hardware.devices_per_node
        return len(members), int((nodes == nodes[0]).sum())


def _kind_of(cell: Cell, piped: bool) -> str:
    """A cell as the published table of a step's time calls it."""
    if len(cell) == 2:
        return "1F1B" if piped else "forward and backward"
    return {"F": "1F", "W": "1W"}.get(cell[0].kind, "1B")


def _part_of(transfer: Transfer) -> str:
    """The part of the step's time that a collective is for."""
    if transfer.place == "leave":
        return f"{HEAD}, communication"
    return OUTSIDE.get(transfer.what, EXPOSED if transfer.kind == "all-to-all" else "small collectives")
