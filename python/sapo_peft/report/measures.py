"""The scores that a run may hold, and how each is written: ROUGE-L and exact match as per cent, loss in nats."""

from __future__ import annotations

from dataclasses import dataclass

from .markup import fixed, signed


@dataclass(frozen=True)
class Measure:
    """One score. scale: factor from the stored value to the one shown. top: largest stored value, None if unbounded."""

    title: str
    unit: str
    change_unit: str
    scale: float
    digits: int
    top: float | None
    lower_is_better: bool = False

    def level(self, value: float | None) -> str:
        """A score without its unit, so that columns line up."""
        return fixed(None if value is None else self.scale * value, self.digits)

    def change(self, value: float | None) -> str:
        """A difference of two scores, with its sign."""
        return signed(None if value is None else self.scale * value, self.digits)

    def figure(self, metric: str, value: float | None) -> str:
        """AP is a level; BWT and FWT are changes."""
        return self.level(value) if metric == "AP" else self.change(value)

    def interval(self, ends: tuple[float, float] | None) -> str:
        return f"{self.change(ends[0])} to {self.change(ends[1])}" if ends else "none"

    def meaning(self, metric: str) -> str:
        side = "above" if self.lower_is_better else "below"
        return {
            "AP": "mean over all tasks at the end",
            "BWT": f"change on earlier tasks, {side} 0 is forgetting",
            "FWT": "change on tasks not yet learnt",
        }[metric]


# In the order in which they are shown; the first that a run has is its headline.
MEASURES = {
    "rougeL": Measure("ROUGE-L", "%", "points", 100, 1, 1.0),
    "exact_match": Measure("Exact match", "%", "points", 100, 1, 1.0),
    "loss": Measure("Loss of the targets", "nats per token", "nats per token", 1, 3, None, lower_is_better=True),
}
METRICS = ("AP", "BWT", "FWT")
