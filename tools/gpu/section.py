"""The process of one section: python -m gpu.section NAME MODULE:FUNCTION --out FOLDER."""

import argparse
import importlib
from pathlib import Path

from gpu.bench import Bench


def main() -> None:
    """Calls the function."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("function")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--torch", required=True)
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    module, name = options.function.split(":")
    bench = Bench(options.name, options.out, dry=options.dry_run, torch=options.torch)
    getattr(importlib.import_module(module), name)(bench)


if __name__ == "__main__":
    main()
