"""accumulate_ against torch's index_add_ and segment_reduce."""

from __future__ import annotations

import pytest

from .in_place import accumulate_case
from .workload import Cells

CASES = {
    "21x50, 4 tokens": Cells(21, 50, 30, 40, 4),
    "21x50, 64 tokens": Cells(21, 50, 30, 40, 64),
    "64x250, 4 tokens": Cells(64, 250, 10, 10, 4),
}


@pytest.mark.parametrize("name", CASES)
def test_accumulate(name, recorder, benchmark):
    cells = Cells(2, 3, 6, 10, 2) if recorder.toy else CASES[name]
    recorder.run(benchmark, accumulate_case(name, cells, recorder.device, rounds=2 if recorder.toy else 30))
