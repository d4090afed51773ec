// mlp_adapt on a GPU, without torch: plain pointers to the device's memory, sizes, a stream (a cudaStream_t). Returns a
// cudaError_t, 0 for none. Arrays are those of core/mlp_adapt_args.h; where the gradients of rates go is said below,
// and `rate_sums` is not used.
//
// Launches: one forward; one for the reverse, and one more for what it adds up over tasks. What a first layer in Gram
// form takes of torch's products is the caller's.
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

// The first layer in Gram form (docs/maths/mlp_adapt.md): what products of all tasks' rows give, and take. The weight
// of task t after k steps is W_0 + E^T X_t; the kernels have E [N, H] alone, and the layer is no part of their vectors.
template <class T>
struct MlpGram {
  const T *support_z, *query_z;              // [R, H]: X W_0^T
  const T *gram, *cross, *cross_transposed;  // X X^T [T, N, N], Xq X^T [T, Q, N] and its transpose [T, N, Q]
  // of the reverse: the sums of the cotangents of the layer's outputs [R, H], which the sweep writes, and what they
  // give with their rows, [H, D]: the sums over tasks add the two up
  T *support_u, *query_u;
  const T *support_gradient, *query_gradient;
};

}  // namespace mtml::cuda

extern "C" {

// Whether the first layer of a call is to be in Gram form, 1 or 0: then the functions below get an MlpGram, else null.
int mtml_cuda_mlp_adapt_is_gram_f32(const mtml::MlpArguments<float>* arguments);
int mtml_cuda_mlp_adapt_is_gram_f64(const mtml::MlpArguments<double>* arguments);

// The elements of what the forward sweep leaves for the reverse (keeps = 1), or needs for itself.
int64_t mtml_cuda_mlp_adapt_state_f32(const mtml::MlpArguments<float>* arguments, int is_gram, int keeps);
int64_t mtml_cuda_mlp_adapt_state_f64(const mtml::MlpArguments<double>* arguments, int is_gram, int keeps);
// The doubles of the reverse's workspace.
int64_t mtml_cuda_mlp_adapt_workspace_f32(const mtml::MlpArguments<float>* arguments, int is_gram);
int64_t mtml_cuda_mlp_adapt_workspace_f64(const mtml::MlpArguments<double>* arguments, int is_gram);

int mtml_cuda_mlp_adapt_f32(const mtml::MlpArguments<float>* arguments, const mtml::cuda::MlpGram<float>* gram,
                            int keeps, float* state, void* stream);
int mtml_cuda_mlp_adapt_f64(const mtml::MlpArguments<double>* arguments, const mtml::cuda::MlpGram<double>* gram,
                            int keeps, double* state, void* stream);

int mtml_cuda_mlp_adapt_backward_f32(const mtml::MlpArguments<float>* arguments, const mtml::cuda::MlpGram<float>* gram,
                                     const float* state, double* workspace, void* stream);
int mtml_cuda_mlp_adapt_backward_f64(const mtml::MlpArguments<double>* arguments,
                                     const mtml::cuda::MlpGram<double>* gram, const double* state, double* workspace,
                                     void* stream);
// What tasks add up, behind the sweep and with its workspace.
int mtml_cuda_mlp_adapt_sums_f32(const mtml::MlpArguments<float>* arguments, const mtml::cuda::MlpGram<float>* gram,
                                 const mtml::cuda::MlpRateGradients<float>* rates, double* workspace, void* stream);
int mtml_cuda_mlp_adapt_sums_f64(const mtml::MlpArguments<double>* arguments, const mtml::cuda::MlpGram<double>* gram,
                                 const mtml::cuda::MlpRateGradients<double>* rates, double* workspace, void* stream);

// The gradient of a table of rates alone, from what each task adds to it: rate_sums [params, T, K]. One launch.
int mtml_cuda_mlp_adapt_rates_f32(const mtml::MlpArguments<float>* arguments,
                                  const mtml::cuda::MlpRateGradients<float>* rates, double* rate_sums, void* stream);
int mtml_cuda_mlp_adapt_rates_f64(const mtml::MlpArguments<double>* arguments,
                                  const mtml::cuda::MlpRateGradients<double>* rates, double* rate_sums, void* stream);

}  // extern "C"

namespace mtml::cuda {

// the functions above by the type of their numbers
template <class T>
struct MlpKernels;
template <>
struct MlpKernels<float> {
  static constexpr auto is_gram = mtml_cuda_mlp_adapt_is_gram_f32;
  static constexpr auto state = mtml_cuda_mlp_adapt_state_f32;
  static constexpr auto workspace = mtml_cuda_mlp_adapt_workspace_f32;
  static constexpr auto forward = mtml_cuda_mlp_adapt_f32;
  static constexpr auto backward = mtml_cuda_mlp_adapt_backward_f32;
  static constexpr auto sums = mtml_cuda_mlp_adapt_sums_f32;
  static constexpr auto rates = mtml_cuda_mlp_adapt_rates_f32;
};
template <>
struct MlpKernels<double> {
  static constexpr auto is_gram = mtml_cuda_mlp_adapt_is_gram_f64;
  static constexpr auto state = mtml_cuda_mlp_adapt_state_f64;
  static constexpr auto workspace = mtml_cuda_mlp_adapt_workspace_f64;
  static constexpr auto forward = mtml_cuda_mlp_adapt_f64;
  static constexpr auto backward = mtml_cuda_mlp_adapt_backward_f64;
  static constexpr auto sums = mtml_cuda_mlp_adapt_sums_f64;
  static constexpr auto rates = mtml_cuda_mlp_adapt_rates_f64;
};

}  // namespace mtml::cuda
