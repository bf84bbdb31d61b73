"""Documents read from disk as pydantic models: what does not fit is one message with file, place, expected and got."""

from __future__ import annotations

import json
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from sapo_kernels.files import DataError, excerpt

Model = TypeVar("Model", bound=BaseModel)


def validated(kind: type[Model], document: Any, place: str) -> Model:
    """`document`, as `sapo_kernels.files.read_json` gives it, as a `kind`.

    Raises: `DataError` that begins with `place` and names the first key or item that does not fit.
    """
    try:
        # As JSON, for in strict mode a Python list is no tuple.
        return kind.model_validate_json(json.dumps(document))
    except ValidationError as error:
        raise DataError(f"{place}: {first_fault(error)}") from None


def first_fault(error: ValidationError) -> str:
    """The first thing that pydantic found, as "'key' 3: expected X, got Y"."""
    found = error.errors(include_url=False)[0]
    path, kind = list(found["loc"]), found["type"]
    if kind in ("missing", "extra_forbidden", "unexpected_keyword_argument"):
        key = excerpt(path.pop())
        text = f"expected the key {key}, got none" if kind == "missing" else f"expected no key {key}, got one"
    elif kind in ("too_short", "too_long"):
        least, most = found["ctx"].get("min_length"), found["ctx"].get("max_length")
        bound = f"at least {least}" if kind == "too_short" else f"at most {most}"
        text = f"expected {bound} entries, got {found['ctx']['actual_length']}"
    elif kind == "value_error":
        text = str(found["ctx"]["error"])
    else:
        text = f"{found['msg'].replace('Input should be', 'expected', 1)}, got {excerpt(found['input'])}"
    where = " ".join(excerpt(part) if isinstance(part, str) else str(part) for part in path)
    return f"{where}: {text}" if where else text
