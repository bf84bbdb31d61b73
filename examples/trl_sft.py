"""TRL's SFTTrainer with SAPO, on prompt-completion data. Runs on a CPU, with no network.

python examples/trl_sft.py [OUTPUT_FOLDER [STEPS]]
"""

import sys

from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from sapo_peft import PromptPool, SapoConfig, attach_sapo, read_examples, tiny_model, tiny_tokenizer
from sapo_peft.assets import BUNDLED_DIR

output = sys.argv[1] if len(sys.argv) > 1 else "sapo-example"
steps = int(sys.argv[2]) if len(sys.argv) > 2 else 20
task = "task05_arithmetic_stories"

# "prompt" is the input alone: the instruction is what SAPO chooses.
rows = [{"prompt": row["input"], "completion": row["target"]} for row in read_examples(BUNDLED_DIR / "SUPERNI" / task)]
args = SFTConfig(
    output,
    max_steps=steps,
    per_device_train_batch_size=4,
    logging_steps=5,
    report_to=[],
    use_cpu=True,
    bf16=False,
    disable_tqdm=True,
    dataset_kwargs={"skip_prepare_dataset": True},  # the examples stay text until a batch is made
)
lora = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
data = Dataset.from_list(rows)
trainer = SFTTrainer(tiny_model(), args, train_dataset=data, processing_class=tiny_tokenizer(), peft_config=lora)
attach_sapo(trainer, PromptPool.read(BUNDLED_DIR, task), config=SapoConfig(each_epoch=True, probe_examples=4))
trainer.train()
trainer.save_model()
