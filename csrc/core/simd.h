// Vectors of one instruction set, by GCC's and Clang's vector extensions. The including file names the set (MTML_ISA)
// and its register width (MTML_VECTOR_BYTES); everything lives in a namespace of that name, so that no function
// compiled for one processor can be linked into the code for another.
#pragma once

#include <cstdint>

#define MTML_INLINE inline __attribute__((always_inline))
// of a function that a GPU may have too: cuda/element.h
#define MTML_FUNCTION

namespace mtml::MTML_ISA {

// as many T as a register holds
template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(MTML_VECTOR_BYTES)));
};
template <class T>
using Vector = typename VectorOf<T>::type;

template <class T>
constexpr int64_t kLanes = MTML_VECTOR_BYTES / sizeof(T);

// V is Vector<T> or, in the rest of a loop, T itself. By memcpy, which asks for no alignment: compilers drop an
// `aligned` attribute on the way through a template argument.
template <class V, class T>
MTML_INLINE V load(const T* from) {
  V value;
  __builtin_memcpy(&value, from, sizeof(V));
  return value;
}
template <class V, class T>
MTML_INLINE void store(T* to, V value) {
  __builtin_memcpy(to, &value, sizeof(V));
}

// f(i, V{}) over 0 <= i < n: V = Vector<T> as long as one fits, then T
template <class T, class F>
MTML_INLINE void for_each(int64_t n, F f) {
  int64_t i = 0;
  for (; i + kLanes<T> <= n; i += kLanes<T>) f(i, Vector<T>{});
  for (; i < n; ++i) f(i, T{});
}

// a sum adds at most this many terms in T before they go into a double total: the error does not grow with the length
constexpr int64_t kShortSum = 16;

// the sum of f(i, V{}) over 0 <= i < n
template <class T, class F>
MTML_INLINE double sum(int64_t n, F f) {
  double total = 0;
  int64_t i = 0;
  while (i + kLanes<T> <= n) {
    const int64_t block_end = i + kShortSum * kLanes<T> < n ? i + kShortSum * kLanes<T> : n;
    Vector<T> part{};
    for (; i + kLanes<T> <= block_end; i += kLanes<T>) part += f(i, Vector<T>{});
    T lanes[kLanes<T>];
    store(lanes, part);
    for (const T lane : lanes) total += lane;
  }
  for (; i < n; ++i) total += f(i, T{});
  return total;
}

}  // namespace mtml::MTML_ISA
