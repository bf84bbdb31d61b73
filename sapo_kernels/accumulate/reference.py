"""accumulate_ in one plain loop; the oracle of its tests."""

from __future__ import annotations


def accumulate_reference(nll, tokens, logprob, cell_target, cell_ptr, start: int) -> None:
    """See `accumulate.api.accumulate_`."""
    values = dict(enumerate(logprob.tolist(), start))
    for cell in range(len(nll)):
        for target in cell_target[cell_ptr[cell] + tokens[cell] : cell_ptr[cell + 1]].tolist():
            if target not in values:
                break
            nll[cell] = float(nll[cell]) - values[target]
            tokens[cell] += 1
