"""The layers of a model on the stages of a pipeline: every layer once, no spread better, what does not fit one line."""

import dataclasses
import itertools
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.config import ONE_DEVICE, ConfigError, PipelineConfig, RunConfig
from moejax.config_source import load_config
from moejax.model.count import forward_flops_per_token, train_flops_per_token
from moejax.model.transformer import Transformer
from moejax.pipeline.layout import Layout, balanced, costs, lay_out

CONFIGS = Path(__file__).parent.parent / "configs"
COSTS = st.lists(st.integers(0, 20), min_size=1, max_size=4)


def configured(name, pipe, schedule="dualpipe", *words):
    words = ["--mesh.pipe", str(pipe), "--pipeline.schedule", schedule, *words]
    return load_config(CONFIGS / f"{name}.py", words)


def goodness(beside, each, layers):
    """Smaller is better: the largest cost, the depth, how uneven the costs are."""
    total = [cost + each * count for cost, count in zip(beside, layers, strict=True)]
    return max(total), max(layers), sum(cost * cost for cost in total)


# ------------------------------------------------------------------------------------------------------- the spread


@settings(deadline=None)
@given(beside=COSTS, each=st.integers(1, 6), count=st.integers(1, 7))
def test_no_other_spread_is_better(beside, each, count):
    layers = balanced(beside, each, count)
    others = itertools.product(range(count + 1), repeat=len(beside))
    best = min(goodness(beside, each, other) for other in others if sum(other) == count)
    assert sum(layers) == count and min(layers) >= 0
    assert goodness(beside, each, layers) == best


@given(half=st.integers(1, 6), count=st.integers(1, 40))
def test_the_two_stages_of_a_rank_share_what_is_left_over(half, count):
    layers = balanced([0] * 2 * half, 1, count)
    of_ranks = [a + b for a, b in zip(layers[:half], layers[: half - 1 : -1], strict=True)]
    assert max(of_ranks) - min(of_ranks) <= 1


def test_late_stages_take_what_is_left_over():
    assert balanced([0, 0, 0, 0], 1, 6) == (1, 1, 2, 2)


@pytest.mark.parametrize(
    ("name", "pipe", "schedule", "layers"),
    [
        ("deepseek_v3", 16, "dualpipe", (1, *[4] * 14, 1)),
        ("deepseek_v3", 16, "dualpipe_v", (0, 1, 1, *[2] * 28, 0)),
        ("deepseek_v3", 8, "dualpipe", (5, *[8] * 6, 5)),
        ("deepseek_v3", 8, "dualpipe_v", (1, *[4] * 14, 1)),
        ("deepseek_v2", 16, "zb1p", (3, 3, 3, *[4] * 12, 2)),
        ("tiny", 2, "dualpipe", (4, 4)),
        ("tiny", 4, "dualpipe", (1, 3, 3, 1)),
        ("tiny", 4, "dualpipe_v", (0, 1, 1, 1, 1, 2, 2, 0)),
        ("small_moe", 4, "one_f_one_b", (1, 3, 3, 0)),  # the head costs as much as 15 layers
    ],
)
def test_models_lie_as_balanced_as_can_be(name, pipe, schedule, layers):
    config = configured(name, pipe, schedule)
    found = lay_out(config)
    assert found == Layout(pipe, 2 if schedule == "dualpipe_v" else 1, layers)
    each = forward_flops_per_token(config.model, config.data.sequence_length).moe_layer
    total = costs(config, found)
    beside = [cost - each * count for cost, count in zip(total, layers, strict=True)]

    def room(largest, depth):
        """Layers that fit where no stage costs more than `largest` and none has more than `depth`."""
        return sum(min((largest - cost) // each, depth) for cost in beside)

    assert max(beside) == max(total) or room(max(total) - 1, sum(layers)) < sum(layers)
    assert room(max(total), found.depth) >= sum(layers) > room(max(total), found.depth - 1)
    for less, more in itertools.permutations(range(len(layers)), 2):  # squares are convex: no move, no better spread
        if layers[less] and layers[more] < found.depth:
            assert total[more] + each >= total[less]


@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v2", "tiny"])
def test_costs_of_the_stages_are_those_of_the_model(name):
    config = configured(name, 4)
    want = train_flops_per_token(config.model, config.data.sequence_length) / 3
    assert sum(costs(config, lay_out(config))) == want
    by_hand = dataclasses.replace(lay_out(config), layers=(config.model.num_moe_layers, 0, 0, 0))
    assert sum(costs(config, by_hand)) == want and costs(config, by_hand)[1:3] == (0, 0)


# -------------------------------------------------------------------------------------------- places in the parameters


def test_places_of_a_line_are_in_the_order_of_the_stages():
    layout = Layout(4, 1, (1, 0, 3, 2))
    assert (layout.depth, layout.first_layer) == (3, (0, 1, 1, 4))
    assert layout.layer_of_slot == (0, -1, -1, -1, -1, -1, 1, 2, 3, 4, 5, -1)
    assert Layout(2, 1, (3, 3)).layer_of_slot == (0, 1, 2, 3, 4, 5)


def test_places_of_a_v_are_in_the_order_of_the_ranks():
    layout = Layout(2, 2, (1, 0, 3, 2))
    assert [layout.stages_of_rank(rank) for rank in range(2)] == [(0, 3), (1, 2)]
    assert layout.layer_of_slot == (0, -1, -1, 4, 5, -1, -1, -1, -1, 1, 2, 3)
    assert Layout(2, 2, (2, 2, 2, 2)).layer_of_slot == (0, 1, 6, 7, 2, 3, 4, 5)


@given(ranks=st.integers(1, 4), chunks=st.integers(1, 2), data=st.data())
def test_every_layer_has_one_place(ranks, chunks, data):
    stages = ranks * chunks
    layers = data.draw(st.lists(st.integers(0, 4), min_size=stages, max_size=stages).filter(any))
    layout = Layout(ranks, chunks, tuple(layers))
    slots = layout.layer_of_slot
    assert len(slots) == ranks * chunks * layout.depth
    assert sorted(slot for slot in slots if slot >= 0) == list(range(sum(layers)))
    assert (len(set(layers)) == 1) == (-1 not in slots)


def test_a_model_is_drawn_alike_with_its_layers_in_any_place(model_config):
    def drawn(slots):
        model = Transformer(nnx.Rngs(params=jax.random.key(3)), model_config, ONE_DEVICE, slots)
        layers, model.moe_blocks = model.moe_blocks, None
        return layers, model

    (own, want), (placed, got) = (jax.jit(drawn, static_argnums=0)(slots) for slots in (None, (1, -1, 0, -1)))
    jax.tree.map(np.testing.assert_array_equal, got, want)
    for layers, places in zip(jax.tree.leaves(own), jax.tree.leaves(placed), strict=True):
        assert places.dtype == layers.dtype
        np.testing.assert_array_equal(places[::2], layers[::-1])
        np.testing.assert_array_equal(places[1::2], 0)


# ------------------------------------------------------------------------------------------------- layouts by hand


def test_layers_by_hand_are_a_flag_and_a_list_of_json():
    config = configured("tiny", 4, "dualpipe", "--pipeline.layers", "1", "4", "0", "3", "--seed", "1")
    assert lay_out(config) == Layout(4, 1, (1, 4, 0, 3))
    assert RunConfig.from_json(config.to_json()) == config
    assert RunConfig(steps=1).pipeline.layers is None


@pytest.mark.parametrize(
    ("name", "pipe", "schedule", "words", "line"),
    [
        (
            "tiny",
            4,
            "dualpipe",
            "4 4",
            "pipeline.layers=(4, 4): wanted 4 numbers, one for each stage of mesh.pipe=4 with dualpipe",
        ),
        (
            "tiny",
            2,
            "dualpipe_v",
            "4 4",
            "pipeline.layers=(4, 4): wanted 4 numbers, one for each stage of mesh.pipe=2 with dualpipe_v",
        ),
        (
            "tiny",
            2,
            "gpipe",
            "4 3",
            "pipeline.layers=(4, 3): wanted numbers whose sum is the model's 8 MoE layers, not 7",
        ),
        ("tiny", 2, "gpipe", "9 -1", "pipeline.layers=(9, -1): wanted for each stage a number that is 0 or more"),
        ("tiny", 2, "gpipe", "", "pipeline.layers=(): wanted for each stage a number that is 0 or more"),
        (
            "tiny",
            11,
            "gpipe",
            None,
            "mesh.pipe=11: wanted at most 10: 11 stages are more than the 10 layers, MTP modules among them",
        ),
        (
            "shakespeare",
            8,
            "dualpipe",
            None,
            "mesh.pipe=8: wanted at most 4: 8 stages are more than the 5 layers, MTP modules among them",
        ),
        (
            "deepseek_v3",
            64,
            "dualpipe_v",
            None,
            "mesh.pipe=64: wanted at most 31: 128 stages are more than the 62 layers, MTP modules among them",
        ),
    ],
    ids=[
        "too few numbers",
        "too few numbers for a v",
        "a layer too few",
        "below zero",
        "no numbers",
        "more stages than layers",
        "the nearest even number of ranks",
        "more stages of a v than layers",
    ],
)
def test_what_does_not_fit_is_one_line(name, pipe, schedule, words, line):
    flags = [] if words is None else ["--pipeline.layers", *words.split()]
    with pytest.raises(ConfigError) as error:
        lay_out(configured(name, pipe, schedule, *flags))
    assert str(error.value) == line


def test_as_many_stages_as_layers_fit(change):
    config = configured("tiny", 10, "gpipe")
    assert lay_out(config).layers == (0, *[1] * 8, 0)
    assert lay_out(change(config, "pipeline", PipelineConfig(layers=(8, *[0] * 9)))).depth == 8


def test_a_model_without_moe_layers_has_no_stages(change):
    with pytest.raises(ConfigError) as error:
        lay_out(change(configured("tiny", 2), "model.num_dense_layers", 9))
    assert str(error.value) == "mesh.pipe=2: wanted 1, as none of the 9 layers is an MoE layer to spread"
