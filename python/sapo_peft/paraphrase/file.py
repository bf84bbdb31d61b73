"""Paraphrases that lie in a file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from ..data.prompt_pool import PromptPool, file_source
from .answers import Request
from .source import Answer, Deadline


class FileSource:
    """The prompts in what `PromptPool.read` reads: a saved pool, ``.txt``, ``.json``, a folder.

    All of them count as paraphrases, also the first of a plain list; one equal to the original that is asked for
    is left out. The file is read when this is made.

    Raises: `DataError` naming the file and the item.
    """

    finite = True

    def __init__(self, path: str | os.PathLike, task: str | None = None):
        pool, path = _texts(Path(path), task), Path(path)
        self.name = file_source(path)
        self._prompts = pool

    def paraphrase(self, request: Request, deadline: Deadline) -> Iterator[Answer]:
        for text, source in self._prompts:
            if text != request.original:
                yield Answer((text,), self.name if source in ("original", "given") else source)


def _texts(path: Path, task: str | None) -> list[tuple[str, str]]:
    """(prompt, source) pairs. The rules for prompts are those of the pool they go to, so lists are read as they are."""
    from sapo_kernels.files import read_json

    from ..data.prompt_files import read_prompt_file
    from ..data.prompt_pool import MAX_POOL_BYTES

    if path.suffix.lower() == ".json" and path.is_file():
        document = read_json(path, max_bytes=MAX_POOL_BYTES)
        if isinstance(document, dict) and isinstance(document.get("schema"), str):
            pool = PromptPool.read(path, task)
            return list(zip(pool.prompts, pool.provenance, strict=True))
    return [(text, "original") for text in read_prompt_file(path, task).texts]
