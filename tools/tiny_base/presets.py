"""Sizes of the tiny base: what it is made of and how long it is trained."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """A configuration of the tiny base; `made_by.json` of a base names every field.

    `hidden`, `layers`, `heads` (of width hidden / heads), `feed_forward` and `vocabulary` are the shape of a Llama
    with tied embeddings. Training is `steps` updates of `batch` texts, AdamW at `learning_rate` with a linear warm-up
    of a twentieth and a linear decay to zero; in the last `taste_part` of the steps a share `taste` of the texts is
    from the tasks of the sequences. Texts longer than `max_tokens` are drawn again.
    """

    hidden: int
    layers: int
    heads: int
    feed_forward: int
    vocabulary: int
    steps: int
    batch: int
    learning_rate: float
    taste: float = 0.5
    taste_part: float = 0.2
    max_tokens: int = 160
    seed: int = 0


PRESETS = {
    # Ships with the package; about ten minutes on two cores.
    "default": Preset(128, 4, 4, 352, 2048, steps=3000, batch=24, learning_rate=3e-3),
    # Seconds; for tests of the script.
    "toy": Preset(32, 1, 2, 64, 384, steps=6, batch=4, learning_rate=3e-3, max_tokens=512),
}
