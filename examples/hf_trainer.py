"""A transformers Trainer with SAPO: three more lines than without. Runs on a CPU, with no network.

python examples/hf_trainer.py [OUTPUT_FOLDER [STEPS]]
"""

import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen3Config, Qwen3ForCausalLM, Trainer, TrainingArguments, set_seed

from sapo_peft import PromptPool, SapoConfig, attach_sapo, read_examples, tiny_tokenizer
from sapo_peft.assets import BUNDLED_DIR

output = sys.argv[1] if len(sys.argv) > 1 else "sapo-example"
steps = int(sys.argv[2]) if len(sys.argv) > 2 else 500  # four passes
torch.set_num_threads(1)  # the model is too small for more
set_seed(0)

# Any causal LM with a PEFT adapter; here a random one that needs no download.
sizes = dict(hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4)
base = Qwen3ForCausalLM(Qwen3Config(vocab_size=259, num_key_value_heads=2, head_dim=16, **sizes))
model = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
examples = list(read_examples(BUNDLED_DIR / "SUPERNI" / "task02_odd_one_out"))  # {"input": ..., "target": ...}
args = TrainingArguments(output, max_steps=steps, per_device_train_batch_size=8, learning_rate=1e-3, report_to=[],
                         logging_steps=25, use_cpu=True, disable_tqdm=True)  # fmt: skip
trainer = Trainer(model, args, train_dataset=examples, processing_class=tiny_tokenizer())

# The original instruction and 20 paraphrases, scored on 64 examples before the first step and half way through.
pool = PromptPool.read(BUNDLED_DIR, "task02_odd_one_out")
attach_sapo(trainer, pool, config=SapoConfig(every_steps=-(-steps // 2)))

trainer.train()  # prints the overhead at its end
trainer.save_model()  # with sapo_prompts.json beside the adapter
