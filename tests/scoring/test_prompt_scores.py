"""PromptScores: reductions by hand, ranking, the choice, files."""

from __future__ import annotations

import json
import logging
import math

import pytest
import torch

from sapo_kernels import PromptScores, score_prompts
from sapo_kernels.files import DataError
from sapo_kernels.scoring.prompt_scores import SCHEMA
from tests.oracles import small_qwen3
from tests.scoring.ranks_child import cache_of
from tests.tolerances import assert_close

NAN, INF = float("nan"), float("inf")


def scores(nll, tokens=None, **stats):
    nll = torch.as_tensor(nll, dtype=torch.float64)
    tokens = torch.ones(nll.shape, dtype=torch.int64) if tokens is None else torch.as_tensor(tokens)
    return PromptScores(nll, tokens, [f"prompt {k}" for k in range(len(nll))], stats)


def by_hand(nll, tokens, kind, batch_size=8):
    """The reductions as plain loops over the cells that were scored."""
    result = []
    for row, counts in zip(nll, tokens, strict=True):
        size = {"token": len(row), "example": 1, "batch": batch_size}[kind]
        means, weights = [], []
        for first in range(0, len(row), size):
            cells = [(x, n) for x, n in zip(row, counts, strict=True)][first : first + size]
            cells = [(x, n) for x, n in cells if n > 0]
            if cells:
                means.append(sum(x for x, _ in cells) / sum(n for _, n in cells))
                weights.append(len(cells) if kind == "batch" else 1)
        weighted = sum(m * w for m, w in zip(means, weights, strict=True))
        result.append(weighted / sum(weights) if means else NAN)
    return torch.tensor(result, dtype=torch.float64)


MATRIX = [[3.0, 1.0, 8.0, 2.5, 0.5], [2.0, 2.0, 2.0, 9.0, 1.0]]
COUNTS = [[3, 1, 2, 5, 1], [1, 2, 4, 3, 1]]


def test_reductions():
    made = scores(MATRIX, COUNTS)
    assert made.reduce().tolist() == [15.0 / 12, 16.0 / 11] == made.loss.tolist()
    for kind, batch_size in (("token", 8), ("example", 8), ("batch", 1), ("batch", 2), ("batch", 3), ("batch", 99)):
        assert_close("float64 sums", made.reduce(kind, batch_size), by_hand(MATRIX, COUNTS, kind, batch_size))
    # 5 examples in batches of 2: the last batch is one example and weighs half as much as the others.
    expected = (2 * (3.0 + 1.0) / 4 + 2 * (8.0 + 2.5) / 7 + 0.5 / 1) / 5
    assert made.reduce("batch", 2)[0] == pytest.approx(expected, abs=1e-15)
    assert torch.equal(made.reduce("batch", 1), made.reduce("example"))
    assert_close("float64 sums", made.reduce("batch", 5), made.reduce("token"))
    assert made.reduce("batch").dtype == torch.float64
    # Cells that were not scored do not count.
    nll, tokens = [[3.0, NAN, 8.0, NAN, NAN], [NAN] * 5], [[3, 0, 2, 0, 0], [0] * 5]
    made = scores(nll, tokens)
    for kind, batch_size in (("token", 8), ("example", 8), ("batch", 2), ("batch", 3)):
        got, expected = made.reduce(kind, batch_size), by_hand(nll, tokens, kind, batch_size)
        assert_close("float64 sums", got[:1], expected[:1])
        assert math.isnan(got[1])
    assert made.nonfinite == [], "not scored is not the same as not finite"
    assert made.best == 0 and made.ranking() == [0, 1]
    with pytest.raises(ValueError, match="kind: expected one of"):
        made.reduce("mean")
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        made.reduce("batch", 0)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_bad_cell_bars_its_prompt(bad, caplog):
    made = scores([[9.0, 9.0, 9.0], [0.0, bad, 0.0], [1.0, 1.0, 1.0], [bad, bad, 0.0]])
    assert made.nonfinite == [1, 3]
    assert made.ranking() == [2, 0, 1, 3] and made.best == 2
    for kind in ("token", "example", "batch"):
        assert made.reduce(kind, 2).isfinite().tolist() == [True, False, True, False]
    with caplog.at_level(logging.WARNING, "sapo_kernels"):
        made.warn_nonfinite()
    assert [r.getMessage() for r in caplog.records] == [
        "prompt 1: 1 of 3 cells are not finite (first: example 1); it cannot be chosen",
        "prompt 3: 2 of 3 cells are not finite (first: example 0); it cannot be chosen",
    ]


def test_ties_go_to_the_lowest_index():
    made = scores([[2.0], [1.0], [1.0], [0.5 + 0.5], [3.0]])
    assert made.best == 1 and made.ranking() == [1, 2, 3, 0, 4]
    assert scores([[-0.0], [0.0]]).best == 0
    assert scores([[5e-324], [0.0]]).best == 1
    assert scores([[1e300], [1e308]]).ranking() == [0, 1]
    made = scores([[10.0, 1.0], [6.0, 4.0]], [[10, 1], [10, 1]])
    assert made.ranking("token") == [1, 0] and made.ranking("example") == [0, 1], "another reduction, another ranking"


def test_repr_lists_the_best_first():
    made = scores([[NAN], *([float(k)] for k in range(9, 2, -1))])
    made.prompts[7] = "a\nb " + "c" * 100
    assert "1. [7] 3.0000  a b ccc" in repr(made) and "... 3 more" in repr(made)
    assert max(map(len, repr(made).splitlines())) < 100


def test_round_trip(tmp_path):
    made = scores(
        [[1 / 3, NAN, INF], [-INF, 1e-308, 123456789.123456789]], [[1, 0, 2], [3, 2**40, 5]], path="tree", seconds=0.5
    )
    made.prompts[:] = ['brace {input} "quoted" \\ \n', "文本 \U0001f642 \u202e"]
    path = tmp_path / "scores.json"
    made.save(path)
    again = PromptScores.load(path)
    assert again.prompts == made.prompts and again.stats == made.stats
    assert torch.equal(again.nll.isnan(), made.nll.isnan())
    assert torch.equal(again.nll.nan_to_num(7.0, 8.0, 9.0), made.nll.nan_to_num(7.0, 8.0, 9.0)), "to the last bit"
    assert torch.equal(again.tokens, made.tokens) and again.nll.dtype == torch.float64
    assert again.tokens.dtype == torch.int64 and again.to_dict() == made.to_dict()
    json.loads(path.read_text("utf-8"), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


GOOD = scores(MATRIX, COUNTS).to_dict()
BAD_FIELDS = {
    "another schema": {"schema": SCHEMA + "0"},
    "prompts of another kind": {"prompts": "ab"},
    "a prompt too few": {"prompts": ["a"]},
    "stats of another kind": {"stats": [1]},
    "no nll": {"nll": None},
    "nll without rows": {"nll": [], "tokens": []},
    "ragged nll": {"nll": [[1.0], [1.0, 2.0]]},
    "nll of strings": {"nll": ["12345", "12345"]},
    "nll with a hole": {"nll": [[None] * 5] * 2},
    "nll 3-D": {"nll": [[[1.0]] * 5] * 2},
    "nll of 400 digits": {"nll": [[10**400] * 5] * 2},
    "nll of another shape": {"nll": [[1.0] * 4] * 2},
    "negative tokens": {"tokens": [[1] * 5, [1, 1, -1, 1, 1]]},
    "tokens of strings": {"tokens": [["1"] * 5] * 2},
    "tokens of 2**63": {"tokens": [[2**63] * 5] * 2},
}


@pytest.mark.parametrize("name", BAD_FIELDS)
def test_bad_fields_are_refused(name, tmp_path):
    assert PromptScores.from_dict(GOOD).to_dict() == GOOD
    spoiled = {**GOOD, **BAD_FIELDS[name]}
    with pytest.raises(DataError, match="scores: "):
        PromptScores.from_dict(spoiled)
    (tmp_path / "broken.json").write_text(json.dumps({k: v for k, v in spoiled.items() if v is not None}))
    with pytest.raises(DataError) as caught:
        PromptScores.load(tmp_path / "broken.json")
    assert str(caught.value).count("broken.json") == 1 and len(str(caught.value)) < 500


@pytest.mark.parametrize("batch_size", [4, 8])
def test_batch_reduction_is_what_trainer_evaluate_gives(batch_size):
    from benchmarks.peers.loops import trainer_loop

    model, cache = small_qwen3(), cache_of(0, 2, 10, vocabulary=60)
    scores = score_prompts(model, cache)
    expected = trainer_loop(model, cache, batch_size)
    assert torch.allclose(scores.reduce("batch", batch_size), expected, rtol=0, atol=1e-5)
    assert (expected - scores.loss).abs().min() > 1e-4, "the job should tell the reductions apart"
