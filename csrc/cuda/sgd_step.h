// sgd_step on a GPU, without torch: plain pointers to the device's memory, sizes, a stream (a cudaStream_t). Returns a
// cudaError_t, 0 for none. The formulas stand in core/sgd_step.h.
//
// Launches: 1 for up to 28 leaves, one more for each further 28; twice as many with clipping. The reverse needs one or
// two more for the gradients of rates that tasks or elements share.
#pragma once

#include <cstdint>

#include "core/sgd_step_args.h"

extern "C" {

// The doubles of workspace that a call with these leaves needs; backward 0 or 1.
int64_t mtml_cuda_sgd_step_workspace(const int64_t* sizes, int64_t num_leaves, int64_t num_tasks,
                                     const mtml::SgdOptions* options, int backward);

int mtml_cuda_sgd_step_f32(const mtml::SgdLeaf<float>* leaves, int64_t num_leaves, int64_t num_tasks,
                           const mtml::SgdOptions* options, double* workspace, void* stream);
int mtml_cuda_sgd_step_f64(const mtml::SgdLeaf<double>* leaves, int64_t num_leaves, int64_t num_tasks,
                           const mtml::SgdOptions* options, double* workspace, void* stream);

// `dlr` of a leaf's gradients is in the layout of its rate, whatever that is, and `dlr_task` is not used. Where all
// leaves share a rate, one_rate is 1 and all have the same `dlr`.
int mtml_cuda_sgd_step_backward_f32(const mtml::SgdLeaf<float>* leaves, const mtml::SgdLeafGradient<float>* gradients,
                                    int64_t num_leaves, int64_t num_tasks, const mtml::SgdOptions* options,
                                    int one_rate, double* workspace, void* stream);
int mtml_cuda_sgd_step_backward_f64(const mtml::SgdLeaf<double>* leaves, const mtml::SgdLeafGradient<double>* gradients,
                                    int64_t num_leaves, int64_t num_tasks, const mtml::SgdOptions* options,
                                    int one_rate, double* workspace, void* stream);

}  // extern "C"
