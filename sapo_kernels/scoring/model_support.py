"""What a class of model allows: which paths it can take, and how its head turns hidden states into logits.

Nothing here is trusted alone: every call compares some of its own cells with the plain model (verification.py).
"""

from __future__ import annotations

import inspect

import torch
from torch import nn

from .foreign_code import foreign_module

ATTENTION_KINDS = {"full_attention", "sliding_attention"}
ROPE_BY_LENGTH = ("dynamic", "longrope")
POSITION_TABLES = {
    "wpe", "embed_positions", "position_embeddings", "position_embedding", "positions_embed", "pos_encoding",
}  # fmt: skip


def unwrap(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """(what to call, the transformers causal LM inside).

    Wrappers that only add gradient synchronisation or compilation are peeled off, unless they have hooks or code of the
    user's own; PEFT's stay, they may act in forward.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a transformers causal LM or a PeftModel of one, got a {type(model).__name__}")
    inner, bare = model, True
    while (below := _below(inner)) is not None:
        bare = bare and not (inner._forward_hooks or inner._forward_pre_hooks) and foreign_module(inner) is None
        inner = below
        if bare:
            model = below
    if type(inner).__module__.partition(".")[0] == "peft":
        active = getattr(inner, "active_peft_config", None)
        if getattr(active, "is_prompt_learning", False):
            raise ValueError(
                f"model: {active.peft_type} adds virtual tokens in front of the text; "
                "prompt-learning adapters cannot be scored"
            )
        while type(inner).__module__.partition(".")[0] == "peft":
            # A PeftModel holds a tuner, which holds the model; a PeftMixedModel too; a tuner may be given bare.
            below = inner._modules.get("base_model") or inner._modules.get("model")
            if below is None:
                break
            inner = below
    if not hasattr(inner, "config") or not hasattr(inner, "get_output_embeddings"):
        raise TypeError(f"model: expected a transformers causal LM or a PeftModel of one, got {type(model).__name__}")
    if getattr(inner.config, "is_encoder_decoder", False):
        raise TypeError(f"model: expected a decoder-only causal LM, got the encoder-decoder {type(inner).__name__}")
    if inner.get_output_embeddings() is None:
        raise TypeError(f"model: {type(inner).__name__} has no output embeddings, so no log-probabilities")
    return model, inner


def _below(module: nn.Module) -> nn.Module | None:
    """What a compiled or parallel module wraps."""
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return module.module
    return module._modules.get("_orig_mod")


def forward_options(inner: nn.Module) -> dict:
    """What every forward is asked for beside its inputs: no losses of routers, which know no trie."""
    asked = {"use_cache": False, "return_dict": True}
    if "output_router_logits" in inspect.signature(inner.forward).parameters:
        asked["output_router_logits"] = False
    return asked


def text_config(inner: nn.Module):
    """The configuration of the text decoder."""
    config = inner.config
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def vocabulary_size(inner: nn.Module) -> int:
    """Ids that a model can both read and predict; some families have more input rows than logits."""
    embedding = inner.get_input_embeddings()
    # Adapters wrap the embedding and need not pass its attributes on.
    tables = [module for module in embedding.modules() if isinstance(module, nn.Embedding)]
    rows = tables[0].num_embeddings if tables else int(embedding.weight.shape[0])
    return min(rows, int(getattr(inner.get_output_embeddings(), "out_features", rows)))


def fastest_path(model: nn.Module, inner: nn.Module, longest: int) -> tuple[str, str | None]:
    """(the fastest path, see paths.py, that sequences of up to `longest` tokens may take; why not a faster one)."""
    if name := next((name for name, module in inner.named_modules() if quantises_at_once(module)), None):
        return "alone", f"{name!r} quantises all activations of a forward by one scale"
    if reason := length_dependent(inner, longest):
        return "equal", reason
    if padding_matters(inner):
        return "equal", f"{type(inner).__name__} selects attention keys by the length of the batch"
    if reason := adapter_by_row(model) or tree_refusal(inner):
        return "padded", reason
    return "tree", None


def rope_sets(config) -> list[dict]:
    """All sets of rope parameters of a configuration; some families keep one for each layer type."""
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    nested = [p for p in parameters.values() if isinstance(p, dict)]
    return nested or [parameters]


def length_dependent(inner: nn.Module, longest: int) -> str | None:
    """Why a token's rotary angles depend on the longest sequence of its forward, or None if they do not.

    The modules are asked as well as the configuration: they are what computes.
    """
    config = text_config(inner)
    limits = [
        getattr(config, "original_max_position_embeddings", None),
        getattr(config, "max_position_embeddings", None),
    ]
    found = [
        (parameters.get("rope_type") or parameters.get("type") or "default",
         [parameters.get("original_max_position_embeddings"), *limits])
        for parameters in rope_sets(config)
    ]  # fmt: skip
    for module in inner.modules():
        kinds = module.__dict__.get("rope_type")
        for kind in kinds.values() if isinstance(kinds, dict) else [kinds]:
            own = [value for name, value in vars(module).items() if name.endswith("original_max_seq_len")]
            found.append((str(kind), [*own, *limits]))
    for kind, originals in found:
        original = min((value for value in originals if value), default=0)
        # At exactly the original length a dynamic rope that has grown before stays grown.
        if any(name in kind for name in ROPE_BY_LENGTH) and longest >= max(original, 1):
            return f"rope type {kind!r} with sequences of {longest} tokens, {original} originally"
    return None


def quantises_at_once(module: nn.Module) -> bool:
    """Whether a module of torch.ao looks at all tokens of its forward for one scale, or may keep what it has seen."""
    return type(module).__module__.startswith(("torch.ao.nn.", "torch.ao.quantization."))


def padding_matters(inner: nn.Module) -> bool:
    """Whether attention picks its keys by a top-k: with ties the pick depends on the length of the batch."""
    config = text_config(inner)
    kinds = " ".join(map(str, getattr(config, "layer_types", None) or []))
    return bool(getattr(config, "index_topk", None)) or "sparse" in kinds or "index" in kinds


def too_long(inner: nn.Module, longest: int) -> str | None:
    """Why sequences of `longest` tokens do not fit a table of position embeddings, or None if they do.

    On a GPU an index past the table would end the process's use of the device, so this is asked first.
    """
    limit = getattr(text_config(inner), "max_position_embeddings", None)
    tables = [name for name, module in inner.named_modules() if isinstance(module, nn.Embedding)]
    tables += [name for name, _ in inner.named_buffers()]
    bounded = any(name.rpartition(".")[2] in POSITION_TABLES for name in tables)
    if bounded and limit is not None and longest > limit:
        return f"{type(inner).__name__} has {limit} positions, the longest sequence needs {longest}"
    return None


def adapter_by_row(model: nn.Module) -> str | None:
    """Why an adapter acts by the place of its tokens in a row of the batch, or None.

    Invocation tokens may be in few cells, which verification need not meet.
    """
    for name, config in (getattr(model, "peft_config", None) or {}).items():
        if getattr(config, "alora_invocation_tokens", None):
            return (
                f"adapter {name!r} is an activated LoRA, which begins at its invocation tokens in each row of a batch"
            )
    return None


def input_device(inner: nn.Module) -> torch.device:
    """Where token ids go. Offloaded weights rest on "meta" and visit the device that accelerate's hook names.

    Raises:
        ValueError: there is no such hook, and no weights.
    """
    embedding = inner.get_input_embeddings()
    visits = getattr(getattr(embedding, "_hf_hook", None), "execution_device", None)
    device = embedding.weight.device if visits is None else torch.device(visits)
    if device.type == "meta":
        raise ValueError("model: expected loaded weights, got an embedding on the meta device, which holds none")
    return device


def tree_refusal(inner: nn.Module) -> str | None:
    """Why the tree path is closed to this class of model, or None; verification decides the rest."""
    name, config = type(inner).__name__, text_config(inner)
    if not getattr(inner, "_can_set_attn_implementation", lambda: False)():
        return f"{name} does not go through transformers' attention interface"
    if getattr(inner, "_is_stateful", False):
        return f"{name} carries state from token to token"
    kinds = set(getattr(config, "layer_types", None) or []) - ATTENTION_KINDS
    if kinds:
        return f"{name} has layers of type {', '.join(sorted(map(str, kinds)))}"
    if "position_ids" not in inspect.signature(inner.forward).parameters:
        return f"{name} takes no position_ids"
    if getattr(config, "model_type", "").startswith("llama4") and getattr(config, "attn_temperature_tuning", True):
        return f"{name} scales queries by their place in the batch"
    return None


def head_transform(inner: nn.Module) -> tuple[float, float | None]:
    """(scale, softcap) between the head's matrix product and the logits.

    The same attribute means different things in different families, hence the table. A family that is missing here is
    found out by the check against the model's own logits and scored through them.
    """
    config = text_config(inner)
    kind = getattr(config, "model_type", "")
    scale, softcap = 1.0, getattr(config, "final_logit_softcapping", None)
    if kind.startswith("cohere"):
        scale = getattr(config, "logit_scale", None) or 1.0
    elif kind.startswith("granite"):
        scale = 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
    elif kind.startswith("hyperclovax"):
        scale = getattr(config, "logits_scaling", None) or 1.0
    elif kind.startswith("falcon_h1"):
        scale = getattr(config, "lm_head_multiplier", None) or 1.0
    elif kind == "recurrent_gemma":
        softcap = getattr(config, "logits_soft_cap", None)
    return float(scale), softcap


def plain_head(head: nn.Module, hidden: torch.Tensor | None = None, own_hooks: int = 0) -> bool:
    """Whether ``head(h)`` is exactly ``h @ head.weight.T + head.bias``, for `hidden` if it is given.

    Adapters replace the module (PEFT's class is also called Linear), quantisers change the weight's type, offloading
    and other hooks act around it; all of them go through the module instead. `own_hooks` are the caller's own.
    """
    patched = "forward" in vars(head) or head._forward_hooks or len(head._forward_pre_hooks) > own_hooks
    if type(head) is not nn.Linear or patched or nn.utils.parametrize.is_parametrized(head):
        return False
    weight = head.weight
    return (
        type(weight) in (nn.Parameter, torch.Tensor)
        and weight.is_floating_point()
        and weight.dim() == 2
        and (hidden is None or (weight.shape[1] == hidden.shape[-1] and weight.device == hidden.device))
        and weight.dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    )
