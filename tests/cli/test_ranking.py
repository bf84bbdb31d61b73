"""Standard errors of the ranked table, and text made fit for a terminal."""

import pytest
import torch

from sapo_peft import terminal as _terminal
from sapo_peft.cli import ranking as _ranking


def test_standard_error_against_simulation():
    """The linearised paired error is the spread of the difference over many draws of examples."""
    generator = torch.Generator().manual_seed(0)
    draws, size = 2000, 60
    tokens = torch.randint(1, 12, (draws, size), generator=generator)
    shared = torch.rand((draws, size), generator=generator, dtype=torch.float64) * tokens * 3
    noise = torch.randn((draws, 2, size), generator=generator, dtype=torch.float64)
    nll = shared[:, None] * torch.tensor([1.0, 1.1])[:, None] + 0.3 * noise
    counts = torch.stack([tokens, tokens], 1)
    results = [_ranking.paired_difference(nll[d], counts[d], 1, 0) for d in range(draws)]
    values = torch.tensor([value for value, _ in results])
    errors = torch.tensor([error for _, error in results])
    assert abs(float(errors.mean() / values.std()) - 1) < 0.05


def test_standard_error_of_equal_and_few():
    nll, tokens = torch.tensor([[1.0, 2.0], [1.0, 2.0]]).double(), torch.tensor([[1, 2], [1, 2]])
    assert _ranking.paired_difference(nll, tokens, 1, 0) == (0.0, 0.0)
    value, error = _ranking.paired_difference(nll[:, :1] + torch.tensor([[0.0], [1.0]]), tokens[:, :1], 1, 0)
    assert value == 1.0 and error != error


@pytest.mark.parametrize(
    "text, width, shown",
    [
        ("short", 10, "short"),
        ("exactly 10", 10, "exactly 10"),
        ("longer than ten", 10, "longer..."),
        ("\u4f60\u597d\u4e16\u754c\u4f60\u597d", 10, "\u4f60\u597d\u4e16..."),
        ("e\u0301" * 5, 5, "e\u0301" * 5),
        ("a\tb\nc\\", 20, "a\\tb\\nc\\"),
        ("\ud800\ue000\U000e0041", 40, "\\ud800\\ue000\\U000e0041"),
        ("x" * 10_000_000, 8, "xxxxx..."),
    ],
)
def test_cut(text, width, shown):
    assert _terminal.cut(text, width) == shown
    assert _terminal.width_of(_terminal.cut(text, width)) <= width
