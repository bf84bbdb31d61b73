"""Prefixes kept over the rounds of a race: the same scores, fewer tokens, and nothing left behind."""

from __future__ import annotations

import gc
import logging
import random
import weakref

import numpy as np
import pytest
import torch

import sapo_kernels as sk
from sapo_kernels.scoring import decoder, head, paths, prefix_cache, score
from sapo_kernels.scoring.prefix_cache import PrefixCache
from sapo_kernels.scoring.verification import Disagreement
from tests.families import TREE, build, per_token_error, plain_nll
from tests.tolerances import TOLERANCES

pytest.importorskip("transformers")
ATOL = TOLERANCES["token nll"].atol
# Everything is scored, round by round.
ALL = sk.Race(delta=1e-300, relative=0.0, first=5, growth=1.5)


def job(seed=0, prompts=5, examples=24, shared=9, vocabulary=250) -> sk.ResponseCache:
    """Prompts of several lengths behind a common header, each in front of examples of several lengths."""
    rng = random.Random(seed)

    def some(n):
        return [rng.randrange(3, vocabulary) for _ in range(n)]

    header, instructions = some(shared), [some(rng.randint(2, 14)) for _ in range(prompts)]
    inputs = [some(rng.randint(1, 9)) for _ in range(examples)]
    contexts = [[header + prompt + given for given in inputs] for prompt in instructions]
    return sk.ResponseCache.from_token_ids(contexts, [some(rng.randint(1, 4)) for _ in range(examples)])


def strict_prefixes() -> sk.ResponseCache:
    """Prompt 0's contexts are what prompt 1's begin with: rows of one lie within the other's prefix."""
    short = [3, 4, 5, 6]
    contexts = [[short] * 24, [[*short, 7, 8, 9, 10 + m] for m in range(24)]]
    return sk.ResponseCache.from_token_ids(contexts, [[[30 + m] for m in range(24)], [[40, 41]] * 24])


def first_differences(cache: sk.ResponseCache) -> list[int]:
    """What `prefix_lengths` should say, one token at a time."""
    lengths = []
    for row in cache.contexts:
        n = 0
        while n < min(map(len, row)) - 1 and len({context[n] for context in row}) == 1:
            n += 1
        lengths.append(n)
    return lengths


@pytest.mark.parametrize("seed", range(6))
def test_prefix_lengths(seed):
    cache = job(seed, shared=(0, 1, 63, 64, 65, 130)[seed], vocabulary=(5, 250)[seed % 2], examples=(1, 9)[seed < 5])
    assert cache.prefix_lengths().tolist() == first_differences(cache)
    assert strict_prefixes().prefix_lengths().tolist() == [3, 7]
    rng = random.Random(seed)
    apart = [[3, *(rng.randrange(250) for _ in range(1 + seed))] + [9] * 150 + [m, 5] for m in range(4)]
    cache = sk.ResponseCache.from_token_ids([apart], [[1]] * 4)
    assert cache.prefix_lengths().tolist() == first_differences(cache), (
        "whatever is alike or apart behind the first difference"
    )


def rounds_of(cache: sk.ResponseCache, race: sk.Race) -> tuple[list[int], int]:
    """(trie tokens of each round of a race that scores everything, those among them that a round before had)."""
    lengths, order, start, tokens, again = first_differences(cache), race.order(cache.num_examples), 0, [], 0
    size, seen = min(race.first, len(order)), set()
    while start < len(order):
        new, rows = {}, set()
        for k in range(cache.num_prompts):
            for m in order[start:size]:
                whole = (*cache.contexts[k][m], *cache.responses[k][m])
                for n in range(1, len(whole)):
                    new[whole[:n]] = new.get(whole[:n], False) or n <= lengths[k]
                rows |= {whole[:n] for n in range(len(cache.contexts[k][m]), len(whole))}
        tokens.append(len(new))
        again += len((seen & new.keys()) - rows)
        seen = {prefix for prefix, shared in new.items() if shared}
        start, size = size, int(np.ceil(min(len(order), size * race.growth)))
    return tokens, again


JOBS = {"header": job(), "no header": job(1, shared=0), "two prompts": job(2, prompts=2), "strict": strict_prefixes()}


@pytest.mark.parametrize("max_tokens", [1, 7, 40, 4096])
@pytest.mark.parametrize("name", JOBS)
def test_a_race_computes_no_prefix_twice(name, max_tokens, monkeypatch):
    cache, model = JOBS[name], build("llama")
    kept = sk.score_prompts(model, cache, race=ALL, max_tokens=max_tokens)
    assert kept.scored.all() and len(kept.race.rounds) == 5
    assert per_token_error(kept, plain_nll(model, cache)) < ATOL
    tokens, again = rounds_of(cache, ALL)
    assert kept.stats["trie_tokens"] == sum(tokens) - again and again > 0
    monkeypatch.setattr(score, "PrefixCache", lambda cache: None)
    plain = sk.score_prompts(model, cache, race=ALL, max_tokens=max_tokens)
    assert plain.stats["trie_tokens"] == sum(tokens)
    assert plain.race.rounds == kept.race.rounds


@pytest.mark.parametrize("family", TREE, ids=str)
def test_every_family_finds_its_prefixes(family):
    """Windows, softcaps, sinks, values of another width, layers that share keys: the prefix is what it was."""
    cache, model = job(3, prompts=3, examples=12), build(family.name)
    scores = sk.score_prompts(model, cache, race=ALL, max_tokens=50)
    assert scores.stats["path"] == "tree" and scores.scored.all()
    assert scores.stats["trie_tokens"] < sum(rounds_of(cache, ALL)[0])
    assert per_token_error(scores, plain_nll(model, cache)) < ATOL


def test_the_reference_reads_whole_tries():
    cache, model = job(4, prompts=2, examples=8), build("llama")
    scores = sk.score_prompts(model, cache, race=ALL, impl="reference")
    assert scores.stats["trie_tokens"] == sum(rounds_of(cache, ALL)[0])


def test_prompts_that_left_and_come_back(monkeypatch):
    """A prompt that waits is not in the rounds between; when it is scored again, its prefix is computed again."""
    cache, model, full = job(5, prompts=3), build("llama"), plain_nll(build("llama"), job(5, prompts=3))
    monkeypatch.setattr(score.Contest, "_judge", lambda contest: judge(contest))

    def judge(contest):
        contest.leader, contest.tolerance = 0, 0.0
        contest.waiting[2] = len(contest.rounds) in (1, 2)

    scores = sk.score_prompts(model, cache, race=ALL)
    assert scores.scored.all() and scores.race.examples == [24] * 3
    assert per_token_error(scores, full) < ATOL


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.7])
def test_there_is_room_for_so_much(share, monkeypatch):
    cache, model, kept = job(6), build("llama"), []
    end = PrefixCache.end

    def spy(self):
        count = end(self)
        pairs = list(self._kept.values())
        kept.append((len(pairs[0][0]) if pairs else 0, sum(part.nbytes for pair in pairs for part in pair)))
        assert kept[-1][0] == count
        return count

    monkeypatch.setattr(PrefixCache, "end", spy)
    most = sk.score_prompts(model, cache, race=ALL, max_tokens=20)
    (tokens, whole), kept[:] = max(kept), []
    assert 20 < tokens < sum(first_differences(cache)) and whole < prefix_cache.KEPT_BYTES
    room = int(share * whole)
    monkeypatch.setattr(score, "PrefixCache", lambda cache: PrefixCache(cache, room))
    scores = sk.score_prompts(model, cache, race=ALL, max_tokens=20)
    assert per_token_error(scores, plain_nll(model, cache)) < ATOL
    assert all(size <= room for _, size in kept)
    assert share < 0.3 or max(size for _, size in kept) > 0.9 * room
    assert most.stats["trie_tokens"] < scores.stats["trie_tokens"] <= sum(rounds_of(cache, ALL)[0])


def test_memory_comes_before_prefixes(monkeypatch, caplog):
    """A pass of a later round that does not fit gives the prefixes up, and the round begins again without them."""
    cache, model = job(7), build("llama")
    plain, run, failed = plain_nll(model, cache), decoder.TreeRunner.run, []

    def limited(runner, step, checks):
        if step.held and not failed:
            failed.append(step)
            raise torch.OutOfMemoryError("CUDA out of memory (staged)")
        assert not (failed and step.held)
        return run(runner, step, checks)

    monkeypatch.setattr(decoder.TreeRunner, "run", limited)
    with caplog.at_level(logging.WARNING, "sapo_kernels"):
        scores = sk.score_prompts(model, cache, race=ALL, max_tokens=40)
    assert len(failed) == 1
    assert [r.getMessage() for r in caplog.records] == [
        "out of memory; the rest of the race keeps no prefixes from round to round"
    ]
    assert per_token_error(scores, plain) < ATOL
    tokens, _ = rounds_of(cache, ALL)
    assert scores.stats["trie_tokens"] == sum(tokens) and scores.stats["path"] == "tree"


@pytest.mark.parametrize("fails", [1, 2])
def test_no_memory_in_the_first_round(fails, monkeypatch, caplog):
    """Nothing is kept from then on; the first pass is halved, a later one begins its round again."""
    cache, model, passes = job(7), build("llama"), []
    run = decoder.TreeRunner.run

    def limited(runner, step, checks):
        passes.append(step)
        if runner.prefixes is not None and sum(len(step.position) > 8 for step in passes) == fails:
            passes.append(step)
            raise torch.OutOfMemoryError("CUDA out of memory (staged)")
        assert not step.held
        return run(runner, step, checks)

    monkeypatch.setattr(decoder.TreeRunner, "run", limited)
    with caplog.at_level(logging.WARNING, "sapo_kernels"):
        scores = sk.score_prompts(model, cache, race=ALL, max_tokens=40)
    said = [r.getMessage() for r in caplog.records]
    assert said[0] == "out of memory; the rest of the race keeps no prefixes from round to round"
    assert ["halving" in line for line in said[1:]] == [True] * (fails == 1)
    assert per_token_error(scores, plain_nll(model, cache)) < ATOL
    assert scores.stats["trie_tokens"] == sum(rounds_of(cache, ALL)[0])


def test_what_is_kept_is_there_twice_at_most(monkeypatch):
    """While a round's prefixes replace those of the one before, and no longer."""
    cache, model, seen = job(8, prompts=4, examples=30), build("llama"), []
    end, cat = PrefixCache.end, torch.cat

    def live(self):
        parts = [t for one in self._added for d in (one.taken, one.kept) for pair in d.values() for t in pair]
        parts += [t for pair in self._kept.values() for t in pair]
        return sum(storage.nbytes() for storage in {t.data_ptr(): t.untyped_storage() for t in parts}.values())

    def spy(self):
        peak = [live(self)]

        def watched(parts):
            made = cat(parts)
            peak.append(live(self) + made.nbytes)
            return made

        monkeypatch.setattr(torch, "cat", watched)
        count = end(self)
        monkeypatch.setattr(torch, "cat", cat)
        seen.append((max(peak), live(self)))
        assert not self._added
        return count

    monkeypatch.setattr(PrefixCache, "end", spy)
    sk.score_prompts(model, cache, race=ALL, max_tokens=40)
    whole = max(after for _, after in seen)
    assert len(seen) > 3 and whole > 0
    assert all(peak <= 2.05 * whole for peak, _ in seen[1:]), (seen, whole)


def test_a_race_that_leaves_the_tree_begins_again(monkeypatch):
    """A later round has a longer cell, which the tree gets wrong: what the earlier rounds had is scored again too."""
    cache, model, seen = job(9), build("llama"), []
    run = paths.Paths.run

    def wrong_when_longer(job, path, checks, plain):
        seen.append((path, len(checks), job.prefixes is not None))
        if path == "tree" and checks and len(seen) > 1:
            raise Disagreement("it differs from the plain model by 1 nats")
        return run(job, path, checks, plain)

    monkeypatch.setattr(paths.Paths, "run", wrong_when_longer)
    scores = sk.score_prompts(model, cache, race=ALL)
    assert scores.stats["path"] == "padded" and scores.scored.all()
    changed = [path for path, *_ in seen].index("padded")
    assert 1 < changed < len(seen) - 2 and seen[0][2] and not any(kept for *_, kept in seen[changed + 1 :])
    assert sum(path == "padded" for path, *_ in seen) >= changed
    assert per_token_error(scores, plain_nll(model, cache)) < ATOL


def test_the_bar_counts_what_is_computed(monkeypatch):
    shown = []

    class Bar(paths.Progress):
        def __init__(self, cells, dense, total, show):
            super().__init__(cells, dense, total, False)
            shown.append([total, 0])

        def update(self, cells, done):
            shown[-1][1] = done

    monkeypatch.setattr(paths, "Progress", Bar)
    scores = sk.score_prompts(build("llama"), job(), race=ALL, max_tokens=40)
    assert [total for total, _ in shown] == [done for _, done in shown]
    assert sum(total for total, _ in shown) == scores.stats["trie_tokens"]


def test_no_memory_at_the_end_of_a_round_costs_the_prefixes_only(monkeypatch):
    cache, model = job(7), build("llama")

    def fail(self):
        raise torch.OutOfMemoryError("CUDA out of memory (staged)")

    monkeypatch.setattr(PrefixCache, "end", fail)
    scores = sk.score_prompts(model, cache, race=ALL, max_tokens=40)
    assert per_token_error(scores, plain_nll(model, cache)) < ATOL
    assert scores.stats["trie_tokens"] == sum(rounds_of(cache, ALL)[0])


def test_a_pass_that_does_not_fit_either_is_halved(monkeypatch, caplog):
    cache, model = job(7), build("llama")
    run = decoder.TreeRunner.run

    def limited(runner, step, checks):
        if len(step.position) > 45:
            raise torch.OutOfMemoryError("CUDA out of memory (staged)")
        return run(runner, step, checks)

    monkeypatch.setattr(decoder.TreeRunner, "run", limited)
    with caplog.at_level(logging.WARNING, "sapo_kernels"):
        scores = sk.score_prompts(model, cache, race=ALL, max_tokens=60)
    assert "halving" in caplog.text
    assert per_token_error(scores, plain_nll(build("llama"), cache)) < ATOL


def test_nothing_is_left_behind(monkeypatch):
    cache, model, made = job(8), build("llama"), []

    def make(cache):
        made.append(PrefixCache(cache))
        return made[-1]

    monkeypatch.setattr(score, "PrefixCache", make)
    sk.score_prompts(model, cache, race=ALL)
    (kept,) = map(weakref.ref, made)
    made.clear()
    gc.collect()
    assert kept() is None


def test_logits_of_the_model_keep_their_bound(monkeypatch):
    """A head whose transform is not known goes through the model, in passes of so many logits."""
    cache, model, passes = job(9), build("llama"), []
    monkeypatch.setattr(head.support, "head_transform", lambda model: (2.0, None))
    monkeypatch.setattr(paths, "MODEL_LOGITS_BYTES", 4 * 300 * 13)
    run = decoder.TreeRunner.run

    def spy(runner, step, checks):
        passes.append((runner.reader.through_model, len(step.input_ids)))
        return run(runner, step, checks)

    monkeypatch.setattr(decoder.TreeRunner, "run", spy)
    scores = sk.score_prompts(model, cache, race=ALL, max_tokens=40)
    assert per_token_error(scores, plain_nll(model, cache)) < ATOL
    through = [tokens for yes, tokens in passes if yes]
    assert len(through) > 10 and max(through) <= 13
