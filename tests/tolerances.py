"""Every numerical tolerance of the suite, one row each with its reason; tests name a row, not a number.

fp32 rows bound the largest difference from float64. Low-precision rows have a factor: our error may be at
most that many times the error of PyTorch's own kernel of the same dtype on the same inputs, plus ``atol``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tolerance:
    """``|got - exact| <= atol + rtol * |exact| + factor * (largest error of PyTorch in the same dtype)``."""

    atol: float
    rtol: float
    factor: float
    reason: str


TOLERANCES = {
    "tree_attention fp64": Tolerance(1e-12, 0.0, 0.0, "outputs of order 1, a few hundred keys in double"),
    "tree_attention fp32": Tolerance(
        2e-5, 0.0, 0.0, "averages of N(0, 1) values; 1e-6 typical, logits up to 20 cost one more digit"
    ),
    "tree_attention low": Tolerance(
        1e-4, 0.0, 2.0, "FlashAttention's bound: twice PyTorch's error in that dtype; atol if that is 0"
    ),
    "tree_attention gradient fp32": Tolerance(
        5e-5, 2e-5, 0.0, "sums over up to some hundred queries of values of order 1; 2e-6 typical"
    ),
    "tree_attention gradient low": Tolerance(
        1e-3, 0.0, 2.0, "twice PyTorch's error in that dtype, whose own result is rounded once more on the way"
    ),
    "linear_logprob fp64": Tolerance(1e-11, 1e-13, 0.0, "one product and one logsumexp in double"),
    "linear_logprob fp32": Tolerance(
        2e-5, 1e-6, 0.0, "values up to about 20 nats; rtol is fp32 rounding of the log-sum-exp itself"
    ),
    "linear_logprob extreme": Tolerance(
        1e-2, 1e-6, 0.0, "logits of 1e4 are spaced 1e-3 in fp32, and logprob is a difference of two of them"
    ),
    "linear_logprob low": Tolerance(
        1e-3, 0.0, 2.0, "twice the error of log_softmax over PyTorch's logits in that dtype"
    ),
    "logprob gradient fp64": Tolerance(1e-11, 1e-13, 0.0, "as the values"),
    "logprob gradient fp32": Tolerance(
        2e-5, 2e-5, 0.0, "probabilities err by fp32 rounding of logits up to 20; gradients are of order 1 to 10"
    ),
    "logprob gradient low": Tolerance(
        1e-3, 0.0, 2.0, "twice the error of autograd through PyTorch's ops in that dtype"
    ),
    "token nll": Tolerance(1e-4, 0.0, 0.0, "the promise of the package per token, fp32; 2e-5 typical"),
    "mean loss": Tolerance(1e-5, 0.0, 0.0, "the promise of the package for the mean loss of a prompt, fp32"),
    "float64 sums": Tolerance(1e-12, 0.0, 0.0, "the same float64 numbers summed in another order"),
}


def assert_close(row: str, got: torch.Tensor, exact: torch.Tensor, same_dtype=None) -> None:
    """Shapes equal, all finite, error within the row; `same_dtype`: PyTorch's result, with a factor."""
    tolerance = TOLERANCES[row]
    assert got.shape == exact.shape, f"{row}: shape {list(got.shape)}, expected {list(exact.shape)}"
    assert (same_dtype is not None) == (tolerance.factor > 0), f"{row}: same_dtype goes with a factor"
    got, exact = got.detach().cpu().double(), exact.detach().cpu().double()
    assert exact.isfinite().all(), f"{row}: the oracle is not finite"
    assert got.isfinite().all(), f"{row}: {int((~got.isfinite()).sum())} of {got.numel()} not finite"
    if not got.numel():
        return
    bound = tolerance.atol + tolerance.rtol * exact.abs()
    if same_dtype is not None:
        bound = bound + tolerance.factor * (same_dtype.detach().cpu().double() - exact).abs().max()
    excess = ((got - exact).abs() / bound).max()
    worst = (got - exact).abs().max()
    assert excess <= 1.0, f"{row}: error {worst:.3g}, {excess:.3g} times the bound ({tolerance.reason})"
