"""Where paraphrases of an instruction come from: an endpoint, a local model or a file, and the one driver `gather`.

Names are loaded on first use: neither torch nor the `openai` client is imported before it is needed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOMES = {
    "Answer": "source",
    "Deadline": "source",
    "EndpointSource": "endpoint",
    "FileSource": "file",
    "LocalModelSource": "local_model",
    "ParaphraseSource": "source",
    "Request": "answers",
    "SourceError": "source",
    "TooFewPrompts": "source",
    "gather": "source",
}
__all__ = [
    "Answer",
    "Deadline",
    "EndpointSource",
    "FileSource",
    "LocalModelSource",
    "ParaphraseSource",
    "Request",
    "SourceError",
    "TooFewPrompts",
    "gather",
]

if TYPE_CHECKING:
    from .answers import Request
    from .endpoint import EndpointSource
    from .file import FileSource
    from .local_model import LocalModelSource
    from .source import Answer, Deadline, ParaphraseSource, SourceError, TooFewPrompts, gather


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
