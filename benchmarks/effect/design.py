"""What the effect experiment on the tiny base ran; commit aa0c360 has the code of the runs."""

from __future__ import annotations

from tools.tiny_base.corpus import SEQUENCE

POLARITY, ODD_ONE, _EXTRACT, PASSIVE = SEQUENCE
ORDERS = {"a": (POLARITY, ODD_ONE, PASSIVE), "b": (PASSIVE, ODD_ONE, POLARITY)}
METHODS = ("lora-inc", "o-lora")
POLICIES = ("original", "sapo", "random", "worst", "sample")
# SAPO that scores again inside a task; "sapo" itself scores once before each task, as the paper does.
AGAIN = "sapo-again"
SEEDS = (101, 102, 103, 104, 105)
SINGLE_SEEDS = (101, 102)
