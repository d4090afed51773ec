// gradient_gram and gradient_combine for both doors, torch (cpu/) and NumPy (numpy/): the columns of all leaves,
// divided among threads. Torch-free; the doors bring leaves that are checked and contiguous, and threads.
#pragma once

#include "core/gradient_args.h"
#include "core/threads.h"

namespace mtml {

// M [T, T]
template <class T>
void gradient_gram(const GradientLeaves<T>& g, double* gram, Threads threads);

// the gradients of sum_ij d_gram_ij M_ij, in the leaves that have room for one
template <class T>
void gradient_gram_backward(const GradientLeaves<T>& g, const double* d_gram, Threads threads);

// sum_t w_t g_t
template <class T>
void gradient_combine(const GradientLeaves<T>& g, const T* w, Threads threads);

// the gradients of the products of u, one array a leaf, with that: in the leaves that have room, and, unless it is
// null, in d_w [T]
template <class T>
void gradient_combine_backward(const GradientLeaves<T>& g, const T* w, const T* const* u, T* d_w, Threads threads);

}  // namespace mtml
