"""score_prompts beside other threads, and what it shows meanwhile."""

from __future__ import annotations

import io
import logging
import sys
import threading

import pytest
import torch

import sapo_kernels as sk
from sapo_kernels.scoring.progress import Progress
from tests.oracles import small_qwen3
from tests.scoring.ranks_child import cache_of
from tests.scoring.snapshots import assert_unchanged, inside, snapshot, stance
from tests.scoring.test_score import assert_right


def job(seed: int) -> sk.ResponseCache:
    return cache_of(seed, 3, 3, vocabulary=200)


def test_the_bar_is_quiet_unless_on_a_terminal(tiny_model, monkeypatch, capsys, caplog):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    cache = job(3)
    with caplog.at_level(logging.WARNING):
        for progress in (None, False):
            sk.score_prompts(tiny_model, cache, progress=progress)
    assert capsys.readouterr() == ("", "") and not caplog.records
    sk.score_prompts(tiny_model, cache, progress=True)
    shown = capsys.readouterr()
    assert shown.out == "" and "scoring" in shown.err and "/9" in shown.err
    for progress, visible in ((None, True), (False, False)):
        terminal = Terminal()
        monkeypatch.setattr(sys, "stderr", terminal)
        sk.score_prompts(tiny_model, cache, progress=progress)
        assert ("scoring" in terminal.getvalue()) == visible
    monkeypatch.setattr(sys, "stderr", None)  # a window without a console
    assert_right(tiny_model, cache, sk.score_prompts(tiny_model, cache))


def test_the_bar_counts_cells_and_tokens(capsys):
    for total, saved in ((40, True), (None, False)):
        with Progress(9, 100, total, True) as bar:
            bar.update(3, 10)
            bar.update(8, 30)
            assert bar.bar.n == 8 and bar.bar.total == 9
            assert "tokens/s" in bar.bar.postfix and ("saved=60%" in bar.bar.postfix) == saved


def test_a_function_is_told_each_round_from_its_beginning(tiny_model):
    told = []
    scores = sk.score_prompts(tiny_model, job(3), progress=lambda cells, tokens: told.append((cells, tokens)))
    assert told[0] == (0, 0) and told[-1] == (9, scores.stats["trie_tokens"])
    told.clear()
    scores = sk.score_prompts(tiny_model, job(3), race=sk.Race(), progress=lambda cells, tokens: told.append(cells))
    rounds = [i for i, cells in enumerate(told) if cells == 0] + [len(told)]
    assert sum(told[stop - 1] for stop in rounds[1:]) == scores.race.cells


class Paused:
    """A thread that scores and stops inside the model's forward until it is let go."""

    def __init__(self, model, cache, where):
        self.inside, self.go = threading.Event(), threading.Event()
        self.result = self.error = None
        self.impl = "padded" if where == "batch" else "auto"
        self.thread = threading.Thread(target=self._run, args=(model, cache), daemon=True)
        self.undo = inside(where, model, self._pause)

    def _pause(self):
        if threading.current_thread() is self.thread:
            self.inside.set()
            assert self.go.wait(60)

    def _run(self, model, cache):
        try:
            self.result = sk.score_prompts(model, cache, impl=self.impl)
        except BaseException as error:  # handed to the test
            self.error = error

    def __enter__(self):
        self.thread.start()
        assert self.inside.wait(60)
        return self

    def __exit__(self, *_):
        self.go.set()
        self.thread.join(60)
        self.undo()
        assert not self.thread.is_alive()


@pytest.mark.parametrize("where", ["hook", "attention"])
def test_two_threads_score_two_models(where):
    """Interleaved in the worst way: both inside at once, the first to begin ends first."""
    models, caches = [small_qwen3(seed=s) for s in (0, 1)], [job(5), job(6)]
    before = [snapshot(model) for model in models]
    with Paused(models[0], caches[0], where) as first, Paused(models[1], caches[1], where) as second:
        # The patches are undone in the reverse order.
        first.go.set()
        first.thread.join(60)
    assert stance() == "default", "torch.compile works again afterwards"
    for model, cache, was, paused in zip(models, caches, before, (first, second), strict=True):
        assert paused.error is None
        assert_right(model, cache, paused.result)
        assert_unchanged(was, model)


@pytest.mark.parametrize("where", ["attention", "batch"])
def test_a_model_that_is_being_scored_cannot_be_used(tiny_model, where):
    """By another thread: a forward or a second scoring raises instead of giving or causing a wrong number."""
    cache, ids = job(7), torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        plain = tiny_model(input_ids=ids).logits
    before = snapshot(tiny_model)
    with Paused(tiny_model, cache, where) as paused:
        with pytest.raises(RuntimeError, match="being scored by another thread"), torch.no_grad():
            tiny_model(input_ids=ids)
        with pytest.raises(RuntimeError, match="being scored"):
            sk.score_prompts(tiny_model, job(8), impl=paused.impl)
    assert paused.error is None
    assert_right(tiny_model, cache, paused.result)
    assert_unchanged(before, tiny_model)
    with torch.no_grad():
        assert torch.equal(tiny_model(input_ids=ids).logits, plain)
    assert_right(tiny_model, cache, sk.score_prompts(tiny_model, cache, impl=paused.impl))
