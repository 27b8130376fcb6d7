import json

import pytest

from moejax.config import ConfigError
from moejax.plan.hardware import KINDS, known, load_hardware


@pytest.mark.parametrize("name", ["h800", "h100", "h200", "b200"])
def test_hardware_that_is_here_says_everything_and_from_where(name):
    chip = load_hardware(name)
    assert chip.name.lower() == name and set(chip.efficiency) == set(KINDS)
    words = " ".join(chip.sources)
    for place in ("memory", "bf16", "intra_node", "inter_node", "dollars_per_hour", *KINDS):
        assert place in words


def test_known_hardware_is_what_the_folder_has():
    assert known() == ["b200", "h100", "h200", "h800"]


@pytest.mark.parametrize(
    ("kind", "flops", "num_bytes", "sms", "seconds"),
    [
        ("dense_fp8", 1979e12 * 0.572, 0, 0, 1.0),
        ("dense_bf16", 989.5e12 * 0.75, 0, 0, 1.0),
        ("attention", 989.5e12 * 0.66, 0, 20, 132 / 112),
        ("memory", 0, 3.35e12 * 0.6, 20, 1.0),
    ],
    ids=["FP8", "BF16", "beside communication", "memory has no multiprocessors to lose"],
)
def test_seconds_follow_the_peaks(kind, flops, num_bytes, sms, seconds):
    assert load_hardware("h800").seconds(kind, flops, num_bytes, sms) == pytest.approx(seconds, rel=1e-12)


def test_file_of_ones_own_says_what_differs(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"like": "h100", "name": "mine", "memory": 96e9, "efficiency": {"memory": 0.8}}))
    chip, base = load_hardware(str(path)), load_hardware("h100")
    assert (chip.name, chip.memory, chip.fp8) == ("mine", 96e9, base.fp8)
    assert chip.efficiency == {**base.efficiency, "memory": 0.8}


def test_measured_file_gives_shares_of_the_data_sheet(tmp_path):
    path = tmp_path / "hardware.json"
    measured = {
        "device": "NVIDIA H200",
        "memory_bytes": 140e9,
        "copy_bytes_per_second": 4.32e12,
        "bf16_flops": 791.6e12,
        "fp8_flops": 1583.2e12,
        "efficiency": {
            "grouped_forward": {"bf16": 0.9, "fp8": 0.8},
            "grouped_dx": {"bf16": 0.7, "fp8": 0.6},
            "grouped_dw": {"bf16": 0.5},
            "attention_forward": {"bf16": 0.75},
            "memory_bound": {"bytes": 0.5},
        },
    }
    path.write_text(json.dumps(measured))
    chip, sheet = load_hardware(str(path)), load_hardware("h200")
    assert (chip.memory, chip.fp8, chip.inter_node) == (140e9, sheet.fp8, sheet.inter_node)
    want = {"dense_bf16": 0.8, "dense_fp8": 0.8, "grouped_bf16": 0.64, "grouped_fp8": 0.56, "outer_bf16": 0.4}
    want |= {"attention": 0.6, "memory": 0.45}
    assert {kind: chip.efficiency[kind] for kind in want} == pytest.approx(want, rel=1e-12)
    left = KINDS - want.keys()
    assert {kind: chip.efficiency[kind] for kind in left} == {kind: sheet.efficiency[kind] for kind in left}


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (None, "hardware='none.json': wanted one of b200, h100, h200, h800, or a JSON file"),
        ("{", "wanted JSON"),
        ("[]", "wanted an object of numbers"),
        ('{"like": "tpu"}', "hardware.like='tpu': wanted one of b200, h100, h200, h800"),
        ('{"like": "h800", "speed": 3}', "hardware.speed=3: wanted one of name, memory"),
        ('{"like": "h800", "memory": -1}', "hardware.memory=-1: wanted a number above 0"),
        ('{"like": "h800", "efficiency": {"memory": 2}}', "hardware.efficiency.memory=2: wanted a share"),
        ('{"name": "x"}', "hardware.memory=None: wanted a value, or like"),
        ('{"device": "TPU v5", "bf16_flops": 1}', "hardware.device='TPU v5': wanted a device among"),
    ],
    ids=["no file", "no JSON", "a list", "like what", "unknown field", "below 0", "above 1", "missing", "device"],
)
def test_bad_hardware_is_one_line(content, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "none.json"
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError) as error:
        load_hardware(name)
    assert line in str(error.value) and "\n" not in str(error.value)
