"""Where paraphrases of an instruction come from: an endpoint, a local model or a file, and the one driver `gather`."""

from .answers import Request
from .endpoint import EndpointSource
from .file import FileSource
from .local_model import LocalModelSource
from .source import Answer, Deadline, ParaphraseSource, SourceError, TooFewPrompts, gather

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
