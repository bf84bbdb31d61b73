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
ALL = sk.Race(delta=0, first=5, growth=1.5)


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
    assert cache.prefix_lengths.tolist() == first_differences(cache)
    assert strict_prefixes().prefix_lengths.tolist() == [3, 7]
    rng = random.Random(seed)
    apart = [[3, *(rng.randrange(250) for _ in range(1 + seed))] + [9] * 150 + [m, 5] for m in range(4)]
    cache = sk.ResponseCache.from_token_ids([apart], [[1]] * 4)
    assert cache.prefix_lengths.tolist() == first_differences(cache), "whatever is alike behind the first difference"


def rounds_of(cache: sk.ResponseCache) -> tuple[int, int]:
    """(trie tokens of all rounds of `ALL`, those among them that the round before had)."""
    lengths, order, start, tokens, again = first_differences(cache), ALL.order(cache.num_examples), 0, 0, 0
    size, seen = min(ALL.first, len(order)), set()
    while start < len(order):
        new, rows = {}, set()
        for k in range(cache.num_prompts):
            for m in order[start:size]:
                whole = (*cache.contexts[k][m], *cache.responses[k][m])
                for n in range(1, len(whole)):
                    new[whole[:n]] = new.get(whole[:n], False) or n <= lengths[k]
                rows |= {whole[:n] for n in range(len(cache.contexts[k][m]), len(whole))}
        tokens, again = tokens + len(new), again + len((seen & new.keys()) - rows)
        seen = {prefix for prefix, shared in new.items() if shared}
        start, size = size, int(np.ceil(min(len(order), size * ALL.growth)))
    return tokens, again


def race(model, cache, **options):
    """The scores of a race that scores everything, which are the plain model's."""
    scores = sk.score_prompts(model, cache, race=ALL, **options)
    assert scores.scored.all() and per_token_error(scores, plain_nll(model, cache)) < ATOL
    return scores


JOBS = {"header": job(), "no header": job(1, shared=0), "two prompts": job(2, prompts=2), "strict": strict_prefixes()}


@pytest.mark.parametrize("max_tokens", [1, 7, 40, 4096])
@pytest.mark.parametrize("name", JOBS)
def test_a_race_computes_no_prefix_twice(name, max_tokens, monkeypatch):
    if max_tokens == 1 and name != "strict":
        pytest.skip("a forward for every token takes long; the strict prefixes are the short job")
    cache, model = JOBS[name], build("llama")
    cached = race(model, cache, max_tokens=max_tokens)
    assert len(cached.race.rounds) == 5
    tokens, again = rounds_of(cache)
    assert cached.stats["trie_tokens"] == tokens - again and again > 0
    monkeypatch.setattr(score, "PrefixCache", lambda cache: None)
    plain = race(model, cache, max_tokens=max_tokens)
    assert plain.stats["trie_tokens"] == tokens and plain.race.rounds == cached.race.rounds


@pytest.mark.parametrize("family", TREE, ids=str)
def test_every_family_finds_its_prefixes(family):
    """Windows, softcaps, sinks, values of another width, layers that share keys: the prefix is what it was."""
    cache, model = job(3, prompts=3, examples=12), build(family.name)
    scores = race(model, cache, max_tokens=50)
    assert scores.stats["path"] == "tree" and scores.stats["trie_tokens"] < rounds_of(cache)[0]


def test_the_reference_reads_whole_tries():
    cache = job(4, prompts=2, examples=8)
    assert race(build("llama"), cache, impl="reference").stats["trie_tokens"] == rounds_of(cache)[0]


def test_prompts_that_left_and_come_back(monkeypatch):
    """A prompt that was dropped is not in the rounds between; scored again, its prefix is computed again."""

    def judge(state):
        state.active[2] = len(state.rounds) not in (1, 2)
        state.active[1:] &= state.size < state.num_examples

    monkeypatch.setattr(score.RaceState, "_judge", judge)
    assert race(build("llama"), job(5, prompts=3)).race.examples == [24] * 3


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.7])
def test_there_is_room_for_so_much(share, monkeypatch):
    """And what a round leaves replaces that of the round before part by part; nothing outlives the race."""
    cache, model, cached, made = job(6), build("llama"), [], []
    end, cat = PrefixCache.end, torch.cat

    def spy(self):
        added, left = list(self._added), []
        monkeypatch.setattr(torch, "cat", lambda parts: left.append(len(added[0].taken)) or cat(parts))
        count = end(self)
        monkeypatch.setattr(torch, "cat", cat)
        assert left == [call // 2 for call in range(len(left))][::-1], "what was joined is let go first"
        pairs = list(self._kept.values())
        cached.append((len(pairs[0][0]) if pairs else 0, sum(part.nbytes for pair in pairs for part in pair)))
        assert cached[-1][0] == count
        return count

    monkeypatch.setattr(PrefixCache, "end", spy)
    most = race(model, cache, max_tokens=20)
    (tokens, whole), cached[:] = max(cached), []
    assert 20 < tokens < sum(first_differences(cache)) and whole < prefix_cache.KEPT_BYTES
    room = int(share * whole)

    def with_room(cache):
        made.append(weakref.ref(one := PrefixCache(cache, room)))
        return one

    monkeypatch.setattr(score, "PrefixCache", with_room)
    scores = race(model, cache, max_tokens=20)
    gc.collect()
    assert [one() for one in made] == [None] and all(size <= room for _, size in cached)
    assert share < 0.3 or max(size for _, size in cached) > 0.9 * room
    assert most.stats["trie_tokens"] < scores.stats["trie_tokens"] <= rounds_of(cache)[0]


GIVEN_UP = "out of memory; the rest of the race keeps no prefixes from round to round"


@pytest.mark.parametrize("when", ["first pass", "second pass", "a pass with prefixes", "end of a round"])
def test_memory_comes_before_prefixes(when, monkeypatch, caplog):
    """What does not fit gives the prefixes up; the first pass is halved, later the round begins again without them."""
    cache, run, failed, passes = job(7), decoder.TreeRunner.run, [], []

    def fails(runner, step):
        passes.append(step)
        if when == "a pass with prefixes":
            return step.num_cached
        long = sum(len(one.position) > 8 for one in passes)
        return when != "end of a round" and runner.prefixes is not None and long == 1 + (when == "second pass")

    def limited(runner, step, checks):
        if not failed and fails(runner, step):
            failed.append(step)
            raise torch.OutOfMemoryError("CUDA out of memory (staged)")
        assert not (failed and step.num_cached)
        return run(runner, step, checks)

    def no_end(self):
        failed.append(self)
        raise torch.OutOfMemoryError("CUDA out of memory (staged)")

    monkeypatch.setattr(decoder.TreeRunner, "run", limited)
    if when == "end of a round":
        monkeypatch.setattr(PrefixCache, "end", no_end)
    with caplog.at_level(logging.WARNING, "sapo_kernels"):
        scores = race(build("llama"), cache, max_tokens=40)
    assert failed and caplog.messages[0] == GIVEN_UP
    assert ["halving" in line for line in caplog.messages[1:]] == [True] * (when == "first pass")
    assert scores.stats["trie_tokens"] == rounds_of(cache)[0] and scores.stats["path"] == "tree"


def test_a_race_that_leaves_the_tree_begins_again(monkeypatch):
    """A later round has a longer cell, which the tree gets wrong: what the earlier rounds had is scored again too."""
    seen, run = [], paths.Paths.run

    def wrong_when_longer(job, path, checks, plain):
        seen.append((path, len(checks), job.prefixes is not None))
        if path == "tree" and checks and len(seen) > 1:
            raise Disagreement("it differs from the plain model by 1 nats")
        return run(job, path, checks, plain)

    monkeypatch.setattr(paths.Paths, "run", wrong_when_longer)
    assert race(build("llama"), job(9)).stats["path"] == "padded"
    changed = [path for path, *_ in seen].index("padded")
    assert 1 < changed < len(seen) - 2 and seen[0][2] and not any(kept for *_, kept in seen[changed + 1 :])
    assert sum(path == "padded" for path, *_ in seen) >= changed


def test_logits_of_the_model_keep_their_bound(monkeypatch):
    """A head whose transform is not known goes through the model, in passes of so many logits."""
    passes, run = [], decoder.TreeRunner.run
    monkeypatch.setattr(head.support, "head_transform", lambda model: (2.0, None))
    monkeypatch.setattr(paths, "MODEL_LOGITS_BYTES", 4 * 300 * 13)

    def spy(runner, step, checks):
        passes.append((runner.reader.through_model, len(step.input_ids)))
        return run(runner, step, checks)

    monkeypatch.setattr(decoder.TreeRunner, "run", spy)
    race(build("llama"), job(9), max_tokens=40)
    through = [tokens for yes, tokens in passes if yes]
    assert len(through) > 10 and max(through) <= 13
