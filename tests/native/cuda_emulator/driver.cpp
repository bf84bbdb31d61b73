// The launchers of csrc/cuda/*.cu as C functions over raw pointers, for ctypes.
#include "../../../csrc/accumulate_args.h"
#include "../../../csrc/reweight_args.h"

extern "C" {

void emulate_reweight(double* mean, double* weight, double* probs, int64_t* best, double* effective,
                      const uint8_t* live, const double* nll, const int64_t* tokens, int64_t pools, int64_t prompts,
                      double decay, double inverse_temperature, double floor) {
  sapo::run_cuda(sapo::Reweight{mean, weight, probs, best, effective, live, nll, tokens, pools, prompts, decay,
                                inverse_temperature, floor},
                 nullptr);
}

void emulate_accumulate(double* nll, int64_t* tokens, const float* logprob, const int64_t* cell_target,
                        const int64_t* cell_ptr, int64_t cells, int64_t entries, int64_t start, int64_t count) {
  sapo::run_cuda(sapo::Accumulate<float>{nll, tokens, logprob, cell_target, cell_ptr, cells, entries, start, count},
                 nullptr);
}

}  // extern "C"
