// mlp_adapt of one layer, a linear head on features that do not change, on a GPU and without torch: in dual form, so
// that the K steps and their reverse live in the space of rows times classes (docs/maths/mlp_adapt.md). All pointers of
// the arguments are the device's, but for `params` and `options.widths`, which the host reads; `offsets` are the
// device's, or null where every task has max_rows rows. Returns a cudaError_t, 0 for none.
//
// Launches: forward 1, backward 1, and 1 more where tasks share a start whose gradient is wanted. None reads data on
// the host or waits.
#pragma once

#include <cstdint>

#include "core/mlp_adapt_args.h"

extern "C" {

// Whether a call is for these kernels, 1 or 0: one layer, rates that the elements of a parameter share, no clipping,
// and support rows whose Gram matrix fits into a block's shared memory (about 140 in float32, 100 in float64).
int mtml_cuda_linear_adapt_serves_f32(const mtml::MlpArguments<float>* arguments);
int mtml_cuda_linear_adapt_serves_f64(const mtml::MlpArguments<double>* arguments);

// The elements of the state, which the forward call writes and the backward call reads, and of the workspace of the
// backward call. Both must begin at a multiple of 16 bytes.
int64_t mtml_cuda_linear_adapt_state_size_f32(const mtml::MlpArguments<float>* arguments);
int64_t mtml_cuda_linear_adapt_state_size_f64(const mtml::MlpArguments<double>* arguments);
int64_t mtml_cuda_linear_adapt_workspace_size_f32(const mtml::MlpArguments<float>* arguments);
int64_t mtml_cuda_linear_adapt_workspace_size_f64(const mtml::MlpArguments<double>* arguments);

int mtml_cuda_linear_adapt_forward_f32(const mtml::MlpArguments<float>* arguments, float* state, void* stream);
int mtml_cuda_linear_adapt_forward_f64(const mtml::MlpArguments<double>* arguments, double* state, void* stream);

// Writes every gradient that is not null: params' `gradient`, `rate_sums`, and the rows' `x_gradient`.
int mtml_cuda_linear_adapt_backward_f32(const mtml::MlpArguments<float>* arguments, const float* state,
                                        float* workspace, void* stream);
int mtml_cuda_linear_adapt_backward_f64(const mtml::MlpArguments<double>* arguments, const double* state,
                                        double* workspace, void* stream);

}  // extern "C"
