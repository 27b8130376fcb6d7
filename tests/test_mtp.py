"""The whole model's losses with MTP modules, against the naive model: values, loads, and gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import naive
import numpy as np
import pytest
from flax import nnx

from moejax.config import AttentionConfig, BalanceConfig, ModelConfig, MoEConfig, MTPConfig, YarnConfig
from moejax.model.count import abstract_model
from moejax.model.hf import to_hf_tensors
from moejax.model.hf_config import config_to_hf
from moejax.model.moe import RouterBias

FAST = {"xla_backend_optimization_level": 0}  # compiles in less time
ROWS, LENGTH, DEPTH = 2, 9, 2
CFG = ModelConfig(
    vocab_size=31,
    hidden_size=12,
    num_layers=2,
    num_dense_layers=1,
    dense_width=10,
    attention=AttentionConfig(
        num_heads=2,
        q_lora_rank=7,
        kv_lora_rank=5,
        qk_nope_dim=4,
        qk_rope_dim=8,
        v_dim=3,
        yarn=YarnConfig(original_length=64),
        block=4,
    ),
    moe=MoEConfig(
        num_experts=6, num_groups=3, top_groups=2, top_k=4, expert_width=5, balance=BalanceConfig(sequence=0.5)
    ),
    mtp=MTPConfig(depth=DEPTH),
    remat="none",
    loss_chunk=10,
)


def draw(cfg):
    """A model with uneven norms and biases below zero, the same as HF tensors in float64, and tokens."""
    rng = np.random.default_rng(0)
    graph, params, bias = nnx.split(abstract_model(cfg), nnx.Param, RouterBias)

    def number(path, x):
        is_scale = any(getattr(key, "key", None) == "scale" for key in path)
        return (is_scale + 0.3 * rng.normal(size=x.shape)).astype(np.float32)

    params = jax.tree_util.tree_map_with_path(number, params)
    bias = jax.tree.map(lambda x: (rng.normal(size=x.shape) * 0.2 - 2).astype(np.float32), bias)
    tensors = {k: v.astype(float) for k, v in to_hf_tensors(nnx.merge(graph, params, bias), cfg)}
    return graph, params, bias, tensors, rng.integers(cfg.vocab_size, size=(ROWS, LENGTH + 1))


def total(losses):
    """A number in which every part has a weight of its own."""
    return losses.main + 0.7 * losses.mtp + 3.0 * losses.balance


def want(cfg, tensors, tokens):
    """main, mtp and balance of `Losses` by the naive model, and the counts of all MoE layers."""
    settings = dataclasses.replace(cfg.mtp, after_final_norm=True)  # all that `hf` can say; the reference is told below
    hf = config_to_hf(dataclasses.replace(cfg, mtp=settings))
    main = mtp = balance = 0.0
    counts = np.zeros((cfg.num_layers - cfg.num_dense_layers + cfg.mtp.depth, cfg.moe.num_experts), int)
    for row in tokens:
        logits = naive.model(tensors, hf, row[:-1])
        main += sum(naive.nll(logits[i], row[i + 1]) for i in range(LENGTH))
        losses, mtp_routing = naive.mtp_losses(tensors, hf, row, cfg.mtp.depth, cfg.mtp.after_final_norm)
        mtp += LENGTH * np.mean(losses)
        routing = naive.backbone(tensors, hf, row[:-1])[1] + mtp_routing
        for layer, (ids, scores) in enumerate(routing):
            counts[layer] += np.bincount(ids.reshape(-1), minlength=cfg.moe.num_experts)
            best = naive.top_ids(scores, cfg.moe.top_k)
            balance += naive.sequence_balance_loss(scores[None], best[None], cfg.moe.balance.sequence) / ROWS
    return main, mtp, balance, counts


def mask_of(tokens):
    return jnp.ones(tokens.shape, bool)


@pytest.mark.parametrize("after_final_norm", [True, False], ids=["after the final norm", "before the final norm"])
def test_losses_match_naive(after_final_norm):
    cfg = dataclasses.replace(CFG, mtp=MTPConfig(depth=DEPTH, after_final_norm=after_final_norm))
    graph, params, bias, tensors, tokens = draw(cfg)
    model = nnx.merge(graph, params, bias)
    run = jax.jit(lambda model, *batch: model.losses(*batch, jnp.float32), compiler_options=FAST)
    got = run(model, tokens, mask_of(tokens), None)
    main, mtp, balance, counts = want(cfg, tensors, tokens)
    np.testing.assert_array_equal(got.counts, counts)
    for name, value in (("main", main), ("mtp", mtp), ("balance", balance)):
        np.testing.assert_allclose(getattr(got, name), value, rtol=2e-5, err_msg=name)  # float32 through 4 layers


def test_gradients_match_finite_differences_in_float64():
    """Along a random direction in each of the tensors below; the counts must not change on the way."""
    cfg = dataclasses.replace(CFG, mtp=MTPConfig(depth=1))
    graph, params, bias, tensors, tokens = draw(cfg)

    def loss(params, bias, tokens):
        return total(nnx.merge(graph, params, bias).losses(tokens, mask_of(tokens), None, jnp.float32))

    grads = jax.jit(jax.grad(loss), compiler_options=FAST)(params, bias, tokens)
    got = dict(to_hf_tensors(nnx.merge(graph, jax.device_get(grads), bias), cfg))
    rng, step = np.random.default_rng(1), 1e-6
    for name in (
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.norm.weight",
        "model.layers.0.self_attn.q_a_proj.weight",
        "model.layers.1.mlp.gate.weight",
        "model.layers.2.enorm.weight",
        "model.layers.2.hnorm.weight",
        "model.layers.2.eh_proj.weight",
        "model.layers.2.mlp.experts.1.up_proj.weight",
        "model.layers.2.mlp.gate.weight",
        "model.layers.2.self_attn.kv_b_proj.weight",
        "model.layers.2.shared_head.norm.weight",
    ):
        direction = rng.normal(size=tensors[name].shape)
        ends = [want(cfg, tensors | {name: tensors[name] + s * direction}, tokens) for s in (step, -step)]
        np.testing.assert_array_equal(ends[0][3], ends[1][3])
        values = [main + 0.7 * mtp + 3.0 * balance for main, mtp, balance, _ in ends]
        slope = (values[0] - values[1]) / (2 * step)
        size = np.linalg.norm(got[name]) * np.linalg.norm(direction)
        assert abs(np.sum(got[name] * direction) - slope) <= 1e-4 * size, name


def test_documents_of_a_row_do_not_see_each_other():
    """With two documents in a row, the losses are the sums of what each gives on its own."""
    graph, params, bias, _, tokens = draw(CFG)
    model = nnx.merge(graph, params, bias)
    cut = 5
    ids = (np.arange(LENGTH + 1) >= cut).astype(np.int32)[None]
    mask = np.ones((1, LENGTH + 1), bool)
    mask[0, cut] = False  # the first token of the second document is not predicted
    run = jax.jit(lambda model, *batch: model.losses(*batch, jnp.float32), compiler_options=FAST)
    got = run(model, tokens[:1], mask, ids)
    alone = [run(model, part, mask_of(part), None) for part in (tokens[:1, :cut], tokens[:1, cut:])]
    np.testing.assert_allclose(got.main, alone[0].main + alone[1].main, rtol=2e-5)
    np.testing.assert_allclose(got.mtp, alone[0].mtp + alone[1].mtp, rtol=2e-5)
