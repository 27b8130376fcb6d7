"""A stage's backward pass in two parts: input gradients (I), which other devices wait for, and weight gradients (W).

A stage is a pure function `(params, x) -> (y, aux)` of arrays that vary over every mesh axis. It is traced once into
flat lists of equations. Those from which the gradient of `x` follows are I, the rest is W, which can run later
(arXiv:2401.10241). No product is computed twice. Of the values of I that W reads, those are kept whose bytes are
fewest: W computes the cheap steps between (norms, activations, casts, the gathers of rows) again.

What jax does not promise to leave as it is, the form of traced programs, is read in this file only, and in
`interleave`.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.extend.core as jc
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order, maximum_flow

Atoms: TypeAlias = Sequence[jc.Var | jc.Literal]

# Equations that are other equations under a name. A call of a name that is not here stays one equation, in I or in W.
_CALLS = {"jit", "closed_call", "eval_jaxpr", "remat2", "checkpoint", "custom_jvp_call", "custom_vjp_call"}
# What W may compute again rather than read from memory. Neither products nor loops, and nothing that sends.
_CHEAP = (
    "abs add add_any and bitcast_convert_type broadcast_in_dim clamp concatenate convert_element_type copy cos div "
    "dynamic_slice eq exp expand_dims expm1 gather ge gt integer_pow iota is_finite le log log1p logistic lt max min "
    "mul name ne neg not optimization_barrier or pad pow pvary reduce_and reduce_max reduce_min reduce_or "
    "reduce_precision reduce_sum rem reshape rev rsqrt select_n sign sin slice split sqrt square squeeze stack "
    "stop_gradient sub tanh transpose unstack xor"
)
_CHEAP_NAMES = frozenset(_CHEAP.split())
_UNNAMED = jc.DebugInfo("stage", "<unknown>", None, None)


@dataclass(frozen=True)
class StageFunctions:
    """A stage's passes, and what an executor has to know to keep arrays between them.

    A cotangent tree (`dy`, `daux`, `dx`, `dparams`) has the structure of what it belongs to, with None in place of
    arrays that are no floating-point numbers. `forward`, `backward` and so on may be called with any parameters and
    inputs of the shapes traced, any number of times.
    """

    forward_jaxpr: jc.ClosedJaxpr  # leaves of (params, x) -> leaves of (y, aux), residuals
    backward_jaxpr: jc.ClosedJaxpr  # leaves of params, residuals, dy and daux -> leaves of dx and dparams
    input_jaxpr: jc.ClosedJaxpr  # the same -> leaves of dx, kept
    weight_jaxpr: jc.ClosedJaxpr  # leaves of params, residuals that W reads, kept -> leaves of dparams
    residuals: tuple[jax.ShapeDtypeStruct, ...]
    kept: tuple[jax.ShapeDtypeStruct, ...]
    weight_residuals: tuple[int, ...]  # those that W reads after I
    residual_inputs: tuple[int | None, ...]  # which leaf of `x` a residual is, which need not be stored twice
    num_params: int  # leaves
    _outputs: Any  # structure of (y, aux)
    _dx: Any  # structures of gradients, with None where there is none
    _dparams: Any

    def forward(self, params: Any, x: Any) -> tuple[Any, Any, list[Array]]:
        """`(y, aux, residuals)`."""
        return self.forward_results(_run(self.forward_jaxpr, jax.tree.leaves((params, x))))

    def backward(self, params: Any, residuals: Sequence[Array], dy: Any, daux: Any) -> tuple[Any, Any]:
        """`(dx, dparams)`."""
        return self.backward_results(_run(self.backward_jaxpr, jax.tree.leaves((params, residuals, dy, daux))))

    def backward_input(self, params: Any, residuals: Sequence[Array], dy: Any, daux: Any) -> tuple[Any, list[Array]]:
        """`(dx, kept)`; the recomputation of what was not saved happens here."""
        return self.input_results(_run(self.input_jaxpr, jax.tree.leaves((params, residuals, dy, daux))))

    def backward_weight(self, params: Any, residuals: Sequence[Array], kept: Sequence[Array]) -> Any:
        """`dparams`, from the residuals numbered `weight_residuals` and what `backward_input` kept.

        It sends nothing, except where weights' gradients alone need it: the later rounds of the expert exchange are
        computed again here. A stage with such rounds must not run this under a condition on which the devices of the
        exchange's axis differ.
        """
        found = _run(self.weight_jaxpr, jax.tree.leaves((params, residuals, kept)))
        return jax.tree.unflatten(self._dparams, found)

    def forward_results(self, found: Sequence[Array]) -> tuple[Any, Any, list[Array]]:
        """The results of `forward` out of those of `forward_jaxpr`."""
        num_outputs = len(found) - len(self.residuals)
        y, aux = jax.tree.unflatten(self._outputs, found[:num_outputs])
        return y, aux, list(found[num_outputs:])

    def backward_results(self, found: Sequence[Array]) -> tuple[Any, Any]:
        """The results of `backward` out of those of `backward_jaxpr`."""
        num_dx = self._dx.num_leaves
        return jax.tree.unflatten(self._dx, found[:num_dx]), jax.tree.unflatten(self._dparams, found[num_dx:])

    def input_results(self, found: Sequence[Array]) -> tuple[Any, list[Array]]:
        """The results of `backward_input` out of those of `input_jaxpr`."""
        num_dx = self._dx.num_leaves
        return jax.tree.unflatten(self._dx, found[:num_dx]), list(found[num_dx:])


def trace_stage(
    stage: Callable[[Any, Any], tuple[Any, Any]],
    params: Any,
    x: Any,
) -> StageFunctions:
    """Traces `stage(params, x) -> (y, aux)`, inside `jax.shard_map` or outside of it, and splits its backward pass.

    Layers stand one after the other in `stage`: of a scan over layers the weights' gradients cannot be split off.
    What the backward pass reads is saved, except parameters and what follows from them. `jax.checkpoint` inside or
    around the stage says otherwise, `x` alone for example; the forward pass is then computed again in I.

    Args:
        stage: everything that differs between micro-batches is in `x`; other arrays that it reads are the same always.
        params: a pytree of arrays, or of shapes.
        x: a pytree of arrays, or of shapes.

    Raises:
        TypeError: something that follows from `x` is marked as equal on devices on which it is not.
    """
    whole, outputs, pull = _trace_forward(stage, params, x)
    num_params, arguments, results = len(jax.tree.leaves(params)), whole.jaxpr.invars, whole.jaxpr.outvars
    values, leaves = results[: outputs.num_leaves], results[outputs.num_leaves :]
    of_input = reached(whole.jaxpr.eqns, arguments[num_params:])
    saved = [v for v in dict.fromkeys(variables(leaves)) if v in of_input]
    cotangents = [_spec(v) for v in values if _is_float(v.aval)]
    full = _trace_backward(whole, num_params, leaves, saved, pull, cotangents)
    last = len(full.jaxpr.invars) - len(cotangents)
    read = {v for eqn in full.jaxpr.eqns for v in variables(eqn.invars)}.union(variables(full.jaxpr.outvars))
    used = [i for i in range(num_params, last) if full.jaxpr.invars[i] in read]
    saved = [saved[i - num_params] for i in used]
    given = [*full.jaxpr.invars[:num_params], *(full.jaxpr.invars[i] for i in used), *full.jaxpr.invars[last:]]
    full = part(full, given, full.jaxpr.outvars)
    dx, dparams = _structure_of_gradient(x), _structure_of_gradient(params)
    input_jaxpr, weight_jaxpr, weight_residuals, kept = _split(full, num_params, len(saved), dx.num_leaves)
    _require_varying([*saved, *kept], arguments[num_params:])
    return StageFunctions(
        forward_jaxpr=part(whole, arguments, [*values, *saved]),
        backward_jaxpr=full,
        input_jaxpr=input_jaxpr,
        weight_jaxpr=weight_jaxpr,
        residuals=tuple(_spec(v) for v in saved),
        kept=tuple(_spec(v) for v in kept),
        weight_residuals=weight_residuals,
        residual_inputs=tuple(arguments.index(v) - num_params if v in arguments else None for v in saved),
        num_params=num_params,
        _outputs=outputs,
        _dx=dx,
        _dparams=dparams,
    )


def _trace_forward(stage: Callable[[Any, Any], Any], params: Any, x: Any) -> tuple[jc.ClosedJaxpr, Any, Any]:
    """Leaves of (params, x) -> leaves of (y, aux) and of the pullback; the structures of both."""
    tree = jax.tree.structure((params, x))
    structures: list[Any] = []

    def forward(*leaves: Array) -> list[Array]:
        def differentiable(*floats: Array) -> tuple[list[Array], tuple[Any, list[Array]]]:
            rest = iter(floats)
            results = stage(*jax.tree.unflatten(tree, [next(rest) if _is_float(a) else a for a in leaves]))
            values, outputs = jax.tree.flatten(results)
            return [a for a in values if _is_float(a)], (outputs, values)

        _, pull, (outputs, values) = jax.vjp(differentiable, *(a for a in leaves if _is_float(a)), has_aux=True)
        saved, structure = jax.tree.flatten(pull)
        structures[:] = outputs, structure
        return [*values, *saved]

    whole = flatten(forward, *jax.tree.leaves((params, x)))
    return whole, structures[0], structures[1]


def _trace_backward(
    whole: jc.ClosedJaxpr, num_params: int, leaves: Atoms, saved: Sequence[jc.Var], pull: Any, cotangents: Sequence[Any]
) -> jc.ClosedJaxpr:
    """Leaves of params, `saved` and cotangents -> leaves of dx, then of dparams.

    Leaves of the pullback that are not saved are parameters, or follow from parameters alone.
    """
    arguments, first_dy = whole.jaxpr.invars, num_params + len(saved)
    fixed = [v for v in variables(leaves) if v not in saved]
    of_params = part(whole, arguments[:num_params], fixed)
    is_param = [i < num_params for i, v in enumerate(arguments) if _is_float(v.aval)]

    def backward(*given: Array) -> list[Array]:
        env = dict(zip(fixed, _run(of_params, given[:num_params]), strict=True))
        env.update(zip(saved, given[num_params:first_dy], strict=True))
        gradients = jax.tree.unflatten(pull, [value_of(env, v) for v in leaves])(list(given[first_dy:]))
        return [g for want in (False, True) for g, p in zip(gradients, is_param, strict=True) if p is want]

    given = [_spec(v) for v in (*arguments[:num_params], *saved)]
    full = flatten(backward, *given, *cotangents, num_weights=num_params)
    return part(full, full.jaxpr.invars, full.jaxpr.outvars)


def _require_varying(values: Sequence[jc.Var], inputs: Sequence[jc.Var]) -> None:
    """Raises TypeError if a value is marked as equal on devices that have different inputs."""
    axes = frozenset().union(*(_spec(v).manual_axis_type.varying for v in inputs))
    wrong = [str(v.aval) for v in values if _spec(v).manual_axis_type.varying != axes]
    if wrong:
        raise TypeError(f"{wrong} follow from the stage's input and must vary over {sorted(axes)} (varying.py)")


def _structure_of_gradient(tree: Any) -> Any:
    return jax.tree.structure(jax.tree.map(lambda a: a if _is_float(a) else None, tree))


def _is_float(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def _spec(v: jc.Var) -> jax.ShapeDtypeStruct:
    aval: Any = v.aval
    axes = aval.manual_axis_type
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=aval.sharding, manual_axis_type=axes)


# ------------------------------------------------------------------------------------------------------------- I and W


def _split(
    full: jc.ClosedJaxpr, num_params: int, num_residuals: int, num_dx: int
) -> tuple[jc.ClosedJaxpr, jc.ClosedJaxpr, tuple[int, ...], list[jc.Var]]:
    """I, W, which residuals W reads, and which values it reads of those that I computed or was given from above."""
    jaxpr, first_dy = full.jaxpr, num_params + num_residuals
    params, residuals = jaxpr.invars[:num_params], jaxpr.invars[num_params:first_dy]
    dx, dparams = jaxpr.outvars[:num_dx], jaxpr.outvars[num_dx:]
    of_inputs = needed(jaxpr.eqns, dx)
    made = {v for eqn in of_inputs for v in eqn.outvars}
    of_weights = needed(jaxpr.eqns, dparams, given=made)
    late: set[jc.Var] = set()  # values that can only be computed in W
    wanted = set(variables(dparams))
    for eqn in of_weights:
        for inputs, out in steps(eqn):
            if eqn.primitive.name not in _CHEAP_NAMES or not late.isdisjoint(inputs):
                late.add(out)
                wanted |= set(inputs)
    kept = _smallest_cut([*of_inputs, *of_weights], jaxpr.invars[first_dy:], [v for v in wanted if v not in late])
    computed = needed(jaxpr.eqns, dparams, given=set(kept))
    read = {v for eqn in computed for v in variables(eqn.invars)}.union(variables(dparams))
    numbers = tuple(i for i, v in enumerate(residuals) if v in read and v not in kept)
    return (
        part(full, jaxpr.invars, [*dx, *kept]),
        part(full, [*params, *(residuals[i] for i in numbers), *kept], dparams),
        numbers,
        kept,
    )


def _smallest_cut(eqns: Sequence[jc.JaxprEqn], given: Iterable[jc.Var], wanted: Iterable[jc.Var]) -> list[jc.Var]:
    """Values of least bytes from which cheap equations compute `wanted`; of equal ones, those that leave least to do.

    A cut between what costs work (the results of other equations, and `given`) and `wanted`, of a graph in which a
    value is an edge with its bytes as capacity. Arguments that are not `given` cost nothing.
    """
    number: dict[jc.Var, int] = {}
    edges: list[tuple[int, int, int]] = []
    source, sink, boundless = 0, 1, 2**30

    def enter(v: jc.Var) -> int:
        return 2 * number.setdefault(v, len(number) + 1)

    for v in given:
        edges.append((source, enter(v), boundless))
    for eqn in eqns:
        for inputs, out in steps(eqn):
            if eqn.primitive.name not in _CHEAP_NAMES:
                edges.append((source, enter(out), boundless))
            else:
                edges += [(enter(v) + 1, enter(out), boundless) for v in inputs]
    edges += [(enter(v) + 1, sink, boundless) for v in wanted]
    unit = 1 + sum(map(num_bytes, number)) // 2**29  # capacities are 32 bits wide
    edges += [(enter(v), enter(v) + 1, -(-num_bytes(v) // unit)) for v in number]
    places = {(a, b): c for a, b, c in edges}
    nodes = 2 * len(number) + 2
    rows, columns = np.asarray(list(places)).T
    capacity = csr_array((np.asarray(list(places.values()), np.int32), (rows, columns)), shape=(nodes, nodes))
    left = capacity - maximum_flow(capacity, source, sink).flow
    left.eliminate_zeros()
    after = set(breadth_first_order(left.T.tocsr(), sink, return_predecessors=False).tolist())
    return [v for v in number if enter(v) not in after and enter(v) + 1 in after]


# ---------------------------------------------------------------------------------------------- flat lists of equations


def flatten(function: Callable[..., Any], *args: Any, num_weights: int = 0) -> jc.ClosedJaxpr:
    """The equations of `function(*args)`, calls opened; loops and branches stay single equations.

    `jax.checkpoint` holds its recomputation up until the gradient from above is there, as it does where it is not
    opened; the first `num_weights` arguments are not held up, so that casts of them fuse.
    """
    closed = jax.make_jaxpr(function)(*args)
    return jax.make_jaxpr(lambda *a: _opened(closed.jaxpr, closed.consts, a, {id(w) for w in a[:num_weights]}))(*args)


def _opened(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], weights: Collection[int]) -> list[Any]:
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
    for eqn in jaxpr.eqns:
        values = [value_of(env, v) for v in eqn.invars]
        if eqn.primitive.name in _CALLS:
            (inner,) = (p for p in eqn.params.values() if hasattr(p, "eqns"))
            if eqn.params.get("differentiated"):
                values = _held_up(values, weights)
            results = _opened(getattr(inner, "jaxpr", inner), getattr(inner, "consts", []), values, weights)
            env.update(zip(eqn.outvars, results, strict=True))
        else:
            evaluate([eqn], env)
    return [value_of(env, v) for v in jaxpr.outvars]


def _held_up(values: list[Any], weights: Collection[int]) -> list[Any]:
    """The values, those beside weights and constants behind a barrier: all of them, or none, are there."""
    axes = [jax.typeof(v).manual_axis_type.varying for v in values]
    held = [i for i, v in enumerate(values) if id(v) not in weights and axes[i] == max(axes, key=len)]
    behind = dict(zip(held, lax.optimization_barrier([values[i] for i in held]), strict=True))
    return [behind.get(i, v) for i, v in enumerate(values)]


def value_of(env: dict[jc.Var, Any], v: jc.Var | jc.Literal) -> Any:
    """What stands in `env` for a variable, or the number written out."""
    return v.val if isinstance(v, jc.Literal) else env[v]


def evaluate(eqns: Sequence[jc.JaxprEqn], env: dict[jc.Var, Any]) -> None:
    """Adds the results of the equations to `env`, where their arguments are."""
    made = [v for eqn in eqns for v in eqn.outvars if not isinstance(v, jc.DropVar)]
    inner = set(made)
    read = list(dict.fromkeys(v for eqn in eqns for v in variables(eqn.invars) if v not in inner))
    program = jc.Jaxpr([], read, made, eqns, debug_info=_UNNAMED)
    env.update(zip(made, jax.core.eval_jaxpr(program, [], *(env[v] for v in read)), strict=True))


def variables(atoms: Atoms) -> list[jc.Var]:
    """Those that are not numbers written out."""
    return [v for v in atoms if isinstance(v, jc.Var)]


def num_bytes(v: jc.Var) -> int:
    """Of the array that a variable stands for."""
    return _spec(v).size * _spec(v).dtype.itemsize


def steps(eqn: jc.JaxprEqn) -> Iterator[tuple[list[jc.Var], jc.Var]]:
    """What each of an equation's results depends on. The arrays that pass a barrier do not depend on each other."""
    barrier = eqn.primitive.name == "optimization_barrier"
    for i, out in enumerate(eqn.outvars):
        yield variables(eqn.invars[i : i + 1] if barrier else eqn.invars), out


def reached(eqns: Sequence[jc.JaxprEqn], start: Iterable[jc.Var]) -> set[jc.Var]:
    """`start`, and everything that depends on it."""
    found = set(start)
    for eqn in eqns:
        found |= {out for inputs, out in steps(eqn) if not found.isdisjoint(inputs)}
    return found


def needed(eqns: Sequence[jc.JaxprEqn], wanted: Atoms, given: Collection[jc.Var] = ()) -> list[jc.JaxprEqn]:
    """The equations that compute `wanted` where `given` is there; of a barrier what is wanted."""
    missing = {v for v in variables(wanted) if v not in given}
    found = []
    for eqn in reversed(eqns):
        used = [v in missing for v in eqn.outvars]
        if any(used):
            if eqn.primitive.name == "optimization_barrier":
                inputs = [v for v, use in zip(eqn.invars, used, strict=True) if use]
                eqn = eqn.replace(invars=inputs, outvars=[v for v in eqn.outvars if v in missing])
            else:
                eqn = eqn.replace(outvars=[jc.DropVar(v.aval) if v in given else v for v in eqn.outvars])
            found.append(eqn)
            missing |= {v for v in variables(eqn.invars) if v not in given}
    return found[::-1]


def part(whole: jc.ClosedJaxpr, arguments: Sequence[jc.Var], results: Atoms) -> jc.ClosedJaxpr:
    """The part of a program that computes `results` from `arguments`."""
    eqns = needed(whole.jaxpr.eqns, results, given=set(arguments))
    jaxpr = jc.Jaxpr(whole.jaxpr.constvars, list(arguments), list(results), eqns, debug_info=_UNNAMED)
    return jc.ClosedJaxpr(jaxpr, whole.consts)


def _run(program: jc.ClosedJaxpr, args: Iterable[Any]) -> list[Any]:
    return jax.core.eval_jaxpr(program.jaxpr, program.consts, *args)
