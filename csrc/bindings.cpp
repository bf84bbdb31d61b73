// The Python module `_planner`: arrays in, arrays out, neither copied.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>

#include "trie.h"

#ifndef SAPO_ABI
#error "compile with -DSAPO_ABI=<ABI of sapo_kernels/native.py>"
#endif

namespace py = pybind11;

namespace {

// A conversion here would be a hidden copy, so anything but the one layout that can be read in place is refused.
py::array flat_int64(const py::object& values, const char* name) {
  const std::string wanted = std::string(name) + ": expected a C-contiguous, aligned, flat numpy array of int64, got ";
  if (!py::isinstance<py::array>(values)) {
    throw py::type_error(expected + py::str(py::type::handle_of(values).attr("__name__")).cast<std::string>());
  }
  py::array array = py::reinterpret_borrow<py::array>(values);
  const py::dtype dtype = array.dtype();
  const bool native = dtype.kind() == 'i' && dtype.itemsize() == 8 && dtype.byteorder() == '=';
  const bool aligned = reinterpret_cast<uintptr_t>(array.data()) % alignof(int64_t) == 0;
  if (!native || !aligned || array.ndim() != 1 || !(array.flags() & py::array::c_style)) {
    throw py::type_error(expected + py::str(dtype).cast<std::string>() + " with strides " +
                         py::str(array.attr("strides")).cast<std::string>());
  }
  return array;
}

// The numpy array takes the buffer over.
py::array_t<int64_t> hand_over(sapo::Array& array) {
  int64_t* const data = array.data.get();
  py::capsule owner(data, [](void* p) { sapo::Free()(static_cast<int64_t*>(p)); });
  array.data.release();
  return py::array_t<int64_t>(array.size, data, owner);
}

py::dict plan(const py::object& ids, const py::object& offsets, const py::object& context_lengths) {
  // These references keep the memory alive while other Python threads run.
  const py::array ids_array = flat_int64(ids, "ids");
  const py::array offsets_array = flat_int64(offsets, "offsets");
  const py::array context_array = flat_int64(context_lengths, "context_lengths");
  sapo::Trie trie;
  {
    const auto* i = static_cast<const int64_t*>(ids_array.data());
    const auto* o = static_cast<const int64_t*>(offsets_array.data());
    const auto* c = static_cast<const int64_t*>(context_array.data());
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

}  // namespace

PYBIND11_MODULE(_planner, m) {
  m.doc() = "The token-trie planner in C++; sapo_kernels.planner.plan_numpy gives the same arrays.";
  m.attr("ABI") = SAPO_ABI;
  m.def("plan", &plan, py::arg("ids"), py::arg("offsets"), py::arg("context_lengths"),
        "The arrays of a TokenTrie as a dict, from C-contiguous int64 arrays; the GIL is released meanwhile.");
}
