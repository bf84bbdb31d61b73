"""From prompts and examples to their losses under a model."""
