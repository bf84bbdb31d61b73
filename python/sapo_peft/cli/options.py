"""Options of `sapo train` and `sapo sequence`: dataclasses, read by transformers' HfArgumentParser, and YAML files."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser

from sapo_kernels.files import DataError, excerpt, read_text

from .faults import Parser

MAX_CONFIG_BYTES = 2**20


class OptionParser(Parser, HfArgumentParser):
    """Options from dataclasses, with faults on one line; `--config` names a YAML file with the same options.

    TRL's parser has such files too, but it takes environment variables from them and checks no types.
    """

    # The file that is being read, for messages.
    _file: str | None = None

    def __init__(self, kinds: Sequence[type], **options: Any):
        super().__init__(kinds, allow_abbrev=False, formatter_class=argparse.HelpFormatter, **options)
        self.add_argument("--config", metavar="YAML", help="options from a file; those on the command line win")
        # transformers' trainer has an option of this name.
        if "--debug" not in self._option_string_actions:
            self.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def read(self, words: Sequence[str]) -> dict[str, Any]:
        """Every option by its name: from the command line, else from the file, else its default.

        Raises: `DataError` naming the file and the option; `SystemExit` after a fault on the command line or help.
        """
        found = vars(self.parse_args(list(words)))
        if found["config"]:
            self._file = found["config"]
            from_file = self._words(self._file)
            self.parse_args(from_file)
            self._file = None
            found = vars(self.parse_args([*from_file, *words]))
        return found

    def error(self, message: str) -> NoReturn:
        if self._file is not None:
            raise DataError(f"{self._file}: {message}")
        super().error(message)

    def _words(self, path: str) -> list[str]:
        """The file as words of a command line, so that both are checked by the same rules."""
        known = {
            option.lstrip("-").replace("-", "_"): (option, action)
            for action in self._actions
            for option in action.option_strings
            if option.startswith("--") and action.dest not in ("config", "help")
        }
        words = []
        for key, value in _mapping(path).items():
            if (name := str(key).replace("-", "_")) not in known:
                raise DataError(f"{path}: expected one of the options of {self.prog} --help, got {excerpt(key)}")
            option, action = known[name]
            if value is None:
                raise DataError(f"{path}: {key}: expected a value, got none; leave the option out")
            if action.nargs == 0:
                words += [option] if value is True else []
            elif isinstance(value, list) and action.nargs is None:
                raise DataError(f"{path}: {key}: expected one value, got {excerpt(value)}")
            elif isinstance(value, list):
                words += [option, *map(_word, value)]
            else:
                words.append(f"{option}={_word(value)}")
        return words


def _word(value: Any) -> str:
    return json.dumps(value) if isinstance(value, (dict, list)) else str(value)


def _mapping(path: str) -> dict[str, Any]:
    """A YAML file with options by name; nothing in it is executed."""
    try:
        document = yaml.safe_load(read_text(path, max_bytes=MAX_CONFIG_BYTES))
    except (yaml.YAMLError, RecursionError) as error:
        raise DataError(f"{path}: expected YAML, got {excerpt(' '.join(str(error).split()), 200)}") from None
    if not isinstance(document, dict):
        raise DataError(f"{path}: expected options by name, got {excerpt(document)}")
    return document
