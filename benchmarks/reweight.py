"""reweight_ in one run, interleaved: the operator, the same maths in eager torch, an empty call, the public function.

    python -m benchmarks.reweight                      # 8 pools x 32 prompts, the operator's promise
    python -m benchmarks.reweight --pools 1 --prompts 300 --temperature 0

The eager maths is compared with ours before a time is printed. Microseconds a call, p20/p50/p80 over bursts; on a
shared CPU only the ratios mean something. Targets: the operator at most 2 us above the empty call, and at least 10
times as fast as eager torch.
"""

from __future__ import annotations

import argparse
import time

import torch

import sapo_kernels as sk
from sapo_kernels import native

TOLERANCE = 1e-9
LABELS = {
    "operator": "torch.ops.sapo_kernels.reweight_",
    "composed": "the same in eager torch",
    "empty": "the operator with 0 pools",
    "public": "sapo_kernels.reweight_",
}
CALLS = {"operator": 200, "composed": 20, "empty": 200, "public": 200}


def composed(mean, weight, probs, best, effective, live, nll, tokens, decay, temperature, floor) -> None:
    """reweight_ as one would write it with torch's own operators, without a host sync."""
    count = tokens.double()
    scored = count != 0
    valid = (count > 0) & nll.isfinite()
    aged = weight * decay
    kept = torch.where(mean.isfinite(), aged, 0.0)
    total = kept + count
    moved = (kept * mean.nan_to_num(0.0, 0.0, 0.0) + nll) / total
    mean.copy_(torch.where(scored, torch.where(valid, moved, torch.nan), mean))
    weight.copy_(torch.where(scored, torch.where(valid, total, 0.0), aged))
    usable = live & mean.isfinite()
    some = usable.any(1)
    candidate = torch.where(usable, mean, torch.inf)
    chosen = candidate.argmin(1)
    if temperature == 0:
        soft = torch.nn.functional.one_hot(chosen, mean.shape[1]).double()
    else:
        soft = torch.softmax(-candidate / temperature, 1)
    new = torch.where(usable, (1 - floor) * soft + floor / usable.sum(1, keepdim=True).double(), 0.0)
    best.copy_(torch.where(some, chosen, -1))
    probs.copy_(torch.where(some[:, None], new, probs))
    effective.copy_(torch.where(some, 1 / new.square().sum(1), effective))


def losses(pools: int, prompts: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 400, (pools, prompts), generator=generator)
    nll = tokens * (0.5 + torch.rand(pools, prompts, generator=generator, dtype=torch.float64))
    return nll, torch.where(torch.rand(pools, prompts, generator=generator) < 0.2, 0, tokens)


def tensors(state: sk.PromptState) -> tuple[torch.Tensor, ...]:
    return state.mean, state.weight, state.probs, state.best, state.effective, state.live


def check(pools: int, prompts: int, decay: float, temperature: float, floor: float) -> float:
    """The largest difference between ours and eager torch over some steps; raises if they disagree."""
    ours, theirs = sk.PromptState(pools, prompts), sk.PromptState(pools, prompts)
    worst = 0.0
    for seed in range(10):
        nll, tokens = losses(pools, prompts, seed)
        sk.reweight_(ours, nll, tokens, decay, temperature, floor)
        composed(*tensors(theirs), nll, tokens, decay, temperature, floor)
        for a, b in zip(tensors(ours), tensors(theirs), strict=True):
            same = (a == b) | (a.isnan() & b.isnan())
            gap = torch.where(same, 0.0, (a.double() - b.double()).abs()).nan_to_num(nan=torch.inf)
            worst = max(worst, float(gap.max()))
    if not worst < TOLERANCE:
        raise SystemExit(f"eager torch and ours differ by {worst:.3g}; no time is worth printing")
    return worst


def providers(pools: int, prompts: int, decay: float, temperature: float, floor: float) -> dict:
    nll, tokens = losses(pools, prompts, 0)
    states = {name: sk.PromptState(0 if name == "empty" else pools, prompts) for name in LABELS}
    operator, numbers = torch.ops.sapo_kernels.reweight_, (decay, temperature, floor)
    given = {name: (*tensors(state), nll, tokens, *numbers) for name, state in states.items()}
    none = (*tensors(states["empty"]), nll[:0], tokens[:0], *numbers)
    return {
        "operator": lambda: operator(*given["operator"]),
        "composed": lambda: composed(*given["composed"]),
        "empty": lambda: operator(*none),
        "public": lambda: sk.reweight_(states["public"], nll, tokens, *numbers),
    }


def measure(rounds: int, pools=8, prompts=32, decay=0.9, temperature=0.1, floor=0.05) -> dict[str, list[float]]:
    """Microseconds a call of every provider in `rounds` interleaved bursts, ascending."""
    runs = providers(pools, prompts, decay, temperature, floor)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds + 3):
        for name, run in runs.items():
            started = time.perf_counter()
            for _ in range(CALLS[name]):
                run()
            if i >= 3:  # the first ones warm up
                times[name].append((time.perf_counter() - started) / CALLS[name] * 1e6)
    return {name: sorted(values) for name, values in times.items()}


def fastest(rounds: int = 60) -> dict[str, float]:
    """The best burst of every provider: what it takes when nothing else is in its way."""
    return {name: values[0] for name, values in measure(rounds).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pools", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--decay", type=float, default=0.9)
    parser.add_argument("--temperature", type=float, default=0.1)
    parser.add_argument("--floor", type=float, default=0.05)
    parser.add_argument("--rounds", type=int, default=200)
    args = parser.parse_args()

    torch.set_num_threads(1)
    shape = (args.pools, args.prompts, args.decay, args.temperature, args.floor)
    worst = check(*shape)
    times = measure(args.rounds, *shape)
    print(f"torch {torch.__version__}, _C {native.load('_C')}, {args.pools} pools x {args.prompts} prompts, "
          f"temperature {args.temperature:g}, {args.rounds} bursts, eager torch within {worst:.1g}")  # fmt: skip
    print(f"{'us a call':<34}{'p20':>9}{'p50':>9}{'p80':>9}{'best':>9}")
    half = {}
    for name, values in times.items():
        p20, half[name], p80 = (values[int(len(values) * q)] for q in (0.2, 0.5, 0.8))
        print(f"{LABELS[name]:<34}{p20:>9.2f}{half[name]:>9.2f}{p80:>9.2f}{values[0]:>9.2f}")
    above = half["operator"] - half["empty"]
    print(f"operator - empty: {above:.2f} us (expected at most 2)")
    print(f"eager torch / operator: {half['composed'] / half['operator']:.1f} (expected at least 10)")


if __name__ == "__main__":
    main()
