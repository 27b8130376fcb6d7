"""Which matrix products are computed while a collective is in flight, read from a program that XLA has scheduled.

In the text of a compiled program (`compiled.as_text()`) the instructions of a computation stand in the order in which
they are issued, and a collective is in flight from its start to its done. What hides it is work of the other
micro-batch: passes are told apart by `jax.named_scope("F")`, `"B"` and so on. Only products of matrices count, in
fusions, loops and calls of cuBLAS too, and kernels that say their FLOPs; casts, copies and sums hide nothing.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from moejax.plan.collectives import KINDS, arrays, computations

SIDES = ("F", "B", "I", "W")
_INSTRUCTION = re.compile(r" *(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)")
_NAME = re.compile(r"%([\w.\-]+)")


@dataclass(frozen=True)
class Flight:
    """A collective, and the products that are computed while it is in flight."""

    kind: str  # of `collectives.KINDS`
    side: str  # of SIDES; "" outside of all
    computation: str  # in which it stands
    bytes: int  # of the arrays that a device has after it
    flops: Mapping[str, int]  # floating-point operations of each side's products between its start and its done
    sync: bool  # nothing is issued before it is done

    @property
    def hiding_flops(self) -> int:
        """Those of the other side."""
        return sum(count for side, count in self.flops.items() if side not in (self.side, ""))

    @property
    def state(self) -> str:
        """Whether products of the other side hide it: "hidden" or "exposed", or "sync" where nothing could."""
        return "sync" if self.sync else "hidden" if self.hiding_flops else "exposed"


def flights(hlo: str) -> list[Flight]:
    """The collectives of a scheduled program; those of one computation in the order of their starts.

    A loop that always has the same number of trips counts as often as it is run. Of another it is not known: it counts
    once inside such a loop (blocks of an expert's rows), and not at all outside (the exchange's later rounds).
    """
    program = {}
    for name, lines in computations(hlo).items():
        found = (_INSTRUCTION.match(line) for line in lines)
        program[name] = {match[1]: _Instruction(*match.groups()) for match in found if match}
    starts = (i for found in program.values() for i in found.values() if i.opcode == "async-start")
    wrapped = {name for start in starts for name in start.called}
    return [flight for name in program if name not in wrapped for flight in _flights(program, name)]


def table(found: Sequence[Flight]) -> str:
    """One line each, as a Markdown table; FLOPs are those between start and done."""
    sides = [side for side in SIDES if any(side in f.flops for f in found)]
    head = ["collective", "of", "MB", *(f"GFLOP of {side}" for side in sides), "state"]
    rows = [head, ["---" if name in ("collective", "of", "state") else "---:" for name in head]]
    for f in found:
        work = (f"{f.flops.get(side, 0) / 1e9:.1f}" for side in sides)
        rows.append([f.kind, f.side, f"{f.bytes / 1e6:.1f}", *work, f.state])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


class _Instruction(NamedTuple):
    name: str
    result: str
    opcode: str
    rest: str  # operands and attributes

    @property
    def operands(self) -> list[str]:
        return _NAME.findall(self.rest.split(")")[0])

    @property
    def called(self) -> list[str]:
        """The computations that it calls, but for those that may not run: branches."""
        return re.findall(r"(?:calls|body|to_apply)=%([\w.\-]+)", self.rest)

    @property
    def side(self) -> str:
        scope = re.search(r'op_name="([^"]*)"', self.rest)
        return next((part for part in reversed(scope[1].split("/")) if part in SIDES), "") if scope else ""


_Program = Mapping[str, Mapping[str, _Instruction]]


def _flights(program: _Program, computation: str) -> list[Flight]:
    instructions = list(program[computation].values())
    found = []
    for place, start in enumerate(instructions):
        kind = _collective(program, start)
        if not kind:
            continue
        done, work = start, Counter[str]()
        if start.opcode.endswith("-start"):
            for done in instructions[place + 1 :]:
                if done.opcode.endswith("-done") and start.name in done.operands:
                    break
                work += _work(program, computation, done, "", False)
        sync = done is start or '"is_sync":true' in start.rest
        size = sum(size for _, size in arrays(done.result))
        found.append(Flight(kind, start.side, computation, size, dict(work), sync))
    return found


def _collective(program: _Program, instruction: _Instruction) -> str:
    """Its kind if it is one, or its start; else ""."""
    kind = instruction.opcode.removesuffix("-start")
    if kind == "async":
        inner = (i.opcode for name in instruction.called for i in program[name].values())
        return next((opcode for opcode in inner if opcode in KINDS), "")
    return kind if kind in KINDS else ""


def _work(program: _Program, computation: str, instruction: _Instruction, side: str, repeated: bool) -> Counter[str]:
    """FLOPs of each side's products; `repeated`: in a loop of a known number of trips."""
    side = side or instruction.side  # bodies of equal loops may be one, under the name of one
    if instruction.opcode == "dot" or 'custom_call_target="__cublas$' in instruction.rest:
        return Counter({side: _product(program[computation], instruction)})
    stated = re.search(r"/flops=(\d+)/", instruction.rest) if instruction.opcode == "custom-call" else None
    if stated:
        return Counter({side: int(stated[1])})
    trips = 1
    if instruction.opcode == "while":
        known = re.search(r'known_trip_count":\{"n":"(\d+)"', instruction.rest)
        trips, repeated = (int(known[1]), True) if known else (int(repeated), repeated)
    total = Counter[str]()
    for name in instruction.called:
        for inner in program[name].values():
            for whose, count in _work(program, name, inner, side, repeated).items():
                total[whose] += count * trips
    return +total


def _product(computation: Mapping[str, _Instruction], product: _Instruction) -> int:
    """Two operations for each number of the result and each number of a dim that is summed over."""
    (dims, _), *_ = arrays(product.result)
    (left, _), *_ = arrays(computation[product.operands[0]].result)
    (summed,) = re.findall(r'lhs_contracting_dim(?:s=\{|ensions":\[)([^\]}]*)', product.rest)
    return 2 * math.prod(dims) * math.prod(left[int(dim)] for dim in re.findall(r"\d+", summed))
