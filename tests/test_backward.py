"""The backward pass of real blocks in two parts, on one device and on meshes, against `jax.vjp` of the same stage.

The equations are the same and in the same order. What XLA fuses, and so what it rounds, depends on where one compiled
program ends and the next begins; evaluated one by one they give the same bits.
"""

import dataclasses
import functools
import itertools
import re
from typing import Any, NamedTuple

import jax
import jax.extend.core as jc
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.config import ONE_DEVICE, MeshConfig
from moejax.mesh import AXES, make_mesh
from moejax.model.block import Block, run_block
from moejax.ops.linear import linear
from moejax.ops.norm import rms_norm
from moejax.ops.swiglu import swiglu
from moejax.pipeline.backward import StageFunctions, _smallest_cut, flatten, num_bytes, trace_stage, variables

EXPERT_4 = MeshConfig(data=1, expert=4, exchange_slack=8.0)  # slots for all tokens: one round
MESHES = {
    "one device": ONE_DEVICE,
    "expert 4": EXPERT_4,
    "expert 4 in rounds": dataclasses.replace(EXPERT_4, exchange_slack=0.25),
    "expert 4 on 2 nodes": dataclasses.replace(EXPERT_4, expert_nodes=2),
    "data 2 x expert 2": MeshConfig(data=2, expert=2),
}


class Case(NamedTuple):
    """A stage of real blocks, and its arguments, of all devices."""

    mesh: jax.sharding.Mesh
    stage: Any  # (params, (activations, segment ids)) -> ((activations, segment ids), stats)
    params: Any
    x: tuple[jax.Array, jax.Array]
    dy: tuple[jax.Array, None]
    daux: Any

    def on_devices(self, function):
        """`function` of each device's arguments, on all devices."""

        def local(*args):
            results = function(*jax.tree.map(lambda a: a[0], args))
            return jax.tree.map(lambda a: a[None], results)

        specs = {"in_specs": P(AXES), "out_specs": P(AXES), "axis_names": set(AXES)}
        return jax.shard_map(local, mesh=self.mesh, **specs)

    def compiled(self, function, *args):
        jitted = jax.jit(self.on_devices(function), compiler_options={"xla_allow_excess_precision": False})
        return jitted.lower(*args).compile()

    def run(self, function, *args):
        return self.compiled(function, *args)(*args)

    def traced(self, save="residuals") -> StageFunctions:
        found = []

        def trace(params, x):
            found.append(trace_stage(saving(self.stage, save), params, x))
            return x[0]

        jax.eval_shape(self.on_devices(trace), self.params, self.x)
        return found[0]

    def gradients(self, params, x, dy, daux):
        """`((y, aux), (dx, dparams))` of one device's arguments, by autodiff of the whole stage."""

        def run(params, activations):
            (y, _), stats = self.stage(params, (activations, x[1]))
            return (y, [s.balance_loss for s in stats if s is not None]), stats

        (y, _), pull, stats = jax.vjp(run, params, x[0], has_aux=True)
        dparams, dx = pull((dy[0], jax.tree.leaves(daux)))
        return ((y, x[1]), stats), ((dx, None), dparams)

    def zeros(self, like):
        shape = (self.mesh.size, *like.shape)
        return jax.device_put(np.zeros(shape, like.dtype), NamedSharding(self.mesh, P(AXES)))


def make_case(model, mesh_config, kinds=("moe",), remat="none", dtype=jnp.float32, seed=0) -> Case:
    devices = mesh_config.batch_shards
    mesh = make_mesh(mesh_config, jax.devices()[:devices])
    blocks = [Block(nnx.Rngs(seed + i), model, mesh_config, kind) for i, kind in enumerate(kinds)]
    graph, params = nnx.split(nnx.List(blocks))

    def stage(params, x):
        activations, segments = x
        positions, all_stats = jnp.arange(activations.shape[1])[None], []
        for block in nnx.merge(graph, params):
            activations, stats = run_block(block, activations, positions, segments, remat)
            all_stats.append(stats)
        return (activations, segments), all_stats

    def spread(leaf):
        if leaf.ndim == 3:  # matrices of experts
            return np.tile(
                leaf.reshape(mesh_config.expert, -1, *leaf.shape[1:]), (devices // mesh_config.expert, 1, 1, 1)
            )
        return np.broadcast_to(leaf, (devices, *leaf.shape))

    def put(tree):
        return jax.device_put(tree, NamedSharding(mesh, P(AXES)))

    rng = np.random.default_rng(seed)
    shape = (devices, 2, 16)
    x, dy = (rng.standard_normal((*shape, model.hidden_size)).astype(np.float32) for _ in range(2))
    segments = np.cumsum(rng.random(shape) < 0.1, axis=2, dtype=np.int32)
    daux = [None if kind == "dense" else np.full((devices,), 0.3, np.float32) for kind in kinds]
    return Case(
        mesh,
        stage,
        put(jax.tree.map(spread, params)),
        (put(x).astype(dtype), put(segments)),
        (put(dy).astype(dtype), None),
        put(daux),
    )


def assert_close(got, want):
    """Floats within a few roundings of an array's largest: 2^-19 of it in float32, 2^-6 in bfloat16; integers equal."""
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        name = jax.tree_util.keystr(path)
        assert a.dtype == b.dtype and (jnp.any(b) or "router_bias" in name), name
        bound = 0.0 if jnp.issubdtype(a.dtype, jnp.integer) else {2: 2.0**-6, 4: 2.0**-19}[a.dtype.itemsize]
        a, b = (np.asarray(array).astype(np.float64) for array in (a, b))
        np.testing.assert_allclose(a, b, rtol=0, atol=bound * np.abs(b).max(), err_msg=name)


def equations(jaxpr):
    """All equations, those of loops too."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jc.jaxprs_in_params(eqn.params):
            yield from equations(inner)


def saving(stage, what):
    """A stage of which all that its backward reads is saved ("residuals"), or its input alone ("input")."""
    return jax.checkpoint(stage) if what == "input" else stage


def count(program, *names):
    return sum(eqn.primitive.name in names for eqn in equations(program.jaxpr))


def count_products(eqn):
    inner = (e for jaxpr in jc.jaxprs_in_params(eqn.params) for e in equations(jaxpr))
    return sum(e.primitive.name == "dot_general" for e in (eqn, *inner))


# ------------------------------------------------------------------------------------------------------------- numbers


def cases():
    """Mesh, kinds of layers, remat, save, dtype."""
    yield "one device", ("moe",), "none", "residuals", jnp.float32
    yield "one device", ("dense", "dense"), "cheap", "residuals", jnp.bfloat16
    yield "expert 4", ("moe",), "cheap", "residuals", jnp.bfloat16
    yield "expert 4 in rounds", ("moe",), "cheap", "residuals", jnp.float32
    yield "data 2 x expert 2", ("moe",), "full", "residuals", jnp.float32
    yield "expert 4", ("dense",), "none", "input", jnp.float32
    slow = [
        ("one device", ("dense", "moe"), "full", "input", jnp.bfloat16),
        ("expert 4", ("moe", "moe"), "none", "residuals", jnp.float32),
        ("expert 4 on 2 nodes", ("moe",), "none", "input", jnp.float32),
        ("expert 4 in rounds", ("dense", "moe"), "none", "input", jnp.float32),
        ("data 2 x expert 2", ("moe", "moe"), "cheap", "residuals", jnp.float32),
    ]
    yield from (pytest.param(*case, marks=pytest.mark.slow) for case in slow)


@pytest.mark.parametrize(("mesh", "kinds", "remat", "save", "dtype"), list(cases()))
def test_parts_equal_autodiff(model_config, mesh, kinds, remat, save, dtype):
    case = make_case(model_config, MESHES[mesh], kinds, remat, dtype)
    f = case.traced(save)
    outputs, gradients = case.run(case.gradients, case.params, case.x, case.dy, case.daux)
    y, aux, residuals = case.run(f.forward, case.params, case.x)
    assert_close((y, aux), outputs)
    dx, kept = case.run(f.backward_input, case.params, residuals, case.dy, case.daux)
    assert dx[1] is None
    read = [residuals[i] for i in f.weight_residuals]
    assert_close((dx, case.run(f.backward_weight, case.params, read, kept)), gradients)
    assert (aux[-1] is not None and (np.asarray(aux[-1].rounds) > 1).all()) == (mesh == "expert 4 in rounds")


def small_stage(remat):
    """Norm, SwiGLU and two linear layers, in which `x` and a cast weight are read twice."""

    def stage(params, x):
        activations, table = x["activations"], jnp.cos(params["angle"])[x["ids"]]
        hidden = linear(rms_norm(activations, params["scale"], 1e-6), params["up"])
        y = activations + linear(swiglu(hidden * table[:, None]), params["down"])
        return {"activations": y, "ids": x["ids"]}, {"norm": jnp.mean(y * y), "most": x["ids"].max()}

    keys = jax.random.split(jax.random.key(0), 6)
    shapes = {"scale": (16,), "up": (16, 24), "down": (12, 16), "angle": (5,)}
    params = {name: jax.random.normal(key, shape) for key, (name, shape) in zip(keys, shapes.items(), strict=False)}
    x = {"activations": jax.random.normal(keys[4], (10, 16)), "ids": jnp.arange(10) % 5}
    dy = {"activations": jax.random.normal(keys[5], (10, 16)), "ids": None}
    return jax.checkpoint(stage) if remat else stage, params, x, dy, {"norm": jnp.float32(0.3), "most": None}


@pytest.mark.parametrize("remat", [False, True], ids=["saved", "computed again"])
@pytest.mark.parametrize("save", ["residuals", "input"])
def test_parts_give_the_same_bits_equation_by_equation(remat, save):
    stage, params, x, dy, daux = small_stage(remat)
    f = trace_stage(saving(stage, save), params, x)

    def run(params, activations):
        y, aux = stage(params, x | {"activations": activations})
        return y["activations"], aux["norm"]

    values, pull = jax.vjp(run, params, x["activations"])
    dparams, dx = pull((dy["activations"], daux["norm"]))
    y, aux, residuals = f.forward(params, x)
    np.testing.assert_array_equal(y["activations"], values[0])
    assert aux["norm"] == values[1] and aux["most"] == 4
    got_dx, kept = f.backward_input(params, residuals, dy, daux)
    got = f.backward_weight(params, [residuals[i] for i in f.weight_residuals], kept)
    whole = f.backward(params, residuals, dy, daux)
    for gradients in ((got_dx, got), whole):
        assert gradients[0]["ids"] is None
        jax.tree.map(np.testing.assert_array_equal, gradients, ({"activations": dx, "ids": None}, dparams))


# ------------------------------------------------------------------------------------------------------------- programs


def test_parameters_and_inputs_are_not_saved_twice():
    stage, params, x, _, _ = small_stage(False)
    f = trace_stage(stage, params, x)
    assert f.residual_inputs.count(0) == 1  # the activations, which three equations read
    assert not {leaf.shape for leaf in params.values()} & {r.shape for r in f.residuals}
    saved = f.forward(params, x)[2]
    assert len({np.asarray(r).tobytes() for r in saved}) == len(saved)
    assert trace_stage(saving(stage, "input"), params, x).residual_inputs == (0, 1)


BLOCKS = {
    "dense, none": ("one device", "dense", "none"),
    "dense, full": ("one device", "dense", "full"),
    "one device, cheap": ("one device", "moe", "cheap"),
    "expert 4, none": ("expert 4", "moe", "none"),
    "expert 4, full": ("expert 4", "moe", "full"),
    "expert 4 in rounds, cheap": ("expert 4 in rounds", "moe", "cheap"),
    "expert 4 on 2 nodes, full": ("expert 4 on 2 nodes", "moe", "full"),
}


@functools.cache
def traced_block(model, name):
    mesh, kind, remat = BLOCKS[name]
    case = make_case(model, MESHES[mesh], (kind,), remat)
    return case, case.traced()


@pytest.mark.parametrize("name", BLOCKS)
def test_every_equation_runs_once(model_config, name):
    case, f = traced_block(model_config, name)
    programs = f.forward_jaxpr, f.input_jaxpr, f.weight_jaxpr
    whole = jax.make_jaxpr(case.on_devices(case.gradients))(case.params, case.x, case.dy, case.daux)
    for names in (["dot_general"], ["all_to_all"], ["while", "scan"], ["sort", "top_k"]):
        assert sum(count(p, *names) for p in programs) == count(whole, *names), names
        assert count(f.input_jaxpr, *names) + count(f.weight_jaxpr, *names) == count(f.backward_jaxpr, *names)
    in_weights = count(f.weight_jaxpr, "all_to_all")
    assert in_weights > 0 if "rounds" in name else in_weights == 0
    if "dense" in name:
        assert count(f.weight_jaxpr, "dot_general") == 7  # one for each matrix


@pytest.mark.parametrize("name", BLOCKS)
def test_only_loops_are_left_unopened(model_config, name):
    """A call that a new version of jax names otherwise would be one equation, and I and W would share it."""
    _, f = traced_block(model_config, name)
    for program in (f.forward_jaxpr, f.backward_jaxpr):
        closed = {e.primitive.name for e in program.jaxpr.eqns if any(True for _ in jc.jaxprs_in_params(e.params))}
        assert closed <= {"scan", "while", "scatter-add"}, closed


@pytest.mark.parametrize("name", ["dense, full", "expert 4, full"])
def test_recomputation_waits_for_the_gradient(model_config, name):
    """Else XLA may compute all layers' forward passes again before the first backward pass."""
    _, f = traced_block(model_config, name)
    jaxpr = f.input_jaxpr.jaxpr
    after = set(jaxpr.invars[f.num_params + len(f.residuals) :])
    for eqn in jaxpr.eqns:
        waits = any(v in after for v in variables(eqn.invars))
        assert waits or not count_products(eqn)
        after |= set(eqn.outvars) if waits else set()


def test_compiled_parts_have_the_products_of_the_whole(model_config):
    case, f = traced_block(model_config, "expert 4, none")
    residuals, kept = ([case.zeros(r) for r in specs] for specs in (f.residuals, f.kept))
    read = [residuals[i] for i in f.weight_residuals]

    def products(function, *args):
        return len(re.findall(r" dot\(", case.compiled(function, *args).as_text()))

    whole = products(f.backward, case.params, residuals, case.dy, case.daux)
    parts = products(f.backward_input, case.params, residuals, case.dy, case.daux)
    assert whole > 20 and parts + products(f.backward_weight, case.params, read, kept) == whole


def test_a_scan_over_layers_stays_whole():
    """Its one equation computes both gradients: right, but nothing is left for W."""
    weights, x = jax.random.normal(jax.random.key(0), (3, 8, 8)), jnp.ones((4, 8))
    f = trace_stage(lambda p, x: (lax.scan(lambda x, w: (linear(x, w), None), x, p)[0], None), weights, x)
    assert not count(f.weight_jaxpr, "dot_general")
    y, _, residuals = f.forward(weights, x)
    dx, kept = f.backward_input(weights, residuals, y, None)
    want = jax.vjp(lambda p, x: lax.scan(lambda x, w: (linear(x, w), None), x, p)[0], weights, x)[1](y)
    np.testing.assert_array_equal(dx, want[1])
    np.testing.assert_array_equal(f.backward_weight(weights, [residuals[i] for i in f.weight_residuals], kept), want[0])


def test_what_follows_from_the_input_must_vary():
    """A pool's entries vary over the mesh, and so would not fit what was traced."""

    def stage(_, x):
        return x * jnp.sin(lax.psum(x.sum(), "data")), None

    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
    x = jax.device_put(jnp.ones(8), NamedSharding(mesh, P("data")))
    trace = jax.shard_map(lambda x: trace_stage(stage, (), x) and x, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    with pytest.raises(TypeError, match=r"float32.*must vary over \['data'\]"):
        jax.eval_shape(trace, x)


# -------------------------------------------------------------------------------------------------------- what is kept


def test_what_is_kept_is_small(model_config):
    """Of a dense block only gradients of products' results: norms, SwiGLU and layouts are computed again in W."""
    _, f = traced_block(model_config, "dense, none")
    a, tokens = model_config.attention, 2 * 16
    widths = [2 * model_config.hidden_size, model_config.dense_width, a.q_lora_rank, a.kv_lora_rank]
    widths += [a.qk_rope_dim, a.num_heads * (a.qk_nope_dim + a.qk_rope_dim), a.num_heads * (a.qk_nope_dim + a.v_dim)]
    assert sum(k.size for k in f.kept if k.ndim > 1) <= tokens * sum(widths)


@pytest.mark.parametrize("seed", range(20))
def test_what_is_kept_is_the_least(seed):
    """Against all sets of values of a small random program."""
    rng = np.random.default_rng(seed)

    def program(x):
        values = [x]
        for _ in range(9):
            a, b = (values[i] for i in rng.integers(len(values), size=2))
            kinds = (
                lambda a, b: jnp.sin(a),
                lambda a, b: jnp.concatenate([a, b])[:64],
                lambda a, b: a[: len(a) // 2 + 1],
                lambda a, b: jnp.dot(jnp.ones((int(rng.integers(1, 9)), len(a))), a),
            )
            values.append(kinds[rng.integers(4)](a, b))
        return [values[i] for i in rng.integers(1, len(values), size=3)]

    jaxpr = flatten(program, jnp.ones(4)).jaxpr
    wanted = variables(jaxpr.outvars)
    values = [*jaxpr.invars, *(v for eqn in jaxpr.eqns for v in eqn.outvars)]

    def enough(kept):
        found = set(kept)
        for eqn in jaxpr.eqns:
            if eqn.primitive.name != "dot_general" and found.issuperset(variables(eqn.invars)):
                found |= set(eqn.outvars)
        return found.issuperset(wanted)

    sets = itertools.chain.from_iterable(itertools.combinations(values, n) for n in range(4))
    least = min(sum(map(num_bytes, kept)) for kept in sets if enough(kept))
    kept = _smallest_cut(jaxpr.eqns, jaxpr.invars, wanted)
    assert enough(kept) and sum(map(num_bytes, kept)) == least
