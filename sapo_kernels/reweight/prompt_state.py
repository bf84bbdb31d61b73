"""PromptState: the scores of every prompt of every pool, as tensors on one device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

DTYPES = {
    "mean": torch.float64,
    "weight": torch.float64,
    "probs": torch.float64,
    "best": torch.int64,
    "effective": torch.float64,
    "live": torch.bool,
}
PER_POOL = ("best", "effective")


class PromptState:
    """The running loss of P pools of at most K prompts, and the choice that follows from it; see `reweight_`.

    Args:
        num_pools: P.
        num_prompts: prompts of every pool, or one number for each pool (K is the largest; the rest is not live).
        device: where the tensors live; default the CPU.

    Attributes, dense tensors that `reweight_` updates in place:
        mean: [P, K] float64, loss in nats per token; NaN until it is scored.
        weight: [P, K] float64, discounted response tokens behind the mean.
        probs: [P, K] float64, what `sample` draws by; even over the live prompts until something is scored.
        best: [P] int64, the prompt with the lowest mean; -1 until something is scored.
        effective: [P] float64, effective number of prompts ``1 / sum(probs ** 2)``; 0 for a pool without prompts.
        live: [P, K] bool, yours to write: a prompt that is not live is never drawn, nor selected by the next
            `reweight_`.

    Raises:
        ValueError: naming the argument, what was expected and what was got.
    """

    def __init__(
        self,
        num_pools: int = 1,
        num_prompts: int | Sequence[int] = 1,
        device: torch.device | str | None = None,
    ):
        if type(num_pools) is not int or num_pools < 0:
            raise ValueError(f"num_pools: expected a whole number of at least 0, got {num_pools!r}")
        same = type(num_prompts) is int
        counts = [num_prompts] * num_pools if same else num_prompts
        if (
            (same and num_prompts < 0)
            or not isinstance(counts, Sequence)
            or len(counts) != num_pools
            or any(type(n) is not int or n < 0 for n in counts)
        ):
            raise ValueError(f"num_prompts: expected a whole number or {num_pools} of them, got {num_prompts!r}")
        size = num_prompts if same else max(counts, default=0)
        device = "cpu" if device is None else device
        # On the host by name: the caller may have another default device.
        count = torch.tensor(counts, dtype=torch.int64, device="cpu").view(-1, 1)
        live = torch.arange(size, device="cpu") < count
        self.live = live.to(device)
        self.mean = torch.full(live.shape, torch.nan, dtype=torch.float64, device=device)
        self.weight = torch.zeros(live.shape, dtype=torch.float64, device=device)
        self.probs = torch.where(live, 1.0 / count.clamp(min=1).double(), 0.0).to(device)
        self.best = torch.full((num_pools,), -1, dtype=torch.int64, device=device)
        self.effective = count[:, 0].double().to(device)

    @property
    def num_pools(self) -> int:
        """P."""
        return self.mean.shape[0]

    @property
    def num_prompts(self) -> int:
        """Prompts of the largest pool."""
        return self.mean.shape[1]

    @property
    def device(self) -> torch.device:
        """Where all tensors are."""
        return self.mean.device

    def __repr__(self) -> str:
        return f"PromptState(num_pools={self.num_pools}, num_prompts={self.num_prompts}, device='{self.device}')"

    def sample(self, n: int = 1, generator: torch.Generator | None = None) -> torch.Tensor:
        """[P, n] int64 prompts drawn independently by `probs`; -1 for a pool without any. No host sync with a
        generator of the state's own device.

        The same generator state gives the same draws; a CPU generator gives them on every device. Prompts that are not
        live, whose mean is not finite while another's is, or whose probability is 0, are never drawn; if none is left,
        -1: call `reweight_` (tokens 0) after changing ``live`` to choose anew.
        """
        if type(n) is not int or n < 0:
            raise ValueError(f"n: expected a whole number of at least 0, got {n!r}")
        if not self.probs.numel():
            return torch.full((self.num_pools, n), -1, dtype=torch.int64, device=self.device)
        # The first of independent clocks with rates p rings for prompt k with probability p[k]: no sums to round.
        source = self.device if generator is None else generator.device
        clock = torch.empty((self.num_pools, n, self.num_prompts), dtype=torch.float64, device=source)
        clock = clock.exponential_(generator=generator).to(self.device)
        usable = self.live & self.mean.isfinite()
        # Where nothing finite is known, the earlier probabilities stay.
        usable = torch.where(usable.any(-1, keepdim=True), usable, self.live)
        rates = torch.where(usable, self.probs, 0.0)[:, None]
        drawn = torch.where(rates > 0, clock / rates, torch.inf).argmin(-1)
        return torch.where((rates > 0).any(-1), drawn, -1)

    def to(self, device: torch.device | str) -> PromptState:
        """This state on `device`: itself if it is there already, else a copy."""
        # "cuda" and "cuda:0" may be the same place, and then `Tensor.to` returns the tensor itself.
        if self.mean.to(device) is self.mean:
            return self
        moved = PromptState(0, 0)
        for name in DTYPES:
            setattr(moved, name, getattr(self, name).to(device))
        return moved

    def state_dict(self) -> dict[str, torch.Tensor]:
        """A copy of every tensor by name, dense and apart, as ``safetensors.torch.save_file`` takes them."""
        return {name: getattr(self, name).detach().clone().contiguous() for name in DTYPES}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Copy what `state_dict` returned into this state of the same size, on any device.

        Raises:
            ValueError, TypeError: naming the entry, what was expected and what was got; nothing was written.
        """
        if set(state) != set(DTYPES):
            raise ValueError(f"state: expected the entries {sorted(DTYPES)}, got {sorted(map(str, state))[:20]}")
        for name, dtype in DTYPES.items():
            value, own = state[name], getattr(self, name)
            if not isinstance(value, torch.Tensor) or value.dtype != dtype:
                raise TypeError(f"state: {name}: expected a {dtype} tensor, got {getattr(value, 'dtype', type(value))}")
            if value.shape != own.shape:
                raise ValueError(f"state: {name}: expected {list(own.shape)}, got {list(value.shape)}")
        weight, probs, best = state["weight"], state["probs"], state["best"]
        total = probs.sum(1)
        for name, fits, what in (
            ("weight", weight.isfinite() & (weight >= 0), "finite numbers of at least 0"),
            ("probs", probs.isfinite() & (probs >= 0) & (probs <= 1), "numbers from 0 to 1"),
            ("probs", ((total - 1).abs() < 1e-6) | (total == 0), "a sum of 1 (0 for a pool without prompts)"),
            ("best", (best >= -1) & (best < self.num_prompts), f"numbers from -1 to {self.num_prompts - 1}"),
            ("effective", state["effective"].isfinite(), "finite numbers"),
        ):
            if not bool(fits.all()):
                raise ValueError(f"state: {name}: expected {what}, got others")
        # A state whose tensors cannot all be written must not be written by half.
        for name in DTYPES:
            own = getattr(self, name)
            if own.requires_grad or not own.is_contiguous():
                raise ValueError(f"{name}: expected this state's tensor dense and without gradient, got another")
        for name in DTYPES:
            getattr(self, name).copy_(state[name])
