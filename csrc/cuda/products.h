// Products of a few rows that are long: a block reads each row in pieces of 16 bytes, keeps a small tile of the result
// in registers, and adds up in an order that depends on the lengths alone, never on the number of threads.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "cuda/block.h"

namespace mtml::cuda {

// 16 bytes of a row, which a thread moves at once
template <class T>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(T);
  T at[kSize];
};

// `count` rows of `width` elements, one behind the other.
template <class T>
struct Matrix {
  using Value = std::remove_const_t<T>;
  T* start;
  int count, width;
  // every row begins at a multiple of 16 bytes
  bool aligned;

  __device__ __forceinline__ Matrix(T* start, int count, int width)
      : start(start),
        count(count),
        width(width),
        aligned(reinterpret_cast<uintptr_t>(start) % 16 == 0 && width % Pack<Value>::kSize == 0) {}

  template <class U>
  __device__ __forceinline__ Matrix(const Matrix<U>& other)
      : start(other.start), count(other.count), width(other.width), aligned(other.aligned) {}

  // from `column` on, which is a multiple of a pack's size; zeros behind the row
  __device__ __forceinline__ Pack<Value> read(int row, int column) const {
    const T* from = start + row * width + column;
    if (aligned) return *reinterpret_cast<const Pack<Value>*>(from);
    Pack<Value> pack;
    for (int p = 0; p < Pack<Value>::kSize; ++p) pack.at[p] = column + p < width ? from[p] : Value(0);
    return pack;
  }
  __device__ __forceinline__ void write(int row, int column, const Pack<Value>& pack) const {
    T* to = start + row * width + column;
    if (aligned) {
      *reinterpret_cast<Pack<Value>*>(to) = pack;
      return;
    }
    for (int p = 0; p < Pack<Value>::kSize; ++p)
      if (column + p < width) to[p] = pack.at[p];
  }
};

// ---- dot products of rows: a warp has a tile of them, its lanes share out the columns

constexpr int kDotRows = 4, kDotColumns = 5;

// put(i, j, <a_i, b_j>) once for each pair of rows, for j <= i alone where `lower`. `turn` is how many tiles the warps
// have had before; returns how many they have had then.
template <class T, class Put>
__device__ int row_dots(const Matrix<const T>& a, const Matrix<const T>& b, bool lower, int turn, const Put& put) {
  const int columns = (b.count + kDotColumns - 1) / kDotColumns;
  const int tiles = (a.count + kDotRows - 1) / kDotRows * columns;
  const int lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  const int first = (threadIdx.x / kWarp + warps - turn % warps) % warps;
  for (int tile = first; tile < tiles; tile += warps) {
    const int i0 = tile / columns * kDotRows, j0 = tile % columns * kDotColumns;
    if (lower && j0 > i0 + kDotRows - 1) continue;
    T sums[kDotRows][kDotColumns] = {};
    for (int d = lane * Pack<T>::kSize; d < a.width; d += kWarp * Pack<T>::kSize) {
      Pack<T> x[kDotRows], y[kDotColumns];
      for (int i = 0; i < kDotRows; ++i) x[i] = a.read(i0 + i < a.count ? i0 + i : a.count - 1, d);
      for (int j = 0; j < kDotColumns; ++j) y[j] = b.read(j0 + j < b.count ? j0 + j : b.count - 1, d);
      for (int p = 0; p < Pack<T>::kSize; ++p)
        for (int i = 0; i < kDotRows; ++i)
          for (int j = 0; j < kDotColumns; ++j) sums[i][j] += x[i].at[p] * y[j].at[p];
    }
    // over the lanes: halves of a warp exchange two rows each, quarters one, so that eight lanes share a row
    const bool second_half = lane & 16, second_quarter = lane & 8;
    T mine = 0;
    for (int j = 0; j < kDotColumns; ++j) {
      T kept[2];
      for (int i = 0; i < 2; ++i) {
        kept[i] = second_half ? sums[2 + i][j] : sums[i][j];
        kept[i] += __shfl_xor_sync(~0u, second_half ? sums[i][j] : sums[2 + i][j], 16);
      }
      T sum = second_quarter ? kept[1] : kept[0];
      sum += __shfl_xor_sync(~0u, second_quarter ? kept[0] : kept[1], 8);
      for (int distance = 4; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
      if (lane % 8 == j) mine = sum;
    }
    const int i = i0 + lane / 8, j = j0 + lane % 8;
    if (lane % 8 < kDotColumns && i < a.count && j < b.count && (!lower || j <= i)) put(i, j, mine);
  }
  return turn + tiles;
}

// ---- linear combinations of rows: a thread has a tile of the results' rows and a pack of columns

constexpr int kTileRows = 5;
// terms that are added in T before they go into the total: the error does not grow with their number
constexpr int kShortChain = 64;

template <class T>
struct Tile {
  int first, count;  // of its rows, and of all
  int column;
  Pack<T> rows[kTileRows];

  // row i += scale * sum_j coefficients[i * row_step + j * term_step] x_j
  __device__ __forceinline__ void add(T scale, const T* coefficients, int row_step, int term_step,
                                      const Matrix<const T>& x) {
    const T* of[kTileRows];
    for (int i = 0; i < kTileRows; ++i) of[i] = coefficients + (first + i < count ? first + i : count - 1) * row_step;
    for (int j = 0; j < x.count;) {
      Pack<T> part[kTileRows] = {};
      const int end = j + kShortChain < x.count ? j + kShortChain : x.count;
      for (; j < end; ++j) {
        const Pack<T> pack = x.read(j, column);
        for (int i = 0; i < kTileRows; ++i) {
          const T coefficient = of[i][j * term_step];
          for (int p = 0; p < Pack<T>::kSize; ++p) part[i].at[p] += coefficient * pack.at[p];
        }
      }
      for (int i = 0; i < kTileRows; ++i)
        for (int p = 0; p < Pack<T>::kSize; ++p) rows[i].at[p] += scale * part[i].at[p];
    }
  }

  // row i += scale * x_i
  __device__ __forceinline__ void add_rows(T scale, const Matrix<const T>& x) {
    for (int i = 0; i < kTileRows; ++i) {
      if (first + i >= count) continue;
      const Pack<T> pack = x.read(first + i, column);
      for (int p = 0; p < Pack<T>::kSize; ++p) rows[i].at[p] += scale * pack.at[p];
    }
  }
};

// The rows of `out`, each zero and what sum(tile) adds.
template <class T, class Sum>
__device__ void combine(const Matrix<T>& out, const Sum& sum) {
  const int packs = (out.width + Pack<T>::kSize - 1) / Pack<T>::kSize;
  const int tiles = (out.count + kTileRows - 1) / kTileRows * packs;
  for (int t = threadIdx.x; t < tiles; t += blockDim.x) {
    Tile<T> tile{t / packs * kTileRows, out.count, t % packs * Pack<T>::kSize, {}};
    sum(tile);
    for (int i = 0; i < kTileRows; ++i)
      if (tile.first + i < out.count) out.write(tile.first + i, tile.column, tile.rows[i]);
  }
}

}  // namespace mtml::cuda
