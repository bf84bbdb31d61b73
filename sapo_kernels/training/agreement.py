"""Whether a model trains over a trie as on padded rows: known differences, then a comparison."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..scoring import model_support
from ..scoring.attention import NotTreeable, own_attention
from ..scoring.fingerprint import configurations
from ..scoring.foreign_code import foreign_code, foreign_in_training
from ..scoring.model_state import is_out_of_memory, state_kept
from ..scoring.verification import exact_products
from ..widened import LOW
from .trie_batch import IGNORED, TrieBatch, padded_rows

# Of a padded batch, by name.
Rows = dict[str, torch.Tensor]
# Difference of all gradients together, relative to their norm, and of the loss: float32; and in low precision at most.
TOLERANCE, LOW_TOLERANCE = 1e-4, 0.1
# Times the plain model's own error in low precision; two independent ones of a size differ by 1.4.
NOISE = 3.0
# What the gradients may differ by where rounding cannot be measured.
UNMEASURED = 0.05
# Sequences that are compared.
MOST_COMPARED = 4
# How much longer than the longest sequence of a batch the longest one that is compared is.
FURTHER = 1.25
# What trained parameters that are zero are filled with at most.
_FILL = 0.02
# Elements of a buffer that a forward may write to; larger ones are weights.
_STATE = 1 << 16
_DROPOUTS = frozenset(
    (torch.dropout, *(value for name, value in vars(nn.functional).items() if "dropout" in name and callable(value)))
)


def refusal(model: nn.Module, inner: nn.Module, longest: int, loss: Any = None) -> str | None:
    """Why a model is known to train differently over a trie of sequences of `longest` tokens, or None.

    loss: its own function of logits and labels, where that counts.
    Whatever looks at other sequences of a batch, or counts its tokens, would see each shared token once.
    """
    config = model_support.text_config(inner)
    if foreign := foreign_code(model, configurations(model)) or foreign_in_training(model, loss):
        return f"{foreign} is not code of a known library and may look at other sequences of its batch"
    if any(module._compiled_call_impl is not None or "_orig_mod" in module._modules for module in model.modules()):
        return "it is compiled, and every trie has a different shape"
    if reason := model_support.too_long(inner, longest) or model_support.fastest_path(model, inner, longest)[1]:
        return reason
    if getattr(config, "output_router_logits", False):
        return "its loss has a term of its routers over all tokens of a batch (output_router_logits)"
    if getattr(config, "attention_dropout", 0.0) and inner.training:
        return f"its attention has a dropout of {config.attention_dropout}"
    for name, module in model.named_modules():
        if module.training and vars(module).get("neftune_noise_alpha"):
            return f"the noise that {name!r} adds depends on the size of a batch (neftune_noise_alpha)"
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None):
            return f"the batch norm {name!r} looks at all tokens of a batch"
    return None


def reach(inner: nn.Module, longest: int) -> int:
    """The length that is compared with a batch of sequences of up to `longest` tokens.

    It is longer where that changes nothing known, so that growing batches need few comparisons.
    """
    further = int(longest * FURTHER)
    known = model_support.too_long(inner, further) or model_support.length_dependent(inner, further)
    return longest if known else further


def compare(
    parameters: Sequence[torch.Tensor],
    plain: Callable[[], torch.Tensor],
    packed: Callable[[], torch.Tensor],
    exact: Callable[[], torch.Tensor],
) -> str | None:
    """Why two ways to compute losses, and the gradients of their sum, do not agree; None if they do.

    Args:
        parameters: the gradients with respect to these.
        plain, packed: losses [N], nats, or one.
        exact: the plain losses once more, to be run with every operation in float32: where precision is low, what
            rounding makes of them is the measure. Called when needed.
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


def _in_float32(parameters: Sequence[torch.Tensor], exact: Callable[[], torch.Tensor]):
    """`_run` of the plain losses with every operation in float32, outside an autocast around it.

    None where nothing is in low precision, or where kernels know nothing else. Gradients are None where parameters are
    in low precision themselves: autograd insists on their dtype.
    """
    kinds = {p.device.type for p in parameters} or {"cpu"}
    low = torch.get_float32_matmul_precision() != "highest" or any(map(torch.is_autocast_enabled, kinds - {"meta"}))
    whole = not any(p.dtype in LOW for p in parameters)
    # Weights that autocast has in low precision already would stay so.
    torch.clear_autocast_cache()
    with contextlib.ExitStack() as stack:
        for kind in kinds - {"meta"}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        mode = stack.enter_context(exact_products())
        stack.enter_context(torch.set_grad_enabled(whole and torch.is_grad_enabled()))
        try:
            losses, gradients = _run(parameters if whole else (), exact)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            return None
    return (losses, gradients if whole else None) if low or mode.met else None


def _apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference of two losses, relative where they are above 1 nat."""
    return float(((one - other).abs() / other.abs().clamp(min=1.0)).max())


class OwnLoss:
    """The model's own loss of padded rows, and the same over their trie, as `differs` compares them.

    Losses of single tokens stand beside it where the model gives them: one number is no measure of rounding.

    Args:
        logprobs: of a trie, as `tree_logprobs`.
        options: what the model is called with beside the rows. count: a number of tokens that it divides by, or None.
    """

    def __init__(self, model, inner, logprobs: Callable[[TrieBatch], torch.Tensor], options=None, count=None):
        self.model, self.logprobs, self.count, self.tokens = model, logprobs, count, False
        self.options = {**model_support.forward_options(inner), **(options or {})}

    def plain(self, rows: Rows) -> torch.Tensor:
        labels, asked = rows["labels"][:, 1:], dict(self.options)
        if self.count is not None:
            # Another number than the mean is over, of the caller's kind.
            asked["num_items_in_batch"] = self.count * 0 + 2 * int((labels != IGNORED).sum())
        found = self.model(**rows, **asked)
        tokens = None
        if found.get("logits") is not None:
            tokens = _losses(found["logits"], labels)
        elif found.get("log_probs") is not None:
            tokens = -found["log_probs"][(labels != IGNORED).to(found["log_probs"].device)]
        self.tokens = tokens is not None
        return _joined(found["loss"], tokens)

    def packed(self, part: TrieBatch, rows: Rows) -> torch.Tensor:
        losses = -self.logprobs(part)
        loss = losses.mean() if self.count is None else losses.sum() / (2 * len(losses))
        return _joined(loss, losses if self.tokens else None)


def _joined(loss: torch.Tensor, tokens: torch.Tensor | None) -> torch.Tensor:
    """One loss as often as there are tokens, so that it weighs as much as theirs in the gradient of a sum."""
    return loss[None] if tokens is None else torch.cat([loss.to(tokens.device).expand(len(tokens)), tokens])


def differs(
    model: nn.Module,
    inner: nn.Module,
    batch: TrieBatch,
    plain: Callable[[Rows], torch.Tensor],
    packed: Callable[[TrieBatch, Rows], torch.Tensor],
) -> str | None:
    """Why losses over a trie, or their gradients, are not those of padded rows; None if they are.

    Seen on up to four sequences of `batch`. Every module is in its own mode; dropout alone is off. Random numbers are
    the same on both sides, and the process's own are not drawn. What a forward leaves in the model is undone.

    Args:
        plain: losses, [N] or one, nats, of rows padded on the right: input_ids, attention_mask, labels [B, L].
        packed: the same over the trie of these rows.
    """
    sequences = batch.sequences()
    rows = [sequences[c] for c in chosen([len(context) + len(response) for context, response in sequences])]
    device = model_support.input_device(inner)
    part = TrieBatch.pack(*zip(*rows, strict=True))
    padded = {name: value.to(device) for name, value in padded_rows(rows).items()}
    parameters = [p for p in model.parameters() if p.requires_grad] if torch.is_grad_enabled() else []
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}

    with comparable(model) as put_back:

        def fresh(losses_of):
            put_back()
            with torch.random.fork_rng(devices):
                return losses_of()

        def run_plain():
            with own_attention(inner):
                return fresh(lambda: plain(padded))

        return compare(parameters, run_plain, lambda: fresh(lambda: packed(part, padded)), run_plain)


@contextlib.contextmanager
def comparable(model: nn.Module):
    """No dropout, layers run again or hooks of parameters; yields what undoes the changes of a forward.

    Trained parameters that are zero, half of a fresh LoRA, would hide the gradients of the other half: they are not.
    """
    # Theirs are gradients of the training alone, of which they may keep something.
    tables = [t for p in model.parameters() for t in (p._backward_hooks, p._post_accumulate_grad_hooks) if t]
    hooks = [(table, dict(table)) for table in tables]
    again = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False) is True]
    with torch.no_grad():
        trained = [p.to_local() if hasattr(p, "to_local") else p for p in model.parameters() if p.requires_grad]
        # Not seen by graphs that wait for their backward pass.
        zeros = [p.data for p in trained if p.device.type != "meta" and not p.any()]
    try:
        for table, _ in hooks:
            table.clear()
        for p in zeros:
            p.copy_(_FILL * torch.arange(p.numel(), device=p.device).square().sin().view(p.shape))
        for module in again:
            module.gradient_checkpointing = False
        with state_kept(model.modules(), _STATE) as put_back, _NoDropout():
            yield put_back
    finally:
        for p in zeros:
            p.zero_()
        for table, own in hooks:
            table.update(own)
        for module in again:
            module.gradient_checkpointing = True


class _NoDropout(TorchFunctionMode):
    """Dropout of modules and functions passes everything on, in training mode too."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _DROPOUTS:
            return args[0] if args else kwargs["input"]
        return func(*args, **kwargs)


def chosen(lengths: Sequence[int]) -> list[int]:
    """Up to four sequences to compare: the longest, the shortest, the first and the last."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return sorted({order[0], order[-1], 0, len(lengths) - 1})[:MOST_COMPARED]


def plain_losses(model: nn.Module, inner: nn.Module, rows: Rows) -> torch.Tensor:
    """[N] of the labels of padded rows as the model's logits have them, nats."""
    inputs = {name: value for name, value in rows.items() if name != "labels"}
    return _losses(model(**inputs, **model_support.forward_options(inner)).logits, rows["labels"][:, 1:])


def _losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """[N] cross-entropies of labels [B, L - 1] that are none to be ignored; logits [B, L, V]."""
    labels = labels.to(logits.device)
    kept = labels != IGNORED
    logits = logits[:, :-1][kept]
    return nn.functional.cross_entropy(
        logits if logits.dtype == torch.float64 else logits.float(), labels[kept], reduction="none"
    )


def _run(parameters: Sequence[torch.Tensor], losses_of: Callable[[], torch.Tensor]):
    """(losses on the CPU, gradients of their sum); ``.grad`` is restored afterwards."""
    losses = losses_of()
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
