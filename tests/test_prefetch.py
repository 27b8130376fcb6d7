"""Layers gathered one ahead, on two devices: the numbers of plain layers, one after the other, and what is gathered."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.config import MeshConfig
from moejax.mesh import AXES, make_mesh
from moejax.model.prefetch import UNROLLED, scan_gathered
from moejax.model.shards import SHARDS, parameter
from moejax.varying import vary_over

FSDP = MeshConfig(data=2, sharding="fsdp")
ROWS, DIM = 6, 8


def layer(w, x, factor):
    y = x + jnp.tanh(x @ w[...]) * factor
    return y, (jnp.square(y).mean(), factor * 2)


def draw(layers):
    rng = np.random.default_rng(layers)
    return np.float32(rng.normal(0, 0.5, (layers, DIM, DIM))), np.float32(rng.normal(size=(2 * ROWS, DIM)))


def objective(y, stats):
    return jnp.sin(y).sum() + 0.3 * stats[0].sum()


def of_plain_layers(w, x):
    """Gradients of both devices' rows, one after the other; each has its own mean."""

    def one(w, x):
        stats = []
        for index in range(len(w)):
            x, found = layer(w[index], x, jnp.int32(3))
            stats.append(found[0])
        return objective(x, (jnp.stack(stats),))

    return jax.grad(lambda w, x: one(w, x[:ROWS]) + one(w, x[ROWS:]), argnums=(0, 1))(w, x)


def gathered_program(layers):
    mesh, spec = make_mesh(FSDP, jax.devices()[:2]), P(None, "data", None)

    def local(w, x):
        w, x, factor = (vary_over(a, AXES) for a in (w, x, jnp.int32(3)))

        def loss(w, x):
            shards = parameter(w, P(SHARDS, None))
            return objective(*scan_gathered(layer, FSDP, jnp.float32, shards, x, (factor,)))

        return jax.grad(loss, argnums=(0, 1))(w, x)

    shard = jax.shard_map(local, mesh=mesh, in_specs=(spec, P("data")), out_specs=(P(None, AXES), P(AXES)))
    given = (jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(draw(layers), (spec, P("data")), strict=True))
    return jax.jit(shard), tuple(given)


@pytest.mark.parametrize("layers", [1, 2, UNROLLED, UNROLLED + 1])
def test_gathered_layers_have_the_gradients_of_plain_ones(layers):
    program, given = gathered_program(layers)
    for got, want in zip(program(*given), of_plain_layers(*draw(layers)), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


def count_gathers(jaxpr, times=1):
    found = 0
    for eqn in jaxpr.eqns:
        found += times * (eqn.primitive.name == "all_gather")
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "eqns")):
            if hasattr(inner, "eqns"):
                found += count_gathers(getattr(inner, "jaxpr", inner), times * eqn.params.get("length", 1))
    return found


@pytest.mark.parametrize(("layers", "gathers"), [(1, 2), (3, 6), (UNROLLED + 1, 2 * (UNROLLED + 2))])
def test_few_layers_are_gathered_once_on_each_way(layers, gathers):
    """More of them once more on each way, for nothing."""
    program, given = gathered_program(layers)
    assert count_gathers(program.trace(*given).jaxpr.jaxpr) == gathers
