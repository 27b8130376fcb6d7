"""The comparisons that tools/gpu_check.py makes on a GPU, made in the interpreter: inputs, references and bounds."""

import sys
from pathlib import Path

import numpy as np
import pytest
from interpret import call

sys.path.append(str(Path(__file__).parents[2] / "tools"))
from gpu import bench, parity
from gpu.results import judged, read, table


class Interpreted(bench.Bench):
    """In which kernels are interpreted, and references compiled for the CPU."""

    def compile(self, name, function, *arrays, shape=""):
        if name.endswith("reference"):
            return super().compile(name, function, *arrays, shape=shape)
        return Interpretation(function)


class Interpretation:
    """As much of a compiled program as is asked for."""

    out_info = ()

    def __init__(self, function):
        self.function = function

    def __call__(self, *arrays):
        return call(self.function, *arrays)


@pytest.mark.interpreter
def test_every_kernel_is_within_its_bound(tmp_path, monkeypatch):
    groups = (130, 0, 7)
    for name, value in (("GROUPS", groups), ("TOTAL", sum(groups)), ("ROWS", 150)):
        monkeypatch.setattr(parity, name, value)
    monkeypatch.setattr(bench, "has_kernel", lambda program: isinstance(program, Interpretation))
    parity.kernels(Interpreted("parity", tmp_path), {"parts of tiles": (72, 40)})
    found = judged(read(tmp_path / "results.jsonl"))
    assert len(found) >= 20 and all(r.status == "ok" for r in found), table(found)
    assert np.mean([r.value for r in found]) > 0
