"""Attention through cuDNN: what is around its calls on a CPU, the calls themselves, and programs for an H200."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as of_jax
from jax.sharding import AxisType, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from moejax.kernels import attention as kernel
from moejax.ops.attention import attention
from moejax.pipeline.backward import trace_stage
from moejax.pipeline.interleave import interleave_stages
from moejax.plan.hopper import h200_devices

SCALE = 0.3
BF16 = jnp.bfloat16


def shapes(batch, length, heads, qk, v, dtype=BF16, **how):
    """q, k and v that need not exist."""
    return [jax.ShapeDtypeStruct((batch, length, heads, dim), dtype, **how) for dim in (qk, qk, v)]


def ids_like(q):
    return jax.ShapeDtypeStruct(q.shape[:2], jnp.int32, sharding=q.sharding)


def with_gradients(q, k, v, ids=None):
    out, back = jax.vjp(lambda *x: attention(*x, SCALE, ids), q, k, v)
    return out, back(out)


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """Programs for GPUs have kernels, though Triton may be absent, which cuDNN does not need."""
    monkeypatch.setattr("moejax.ops.platform.available", lambda: True)


def program(function, *arrays):
    """What JAX hands to XLA for a GPU."""
    return jax.jit(function).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()


def calls(text):
    """Of each call of cuDNN in a program: its name, its configuration, and the rest (layouts and types)."""
    line = r"stablehlo\.custom_call @(__cudnn\$fmha\w+)\(.*?\) \{(.*)\} : (.*)"
    found = []
    for name, attributes, types in re.findall(line, text):
        config = re.search(r'backend_config = "((?:[^"\\]|\\.)*)"', attributes)[1]
        config = re.sub(r"\\([0-9A-F]{2})", lambda m: chr(int(m[1], 16)), config)
        layouts = re.search(r"operand_layouts.*", attributes)[0]
        found.append((name, json.loads(config), layouts, types))
    return found


def names(text):
    return sorted(call[0].removeprefix("__cudnn$fmha") for call in calls(text))


def draw(length, dims, documents=False):
    """q, k, v, a change of the output, and segments: row 0 has several, row 1 one."""
    rng = np.random.default_rng(0)
    qk, v = dims
    arrays = [jnp.array(rng.normal(size=(2, length, 3, dim)), BF16) for dim in (qk, qk, v, v)]
    ids = np.stack([np.cumsum(np.isin(np.arange(length), [1, 4, 5, length // 2])), np.zeros(length)]).astype(np.int32)
    return *arrays, jnp.array(ids) if documents else None


# ------------------------------------------------------------------------------------------------------------- on a CPU


@pytest.mark.parametrize(
    ("dims", "length", "documents", "dtype", "wanted"),
    [
        pytest.param((192, 128), 4096, False, BF16, True, id="DeepSeek-V3"),
        pytest.param((192, 128), 4096, True, BF16, True, id="documents"),
        pytest.param((192, 128), 16384, False, BF16, True, id="long"),
        pytest.param((192, 128), 16384, True, BF16, False, id="documents in a long row"),
        pytest.param((192, 128), 4096, False, jnp.float32, False, id="float32"),
        pytest.param((24, 16), 7, False, BF16, True, id="to be padded"),
        pytest.param((20, 16), 7, False, BF16, False, id="no multiple of 8"),
        pytest.param((128, 192), 7, False, BF16, False, id="values wider than keys"),
        pytest.param((264, 128), 7, False, BF16, False, id="too wide"),
        pytest.param((192, 128), 1, False, BF16, False, id="one position"),
    ],
)
def test_supports(dims, length, documents, dtype, wanted):
    q, k, v = shapes(2, length, 4, *dims, dtype)
    ids = ids_like(q) if documents else None
    assert kernel.supports(q, k, v, ids) is wanted
    bias = "ScaleBias" * documents
    text = program(with_gradients, q, k, v, *([ids] if documents else []))
    assert names(text) == ([f"{bias}Softmax", f"{bias}SoftmaxBackward"] if wanted else [])
    assert ("dot_general" in text) is not wanted  # products of scores


def of_cudnn(name, operands, shapes, config):
    """What cuDNN computes, by its documentation, in float32."""
    scale = config["cudnn_fmha_backend_config"]["fmha_scale"]
    (q, k, v, *others), product = (x.astype(jnp.float32) for x in operands), jnp.einsum
    backward, masked = name.endswith("Backward"), name.startswith("ScaleBias")
    assert q.shape[-1] == v.shape[-1] or (q.shape[-1], v.shape[-1]) in kernel.UNEQUAL_DIMS
    assert not (masked and q.shape[1] % 2)
    scores = product("bqhd,bkhd->bhqk", q, k) * scale + (others[2 * backward] if masked else 0.0)
    scores = jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, -jnp.inf)
    log_sum = others[0] if backward else jax.nn.logsumexp(scores, -1)
    weights = jnp.exp(scores - log_sum[..., None])
    if backward:
        dout, out = others[1], others[-1]
        dweights = product("bqhd,bkhd->bhqk", dout, v) - (dout * out).sum(-1).swapaxes(1, 2)[..., None]
        dscores = weights * dweights * scale
        sums = (("bhqk,bkhd->bqhd", dscores, k), ("bhqk,bqhd->bkhd", dscores, q), ("bhqk,bqhd->bkhd", weights, dout))
        found = [product(*each).astype(BF16) for each in sums]
    else:
        found = [product("bhqk,bkhd->bqhd", weights, v).astype(BF16), log_sum]
    assert all(np.isfinite(x).all() for x in (weights, *found))  # where positions were added too
    assert [(x.swapaxes(1, 2) if x.ndim == 4 else x).shape for x in found] == list(shapes)
    return found


@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("length", [12, 37], ids=["even", "odd"])
@pytest.mark.parametrize("dims", [(192, 128), (24, 16)], ids=["as they are", "padded"])
def test_padding_and_bias_change_nothing(dims, length, documents, monkeypatch):
    q, k, v, change, ids = draw(length, dims, documents)

    def gradients(*qkv):
        out, back = jax.vjp(lambda *x: attention(*x, dims[0] ** -0.5, ids), *qkv)
        return out, *back(change.astype(out.dtype))

    want = jax.jit(gradients)(*(x.astype(jnp.float32) for x in (q, k, v)))
    monkeypatch.setattr(kernel, "_call", of_cudnn)
    monkeypatch.setattr("moejax.ops.attention.by_platform", lambda kernel, plain, *arrays: kernel(*arrays))
    for name, a, b in zip(("out", "dq", "dk", "dv"), gradients(q, k, v), want, strict=True):
        assert (a.dtype, a.shape) == (BF16, b.shape)
        atol = 4 * 2.0**-8 * np.abs(b).max()  # bfloat16: probabilities, their gradients, the result, and sums of them
        np.testing.assert_allclose(a.astype(np.float32), b, atol=atol, rtol=0, err_msg=name)


@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
def test_a_cpu_runs_the_plain_form(documents, monkeypatch):
    *qkv, _, ids = draw(12, (24, 16), documents)
    assert names(jax.jit(with_gradients).lower(*qkv, ids).as_text()) == []
    found = jax.jit(with_gradients)(*qkv, ids)
    monkeypatch.setattr("moejax.ops.platform.available", lambda: False)
    alone = jax.jit(lambda *x: with_gradients(*x)).trace(*qkv, ids)
    assert "platform" not in str(alone.jaxpr)
    jax.tree.map(np.testing.assert_array_equal, found, alone.lower().compile()(*qkv, ids))


# ------------------------------------------------------------------------------------------------------------ the calls


def _jax_attention(q, k, v, ids):
    """The same through the function under `jax.nn.dot_product_attention`."""
    mask = None if ids is None else ids[:, None, :, None] == ids[:, None, None, :]
    return of_jax.dot_product_attention(q, k, v, None, mask, mask_type=of_jax.MaskType.CAUSAL, scale=SCALE)


def _less(config, other):
    """`config` without what `other` lacks, if that is a default of protocol buffers, or of no effect."""
    if isinstance(config, dict):
        empty = (0, "0", 0.0, False, [], "", "PRIMITIVE_TYPE_INVALID")
        return {n: _less(x, other.get(n)) for n, x in config.items() if n in other or (x not in empty and n != "seed")}
    return config


@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("dims", [(192, 128), (128, 128)], ids=["unequal dims", "equal dims"])
def test_calls_are_those_of_jax(dims, documents, monkeypatch):
    monkeypatch.setattr(of_jax, "check_cudnn_version", lambda: 91200)
    monkeypatch.setattr(of_jax, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(of_jax, "is_cuda_compute_capability_equal", lambda capability: capability == "9.0")
    # jax 0.10 also computes the gradient of a mask
    monkeypatch.setattr(of_jax, "should_export_dbias", lambda *_: False, raising=False)

    def theirs(q, k, v, ids=None):
        out, back = jax.vjp(lambda *x: _jax_attention(*x, ids), q, k, v)
        return out, back(out)

    operands = shapes(2, 512, 4, *dims)
    operands += [ids_like(operands[0])] if documents else []
    ours, want = (calls(program(function, *operands)) for function in (with_gradients, theirs))
    assert [call[0] for call in ours] == [f"__cudnn$fmha{'ScaleBias' * documents}Softmax{e}" for e in ("", "Backward")]
    for (name, config, *rest), (name_of_jax, config_of_jax, *rest_of_jax) in zip(ours, want, strict=True):
        assert (name, config) == (name_of_jax, _less(config_of_jax, config))
        assert rest == rest_of_jax


@pytest.mark.parametrize("saved", [True, False], ids=["saved", "not saved"])
def test_checkpoint_can_save_what_the_backward_pass_needs(saved):
    policy = jax.checkpoint_policies.save_only_these_names(*(["attention_out"] if saved else []))

    def loss(*qkv):
        attend = jax.checkpoint(lambda *x: attention(*x, SCALE), policy=policy)
        return jnp.sum(jnp.sin(attend(*qkv).astype(jnp.float32)))

    text = program(jax.grad(loss, (0, 1, 2)), *shapes(2, 256, 4, 192, 128))
    assert names(text) == ["Softmax"] * (1 if saved else 2) + ["SoftmaxBackward"]


def test_a_pipeline_can_split_and_weave_it():
    def stage(weights, x):
        kept = jax.checkpoint_policies.save_only_these_names("attention_out")
        attend = jax.checkpoint(lambda w, x: attention(*jnp.split(x @ w, 3, -1), SCALE), policy=kept)
        return attend(weights, x), jnp.zeros(())

    weights, x = jax.ShapeDtypeStruct((64, 192), BF16), jax.ShapeDtypeStruct((2, 256, 4, 64), BF16)
    traced = trace_stage(stage, weights, x)
    inputs = weights, traced.residuals, x, jax.ShapeDtypeStruct((), jnp.float32)
    assert names(program(traced.forward, weights, x)) == ["Softmax"]
    assert names(program(traced.backward_input, *inputs)) == ["SoftmaxBackward"]
    late = [traced.residuals[i] for i in traced.weight_residuals]
    assert names(program(traced.backward_weight, weights, late, traced.kept)) == []

    def woven(weights, x, *inputs):
        return interleave_stages(traced, weights, x, traced, *inputs)

    assert names(program(woven, weights, x, *inputs)) == ["Softmax", "SoftmaxBackward"]


@pytest.mark.parametrize("check", [True, False], ids=["checked", "unchecked"])
def test_lowers_in_a_loop_on_a_mesh(check):
    def local(ids, *qkv):
        def step(carry, _):
            out = with_gradients(*qkv, ids)
            assert all(
                jax.typeof(x).manual_axis_type.varying == ({"x"} if check else set()) for x in jax.tree.leaves(out)
            )
            return carry, out

        return jax.lax.scan(step, None, length=2)[1]

    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))
    qkv = shapes(2, 256, 4, 192, 128)
    mapped = jax.shard_map(local, mesh=mesh, in_specs=P("x"), out_specs=P(None, "x"), check_vma=check)
    assert len(calls(program(mapped, ids_like(qkv[0]), *qkv))) == 2


# ---------------------------------------------------------------------------------------------------------- for an H200


@pytest.mark.hopper
@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("v_dim", [128, 64], ids=["unequal dims", "padded"])
def test_compiles_for_h200_at_v3_size(v_dim, documents, no_cache):
    qkv = shapes(1, 4096, 128, 192, v_dim, sharding=SingleDeviceSharding(h200_devices(1)[0]))
    compiled = jax.jit(with_gradients).lower(*qkv, *([ids_like(qkv[0])] if documents else [])).compile()
    found = re.findall(r'custom_call_target="(__cudnn\$fmha\w+)"', compiled.as_text())
    bias = "ScaleBias" * documents
    assert found == [f"__cudnn$fmha{bias}Softmax", f"__cudnn$fmha{bias}SoftmaxBackward"]
    scores = 4096**2 * 2  # bytes of one head's, or of the bias
    assert compiled.memory_analysis().temp_size_in_bytes < 32 * scores  # not those of all 128 heads
