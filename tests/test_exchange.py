import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from test_experts import equations, every_expert_for_every_token

from moejax.config import MeshConfig, MoEConfig
from moejax.mesh import BATCH_AXES, make_mesh
from moejax.model.block import KEPT
from moejax.ops.exchange import assign_slots, find_visits
from moejax.ops.hops import Exchange, Hop, plan_exchange, visit_probability
from moejax.ops.rounds import exchanged_swiglu
from moejax.plan.collectives import collectives

T, D, F, E, K = 16, 8, 4, 32, 3  # T tokens per device
ROWS, SHARES = P(BATCH_AXES), P("expert")


def cut(devices, nodes=1, slots=(3, 3), max_rows=8):
    """An exchange over `devices` with slots and rows that are not those of a plan."""
    if nodes == 1:
        return Exchange((Hop("expert", devices, slots[0]),), max_rows)
    inside = devices // nodes
    across = tuple(tuple(range(i, devices, inside)) for i in range(inside))
    within = tuple(tuple(range(i, i + inside)) for i in range(0, devices, inside))
    return Exchange((Hop("expert", nodes, slots[0], across), Hop("expert", inside, slots[1], within)), max_rows)


# Devices on the data axis, and the exchange.
LAYOUTS = {
    "2 devices": (1, cut(2)),
    "4 devices, room for all but rows": (1, cut(4, 1, (T,))),
    "8 devices": (1, cut(8)),
    "8 devices, room for all": (1, cut(8, 1, (T,), T * K)),
    "data 2, 4 devices": (2, cut(4)),
    "data 2, 2 nodes of 2": (2, cut(4, 2, (5, 4), 16)),
    "2 nodes of 4": (1, cut(8, 2, (7, 3))),
    "4 nodes of 2, room for all after the first hop": (1, cut(8, 4, (4, 16))),
    "2 nodes of 4, room for all": (1, cut(8, 2, (T, 2 * T), T * K)),
}
# How much tokens like each expert.
LIKINGS = {
    "balanced": np.zeros(E),
    "skewed": -np.arange(E) / 4,
    "one device": np.where(np.arange(E) // 4 == 5, 0, -np.inf),
    "one node": np.where(np.arange(E) // 16 == 1, 0, -np.inf),
    "most experts empty": np.where(np.arange(E) % 8 == 3, 0, -np.inf),
}


ROUTINGS = (*LIKINGS, "one expert")


def mesh_of(data, expert):
    return make_mesh(MeshConfig(data=data, expert=expert), jax.devices()[: data * expert])


def devices_of(exchange):
    return math.prod(hop.destinations for hop in exchange.hops)


def routed(routing, devices, tokens=T, seed=0):
    """Distinct experts, -1 where a choice is absent, for each of the devices' tokens, int32 [devices * tokens, K]."""
    if routing == "one expert":
        return np.tile(np.asarray([-1, 21, -1], np.int32), (devices * tokens, 1))
    noise = np.random.default_rng(seed).gumbel(size=(devices * tokens, E))
    return np.argsort(-(LIKINGS[routing] + noise), axis=1)[:, :K].astype(np.int32)


def layer(rows, top_k, dtype):
    """Tokens, weights, matrices and the gradient of the result; the weights are float32, the rest `dtype`."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    x_TD, gate_up, down, dy_TD = draw(rows, D), draw(E, D, 2 * F) / 2, draw(E, F, D) / 2, draw(rows, D)
    return x_TD.astype(dtype), draw(rows, top_k), gate_up.astype(dtype), down.astype(dtype), dy_TD.astype(dtype)


def place(mesh, ids, arrays):
    specs = (ROWS, ROWS, ROWS, SHARES, SHARES, ROWS)
    return [jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip((ids, *arrays), specs, strict=True)]


def with_gradients(mesh, exchange, kept=None):
    """Jitted `(ids, x, weights, gate_up, down, dy) -> y, rounds, gradients`; the backward pass keeps only `kept`."""

    def local(ids, x, weights, gate_up, down, dy):
        call = lambda *arrays: exchanged_swiglu(*arrays[:2], ids, *arrays[2:], exchange)  # noqa: E731
        if kept is not None:
            call = jax.checkpoint(call, policy=jax.checkpoint_policies.save_only_these_names(*kept))
        y, pull, rounds = jax.vjp(call, x, weights, gate_up, down, has_aux=True)
        return y, rounds[None], pull(dy)

    inputs = (ROWS, ROWS, ROWS, SHARES, SHARES, ROWS)
    outputs = (ROWS, ROWS, (ROWS, ROWS, SHARES, SHARES))
    return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=inputs, out_specs=outputs))


@functools.cache
def program(layout):
    data, exchange = LAYOUTS[layout]
    mesh = mesh_of(data, devices_of(exchange))
    return mesh, exchange, with_gradients(mesh, exchange)


def assert_equal_to_dense(layout, ids, dtype=jnp.float32, tolerance=4e-6):
    mesh, exchange, function = program(layout)
    arrays = layer(len(ids), ids.shape[1], dtype)
    y, rounds, gradients = function(*place(mesh, ids, arrays))
    assert [a.dtype for a in (y, *gradients)] == [dtype, dtype, *["float32"] * 3]
    *wide, dy = (a.astype(jnp.float32) for a in arrays)
    want, pull = jax.vjp(lambda *a: every_expert_for_every_token(ids, *a), *wide)
    names = ("results", "tokens", "weights", "gate and up", "down")
    for name, g, w in zip(names, (y, *gradients), (want, *pull(dy)), strict=True):
        bound = tolerance * max(1, float(jnp.abs(w).max()))
        np.testing.assert_allclose(np.asarray(g, np.float32), w, rtol=0, atol=bound, err_msg=name)
    np.testing.assert_array_equal(rounds, expected_rounds(ids, exchange))


# -------------------------------------------------------------------------------- what is expected, one token at a time


def expected_rounds(ids, exchange, tokens=T):
    """The rounds of each hop on each device, [devices, hops], by moving every token by itself."""
    devices = devices_of(exchange)
    of_groups = [_rounds_of_group(group, exchange) for group in np.split(ids, len(ids) // (devices * tokens))]
    return np.repeat(of_groups, devices, axis=0)


def _rounds_of_group(ids, exchange):
    (*first, last), devices = exchange.hops, devices_of(exchange)
    each = E // devices
    tokens = [(i // (len(ids) // devices), sorted({e // each for e in row if e >= 0})) for i, row in enumerate(ids)]
    if not first:
        return [_rounds(_queues(tokens, lambda source, target: target), last)]
    inside = last.destinations
    queues = _queues(tokens, lambda source, target: target // inside * inside + source % inside)
    rounds, inner = _rounds(queues, first[0]), 0
    for number in range(rounds):
        window = slice(number * first[0].slots, (number + 1) * first[0].slots)
        arrived = [(middle, targets) for (_, middle), queue in queues.items() for targets in queue[window]]
        here = [(middle, [t for t in targets if t // inside == middle // inside]) for middle, targets in arrived]
        inner = max(inner, _rounds(_queues(here, lambda source, target: target), last))
    return [rounds, inner]


def _queues(tokens, stop):
    """The tokens (device, target devices) that go from each device to each stop, in order."""
    queues = {}
    for source, targets in tokens:
        for place in sorted({stop(source, target) for target in targets}):
            queues.setdefault((source, place), []).append(targets)
    return queues


def _rounds(queues, hop):
    return -(-max(len(queue) for queue in queues.values()) // hop.slots)


# -------------------------------------------------------------------------------------------------- equal to one device


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_gradients_and_rounds_equal_dense(layout, routing):
    """Sums of up to 400 products in float32: the root of 400 times 2^-24 is 1.2e-6 of the largest; three times that."""
    data, exchange = LAYOUTS[layout]
    assert_equal_to_dense(layout, routed(routing, data * devices_of(exchange)))


def test_one_choice_per_token_equals_dense():
    assert_equal_to_dense("8 devices", np.full((8 * T, 1), 21, np.int32))


@pytest.mark.parametrize("layout", ["8 devices", "2 nodes of 4, room for all"])
def test_bfloat16_equals_dense_up_to_its_rounding(layout):
    """Rows, products and partial sums are rounded by 2^-9 each; about eight in a row, four times their root."""
    assert_equal_to_dense(layout, routed("skewed", 8), jnp.bfloat16, tolerance=4 * 8**0.5 * 2**-9)


def test_layouts_take_one_round_and_many():
    """The routings above would show a loop that does not run, or runs once too often."""
    rounds = {}
    for layout, (data, exchange) in LAYOUTS.items():
        routings = [routed(routing, data * devices_of(exchange)) for routing in ROUTINGS]
        rounds[layout] = [expected_rounds(ids, exchange).max(0).tolist() for ids in routings]
    assert all(r == [1] for r in rounds["8 devices, room for all"])
    assert all(r == [1, 1] for r in rounds["2 nodes of 4, room for all"])
    assert max(rounds["8 devices"]) == [6]
    assert max(r[0] for r in rounds["2 nodes of 4"]) == 3
    assert max(r[1] for r in rounds["2 nodes of 4"]) >= 3


def test_one_device_makes_no_exchange():
    ids = jnp.asarray(routed("balanced", 1))
    arrays = layer(T, K, jnp.float32)[:4]
    call = lambda x, w, *experts: exchanged_swiglu(x, w, ids, *experts, Exchange())  # noqa: E731
    y, rounds = call(*arrays)
    np.testing.assert_allclose(
        y, every_expert_for_every_token(ids, *arrays), rtol=0, atol=4e-6 * float(jnp.abs(y).max())
    )
    assert rounds.shape == (0,)
    assert plan_exchange(MoEConfig(), 4096, 1) == Exchange()


# ---------------------------------------------------------------------------------------------------------------- slots


@pytest.mark.parametrize("destinations, slots", [(2, 1), (4, 3), (8, 2), (8, 40)])
@settings(max_examples=10, deadline=None)
@given(routing=st.sampled_from(ROUTINGS), absent=st.floats(0, 1), seed=st.integers(0, 99))
def test_every_visit_has_one_slot_in_one_round(destinations, slots, routing, absent, seed):
    """A token that picked several experts of one destination travels there once, and absent choices nowhere."""
    tokens, each, hop = 40, E // destinations, Hop("expert", destinations, slots)
    ids = routed(routing, 1, tokens, seed)
    ids = np.where(np.random.default_rng(seed).random(ids.shape) < absent, -1, ids)
    want = {(t, e // each) for t in range(tokens) for e in ids[t] if e >= 0}
    visits, most = jax.jit(find_visits, static_argnums=(1, 2))(ids, each, destinations)
    assert int(most) == max(sum(target == n for _, target in want) for n in range(destinations))
    got = []
    for number in range(-(-int(most) // slots)):
        of_token, of_slot = (np.asarray(a) for a in jax.jit(assign_slots, static_argnums=2)(visits, number, hop))
        filled = [(int(t), s) for s, t in enumerate(of_slot) if t < tokens]
        assert filled == sorted(
            ((t, s) for t in range(tokens) for s in of_token[t] if s < hop.rows), key=lambda f: f[1]
        )
        got += [(t, s // slots) for t, s in filled]
    assert sorted(got) == sorted(want)


@pytest.mark.parametrize("groups, top_groups, destinations", [(4, 2, 2), (4, 2, 4), (4, 2, 8), (4, 3, 2), (1, 1, 8)])
def test_visit_probability_counts_all_equally_likely_choices(groups, top_groups, destinations):
    cfg = MoEConfig(num_experts=16, top_k=3, num_groups=groups, top_groups=top_groups, gate="group_limited_greedy")
    size, each = 16 // groups, 16 // destinations
    hits = total = 0
    for chosen in itertools.combinations(range(groups), top_groups):
        for experts in itertools.combinations([e for e in range(16) if e // size in chosen], 3):
            hits, total = hits + any(e < each for e in experts), total + 1
    assert visit_probability(cfg, destinations) == pytest.approx(hits / total, rel=1e-12)


def test_plan_of_the_published_run():
    """256 experts in 8 groups, 4 of them and 8 experts per token, 4096 tokens, on 8 nodes of 8 devices."""
    cfg = MoEConfig()
    nodes, devices = 8 * visit_probability(cfg, 8), 64 * visit_probability(cfg, 64)
    assert (round(nodes, 2), round(devices, 2)) == (3.63, 7.36)
    plan = plan_exchange(cfg, 4096, 64, nodes=8, slack=1.25)
    across, within = plan.hops
    assert across.slots == 8 * np.ceil(1.25 * 4096 * nodes / 8 / 8)
    assert within.slots == 8 * np.ceil(1.25 * 4096 * devices / 8 / 8)
    assert plan.max_rows == 1.25 * 4096 * 8
    assert across.groups[3] == tuple(range(3, 64, 8)) and within.groups[3] == tuple(range(24, 32))
    (flat,) = plan_exchange(cfg, 4096, 64, slack=1.25).hops
    assert flat.slots == 8 * np.ceil(1.25 * 4096 * devices / 64 / 8)


@pytest.mark.parametrize("nodes", [1, 2, 8])
def test_plan_never_has_more_slots_than_tokens(nodes):
    cfg = MoEConfig(num_experts=32, top_k=3, num_groups=4, top_groups=2)
    plan = plan_exchange(cfg, 20, 8, nodes, slack=100.0)
    assert [h.slots for h in plan.hops] == ([20] if nodes != 2 else [20, 40])
    assert plan.max_rows == plan.hops[-1].rows * 3


def test_balanced_routing_takes_one_round_with_the_default_slack():
    cfg, tokens = MoEConfig(num_experts=E, top_k=K, num_groups=4, top_groups=2), 2048
    rng = np.random.default_rng(0)
    unused = rng.permuted(np.tile(np.arange(4), (8 * tokens, 1)), axis=1)[:, 2:]
    noise = rng.random((8 * tokens, E))
    np.put_along_axis(noise.reshape(-1, 4, 8), unused[:, :, None], np.inf, axis=1)
    ids = np.argsort(noise, axis=1)[:, :K]
    for nodes in (1, 2):
        plan = plan_exchange(cfg, tokens, 8, nodes, MeshConfig().exchange_slack)
        assert expected_rounds(ids, plan, tokens).max() == 1
        assert sum(hop.slots for hop in plan.hops) < tokens * nodes


# ------------------------------------------------------------------------------------------------- the compiled program


def lowered(layout, kept=None):
    """The program of a layout of 8 devices, with gradients, before it is compiled."""
    mesh, exchange, function = program(layout)
    if kept is not None:
        function = with_gradients(mesh, exchange, kept)
    return function.lower(*place(mesh, routed("balanced", 8), layer(8 * T, K, jnp.float32)))


def test_two_hops_carry_fewer_bytes_between_nodes():
    """A token crosses once per node where it visits, not once per device: with equal slots that is what is saved."""
    cfg = MoEConfig(num_experts=E, top_k=K, num_groups=4, top_groups=2)
    flat, hops = (plan_exchange(cfg, T, 8, nodes, slack=2.0) for nodes in (1, 2))

    def carried(exchange):
        mesh, specs = mesh_of(1, 8), (ROWS, ROWS, ROWS, SHARES, SHARES)
        call = lambda ids, x, w, *experts: exchanged_swiglu(x, w, ids, *experts, exchange)[0]  # noqa: E731
        function = jax.jit(jax.shard_map(call, mesh=mesh, in_specs=specs, out_specs=ROWS))
        arguments = place(mesh, routed("balanced", 8), layer(8 * T, K, jnp.float32))[:5]
        found = collectives(function.lower(*arguments).compile().as_text())
        return sum(c.bytes_between(np.arange(8) // 4) for c in found if c.kind == "all-to-all" and not c.looped)

    row = 4 * (2 * D + 2 * K)  # there and back; the choices' numbers and weights
    assert carried(flat) == 8 * 4 * flat.hops[0].slots * row
    assert carried(hops) == 8 * hops.hops[0].slots * row
    assert 4 * flat.hops[0].slots / hops.hops[0].slots > 1.5


@pytest.mark.parametrize("layout", ["8 devices", "2 nodes of 4"])
def test_no_reduction_over_devices_in_a_loop(layout):
    found = collectives(lowered(layout).compile().as_text())
    assert {c.kind for c in found if c.looped} <= {"all-to-all", "all-gather"}
    assert any(c.kind == "all-to-all" for c in found if c.looped)
    assert any(c.kind == "all-reduce" for c in found)  # of the experts' gradients over the data axis, after everything


def test_enough_slots_need_no_loop_with_communication():
    found = collectives(lowered("2 nodes of 4, room for all").compile().as_text())
    assert not [c for c in found if c.looped] and {c.kind for c in found} == {"all-to-all", "all-reduce"}


@pytest.mark.parametrize("layout", ["8 devices", "2 nodes of 4, room for all"])
def test_rematerialisation_does_not_communicate_again(layout):
    """With the names that the blocks keep; without those of the exchange it would."""
    names = ("dispatched", "dispatched_choices", "exchange_rounds")
    texts = [lowered(layout, kept).as_text() for kept in (None, KEPT, set(KEPT) - set(names))]
    plain, cheap, forgetful = (len(re.findall(r"stablehlo\.all_(?:to_all|gather)", text)) for text in texts)
    assert cheap == plain < forgetful


def test_first_round_stands_outside_of_loops():
    """A pipeline finds the first round's all-to-alls at the top level of the traced function."""
    mesh, _, function = program("8 devices")
    arguments = place(mesh, routed("balanced", 8), layer(8 * T, K, jnp.float32))
    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    loops = [e for e in equations(jaxpr) if e.primitive.name == "while"]
    inside = {id(e) for loop in loops for e in equations(loop.params["body_jaxpr"].jaxpr)}
    outside = [e for e in equations(jaxpr) if e.primitive.name == "all_to_all" and id(e) not in inside]
    assert len(outside) == 6
