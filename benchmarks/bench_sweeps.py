"""One thing changed at a time: where score_prompts gains, and where it loses, against tuned transformers."""

from __future__ import annotations

import dataclasses

import pytest

from .bench_end_to_end import cpu_only, model_of
from .end_to_end import make_case
from .workload import Cells

BASE, VOCABULARY, HIDDEN, LAYERS = Cells(prompts=8, examples=4), 50257, 256, 4
# Around the usual point, which is measured once.
AXES = {
    "layout": [("last", False), ("last", True)],
    "K": [("prompts", n) for n in (1, 16, 64)],
    "M": [("examples", n) for n in (1, 16, 32)],
    "prompt": [("prompt", n) for n in (15, 240)],
    "input": [("input", n) for n in (15, 320)],
    "response": [("response", n) for n in (1, 32)],
    "V": [("vocabulary", n) for n in (32000, 128256, 256000)],
    "D": [("hidden", n) for n in (128, 512, 1024)],
}
POINTS = [(axis, name, value) for axis, points in AXES.items() for name, value in points]


def label(axis: str, value) -> str:
    return f"{axis}={'last' if value is True else 'first' if value is False else value}"


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("axis", "field", "value"), POINTS, ids=[label(a, v) for a, _, v in POINTS])
def test_sweep(axis, field, value, recorder, benchmark):
    cpu_only(recorder)
    if recorder.toy and value != AXES[axis][0][1]:
        pytest.skip("toy size: the first value of each axis only")
    usual = dataclasses.replace(BASE, examples=round(BASE.examples * min(recorder.scale, 4)))
    cells = Cells(2, 2, 6, 8, 2) if recorder.toy else usual
    vocabulary, hidden, layers = (300, 128, 1) if recorder.toy else (VOCABULARY, HIDDEN, LAYERS)
    if field == "vocabulary":
        vocabulary = 300 if recorder.toy else value
    elif field == "hidden":
        hidden = 128 if recorder.toy else value
    elif not recorder.toy:
        cells = dataclasses.replace(cells, **{field: value})
    cache = cells.cache(vocabulary)
    model = model_of(vocabulary, hidden, layers)
    sizes = {"tuned_plain": (8, 32), "prefix_cache": (32,)}
    case = make_case("sweep", label(axis, value), model, cache, list(sizes), rounds=2, sizes=sizes)
    recorder.run(benchmark, case)
