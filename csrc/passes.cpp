#include "passes.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <stdexcept>

namespace sapo {
namespace {

constexpr int32_t kNever = std::numeric_limits<int32_t>::max();
constexpr const char* kNoTrie = "trie: expected nodes in depth-first order that cover its tokens";

void require(bool holds, const char* text) {
  if (!holds) throw std::invalid_argument(text);
}

struct Span {
  int64_t first, stop;
};

// Joins spans that stand side by side.
void append(std::vector<Span>& spans, int64_t first, int64_t stop) {
  if (first >= stop) return;
  if (!spans.empty() && spans.back().stop == first) {
    spans.back().stop = stop;
  } else {
    spans.push_back({first, stop});
  }
}

class Cutter {
 public:
  Cutter(const TrieView& trie, int64_t max_tokens, int64_t block_tokens)
      : trie_(trie), max_tokens_(max_tokens), block_tokens_(block_tokens) {}

  std::vector<Pass> all();

 private:
  void check() const;
  int64_t cut(int64_t after, int64_t limit) const;
  int64_t node_of(int64_t token);
  void walk(int64_t token);
  void fill(Pass& pass);
  void blocks(Pass& pass, int64_t first, int64_t stop);
  void path_keys(const Pass& pass);
  int64_t new_before(const Pass& pass, int64_t token) const;

  const TrieView trie_;
  const int64_t max_tokens_, block_tokens_;
  int64_t node_ = 0;                         // of the token asked for last; they ascend
  std::vector<Span> path_;                   // the proper ancestors of a token, root first
  std::vector<Span> keys_;                   // the same as keys of a pass
  std::vector<int64_t> of_path_;             // the nodes of the path, leaf first
  std::vector<int64_t> new_, before_, key_;  // where tokens are cached: the others; see `fill`
};

void Cutter::check() const {
  int64_t at = 0;
  for (int64_t i = 0; i < trie_.nodes; ++i) {
    const int64_t parent = trie_.node_parent[i], end = trie_.node_end[i];
    require(trie_.node_start[i] == at && trie_.node_stop[i] > at && trie_.node_stop[i] <= trie_.tokens, kNoTrie);
    require(parent >= -1 && parent < i && end >= trie_.node_stop[i] && end <= trie_.tokens, kNoTrie);
    at = trie_.node_stop[i];
  }
  require(at == trie_.tokens && trie_.tokens < kNever, kNoTrie);
}

// The shallowest node start in (after, limit], the last one of equals; `limit` if there is none.
int64_t Cutter::cut(int64_t after, int64_t limit) const {
  const int64_t* const starts = trie_.node_start;
  const int64_t* const lo = std::upper_bound(starts, starts + trie_.nodes, after);
  const int64_t* const hi = std::upper_bound(lo, starts + trie_.nodes, limit);
  const int64_t* best = nullptr;
  for (const int64_t* one = lo; one < hi; ++one) {
    if (!best || trie_.depth[*one] <= trie_.depth[*best]) best = one;
  }
  return best ? *best : limit;
}

int64_t Cutter::node_of(int64_t token) {
  while (trie_.node_stop[node_] <= token) ++node_;
  return node_;
}

// Makes `path_` that of the proper ancestors of a token.
void Cutter::walk(int64_t token) {
  of_path_.clear();
  for (int64_t node = node_of(token); node >= 0; node = trie_.node_parent[node]) of_path_.push_back(node);
  path_.clear();
  for (size_t i = of_path_.size(); i-- > 0;) {
    append(path_, trie_.node_start[of_path_[i]], i ? trie_.node_stop[of_path_[i]] : token);
  }
}

int64_t Cutter::new_before(const Pass& pass, int64_t token) const {
  const int64_t place = std::clamp<int64_t>(token - pass.start, 0, pass.stop - pass.start);
  return pass.num_cached ? before_[place] : place;
}

// Makes `keys_` of `path_`: what lies before the pass is a prefix of the path of past keys, whose keys are depths.
void Cutter::path_keys(const Pass& pass) {
  keys_.clear();
  int64_t depth = 0;
  for (const Span& one : path_) depth += std::max<int64_t>(0, std::min(one.stop, pass.start) - one.first);
  append(keys_, 0, depth);
  for (const Span& one : path_) {
    const int64_t first = std::max(one.first, pass.start);
    if (!pass.num_cached) {
      append(keys_, pass.num_past + first - pass.start, pass.num_past + one.stop - pass.start);
    } else {
      for (int64_t t = first; t < one.stop; ++t) append(keys_, key_[t - pass.start], key_[t - pass.start] + 1);
    }
  }
}

void Cutter::blocks(Pass& pass, int64_t first, int64_t stop) {
  for (int64_t at = first; at < stop;) {
    const int64_t node = node_of(at), holder = at > trie_.node_start[node] ? node : trie_.node_parent[node];
    const int64_t hard = std::min(holder >= 0 ? trie_.node_end[holder] : trie_.tokens, stop);
    require(hard > at, kNoTrie);
    const int64_t end = hard - at <= block_tokens_ ? hard : cut(at + block_tokens_ / 2, at + block_tokens_);
    walk(at);
    path_keys(pass);
    for (const Span& one : keys_) {
      pass.span.push_back(static_cast<int32_t>(one.first));
      pass.span.push_back(static_cast<int32_t>(one.stop));
    }
    pass.block_start.push_back(static_cast<int32_t>(pass.block_start.back() + end - at));
    pass.span_ptr.push_back(static_cast<int32_t>(pass.span.size() / 2));
    at = end;
  }
}

void Cutter::fill(Pass& pass) {
  const int64_t start = pass.start, stop = pass.stop, size = stop - start;
  walk(start);
  int64_t num_past = 0;
  for (const Span& one : path_) num_past += one.stop - one.first;
  if (trie_.cached) {
    before_.assign(size + 1, 0);
    for (int64_t t = 0; t < size; ++t) before_[t + 1] = before_[t] + !trie_.cached[start + t];
    pass.num_cached = size - before_[size];
  }
  pass.num_past = num_past + pass.num_cached;
  if (pass.num_cached) {
    key_.resize(size);
    for (int64_t t = 0; t < size; ++t) {
      const bool cached = trie_.cached[start + t];
      key_[t] = cached ? num_past + t - before_[t] : pass.num_past + before_[t];
      if (!cached) pass.fresh.push_back(start + t);
    }
  }
  pass.position.resize(num_past + size);
  pass.subtree_end.resize(num_past + size);
  int64_t at = 0;
  for (size_t i = of_path_.size(); i-- > 0;) {
    const int64_t node = of_path_[i], last = i ? trie_.node_stop[node] : start;
    const int64_t end = pass.num_past + new_before(pass, trie_.node_end[node]);
    for (int64_t t = trie_.node_start[node]; t < last; ++t, ++at) {
      pass.position[at] = static_cast<int32_t>(trie_.depth[t]);
      pass.subtree_end[at] = static_cast<int32_t>(end);
    }
  }
  for (int64_t token = start, node = node_; token < stop; ++node) {
    const int64_t end = pass.num_past + new_before(pass, trie_.node_end[node]);
    for (const int64_t last = std::min(stop, trie_.node_stop[node]); token < last; ++token) {
      const int64_t key = pass.num_cached ? key_[token - start] : num_past + token - start;
      pass.position[key] = static_cast<int32_t>(trie_.depth[token]);
      pass.subtree_end[key] = static_cast<int32_t>(end);
    }
  }
  pass.block_start.push_back(static_cast<int32_t>(pass.num_past));
  pass.span_ptr.push_back(0);
  if (!pass.num_cached) {
    blocks(pass, start, stop);
  } else {
    for (int64_t first = start, last; first < stop; first = last) {
      for (last = first + 1; last < stop && trie_.cached[last] == trie_.cached[first]; ++last) {
      }
      if (!trie_.cached[first]) blocks(pass, first, last);
    }
  }
  if (stop < trie_.tokens) {
    walk(stop);
    path_keys(pass);
    for (const Span& one : keys_) {
      for (int64_t key = one.first; key < one.stop; ++key) pass.next_past.push_back(key);
    }
  }
  const int64_t *const rows = trie_.row_token, *const last = rows + trie_.rows;
  pass.first_row = std::lower_bound(rows, last, start) - rows;
  pass.last_row = std::lower_bound(rows, last, stop) - rows;
  for (int64_t r = pass.first_row; r < pass.last_row; ++r) pass.rows.push_back(new_before(pass, rows[r]));
}

std::vector<Pass> Cutter::all() {
  check();
  if (trie_.cached) {
    for (int64_t t = 0; t < trie_.tokens; ++t) {
      if (!trie_.cached[t]) new_.push_back(t);
    }
  }
  const int64_t total = trie_.tokens, count = trie_.cached ? static_cast<int64_t>(new_.size()) : total;
  const auto place = [&](int64_t i) { return trie_.cached ? new_[i] : i; };
  std::vector<Pass> made;
  for (int64_t start = 0, done = 0; start < total;) {
    const int64_t end = count - done <= max_tokens_ ? count : done + max_tokens_;
    const int64_t limit = end == count ? total : place(end);
    // Ending at a shallow boundary keeps the path of past keys short and siblings together.
    const int64_t stop = limit == total ? total : cut(place(done + 3 * (end - done) / 4), limit);
    made.emplace_back();
    made.back().start = start;
    made.back().stop = stop;
    made.back().num_cached = 0;
    fill(made.back());
    start = stop;
    done = trie_.cached ? std::lower_bound(new_.begin(), new_.end(), stop) - new_.begin() : stop;
  }
  return made;
}

// The first query that may see each key.
void find_seen_from(const PassView& pass, int32_t* found) {
  const int64_t num_past = pass.block_start[0];
  std::iota(found, found + pass.keys, 0);
  int64_t whole = 0;
  const int64_t seen = pass.blocks ? pass.span_ptr[1] : 0;
  for (int64_t s = 0; s < seen; ++s) whole += pass.span[2 * s + 1] - pass.span[2 * s];
  if (whole == num_past) {  // the first query sees them all
    std::fill(found, found + num_past, static_cast<int32_t>(num_past));
    return;
  }
  std::fill(found, found + num_past, kNever);
  for (int64_t b = 0; b < pass.blocks; ++b) {
    for (int64_t s = pass.span_ptr[b]; s < pass.span_ptr[b + 1]; ++s) {
      const int64_t stop = std::min<int64_t>(pass.span[2 * s + 1], num_past);
      for (int64_t key = pass.span[2 * s]; key < stop; ++key) found[key] = std::min(found[key], pass.block_start[b]);
    }
  }
  for (int64_t key = num_past - 1; key > 0; --key) found[key - 1] = std::min(found[key - 1], found[key]);
}

// Where in a run of a path the keys stop whose subtree reaches to `stop`: they are its beginning.
int64_t outliving(const int32_t* end, int64_t low, int64_t high, int64_t stop) {
  return std::partition_point(end + low, end + high, [stop](int32_t one) { return one >= stop; }) - end;
}

void check(const PassView& pass) {
  const char* const text = "pass: expected blocks that cover the queries and spans within the keys before them";
  require(pass.keys < kNever && pass.block_start[0] >= 0 && pass.block_start[pass.blocks] == pass.keys, text);
  require(pass.span_ptr[0] == 0 && pass.span_ptr[pass.blocks] == pass.spans, text);
  for (int64_t b = 0; b < pass.blocks; ++b) {
    require(pass.block_start[b] < pass.block_start[b + 1] && pass.span_ptr[b] <= pass.span_ptr[b + 1], text);
    for (int64_t s = pass.span_ptr[b]; s < pass.span_ptr[b + 1]; ++s) {
      const int32_t first = pass.span[2 * s], stop = pass.span[2 * s + 1];
      require(first >= 0 && first < stop && stop <= pass.block_start[b], text);
    }
  }
}

}  // namespace

std::vector<Pass> passes(const TrieView& trie, int64_t max_tokens, int64_t block_tokens) {
  return Cutter(trie, max_tokens, block_tokens).all();
}

std::vector<int32_t> tiles(const PassView& pass, int64_t tokens, int64_t chunk) {
  check(pass);
  const int64_t num_past = pass.block_start[0], keys = pass.keys, queries = keys - num_past;
  tokens = std::min(tokens, std::max<int64_t>(queries, 1));
  const int64_t count = queries / tokens + (queries % tokens != 0);
  const int64_t head = 2 * count + 1 + keys;
  std::vector<int32_t> made;
  made.reserve(head + 3 * queries + 40 * count);
  made.resize(head);
  int32_t* seen_from = made.data() + 2 * count + 1;
  find_seen_from(pass, seen_from);
  std::vector<Span> runs, parts;
  int64_t block = 0;
  for (int64_t tile = 0; tile < count; ++tile) {
    const int64_t first = num_past + tile * tokens, stop = std::min(first + tokens, keys);
    while (pass.block_start[block + 1] <= first) ++block;
    // The path to the first query: the spans of its block, then ancestors inside the block.
    runs.clear();
    for (int64_t s = pass.span_ptr[block]; s < pass.span_ptr[block + 1]; ++s) {
      append(runs, pass.span[2 * s], pass.span[2 * s + 1]);
    }
    for (int64_t key = pass.block_start[block]; key < first; ++key) {
      if (pass.subtree_end[key] > first) append(runs, key, key + 1);
    }
    parts.clear();  // keys from before the pass may lie in a memory of their own
    for (const Span& run : runs) {
      const int64_t middle = std::clamp(num_past, run.first, run.stop);
      if (run.first < middle) parts.push_back({run.first, middle});
      if (middle < run.stop) parts.push_back({middle, run.stop});
    }
    const size_t begin = made.size();
    for (Span& part : parts) {
      const int64_t whole = (outliving(pass.subtree_end, part.first, part.stop, stop) - part.first) / chunk;
      for (int64_t i = 0; i < whole; ++i, part.first += chunk) made.push_back(static_cast<int32_t>(part.first));
    }
    made[count + 1 + tile] = static_cast<int32_t>(made.size() - begin);
    const auto list = [&made](int64_t from, int64_t to) {
      const size_t at = made.size();
      made.resize(at + std::max<int64_t>(0, to - from));
      std::iota(made.begin() + at, made.end(), static_cast<int32_t>(from));
    };
    for (const Span& part : parts) list(part.first, part.stop);
    // Keys before the pass that are seen from the middle of the tile on.
    seen_from = made.data() + 2 * count + 1;
    const int32_t* const late = std::upper_bound(seen_from, seen_from + num_past, first);
    const int32_t* const last = std::lower_bound(late, static_cast<const int32_t*>(seen_from) + num_past, stop);
    list(late - seen_from, last - seen_from);
    list(first, stop);
    require(made.size() <= static_cast<size_t>(kNever), "trie: expected lists of keys below 2**31 entries, got more");
    made[tile + 1] = static_cast<int32_t>(made.size() - head);
  }
  return made;
}

}  // namespace sapo
