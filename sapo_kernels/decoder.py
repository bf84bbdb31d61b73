"""Run an unmodified transformers decoder over token tries or padded batches and read log-probabilities.

Two hooks do everything. The *attention function* ``sapo_trie`` replaces each layer's attention for the length of a call
and carries the keys and values of the current path from pass to pass. A *pre-hook on the output head* takes the hidden
states of the response rows, turns them into log-probabilities without keeping logits, and lets the model go on with one
row: the model's own logits of that row then check the head's transform in every pass, for free.
"""

from __future__ import annotations

import contextlib
import threading
from dataclasses import dataclass, field

import torch
from torch import nn

from . import support
from .guard import BUSY
from .linear_logprob.torch import chunk_rows, logprob_of_logits
from .tree_attention.api import tree_attention
from .trie import TriePass

ATTENTION_NAME = "sapo_trie"
# Arguments of an attention call that change its mathematics in ways the trie does not know.
FOREIGN_ARGUMENTS = ("position_bias", "indices", "block_indices", "sinks", "head_mask", "encoder_hidden_states")

_running = threading.local()


class NotTreeable(RuntimeError):
    """The model asked its attention for something that the tree road cannot give; the message says what."""


@dataclass
class Batch:
    """What one forward scores: inputs, the rows to read and what each row predicts.

    input_ids: [B, L]. rows: [R] indices into the B * L flattened rows. target_ptr, targets: as in `TriePass`.
    attention_mask: [B, L] for the padded road, None for a trie pass. trie: the pass, None for the padded road.
    """

    input_ids: torch.Tensor
    rows: torch.Tensor
    target_ptr: torch.Tensor
    targets: torch.Tensor
    attention_mask: torch.Tensor | None = None
    trie: TriePass | None = None

    @classmethod
    def of_pass(cls, trie: TriePass) -> Batch:
        return cls(trie.input_ids[None], trie.rows, trie.target_ptr, trie.targets, trie=trie)


@dataclass
class _TreeState:
    """Attention state of one pass: the layers' carried keys and values, by order of attention calls.

    The order of calls, not the layer, is the key: some models attend twice in a layer.
    """

    trie: TriePass
    impl: str
    carried: dict[int, tuple[torch.Tensor, torch.Tensor]]
    carry_on: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    calls: int = 0
    windowed: int = 0


def trie_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, sliding_window=None,
                   softcap=None, s_aux=None, **kwargs):  # fmt: skip
    """The function behind transformers' attention interface: query [1, Hq, T, D] -> ([1, T, Hq, Dv], None)."""
    state: _TreeState | None = getattr(_running, "state", None)
    if state is None:
        raise RuntimeError(BUSY)
    for name in FOREIGN_ARGUMENTS:
        if kwargs.get(name) is not None:
            raise NotTreeable(f"its attention takes {name}")
    if kwargs.get("is_causal") is False:
        raise NotTreeable("its attention is not causal")
    fresh = len(state.trie.input_ids)
    ours = attention_mask is not None and not attention_mask.is_floating_point() and attention_mask.dim() == 4
    if not ours or attention_mask.shape[-2:] != (fresh, 2):
        raise NotTreeable("it builds its own attention mask")
    if query.shape[0] != 1 or query.shape[2] != fresh or key.shape[2] != fresh:
        raise NotTreeable(f"its attention sees {key.shape[2]} keys for {fresh} tokens")

    call, state.calls = state.calls, state.calls + 1
    state.windowed += sliding_window is not None
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    if not q.dtype == k.dtype == v.dtype:
        # Under autocast rotary embeddings leave q and k in float32; the plain attention would cast them too.
        common = torch.get_autocast_dtype(q.device.type) if torch.is_autocast_enabled(q.device.type) else v.dtype
        q, k, v = q.to(common), k.to(common), v.to(common)
    if state.trie.carried:
        before = state.carried[call]
        k, v = torch.cat([before[0], k]), torch.cat([before[1], v])
    plan = state.trie.to(q.device)
    if len(plan.carry_index):
        state.carry_on[call] = (k[plan.carry_index], v[plan.carry_index])
    if sliding_window is not None and sliding_window <= 0:
        sliding_window = None
    out = tree_attention(
        q, k, v, plan, scale=scaling if scaling is not None else getattr(module, "scaling", None),
        window=sliding_window, softcap=softcap, sinks=s_aux, impl=state.impl,
    )  # fmt: skip
    return out[None], None


@contextlib.contextmanager
def trie_attention_installed(inner: nn.Module):
    """Switch the text decoder to `trie_attention` for the block; raises NotTreeable if the switch does not take."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION_NAME, trie_attention)
    configs, waiting = {}, [getattr(module, "config", None) for module in inner.modules()]
    while waiting:
        config = waiting.pop()
        if hasattr(config, "_attn_implementation_internal") and id(config) not in configs:
            configs[id(config)] = config
            # The switch reaches parts of a configuration that no module holds.
            waiting.extend(getattr(config, name, None) for name in config.sub_configs)
    before = [(c, c._attn_implementation_internal) for c in configs.values()]
    text = support.text_config(inner)
    try:
        nested = text is not inner.config and "text_config" in getattr(inner.config, "sub_configs", {})
        inner.set_attn_implementation({"text_config": ATTENTION_NAME} if nested else ATTENTION_NAME)
        if text._attn_implementation != ATTENTION_NAME:
            raise NotTreeable("its attention implementation cannot be switched")
        yield
    finally:
        for config, name in before:
            config._attn_implementation_internal = name


class HeadReader:
    """Pre-hook on the output head: log-probabilities of the response rows, one row for the model itself.

    ``through_model`` leaves all rows to the model and reads its logits: slower and exact whatever the head does.
    """

    def __init__(self, inner: nn.Module, impl: str, through_model: bool = False):
        self.head, self.impl, self.through_model = inner.get_output_embeddings(), impl, through_model
        self.scale, self.softcap = support.head_transform(inner)
        self.vocabulary = support.vocabulary_size(inner)
        self.dtype = torch.float32
        self.worst: torch.Tensor | None = None
        self._batch: Batch | None = None
        self._logprob: torch.Tensor | None = None
        self._expected: torch.Tensor | None = None
        self._own_call = False
        self._thread = threading.get_ident()

    @contextlib.contextmanager
    def installed(self):
        """Hook the head for the block, for this thread."""
        self._thread = threading.get_ident()
        handle = self.head.register_forward_pre_hook(self._hook)
        try:
            yield self
        finally:
            handle.remove()

    def read(self, call, batch: Batch) -> torch.Tensor:
        """Run ``call()``, a forward over `batch`, and return the log-probability [P] of each target."""
        self._batch, self._logprob, self._expected = batch, None, None
        try:
            logits = call().logits
            if self._logprob is None and self._expected is None:
                raise RuntimeError("model: its forward does not go through its output embeddings; it cannot be scored")
            if self.through_model:
                rows = logits.reshape(-1, logits.shape[-1])
                return logprob_of_logits(rows, batch.targets.to(rows.device), batch.target_ptr.to(rows.device))[0]
            if len(batch.rows):
                self._check(logits)
            return self._logprob
        finally:
            self._batch = self._logprob = self._expected = None

    def _hook(self, module, args):
        if threading.get_ident() != self._thread:
            raise RuntimeError(BUSY)
        if self._own_call or self._batch is None:
            return None
        batch, hidden = self._batch, args[0]
        flat = hidden.reshape(-1, hidden.shape[-1])
        rows = flat[batch.rows.to(hidden.device)]
        # Asked here, inside the forward: trainers wrap it in autocast and hand the logits out in float32.
        autocast = torch.is_autocast_enabled(rows.device.type)
        self.dtype = torch.get_autocast_dtype(rows.device.type) if autocast else rows.dtype
        if self.through_model:
            self._expected = rows.new_empty(0)
            return (rows[None], *args[1:])
        if not len(batch.rows):
            self._logprob = torch.empty(0, device=hidden.device)
            return (flat[None, :1], *args[1:])
        self._logprob, self._expected = self._project(rows, batch)
        return (rows[None, :1], *args[1:])

    def _project(self, rows: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probability [P] of the targets and log-sum-exp of the first row."""
        targets, pointer = batch.targets.to(rows.device), batch.target_ptr.to(rows.device)
        if not support.plain_head(self.head, rows, own_hooks=1):
            self._own_call = True
            try:
                return self._through_module(rows, targets, pointer)
            finally:
                self._own_call = False
        weight, bias = self.head.weight, self.head.bias
        if torch.is_autocast_enabled(rows.device.type):
            dtype = torch.get_autocast_dtype(rows.device.type)
        else:
            dtype = weight.dtype
        rows, weight = rows.to(dtype), weight.to(dtype)
        # The operator itself: the public function would wait for the device to check ids that were checked on the host.
        logprob, lse = torch.ops.sapo_kernels.linear_logprob(
            rows.contiguous(), weight if weight.stride(-1) == 1 else weight.contiguous(), targets, pointer,
            None if bias is None else bias.to(dtype), self.scale, self.softcap, self.impl,
        )  # fmt: skip
        return logprob, lse[:1]

    def _through_module(self, rows, targets, pointer):
        """A head that is more than a matrix (LoRA, quantised): the module itself, on response rows, chunk by chunk."""
        step = chunk_rows(self.vocabulary, rows.device.type)
        edges = [*range(0, len(rows), step), len(rows)]
        cuts, parts = pointer[torch.tensor(edges, device=pointer.device)].tolist(), []
        for i, (first, stop) in enumerate(zip(edges, edges[1:])):  # noqa: B905 (pairs of neighbours)
            logits = self.head(rows[None, first:stop])[0]
            mine, begin = targets[cuts[i] : cuts[i + 1]], pointer[first : stop + 1] - cuts[i]
            parts.append(logprob_of_logits(logits, mine, begin, self.scale, self.softcap))
        return torch.cat([p for p, _ in parts]), parts[0][1][:1]

    def _check(self, logits: torch.Tensor) -> None:
        """Remember the largest distance of our log-sum-exp from the model's; reading it would wait for the device."""
        own = torch.logsumexp(logits.reshape(-1, logits.shape[-1])[:1].float(), -1)
        low = self.dtype in (torch.bfloat16, torch.float16)
        slack = 0.05 + 0.02 * own.abs() if low else 1e-3 + 1e-4 * own.abs()
        # NaN on both sides is a model with NaN weights: reported by cell, not here.
        expected = self._expected.to(own.device, torch.float32)
        both = own.isfinite() & expected.isfinite()
        excess = torch.where(both, (own - expected).abs() / slack, torch.zeros_like(own)).amax()
        self.worst = excess if self.worst is None else torch.maximum(self.worst, excess.to(self.worst.device))

    def agrees(self) -> bool:
        """Whether every pass so far gave the model's own log-sum-exp within rounding."""
        return self.worst is None or float(self.worst) <= 1.0


class TreeRunner:
    """Runs the passes of one trie in order, carrying each layer's keys and values of the current path."""

    def __init__(self, model: nn.Module, reader: HeadReader, impl: str, device: torch.device):
        self.model, self.reader, self.impl, self.device = model, reader, impl, device
        self.windowed = 0
        self._carried: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def run(self, trie: TriePass) -> torch.Tensor:
        """Log-probability [P] of the pass's targets. If it raises, the carried keys are those of the pass before."""
        plan = trie.to(self.device)
        state = _TreeState(plan, self.impl, self._carried)
        # A 4-D integer mask reaches every attention layer untouched and keeps the model from building one of its own.
        carrier = torch.zeros(1, 1, len(plan.input_ids), 2, dtype=torch.int32, device=self.device)
        _running.state = state
        try:
            logprob = self.reader.read(
                lambda: self.model(
                    input_ids=plan.input_ids[None],
                    position_ids=plan.position[None, plan.carried :].long(),
                    attention_mask=carrier,
                    use_cache=False,
                    return_dict=True,
                ),
                Batch.of_pass(plan),
            )
        finally:
            _running.state = None
        if not state.calls:
            raise NotTreeable("it never calls transformers' attention interface")
        self._carried, self.windowed = state.carry_on, state.windowed
        return logprob


def run_padded(model: nn.Module, reader: HeadReader, batch: Batch, device: torch.device) -> torch.Tensor:
    """Log-probability [P] of the targets of a right-padded batch, by the model's own attention."""
    mask = batch.attention_mask.to(device)
    return reader.read(
        lambda: model(input_ids=batch.input_ids.to(device), attention_mask=mask, use_cache=False, return_dict=True),
        batch,
    )
