"""The API pages, made of the public docstrings.

python -m tools.api_docs --write          # docs/api.md: every public name and its first sentence
python -m tools.api_docs --check          # is it up to date, and does every public name say what it needs?
python -m tools.api_docs --html DIR       # the whole docstrings as HTML, by pdoc (the extra `docs`)
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sapo_kernels.files import atomic_write

MODULES = ("sapo_kernels", "sapo_peft", "sapo_peft.sequence", "sapo_peft.paraphrase", "sapo_peft.report")
PAGE = Path(__file__).resolve().parents[1] / "docs" / "api.md"
HEAD = """\
# API

Every public name and the first sentence of its docstring, which has shapes, dtypes, units and errors in full:
`help(name)`, or `make docs`, which makes HTML of them in `build/api`. This page is made by
`python -m tools.api_docs --write`.
"""


def public(modules: tuple[str, ...] = MODULES) -> Iterator[tuple[str, str, Any]]:
    """(module, name, object) of everything in the modules' ``__all__``."""
    for module in map(importlib.import_module, modules):
        for name in module.__all__:
            yield module.__name__, name, getattr(module, name)


def _parts(name: str, thing: Any) -> Iterator[tuple[str, Any]]:
    """The object, and the public functions and properties that a class adds to those it is made from."""
    yield name, thing
    inherited = {attribute for base in thing.__mro__[1:] for attribute in vars(base)} if inspect.isclass(thing) else ()
    for attribute, value in vars(thing).items() if inspect.isclass(thing) else ():
        if attribute in inherited:
            continue
        function = getattr(value, "fget", None) or getattr(value, "func", None) or getattr(value, "__func__", value)
        if not attribute.startswith("_") and inspect.isfunction(function):
            yield f"{name}.{attribute}", function


def faults(name: str, thing: Any) -> list[str]:
    """What the docstrings of a public name lack: themselves, a parameter or field, the errors that are raised."""
    found = []
    for part, value in _parts(name, thing):
        if not (inspect.isclass(value) or inspect.isroutine(value)):
            continue  # a constant
        text = value.__doc__ or ""
        if not text.strip():
            found.append(f"{part}: expected a docstring, got none")
            continue
        names = []
        if value is thing and inspect.isroutine(value):
            names = [name for name in inspect.signature(value).parameters if name not in ("self", "cls")]
            if re.search(r"^\s+raise \w", inspect.getsource(value), re.MULTILINE) and "Raises" not in text:
                found.append(f"{part}: expected what it raises, got nothing of it")
        elif dataclasses.is_dataclass(value):
            names = [field.name for field in dataclasses.fields(value) if field.init and not field.name.startswith("_")]
        missing = [name for name in names if not re.search(rf"\b{name}\b", text)]
        found += [f"{part}: expected a word on {name}, got none" for name in missing]
    return found


def page() -> str:
    """The text of docs/api.md."""
    lines, last = [HEAD.rstrip()], ""
    for module, name, thing in public():
        if module != last:
            lines += ["", f"## {module}", "", "| name | what it is |", "|---|---|"]
            last = module
        documented = inspect.isclass(thing) or inspect.isroutine(thing)
        text = inspect.getdoc(thing).partition("\n\n")[0] if documented else f"`{thing!r}`"
        first = " ".join(text.split()).replace("|", "\\|")
        lines.append(f"| `{name}{'()' if inspect.isroutine(thing) else ''}` | {first} |")
    return "\n".join(lines) + "\n"


def write_html(folder: Path) -> None:
    """One page a module, its public names only."""
    import pdoc

    for module, name, thing in public():
        # Names that are loaded on first use: pdoc looks into the module's dictionary.
        setattr(sys.modules[module], name, thing)
    pdoc.render.configure(docformat="google", show_source=False)
    inner = "|".join(module.partition(".")[2] for module in MODULES if "." in module)
    pdoc.pdoc(*MODULES, r"!sapo_kernels\..*", rf"!sapo_peft\.(?!({inner})$).*", output_directory=folder)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--write", action="store_true")
    action.add_argument("--check", action="store_true")
    action.add_argument("--html", type=Path)
    options = parser.parse_args(argv)
    if options.html:
        write_html(options.html)
        return 0
    if options.write:
        atomic_write(PAGE, page())
        return 0
    found = [fault for _, name, thing in public() for fault in faults(name, thing)]
    if not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page():
        found.append(f"docs/{PAGE.name}: expected what the docstrings say (python -m tools.api_docs --write)")
    print("\n".join(found) or "every public name says what it needs")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
