// The token-trie planner: plain C++17 without torch or Python, so that sanitizers and fuzzers can drive it.
//
// The same plan, bit for bit, as `sapo_kernels/trie/numpy_planner.py`, which says what each array means.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>

namespace sapo {

struct Free {
  void operator()(int64_t* data) const { std::free(data); }
};

// An owned int64 array. Its memory is not zeroed first: every element is written exactly once by its maker.
struct Array {
  std::unique_ptr<int64_t[], Free> data;
  int64_t size = 0;

  Array() = default;
  explicit Array(int64_t n);
  int64_t& operator[](int64_t i) { return data[i]; }
};

struct Trie {
  Array tokens;       // [U]
  Array depth;        // [U]
  Array node_start;   // [N]
  Array node_stop;    // [N]
  Array node_parent;  // [N]
  Array node_end;     // [N]
  Array row_token;    // [R]
  Array target_ptr;   // [R + 1]
  Array targets;      // [P]
  Array cell_ptr;     // [C + 1]
  Array cell_target;  // [sum of response lengths]
  Array leaf;         // [C]
  int64_t dense_tokens = 0;
};

// Plans the trie of C sequences; the arguments are those of `plan_trie` and may hold anything at all, also change while
// this runs: each offset and context length is read once.
//
// Throws std::invalid_argument with the text of the numpy planner, std::bad_alloc if memory is short.
Trie plan(const int64_t* ids,              // [L]
          int64_t ids_size,                //
          const int64_t* offsets,          // [C + 1]
          int64_t offsets_size,            //
          const int64_t* context_lengths,  // [C]
          int64_t context_lengths_size);

}  // namespace sapo
