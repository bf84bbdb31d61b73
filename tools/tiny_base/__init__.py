"""A decoder of about a million parameters that follows simple instructions and prefers some wordings to others.

It is trained from scratch, tokenizer included, on small text skills and bundled tasks; `corpus.py` says on what. The
default preset ships with the package (`sapo_peft.tiny_base`; bfloat16, 2 MB): results measured on it need the very same
weights, which no other machine would train bit for bit. ``python -m tools.tiny_base --preset default --out DIR`` trains
it again, in about ten minutes on two CPU cores.
"""
