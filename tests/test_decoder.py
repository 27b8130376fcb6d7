"""Decoding with a cache of latents against the forward pass without one, for V3's, V2's and dense layers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_mtp import CFG, FAST, draw

from moejax.config import MTPConfig
from moejax.mesh import one_device_mesh
from moejax.model.decoder import embedded, final_norm, mtp_norm, new_cache, run_blocks, run_mtp, scores, taken_apart
from moejax.model.mtp import module_at

LENGTH, SLOTS = 13, 16
V2 = dataclasses.replace(
    CFG,
    attention=dataclasses.replace(CFG.attention, q_lora_rank=None, yarn=None),
    moe=dataclasses.replace(CFG.moe, gate="group_limited_greedy", normalize_weights=False, route_scale=1.5),
    mtp=MTPConfig(depth=0),
)
DENSE = dataclasses.replace(CFG, num_dense_layers=CFG.num_layers, mtp=MTPConfig(depth=1))
BEFORE_NORM = dataclasses.replace(CFG, mtp=MTPConfig(depth=2, after_final_norm=False))
MODELS = {"V3": CFG, "V2": V2, "dense": DENSE, "MTP before the final norm": BEFORE_NORM}


def uncached(model, tokens):
    """Logits of the main model, then of every MTP depth, by the modules' training form."""
    embeds = model.embed(tokens, jnp.float32)
    hidden = model.hidden(embeds, None)[0]
    normed = model.norm(hidden)
    outs = [model.logits(tokens, jnp.float32)]
    hidden = normed if model.cfg.mtp.after_final_norm else hidden
    for depth in range(1, model.cfg.mtp.depth + 1):
        module, length = module_at(model.mtp, depth - 1), tokens.shape[1] - depth
        hidden = module(hidden[:, :length], embeds[:, depth:], jnp.arange(length)[None], None)[0]
        outs.append(module.norm(hidden) @ model.head_DV[...])
    return outs


def cached(decoder, tokens, sizes):
    """The same in pieces of `sizes` positions; an MTP module's piece is as long as the tokens are known."""
    cache = new_cache(decoder.cfg, len(tokens), SLOTS, len(decoder.mtp), jnp.float32)
    outs, start = [[] for _ in range(len(decoder.mtp) + 1)], 0
    for size in sizes:
        positions = jnp.broadcast_to(jnp.arange(start, start + size), (len(tokens), size))
        x = embedded(decoder, tokens[:, start : start + size], jnp.float32)
        x, cache = run_blocks(decoder, x, positions, cache)
        normed = final_norm(decoder, x)
        outs[0].append(scores(decoder, normed))
        hidden = normed if decoder.cfg.mtp.after_final_norm else x
        for depth in range(len(decoder.mtp)):
            size = min(size, LENGTH - start - depth - 1)
            if size == 0:
                break
            following = embedded(decoder, tokens[:, start + depth + 1 : start + depth + 1 + size], jnp.float32)
            hidden, cache = run_mtp(decoder, depth, hidden[:, :size], following, positions[:, :size], cache)
            outs[depth + 1].append(scores(decoder, mtp_norm(decoder, depth, hidden)))
        start += len(positions[0])
    return [jnp.concatenate(out, axis=1) for out in outs]


@pytest.mark.parametrize("name", MODELS)
def test_cached_decoding_equals_the_forward_pass(name):
    """Chunks of a prompt, then single tokens: logits of the main model and of the MTP modules."""
    cfg = MODELS[name]
    graph, params, bias, _, _ = draw(cfg)
    model = nnx.merge(graph, params, bias)
    tokens = np.random.default_rng(1).integers(cfg.vocab_size, size=(2, LENGTH)).astype(np.int32)
    decoder = jax.device_get(taken_apart(jax.device_put(model), one_device_mesh(), jnp.float32))
    sizes = (6, 4, 1, 1, 1)
    want = jax.jit(uncached, compiler_options=FAST)(model, tokens)
    got = jax.jit(lambda decoder, tokens: cached(decoder, tokens, sizes), compiler_options=FAST)(decoder, tokens)
    assert len(got) == cfg.mtp.depth + 1
    for one, other in zip(got, want, strict=True):
        assert one.shape == other.shape
        scale = np.abs(other).max()
        np.testing.assert_allclose(one, other, atol=2e-5 * scale)  # float32 through the layers, as in test_mtp


def test_cache_holds_the_latent_and_one_key_of_a_token():
    a = CFG.attention
    cache = new_cache(CFG, 3, SLOTS, CFG.mtp.depth, jnp.bfloat16)
    assert len(cache.blocks) == CFG.num_layers and len(cache.mtp) == CFG.mtp.depth
    assert {x.shape for x in jax.tree.leaves(cache)} == {(3, SLOTS, a.kv_lora_rank + a.qk_rope_dim)}
