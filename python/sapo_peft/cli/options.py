"""Options of `sapo train` and `sapo sequence`: dataclasses, read by transformers' HfArgumentParser, and YAML files."""

from __future__ import annotations

import argparse
import inspect
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, field, fields, make_dataclass
from typing import Any, NoReturn, get_type_hints

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
        words, seen = [], set()
        for key, value in _mapping(path).items():
            if (name := str(key).replace("-", "_")) not in known:
                raise DataError(f"{path}: expected one of the options of {self.prog} --help, got {excerpt(key)}")
            option, action = known[name]
            if action.dest in seen:
                raise DataError(f"{path}: expected each option once, got {excerpt(key)} beside another name of it")
            seen.add(action.dest)
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


def options_of(
    config: type, group: str, skip: Collection[str] = (), types: Mapping[str, Any] | None = None, **told: str
) -> type:
    """The fields of a dataclass as options, with the help of its docstring or their own; `told`: other help by name."""
    text = re.split(r"Attributes:|Args:", inspect.getdoc(config) or "")[-1].partition("Raises:")[0]
    texts = {}
    for names, words in re.findall(r"^ {4}(\w+(?:, \w+)*): (.*(?:\n {5}.*)*)", text, re.MULTILINE):
        texts.update(dict.fromkeys(names.split(", "), " ".join(words.replace("``", "").replace("%", "%%").split())))
    texts, hints, found = {**texts, **told}, {**get_type_hints(config), **(types or {})}, []
    for entry in fields(config):
        if entry.name in skip or not entry.init:
            continue
        shown = f" (default {entry.default})" if entry.default not in (None, False, MISSING) else ""
        aliases = ["--lr"] if entry.name == "learning_rate" else []
        metadata = entry.metadata or {"help": f"{texts.get(entry.name, '')}{shown}".strip(), "aliases": aliases}
        default = False if hints[entry.name] is bool and entry.default is None else entry.default
        made = {"default": default} if default is not MISSING else {"default_factory": entry.default_factory}
        found.append((entry.name, hints[entry.name], field(metadata=metadata, **made)))
    return make_dataclass(config.__name__, found, namespace={"_argument_group_name": group})


def _word(value: Any) -> str:
    return json.dumps(value) if isinstance(value, (dict, list)) else str(value)


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice, of which YAML's own takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if (key.tag, str(key.value)) in seen:
                line, column = key.start_mark.line + 1, key.start_mark.column + 1
                raise DataError(f"line {line} column {column}: expected each key once, got {excerpt(key.value)} again")
            seen.add((key.tag, str(key.value)))
        return super().construct_mapping(node, deep)


def _mapping(path: str) -> dict[str, Any]:
    """A YAML file with options by name; nothing in it is executed."""
    text = read_text(path, max_bytes=MAX_CONFIG_BYTES)
    try:
        document = yaml.load(text, _Loader)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:  # a date that there is none of, too
        raise DataError(f"{path}: expected YAML, got {excerpt(' '.join(str(error).split()), 200)}") from None
    if not isinstance(document, dict):
        raise DataError(f"{path}: expected options by name, got {excerpt(document)}")
    return document
