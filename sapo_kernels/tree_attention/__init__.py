"""Attention over a token trie: every token sees its ancestors and itself."""
