"""Whether a model trains over a trie as on padded rows: known differences, then a comparison."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import torch
from torch import nn

from ..scoring import model_support
from ..scoring.attention import NotTreeable, own_attention
from ..scoring.fingerprint import configurations
from ..scoring.foreign_code import foreign_code
from ..scoring.model_state import evaluation_mode, is_out_of_memory, rope_kept
from ..scoring.verification import exact_products
from ..widened import LOW
from .trie_batch import TrieBatch, padded_rows

# Difference of all gradients together, relative to their norm, and of the loss: float32; and in low precision at most.
TOLERANCE, LOW_TOLERANCE = 1e-4, 0.1
# Times the plain model's own error in low precision; two independent ones of a size differ by 1.4.
NOISE = 3.0
# What the gradients may differ by where rounding cannot be measured.
UNMEASURED = 0.05
# Sequences that are compared.
MOST_COMPARED = 4


def refusal(model: nn.Module, inner: nn.Module, longest: int) -> str | None:
    """Why a model is known to train differently over a trie of sequences of `longest` tokens, or None.

    Whatever looks at other sequences of a batch, or counts its tokens, would see each shared token once.
    """
    config = model_support.text_config(inner)
    if foreign := foreign_code(model, configurations(model)):
        return f"{foreign} is not code of a known library and may look at other sequences of its batch"
    if any(module._compiled_call_impl is not None or "_orig_mod" in module._modules for module in model.modules()):
        return "it is compiled, and every trie has a different shape"
    if reason := model_support.too_long(inner, longest) or model_support.fastest_path(model, inner, longest)[1]:
        return reason
    if getattr(config, "output_router_logits", False):
        return "its loss has a term of its routers over all tokens of a batch (output_router_logits)"
    if getattr(config, "attention_dropout", 0.0) and inner.training:
        return f"its attention has a dropout of {config.attention_dropout}"
    return None


def compare(
    parameters: Sequence[torch.Tensor],
    plain: Callable[[], torch.Tensor],
    packed: Callable[[], torch.Tensor],
    exact: Callable[[], torch.Tensor | None],
) -> str | None:
    """Why two ways to compute losses, and the gradients of their sum, do not agree; None if they do.

    Args:
        parameters: the gradients with respect to these.
        plain, packed: losses [N], nats, or one.
        exact: the plain losses once more where precision is low, to be run with every operation in float32: what
            rounding makes of them is the measure. Called when needed; returns None where precision is not low.
    """
    own, gradients = _run(parameters, plain)
    try:
        got, got_gradients = _run(parameters, packed)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return str(error) if isinstance(error, NotTreeable) else f"{type(error).__name__}: {str(error)[:200]}"
    size = _norm(gradients)
    if not (own.isfinite().all() and size.isfinite()):
        return "its loss or gradients are not finite: nothing can be compared"
    apart, gradients_apart = _apart(got, own), _norm(_difference(got_gradients, gradients)) / size.clamp(min=1e-30)
    bound = gradient_bound = TOLERANCE
    again = None
    if not (apart <= bound and gradients_apart <= bound):
        again = _in_float32(parameters, exact)
    if again is not None:
        exact_losses, exact_gradients = again
        bound = min(max(NOISE * _apart(exact_losses, own), bound), LOW_TOLERANCE)
        gradient_bound = UNMEASURED
        if exact_gradients is not None:
            noise = _norm(_difference(exact_gradients, gradients)) / size.clamp(min=1e-30)
            gradient_bound = min(max(NOISE * float(noise), TOLERANCE), LOW_TOLERANCE)
    if not apart <= bound:
        return f"its losses over the trie differ from those on padded rows by {apart:.2g} nats"
    if not gradients_apart <= gradient_bound:
        return f"its gradients over the trie differ from those on padded rows by {gradients_apart:.2g} of their norm"
    return None


def _in_float32(parameters: Sequence[torch.Tensor], exact: Callable[[], torch.Tensor | None]):
    """`_run` of the plain losses with every operation in float32, outside an autocast around it.

    Gradients are None where parameters are in low precision themselves: autograd insists on their dtype.
    """
    # Weights that autocast has in low precision already would stay so.
    torch.clear_autocast_cache()
    kinds = {p.device.type for p in parameters} or {"cpu"}
    with contextlib.ExitStack() as stack:
        for kind in kinds - {"meta"}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(exact_products())
        if not any(p.dtype in LOW for p in parameters):
            return _run(parameters, exact)
        with torch.no_grad():
            found = _run((), exact)
    return None if found is None else (found[0], None)


def _apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference of two losses, relative where they are above 1 nat."""
    return float(((one - other).abs() / other.abs().clamp(min=1.0)).max())


def disagreement(
    model: nn.Module, inner: nn.Module, batch: TrieBatch, logprobs: Callable[[TrieBatch], torch.Tensor]
) -> str | None:
    """Why `logprobs` over the trie is not the plain model's, seen on up to four sequences of `batch`; None if it is."""
    sequences = batch.sequences()
    picked = chosen([len(context) + len(response) for context, response in sequences])
    part = TrieBatch.pack(*zip(*(sequences[c] for c in picked), strict=True))
    rows = [sequences[c] for c in picked]
    device = model_support.input_device(inner)
    parameters = [p for p in model.parameters() if p.requires_grad] if torch.is_grad_enabled() else []
    options = model_support.forward_options(inner)

    kinds = {p.dtype for p in model.parameters()}

    def plain(batch):
        # Under autocast the parameters do not tell what is computed in.
        handle = inner.get_output_embeddings().register_forward_hook(lambda _, args, output: kinds.add(output.dtype))
        try:
            with own_attention(inner):
                return _plain_losses(model, batch, device, options)
        finally:
            handle.remove()

    def exact():
        low = kinds.intersection(LOW) or torch.get_float32_matmul_precision() != "highest"
        return plain(rows) if low else None

    with evaluation_mode(model), rope_kept(inner):
        return compare(
            parameters,
            lambda: plain(rows),
            lambda: -logprobs(part),
            exact,
        )


def chosen(lengths: Sequence[int]) -> list[int]:
    """Up to four sequences to compare: the longest, the shortest, the first and the last."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return sorted({order[0], order[-1], 0, len(lengths) - 1})[:MOST_COMPARED]


def _plain_losses(model, rows, device, options) -> torch.Tensor:
    """[N] of the response tokens of a right-padded batch, nats."""
    inputs = {name: value.to(device) for name, value in padded_rows(rows).items() if name != "labels"}
    logits = model(**inputs, **options).logits
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return torch.cat(
        [
            nn.functional.cross_entropy(
                logits[i, len(context) - 1 : len(context) + len(response) - 1],
                torch.tensor(response, device=logits.device),
                reduction="none",
            )
            for i, (context, response) in enumerate(rows)
        ]
    )


def _run(parameters: Sequence[torch.Tensor], losses_of: Callable[[], torch.Tensor]):
    """(losses on the CPU, gradients of their sum); ``.grad`` is restored afterwards."""
    losses = losses_of()
    if losses is None:
        return None
    found = losses.detach().reshape(-1).double().cpu()
    if not parameters or not losses.requires_grad:
        return found, []
    # Sharded parameters get theirs from hooks of backward() alone.
    if not any(hasattr(p, "to_local") for p in parameters):
        return found, torch.autograd.grad(losses.sum(), parameters, allow_unused=True)
    before = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    try:
        losses.sum().backward()
        return found, [None if p.grad is None else p.grad.to_local() for p in parameters]
    finally:
        for p, grad in zip(parameters, before, strict=True):
            p.grad = grad


def _norm(gradients) -> torch.Tensor:
    squares = [g.detach().float().square().sum().double().cpu() for g in gradients if g is not None]
    return torch.stack(squares).sum().sqrt() if squares else torch.zeros((), dtype=torch.float64)


def _difference(one, other) -> list[torch.Tensor]:
    """A gradient that one side lacks counts as zero."""
    return [
        a if b is None else b if a is None else a.detach().float() - b.detach().float()
        for a, b in zip(one, other, strict=True)
        if a is not None or b is not None
    ]
