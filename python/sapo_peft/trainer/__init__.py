"""SAPO inside a transformers Trainer or TRL's SFTTrainer."""
