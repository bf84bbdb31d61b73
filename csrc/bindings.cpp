// The Python module `_planner`: arrays in, arrays out, neither copied.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>
#include <utility>
#include <vector>

#include "passes.h"
#include "trie.h"

#ifndef SAPO_ABI
#error "compile with -DSAPO_ABI=<ABI of sapo_kernels/native.py>"
#endif

namespace py = pybind11;

namespace {

// A conversion here would be a hidden copy, so anything but the one layout that can be read in place is refused.
template <typename T>
py::array flat(const py::object& values, const char* name) {
  const py::dtype type = py::dtype::of<T>();
  const auto refuse = [&](const std::string& got) {
    throw py::type_error(std::string(name) + ": expected a C-contiguous, aligned, flat numpy array of " +
                         py::str(type).cast<std::string>() + ", got " + got);
  };
  if (!py::isinstance<py::array>(values)) {
    refuse(py::str(py::type::handle_of(values).attr("__name__")).cast<std::string>());
  }
  py::array array = py::reinterpret_borrow<py::array>(values);
  const py::dtype dtype = array.dtype();
  const bool native = dtype.kind() == type.kind() && dtype.itemsize() == type.itemsize() &&
                      (dtype.byteorder() == '=' || dtype.byteorder() == '|');
  const bool aligned = reinterpret_cast<uintptr_t>(array.data()) % alignof(T) == 0;
  if (!native || !aligned || array.ndim() != 1 || !(array.flags() & py::array::c_style)) {
    refuse(py::str(dtype).cast<std::string>() + " with strides " + py::str(array.attr("strides")).cast<std::string>());
  }
  return array;
}

template <typename T>
const T* begin(const py::array& array) {
  return static_cast<const T*>(array.data());
}

void expect_size(const py::array& array, const char* name, py::ssize_t size) {
  if (array.size() == size) return;
  throw py::value_error(std::string(name) + ": expected [" + std::to_string(size) + "], got [" +
                        std::to_string(array.size()) + "]");
}

void expect_one(const char* name, int64_t value) {
  if (value < 1) throw py::value_error(std::string(name) + ": expected at least 1, got " + std::to_string(value));
}

// The numpy array takes the buffer over.
py::array_t<int64_t> hand_over(sapo::Array& array) {
  int64_t* const data = array.data.get();
  py::capsule owner(data, [](void* p) { sapo::Free()(static_cast<int64_t*>(p)); });
  array.data.release();
  return py::array_t<int64_t>(array.size, data, owner);
}

template <typename T>
py::array_t<T> hand_over(std::vector<T>& values) {
  auto* const kept = new std::vector<T>(std::move(values));
  py::capsule owner(kept, [](void* p) { delete static_cast<std::vector<T>*>(p); });
  return py::array_t<T>(kept->size(), kept->data(), owner);
}

py::dict plan(const py::object& ids, const py::object& offsets, const py::object& context_lengths) {
  // These references keep the memory alive while other Python threads run.
  const py::array ids_array = flat<int64_t>(ids, "ids");
  const py::array offsets_array = flat<int64_t>(offsets, "offsets");
  const py::array context_array = flat<int64_t>(context_lengths, "context_lengths");
  sapo::Trie trie;
  {
    const auto *i = begin<int64_t>(ids_array), *o = begin<int64_t>(offsets_array), *c = begin<int64_t>(context_array);
    const int64_t ids_size = ids_array.size(), offsets_size = offsets_array.size(), cells = context_array.size();
    py::gil_scoped_release release;
    trie = sapo::plan(i, ids_size, o, offsets_size, c, cells);
  }
  py::dict result;
  result["tokens"] = hand_over(trie.tokens);
  result["depth"] = hand_over(trie.depth);
  result["node_start"] = hand_over(trie.node_start);
  result["node_stop"] = hand_over(trie.node_stop);
  result["node_parent"] = hand_over(trie.node_parent);
  result["node_end"] = hand_over(trie.node_end);
  result["row_token"] = hand_over(trie.row_token);
  result["target_ptr"] = hand_over(trie.target_ptr);
  result["targets"] = hand_over(trie.targets);
  result["cell_ptr"] = hand_over(trie.cell_ptr);
  result["cell_target"] = hand_over(trie.cell_target);
  result["leaf"] = hand_over(trie.leaf);
  result["dense_tokens"] = trie.dense_tokens;
  return result;
}

py::list passes(const py::object& depth, const py::object& node_start, const py::object& node_stop,
                const py::object& node_parent, const py::object& node_end, const py::object& row_token,
                const py::object& cached, int64_t max_tokens, int64_t block_tokens) {
  const py::array depths = flat<int64_t>(depth, "depth"), starts = flat<int64_t>(node_start, "node_start");
  const py::array stops = flat<int64_t>(node_stop, "node_stop"), parents = flat<int64_t>(node_parent, "node_parent");
  const py::array ends = flat<int64_t>(node_end, "node_end"), rows = flat<int64_t>(row_token, "row_token");
  py::array kept;
  if (!cached.is_none()) expect_size(kept = flat<bool>(cached, "cached"), "cached", depths.size());
  expect_size(stops, "node_stop", starts.size());
  expect_size(parents, "node_parent", starts.size());
  expect_size(ends, "node_end", starts.size());
  expect_one("max_tokens", max_tokens);
  expect_one("block_tokens", block_tokens);
  const sapo::TrieView view{begin<int64_t>(depths),
                            begin<int64_t>(starts),
                            begin<int64_t>(stops),
                            begin<int64_t>(parents),
                            begin<int64_t>(ends),
                            begin<int64_t>(rows),
                            cached.is_none() ? nullptr : begin<bool>(kept),
                            depths.size(),
                            starts.size(),
                            rows.size()};
  std::vector<sapo::Pass> made;
  {
    py::gil_scoped_release release;
    made = sapo::passes(view, max_tokens, block_tokens);
  }
  py::list result;
  for (sapo::Pass& one : made) {
    py::dict pass;
    pass["start"] = one.start;
    pass["stop"] = one.stop;
    pass["num_past"] = one.num_past;
    pass["num_cached"] = one.num_cached;
    pass["first_row"] = one.first_row;
    pass["last_row"] = one.last_row;
    pass["new"] = hand_over(one.fresh);
    pass["position"] = hand_over(one.position);
    pass["subtree_end"] = hand_over(one.subtree_end);
    pass["block_start"] = hand_over(one.block_start);
    pass["span_ptr"] = hand_over(one.span_ptr);
    pass["span"] = hand_over(one.span);
    pass["next_past"] = hand_over(one.next_past);
    pass["rows"] = hand_over(one.rows);
    result.append(pass);
  }
  return result;
}

py::array_t<int32_t> tiles(const py::object& subtree_end, const py::object& block_start, const py::object& span_ptr,
                           const py::object& span, int64_t tokens, int64_t chunk) {
  const py::array end = flat<int32_t>(subtree_end, "subtree_end"), starts = flat<int32_t>(block_start, "block_start");
  const py::array pointer = flat<int32_t>(span_ptr, "span_ptr"), spans = flat<int32_t>(span, "span");
  if (!starts.size()) throw py::value_error("block_start: expected at least one, got none");
  expect_size(pointer, "span_ptr", starts.size());
  expect_one("tokens", tokens);
  expect_one("chunk", chunk);
  const sapo::PassView view{begin<int32_t>(end), begin<int32_t>(starts), begin<int32_t>(pointer), begin<int32_t>(spans),
                            end.size(),          starts.size() - 1,      spans.size() / 2};
  std::vector<int32_t> made;
  {
    py::gil_scoped_release release;
    made = sapo::tiles(view, tokens, chunk);
  }
  return hand_over(made);
}

}  // namespace

PYBIND11_MODULE(_planner, m) {
  m.doc() = "The token-trie planner in C++; numpy gives the same arrays in sapo_kernels/trie.";
  m.attr("ABI") = SAPO_ABI;
  m.def("plan", &plan, py::arg("ids"), py::arg("offsets"), py::arg("context_lengths"),
        "The arrays of a TokenTrie as a dict, from C-contiguous int64 arrays; the GIL is released meanwhile.");
  m.def("passes", &passes, "The passes of a TokenTrie, each a dict of arrays; see passes.h.");
  m.def("tiles", &tiles, "The array of `build_tiles`; see passes.h.");
}
