import subprocess
import sys
import types

import pytest

from moejax.launch.host_memory import runs_on_cpu

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


def test_jax_with_no_plugin_runs_on_cpu(monkeypatch):
    def plugins(group):
        return found if group == "jax_plugins" else ()

    found = ()
    monkeypatch.setattr("importlib.metadata.entry_points", plugins)
    for asked, there, expected in (
        ("", (), True),
        ("cpu", ("cuda",), True),
        ("cuda,cpu", ("cuda",), False),
        ("", ("cuda",), False),
    ):
        found = there
        monkeypatch.setattr("jax.config", types.SimpleNamespace(jax_platforms=asked))
        assert runs_on_cpu() is expected, (asked, there)
