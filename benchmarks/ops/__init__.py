"""The operations of `benchmarks.registry.OPS`, a module each; importing this registers them all."""

from . import accumulate, end_to_end, linear_logprob, planner, reweight, tree_attention, verification

__all__ = ["accumulate", "end_to_end", "linear_logprob", "planner", "reweight", "tree_attention", "verification"]
