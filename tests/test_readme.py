"""The commands that README.md shows; `.ci/run` runs them."""

import sys
from pathlib import Path

import pytest

from moejax import cli

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tools"))
from run_readme import commands, shortened

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_command_of_the_program_is_shown():
    shown = {command.split()[1] for command in commands(README) if command.startswith("moejax ")}
    known = {line.split()[1] for line in cli.__doc__.splitlines() if line.startswith("    moejax ")}
    assert known - {"COMMAND"} == shown


def test_comments_and_other_lines_are_no_commands():
    text = (
        "moejax in a sentence\n\n    moejax show a.py    # a comment\n    moejax: an answer\n    make test     # all\n"
    )
    assert commands(text) == ["moejax show a.py"]


@pytest.mark.parametrize("command", [c for c in commands(README) if c.startswith("moejax train ")])
def test_training_in_the_readme_is_cut_short(command):
    assert "--help" in command or "--steps 2" in shortened(command)
