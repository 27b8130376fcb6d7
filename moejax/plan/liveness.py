"""The most bytes that a traced program holds at one time, read from its equations in their order.

XLA fuses: what is computed number by number, or read from elsewhere, has memory of its own only where a product, a
loop, a sum or a collective reads it, or where it is a result. It computes in place: a result takes the place of an
operand of its size that nothing reads later. Casts and transposes of weights cost nothing. All of this is about what a
compiler does, not exactly that; how it packs what is there at one time is not looked at. What is large in a training
step, weights, gradients and what passes keep for each other, does not depend on it.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax.extend.core as jc
import jax.numpy as jnp

from moejax.pipeline.backward import variables

_BY_NUMBER = (
    "abs add add_any and bitcast_convert_type broadcast_in_dim clamp concatenate convert_element_type copy cos div "
    "dynamic_slice eq exp exp2 expand_dims expm1 gather ge gt integer_pow iota is_finite le log log1p logistic lt max "
    "min mul name ne neg not or pad pcast pow pvary reduce_precision rem reshape rev round rsqrt select_n sign sin "
    "slice split sqrt square squeeze stack stop_gradient sub tanh transpose unstack xor"
)
_FUSED = frozenset(_BY_NUMBER.split())
# what these read fuses with them
_SUMS = frozenset(("argmax", "reduce_and", "reduce_max", "reduce_min", "reduce_or", "reduce_sum"))
_LOOPS = frozenset(("scan", "while"))
_UPDATES = _LOOPS | {"dynamic_update_slice", "scatter", "scatter-add"}

_EXCHANGES = frozenset(("all_to_all", "ragged_all_to_all"))

_Values = set[jc.Var]


class Peak(NamedTuple):
    """What is held when most is."""

    bytes: int
    exchanged: int  # of these, in arrays that all-to-alls read or write


def peak(program: jc.ClosedJaxpr, num_weights: int = 0) -> Peak:
    """Beside the program's arguments, of which the first `num_weights` are weights; results included."""
    return _peak(program.jaxpr, set(program.jaxpr.invars[:num_weights]), set())


def _peak(jaxpr: Any, weights: _Values, free: _Values) -> Peak:
    """`free`: arguments whose place results may take."""
    weights = _following(jaxpr.eqns, weights)
    stored = _stored(jaxpr, weights)
    read = _reads(jaxpr, stored, weights)
    last = {v: number for number, values in enumerate(read) for v in values}
    held: dict[jc.Var, int] = dict.fromkeys(free, 0)  # what each value adds to the sum; nothing in an argument's place
    sent = {v for e in jaxpr.eqns if e.primitive.name in _EXCHANGES for v in (*variables(e.invars), *e.outvars)}
    live, most = 0, Peak(0, 0)
    for number, eqn in enumerate(jaxpr.eqns):
        ending = [v for v in read[number] if last[v] == number and v in held]
        places: dict[int, list[int]] = defaultdict(list)
        for v in ending if _is_in_place(eqn) else ():
            places[num_bytes(v)].append(held[v])
        is_loop = eqn.primitive.name in _LOOPS  # whose carry needs a place though nobody may read it after
        made = {v: num_bytes(v) for v in eqn.outvars if v in stored and (v in last or is_loop)}
        charged, new = {}, 0
        for v, size in made.items():
            taken = places[size].pop() if places[size] else None
            charged[v] = size if taken is None else taken
            new += size if taken is None else 0
        inside = _inside(eqn, weights, set(ending))
        exchanged = sum(size for v, size in (held | charged).items() if v in sent)
        most = max(most, Peak(live + new + inside.bytes, exchanged + inside.exchanged))
        live += sum(charged.values()) - sum(held.pop(v) for v in ending)
        held |= {v: size for v, size in charged.items() if v in last}
        live -= sum(size for v, size in charged.items() if v not in last)
    return most


def _inside(eqn: Any, weights: _Values, ending: _Values) -> Peak:
    """What a loop, a branch or a call needs beside its arguments and results."""
    name, params, most = eqn.primitive.name, eqn.params, Peak(0, 0)
    if name == "scan":
        body = params["jaxpr"].jaxpr
        carried, stacked = _same(eqn.outvars, body.outvars), len(eqn.invars) - _same(eqn.invars, body.invars)
        constants = len(body.invars) - carried - stacked
        own = _matching(eqn.invars[:constants], body.invars, weights)
        return _peak(body, own, set(body.invars[constants : constants + carried]))
    if name == "while":
        body, first, constants = params["body_jaxpr"].jaxpr, params["cond_nconsts"], params["body_nconsts"]
        own = _matching(eqn.invars[first : first + constants], body.invars, weights)
        return _peak(body, own, set(body.invars[constants:]))
    for inner in jc.jaxprs_in_params(params):
        given = eqn.invars[len(eqn.invars) - len(inner.invars) :]
        own, free = _matching(given, inner.invars, weights), _matching(given, inner.invars, ending)
        found = _peak(inner, own, free)
        most = max(most, found._replace(bytes=found.bytes - sum(map(num_bytes, eqn.outvars))))
    return most


def _same(outside: Sequence[Any], inside: Sequence[Any]) -> int:
    """How many arrays of a scan its body has as they are: those that are not stacked."""
    return sum(a.aval.shape == b.aval.shape for a, b in zip(outside, inside, strict=True))


def _matching(given: Sequence[Any], inner: Sequence[jc.Var], wanted: _Values) -> _Values:
    """The arguments of an inner program for which it is given one of `wanted`."""
    return {own for v, own in zip(given, inner, strict=False) if isinstance(v, jc.Var) and v in wanted}


def _is_in_place(eqn: Any) -> bool:
    return eqn.primitive.name in _FUSED or eqn.primitive.name in _UPDATES


def _following(eqns: Iterable[Any], weights: _Values) -> _Values:
    """`weights`, and what is computed number by number from them alone."""
    found = set(weights)
    for eqn in eqns:
        inputs = variables(eqn.invars)
        if eqn.primitive.name in _FUSED and inputs and found.issuperset(inputs):
            found |= set(eqn.outvars)
    return found


def _stored(jaxpr: Any, weights: _Values) -> _Values:
    """The values that have memory of their own."""
    wanted = set(variables(jaxpr.outvars))
    for eqn in jaxpr.eqns:
        if eqn.primitive.name not in _FUSED | _SUMS:
            wanted |= set(variables(eqn.invars))
    made = ((v, eqn) for eqn in jaxpr.eqns for v in eqn.outvars if v not in weights)
    return {v for v, eqn in made if v in wanted or eqn.primitive.name not in _FUSED}


def _reads(jaxpr: Any, stored: _Values, weights: _Values) -> list[_Values]:
    """Of each equation that writes memory, and of the results, the values in memory from which they are computed."""
    sources: dict[jc.Var, _Values] = {}

    def read(atoms: Sequence[Any]) -> _Values:
        return {source for v in variables(atoms) for source in sources.get(v, {v})}

    found: list[_Values] = []
    for eqn in jaxpr.eqns:
        own = read(eqn.invars)
        for v in eqn.outvars:
            if v not in stored:
                sources[v] = set() if v in weights else own
        fused = eqn.primitive.name in _FUSED and not any(v in stored for v in eqn.outvars)
        found.append(set() if fused else own)
    return [*found, read(jaxpr.outvars)]


def num_bytes(v: Any) -> int:
    """Of the array that a variable stands for."""
    return math.prod(v.aval.shape) * jnp.dtype(v.aval.dtype).itemsize if hasattr(v.aval, "shape") else 0
