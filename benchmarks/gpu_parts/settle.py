"""Which providers of a case take part: those that run, agree with the oracle, and were reached in time."""

from __future__ import annotations

import time

from ..rows import Row
from ..timing import Case, run_case, synchronise
from . import Job

# A first run also warms up, so a size is given up only if it takes so many times as long as its peer's fastest.
SLOWER = 1.5


def settle(job: Job, case: Case, must: str = "ours") -> list[str]:
    """Run every provider once, which is its warm-up too, and leave out, with a line each, those that cannot take part.

    What a peer raises (out of memory, a kernel that does not compile) is a finding about the peer; what `must` raises,
    or an output of it that is wrong, ends the part. Of a peer's sizes those go that are far from its fastest.
    Returns the names of the providers whose output was wrong.
    """
    place, wrong, took = f"{case.op}, {case.name}", [], {}
    for name, provider in list(case.providers.items()):
        if name != must and job.left <= 0:
            job.miss(f"{place}: {name}")
            del case.providers[name]
            continue
        began = time.monotonic()
        try:
            output = provider.run()
            synchronise(job.device)
            took[name] = time.monotonic() - began
            error = float((provider.check or case.check)(output))
        except Exception as failure:  # see above
            if name == must:
                raise
            lines = str(failure).strip().splitlines() or ["no message"]
            job.say(f"{place}: {name} does not run: {type(failure).__name__}: {lines[0][:200]}")
            del case.providers[name]
            continue
        if error <= case.tolerance:
            continue
        what = f"{place}: {name}: expected within {case.tolerance:.3g} of the oracle, got {error:.3g}"
        if name == must:
            raise RuntimeError(what)
        job.say(f"{what}; left out")
        wrong.append(name)
        del case.providers[name]
    for name, provider in list(case.providers.items()):
        best = min(took[other] for other, of in case.providers.items() if of.peer == provider.peer)
        if provider.peer and took[name] > SLOWER * best:
            job.say(f"{place}: {name}: {took[name]:.3g} s, another size {best:.3g} s; left out")
            del case.providers[name]
    case.warm_up = lambda: None
    return wrong


def measured(job: Job, case: Case) -> list[Row]:
    """The rows of a settled case; a line for each provider that was not reached in time."""
    rows = run_case(case, job.device, job.deadline)
    for name in case.providers.keys() - {row.provider for row in rows}:
        job.miss(f"{case.op}, {case.name}: {name}")
    return rows
