"""Attention through cuDNN: what is around its calls on a CPU, the calls themselves, and programs for an H200."""

import functools
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
from moejax.ops.attention import attention as plain
from moejax.plan.hopper import h200_devices

SCALE = 0.3
BF16 = jnp.bfloat16


def shapes(batch, length, heads, qk, v, dtype=BF16, **how):
    """q, k and v that need not exist."""
    return [jax.ShapeDtypeStruct((batch, length, heads, dim), dtype, **how) for dim in (qk, qk, v)]


def ids_like(q):
    return jax.ShapeDtypeStruct(q.shape[:2], jnp.int32, sharding=q.sharding)


def with_gradients(q, k, v, ids=None):
    out, back = jax.vjp(lambda *x: kernel.attention(*x, SCALE, ids), q, k, v)
    return out, back(out)


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
    if not wanted:
        with pytest.raises(ValueError, match="cuDNN does not take q"):
            jax.eval_shape(with_gradients, q, k, v, ids)


@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("length", [12, 37], ids=["even", "odd"])
def test_padding_and_bias_change_nothing(length, documents, monkeypatch):
    """With JAX's own implementation for any platform in place of cuDNN's calls."""

    def xla(q, k, v, bias, scale):
        return jax.nn.dot_product_attention(q, k, v, bias, scale=scale, is_causal=True, implementation="xla")

    monkeypatch.setattr(kernel, "_attention", xla)
    rng = np.random.default_rng(0)
    q, k, v, change = (jnp.array(rng.normal(size=(2, length, 3, dim)), BF16) for dim in (24, 24, 16, 16))
    ids = np.stack([np.cumsum(np.isin(np.arange(length), [1, 4, 5, length // 2])), np.zeros(length)]).astype(np.int32)
    ids = jnp.array(ids) if documents else None

    @functools.partial(jax.jit, static_argnums=0)
    def gradients(function, *qkv):
        out, back = jax.vjp(lambda *x: function(*x, SCALE, ids), *qkv)
        return out, *back(change.astype(out.dtype))

    got = gradients(kernel.attention, q, k, v)
    want = gradients(plain, *(x.astype(jnp.float32) for x in (q, k, v)))
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        assert a.dtype == BF16
        atol = 4 * 2.0**-8 * np.abs(b).max()  # bfloat16: probabilities, their gradients, the result, and sums of them
        np.testing.assert_allclose(a.astype(np.float32), b, atol=atol, rtol=0, err_msg=name)


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
        attend = jax.checkpoint(lambda *x: kernel.attention(*x, SCALE), policy=policy)
        return jnp.sum(jnp.sin(attend(*qkv).astype(jnp.float32)))

    names = [call[0] for call in calls(program(jax.grad(loss, (0, 1, 2)), *shapes(2, 256, 4, 192, 128)))]
    assert sorted(names) == ["__cudnn$fmhaSoftmax"] * (1 if saved else 2) + ["__cudnn$fmhaSoftmaxBackward"]


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
