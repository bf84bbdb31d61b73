"""One way in for examples, one for prompts."""
