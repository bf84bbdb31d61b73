"""TokenTrie and its passes against a sorted set of prefixes."""

import numpy as np
import pytest
import torch

from sapo_kernels import plan_trie
from tests.oracles import PrefixOracle, flatten, random_cells

# (new tokens in a pass, longest block)
CUTS = ((1, 64), (7, 3), (64, 1), (None, 64))

ADVERSARIAL = {
    "one cell": [([5], [6])],
    "one token contexts": [([c], [c + 1, 9]) for c in range(6)],
    "all equal": [([1, 2, 3], [4, 5])] * 7,
    "all distinct": [([10 * c, 10 * c + 1], [10 * c + 2]) for c in range(9)],
    "one a prefix of another": [
        ([1, 2, 3], [4, 5, 6]),
        ([1, 2], [3, 4]),
        ([1], [2]),
        ([1, 2, 3, 4, 5, 6], [7, 8]),
    ],
    "one equal, other split": [([1, 2], [3, 4]), ([1], [2, 3, 4]), ([1, 2, 3], [4])],
    "M=1": random_cells(2, prompts=8, examples=1),
    "same context, other responses": [([1, 2, 3], [c, c + 1, 4]) for c in range(6)],
    "a comb": [([1] * n + [2], [3] * n) for n in range(1, 12)],
    "ids of 2**40": [([2**40, 5, 2**33 + c % 2], [2**40 - c, 2**32 - 1]) for c in range(5)],
    "bytes that mislead": [([256, 1], [2]), ([1, 256], [2]), ([0, 0], [256]), ([255], [256, 0]), ([0], [0])],
}
RANDOM = {
    f"random {seed}": random_cells(seed, prompts=1 + seed % 5, examples=1 + seed % 7, vocabulary=2 + 3 * (seed % 4))
    for seed in range(4)
}
JOBS = {**ADVERSARIAL, **RANDOM}


@pytest.fixture(params=JOBS, scope="module")
def job(request):
    """(cells, oracle, trie) of each named job."""
    cells = JOBS[request.param]
    return cells, PrefixOracle(cells), plan_trie(*flatten(cells))


def prefixes_of(trie) -> list[tuple[int, ...]]:
    """Each token's prefix, read from depths in depth-first order alone."""
    stack, result = [], []
    for token, depth in zip(trie.tokens.tolist(), trie.depth.tolist(), strict=True):
        assert 0 <= depth <= len(stack)
        stack = [*stack[:depth], token]
        result.append(tuple(stack))
    return result


def test_tokens_are_the_distinct_prefixes_in_order(job):
    _, oracle, trie = job
    assert prefixes_of(trie) == oracle.prefixes
    assert len(trie) == len(oracle.prefixes)
    assert trie.dense_tokens == oracle.dense_tokens


def test_subtrees_and_paths(job):
    _, oracle, trie = job
    assert trie.subtree_end.tolist() == [oracle.subtree_end(i) for i in range(len(trie))]
    for i in range(len(trie)):
        spans = trie.path_spans(i)
        assert [t for first, stop in spans for t in range(first, stop)] == oracle.path(i)[:-1]
        assert all(a[1] < b[0] for a, b in zip(spans, spans[1:], strict=False)), "adjacent spans are merged"
    lengths = trie.depth - np.arange(len(trie)) % 3
    expected = [oracle.path(i)[: max(length, 0)] for i, length in enumerate(lengths.tolist())]
    assert trie.paths(np.arange(len(trie)), lengths).tolist() == sum(expected, [])


def test_nodes_are_runs_without_a_branch(job):
    _, oracle, trie = job
    assert trie.node_start.tolist() == [0, *trie.node_stop[:-1].tolist()]
    assert int(trie.node_stop[-1]) == len(trie)
    children = np.bincount([oracle.path(i)[-2] for i in range(len(trie)) if trie.depth[i]], minlength=len(trie))
    for n, (first, stop) in enumerate(zip(trie.node_start.tolist(), trie.node_stop.tolist(), strict=True)):
        assert trie.depth[first:stop].tolist() == list(range(trie.depth[first], trie.depth[first] + stop - first))
        assert (children[first : stop - 1] == 1).all()
        above = oracle.path(first)[:-1]
        assert trie.node_parent[n] == (np.searchsorted(trie.node_stop, above[-1], side="right") if above else -1)
        assert trie.node_end[n] == oracle.subtree_end(first)
        assert trie.node_depth[n] == trie.depth[first]


def test_rows_and_distinct_targets(job):
    _, oracle, trie = job
    assert trie.row_token.tolist() == sorted(oracle.predicted)
    for r, token in enumerate(trie.row_token.tolist()):
        owned = trie.targets[trie.target_ptr[r] : trie.target_ptr[r + 1]]
        assert owned.tolist() == sorted(oracle.predicted[token])
    assert trie.target_ptr[-1] == len(trie.targets)


def test_each_cell_finds_its_targets_in_response_order(job):
    cells, oracle, trie = job
    assert trie.leaf.tolist() == oracle.leaf
    row_of = np.repeat(trie.row_token, np.diff(trie.target_ptr))
    for c, (context, response) in enumerate(cells):
        mine = trie.cell_target[trie.cell_ptr[c] : trie.cell_ptr[c + 1]]
        assert trie.targets[mine].tolist() == response
        rows = [oracle.index[tuple(context + response[:j])] for j in range(len(response))]
        assert row_of[mine].tolist() == rows
    assert trie.cell_ptr[-1] == len(trie.cell_target)


def check_blocks(step, seen: np.ndarray, block_tokens: int, ascending: bool = True) -> None:
    """Blocks cover the queries; the spans of each are exactly the keys outside it that its queries see.

    ascending: spans stand in the order of the keys; else in that of the path only.
    """
    starts, pointers = step.block_start.tolist(), step.span_ptr.tolist()
    assert starts[0] == step.num_past and starts[-1] == len(step.position)
    assert len(pointers) == len(starts) and pointers[0] == 0 and pointers[-1] == len(step.span)
    for b, (first, stop) in enumerate(zip(starts, starts[1:], strict=False)):
        assert 1 <= stop - first <= block_tokens
        spans = step.span[pointers[b] : pointers[b + 1]].tolist()
        positions = [p for i, j in spans for p in step.position[i:j].tolist()]
        assert positions == list(range(len(positions))), "a path from the root"
        edges = [0, *(edge for span in (spans if ascending else sorted(spans)) for edge in span), first]
        assert edges == sorted(edges) and all(i < j for i, j in spans), "ascending, apart, before the block"
        outside = np.zeros(first, dtype=bool)
        for i, j in spans:
            outside[i:j] = True
        assert (seen[first:stop, :first] == outside).all()


@pytest.mark.parametrize("share", [0.0, 0.4], ids=lambda share: f"{share:.0%} cached")
@pytest.mark.parametrize("budget, block_tokens", CUTS)
def test_passes(job, budget, block_tokens, share):
    """Also of tries of which the caller has keys and values of some tokens, wherever these stand."""
    _, oracle, trie = job
    ancestors = np.zeros((len(trie), len(trie)), dtype=bool)
    for i in range(len(trie)):
        ancestors[i, oracle.path(i)] = True
    leaves = np.asarray(oracle.leaf)
    cached = np.random.default_rng(len(trie)).random(len(trie)) < share
    cached[trie.row_token] = False
    at, targets, rows, past_tokens = 0, 0, [], []
    for step in trie.passes(budget, block_tokens, cached if share else None):
        assert step.start == at < step.stop <= len(trie)
        inside = np.arange(step.start, step.stop)
        mine, new = inside[cached[inside]].tolist(), inside[~cached[inside]].tolist()
        assert new and (budget is None or len(new) <= budget)
        assert step.last or len(new) >= max(1, 3 * budget // 4), "not much less full than it may be"
        assert step.block_tokens == block_tokens
        at = step.stop
        # What the pass before handed over is the path to the first token, root first.
        assert past_tokens == oracle.path(step.start)[:-1]
        assert len(past_tokens) == trie.depth[step.start]
        assert (step.num_past, step.num_cached) == (len(past_tokens) + len(mine), len(mine))
        keys = [*past_tokens, *mine, *new]
        assert step.input_ids.tolist() == trie.tokens[new].tolist()
        assert step.position.tolist() == trie.depth[keys].tolist()
        truth = ancestors[np.ix_(keys, keys)]
        i, j = np.arange(len(keys))[:, None], np.arange(len(keys))
        seen = (j <= i) & (i < step.subtree_end.numpy())
        assert not (truth & ~seen)[step.num_past :].any(), "no ancestor is hidden, cached or not"
        exact = np.ones(len(keys), dtype=bool)
        exact[step.num_past - step.num_cached : step.num_past] = False  # those are seen through the spans alone
        assert (seen == truth)[step.num_past :, exact].all()
        check_blocks(step, truth, block_tokens, share == 0)
        past_tokens = [keys[key] for key in step.next_past.tolist()]
        owned = np.diff(step.target_ptr).tolist()
        assert step.target_start == targets and step.target_ptr[0] == 0 and sum(owned) == len(step.targets)
        assert step.targets.tolist() == trie.targets[targets : targets + len(step.targets)].tolist()
        targets += len(step.targets)
        rows += [(new[row], n) for row, n in zip(step.rows.tolist(), owned, strict=True)]
        assert step.cells_done == int((leaves < step.stop).sum())
    assert at == len(trie) and not past_tokens and targets == len(trie.targets)
    assert rows == list(zip(trie.row_token.tolist(), np.diff(trie.target_ptr).tolist(), strict=True))


def test_a_shallow_boundary_is_preferred():
    """With room to choose, a pass ends between prompts, where no past is left."""
    cells = [([p, *range(20, 50)], [1, 2, 3]) for p in range(8)]
    steps = plan_trie(*flatten(cells)).passes(40)
    assert len(steps) == 8 and [step.num_past for step in steps] == [0] * 8


def test_to_moves_once_and_keeps_the_rest():
    step = plan_trie(*flatten(random_cells(3))).passes(9)[1]
    moved = step.to("meta")
    assert moved is step.to(torch.device("meta")) and step.to("cpu") is step
    assert moved.input_ids.is_meta and moved.span.shape == step.span.shape
    assert (moved.start, moved.num_past, moved.cells_done) == (step.start, step.num_past, step.cells_done)
    # The lists of tiles are made once, and on the host.
    assert moved.tiles(16) is moved.tiles(16) and moved.tiles(16).is_meta and moved.tiles(8) is not moved.tiles(16)
    assert moved.to("cpu").tiles(16) is step.tiles(16) and moved.to("cpu").position is step.position


TOP = 2**63 - 1
# Refused in the same words by the compiled planner and by numpy: test_planner.py.
REFUSED = {
    "context of 0": (([1, 2, 3, 4], [0, 2, 4], [1, 0]), "sequence 1: .*context of 0"),
    "context below 0": (([1, 2, 3, 4], [0, 2, 4], [-(2**63), 1]), "sequence 0: "),
    "no response": (([1, 2, 3, 4], [0, 2, 4], [1, 2]), "sequence 1: "),
    "context past the end": (([1, 2, 3, 4], [0, 2, 4], [TOP, 1]), "sequence 0: "),
    "offsets that descend": (([1, 2, 3, 4], [0, 4, 2, 4], [1, 1, 1]), "sequence 1: .*in -2 tokens"),
    "offsets past the end": (([1, 2, 3, 4], [0, 9, 4], [1, 1]), "sequence 1: "),
    "offsets below 0": (([1, 2, 3, 4], [0, -5, 4], [1, 1]), "sequence 0: "),
    "differences that wrap around": (([1, 2, 3, 4], [0, TOP, -(2**63) + 5, 4], [1, 1, 1]), "sequence "),
    "too few offsets": (([1, 2, 3, 4], [0, 4], [1, 1]), r"offsets: expected \[3\]"),
    "too many offsets": (([1, 2, 3, 4], [0, 2, 4], [1]), r"offsets: expected \[2\]"),
    "no offsets": (([], [], []), "offsets: expected "),
    "a first offset of 1": (([1, 2, 3], [1, 3], [1]), "offsets: expected .*from 0 to 3"),
    "a last offset that is short": (([1, 2, 3, 4], [0, 3], [1]), "offsets: expected .*from 0 to 4"),
    "a negative id": (([1, 2, 3, -4], [0, 2, 4], [1, 1]), "sequence 1: .*negative.*-4"),
    "negative ids, the least one counts": (
        ([1, -2, 3, -(2**63), 5, -(2**63)], [0, 2, 4, 6], [1, 1, 1]), f"negative.*-{2**63}"),
    "negative id and context": (([-1, 2, 3, 4], [0, 2, 4], [1, 0]), "sequence "),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_bad_sequences_and_arrays_that_do_not_fit_are_named(name):
    job, expected = REFUSED[name]
    with pytest.raises(ValueError, match=expected):
        plan_trie(*job)
    for ids, context_lengths, flat in (([1, 2], 1, "context_lengths"), ([[1, 2]], [1], "ids")):
        with pytest.raises(TypeError, match=f"{flat}: expected a flat array of integers"):
            plan_trie(ids, [0, 2], context_lengths)


@pytest.mark.parametrize(("arguments", "expected"), [
    ({"max_tokens": 0}, "max_tokens: expected at least 1"), ({"max_tokens": -3}, "max_tokens: expected at least 1"),
    ({"block_tokens": 0}, "block_tokens: expected at least 1"),
    ({"max_tokens": 7, "cached": "a row"}, "cached: expected no token that predicts something"),
])  # fmt: skip
def test_bad_options_of_passes_are_named(arguments, expected):
    trie = plan_trie(*flatten(random_cells(4)))
    if "cached" in arguments:
        arguments = {**arguments, "cached": np.arange(len(trie)) == trie.row_token[0]}
    with pytest.raises(ValueError, match=expected):
        trie.passes(**arguments)


def test_a_pass_is_no_window_into_its_trie():
    """A model may write into the ids it is given."""
    trie = plan_trie(*flatten([([1, 2, 3], [4, 5])]))
    (step,) = trie.passes()
    step.input_ids.fill_(9)
    step.targets.fill_(9)
    assert trie.tokens.tolist() == [1, 2, 3, 4] and trie.targets.tolist() == [4, 5]
