"""The forward pass of one chunk woven with the backward pass of another, so that communication hides behind products.

Without data dependence between them XLA still runs one after the other, or starts an all-to-all where nothing is left
to compute. Here both are cut at their all-to-alls, C0 A0 C1 A1 ... and D0 A'0 D1 A'1 ..., and emitted in phases

    D0 | {A'0, C0} | {A0, D1} | {A'1, C1} | {A1, D2} | ...

with an optimization barrier between two phases: in each the all-to-all of one chunk is in flight across the compute of
the other (arXiv:2412.19437, figure 4). Where a side has fewer all-to-alls than the other, or has to cover two in a row,
its compute is cut between its products. What no all-to-all waits for, or what waits for none, moves out of D0 and the
last C, during which nothing is in flight.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.extend.core as jc
from jax import lax
from jaxtyping import Array

from moejax.pipeline.backward import StageFunctions, evaluate, num_bytes, reached, value_of, variables

# For `jax.jit` on GPUs. XLA's scheduler takes a loop over experts for next to nothing, and would start an all-to-all
# after it; and it would let the collectives of a phase wait for each other, which are one after the other in any case.
GPU_OPTIONS = {
    "xla_gpu_experimental_collective_start_as_early_as_possible": True,
    "xla_gpu_experimental_parallel_collective_overlap_limit": 4,
}

_EXCHANGES = {"all_to_all", "ragged_all_to_all"}
_PRODUCTS = {"dot_general", "ragged_dot_general", "conv_general_dilated", "ffi_call"}


def interleave_stages(
    ahead: StageFunctions,
    params: Any,
    x: Any,
    behind: StageFunctions,
    params_behind: Any,
    residuals: Sequence[Array],
    dy: Any,
    daux: Any,
    put_off: bool = False,
) -> tuple[tuple[Any, Any, list[Array]], tuple[Any, Any]]:
    """`ahead.forward(params, x)` and `behind.backward(params_behind, residuals, dy, daux)`, woven.

    With `put_off` it is `behind.backward_input`.
    """
    outputs, gradients = interleave(
        ahead.forward_jaxpr,
        jax.tree.leaves((params, x)),
        behind.input_jaxpr if put_off else behind.backward_jaxpr,
        jax.tree.leaves((params_behind, residuals, dy, daux)),
        num_weights=(ahead.num_params, behind.num_params),
    )
    results = behind.input_results if put_off else behind.backward_results
    return ahead.forward_results(outputs), results(gradients)


def interleave(
    forward_jaxpr: jc.ClosedJaxpr,
    forward_args: Sequence[Array],
    backward_jaxpr: jc.ClosedJaxpr,
    backward_args: Sequence[Array],
    num_weights: tuple[int, int] = (0, 0),
) -> tuple[list[Array], list[Array]]:
    """The results of both programs, which are flat (`backward.flatten`).

    The arguments vary over the same mesh axes. The first `num_weights` of each program, and what follows from them
    alone, no barrier holds up, so that casts of them fuse with what uses them.
    """
    forward = _Side("F", forward_jaxpr, forward_args, num_weights[0])
    backward = _Side("B", backward_jaxpr, backward_args, num_weights[1])
    backward.shorten_first()
    forward.shorten_last()
    forward.cut_further(len(backward.runs))
    backward.cut_further(len(forward.runs), after=1)
    phases = _phases(forward, backward)
    for number, phase in enumerate(phases):
        for side, eqns in phase:
            with jax.named_scope(side.name):
                evaluate(eqns, side.env)
        if number + 1 < len(phases):
            _hold(phase, phases[number + 1 :])
    return forward.results(), backward.results()


_Equations = list[jc.JaxprEqn]


class _Side:
    """A program, cut, and the values found so far: compute 0, run 0, compute 1, and so on.

    A run is a number of exchanges without products between them, as where tokens travel in two hops; an exchange begins
    with the equations that lead to it.
    """

    def __init__(self, name: str, closed: jc.ClosedJaxpr, args: Sequence[Array], num_weights: int):
        self.name, self.program = name, closed.jaxpr
        self.env: dict[jc.Var, Any] = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
        self.env.update(zip(closed.jaxpr.invars, args, strict=True))
        self.holdable = reached(closed.jaxpr.eqns, closed.jaxpr.invars[num_weights:])
        self.computes, self.runs = _cut(closed.jaxpr.eqns)

    def shorten_first(self) -> None:
        """Moves what the first run does not need behind it."""
        if self.runs:
            first, later = _leading(self.computes[0], _joined(self.runs[0]))
            self.computes[:2] = [first, later + self.computes[1]]

    def shorten_last(self) -> None:
        """Moves what does not wait for the last run before it."""
        if self.runs:
            last, sooner = _waiting(self.computes[-1], _joined(self.runs[-1]))
            self.computes[-2:] = [self.computes[-2] + sooner, last]

    def cut_further(self, count: int, after: int = 0) -> None:
        """Cuts the compute with most products in two until `count` of those after the first `after` have some."""
        while sum(map(bool, map(_products, self.computes[after:]))) < count:
            numbers = [len(_products(compute)) for compute in self.computes]
            most = numbers.index(max(numbers))
            if numbers[most] < 2:
                return
            self.computes[most : most + 1] = _pieces(self.computes[most], 2)
            self.runs.insert(most, [])

    def results(self) -> list[Array]:
        return [value_of(self.env, v) for v in self.program.outvars]


def _cut(eqns: Sequence[jc.JaxprEqn]) -> tuple[list[_Equations], list[list[_Equations]]]:
    """Computes, and the runs of exchanges between them."""
    pieces, exchanges = _between_exchanges(eqns)
    computes: list[_Equations] = [pieces[0]]
    runs: list[list[_Equations]] = []
    for exchange, piece in zip(exchanges, pieces[1:], strict=True):
        if not runs or _products(computes[-1]):
            runs.append([exchange])
            computes.append(piece)
        else:
            runs[-1].append(computes[-1] + exchange)
            computes[-1] = piece
    return computes, runs


def _between_exchanges(eqns: Sequence[jc.JaxprEqn]) -> tuple[list[_Equations], list[_Equations]]:
    """What is between exchanges, and the exchanges: collectives that do not wait for each other or for a product.

    So the rows of a dispatch and what is sent with them are one exchange.
    """
    pieces: list[_Equations] = [[]]
    exchanges: list[_Equations] = []
    for eqn in eqns:
        if not _is_sent(eqn):
            pieces[-1].append(eqn)
            continue
        waiting, free = _waiting([*pieces[-1], eqn], exchanges[-1] if exchanges else [])
        if not exchanges or eqn in waiting[-1:] or _products(pieces[-1]):
            exchanges.append([eqn])
            pieces.append([])
        else:
            pieces[-2:] = [pieces[-2] + free[:-1], waiting]
            exchanges[-1].append(eqn)
    return pieces, exchanges


def _is_sent(eqn: jc.JaxprEqn) -> bool:
    """Whether it is an all-to-all, or the gathering of one number, by which devices agree on rounds to come."""
    name = eqn.primitive.name
    return name in _EXCHANGES or (name == "all_gather" and not _shape(eqn.invars[0]))


def _waiting(eqns: _Equations, on: _Equations) -> tuple[_Equations, _Equations]:
    """The equations that wait for those of `on`, and the others."""
    waiting: _Equations = []
    made = {v for eqn in on for v in eqn.outvars}
    for eqn in eqns:
        if not made.isdisjoint(variables(eqn.invars)):
            waiting.append(eqn)
            made |= set(eqn.outvars)
    return waiting, [eqn for eqn in eqns if eqn not in waiting]


def _leading(eqns: _Equations, to: _Equations) -> tuple[_Equations, _Equations]:
    """The equations for which those of `to` wait, and the others."""
    leading: _Equations = []
    wanted = {v for eqn in to for v in variables(eqn.invars)}
    for eqn in reversed(eqns):
        if not wanted.isdisjoint(eqn.outvars):
            leading.append(eqn)
            wanted |= set(variables(eqn.invars))
    return leading[::-1], [eqn for eqn in eqns if eqn not in leading]


def _joined(lists: Iterable[_Equations]) -> _Equations:
    return list(itertools.chain.from_iterable(lists))


# ---------------------------------------------------------------------------------------------------------------- work


def _pieces(eqns: _Equations, count: int) -> list[_Equations]:
    """`eqns` in `count` pieces of about as much work; each has a product, if there are as many."""
    done = list(itertools.accumulate(map(_work, eqns)))
    ends = [i + 1 for i, eqn in enumerate(eqns) if _work(eqn)]
    cuts = [0]
    for piece in range(1, count):
        places = [end for end in ends[: max(len(ends) - count + piece, 1)] if end > cuts[-1]]
        aim = done[-1] * piece / count if done else 0
        cuts.append(min(places, key=lambda end: abs(done[end - 1] - aim), default=len(eqns)))
    return [eqns[a:b] for a, b in itertools.pairwise([*cuts, len(eqns)])]


def _products(eqns: _Equations) -> _Equations:
    return [eqn for eqn in eqns if _work(eqn)]


def _work(eqn: jc.JaxprEqn) -> float:
    """The operations of its products: exact for a plain one, about as many as there are for one in a loop or kernel.

    A loop that may have any number of trips is a grouped product if it multiplies itself, or its blocks of one length,
    which count as all of it each; if what it runs are such loops or kernels, it is the exchange's later rounds and has
    no trip as a rule.
    """
    name, params = eqn.primitive.name, eqn.params
    if not _num_products(eqn) or (name == "while" and not _multiplies(params["body_jaxpr"].jaxpr)):
        return 0.0
    if name == "dot_general":
        ((summed, _), _), left = params["dimension_numbers"], _shape(eqn.invars[0])
        return 2.0 * math.prod(_shape(eqn.outvars[0])) * math.prod(left[dim] for dim in summed)
    results = eqn.outvars
    if name == "scan":  # those that are stacked, not the carry
        inner = params["jaxpr"].jaxpr.outvars
        results = [v for v, own in zip(results, inner, strict=True) if _shape(v) != _shape(own)]
    arrays = [*eqn.invars, *results]
    # of [m, k], [k, n] and [m, n] the root of the product of the sizes is m * k * n; a loop has a matrix for each trip
    largest = sorted(math.prod(_shape(v)) for v in arrays)[-3:]
    return 2.0 * math.sqrt(math.prod(largest) / params.get("length", 1))


def _shape(v: jc.Var | jc.Literal) -> tuple[int, ...]:
    aval: Any = v.aval
    return aval.shape


def _num_products(eqn: jc.JaxprEqn) -> int:
    inner = (e for jaxpr in jc.jaxprs_in_params(eqn.params) for e in jaxpr.eqns)
    return (eqn.primitive.name in _PRODUCTS) + sum(_num_products(e) for e in inner)


def _multiplies(jaxpr: jc.Jaxpr) -> bool:
    """Whether it has a product that is in no loop or kernel of its own."""

    def has_product(eqn: jc.JaxprEqn) -> bool:
        called = jc.jaxprs_in_params(eqn.params) if eqn.primitive.name == "jit" else ()
        return eqn.primitive.name == "dot_general" or any(map(_multiplies, called))

    return any(map(has_product, jaxpr.eqns))


# -------------------------------------------------------------------------------------------------------------- phases


_Phase = list[tuple[_Side, _Equations]]


def _phases(forward: _Side, backward: _Side) -> list[_Phase]:
    """What runs together, in order."""
    count = max(len(forward.runs), len(backward.runs))
    if not count:
        return [[(backward, backward.computes[0]), (forward, forward.computes[0])]]

    def beside(sending: _Side, run: list[_Equations], computing: _Side, compute: _Equations) -> list[_Phase]:
        phases: list[_Phase] = []
        for exchange, piece in zip(run or [[]], _pieces(compute, max(len(run), 1)), strict=True):
            start = max((i + 1 for i, eqn in enumerate(exchange) if _num_products(eqn)), default=0)  # after loops
            phases += [[(sending, exchange[:start])], [(sending, exchange[start:]), (computing, piece)]]
        return phases

    ahead, behind = ([*s.computes, *[[]] * (count + 1 - len(s.computes))] for s in (forward, backward))
    sent, sent_back = ([*s.runs, *[[]] * (count - len(s.runs))] for s in (forward, backward))
    phases: list[_Phase] = [[(backward, behind[0])]]
    for i in range(count):
        phases += beside(backward, sent_back[i], forward, ahead[i])
        phases += beside(forward, sent[i], backward, behind[i + 1])
    phases.append([(forward, ahead[count])])
    return [phase for phase in phases if any(eqns for _, eqns in phase)]


def _hold(phase: _Phase, later: Sequence[_Phase]) -> None:
    """Puts a barrier between `phase` and the next. What passes it:

    what the phase computed and something later reads; of a product that leads to nothing of that, as a weight's
    gradient, one result, as it could be computed anywhere else; and of a product of the next phase that waits for
    nothing of all this, the smallest of the older values it is computed from.
    """
    wanted = {v for p in later for _, eqns in p for eqn in eqns for v in variables(eqn.invars)}
    held: dict[jc.Var, _Side] = {}
    for side, eqns in phase:
        made = dict.fromkeys(v for eqn in eqns for v in eqn.outvars if v in side.holdable)
        held |= {v: side for v in made if v in wanted}
        results = [v for v in variables(side.program.outvars) if v in made]
        for eqn in filter(_num_products, eqns):
            after = reached(eqns, eqn.outvars)
            if held.keys().isdisjoint(after):
                held |= dict.fromkeys(sorted(after.intersection(results), key=results.index)[:1], side)
    for side, eqns in later[0]:
        origins: dict[jc.Var, dict[jc.Var, None]] = {}  # of what the next phase computes, in values that there are
        for eqn in eqns:
            inputs = [v for v in variables(eqn.invars) if v in side.holdable]
            origin = {o: None for v in inputs for o in origins.get(v, {v: None})}
            if origin and _num_products(eqn) and held.keys().isdisjoint(origin):
                held[min(origin, key=num_bytes)] = side
            origins |= dict.fromkeys(eqn.outvars, origin)
    values = lax.optimization_barrier([side.env[v] for v, side in held.items()])
    for (v, side), value in zip(held.items(), values, strict=True):
        side.env[v] = value
