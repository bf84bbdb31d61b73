"""DPO whose chosen and rejected answers share the prompt: TRL's DPOTrainer, each prompt computed once.

    python examples/dpo_shared_prefix.py

Needs trl. Prints loss and gradients beside those of the unchanged trainer on the same rows.
"""

import tempfile

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from trl import DPOConfig, DPOTrainer

import sapo_kernels as sk
from sapo_peft.tiny_random import tiny_model, tiny_tokenizer

PAIRS = [
    {"prompt": f"Name a {kind} that most people know. Answer with one word.\n", "chosen": good, "rejected": bad}
    for kind, good, bad in [("fruit", "apple", "a stone"), ("city", "Paris", "nowhere"), ("colour", "red", "seven")]
]


class TrieDPOTrainer(DPOTrainer):
    """The same trainer: its loss calls the model over the trie of the batch."""

    def training_step(self, model, *args, **kwargs):
        with sk.use_tree_attention(model):  # for the backward pass too, should it checkpoint
            return super().training_step(model, *args, **kwargs)

    def compute_loss(self, model, *args, **kwargs):
        return super().compute_loss(sk.OverTrie(model), *args, **kwargs)


def one_step(trainer_class) -> tuple[float, torch.Tensor]:
    """(loss, all gradients) of one batch."""
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(tiny_model(), lora)
    with tempfile.TemporaryDirectory() as folder:
        args = DPOConfig(folder, per_device_train_batch_size=3, report_to=[], use_cpu=True, bf16=False,
                         gradient_checkpointing=False)  # fmt: skip
        trainer = trainer_class(model, args=args, train_dataset=Dataset.from_list(PAIRS),
                                processing_class=tiny_tokenizer())  # fmt: skip
        batch = next(iter(trainer.get_train_dataloader()))
        trainer.current_gradient_accumulation_steps = 1  # what train() sets
        loss = trainer.training_step(trainer.model, batch)
    return float(loss), torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])


if __name__ == "__main__":
    loss, gradients = one_step(DPOTrainer)
    ours, over_trie = one_step(TrieDPOTrainer)
    apart = float((over_trie - gradients).norm() / gradients.norm())
    print(f"loss {loss:.6f}, over the trie {ours:.6f}; gradients differ by {apart:.1e} of their norm")
    if abs(ours - loss) > 1e-5 * loss or apart > 1e-4:
        raise SystemExit("expected the same")
