// heads and heads_loss for both doors, torch (cpu/) and NumPy (numpy/): the rows of all tasks, divided among threads.
// Torch-free; the doors bring arrays that are checked and contiguous, and threads.
#pragma once

#include <cstdint>

#include "core/heads_args.h"
#include "phases.h"

namespace mtml {

// The heads of all tasks and their rows. `in` has the axes of HeadTensors packed task after task: x [R, D],
// weight [sum of C_t, I], bias [sum of C_t], hidden_weight [T, H, D], hidden_bias [T, H].
template <class T>
struct HeadsBatch {
  int64_t tasks, features, hidden;
  const int64_t* offsets;      // [T + 1]: whose rows are whose
  const int64_t* out_offsets;  // [T + 1]: and whose outputs
  const int64_t* z_offsets;    // [T + 1]: where a task's outputs [R_t, C_t] begin
  Activation activation;
  HeadTensors<const T> in;

  int64_t rows() const { return offsets[tasks]; }
  int64_t outputs() const { return out_offsets[tasks]; }
};

// What heads_loss takes besides.
template <class T>
struct HeadsTargets {
  const int64_t* losses;  // HeadLoss: one a task, or one for all
  bool one_loss;
  const int64_t* labels;    // [R]
  const T* targets;         // [sum of R_t C_t]
  const bool* row_mask;     // [R], or null
  const bool* output_mask;  // [sum of R_t C_t], or null
  const T* class_weights;   // [sum of C_t], or null
  double label_smoothing;
  int64_t ignore_index;
  double delta;

  HeadLoss loss(int64_t task) const { return static_cast<HeadLoss>(losses[one_loss ? 0 : task]); }
};

// z, task after task [R_t, C_t]
template <class T>
void heads_forward(const HeadsBatch<T>& batch, T* z, Threads threads);

// the gradients of <q, z> that are asked for
template <class T>
void heads_backward(const HeadsBatch<T>& batch, const T* q, const HeadTensors<T>& gradient, Threads threads);

// the gradients of the sum of <cotangent, gradient> over the results of heads_backward, with respect to q and the rest
template <class T>
void heads_double_backward(const HeadsBatch<T>& batch, const T* q, const HeadTensors<const T>& cotangent, T* d_q,
                           const HeadTensors<T>& gradient, Threads threads);

// Each task's mean loss, and the gradients of the sum of d_losses[t] (1, where it is null) times it. A label that is
// no class is refused.
template <class T>
void heads_loss(const HeadsBatch<T>& batch, const HeadsTargets<T>& targets, T* losses, const T* d_losses,
                const HeadTensors<T>& gradient, Threads threads);

// Multiplies each task's part of gradients by d_losses[t], in place.
template <class T>
void heads_scale(const HeadsBatch<T>& batch, const T* d_losses, const HeadTensors<T>& gradient, Threads threads);

}  // namespace mtml
