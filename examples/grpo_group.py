"""A GRPO group: one prompt, G completions, log-probabilities and gradients with the prompt computed once.

    python examples/grpo_group.py
"""

import torch

import sapo_kernels as sk
from sapo_peft.tiny_random import tiny_model, tiny_tokenizer

PROMPT = "Count from one to five, in words, separated by commas, and write nothing else.\n"
COMPLETIONS = ["one, two, three, four, five", "one, two, three", "1, 2, 3, 4, 5", "one, two, three, four, six"]
REWARDS = torch.tensor([1.0, 0.3, 0.0, 0.5])


def group_loss(logprobs: list[torch.Tensor]) -> torch.Tensor:
    """The policy gradient of one group, each completion weighted by its advantage (on-policy: ratios are one)."""
    advantages = (REWARDS - REWARDS.mean()) / REWARDS.std()
    ratios = [torch.exp(own - own.detach()) for own in logprobs]
    return -torch.stack([(r * a).mean() for r, a in zip(ratios, advantages, strict=True)]).mean()


def one_by_one(model, prompt, completions) -> list[torch.Tensor]:
    """What the trie saves: a forward for each completion with the whole prompt."""
    found = []
    for ids in completions:
        logits = model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        found.append(torch.log_softmax(logits, -1).gather(-1, torch.tensor(ids)[:, None])[:, 0])
    return found


def gradients(model, loss) -> torch.Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


if __name__ == "__main__":
    model, tokenizer = tiny_model(), tiny_tokenizer()
    prompt = tokenizer(PROMPT)["input_ids"]
    completions = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in COMPLETIONS]
    group = sk.TrieBatch.pack([prompt] * len(completions), completions)
    logprobs = sk.tree_logprobs(model, group).split(group.sequence_ptr.diff().tolist())
    plain = one_by_one(model, prompt, completions)
    own, expected = gradients(model, group_loss(logprobs)), gradients(model, group_loss(plain))
    worst = max(float((a - b).detach().abs().max()) for a, b in zip(logprobs, plain, strict=True))
    apart = float((own - expected).norm() / expected.norm())
    tokens = sum(len(prompt) + len(ids) for ids in completions)
    print(f"{group.num_tokens} tokens instead of {tokens}; log-probabilities differ by {worst:.1e} nats, "
          f"gradients by {apart:.1e} of their norm")  # fmt: skip
    if worst > 1e-4 or apart > 1e-4:
        raise SystemExit("expected the same")
