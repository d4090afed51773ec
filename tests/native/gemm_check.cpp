// Checks core/gemm.h, core/transpose.h and core/packed.h of one instruction set against plain loops in double, and says
// what failed. Compile once per set:
//
//     c++ -O1 -std=c++17 -ffp-contract=fast -fno-math-errno -Wno-psabi -I csrc -DCHECK_AVX2 tests/native/gemm_check.cpp
//
// with -DCHECK_AVX2, -DCHECK_AVX512 or neither. `./a.out bench` times the sizes that matter instead (compile with -O3).
// Ends with 0 (all right), 1 (something failed) or 77 (the processor lacks the set).
#include <time.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "isa/kernels.h"

#if defined(CHECK_AVX512)
MTML_TARGET_BEGIN("avx512f,avx512vl,avx512dq,avx512bw,avx2,fma")
#define MTML_ISA avx512
#define MTML_VECTOR_BYTES 64
#elif defined(CHECK_AVX2)
MTML_TARGET_BEGIN("avx2,fma")
#define MTML_ISA avx2
#define MTML_VECTOR_BYTES 32
#else
#define MTML_ISA baseline
#define MTML_VECTOR_BYTES 16
#endif
#include "core/gemm.h"
#include "core/packed.h"
#include "core/transpose.h"

namespace mtml::MTML_ISA {
namespace {

bool runnable() {
#ifdef __x86_64__
  __builtin_cpu_init();
#endif
#if defined(CHECK_AVX512)
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("fma");
#elif defined(CHECK_AVX2)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return true;
#endif
}

int failures = 0;

void expect(bool right, const std::string& what) {
  if (right) return;
  if (++failures <= 20) std::printf("failed: %s\n", what.c_str());
}

std::string shape(const char* what, int64_t M, int64_t N, int64_t K) {
  return std::string(what) + " M=" + std::to_string(M) + " N=" + std::to_string(N) + " K=" + std::to_string(K) +
         " of vectors of " + std::to_string(MTML_VECTOR_BYTES);
}

std::mt19937 generator(1);

// exactly so many elements, on the heap, so that a sanitizer sees every read beyond
template <class T>
std::vector<T> numbers(int64_t size) {
  std::normal_distribution<double> normal;
  std::vector<T> result(size);
  for (T& value : result) value = static_cast<T>(normal(generator));
  return result;
}

constexpr double kUntouched = 12345;

template <class T>
std::vector<T> untouched(int64_t size) {
  return std::vector<T>(size, static_cast<T>(kUntouched));
}

// K terms of about 1
template <class T>
bool near(T value, double wanted, int64_t K) {
  return std::fabs(value - wanted) <= (sizeof(T) == 4 ? 2e-6 : 4e-15) * (K + 4);
}

template <class T>
double product_term(const Left<T>& a, const Right<T>& b, int64_t K, int64_t m, int64_t n) {
  double total = 0;
  for (int64_t k = 0; k < K; ++k) {
    total += static_cast<double>(a.data[m * a.row + k * a.col]) *
             static_cast<double>(b.data[n / kPanel<T> * b.panel + k * b.ld + n % kPanel<T>]);
  }
  return total;
}

template <class T>
void check_product(int64_t M, int64_t N, int64_t K, bool transposed, bool panels, Start start, bool two) {
  const int64_t width = padded<T>(N), panel_width = (N + kPanel<T> - 1) / kPanel<T> * kPanel<T>;
  const int64_t lda = (transposed ? M : K) + 3, ldb = width + 2, ldc = width + 1, K2 = two ? K + 2 : 0;
  const std::vector<T> a1 = numbers<T>((transposed ? K : M) * lda), a2 = numbers<T>(M * (K2 + 1));
  const std::vector<T> b1 = numbers<T>(panels ? panel_width * K : K * ldb), b2 = numbers<T>(K2 * width);
  const std::vector<T> row = numbers<T>(start == kMatrix ? M * ldc : width);
  const std::vector<T> before = numbers<T>(M * ldc);
  const Product<T> p1 = {{a1.data(), transposed ? 1 : lda, transposed ? lda : 1},
                         panels ? Right<T>{b1.data(), kPanel<T>, K * kPanel<T>} : Right<T>{b1.data(), ldb, kPanel<T>},
                         K};
  const Product<T> p2 = {{a2.data(), K2 + 1, 1}, {b2.data(), width, kPanel<T>}, K2};
  const auto run = [&](int64_t m, int64_t rows, const Product<T>& first, const Product<T>& second, T* c) {
    const T* from = row.data() + (start == kMatrix ? m * ldc : 0);
    if (two) {
      product(rows, N, c, ldc, start, from, first, second);
    } else {
      product(rows, N, c, ldc, start, from, first);
    }
  };
  std::vector<T> c = before;
  run(0, M, p1, p2, c.data());
  const std::string what = shape("product", M, N, K) + (transposed ? " transposed" : "") + (panels ? " packed" : "") +
                           (two ? " two" : "") + " start " + std::to_string(start);
  bool right = true, alone = true, outside = true;
  for (int64_t m = 0; m < M; ++m) {
    for (int64_t n = 0; n < N; ++n) {
      double wanted = 0;
      if (start != kZero) wanted = start == kRow ? row[n] : start == kAdd ? before[m * ldc + n] : row[m * ldc + n];
      wanted += product_term(p1.a, p1.b, K, m, n);
      if (two) wanted += product_term(p2.a, p2.b, K2, m, n);
      right = right && near(c[m * ldc + n], wanted, K + K2);
    }
    for (int64_t n = width; n < ldc; ++n) outside = outside && c[m * ldc + n] == before[m * ldc + n];
    // a row alone
    std::vector<T> single(before.begin() + m * ldc, before.begin() + (m + 1) * ldc);
    Product<T> first = p1, second = p2;
    first.a.data += m * p1.a.row;
    second.a.data += m * p2.a.row;
    run(m, 1, first, second, single.data());
    alone = alone && std::memcmp(single.data(), c.data() + m * ldc, N * sizeof(T)) == 0;
  }
  expect(right, what);
  expect(outside, what + ": wrote beyond the padded columns");
  expect(alone, what + ": a row's bits depend on the other rows");
}

template <class T>
void check_product_blocks(int64_t N, int64_t K) {
  const int64_t width = padded<T>(N), rows_of[] = {5, 0, 1, 13, 3};
  const std::vector<T> b = numbers<T>(K * width), row = numbers<T>(width), a = numbers<T>(22 * K);
  std::vector<T> c = untouched<T>(22 * width), wanted = c;
  std::vector<RowBlock<T>> blocks;
  int64_t first = 0;
  for (const int64_t rows : rows_of) {
    blocks.push_back({rows, {a.data() + first * K, K, 1}, c.data() + first * width, row.data()});
    first += rows;
  }
  product_blocks(blocks.data(), static_cast<int64_t>(blocks.size()), N, K, {b.data(), width, kPanel<T>}, width, kRow);
  product(22, N, wanted.data(), width, kRow, row.data(), Product<T>{{a.data(), K, 1}, {b.data(), width, kPanel<T>}, K});
  expect(c == wanted, shape("product_blocks", 22, N, K));
}

template <class T>
void check_dots(int64_t M, int64_t N, int64_t K, bool add) {
  const int64_t lda = K + 1, ldb = K + 3, ldc = N + 2;
  const std::vector<T> a = numbers<T>(M * lda), b = numbers<T>(N * ldb), before = numbers<T>(M * ldc);
  std::vector<T> c = before;
  dots(M, N, K, a.data(), lda, b.data(), ldb, c.data(), ldc, add);
  bool right = true, alone = true, outside = true;
  for (int64_t m = 0; m < M; ++m) {
    for (int64_t n = 0; n < ldc; ++n) {
      if (n >= N) {
        outside = outside && c[m * ldc + n] == before[m * ldc + n];
        continue;
      }
      double wanted = add ? static_cast<double>(before[m * ldc + n]) : 0;
      for (int64_t k = 0; k < K; ++k) wanted += static_cast<double>(a[m * lda + k]) * b[n * ldb + k];
      right = right && near(c[m * ldc + n], wanted, K);
      T single = before[m * ldc + n];
      dots(1, 1, K, a.data() + m * lda, lda, b.data() + n * ldb, ldb, &single, 1, add);
      alone = alone && single == c[m * ldc + n];
    }
  }
  expect(right, shape("dots", M, N, K));
  expect(outside, shape("dots: wrote beyond its columns", M, N, K));
  expect(alone, shape("dots: an element's bits depend on the others", M, N, K));
}

template <class T>
void check_transpose(int64_t rows, int64_t cols) {
  const int64_t ld_src = cols + 1, width = padded<T>(rows), ld_dst = width + 1;
  std::vector<T> src = numbers<T>(rows * ld_src), dst = untouched<T>(cols * ld_dst);
  if (rows > 0) src.resize((rows - 1) * ld_src + cols);
  transpose(rows, cols, src.data(), ld_src, static_cast<T>(-2), dst.data(), ld_dst);
  bool right = true;
  for (int64_t j = 0; j < cols; ++j) {
    for (int64_t i = 0; i < ld_dst; ++i) {
      const T wanted = i < rows ? -2 * src[i * ld_src + j] : i < width ? static_cast<T>(0) : static_cast<T>(kUntouched);
      right = right && dst[j * ld_dst + i] == wanted;
    }
  }
  expect(right, shape("transpose", rows, cols, 0));
}

template <class T>
void check_packed(int64_t M, int64_t N, int64_t K, bool by_rows, bool bias) {
  const int64_t width = padded<T>(N), lda = K + 2, ldc = width + 1, ld_src = (by_rows ? N : K) + 1;
  const int64_t panels = (N + kPanel<T> - 1) / kPanel<T>;
  const std::vector<T> a = numbers<T>(M * lda), row = numbers<T>(width);
  std::vector<T> src = numbers<T>((by_rows ? K : N) * ld_src), c = untouched<T>(M * ldc);
  std::vector<T> packed = untouched<T>(packed_size<T>(K, N));
  const int64_t row_src = by_rows ? ld_src : 1, col_src = by_rows ? 1 : ld_src;
  if (!src.empty()) src.pop_back();  // the last element of the last row's gap
  pack(K, N, src.data(), row_src, col_src, packed.data(), 0, panels / 2);
  pack(K, N, src.data(), row_src, col_src, packed.data(), panels / 2, panels);
  bool right = true;
  for (int64_t panel = 0; panel < panels; ++panel) {
    for (int64_t k = 0; k < K; ++k) {
      for (int64_t n = 0; n < kPanel<T>; ++n) {
        const int64_t column = panel * kPanel<T> + n;
        const T wanted = column < N ? src[k * row_src + column * col_src] : 0;
        right = right && packed[(panel * K + k) * kPanel<T> + n] == wanted;
      }
    }
  }
  expect(right, shape("pack", M, N, K));
  packed_product(M, N, K, a.data(), lda, packed.data(), bias ? row.data() : nullptr, c.data(), ldc);
  std::vector<T> plain = untouched<T>(M * ldc);
  // block after block of terms, each a sum of its own
  for (int64_t k = 0; k < std::max<int64_t>(K, 1); k += kBlockTerms) {
    product(M, N, plain.data(), ldc,
            k > 0  ? kAdd
            : bias ? kRow
                   : kZero,
            row.data(),
            Product<T>{{a.data() + k, lda, 1},
                       {packed.data() + k * kPanel<T>, kPanel<T>, K * kPanel<T>},
                       std::min(kBlockTerms, K - k)});
  }
  expect(c == plain, shape("packed_product", M, N, K));
}

template <class T>
void check_outer_sum(const std::vector<int64_t>& rows_of, int64_t O, int64_t I, bool add) {
  std::vector<std::vector<T>> ds, hs;
  std::vector<Segment<T>> segments;
  std::vector<T> c = numbers<T>(O * I), scratch(outer_scratch<T>());
  int64_t K = 0;
  for (const int64_t rows : rows_of) {
    K += rows;
    ds.push_back(numbers<T>(rows * (O + 1)));
    hs.push_back(numbers<T>(rows * I));
  }
  for (size_t s = 0; s < rows_of.size(); ++s) {
    segments.push_back({rows_of[s], ds[s].data(), O + 1, hs[s].data(), I, static_cast<T>(1 + s % 2)});
  }
  std::vector<T> wanted = c;
  for (int64_t o = 0; o < O; ++o) {
    for (int64_t i = 0; i < I; ++i) {
      double total = add ? static_cast<double>(c[o * I + i]) : 0;
      for (const Segment<T>& segment : segments) {
        for (int64_t r = 0; r < segment.rows; ++r) {
          total += static_cast<double>(segment.scale) * segment.d[r * segment.ldd + o] * segment.h[r * segment.ldh + i];
        }
      }
      wanted[o * I + i] = static_cast<T>(total);
    }
  }
  const int64_t middle = I / 2 / kPanel<T> * kPanel<T>, count = static_cast<int64_t>(segments.size());
  outer_sum(segments.data(), count, O, I, c.data(), I, add, 0, middle, scratch.data());
  outer_sum(segments.data(), count, O, I, c.data(), I, add, middle, I, scratch.data());
  bool right = true;
  for (int64_t i = 0; i < O * I; ++i) right = right && near(c[i], static_cast<double>(wanted[i]), 2 * K);
  expect(right, shape("outer_sum", O, I, K));
}

template <class T>
void check_all() {
  for (int64_t M = 0; M <= 14; ++M) {
    for (int64_t N = 1; N <= 40; ++N) {
      for (const int64_t K : {0, 1, 2, 5, 33}) {
        // all eight layouts and the four starts come round, with each K
        const int64_t turn = M + N + K, start = turn / 4 + N / 2;
        check_product<T>(M, N, K, turn & 1, turn & 2, static_cast<Start>(start % 4), N & 1);
        check_product<T>(M, N, K, turn & 2, turn & 4, static_cast<Start>((start + 1) % 4), M & 1);
        if (M * N <= 200) check_dots<T>(M, N, K, turn & 1);
      }
      check_transpose<T>(M, N);
      check_transpose<T>(N, M);
    }
  }
  for (const int64_t M : {25, 40, 75}) {
    for (const int64_t N : {8, 40, 64, 129, 256}) {
      check_product<T>(M, N, 10, M & 1, false, kAdd, true);
      check_product<T>(M, N, 70, false, true, kRow, false);
      check_transpose<T>(M, N);
    }
    check_dots<T>(M, 25, 512, true);
    check_dots<T>(M, 5, 784, false);
  }
  for (const int64_t N : {1, 7, 40, 65}) {
    check_product_blocks<T>(N, 17);
    for (const int64_t K : {0, 1, 30, 600}) {
      check_packed<T>(7, N, K, true, false);
      check_packed<T>(200, N, K, false, true);
    }
  }
  for (const int64_t I : {1, 8, 33, 64, 100}) {
    check_outer_sum<T>({}, 5, I, false);
    check_outer_sum<T>({0, 3, 0, 5, 0}, 5, I, true);
    check_outer_sum<T>({255, 1, 1, 5, 600, 3}, 50, I, false);
    check_outer_sum<T>({40, 25}, 300, I, true);
  }
}

double thread_seconds() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

// the fastest of many runs of about 50 us
template <class F>
void time_it(const char* what, int64_t M, int64_t N, int64_t K, double operations, F f) {
  double best = 1e9;
  int64_t calls = 1;
  for (int round = 0; round < 400; ++round) {
    const double begin = thread_seconds();
    for (int64_t i = 0; i < calls; ++i) f();
    const double each = (thread_seconds() - begin) / static_cast<double>(calls);
    best = std::min(best, each);
    calls = std::max<int64_t>(1, static_cast<int64_t>(50e-6 / best));
  }
  std::printf("%-16s M=%-5d N=%-4d K=%-5d %9.3f us %7.1f G/s\n", what, static_cast<int>(M), static_cast<int>(N),
              static_cast<int>(K), best * 1e6, operations / best * 1e-9);
}

template <class T>
void bench() {
  struct Shape {
    int64_t M, K, N;
    bool transposed;
  };
  const Shape products[] = {{10, 40, 40, false},  {40, 10, 40, true},   {10, 1, 40, false},    {10, 40, 1, false},
                            {40, 10, 8, true},    {5, 256, 128, false}, {5, 128, 64, false},   {5, 64, 64, false},
                            {128, 5, 256, true},  {64, 5, 128, true},   {75, 256, 128, false}, {25, 256, 128, false},
                            {1, 256, 128, false}, {1, 64, 64, false},   {2, 64, 64, false},    {3, 64, 64, false},
                            {75, 64, 5, false}};
  for (const Shape& s : products) {
    const int64_t width = padded<T>(s.N);
    const std::vector<T> a = numbers<T>(s.M * s.K), b = numbers<T>(s.K * width), row = numbers<T>(width);
    std::vector<T> c(s.M * width);
    const Product<T> p = {
        {a.data(), s.transposed ? 1 : s.K, s.transposed ? s.M : 1}, {b.data(), width, kPanel<T>}, s.K};
    time_it(s.transposed ? "product (t)" : "product", s.M, s.N, s.K, 2.0 * s.M * s.N * s.K,
            [&] { product(s.M, s.N, c.data(), width, kRow, row.data(), p); });
  }
  const Shape all_dots[] = {
      {5, 256, 25, false}, {10, 784, 5, false}, {75, 784, 5, false}, {75, 512, 5, false}, {25, 512, 25, false}};
  for (const Shape& s : all_dots) {
    const std::vector<T> a = numbers<T>(s.M * s.K), b = numbers<T>(s.K * s.N);
    std::vector<T> c(s.M * s.N);
    time_it("dots", s.M, s.N, s.K, 2.0 * s.M * s.N * s.K,
            [&] { dots(s.M, s.N, s.K, a.data(), s.K, b.data(), s.K, c.data(), s.N, false); });
  }
  const Shape transposes[] = {{40, 0, 40, false}, {10, 0, 40, false}, {256, 0, 128, false}, {5, 0, 256, false}};
  for (const Shape& s : transposes) {
    const std::vector<T> src = numbers<T>(s.M * s.N);
    std::vector<T> dst(s.N * padded<T>(s.M));
    time_it("transpose [el]", s.M, s.N, 0, 1.0 * s.M * s.N,
            [&] { transpose(s.M, s.N, src.data(), s.N, static_cast<T>(1), dst.data(), padded<T>(s.M)); });
  }
  for (const bool by_rows : {true, false}) {
    const int64_t K = 784, N = 256;
    const std::vector<T> src = numbers<T>(K * N);
    std::vector<T> packed(packed_size<T>(K, N));
    time_it(by_rows ? "pack rows [el]" : "pack cols [el]", 0, N, K, 1.0 * K * N, [&] {
      pack(K, N, src.data(), by_rows ? N : 1, by_rows ? 1 : K, packed.data(), 0, (N + kPanel<T> - 1) / kPanel<T>);
    });
  }
  for (const int64_t M : {320, 2560}) {
    const int64_t K = 784, N = 256;
    const std::vector<T> a = numbers<T>(M * K), b = numbers<T>(packed_size<T>(K, N)), row = numbers<T>(N);
    std::vector<T> c(M * N);
    time_it("packed_product", M, N, K, 2.0 * M * N * K,
            [&] { packed_product(M, N, K, a.data(), K, b.data(), row.data(), c.data(), N); });
  }
  for (const int64_t M : {320, 2560}) {
    for (const int64_t rows : {5, 80}) {
      const int64_t O = 256, I = 784;
      const std::vector<T> d = numbers<T>(M * O), h = numbers<T>(M * I);
      std::vector<T> c(O * I), scratch(outer_scratch<T>());
      std::vector<Segment<T>> segments;
      for (int64_t r = 0; r < M; r += rows) segments.push_back({rows, &d[r * O], O, &h[r * I], I, 1});
      time_it(rows == 5 ? "outer_sum of 5" : "outer_sum of 80", O, I, M, 2.0 * M * O * I, [&] {
        outer_sum(segments.data(), static_cast<int64_t>(segments.size()), O, I, c.data(), I, false, 0, I,
                  scratch.data());
      });
    }
  }
}

}  // namespace
}  // namespace mtml::MTML_ISA

int main(int argc, char** argv) {
  using namespace mtml::MTML_ISA;
  if (!runnable()) return 77;
  if (argc > 1 && std::string(argv[1]) == "bench") {
    bench<float>();
    if (argc > 2) bench<double>();
    return 0;
  }
  check_all<float>();
  check_all<double>();
  if (failures > 0) std::printf("%d failures\n", failures);
  return failures > 0;
}
#if defined(CHECK_AVX512) || defined(CHECK_AVX2)
MTML_TARGET_END
#endif
