"""Runs the notebooks one after the other from a clean state, and ends with the first error: `make notebooks`.

    python tools/run_notebooks.py [NAME ...] [--write]

NAME is a part of a notebook's name, such as 03; without any, all run. They run in a copy, so that run folders of
earlier readings have no part in it. `--write` puts the outputs into notebooks/, with pictures in fewer colours.
"""

import argparse
import base64
import io
import shutil
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from PIL import Image

ROOT = Path(__file__).parents[1]
NEEDED = ("configs", "notebooks")
SECONDS = 900  # that a cell may take
COLOURS = 128  # of a picture


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", metavar="NAME", nargs="*")
    parser.add_argument("--write", action="store_true", help="keep the outputs")
    options = parser.parse_args()
    paths = [path for path in notebooks() if not options.names or any(name in path.stem for name in options.names)]
    if not paths:
        sys.exit(f"no notebook has a name with {' or '.join(options.names)}")
    with tempfile.TemporaryDirectory() as folder:
        for name in NEEDED:
            shutil.copytree(ROOT / name, Path(folder, name), ignore=shutil.ignore_patterns("runs", ".*"))
        for path in paths:
            began = time.perf_counter()
            try:
                notebook = execute(Path(folder, "notebooks", path.name))
            except CellExecutionError as error:
                print(f"{path.name}: {error}", file=sys.stderr)
                return 1
            print(f"{path.name}: {time.perf_counter() - began:.0f} s", flush=True)
            if options.write:
                nbformat.write(tidied(notebook), path)
    return 0


def notebooks() -> list[Path]:
    """All of them, in their order."""
    return sorted((ROOT / "notebooks").glob("*.ipynb"))


def execute(path: Path) -> nbformat.NotebookNode:
    """The notebook with what its cells show, each run once in a new kernel whose folder is the notebook's."""
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(path.parent)}}
    client = NotebookClient(notebook, timeout=SECONDS, kernel_name="python3", resources=resources, record_timing=False)
    client.extra_arguments = ["--log-level=ERROR"]  # of the kernel, which else says that it listens on loopback
    client.coalesce_streams = True  # text that comes in pieces is one output
    client.execute()
    return notebook


def tidied(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook without what another machine would have otherwise, and with small pictures."""
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if "image/png" in data:
                data["image/png"] = smaller(data["image/png"])
    return notebook


def smaller(encoded: str) -> str:
    """A PNG in base64, with at most so many colours."""
    with Image.open(io.BytesIO(base64.b64decode(encoded))) as image:
        file = io.BytesIO()
        image.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(file, "png", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


if __name__ == "__main__":
    sys.exit(main())
