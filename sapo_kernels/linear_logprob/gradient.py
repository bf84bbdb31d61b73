"""What the backends share for gradients of linear_logprob, in plain PyTorch.

With ``p = softmax(logits)`` of a row, ``g`` the gradients of its log-probabilities, ``s`` the gradient of its lse and
``slope`` the derivative of the soft cap (1 without one), the gradient of the row's product ``hidden @ weight.T + bias``
is

    d[v] = scale * slope[v] * (a * p[v] + sum of g over targets v),    a = s - sum of g

A frozen head needs ``d @ weight`` alone. The operator's third output, ``mean[r] = sum of p[v] * slope[v] * weight[v]``
over the words that are no target of row r, makes that a few rows of work in the backward pass, whatever g and s are:

    d @ weight = scale * (a * mean + sum over targets of (a * p + g) * slope * weight[target])

Targets are left out of the mean because ``p - 1`` of a likely one must not be the difference of two rounded vectors.
"""

from __future__ import annotations

import torch

# fp32 logits of one chunk of rows at most. With few rows the product waits for the weights (docs/measured.md); a CPU
# needs this many, and its memory is what the peers' is compared with.
CHUNK_BYTES, ENOUGH_ROWS = 128 << 20, 200


def chunk_rows(vocabulary: int, device: torch.device) -> int:
    """Rows of one chunk: their fp32 logits fill it, or half of it on a CPU if that is enough."""
    rows = CHUNK_BYTES // (4 * vocabulary)
    return max(16, min(rows, max(rows // 2, ENOUGH_ROWS)) if device.type == "cpu" else rows)


def chunks(target_ptr: torch.Tensor, vocabulary: int, rows_at_once=None):
    """(rows, targets, pointer) of each chunk: two slices and the chunk's own target_ptr. Waits for the device once."""
    rows, step = len(target_ptr) - 1, rows_at_once or chunk_rows(vocabulary, target_ptr.device)
    edges = [*range(0, rows, step), rows]
    cuts = target_ptr[torch.tensor(edges, device=target_ptr.device)].tolist()
    for i, (first, stop) in enumerate(zip(edges, edges[1:])):  # noqa: B905 (pairs of neighbours)
        yield slice(first, stop), slice(cuts[i], cuts[i + 1]), target_ptr[first : stop + 1] - cuts[i]


def row_of_target(target_ptr: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """[P] int64: the row that owns each target."""
    rows = torch.arange(len(target_ptr) - 1, device=targets.device)
    return rows.repeat_interleave(target_ptr.diff(), output_size=len(targets))


def target_share(logprob, targets, row, vocabulary: int) -> torch.Tensor:
    """[P]: each target's probability, divided by how often its row has that target."""
    _, inverse, counts = torch.unique(row * vocabulary + targets, return_inverse=True, return_counts=True)
    return logprob.exp() / counts[inverse]


def row_sums(values: torch.Tensor, target_ptr: torch.Tensor) -> torch.Tensor:
    """[P] or [P, D], sorted by row -> [R] or [R, D]. No atomics: the same bits every time."""
    if not len(values):
        return values.new_zeros(len(target_ptr) - 1, *values.shape[1:])
    return torch.segment_reduce(values, "sum", offsets=target_ptr, unsafe=True, initial=0.0)


def of_softmax(grad_logprob, grad_lse, lse, targets, target_ptr) -> tuple[torch.Tensor, torch.Tensor]:
    """(a [R], g [P]); a gradient that is None is 0."""
    g = lse.new_zeros(len(targets)) if grad_logprob is None else grad_logprob.to(lse.dtype)
    a = -row_sums(g, target_ptr)
    return (a if grad_lse is None else a + grad_lse), g


def from_mean(a, g, logprob, lse, mean, weight, targets, target_ptr, scale, softcap) -> torch.Tensor:
    """The gradient of hidden where nothing else wants one: [R, D] in mean's dtype."""
    row = row_of_target(target_ptr, targets)
    of_target = a[row] * target_share(logprob, targets, row, len(weight)) + g
    if softcap is not None:
        of_target = of_target * (1 - ((logprob + lse[row]) / softcap) ** 2)
    found = a[:, None] * mean + row_sums(of_target[:, None] * weight[targets], target_ptr)
    return found.mul_(scale).to(mean.dtype)


def from_logits(coefficients, a, g, lse, hidden, weight, targets, target_ptr, bias, output_mask):
    """Gradients of (hidden, weight, bias), None where not `output_mask`, from logits that are computed again by chunks.

    ``coefficients(rows of hidden, a, g, lse, targets, target_ptr)`` gives d of a chunk, [n, V] in hidden's dtype.
    """
    of_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if output_mask[0] else None
    # Sums over chunks are kept in float32 at least.
    of_weight, of_bias = (
        t.new_zeros(t.shape, dtype=lse.dtype) if want else None
        for t, want in zip((weight, lse.new_empty(len(weight))), output_mask[1:], strict=True)
    )
    for rows, mine, pointer in chunks(target_ptr, len(weight)):
        d = coefficients(hidden[rows], a[rows], g[mine], lse[rows], targets[mine], pointer)
        if of_hidden is not None:
            torch.mm(d, weight, out=of_hidden[rows])
        if of_weight is not None:
            of_weight += d.T @ hidden[rows]
        if of_bias is not None:
            of_bias += d.sum(0, dtype=lse.dtype)
        del d
    return of_hidden, *(None if t is None else t.to(hidden.dtype) for t in (of_weight, of_bias))


def gradients(coefficients, grad_logprob, grad_lse, logprob, lse, mean, hidden, weight, targets, target_ptr, bias,
              scale, softcap, output_mask):  # fmt: skip
    """Gradients of (hidden, weight, bias), None where not `output_mask`: from the mean if that is enough."""
    a, g = of_softmax(grad_logprob, grad_lse, lse, targets, target_ptr)
    if output_mask == [True, False, False] and len(mean) == len(hidden):
        return from_mean(a, g, logprob, lse, mean, weight, targets, target_ptr, scale, softcap), None, None
    return from_logits(coefficients, a, g, lse, hidden, weight, targets, target_ptr, bias, output_mask)
