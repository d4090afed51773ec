// What sgd_step takes: plain pointers and sizes. Includes no code, so that every instruction set shares these types.
#pragma once

#include <cstdint>

namespace mtml {

struct SgdOptions {
  double momentum;
  double weight_decay;
  double clip;  // largest norm of a task's gradient over all leaves; infinity: no clipping
};

// One leaf of a parameter tree, its axes behind the task flattened to `size`. All arrays are contiguous [T, size].
template <class T>
struct SgdLeaf {
  int64_t size;
  const T* p;
  const T* g;
  const T* m;  // momentum buffer; null where momentum is 0
  // the rate of element i of task t is lr[t * lr_task + i * lr_element]: a stride of 0 shares the rate along an axis
  const T* lr;
  int64_t lr_task;
  int64_t lr_element;
  T* new_p;
  T* new_m;  // null where momentum is 0
};

// The cotangents of one leaf's results, and where its gradients go: null where not asked for.
template <class T>
struct SgdLeafGradient {
  const T* u;  // of new_p
  const T* w;  // of new_m; null where momentum is 0
  T* dp;
  T* dg;
  T* dm;
  T* dlr;            // one rate per element (lr_element = 1), in the layout of lr: [T, size] or [size]
  double* dlr_task;  // one rate per task or for all (lr_element = 0): [T], to which each task adds its sum
};

// The entry points of one instruction set; each is given all leaves and works on its own range.
template <class T>
struct SgdStep {
  // tasks [begin, end)
  void (*forward)(const SgdLeaf<T>* leaves, int64_t num_leaves, const SgdOptions& options, int64_t begin, int64_t end);
  // tasks [begin, end); leaves each task's clipping factor in scale [T]; all gradients but that of a rate [size]
  void (*backward)(const SgdLeaf<T>* leaves, const SgdLeafGradient<T>* gradients, int64_t num_leaves,
                   const SgdOptions& options, double* scale, int64_t begin, int64_t end);
  // elements [begin, end) of one leaf: the gradient of a rate [size] that all tasks share, after `backward`
  void (*shared_rate_backward)(const SgdLeaf<T>& leaf, const SgdLeafGradient<T>& gradient, const SgdOptions& options,
                               const double* scale, int64_t num_tasks, int64_t begin, int64_t end);
};

}  // namespace mtml
