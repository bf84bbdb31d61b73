"""reweight_ prompt by prompt in Python floats (float64); the oracle of its tests."""

from __future__ import annotations

import math


def reweight_reference(mean, weight, probs, best, effective, live, nll, tokens, decay, temperature, floor) -> None:
    """See `reweight.api.reweight_`; lists (or tensors) of pools of prompts, the first five written in place."""
    for p in range(len(mean)):
        for k in range(len(mean[p])):
            loss, count, old = float(nll[p][k]), int(tokens[p][k]), float(mean[p][k])
            aged = decay * float(weight[p][k])
            if count == 0:
                weight[p][k] = aged
            elif count < 0 or not math.isfinite(loss):
                mean[p][k], weight[p][k] = (math.nan if math.isfinite(loss) else loss), 0.0
            elif aged > 0 and math.isfinite(old):
                weight[p][k] = aged + count
                mean[p][k] = (aged * old + loss) / (aged + count)
            else:
                mean[p][k], weight[p][k] = loss / count, float(count)
        usable = [k for k in range(len(mean[p])) if live[p][k] and math.isfinite(mean[p][k])]
        if not usable:
            best[p] = -1
            continue
        best[p] = chosen = min(usable, key=lambda k: (float(mean[p][k]), k))
        low = float(mean[p][chosen])
        if temperature == 0:
            soft = {k: float(k == chosen) for k in usable}
        else:
            soft = {k: math.exp((low - float(mean[p][k])) / temperature) for k in usable}
        total = math.fsum(soft.values())
        for k in range(len(mean[p])):
            probs[p][k] = (1 - floor) * soft[k] / total + floor / len(usable) if k in soft else 0.0
        effective[p] = 1 / math.fsum(float(probs[p][k]) ** 2 for k in usable)
