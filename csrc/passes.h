// Cutting a token trie into passes, and the lists of keys of a pass; plain C++17 without torch or Python.
//
// The same arrays, bit for bit, as `TokenTrie.passes` in `sapo_kernels/trie/trie.py` and `build_tiles` in
// `sapo_kernels/trie/tiles.py` make in numpy, which say what each means.
#pragma once

#include <cstdint>
#include <vector>

namespace sapo {

// The arrays of a `TokenTrie` that its cutting reads; U tokens, N nodes, R rows.
struct TrieView {
  const int64_t *depth, *node_start, *node_stop, *node_parent, *node_end, *row_token;
  const bool* cached;  // [U], or null if no token is cached
  int64_t tokens, nodes, rows;
};

struct Pass {
  int64_t start, stop;           // tokens of the trie
  int64_t num_past, num_cached;  // keys in front of those that the pass computes, and how many of them are tokens of it
  int64_t first_row, last_row;
  std::vector<int64_t> fresh;  // the tokens that the pass computes; empty if they are all of it
  std::vector<int64_t> next_past, rows;
  std::vector<int32_t> position, subtree_end, block_start, span_ptr, span;
};

// max_tokens: new tokens of a pass at most, at least 1. block_tokens: of a block, at least 1.
//
// Throws std::invalid_argument if the nodes are not those of a trie in depth-first order.
std::vector<Pass> passes(const TrieView& trie, int64_t max_tokens, int64_t block_tokens);

// The arrays of a pass that its lists are made of; K keys, B blocks, S spans.
struct PassView {
  const int32_t *subtree_end, *block_start, *span_ptr, *span;
  int64_t keys, blocks, spans;
};

// Tiles of `tokens` queries, chunks of `chunk` keys, both at least 1.
//
// Throws std::invalid_argument if blocks and spans do not lie within the keys, and where the lists have 2**31 entries
// or more.
std::vector<int32_t> tiles(const PassView& pass, int64_t tokens, int64_t chunk);

}  // namespace sapo
