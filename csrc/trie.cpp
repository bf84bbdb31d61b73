#include "trie.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstring>
#include <limits>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace sapo {
namespace {

constexpr size_t kHugePage = size_t{1} << 21;
constexpr int64_t kRadixFrom = 48;  // members from which a radix sort beats std::sort

// One sequence without its last response token. `length` is also the index of that last token.
struct Sequence {
  int64_t first;    // its first token in ids
  int64_t length;   // tokens in the trie
  int64_t context;  // tokens of context
  int64_t shared;   // tokens shared with the pivot of its group
};

struct Item {
  uint64_t key;  // the token by which the group is split
  int64_t cell;
};

// Sequences with a common prefix whose part from `depth` on is still to be planned.
struct Group {
  int64_t begin, end;   // its members among the items
  int64_t depth;        // tokens of the prefix that are already in the trie
  int64_t equal;        // tokens known to be the same in all members
  int64_t level;        // open nodes above it
  int64_t pivot;        // the cell that Sequence::shared refers to, -1 if there is none yet
  int64_t min_context;  // of all members
  int64_t via;          // the target that leads here from the last row of the node above
};

// A node on the path from a root to the group being split.
struct OpenNode {
  int64_t node;
  int64_t first, stop;   // depths
  int64_t first_row;     // depth of its first row; every token after it is a row too
  int64_t first_target;  // the target of that row
  int64_t via;
};

// What the second phase has to know about a node.
struct Node {
  int64_t start;      // its first token in the trie
  int64_t source;     // the same token in ids
  int64_t depth;      // of that token
  int64_t first_row;  // depth of its first row, at least the depth after its last token if it has none
  int64_t branches;   // distinct targets of its last row
  int64_t parent;
  int64_t end;
};

int64_t common_prefix(const int64_t* a, const int64_t* b, int64_t n) {
  int64_t i = 0;
  while (i + 8 <= n && std::memcmp(a + i, b + i, 8 * sizeof(int64_t)) == 0) i += 8;
  while (i < n && a[i] == b[i]) ++i;
  return i;
}

// Sorts by key, least significant byte first; bytes without a bit of `varying` are the same in all keys.
void radix_sort(Item* items, Item* spare, int64_t n, uint64_t varying) {
  Item *from = items, *to = spare;
  for (int shift = 0; shift < 64; shift += 8) {
    if (((varying >> shift) & 255) == 0) continue;
    int64_t count[256] = {};
    for (int64_t i = 0; i < n; ++i) ++count[(from[i].key >> shift) & 255];
    int64_t sum = 0;
    for (int64_t& c : count) sum += std::exchange(c, sum);
    for (int64_t i = 0; i < n; ++i) to[count[(from[i].key >> shift) & 255]++] = from[i];
    std::swap(from, to);
  }
  if (from != items) std::memcpy(items, from, n * sizeof(Item));
}

[[noreturn]] void refuse(const std::string& text) { throw std::invalid_argument(text); }

[[noreturn]] void refuse_sequence(int64_t cell, const std::string& text) {
  refuse("sequence " + std::to_string(cell) + ": " + text);
}

class Planner {
 public:
  Planner(const int64_t* ids, int64_t ids_size) : ids_(ids), ids_size_(ids_size) {}

  void read(const int64_t* offsets, int64_t offsets_size, const int64_t* context_lengths, int64_t cells);
  void build();
  Trie fill();

 private:
  void close_nodes(int64_t level);
  int64_t common_end(Group& group);
  void open_node(const Group& group, int64_t stop);
  void split(const Group& group, int64_t at);
  void sort(Item* items, int64_t n, uint64_t varying);
  void finish_alone(int64_t cell);
  void finish(int64_t cell, int64_t target);
  void refuse_negative() const;

  const int64_t* ids_;
  int64_t ids_size_;
  int64_t min_context_ = std::numeric_limits<int64_t>::max();
  int64_t tokens_ = 0, rows_ = 0, targets_ = 0;
  std::vector<Sequence> sequences_;
  std::vector<Item> items_;
  std::unique_ptr<Item[]> spare_;
  int64_t spare_size_ = 0;
  std::vector<Group> pending_;
  std::vector<OpenNode> open_;
  std::vector<Node> nodes_;
  // The targets of the last rows of all nodes, one node after the other.
  std::vector<int64_t> branches_;
  Array cell_ptr_, cell_target_, leaf_;
};

void Planner::read(const int64_t* offsets, int64_t offsets_size, const int64_t* context_lengths, int64_t cells) {
  if (offsets_size != cells + 1 || offsets[0] != 0 || offsets[cells] != ids_size_) {
    const bool any = offsets_size > 0;
    refuse("offsets: expected [" + std::to_string(cells + 1) + "] from 0 to " + std::to_string(ids_size_) + ", got [" +
           (any ? std::to_string(offsets[0]) : "") + "] to [" + (any ? std::to_string(offsets[offsets_size - 1]) : "") +
           "] in [" + std::to_string(offsets_size) + "]");
  }
  sequences_.reserve(cells);
  items_.reserve(cells);
  cell_ptr_ = Array(cells + 1);
  cell_ptr_[0] = 0;
  int64_t first = 0, outside = -1;
  for (int64_t c = 0; c < cells; ++c) {
    const int64_t stop = c + 1 < cells ? offsets[c + 1] : ids_size_, context = context_lengths[c];
    // Offsets may be anything here, so the difference wraps around as numpy's does.
    const int64_t full = static_cast<int64_t>(static_cast<uint64_t>(stop) - static_cast<uint64_t>(first));
    if (context < 1 || context >= full) {
      refuse_sequence(c, "expected at least 1 context and 1 response token, got a context of " + std::to_string(context) +
                             " in " + std::to_string(full) + " tokens");
    }
    if (outside < 0 && (stop < 0 || stop > ids_size_)) outside = c;
    sequences_.push_back({first, full - 1, context, 0});
    items_.push_back({0, c});
    min_context_ = std::min(min_context_, context);
    cell_ptr_[c + 1] =
        static_cast<int64_t>(static_cast<uint64_t>(cell_ptr_[c]) + static_cast<uint64_t>(full - context));
    first = stop;
  }
  if (outside >= 0) {
    refuse_sequence(outside, "its offsets are not within the " + std::to_string(ids_size_) + " ids");
  }
}

// The sequences of a group stand side by side and are cut where the first of them ends or leaves the others. Every
// token of a sequence is compared at most once with a pivot: a member that leaves its pivot does so at its first
// different token, and is compared with the next one from there on.
void Planner::build() {
  const int64_t cells = static_cast<int64_t>(sequences_.size());
  leaf_ = Array(cells);
  cell_target_ = Array(cell_ptr_[cells]);
  nodes_.reserve(cells);
  branches_.reserve(cells);
  if (cells) pending_.push_back({0, cells, 0, 0, 0, -1, min_context_, -1});
  while (!pending_.empty()) {
    Group group = pending_.back();
    pending_.pop_back();
    close_nodes(group.level);
    if (group.end - group.begin == 1) {
      const int64_t cell = items_[group.begin].cell;
      open_node(group, sequences_[cell].length);
      finish_alone(cell);
      continue;
    }
    const int64_t at = common_end(group);
    // Only the group of all sequences may share nothing.
    if (at > group.depth) open_node(group, at);
    split(group, at);
  }
  close_nodes(0);
  // Freed before the large arrays are made; assigning {} would keep the memory.
  std::vector<Item>().swap(items_);
  std::vector<Group>().swap(pending_);
  spare_.reset();
}

void Planner::close_nodes(int64_t level) {
  for (; static_cast<int64_t>(open_.size()) > level; open_.pop_back()) nodes_[open_.back().node].end = tokens_;
}

// Depth at which the first member ends or the members part.
int64_t Planner::common_end(Group& group) {
  int64_t least = std::numeric_limits<int64_t>::max();
  if (group.pivot < 0) {
    group.pivot = items_[group.begin].cell;
    Sequence& pivot = sequences_[group.pivot];
    pivot.shared = least = pivot.length;
    const int64_t* ours = ids_ + pivot.first + group.equal;
    for (int64_t i = group.begin + 1; i < group.end; ++i) {
      Sequence& other = sequences_[items_[i].cell];
      const int64_t most = std::min(pivot.length, other.length) - group.equal;
      other.shared = group.equal + common_prefix(ours, ids_ + other.first + group.equal, most);
      least = std::min(least, other.shared);
    }
  } else {
    for (int64_t i = group.begin; i < group.end; ++i) least = std::min(least, sequences_[items_[i].cell].shared);
  }
  // Holds anyway, unless somebody writes to ids meanwhile: then this is what makes the loop end.
  return std::max(least, group.equal);
}

void Planner::open_node(const Group& group, int64_t stop) {
  const int64_t node = static_cast<int64_t>(nodes_.size());
  const int64_t first_row = std::max(group.depth, group.min_context - 1);
  nodes_.push_back({tokens_, sequences_[items_[group.begin].cell].first + group.depth, group.depth, first_row, 0,
                    open_.empty() ? -1 : open_.back().node, 0});
  open_.push_back({node, group.depth, stop, first_row, targets_, group.via});
  tokens_ += stop - group.depth;
  if (first_row < stop) {
    rows_ += stop - first_row;
    // Each row but the last has one target, the next token of the node.
    targets_ += stop - first_row - 1;
  }
}

// Ends the members of length `at` and makes a group of the others for each token that follows.
void Planner::split(const Group& group, int64_t at) {
  Item* items = items_.data();
  const Sequence& pivot = sequences_[group.pivot];
  const uint64_t pivot_key = static_cast<uint64_t>(ids_[pivot.first + at]);
  uint64_t varying = 0, before = 0;
  bool sorted = true;
  for (int64_t i = group.begin; i < group.end; ++i) {
    const Sequence& sequence = sequences_[items[i].cell];
    const uint64_t key = sequence.shared > at ? pivot_key : static_cast<uint64_t>(ids_[sequence.first + at]);
    items[i].key = key;
    varying |= key ^ pivot_key;
    sorted &= key >= before;
    before = key;
  }
  if (!sorted) sort(items + group.begin, group.end - group.begin, varying);

  const size_t mark = pending_.size();
  const int64_t level = static_cast<int64_t>(open_.size());
  int64_t branches = 0;
  for (int64_t i = group.begin; i < group.end;) {
    const uint64_t key = items[i].key;
    const int64_t begin = i;
    int64_t end = i, min_context = std::numeric_limits<int64_t>::max();
    bool predicted = false;
    for (; i < group.end && items[i].key == key; ++i) {
      const Sequence& sequence = sequences_[items[i].cell];
      if (sequence.length == at) {
        predicted = true;
        finish(items[i].cell, targets_);
      } else {
        min_context = std::min(min_context, sequence.context);
        items[end++].cell = items[i].cell;
      }
    }
    predicted |= min_context <= at;
    if (end > begin) {
      const bool keeps = key == pivot_key && pivot.length > at;
      pending_.push_back({begin, end, at, at + 1, level, keeps ? group.pivot : -1, min_context, targets_});
    }
    if (predicted) {
      branches_.push_back(static_cast<int64_t>(key));
      ++branches;
      ++targets_;
    }
  }
  if (branches) nodes_[open_.back().node].branches = branches;
  // The last one pushed is the next one visited, and tokens ascend.
  std::reverse(pending_.begin() + mark, pending_.end());
}

// The order of equal keys does not show in any result.
void Planner::sort(Item* items, int64_t n, uint64_t varying) {
  if (n < kRadixFrom) {
    std::sort(items, items + n, [](const Item& a, const Item& b) { return a.key < b.key; });
    return;
  }
  if (spare_size_ < n) {
    spare_.reset(new Item[n]);
    spare_size_ = n;
  }
  radix_sort(items, spare_.get(), n, varying);
}

// The only member of its group: nothing to compare or sort.
void Planner::finish_alone(int64_t cell) {
  const Sequence& sequence = sequences_[cell];
  finish(cell, targets_++);
  branches_.push_back(ids_[sequence.first + sequence.length]);
  nodes_.back().branches = 1;
}

// Writes the leaf and the targets of a cell that ends with the open node and whose last target is `target`.
void Planner::finish(int64_t cell, int64_t target) {
  leaf_[cell] = tokens_ - 1;
  const int64_t from = sequences_[cell].context - 1;
  int64_t* const out = &cell_target_[cell_ptr_[cell]];
  for (const OpenNode* node = &open_.back();; --node) {
    out[node->stop - 1 - from] = target;
    const int64_t base = node->first_target - node->first_row;
    for (int64_t t = std::max(node->first, from); t < node->stop - 1; ++t) out[t - from] = base + t;
    if (from >= node->first) return;
    target = node->via;
  }
}

Trie Planner::fill() {
  Trie trie;
  const int64_t nodes = static_cast<int64_t>(nodes_.size());
  trie.tokens = Array(tokens_), trie.depth = Array(tokens_);
  trie.node_start = Array(nodes), trie.node_stop = Array(nodes);
  trie.node_parent = Array(nodes), trie.node_end = Array(nodes);
  trie.row_token = Array(rows_), trie.target_ptr = Array(rows_ + 1), trie.targets = Array(targets_);
  int64_t row = 0, target = 0, signs = 0;
  const int64_t* branch = branches_.data();
  for (int64_t i = 0; i < nodes; ++i) {
    const Node& node = nodes_[i];
    const int64_t stop = i + 1 < nodes ? nodes_[i + 1].start : tokens_, size = stop - node.start;
    trie.node_start[i] = node.start;
    trie.node_stop[i] = stop;
    trie.node_parent[i] = node.parent;
    trie.node_end[i] = node.end;
    const int64_t* const source = ids_ + node.source;
    int64_t *const tokens = &trie.tokens[node.start], *const depth = &trie.depth[node.start];
    for (int64_t j = 0; j < size; ++j) {
      tokens[j] = source[j];
      signs |= source[j];
    }
    for (int64_t j = 0; j < size; ++j) depth[j] = node.depth + j;
    for (int64_t j = node.first_row - node.depth; j < size; ++j) {
      trie.row_token[row] = node.start + j;
      trie.target_ptr[row++] = target;
      if (j + 1 < size) trie.targets[target++] = source[j + 1];
    }
    for (int64_t j = 0; j < node.branches; ++j) {
      signs |= *branch;
      trie.targets[target++] = *branch++;
    }
  }
  trie.target_ptr[row] = target;
  // Every id is a token of the trie or, at the end of a sequence, a target of its leaf, so none has been overlooked.
  if (signs < 0) refuse_negative();
  trie.cell_ptr = std::move(cell_ptr_), trie.cell_target = std::move(cell_target_), trie.leaf = std::move(leaf_);
  trie.dense_tokens = ids_size_ - static_cast<int64_t>(sequences_.size());
  return trie;
}

void Planner::refuse_negative() const {
  const int64_t at = std::min_element(ids_, ids_ + ids_size_) - ids_;
  const auto after = std::upper_bound(sequences_.begin(), sequences_.end(), at,
                                      [](int64_t id, const Sequence& sequence) { return id < sequence.first; });
  refuse_sequence(after - sequences_.begin() - 1, "token ids must not be negative, got " + std::to_string(ids_[at]));
}

}  // namespace

Array::Array(int64_t n) : size(n) {
  if (n < 0 || n > std::numeric_limits<int64_t>::max() / 16) throw std::bad_alloc();
  size_t bytes = std::max<size_t>(1, static_cast<size_t>(n)) * sizeof(int64_t);
  if (bytes < 2 * kHugePage) {
    data.reset(static_cast<int64_t*>(std::malloc(bytes)));
  } else {
    // Filling fresh pages of 4 KiB takes longer than the planning.
    bytes = (bytes + kHugePage - 1) / kHugePage * kHugePage;
    data.reset(static_cast<int64_t*>(std::aligned_alloc(kHugePage, bytes)));
#if defined(__linux__)
    if (data) madvise(data.get(), bytes, MADV_HUGEPAGE);
#endif
  }
  if (!data) throw std::bad_alloc();
}

Trie plan(const int64_t* ids, int64_t ids_size, const int64_t* offsets, int64_t offsets_size,
          const int64_t* context_lengths, int64_t context_lengths_size) {
  Planner planner(ids, ids_size);
  planner.read(offsets, offsets_size, context_lengths, context_lengths_size);
  planner.build();
  return planner.fill();
}

}  // namespace sapo
