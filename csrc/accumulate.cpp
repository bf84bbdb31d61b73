#include "accumulate_args.h"

#include <utility>

#include "check.h"

namespace sapo {
namespace {

// The list entries [first, stop) that this piece brings to one cell; raises if the lists do not fit together.
template <typename Real>
std::pair<int64_t, int64_t> ready(const Accumulate<Real>& a, int64_t cell) {
  const int64_t begin = a.cell_ptr[cell], end = a.cell_ptr[cell + 1], done = a.tokens[cell];
  SAPO_CHECK(0 <= begin && begin <= end && end <= a.entries, "accumulate_: cell_ptr: cell ", cell,
             ": wanted an ascending range inside ", a.entries, " entries, got ", begin, " to ", end);
  SAPO_CHECK(0 <= done && done <= end - begin, "accumulate_: tokens: cell ", cell, ": wanted from 0 to its ",
             end - begin, " entries, got ", done);
  int64_t stop = begin + done;
  for (; stop < end; ++stop) {
    const int64_t target = a.cell_target[stop];
    SAPO_CHECK(target >= a.start, "accumulate_: cell_target: cell ", cell, ": wanted its next target in this piece, ",
               "which begins at ", a.start, ", or after it, got ", target, ": a piece was left out");
    if (target - a.start >= a.count) break;
  }
  return {begin + done, stop};
}

}  // namespace

template <typename Real>
void accumulate_cpu(const Accumulate<Real>& a) {
  for (int64_t cell = 0; cell < a.cells; ++cell) ready(a, cell);
  for (int64_t cell = 0; cell < a.cells; ++cell) {
    const auto [first, stop] = ready(a, cell);
    double sum = a.nll[cell];
    for (int64_t e = first; e < stop; ++e) sum -= static_cast<double>(a.logprob[a.cell_target[e] - a.start]);
    a.nll[cell] = sum;
    a.tokens[cell] += stop - first;
  }
}

template void accumulate_cpu<float>(const Accumulate<float>&);
template void accumulate_cpu<double>(const Accumulate<double>&);

}  // namespace sapo
