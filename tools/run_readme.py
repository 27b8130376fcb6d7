"""Runs every command of README.md, in its order and in a copy of the repository, and ends with the first that fails.

    python tools/run_readme.py [--list]

A command is a line of an indented block that begins with `moejax` or `make`. Runs are cut short (`SHORT`), so that all
of it takes minutes; `make test` is left to whoever runs the tests.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
SHORT = "--steps 2 --log.valid-every 2 --log.sample-tokens 8 --log.pictures-every 2"
LEFT_OUT = ("make test",)
NOT_COPIED = ("runs", "plans", ".git", ".venv", ".*_cache")


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print them, as they are run, and run nothing")
    options = parser.parse_args()
    found = [shortened(command) for command in commands((ROOT / "README.md").read_text(encoding="utf-8"))]
    if options.list:
        print("\n".join(found))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "moejax")
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*NOT_COPIED))
        (copy / ".venv").symlink_to(sys.prefix)
        path = os.pathsep.join([str(Path(sys.prefix, "bin")), os.environ["PATH"]])
        for command in found:
            began = time.perf_counter()
            done = subprocess.run(
                command, shell=True, cwd=copy, env={**os.environ, "PATH": path}, capture_output=True, text=True
            )
            print(f"{time.perf_counter() - began:5.0f} s  {command}", flush=True)
            if done.returncode:
                print(f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}", file=sys.stderr)
                return 1
    return 0


def commands(text: str) -> list[str]:
    """The commands, without the comments behind them."""
    lines = re.findall(r"^    ((?:moejax|make) .*)$", text, re.MULTILINE)
    found = [re.sub(r"\s+#.*", "", line).strip() for line in lines]
    return [command for command in found if command not in LEFT_OUT]


def shortened(command: str) -> str:
    """The command with the fewest steps."""
    if command == "make train":
        return f'make train ARGS="{SHORT}"'
    if command.startswith("moejax train ") and "--help" not in command:
        return f"{re.sub(r' --steps [0-9]+', '', command)} {SHORT}"
    return command


if __name__ == "__main__":
    sys.exit(main())
