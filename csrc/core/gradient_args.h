// What gradient_gram and gradient_combine take: plain pointers and sizes. Includes no code, so that every instruction
// set shares these types.
//
// The gradients of T tasks lie in leaves [T, size], one a parameter. A column is an element of a task's whole gradient,
// the leaves one after the other, which nobody ever puts together.
#pragma once

#include <cstdint>

namespace mtml {

template <class T>
struct GradientLeaf {
  int64_t size;
  const T* g;  // [T, size], contiguous
  T* to;       // [T, size], or [size] in combine: what the call writes; null in gram, and where it is not asked for
};

template <class T>
struct GradientLeaves {
  int64_t tasks;
  const GradientLeaf<T>* leaves;
  int64_t count;
};

// The entry points of one instruction set; each works on columns [begin, end).
template <class T>
struct Gradients {
  // doubles of scratch
  int64_t (*gram_scratch)(int64_t tasks);
  int64_t (*gram_backward_scratch)(int64_t tasks);
  // products [T, T] of the tasks' columns
  void (*gram)(const GradientLeaves<T>& g, int64_t begin, int64_t end, double* products, double* scratch);
  // to = S g, S [T, T]
  void (*gram_backward)(const GradientLeaves<T>& g, int64_t begin, int64_t end, const double* s, double* scratch);
  // to = w^T g
  void (*combine)(const GradientLeaves<T>& g, int64_t begin, int64_t end, const T* w);
  // to = w u^T; products [T] of u and the tasks' columns, where they are asked for. u: one array [size] a leaf
  void (*combine_backward)(const GradientLeaves<T>& g, int64_t begin, int64_t end, const T* w, const T* const* u,
                           double* products);
};

}  // namespace mtml
