// What heads and heads_loss take: plain pointers and sizes. Includes no code, so that every instruction set shares
// these types.
#pragma once

#include <cstdint>

#include "core/mlp_adapt_args.h"

namespace mtml {

// In the order of mtml_fast.ops.heads_loss.reference.HEAD_LOSSES.
enum class HeadLoss : int64_t { kCrossEntropy, kMse, kBce, kHuber };

// The rows and the parameters of heads, or values of their shapes: gradients, or cotangents of gradients. Null where
// there are none, or where they are not asked for.
template <class T>
struct HeadTensors {
  T* x;              // [R, D]
  T* weight;         // W [C, D], behind a hidden layer [C, H]
  T* bias;           // b [C]
  T* hidden_weight;  // V [H, D]
  T* hidden_bias;    // c [H]
};

// Rows of one task, and the task's head.
template <class T>
struct HeadCall {
  int64_t rows, features, hidden, outputs;  // R, D, H (0: no hidden layer), C
  Activation activation;
  HeadTensors<const T> in;
};

// What the rows' outputs should be. Rows and outputs that a mask has as false take no part.
template <class T>
struct HeadTargets {
  HeadLoss loss;
  const int64_t* labels;    // [R], for cross-entropy
  const T* targets;         // [R, C], for the others
  const bool* row_mask;     // [R], or null
  const bool* output_mask;  // [R, C], or null; not for cross-entropy
  const T* class_weights;   // [C], or null: for cross-entropy, as the next two
  double label_smoothing;
  int64_t ignore_index;
  double delta;  // huber: where the square ends
};

// The entry points of one instruction set. `scratch` has scratch(...) elements.
template <class T>
struct Heads {
  // for calls with these widths and any number of rows; for double_backward, or for the others
  int64_t (*scratch)(int64_t features, int64_t hidden, int64_t fewest_outputs, int64_t most_outputs, bool second);
  // z [R, C]
  void (*forward)(const HeadCall<T>& call, T* z, T* scratch);
  // gradients of <q, z>, for q [R, C]
  void (*backward)(const HeadCall<T>& call, const T* q, const HeadTensors<T>& gradient, T* scratch);
  // gradients of the sum of <cotangent, gradient>, for the gradients that `backward` writes: d_q [R, C] with respect
  // to q, and the others; there is none with respect to the bias, which is left alone
  void (*double_backward)(const HeadCall<T>& call, const T* q, const HeadTensors<const T>& cotangent, T* d_q,
                          const HeadTensors<T>& gradient, T* scratch);
  // The sum of the rows' losses, to be divided by what the task's rows count, and the gradients of `scale` times it.
  double (*loss)(const HeadCall<T>& call, const HeadTargets<T>& targets, double scale, const HeadTensors<T>& gradient,
                 T* scratch);
};

}  // namespace mtml
