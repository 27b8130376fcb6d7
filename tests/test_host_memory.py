import os
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import numpy as np
from moejax.launch.host_memory import keep_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

if sys.argv[1] == "keep":
    keep_freed_memory()
for _ in range(2):  # the first meets new memory
    before = faults()
    for _ in range(8):
        array = np.ones(2**26, np.uint8)  # as malloc comes, more than it ever keeps
        del array
print(faults() - before)
"""


def page_faults(how):
    command = [sys.executable, "-c", PROGRAM, how]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="it is glibc that gives memory back")
def test_memory_that_was_freed_is_met_again_without_page_faults():
    assert 10 * page_faults("keep") < page_faults("as it comes")


STARTS = """
import sys
import jax
from moejax.launch.host_memory import will_run_on_cpu

if len(sys.argv) > 1:
    jax.config.update("jax_platforms", sys.argv[1])
before = will_run_on_cpu()
jax.devices("cpu")
print(before, will_run_on_cpu())
"""


@pytest.mark.parametrize(
    ("asked", "plugin", "expected"),
    [((), False, True), ((), True, False), (("cpu",), True, True), (("cuda,cpu",), False, False)],
)
def test_jax_will_run_on_cpu_until_it_has_started(asked, plugin, expected, tmp_path):
    """A plugin is a package that says so in its metadata."""
    if plugin:
        package = tmp_path / "plugin-1.dist-info"
        package.mkdir()
        (package / "METADATA").write_text("Name: plugin\nVersion: 1\n")
        (package / "entry_points.txt").write_text("[jax_plugins]\nnone = no_such_module\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "JAX_PLATFORMS": ""}
    command = [sys.executable, "-c", STARTS, *asked]
    said = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert said.stdout.split() == [str(expected), "False"], said.stderr
