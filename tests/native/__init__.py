"""Tests and tools of the compiled modules."""

# What the compiled in-place operators and the planner are tested by, from `tests/` on.
NATIVE_TESTS = (
    "kernels/test_accumulate.py", "kernels/test_reweight.py", "kernels/test_in_place.py",
    "kernels/test_prompt_state.py", "kernels/test_planner.py", "kernels/test_passes.py",
    "kernels/test_trie.py", "native/test_native_attacks.py",
)  # fmt: skip
