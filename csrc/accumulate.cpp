#include "accumulate_args.h"

#include "check.h"

namespace sapo {
namespace {

// Raises if the lists of a cell do not fit together or to this piece.
template <typename Real>
void check_cell(const Accumulate<Real>& a, int64_t cell) {
  const int64_t begin = a.cell_ptr[cell], end = a.cell_ptr[cell + 1], done = a.tokens[cell];
  SAPO_CHECK(0 <= begin && begin <= end && end <= a.entries, "accumulate_: cell_ptr: cell ", cell,
             ": expected an ascending range inside ", a.entries, " entries, got ", begin, " to ", end);
  SAPO_CHECK(0 <= done && done <= end - begin, "accumulate_: tokens: cell ", cell, ": expected from 0 to its ",
             end - begin, " entries, got ", done);
  for (int64_t e = begin + done; e < end; ++e) {
    const int64_t target = a.cell_target[e];
    SAPO_CHECK(target >= a.start, "accumulate_: cell_target: cell ", cell, ": expected its next target in this piece, ",
               "which begins at ", a.start, ", or after it, got ", target, ": a piece was left out");
    if (target - a.start >= a.count) break;
  }
}

}  // namespace

template <typename Real>
void run_cpu(const Accumulate<Real>& a) {
  for (int64_t cell = 0; cell < a.cells; ++cell) check_cell(a, cell);
  for (int64_t cell = 0; cell < a.cells; ++cell) {
    const int64_t begin = a.cell_ptr[cell], end = a.cell_ptr[cell + 1];
    double sum = a.nll[cell];
    int64_t e = begin + a.tokens[cell];
    for (; e < end && a.cell_target[e] - a.start < a.count; ++e) {
      sum -= static_cast<double>(a.logprob[a.cell_target[e] - a.start]);
    }
    a.nll[cell] = sum;
    a.tokens[cell] = e - begin;
  }
}

template void run_cpu(const Accumulate<float>&);
template void run_cpu(const Accumulate<double>&);

}  // namespace sapo
