// The lanes of vectors: how many a row takes, and how they change places.
#pragma once

#include <cstdint>

#include "core/simd.h"

namespace mtml::MTML_ISA {

// n rounded up to whole vectors
template <class T>
constexpr int64_t padded(int64_t n) {
  return (n + kLanes<T> - 1) & -kLanes<T>;
}

template <int I>
struct Index {
  constexpr operator int() const { return I; }
};

// f(Index<0>{}), ..., f(Index<N - 1>{}): GCC keeps an array in registers only where all its indices are constants
template <int N, int I = 0, class F>
MTML_INLINE void unroll(const F& f) {
  if constexpr (I < N) {
    f(Index<I>{});
    unroll<N, I + 1>(f);
  }
}

// f(c, Index<W>{}): W vectors of channels from column c on. Several together, as they share cache lines and their sums
// need not wait for each other; a channel's sums do not depend on its block.
template <class T, class F>
MTML_INLINE void for_channels(int64_t ld, F f) {
  constexpr int64_t L = kLanes<T>;
  int64_t c = 0;
  for (; c + 4 * L <= ld; c += 4 * L) f(c, Index<4>{});
  if (c + 2 * L <= ld) {
    f(c, Index<2>{});
    c += 2 * L;
  }
  if (c + L <= ld) f(c, Index<1>{});
}

template <int... I>
struct Indices {};
template <int N, int... I>
struct FirstIndices : FirstIndices<N - 1, N - 1, I...> {};
template <int... I>
struct FirstIndices<0, I...> {
  using type = Indices<I...>;
};

// lane l of the result is lane From::at(l) of a and b, one after the other
template <class From, class V, int... I>
MTML_INLINE V shuffle(V a, V b, Indices<I...>) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, From::at(I)...);
#else
  return __builtin_shuffle(a, b, decltype(a < b){From::at(I)...});
#endif
}
template <class T, class From>
MTML_INLINE Vector<T> shuffle(Vector<T> a, Vector<T> b) {
  return shuffle<From>(a, b, typename FirstIndices<kLanes<T>>::type{});
}

// Shuffles within 128 bits take one cycle, others three: the first steps of a transposition stay within.
template <class T>
constexpr int kQuarter = 16 / sizeof(T);

// pieces of `Size` lanes, alternately from a and b: the low, or high, halves of each 128 bits
template <class T, int Size, bool High>
struct Interleave {
  static constexpr int at(int lane) {
    const int quarter = lane / kQuarter<T> * kQuarter<T>, piece = lane % kQuarter<T> / Size;
    return piece % 2 * static_cast<int>(kLanes<T>) + quarter + (High ? kQuarter<T> / 2 : 0) + piece / 2 * Size +
           lane % Size;
  }
};

// the lanes whose number has the bit Step change places between a and b
template <class T, int Step, bool Second>
struct Exchange {
  static constexpr int at(int lane) {
    const int lanes = static_cast<int>(kLanes<T>);
    if constexpr (Second) {
      return lane & Step ? lanes + lane : lane + Step;
    } else {
      return lane & Step ? lanes + lane - Step : lane;
    }
  }
};

template <class T, int Step>
MTML_INLINE void exchange(Vector<T>* rows) {
  unroll<kLanes<T>>([&](auto r) {
    if constexpr ((r & Step) == 0) {
      const Vector<T> first = shuffle<T, Exchange<T, Step, false>>(rows[r], rows[r + Step]);
      rows[r + Step] = shuffle<T, Exchange<T, Step, true>>(rows[r], rows[r + Step]);
      rows[r] = first;
    }
  });
}

// rows[r] lane l = rows[l] lane r before
template <class T>
MTML_INLINE void transpose_lanes(Vector<T>* rows) {
  constexpr int L = kLanes<T>, Q = kQuarter<T>;
  // Q x Q within each 128 bits
  unroll<L / Q>([&](auto group) {
    Vector<T>* r = rows + group * Q;
    if constexpr (Q == 4) {
      const Vector<T> low01 = shuffle<T, Interleave<T, 1, false>>(r[0], r[1]);
      const Vector<T> high01 = shuffle<T, Interleave<T, 1, true>>(r[0], r[1]);
      const Vector<T> low23 = shuffle<T, Interleave<T, 1, false>>(r[2], r[3]);
      const Vector<T> high23 = shuffle<T, Interleave<T, 1, true>>(r[2], r[3]);
      r[0] = shuffle<T, Interleave<T, 2, false>>(low01, low23);
      r[1] = shuffle<T, Interleave<T, 2, true>>(low01, low23);
      r[2] = shuffle<T, Interleave<T, 2, false>>(high01, high23);
      r[3] = shuffle<T, Interleave<T, 2, true>>(high01, high23);
    } else {
      const Vector<T> low = shuffle<T, Interleave<T, 1, false>>(r[0], r[1]);
      r[1] = shuffle<T, Interleave<T, 1, true>>(r[0], r[1]);
      r[0] = low;
    }
  });
  // then the 128 bits as wholes
  if constexpr (L >= 2 * Q) exchange<T, Q>(rows);
  if constexpr (L >= 4 * Q) exchange<T, 2 * Q>(rows);
}

// the pieces of a vector by twos: of a in the even, of b in the odd places
template <class T, int Size>
MTML_INLINE Vector<T> add_pieces(Vector<T> a, Vector<T> b) {
  return shuffle<T, Interleave<T, Size, false>>(a, b) + shuffle<T, Interleave<T, Size, true>>(a, b);
}

// sums[i] = the sum of the lanes of vectors[i], i < kQuarter
template <class T>
MTML_INLINE void sums_of_lanes(const Vector<T>* vectors, T* sums) {
  constexpr int L = kLanes<T>, Q = kQuarter<T>;
  // [L / Q, Q]: what each 128 bits of the vectors add up to
  Vector<T> parts;
  if constexpr (Q == 4) {
    // sums of lanes 0 and 2, 1 and 3; of a and b by turns
    parts = add_pieces<T, 2>(add_pieces<T, 1>(vectors[0], vectors[1]), add_pieces<T, 1>(vectors[2], vectors[3]));
  } else {
    parts = add_pieces<T, 1>(vectors[0], vectors[1]);
  }
  T lanes[L];
  store(lanes, parts);
  typedef T Quarter __attribute__((vector_size(16)));
  Quarter total = load<Quarter>(lanes);
  unroll<L / Q - 1>([&](auto i) { total += load<Quarter>(lanes + (i + 1) * Q); });
  store(sums, total);
}

}  // namespace mtml::MTML_ISA
