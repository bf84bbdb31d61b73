"""The token trie and its planner."""
