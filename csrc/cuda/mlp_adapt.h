// mlp_adapt on a GPU, without torch: plain pointers to the device's memory, sizes, a stream (a cudaStream_t). Returns a
// cudaError_t, 0 for none. Arrays are those of core/mlp_adapt_args.h; where the gradients of rates go is said below,
// and `rate_sums` is not used.
//
// Launches: one forward; one for the reverse, and one more for what it adds up over tasks.
#pragma once

#include <cstdint>

#include "core/mlp_adapt_args.h"

namespace mtml::cuda {

// of a network; no call may have more
constexpr int64_t kMlpLayers = 16;

// The gradients of rates: of a table [rows, columns], rows 1 or at least K, columns 1 or the parameters; or of each
// parameter p that has one for each element, rate_gradient [parameter_rows[p], its elements].
template <class T>
struct MlpRateGradients {
  T* table;  // null where there is no table, or its gradient is not wanted
  int64_t rows, columns;
  const int64_t* parameter_rows;
};

}  // namespace mtml::cuda

extern "C" {

// The elements of what the forward sweep leaves for the reverse (keeps = 1), or needs for itself.
int64_t mtml_cuda_mlp_adapt_state_f32(const mtml::MlpArguments<float>* arguments, int keeps);
int64_t mtml_cuda_mlp_adapt_state_f64(const mtml::MlpArguments<double>* arguments, int keeps);
// The doubles of the reverse's workspace.
int64_t mtml_cuda_mlp_adapt_workspace_f32(const mtml::MlpArguments<float>* arguments);
int64_t mtml_cuda_mlp_adapt_workspace_f64(const mtml::MlpArguments<double>* arguments);

int mtml_cuda_mlp_adapt_f32(const mtml::MlpArguments<float>* arguments, int keeps, float* state, void* stream);
int mtml_cuda_mlp_adapt_f64(const mtml::MlpArguments<double>* arguments, int keeps, double* state, void* stream);

int mtml_cuda_mlp_adapt_backward_f32(const mtml::MlpArguments<float>* arguments,
                                     const mtml::cuda::MlpRateGradients<float>* rates, const float* state,
                                     double* workspace, void* stream);
int mtml_cuda_mlp_adapt_backward_f64(const mtml::MlpArguments<double>* arguments,
                                     const mtml::cuda::MlpRateGradients<double>* rates, const double* state,
                                     double* workspace, void* stream);

// The gradient of a table of rates alone, from what each task adds to it: rate_sums [params, T, K]. One launch.
int mtml_cuda_mlp_adapt_rates_f32(const mtml::MlpArguments<float>* arguments,
                                  const mtml::cuda::MlpRateGradients<float>* rates, const double* rate_sums,
                                  void* stream);
int mtml_cuda_mlp_adapt_rates_f64(const mtml::MlpArguments<double>* arguments,
                                  const mtml::cuda::MlpRateGradients<double>* rates, const double* rate_sums,
                                  void* stream);

}  // extern "C"
