"""A disk that is full after so many pages: one error with file and cause, nothing lost, and with room it goes on."""

from __future__ import annotations

import pytest

from tests.endurance.test_kills import slow
from tests.endurance.wire import spread

PLENTY = 8000


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("job, count", [
    ("train", 1), ("sequence", 1), ("score", 1), ("paraphrase", 1), ("export", 2), ("report", 1),
    slow("train", 46), slow("sequence", 25), slow("score", 8), slow("paraphrase", 4), slow("export", 25),
    slow("report", 12),
])  # fmt: skip
def test_a_full_disk(server, run, unbroken, tmp_path, job, count):
    expected, _ = unbroken(job)
    # In a folder of the same name, which results may hold.
    plenty = server.full_disk(job, tmp_path / "here", run, PLENTY)
    if "fault" in plenty:
        pytest.skip(f"no disk of limited size can be mounted here: {plenty['fault']}")
    assert plenty["first"]["rc"] == 0, plenty
    full, faults, sizes = 0, [], spread(plenty["used"] + 1, count)
    for pages in sizes:
        found = server.full_disk(job, tmp_path / "here", run, pages)
        assert "fault" not in found, found
        first, second = found["first"], found["second"]
        if first["rc"] != 0:
            full += 1
            errors = [line for line in first["err"].splitlines() if line.startswith("sapo: error: ")]
            clear = len(errors) == 1 and str(tmp_path / "here") in errors[0] and "No space left on device" in errors[0]
            if first["rc"] != 2 or not clear or "Traceback" in first["err"]:
                faults.append((pages, first["rc"], first["err"][-400:]))
        if second["rc"] != 0 or found["result"] != expected or found["left after"]:
            faults.append((pages, second["rc"], second["err"][-400:], found["left after"]))
    print(f"\n{job}: disks of {len(sizes)} sizes up to {plenty['used']} pages, full at {full}, {len(faults)} faults")
    assert not faults and full
