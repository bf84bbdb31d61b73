"""A PyTorch training loop of one's own with sapo_kernels alone; model, tokenizer and data are yours. CPU, no network.

python examples/plain_loop.py [STEPS]
"""

import sys

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

import sapo_kernels as sk

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 60
examples = [{"input": f"{a} and {b}", "target": f"{a + b}"} for a in range(10) for b in range(10)]
prompts = ["Add the two numbers.", "What is the sum?", "Compute the total of both numbers below."]

torch.manual_seed(0)
vocabulary = {"<eos>": 0, **{c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()), 1)}}
backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, head_dim=16)
model = Qwen3ForCausalLM(Qwen3Config(vocab_size=257, num_key_value_heads=2, **sizes))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

cache = sk.ResponseCache.build(tokenizer, prompts, examples)  # tokenised once, scored as often as you like
for step in range(steps):
    if step % 20 == 0:
        scores = sk.score_prompts(model, cache, progress=False)
        print(f"step {step}: prompt {scores.best} of {[round(x, 3) for x in scores.loss.tolist()]}")
        contexts, responses = cache.contexts[scores.best], cache.responses[scores.best]
    m = int(torch.randint(len(examples), ()))
    ids, n = torch.tensor([contexts[m] + responses[m]]), len(contexts[m])
    loss = model(input_ids=ids, labels=torch.cat([torch.full((1, n), -100), ids[:, n:]], 1)).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
