"""The notebooks as they are committed. `make notebooks` runs them."""

import ast
import json
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
NAMES = ("01_train", "02_attention", "03_routing", "04_meshes", "05_dualpipe", "06_elastic", "07_plan")
MACHINE = re.compile(r"(?<![\w.<])/\w[\w.-]*/\w|[A-Z]:\\\\|site-packages|\.venv")  # an absolute path, or a part of one
WHOLE_FOLDER = 2e6  # bytes


@pytest.fixture(scope="module")
def notebooks():
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.ipynb"))}


def code(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def source(cell):
    return "".join(cell["source"])


def shown(notebook):
    """All text that the outputs hold."""
    for cell in code(notebook):
        for output in cell["outputs"]:
            texts = {"text": output.get("text", ""), **output.get("data", {})}
            yield from ("".join(text) for kind, text in texts.items() if kind != "image/png")


def test_all_notebooks_are_there_and_small(notebooks):
    assert tuple(notebooks) == NAMES
    assert sum(path.stat().st_size for path in FOLDER.glob("*.ipynb")) < WHOLE_FOLDER


@pytest.mark.parametrize("name", NAMES)
def test_notebook_has_the_outputs_of_one_run_from_top_to_bottom(notebooks, name):
    cells = code(notebooks[name])
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    kinds = {output["output_type"] for output in outputs}
    assert "error" not in kinds
    assert [output["text"] for output in outputs if output.get("name") == "stderr"] == []
    assert any("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.parametrize("name", NAMES)
def test_notebook_says_nothing_of_the_machine_that_ran_it(notebooks, name):
    assert [found.group() for text in shown(notebooks[name]) if (found := MACHINE.search(text))] == []
    assert notebooks[name]["metadata"].keys() == {"kernelspec", "language_info"}
    assert notebooks[name]["metadata"]["kernelspec"]["name"] == "python3"


@pytest.mark.parametrize("name", NAMES)
def test_notebook_uses_the_public_surface_only(notebooks, name):
    for cell in code(notebooks[name]):
        for node in ast.walk(ast.parse(source(cell))):
            modules = [node.module] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            private = [name for name in modules if name.startswith("moejax.") and not name.startswith("moejax.ops.")]
            assert private == []


@pytest.mark.parametrize("name", NAMES)
def test_notebook_opens_with_its_title_and_ends_in_something_to_try(notebooks, name):
    cells = notebooks[name]["cells"]
    assert source(cells[0]).startswith(f"# {int(name[:2])} · ")
    assert cells[-1]["cell_type"] == "markdown" and "## Try\n" in source(cells[-1])


@pytest.mark.parametrize("name", NAMES)
def test_simulated_devices_come_before_anything_else(notebooks, name):
    cells = [source(cell) for cell in code(notebooks[name])]
    calls = [index for index, text in enumerate(cells) if "moejax.simulate(" in text]
    assert calls in ([], [0])
