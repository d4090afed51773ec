// mlp_adapt for both doors, torch (cpu/) and NumPy (numpy/): the order of its sweeps over the core of the instruction
// set in use. Torch-free; the doors bring arrays that are checked and contiguous, memory, and threads.
#pragma once

#include <cstdint>
#include <string>

#include "core/mlp_adapt_args.h"
#include "phases.h"

namespace mtml {

// elements of T that mlp_adapt_forward leaves for mlp_adapt_backward
template <class T>
int64_t mlp_adapt_state_size(const MlpArguments<T>& arguments);

// outputs, losses, fast; `state` may be null where no backward sweep follows, or where it will recompute
template <class T>
void mlp_adapt_forward(const MlpArguments<T>& arguments, T* state, Threads threads);

// all gradients that are wanted; without `state` the forward sweep is done again
template <class T>
void mlp_adapt_backward(const MlpArguments<T>& arguments, const T* state, Threads threads);

// both at once for known cotangents, a task's intermediate results still in the cache: writes what both write
template <class T>
void mlp_adapt_gradients(const MlpArguments<T>& arguments, Threads threads);

// What the plan is and what it costs, as JSON: {"layers": [{"form": "gram"|"factored"|"dense", ...}], "operations": n,
// "bytes": n}: floating-point operations of forward and backward, and the most bytes of state and workspace at a time,
// for one thread; `keeps_state`: the forward sweep leaves its state for the backward sweep.
template <class T>
std::string mlp_adapt_plan(const MlpArguments<T>& arguments, bool backward, bool keeps_state);

}  // namespace mtml
