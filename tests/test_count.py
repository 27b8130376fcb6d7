"""Parameters and FLOPs of the published models, against the published and derived figures."""

import dataclasses
import runpy
from pathlib import Path

import jax
import pytest

from moejax.config import MTPConfig
from moejax.model.count import abstract_model, active_per_token, num_parameters, train_flops_per_token

CONFIGS = Path(__file__).parent.parent / "configs"


def published(name, depth=0):
    cfg = runpy.run_path(str(CONFIGS / f"{name}.py"))["config"]().model
    return dataclasses.replace(cfg, mtp=MTPConfig(depth=depth))


@pytest.mark.parametrize(
    ("name", "total", "attention", "moe_layer", "embedding"),
    [
        ("deepseek_v3", 671_026_419_200, 187_107_328, 11_507_286_272, 926_679_040),
        ("deepseek_v2", 235_741_434_880, 149_227_520, 3_972_116_480, 524_288_000),
        ("deepseek_v2_lite", 15_706_484_224, 13_763_072, 584_847_872, 209_715_200),
    ],
)
def test_parameters_are_the_published_ones(name, total, attention, moe_layer, embedding):
    cfg = published(name)
    model = abstract_model(cfg)
    num_moe = cfg.num_layers - cfg.num_dense_layers
    assert num_parameters(model) == total
    assert num_parameters(model.moe_blocks.attention) == attention * num_moe
    assert num_parameters(model.moe_blocks) == moe_layer * num_moe
    assert model.embed_VD.size == model.head_DV.size == embedding


def test_mtp_module_of_v3():
    with_mtp, without = (num_parameters(abstract_model(published("deepseek_v3", depth))) for depth in (1, 0))
    assert with_mtp - without == 11_610_068_224


@pytest.mark.parametrize(
    ("name", "active"),
    [("deepseek_v3", 36_625_618_432), ("deepseek_v2", 20_851_512_320), ("deepseek_v2_lite", 2_451_435_008)],
)
def test_active_parameters_are_the_published_ones(name, active):
    """Those of the fact sheet count norms and biases too, which are no products of matrices."""
    cfg = published(name)
    leaves = jax.tree_util.tree_leaves_with_path(abstract_model(cfg))
    vectors = (".scale.", ".router_bias.")
    others = sum(x.size for path, x in leaves if any(part in jax.tree_util.keystr(path) for part in vectors))
    assert active_per_token(cfg, mtp=False) + others == active


@pytest.mark.parametrize(
    ("name", "depth", "published_gflop"), [("deepseek_v3", 0, 250), ("deepseek_v3", 1, 260), ("deepseek_v2", 0, 155)]
)
def test_flops_per_token_at_4096(name, depth, published_gflop):
    got = train_flops_per_token(published(name, depth), 4096)
    assert got == pytest.approx(published_gflop * 1e9, rel=0.003)
    if depth:
        without = train_flops_per_token(published(name, depth), 4096, mtp=False)
        assert without == train_flops_per_token(published(name), 4096)
