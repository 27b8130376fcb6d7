import jax
import jax.numpy as jnp
import naive
import numpy as np
import pytest

from moejax.config import OptimizerConfig
from moejax.mesh import one_device_mesh
from moejax.train.optimizer import clip, decays, make_optimizer
from moejax.train.state import new_state


@pytest.mark.parametrize("moments, tolerance", [("fp32", 1e-6), ("bf16", 2e-2)])
def test_adamw_matches_naive_over_some_steps(moments, tolerance):
    cfg = OptimizerConfig(moments=moments, weight_decay=0.1, eps=1e-8)
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)}
    optimizer = make_optimizer(cfg)
    state = optimizer.init(params)
    want, m, v = {"w": np.asarray(params["w"], np.float64)}, None, None
    for step in range(1, 5):
        grads = {"w": rng.normal(size=(4, 3))}
        clipped, norm = clip({"w": jnp.asarray(grads["w"], jnp.float32)}, cfg.clip_norm)
        updates, state = optimizer.update(clipped, state, params)
        params = jax.tree.map(lambda p, u: p - 1e-2 * u, params, updates)
        want, m, v, want_norm = naive.adamw_step(want, grads, 1e-2, step, m, v)
        np.testing.assert_allclose(norm, want_norm, rtol=1e-6)
    # each step moves by about the learning rate; the moments' dtype bounds how exactly
    np.testing.assert_allclose(params["w"], want["w"], rtol=0, atol=4e-2 * tolerance + 1e-6)
    kept = {x.dtype for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)}
    assert kept == {jnp.dtype({"fp32": jnp.float32, "bf16": jnp.bfloat16}[moments])}


@pytest.mark.parametrize("limit, norm_after", [(0.5, 0.5), (10.0, 5.0)], ids=["clips", "leaves alone"])
def test_clip_limits_the_common_norm(limit, norm_after):
    clipped, norm = clip({"a": jnp.asarray([[3.0]]), "b": jnp.asarray([0.0, -4.0])}, limit)
    assert norm == 5
    np.testing.assert_allclose(clipped["a"], [[3 * norm_after / 5]], rtol=1e-6)
    np.testing.assert_allclose(clipped["b"], [0, -4 * norm_after / 5], rtol=1e-6)


def test_matrices_decay_and_scales_of_norms_do_not(run_config):
    params = new_state(run_config, one_device_mesh()).params
    for path, decay in jax.tree_util.tree_leaves_with_path(decays(params)):
        assert decay == ("scale" not in jax.tree_util.keystr(path)), jax.tree_util.keystr(path)
    assert 0 < sum(jax.tree.leaves(decays(params))) < len(jax.tree.leaves(params))
