"""Which providers of a case take part: those that run, agree with the oracle, and were reached in time."""

from __future__ import annotations

from ..timing import Case
from . import Job


def settle(job: Job, case: Case, must: str = "ours") -> list[str]:
    """Run every provider once, which is its warm-up too, and leave out, with a line each, those that cannot take part.

    What a peer raises (out of memory, a kernel that does not compile) is a finding about the peer; what `must` raises,
    or an output of it that is wrong, ends the part. Returns the names of the providers whose output was wrong.
    """
    place, wrong = f"{case.op}, {case.name}", []
    for name, provider in list(case.providers.items()):
        if name != must and job.left <= 0:
            job.say(f"{place}: no time for {name}")
            del case.providers[name]
            continue
        try:
            error = float((provider.check or case.check)(provider.run()))
        except Exception as failure:  # see above
            if name == must:
                raise
            lines = str(failure).strip().splitlines() or ["no message"]
            job.say(f"{place}: {name} does not run: {type(failure).__name__}: {lines[0][:200]}")
            del case.providers[name]
            continue
        if error <= case.tolerance:
            continue
        what = f"{place}: {name}: wanted within {case.tolerance:.3g} of the oracle, got {error:.3g}"
        if name == must:
            raise RuntimeError(what)
        job.say(f"{what}; left out")
        wrong.append(name)
        del case.providers[name]
    case.warm_up = lambda: None
    return wrong
