"""A forward pass woven with a backward pass: the same equations, in phases that each hide one side's all-to-all."""

import functools
from collections import Counter
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
from test_backward import EXPERT_4, MESHES, Case, assert_close, count_products, make_case

from moejax.ops import grouped
from moejax.pipeline.backward import StageFunctions, reached, variables
from moejax.pipeline.interleave import interleave_stages

BLOCKS = grouped._LARGE, grouped._SMALL


class Pair(NamedTuple):
    """A stage whose forward pass runs beside the backward pass of another."""

    ahead: Case
    behind: Case
    forward: StageFunctions
    backward: StageFunctions

    def woven(self, params, x, params_behind, residuals, dy, daux):
        return interleave_stages(self.forward, params, x, self.backward, params_behind, residuals, dy, daux)

    def arguments(self, residuals):
        return self.ahead.params, self.ahead.x, self.behind.params, residuals, self.behind.dy, self.behind.daux


@functools.cache
def make_pair(
    model, ahead=("moe",), behind=("moe",), remat="none", dtype=jnp.float32, mesh=EXPERT_4, blocks=BLOCKS
) -> Pair:
    """`blocks`: the most rows of a grouped product's block, and of what they are a multiple; a length is a loop."""
    cases = [make_case(model, mesh, kinds, remat, dtype, seed) for seed, kinds in enumerate((ahead, behind))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grouped, "_LARGE", blocks[0])
        patch.setattr(grouped, "_SMALL", blocks[1])
        return Pair(*cases, *(case.traced() for case in cases))


class Program(NamedTuple):
    """A woven program of one device, cut at the barriers between its phases."""

    pair: Pair
    jaxpr: jax.extend.core.Jaxpr
    inputs: list
    phases: list  # of equations of F and B
    barriers: list


@functools.cache
def traced(model, name) -> Program:
    pair = make_pair(model, **PAIRS[name])
    residuals = [pair.behind.zeros(r) for r in pair.backward.residuals]
    closed = jax.make_jaxpr(pair.ahead.on_devices(pair.woven))(*pair.arguments(residuals))
    jaxpr = closed.eqns[0].params["jaxpr"]
    inputs = jaxpr.invars[len(jaxpr.invars) - len(closed.jaxpr.invars) :]  # constants come before them
    phases, barriers = [[]], []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "optimization_barrier" and side(eqn) == "":
            barriers.append(eqn)
            phases.append([])
        elif side(eqn):
            phases[-1].append(eqn)
    return Program(pair, jaxpr, inputs, phases, barriers)


def side(eqn):
    """F, B, or nothing."""
    return str(eqn.source_info.name_stack).split("/")[0]


def exchanges(phase):
    return [eqn for eqn in phase if eqn.primitive.name == "all_to_all"]


def products(phase):
    return [eqn for eqn in phase if count_products(eqn)]


PAIRS = {
    "one layer": {},
    "two layers, cheap": {"ahead": ("moe", "moe"), "behind": ("moe", "moe"), "remat": "cheap"},
    "two layers, full": {"ahead": ("moe", "moe"), "behind": ("moe", "moe"), "remat": "full"},
    "two hops": {"mesh": MESHES["expert 4 on 2 nodes"], "remat": "cheap"},
    "more rounds": {"mesh": MESHES["expert 4 in rounds"]},
    "dense ahead": {"ahead": ("dense", "dense")},
    "dense behind": {"behind": ("dense", "dense")},
    "dense": {"ahead": ("dense",), "behind": ("dense",)},
    "bf16": {"ahead": ("moe", "moe"), "remat": "cheap", "dtype": jnp.bfloat16},
    "loops": {"remat": "cheap", "blocks": (16, 4)},
    "loops in rounds": {"mesh": MESHES["expert 4 in rounds"], "blocks": (16, 4)},
    "short ahead": {"behind": ("moe", "dense", "moe"), "remat": "full"},
}


@pytest.mark.parametrize("name", PAIRS)
def test_each_exchange_has_a_phase_with_products_of_the_other_side(model_config, name):
    program = traced(model_config, name)
    dim = model_config.hidden_size
    found = Counter()
    for phase in program.phases:
        sent = exchanges(phase)
        if sent:
            (own,) = {side(eqn) for eqn in sent}
            assert sum(eqn.outvars[0].aval.shape[-1] == dim for eqn in sent) == 1  # the rest is sent with these rows
            assert {side(eqn) for eqn in products(phase)} == {"F", "B"} - {own}
            found[own] += 1
        else:
            assert len({side(eqn) for eqn in phase}) == 1 or name == "dense"
    hops = 2 if name == "two hops" else 1
    again = hops if PAIRS[name].get("remat") == "full" else 0  # dispatches
    ahead, behind = (PAIRS[name].get(side, ("moe",)).count("moe") for side in ("ahead", "behind"))
    assert (found["F"], found["B"]) == (2 * hops * ahead, (2 * hops + again) * behind)


@pytest.mark.parametrize("name", ["one layer", "two layers, cheap"])
def test_no_product_stands_where_nothing_is_sent(model_config, name):
    """Not even those of the shared experts, which come after the forward's last exchange."""
    assert all(exchanges(phase) for phase in traced(model_config, name).phases if products(phase))


@pytest.mark.parametrize("name", PAIRS)
def test_products_stay_in_their_phase(model_config, name):
    """They wait for the barrier before them, and the one after them waits for them."""
    program = traced(model_config, name)
    for before, phase, after in zip([None, *program.barriers], program.phases, [*program.barriers, None], strict=True):
        for eqn in products(phase) + exchanges(phase):
            assert before is None or not jointly(program, before.outvars).isdisjoint(variables(eqn.invars))
            assert after is None or not jointly(program, eqn.outvars).isdisjoint(variables(after.invars))


def jointly(program, start):
    """What depends on `start`, all that passes a barrier on all of it."""
    found = set(start)
    for eqn in program.jaxpr.eqns:
        if not found.isdisjoint(variables(eqn.invars)):
            found |= set(eqn.outvars)
    return found


@pytest.mark.parametrize("name", PAIRS)
def test_sides_do_not_depend_on_each_other(model_config, name):
    program = traced(model_config, name)
    pair, inputs, outputs = program.pair, program.inputs, program.jaxpr.outvars
    num_inputs = len(jax.tree.leaves((pair.ahead.params, pair.ahead.x)))
    num_outputs = len(outputs) - len(pair.backward.backward_jaxpr.jaxpr.outvars)
    assert reached(program.jaxpr.eqns, inputs[:num_inputs]).isdisjoint(variables(outputs[num_outputs:]))
    assert reached(program.jaxpr.eqns, inputs[num_inputs:]).isdisjoint(variables(outputs[:num_outputs]))
    if len(program.phases) > 1:
        assert not jointly(program, inputs[num_inputs:]).isdisjoint(variables(outputs[:num_outputs]))


@pytest.mark.parametrize("name", PAIRS)
def test_equations_are_those_of_both(model_config, name):
    pair = make_pair(model_config, **PAIRS[name])

    def kinds(eqns):
        return Counter((eqn.primitive.name, *(str(v.aval) for v in eqn.outvars)) for eqn in eqns)

    both = kinds(pair.forward.forward_jaxpr.jaxpr.eqns) + kinds(pair.backward.backward_jaxpr.jaxpr.eqns)
    assert kinds(eqn for phase in traced(model_config, name).phases for eqn in phase) == both


def test_a_grouped_product_of_several_lengths_of_blocks_is_several_loops(model_config):
    """As the tests here of such products take for granted."""

    def loops(name):
        phases = traced(model_config, name).phases
        return sum(eqn.primitive.name == "while" for phase in phases for eqn in products(phase))

    assert loops("loops in rounds") > loops("more rounds") > 0  # the same but for the blocks


def test_weights_pass_no_barrier(model_config):
    """A barrier would keep the cast of a weight from being fused with its product."""
    program = traced(model_config, "bf16")
    pair, inputs = program.pair, program.inputs
    x, weights = len(jax.tree.leaves(pair.ahead.params)), len(jax.tree.leaves(pair.behind.params))
    others = [*inputs[x : x + 2], *inputs[x + 2 + weights :]]
    assert reached(program.jaxpr.eqns, others).issuperset(v for barrier in program.barriers for v in barrier.invars)


def test_without_exchanges_there_is_one_phase(model_config):
    program = traced(model_config, "dense")
    assert len(program.phases) == 1 and not program.barriers


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param({"remat": "cheap", "dtype": jnp.bfloat16}, id="cheap, bf16"),
        pytest.param({"remat": "full", "mesh": MESHES["data 2 x expert 2"]}, id="full, data 2 x expert 2"),
        pytest.param({"ahead": ("dense",), "behind": ("moe",)}, id="dense ahead"),
        pytest.param(PAIRS["loops"], id="loops"),
        pytest.param({"ahead": ("moe", "moe"), "behind": ("dense", "moe")}, id="unequal", marks=pytest.mark.slow),
    ],
)
def test_results_equal_those_of_both(model_config, arguments):
    """As in test_backward, what is rounded where depends on the program: a few roundings of each array's largest."""
    pair = make_pair(model_config, **arguments)
    behind, ahead = pair.behind, pair.ahead
    _, _, residuals = behind.run(pair.backward.forward, behind.params, behind.x)
    outputs, gradients = ahead.run(pair.woven, *pair.arguments(residuals))
    assert_close(outputs, ahead.run(pair.forward.forward, ahead.params, ahead.x))
    _, want = behind.run(behind.gradients, behind.params, behind.x, behind.dy, behind.daux)
    assert_close(gradients, want)
