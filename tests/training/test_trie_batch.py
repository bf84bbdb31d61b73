"""TrieBatch: what a training batch becomes, and what it refuses."""

from __future__ import annotations

import pickle
import random

import pytest
import torch

import sapo_kernels as sk
from sapo_kernels.training.trie_batch import padded_rows

GROUP = [([1, 2, 3, 4], [5, 6]), ([1, 2, 3], [7]), ([1, 2, 3, 4], [5, 8, 9]), ([2], [2, 2])]


def padded(rows, width=1):
    """A collator's batch of (context, response) rows."""
    return padded_rows(rows, multiple_of=width)


def of(rows):
    return sk.TrieBatch.pack(*zip(*rows, strict=True))


def predicted(batch) -> list[list[int]]:
    """The tokens of the loss of each sequence."""
    found = batch.trie.targets[batch.target_of]
    return [part.tolist() for part in found.split(batch.sequence_ptr.diff().tolist())]


def test_shared_tokens_are_there_once_and_targets_in_the_order_of_the_rows():
    batch = of(GROUP)
    # 1 2 3 4 5 (8) and (2 2): the last token of a response predicts nothing.
    assert batch.num_tokens == 4 + 2 + 2 and batch.longest == 7 and batch.num_sequences == 4
    assert predicted(batch) == [response for _, response in GROUP]
    assert batch.sequences() == GROUP


def test_three_ways_to_make_one():
    cache = sk.ResponseCache.from_token_ids([[c for c, _ in GROUP]], [[r for _, r in GROUP]])
    one = of(GROUP)
    for other in (sk.TrieBatch.of_cache(cache), sk.TrieBatch.of_padded(padded(GROUP, 12)),
                  pickle.loads(pickle.dumps(one)).to("cpu")):  # fmt: skip
        assert torch.equal(other.target_of, one.target_of) and other.sequences() == GROUP
        assert torch.equal(other.trie.input_ids, one.trie.input_ids)
        assert torch.equal(other.trie.subtree_end, one.trie.subtree_end)
    without_mask = padded(GROUP[:1])
    del without_mask["attention_mask"]
    assert sk.TrieBatch.of_padded(without_mask).sequences() == GROUP[:1]


def test_labels_with_holes_and_rows_without_any():
    batch = padded(GROUP)
    batch["labels"][2, 5] = -100  # of 5 8 9 the 8 is not part of the loss
    batch["labels"][1] = -100
    batch["labels"][3, 0] = 2  # nothing predicts a first token
    found = sk.TrieBatch.of_padded(batch)
    assert predicted(found) == [[5, 6], [], [5, 9], [2, 2]]
    assert found.groups(1) == [[0], [2], [3]]


@pytest.mark.parametrize("seed", range(5))
def test_groups_hold_every_sequence_once_within_the_budget(seed):
    rng = random.Random(seed)
    heads = [[rng.randrange(9) for _ in range(6)] for _ in range(3)]
    rows = [(rng.choice(heads) + [rng.randrange(9)] * rng.randrange(1, 4), [rng.randrange(9)]) for _ in range(12)]
    batch = of(rows)
    for budget in (1, 12, 20, 1000):
        groups = batch.groups(budget)
        assert sorted(c for group in groups for c in group) == list(range(12))
        for group in groups:
            part = of([rows[c] for c in group])
            assert part.num_tokens <= budget or len(group) == 1
    assert batch.groups(1000) == [sorted(range(12), key=lambda c: rows[c][0] + rows[c][1])]


@pytest.mark.parametrize(
    "change, expected",
    [
        (lambda b: b.update(position_ids=torch.zeros(4, 7)), "attention_mask and labels alone, got position_ids"),
        (lambda b: b["attention_mask"].__setitem__((0, 0), 0), "attention_mask: expected padding on the right"),
        (lambda b: b["labels"].__setitem__((0, 4), 8), "labels: expected the token's own id or -100"),
        (lambda b: b["labels"].__setitem__((1, 6), 0), "labels: expected -100 where attention_mask is 0"),
        (lambda b: b["labels"].fill_(-100), "labels: expected at least one that is not -100, got none"),
    ],
)
def test_what_it_refuses(change, expected):
    batch = padded(GROUP)
    change(batch)
    with pytest.raises(ValueError, match=expected):
        sk.TrieBatch.of_padded(batch)
