// The core's vector mathematics, activations, losses and batch norm behind C functions: tests/test_vector_math.py calls
// them, compiled once for each instruction set (CHECK_AVX2, CHECK_AVX512, or what every processor has).
#include "isa/kernels.h"

#if defined(CHECK_AVX512)
#define CHECK_TARGET "avx512f,avx512vl,avx512dq,avx512bw,avx2,fma"
#define MTML_ISA avx512
#define MTML_VECTOR_BYTES 64
#elif defined(CHECK_AVX2)
#define CHECK_TARGET "avx2,fma"
#define MTML_ISA avx2
#define MTML_VECTOR_BYTES 32
#else
#define MTML_ISA baseline
#define MTML_VECTOR_BYTES 16
#endif

extern "C" int runs_here() {
#if defined(CHECK_AVX512)
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw");
#elif defined(CHECK_AVX2)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return 1;
#endif
}

#ifdef CHECK_TARGET
MTML_TARGET_BEGIN(CHECK_TARGET)
#endif

#include "core/activations.h"
#include "core/lanes.h"
// after lanes.h and vector_math.h, which bring what it needs
#include "core/batch_norm.h"
#include "core/losses.h"

namespace mtml::MTML_ISA {

template <class T>
void apply(int function, int64_t n, const T* x, T* out) {
  const auto with = [&](auto f) { map(n, out, f, x); };
  switch (function) {
    case 0:
      return with([](auto x) { return exp_<T>(x); });
    case 1:
      return with([](auto x) { return exp_of_negative<T>(x); });
    case 2:
      return with([](auto x) { return expm1_of_negative<T>(x); });
    case 3:
      return with([](auto x) { return tanh_<T>(x); });
    case 4:
      return with([](auto x) { return sigmoid_<T>(x); });
    case 5:
      return with([](auto x) { return sigmoid_and_slope<T>(x).slope; });
    case 6:
      return with([](auto x) { return log1p_of_unit<T>(x); });
    case 7:
      return with([](auto x) { return log_from_one<T>(x); });
    case 8:
      return with([](auto x) { return normal<T>(x).below; });
    case 9:
      return with([](auto x) { return normal<T>(x).density; });
    case 10:
      return with([](auto x) { return sqrt_<T>(x); });
  }
}

// null h: the value goes to `out`; null Re: out = e * d1; else out = Re * d1 + e * d2 * Ry
template <class T>
void activation(int32_t which, int64_t n, const T* y, const T* h, const T* e, const T* Re, const T* Ry, T* out) {
  with_activation(static_cast<Activation>(which), [&](auto named) {
    constexpr Activation A = decltype(named)::kValue;
    if (!h) {
      activate<A>(n, y, out);
    } else if (!Re) {
      activate_backward<A>(n, e, y, h, out);
    } else {
      activate_backward_tangent<A>(n, Re, e, Ry, y, h, out);
    }
  });
}

}  // namespace mtml::MTML_ISA

using namespace mtml::MTML_ISA;
using mtml::Loss;

#define FUNCTIONS(T, NAME)                                                                                            \
  extern "C" {                                                                                                        \
  int64_t lanes_##NAME() { return kLanes<T>; }                                                                        \
  void apply_##NAME(int function, int64_t n, const T* x, T* out) { apply(function, n, x, out); }                      \
  void activation_##NAME(int32_t which, int64_t n, const T* y, const T* h, const T* e, const T* Re, const T* Ry,      \
                         T* out) {                                                                                    \
    activation(which, n, y, h, e, Re, Ry, out);                                                                       \
  }                                                                                                                   \
  int traits_##NAME(int32_t which) {                                                                                  \
    const auto activation = static_cast<mtml::Activation>(which);                                                     \
    return needs_input(activation) + 2 * is_linear(activation);                                                       \
  }                                                                                                                   \
  T loss_forward_##NAME(int32_t loss, int64_t N, int64_t C, int64_t ld, const T* z, const int64_t* labels,            \
                        const T* targets, const bool* mask, T* p, T* d) {                                             \
    return loss_forward(static_cast<Loss>(loss), N, C, ld, z, labels, targets, mask, p, d);                           \
  }                                                                                                                   \
  void loss_tangent_##NAME(int32_t loss, int64_t N, int64_t C, int64_t ld, const T* p, const T* Rz, const bool* mask, \
                           T* Rd) {                                                                                   \
    loss_tangent(static_cast<Loss>(loss), N, C, ld, p, Rz, mask, Rd);                                                 \
  }                                                                                                                   \
  void batch_norm_##NAME(int64_t N, int64_t ld, const T* z, const T* gain, const T* shift, double eps, T* y, T* xh,   \
                         T* r) {                                                                                      \
    batch_norm(N, ld, ld, z, gain, shift, eps, y, xh, r);                                                             \
  }                                                                                                                   \
  void batch_norm_backward_##NAME(int64_t N, int64_t ld, const T* d, const T* xh, const T* r, const T* gain, T* dz,   \
                                  T* dgain, T* dshift) {                                                              \
    batch_norm_backward(N, ld, ld, d, xh, r, gain, dz, dgain, dshift);                                                \
  }                                                                                                                   \
  void batch_norm_tangent_##NAME(int64_t N, int64_t ld, const T* Rz, const T* xh, const T* r, const T* gain,          \
                                 const T* Rgain, const T* Rshift, T* Rxh, T* Rr, T* Ry) {                             \
    batch_norm_tangent(N, ld, ld, Rz, xh, r, gain, Rgain, Rshift, Rxh, Rr, Ry);                                       \
  }                                                                                                                   \
  void batch_norm_backward_tangent_##NAME(int64_t N, int64_t ld, const T* d, const T* Rd, const T* xh, const T* Rxh,  \
                                          const T* r, const T* Rr, const T* gain, const T* Rgain, T* Rdz, T* Rdgain,  \
                                          T* Rdshift) {                                                               \
    batch_norm_backward_tangent(N, ld, ld, d, Rd, xh, Rxh, r, Rr, gain, Rgain, Rdz, Rdgain, Rdshift);                 \
  }                                                                                                                   \
  }

FUNCTIONS(float, f32)
FUNCTIONS(double, f64)

#ifdef CHECK_TARGET
MTML_TARGET_END
#endif
