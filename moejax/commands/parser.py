"""The parser of a command's words."""

import argparse
from typing import NoReturn

from moejax.config import ConfigError


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are ConfigErrors, and whose help shows the defaults."""

    def __init__(self, command: str, description: str):
        form = argparse.ArgumentDefaultsHelpFormatter
        super().__init__(f"moejax {command}", description=description, formatter_class=form, allow_abbrev=False)
        self.command = command

    def error(self, message: str) -> NoReturn:
        """One line that says where help is."""
        raise ConfigError(self.command, message, f"what {self.prog} --help says")
