"""tools/gpu_check.py without a GPU: the driver, what is made of results, counts, and dry runs of cheap sections."""

import functools
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

sys.path.append(str(Path(__file__).parent.parent / "tools"))
from gpu import attention, ceilings, kernels, layers, parity, training
from gpu.bench import Bench, num_bytes, relative_error
from gpu.driver import Section, run_sections
from gpu.results import Result, exit_code, hardware, judged, read, table, write

from moejax.config import ONE_DEVICE, AttentionConfig
from moejax.model.moe import MoE, RouterBias
from moejax.ops.routing import update_bias
from moejax.train.state import TrainState

TOOL = Path(__file__).parent.parent / "tools" / "gpu_check.py"
SECTIONS = """
import os, signal, time

def fine(bench):
    bench.record("copy", 4.0, "bytes/s")
    bench.record("kernel", 3.0, "bytes/s", of="copy", aim=0.8)
    with bench.attempt("part", "of it"):
        raise ValueError("is broken\\nin two lines")
    bench.record("after it", 1.0)

def crash(bench):
    bench.record("before the crash", 1.0)
    raise RuntimeError("this is why")

def killed(bench):
    os.kill(os.getpid(), signal.SIGSEGV)

def late(bench):
    time.sleep(600)
"""


@pytest.fixture
def sections(tmp_path, monkeypatch):
    (tmp_path / "pretended.py").write_text(SECTIONS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return [Section(name, f"pretended:{name}", 1, 2 if name == "late" else 100) for name in ("crash", "late", "fine")]


def run(*words):
    return subprocess.run([sys.executable, TOOL, *words], capture_output=True, text=True, timeout=100)


def test_without_a_gpu_it_says_so_and_exits_3(tmp_path):
    done = run("--out", str(tmp_path / "out"))
    assert done.returncode == 3 and done.stdout == ""
    assert done.stderr.startswith("gpu_check: no Hopper GPU here, JAX has 'cpu") and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_what_goes_wrong_becomes_lines_and_the_others_run(sections, tmp_path):
    said = []
    sections = [*sections[:2], Section("killed", "pretended:killed", 1, 100), sections[2]]
    results = judged(run_sections(sections, tmp_path / "out", say=said.append))
    found = {result.label: (result.section, result.status, result.error) for result in results}
    assert found == {
        "before the crash": ("crash", "", ""),
        "crash": ("crash", "failed", "exit code 1: RuntimeError: this is why"),
        "late": ("late", "failed", "ended after its 2 s"),
        "killed": ("killed", "failed", "signal 11"),
        "copy": ("fine", "", ""),
        "kernel": ("fine", "missed", ""),
        "part of it": ("fine", "failed", "ValueError: is broken"),
        "after it": ("fine", "", ""),
    }
    assert [line.split()[0] for line in said] == ["crash", "late", "killed", "fine"]
    assert exit_code(results) == 1
    printed = table(results)
    assert "0.750" in printed and "aim 0.8" in printed and printed.endswith("0 ok, 1 missed, 0 off, 4 failed")


def test_without_time_no_section_starts_and_others_results_stay(sections, tmp_path):
    write(tmp_path / "results.jsonl", [Result(section="before", name="a"), Result(section="late", name="b")])
    results = run_sections(sections[1:], tmp_path, seconds=0)
    assert [(r.section, r.name) for r in results] == [("before", "a"), ("late", "late"), ("fine", "fine")]
    assert all("no time is left" in r.error for r in results[1:])


# ------------------------------------------------------------------------------------------------------------- results


def result(name, value, **about):
    return Result(section="s", name=name, value=value, **about)


@pytest.mark.parametrize(
    ("given", "status", "code"),
    [
        pytest.param(result("a", 2.0, aim=1.5), "ok", 0, id="aim of a value"),
        pytest.param(result("a", 2.0, aim=2.5), "missed", 0, id="missed aim"),
        pytest.param(result("a", 2.0, of="base x", aim=0.5), "ok", 0, id="share of the largest"),
        pytest.param(result("a", 1.9, of="base x", aim=0.5), "missed", 0, id="missed share"),
        pytest.param(result("a", 2.0, of="other", aim=0.5), "", 0, id="nothing to be a share of"),
        pytest.param(result("a", 2.0, of="base x", unit="FLOP/s", aim=0.5), "", 0, id="share of another unit"),
        pytest.param(result("a", 1e-3, bound=2e-3), "ok", 0, id="below the bound"),
        pytest.param(result("a", 3e-3, bound=2e-3), "off", 1, id="above the bound"),
        pytest.param(result("a", float("nan"), bound=2e-3), "off", 1, id="not a number"),
        pytest.param(result("a", None, error="broken"), "failed", 1, id="failed"),
    ],
)
def test_aims_and_bounds(given, status, code):
    bases = [result("base", value, shape="x") for value in (3.0, 4.0)]
    bases.append(result("base", 0.0, shape="x", unit="MB"))  # of a program, in a dry run
    *_, found = all_of_them = judged([*bases, given])
    assert found.status == status and exit_code(all_of_them) == code


def test_a_result_survives_its_line(tmp_path):
    first = result("a", 0.0, shape="x", of="b", note="c", met=False)
    write(tmp_path / "lines", [first])
    assert read(tmp_path / "lines") == [first]
    assert json.loads((tmp_path / "lines").read_text()) == {
        "section": "s",
        "name": "a",
        "shape": "x",
        "value": 0.0,
        "of": "b",
        "note": "c",
        "met": False,
    }


def test_hardware_has_ceilings_and_median_efficiencies():
    found = [
        Result(section="versions", name="device", note="NVIDIA H200"),
        result("device memory", 140e9),
        result("copy", 4e12),
        result("dense bf16", 7e14, shape="a"),
        result("dense bf16", 8e14, shape="b"),
        *(result("g", rate, op="grouped_forward", precision="bf16") for rate in (4e14, 6e14, 8e14)),
        result("q", 3e12, op="memory_bound"),
        result("f", 9e14, op="grouped_forward", precision="fp8"),
    ]
    assert hardware(found) == {
        "device": "NVIDIA H200",
        "memory_bytes": 140e9,
        "copy_bytes_per_second": 4e12,
        "bf16_flops": 8e14,
        "fp8_flops": None,
        "efficiency": {"grouped_forward": {"bf16": 0.75}, "memory_bound": {"bytes": 0.75}},
    }
    assert hardware(found[3:]) is None


# -------------------------------------------------------------------------------------------------------------- counts


def test_flops_of_v3():
    entries = 7168 * 1536 + 1536 * 128 * 192 + 7168 * 576 + 512 * 128 * 256 + 128 * 128 * 7168  # MLA
    entries += 7168 * 8 + 9 * 3 * 7168 * 2048  # gate, 8 experts and the shared one
    pairs = 128 * (192 + 128) * 4096 * 4097 / 2 * 2
    assert layers.stage_flops(4, 4096) == pytest.approx(4 * 3 * (2 * entries * 4096 + pairs), rel=1e-4)
    assert attention.flops(2, 4096, AttentionConfig()) == pytest.approx(2 * pairs, rel=3e-4)


def test_bytes_are_those_of_inputs_and_outputs(tmp_path):
    bench = Bench("s", tmp_path)
    x, sizes = bench.draw((300, 4096)), bench.constant(np.ones(8))
    assert num_bytes((x, sizes)) == 300 * 4096 * 2 + 8 * 4
    bench.speed("halves", lambda x, sizes: x[:, :2048] + sizes.sum().astype(x.dtype), x, sizes)
    (found,) = read(tmp_path / "results.jsonl")
    micros = float(found.note.split()[0])
    assert found.unit == "bytes/s"
    assert found.value * micros * 1e-6 == pytest.approx(300 * (4096 + 2048) * 2 + 32, rel=0.1 / micros + 1e-3)


def test_relative_error_is_of_the_worst_array():
    want = [jnp.full(4, 2.0), jnp.zeros(3), jnp.full(2, 100.0)]
    assert relative_error(want, want) == 0
    assert relative_error([want[0] + jnp.asarray([0, 0, 0, 1.0]), *want[1:]], want) == 0.25
    assert relative_error([want[0], want[1] + 1, want[2]], want) == pytest.approx(3**0.5)
    assert np.isnan(relative_error([*want[:2], want[2] * jnp.nan], want))


@pytest.mark.parametrize("skewed", [False, True], ids=["balanced", "skewed"])
@pytest.mark.parametrize("experts", [4, 8])
def test_groups_have_all_rows(experts, skewed):
    sizes = kernels.group_sizes(experts, 32768, skewed)
    assert sizes.sum() == 32768 and (sizes > 0).all()
    assert (len(set(sizes)) == 1) is not skewed
    assert not skewed or (sizes % 128 != 0).any()


# ------------------------------------------------------------------------------------------------------------ training


def test_text_can_be_learned_and_is_the_same_again():
    tokens = training.text(1000, 3, 16, 200)
    assert tokens.shape == (3, 16, 200) and tokens.dtype == np.int32 and 0 <= tokens.min() <= tokens.max() < 1000
    np.testing.assert_array_equal(tokens, training.text(1000, 3, 16, 200))
    pairs = np.stack([tokens[..., :-1].ravel(), tokens[..., 1:].ravel()], 1)
    _, counts = np.unique(pairs[pairs[:, 0] == 0], axis=0, return_counts=True)
    assert 0.4 < counts.max() / counts.sum() < 0.6  # what follows token 0


def test_forced_balance_gives_every_expert_equal_rows_and_nothing_else_changes(model_config, key):
    graph, biases, params = nnx.split(MoE(nnx.Rngs(params=key), model_config, ONE_DEVICE), RouterBias, ...)
    x_BSD = jax.random.normal(key, (2, 20, model_config.hidden_size))

    def layer(biases):
        return nnx.merge(graph, biases, params)(x_BSD)

    plain, plain_stats = jax.jit(layer)(biases)
    state = training.force_balance(TrainState(jnp.zeros(()), None, biases, None, None))
    with training.forcible_balance():
        program = jax.jit(lambda biases: layer(biases))
        (learned, stats), (forced, forced_stats) = program(biases), program(state.router_bias)
    np.testing.assert_array_equal(learned, plain)
    np.testing.assert_array_equal(stats.counts, plain_stats.counts)
    assert len(set(np.asarray(stats.counts))) > 1
    np.testing.assert_array_equal(forced_stats.counts, [10] * 8)
    assert np.isfinite(forced).all() and 0.5 < np.linalg.norm(forced) / np.linalg.norm(plain) < 2
    (bias,) = jax.tree.leaves(state.router_bias)
    assert np.isinf(update_bias(bias, stats.counts, 0.001)).all()


def test_small_moe_is_the_config_and_the_peers_has_no_mtp():
    config = training.small_moe("fp8")
    assert (config.precision, config.steps, config.model.moe.num_experts) == ("fp8", 100, 32)
    peer = training.as_peer(config).model
    assert (peer.mtp.depth, peer.moe.balance.sequence, peer.hidden_size) == (0, 0.0, 512)


@pytest.mark.skipif(find_spec("torch") is not None, reason="torch is installed")
def test_without_torch_the_peer_is_not_measured(tmp_path):
    bench = Bench("transformers", tmp_path, dry=True, torch=sys.executable)
    training.transformers(bench)
    (found,) = read(tmp_path / "results.jsonl")
    assert found.note == "not measured: torch is not installed here" and found.status == ""


# ------------------------------------------------------------------------------------------------------- for an H200

SMALL = ((4, 4096),)
CHEAP = {
    "ceilings": functools.partial(ceilings.ceilings, sizes=[(4096, 2048, 7168)]),
    "products in BF16": functools.partial(kernels.grouped_bf16, sizes=SMALL),
    "products in FP8": functools.partial(kernels.grouped_fp8, sizes=SMALL),
    "memory-bound kernels": kernels.memory_bound,
    "attention": attention.attention,
    "parity": functools.partial(parity.kernels, dims={"one tile": (128, 64)}),
}


@pytest.mark.hopper
@pytest.mark.parametrize("section", CHEAP)
def test_dry_run_compiles_for_h200(section, tmp_path, no_cache):
    CHEAP[section](Bench(section, tmp_path, dry=True))
    found = read(tmp_path / "results.jsonl")
    assert len(found) >= 4 and all(r.note.startswith("compiled") for r in found), table(found)


@pytest.mark.hopper
def test_parity_wants_a_kernel_in_the_program_alone(tmp_path, no_cache):
    bench = Bench("s", tmp_path, dry=True)
    bench.parity("no kernel", jnp.sin, jnp.sin, bench.draw((8, 128)), bound=1.0)
    *_, found = read(tmp_path / "results.jsonl")
    assert found.error == "RuntimeError: no kernel is in the program"
