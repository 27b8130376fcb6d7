import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_tiny_config_learns_and_balances(tmp_path):
    """60 of the steps of `make train`, as a user runs it."""
    root = Path(__file__).parent.parent
    of_tests = ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")
    environment = {name: value for name, value in os.environ.items() if name not in of_tests}
    command = [
        sys.executable,
        "-m",
        "moejax",
        "train",
        "configs/tiny.py",
        "--steps",
        "60",
        "--out",
        str(tmp_path / "run"),
    ]
    subprocess.run(command, cwd=root, env=environment, check=True, timeout=600)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["valid_loss"] < summary["unigram_loss"] - 0.3
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    worst = [max(json.loads(line)["max_violation"]) for line in lines]
    assert worst[-1] < 0.8 * max(worst)
