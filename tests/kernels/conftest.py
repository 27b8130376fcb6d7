"""Kernels without a GPU: their bodies run in Triton's interpreter, and they are compiled ahead of time.

    TRITON_INTERPRET=1 pytest -m interpreter
    pytest -m hopper

Both take the extra `hopper`. Without it tests that use Triton are not collected.
"""

import os
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

if not (find_spec("triton") and find_spec("jax_triton")):
    uses_triton = re.compile("^from (ahead|interpret) import ", re.MULTILINE)
    tests = Path(__file__).parent.glob("test_*.py")
    collect_ignore_glob = [path.name for path in tests if uses_triton.search(path.read_text(encoding="utf-8"))]


@pytest.fixture(autouse=True)
def right_process(request):
    """Triton makes a kernel for the interpreter, or for a GPU, when its module is imported."""
    interpreting = os.environ.get("TRITON_INTERPRET") == "1"
    if request.node.get_closest_marker("interpreter") and not interpreting:
        pytest.fail("the interpreter has a process of its own: TRITON_INTERPRET=1 pytest -m interpreter")
    if request.node.get_closest_marker("hopper") and interpreting:
        pytest.fail("kernels are not compiled where the interpreter runs them: unset TRITON_INTERPRET")
