"""Tiny random models of every decoder family, and the plain loop that judges their scores.

Models are built from configurations alone and seeded. Every parameter is random, also those that start at zero or one
(biases, norms, attention sinks, router corrections), so that nothing a path forgets can hide behind a neutral value.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

import sapo_kernels as sk
from tests.tolerances import TOLERANCES

TOLERANCE = TOLERANCES["token nll"].atol
WINDOW = 8  # tokens; every sequence of `cells` is several times as long
BASE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 300, "max_position_embeddings": 256,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ALTERNATING = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": WINDOW}
GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256}
MLA = {
    "num_key_value_heads": 4, "q_lora_rank": 12, "kv_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}  # fmt: skip
ROUTED = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 16, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
MINIMAX_M3 = {
    **LOCAL_EXPERTS, "dense_intermediate_size": 48, "shared_intermediate_size": 16, "index_n_heads": 2,
    "index_head_dim": 8, "index_block_size": 4, "index_topk_blocks": 2, "rotary_dim": 4,
}  # fmt: skip
MAMBA = {
    "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_expand": 2,
    "mamba_chunk_size": 16,
}  # fmt: skip
LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Attributes:
        name: the row's name, `model_type` transformers' own.
        path: "tree", "padded" or "alone", what ``impl="auto"`` must choose.
        uses: what the attention calls must be given: "window", "softcap", "sinks".
        config: settings over `BASE`; None removes one.
    """

    name: str
    model_type: str
    path: str
    uses: frozenset
    config: dict = field(hash=False)

    def __str__(self) -> str:
        return self.name


def _tree(name: str, *uses: str, of: str | None = None, **config) -> Family:
    return Family(name, of or name, "tree", frozenset(uses), config)


def _padded(name: str, *, of: str | None = None, path: str = "padded", **config) -> Family:
    return Family(name, of or name, path, frozenset(), config)


# Families without settings of their own.
PLAIN = (
    "llama qwen2 qwen3 ministral3 gemma phi phi3 olmo olmo2 glm glm4 starcoder2 gpt_neox biogpt persimmon "
    "nemotron ernie4_5 hunyuan_v1_dense seed_oss apertus arcee helium diffllama bitnet jais2"
)
TREE = [
    *map(_tree, PLAIN.split()),
    _tree("llama-tied", of="llama", tie_word_embeddings=True),
    _tree("llama-yarn", of="llama", rope_parameters={
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}),
    _tree("llama3-rope", of="llama", rope_parameters={
        "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16}),
    _tree("qwen2-window", "window", of="qwen2", use_sliding_window=True, **ALTERNATING),
    _tree("qwen2_moe", shared_expert_intermediate_size=16, **EXPERTS),
    _tree("qwen3_moe", **{**EXPERTS, "num_experts": None}, num_local_experts=4),
    _tree("mistral", "window", sliding_window=WINDOW),
    _tree("ministral", "window", **ALTERNATING),
    _tree("ministral3-scaled", of="ministral3", rope_parameters={
        "rope_type": "default", "rope_theta": 1e4, "llama_4_scaling_beta": 0.5, "original_max_position_embeddings": 8}),
    _tree("mixtral", **LOCAL_EXPERTS),
    _tree("mixtral-window", "window", of="mixtral", sliding_window=WINDOW, **LOCAL_EXPERTS),
    _tree("gemma2", "window", "softcap", query_pre_attn_scalar=12, attn_logit_softcapping=2.0,
          final_logit_softcapping=3.0, **ALTERNATING),
    _tree("vaultgemma", "window", "softcap", attn_logit_softcapping=2.0, final_logit_softcapping=3.0, **ALTERNATING),
    _tree("gemma3_text", "window", query_pre_attn_scalar=12, **ALTERNATING),
    _tree("gemma3-final-softcap", "window", of="gemma3_text", final_logit_softcapping=3.0, **ALTERNATING),
    _tree("gemma3n_text", "window", num_hidden_layers=4, intermediate_size=[48] * 4, num_kv_shared_layers=2,
          layer_types=["sliding_attention", "full_attention"] * 2, sliding_window=WINDOW,
          vocab_size_per_layer_input=300, hidden_size_per_layer_input=8, laurel_rank=4,
          activation_sparsity_pattern=[0.5, 0.0, 0.0, 0.0]),
    _tree("gemma4_text", "window", vocab_size_per_layer_input=300, hidden_size_per_layer_input=8,
          layer_types=["sliding_attention", "sliding_attention", "full_attention"], sliding_window=WINDOW),
    _tree("phi3-window", "window", of="phi3", sliding_window=WINDOW),
    _tree("phimoe", lm_head_bias=True, **LOCAL_EXPERTS),
    _tree("olmo3", "window", **ALTERNATING),
    _tree("olmoe", **EXPERTS),
    _tree("flex_olmo", **EXPERTS),
    _tree("granite", logits_scaling=3.0, attention_multiplier=0.2, embedding_multiplier=2.0, residual_multiplier=0.7),
    _tree("granitemoe", logits_scaling=3.0, attention_multiplier=0.2, **LOCAL_EXPERTS),
    _tree("granitemoeshared", logits_scaling=3.0, attention_multiplier=0.2, **LOCAL_EXPERTS),
    _tree("granite_swa", "window", "sinks", logits_scaling=3.0, attention_multiplier=0.2, **ALTERNATING),
    _tree("cohere", logit_scale=0.3),
    _tree("cohere2", "window", logit_scale=0.3, **ALTERNATING),
    _tree("gpt_oss", "window", "sinks", **ALTERNATING, **LOCAL_EXPERTS),
    _tree("deepseek_v2", head_dim=8, **{**ROUTED, "n_group": None, "topk_group": None}, **MLA),
    _tree("deepseek_v3", head_dim=8, **ROUTED, **MLA),
    _tree("glm4_moe_lite", head_dim=8, mlp_layer_types=["dense", "sparse", "sparse"], **ROUTED, **MLA),
    _tree("glm4_moe", use_qk_norm=True, **ROUTED),
    _tree("smollm3", no_rope_layers=[1, 0, 1]),
    _tree("smollm3-window", "window", of="smollm3", use_sliding_window=True, **ALTERNATING),
    _tree("starcoder2-window", "window", of="starcoder2", sliding_window=WINDOW),
    _tree("gpt2", **GPT2),
    _tree("gpt2-scaled", of="gpt2", scale_attn_by_inverse_layer_idx=True, reorder_and_upcast_attn=True, **GPT2),
    _tree("gpt_bigcode", **GPT2),
    _tree("opt", ffn_dim=48, word_embed_proj_dim=32),
    _tree("opt-projected", of="opt", ffn_dim=48, word_embed_proj_dim=16, do_layer_norm_before=False),
    _tree("ctrl", n_embd=32, n_layer=3, n_head=4, n_positions=256, dff=48),
    _tree("stablelm", use_parallel_residual=True, qk_layernorm=True),
    _tree("ernie4_5_moe", moe_num_experts=4, moe_k=2, moe_intermediate_size=16),
    _tree("hunyuan_v1_moe", num_experts=4, moe_topk=2),
    _tree("dots1", **ROUTED),
    _tree("exaone4", "window", **ALTERNATING),
    _tree("exaone_moe", "window", num_shared_experts=1, **EXPERTS, **ALTERNATING),
    _tree("cwm", "window", **ALTERNATING),
    _tree("nanochat", final_logit_softcapping=3.0),
    _tree("hyperclovax", logits_scaling=0.3, attention_multiplier=0.2),
    _tree("minimax_m2", **LOCAL_EXPERTS),
    _tree("solar_open", **ROUTED),
    _tree("hy_v3", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
    _tree("mellum", "window", moe_intermediate_size=16, **LOCAL_EXPERTS, **ALTERNATING),
    _tree("jetmoe", kv_channels=8, **LOCAL_EXPERTS),
    _tree("mimo_v2_flash", "window", "sinks", v_head_dim=12, head_dim=24, **{**ROUTED, "n_shared_experts": None},
          **ALTERNATING),
    _tree("modernbert-decoder", "window", num_hidden_layers=3, local_attention=2 * WINDOW,
          layer_types=ALTERNATING["layer_types"]),
    _tree("minicpm3", scale_emb=2, dim_model_base=16, **MLA),
    _tree("afmoe", "window", num_shared_experts=1, **EXPERTS, **ALTERNATING),
    _tree("aria_text", moe_num_experts=4, moe_topk=2),
    _tree("cohere2_moe", "window", num_experts=4, num_experts_per_tok=2, logit_scale=0.3, **ALTERNATING),
    _tree("granitemoe_swa", "window", "sinks", logits_scaling=3.0, **LOCAL_EXPERTS, **ALTERNATING),
    _tree("flint", "window", "sinks", shared_expert_intermediate_size=16, mlp_only_layers=[0],
          **EXPERTS, **ALTERNATING),
    _tree("laguna", "window", shared_expert_intermediate_size=16, num_attention_heads_per_layer=[4] * 3,
          mlp_layer_types=["dense", "sparse", "sparse"], **EXPERTS, **ALTERNATING),
    _tree("beam", "window", n_group=1, topk_group=1, mlp_layer_types=["dense", "sparse", "sparse"],
          final_logit_softcapping=3.0, **EXPERTS, **ALTERNATING),
    _tree("longcat_flash", num_layers=2, num_hidden_layers=4, head_dim=8, ffn_hidden_size=48, moe_topk=2,
          n_routed_experts=4, zero_expert_num=2, expert_ffn_hidden_size=16, **MLA),
    _tree("youtu", head_dim=8, **MLA),
    _tree("dbrx", d_model=32, n_heads=4, n_layers=3, max_seq_len=256, head_dim=None, num_key_value_heads=None,
          attn_config={"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
          ffn_config={"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2}),
    _tree("hrm_text", num_layers_per_stack=1, num_hidden_layers=None, L_bp_cycles=[2]),
    _tree("bert", is_decoder=True),
    _tree("minimax_m3-dense", of="minimax_m3_vl_text", **MINIMAX_M3),
]  # fmt: skip

REFUSED = [
    _padded("mamba2", num_heads=8, head_dim=8, state_size=8, n_groups=2, chunk_size=16),
    _padded("jamba", attn_layer_period=3, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1,
            num_experts=2, mamba_d_state=8, mamba_dt_rank=4, use_mamba_kernels=False),
    _padded("qwen3_next", shared_expert_intermediate_size=16, **EXPERTS, **LINEAR),
    _padded("lfm2", layer_types=["conv", "full_attention", "conv"]),
    _padded("falcon-alibi", of="falcon", alibi=True, head_dim=None),
    _padded("bloom", n_head=4, n_layer=3),
    _padded("falcon", head_dim=None),
    _padded("falcon_h1", head_dim=8, lm_head_multiplier=0.3, mamba_d_ssm=64, **MAMBA),
    _padded("mamba", state_size=8),
    _padded("rwkv", attention_hidden_size=32, context_length=256),
    _padded("mpt", d_model=32, n_heads=4, n_layers=3, max_seq_len=256),
    _padded("gpt_neo", num_hidden_layers=None, num_layers=2, num_heads=4, window_size=WINDOW,
            attention_types=[[["global", "local"], 1]]),
    _padded("gptj", rotary_dim=4, **GPT2),
    _padded("codegen", rotary_dim=4, **GPT2),
    _padded("gpt_neox_japanese"),
    _padded("xglm", d_model=32, num_layers=3, attention_heads=4, ffn_dim=48),
    _padded("recurrent_gemma", lru_width=32, attention_window_size=WINDOW, logits_soft_cap=3.0,
            num_key_value_heads=1),
    _padded("doge"),
    _padded("llama4_text", attention_chunk_size=16, intermediate_size_mlp=48, num_local_experts=2,
            no_rope_layers=[1, 0, 1], floor_scale=4),
    _padded("bamba", attn_layer_indices=[1], **MAMBA),
    _padded("minimax", **LOCAL_EXPERTS, block_size=16,
            layer_types=["linear_attention", "full_attention", "linear_attention"]),
    _padded("granitemoehybrid", layer_types=["linear_attention", "full_attention", "linear_attention"],
            logits_scaling=3.0, shared_intermediate_size=16, **LOCAL_EXPERTS, **MAMBA),
    _padded("olmo_hybrid", **LINEAR),
    _padded("qwen3_5_text", **LINEAR),
    _padded("granitemoehybrid-attention", of="granitemoehybrid", layer_types=["full_attention"] * 3, logits_scaling=3.0,
            attention_multiplier=0.2, shared_intermediate_size=16, **LOCAL_EXPERTS, **MAMBA),
    _padded("falcon_mamba", state_size=8),
    _padded("nemotron_h", num_hidden_layers=4, ssm_state_size=8, mamba_num_heads=8, mamba_head_dim=8, n_groups=2,
            chunk_size=16, n_routed_experts=4, moe_intermediate_size=16, moe_shared_expert_intermediate_size=16,
            use_mamba_kernels=False),
    _padded("zamba2", num_hidden_layers=4, mamba_d_state=8, n_mamba_heads=8, mamba_headdim=8, chunk_size=16,
            layers_block_type=["linear_attention", "linear_attention", "hybrid", "linear_attention"],
            attention_hidden_size=64, attention_head_dim=16, use_mamba_kernels=False),
    _padded("zaya", num_experts=4, moe_intermediate_size=16, router_hidden_size=16),
    _padded("lfm2_moe", layer_types=["conv", "full_attention", "conv"], num_dense_layers=1, **EXPERTS),
    _padded("kimi_linear", num_experts=4, num_experts_per_token=2, moe_intermediate_size=16, linear_head_dim=8,
            linear_num_heads=4, layer_types=LINEAR["layer_types"], mlp_layer_types=["dense", "sparse", "sparse"],
            **MLA),
    _padded("xlstm", num_heads=4, num_blocks=2, chunk_size=16),
    _padded("openai-gpt", **GPT2),
    # Few indexer heads tie at zero, and a tie makes the plain model itself depend on the sequence's length.
    _padded("deepseek_v32", path="alone", index_topk=8, index_head_dim=16, index_n_heads=32, **ROUTED, **MLA),
    _padded("minimax_m3-sparse", path="alone", of="minimax_m3_vl_text", **MINIMAX_M3,
            layer_types=["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"]),
    _padded("roberta", is_decoder=True),
    _padded("bart", d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48),
]  # fmt: skip

BY_NAME = {family.name: family for family in TREE + REFUSED}


def build(name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, cls=None, **config):
    """The tiny model of one row in training mode, with `config` over the row's settings.

    `cls` makes a subclass of the row's class from the same configuration.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    family = BY_NAME[name]
    settings = {k: v for k, v in {**BASE, **family.config, **config}.items() if v is not None}
    settings = AutoConfig.for_model(family.model_type, **settings)
    return made(lambda: cls(settings) if cls else AutoModelForCausalLM.from_config(settings), seed).to(dtype)


def made(make, seed: int = 0):
    """``make()`` with random parameters, in training mode; the global generator is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make()
        randomise(model)
    return model.train()


@torch.no_grad()
def randomise(model: torch.nn.Module) -> None:
    """Give every parameter and router correction a value that matters."""
    width = BASE["hidden_size"]
    for name, parameter in model.named_parameters():
        noise = torch.randn_like(parameter)
        if parameter.dim() < 2:
            parameter.add_(0.3 * noise)
        elif "emb" in name or "wte" in name or "wpe" in name:
            parameter.copy_(0.6 * noise)
        else:
            parameter.copy_(noise * (parameter.shape[-1] if parameter.dim() == 2 else width) ** -0.5)
    for name, buffer in model.named_buffers():
        if name.endswith(("correction_bias", "expert_bias")):
            buffer.copy_(0.2 * torch.randn_like(buffer))


def cells(seed: int = 0, *, single: bool = True, inputs: tuple[int, ...] = (20, 20, 14)) -> sk.ResponseCache:
    """Three instructions x three examples; the first two examples share their input and answer it differently.

    With `single` every response token also is a cell of its own, whose context ends with the tokens before it: the
    scores then show each token's log-probability, so that errors cannot cancel in a sum.
    """
    draw = torch.Generator().manual_seed(seed)

    def ids(count: int) -> list[int]:
        return torch.randint(5, 290, (count,), generator=draw).tolist()

    texts = [ids(n) for n in sorted(set(inputs), reverse=True)]
    texts = {len(text): text for text in texts}
    answers = [ids(3), ids(2), ids(4)]
    header = ids(4)
    prompts = [header + ids(8), header + ids(12), ids(7)]
    contexts, responses = [], []
    for prompt in prompts:
        rows = [(prompt + texts[n], answer) for n, answer in zip(inputs, answers, strict=True)]
        if single:
            rows += [(c + a[:i], [a[i]]) for c, a in list(rows) for i in range(len(a))]
        contexts.append([c for c, _ in rows])
        responses.append([a for _, a in rows])
    return sk.ResponseCache.from_token_ids(contexts, responses)


@torch.no_grad()
def plain_nll(model, cache: sk.ResponseCache, forward=None) -> torch.Tensor:
    """[K, M] float64: each cell by the model's own forward on that whole sequence alone, not padded."""
    was = [module for module in model.modules() if module.training]
    model.eval()
    rows = []
    for contexts, responses in zip(cache.contexts, cache.responses, strict=True):
        row = []
        for context, response in zip(contexts, responses, strict=True):
            ids = torch.tensor([context + response])
            logits = (forward or model)(input_ids=ids, use_cache=False).logits[0, len(context) - 1 : -1]
            logprob = torch.log_softmax(logits.double(), -1)
            row.append(-logprob.gather(-1, torch.tensor(response)[:, None]).sum())
        rows.append(torch.stack(row))
    for module in was:
        module.training = True
    return torch.stack(rows)


def per_token_error(scores: sk.PromptScores, plain: torch.Tensor) -> float:
    """Largest difference in nats per response token; NaN if any cell is NaN."""
    return float(((scores.nll - plain).abs() / scores.tokens).max())


def check(model, cache, *paths: tuple[str, int, str], plain=None) -> torch.Tensor:
    """Score on each (impl, max_tokens, expected path) and compare every cell with `plain`, which is returned.

    plain: by default the plain forward of the model as it is.
    """
    plain = plain_nll(model, cache) if plain is None else plain
    for impl, max_tokens, path in paths:
        scores = sk.score_prompts(model, cache, impl=impl, max_tokens=max_tokens)
        assert scores.stats["path"] == path, scores.stats["reason"]
        error = per_token_error(scores, plain)
        assert error < TOLERANCE, f"impl={impl}, max_tokens={max_tokens}: {error:.3g} nats per token"
    return plain
