"""Paraphrases from a file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from ..data.prompt_files import read_prompt_file
from ..data.prompt_pool import PromptPool, file_source, is_pool_file
from .answers import Request
from .source import Answer, Deadline


class FileSource:
    """The prompts in what `PromptPool.read` reads: a saved pool, ``.txt``, ``.json``, a folder.

    All of them count as paraphrases, also the first of a plain list; one equal to the original that is asked for
    is left out. The file is read when this is made; the pool that they go to checks them.

    Raises: `DataError` naming the file and the item.
    """

    finite = True

    def __init__(self, path: str | os.PathLike, task: str | None = None):
        self.name = file_source(Path(path))
        if is_pool_file(path):
            pool = PromptPool.read(path, task)
            self._prompts = list(zip(pool.prompts, pool.provenance, strict=True))
        else:
            self._prompts = [(text, "original") for text in read_prompt_file(Path(path), task).texts]

    def paraphrase(self, request: Request, deadline: Deadline) -> Iterator[Answer]:
        """All that the file holds but the original, an answer each."""
        for text, source in self._prompts:
            if text != request.original:
                yield Answer((text,), self.name if source in ("original", "given") else source)
