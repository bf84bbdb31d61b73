"""Examples that are alike: a part of the noise between prompts that is known before anything is scored.

Prompts that disagree about a label disagree on every example that has it, and a difference grows with the length of the
response. Both are known for all examples, so how many of each kind are still to come is known too.
"""

from __future__ import annotations

import numpy as np

# Responses that are a twentieth of all or more are a stratum each; the others are cut by length into so many.
COMMON, LENGTHS = 20, 3
# The mean of a stratum is believed like this many examples that say what all say.
PRIOR_EXAMPLES = 2.0


def strata(responses: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """[M] int64, the stratum of each example.

    Args:
        responses: [M] equal numbers for equal responses.
        lengths: [M] response tokens.
    """
    _, found, counts = np.unique(responses, return_inverse=True, return_counts=True)
    often = (counts * COMMON >= len(found)) & (counts > 1)
    names = np.cumsum(often) - 1
    rest = ~often[found]
    cuts = np.unique(np.quantile(lengths[rest], np.arange(1, LENGTHS) / LENGTHS)) if rest.any() else []
    by_length = int(often.sum()) + np.searchsorted(cuts, lengths)
    return np.unique(np.where(rest, by_length, names[found]), return_inverse=True)[1]


def responses_of(cache) -> np.ndarray:
    """[M] int64, equal numbers for equal response tokens, as a `ResponseCache`'s first prompt has them."""
    seen: dict[bytes, int] = {}
    texts = []
    for m in range(cache.num_examples):
        start = cache.offsets[m] + cache.context_lengths[m]
        texts.append(cache.ids[start : cache.offsets[m + 1]].tobytes())
    return np.asarray([seen.setdefault(text, len(seen)) for text in texts], dtype=np.int64)


def without_strata(values: np.ndarray, stratum: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The values less what their strata let one expect; the mean over the examples left stays what it was.

    From the i-th value the mean of its stratum, as the values before have it, is taken, and the mean of the same over
    all examples left is added. As all of that was fixed before the example was drawn, and each example left is as
    likely to come, what is taken and what is added have the same mean.

    Args:
        values: [P, n] in the order drawn.
        stratum: [M] in the same order.

    Returns:
        [P, n] each: these values; then, from the values before each: the mean expected of those left, the variance
        about what the strata let one expect, and how far the lowest value lies below their mean, whatever its stratum:
        few values of a stratum say too little about how low the next may lie.
    """
    n, total = values.shape[1], len(stratum)
    seen, member = np.arange(n), stratum[:, None] == np.arange(stratum.max() + 1)
    count = np.cumsum(member[:n], 0) - member[:n]
    left = (member.sum(0) - count) / (total - seen)[:, None]
    # Shifted by the first value, so that squares do not cancel.
    shift = values[:, :1]
    split = (values - shift)[:, :, None] * member[:n]
    sums, squares = (np.cumsum(part, 1) - part for part in (split, split * split))
    mean = sums.sum(2, keepdims=True) / np.maximum(seen, 1)[:, None]
    expected = (sums + PRIOR_EXAMPLES * mean) / (count + PRIOR_EXAMPLES)
    ahead = (expected * left).sum(2)
    even = values - (expected * member[:n]).sum(2) + ahead
    variance = (squares - expected * (2.0 * sums - count * expected)).sum(2)
    strata_seen = (count > 0).sum(1)
    variance = np.maximum(variance, 0.0) / np.maximum(seen, 1) * (1.0 + strata_seen / np.maximum(seen, 1))
    depth = np.zeros_like(values)
    depth[:, 1:] = np.maximum(np.maximum.accumulate(shift - values, 1)[:, :-1] + mean[:, 1:, 0], 0.0)
    return even, ahead + shift, variance, depth


def expected_means(values: np.ndarray, stratum: np.ndarray) -> np.ndarray:
    """[P] mean over all M examples, those not seen counted with what their strata let one expect.

    values: [P, n] in the order drawn. stratum: [M] in the same order.
    """
    n = values.shape[1]
    member = stratum[:, None] == np.arange(stratum.max() + 1)
    count, mean = member[:n].sum(0), values.mean(1, keepdims=True)
    expected = (values @ member[:n] + PRIOR_EXAMPLES * mean) / (count + PRIOR_EXAMPLES)
    return (values.sum(1) + expected @ member[n:].sum(0)) / len(stratum)
