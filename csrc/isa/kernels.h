// The table of entry points that every instruction set fills. Includes all std headers of the core, so that
// isa/<set>.cpp has them before it changes the target: inline std code must not be compiled for one processor.
#pragma once

#include <cstdint>

#include "core/gradient_args.h"
#include "core/heads_args.h"
#include "core/mlp_adapt_plan.h"
#include "core/sgd_step_args.h"

namespace mtml {

struct Kernels {
  const char* isa;
  SgdStep<float> sgd_step_f32;
  SgdStep<double> sgd_step_f64;
  MlpAdapt<float> mlp_adapt_f32;
  MlpAdapt<double> mlp_adapt_f64;
  Heads<float> heads_f32;
  Heads<double> heads_f64;
  Gradients<float> gradients_f32;
  Gradients<double> gradients_f64;

  template <class T>
  const SgdStep<T>& sgd_step() const {
    if constexpr (sizeof(T) == sizeof(float)) {
      return sgd_step_f32;
    } else {
      return sgd_step_f64;
    }
  }
  template <class T>
  const MlpAdapt<T>& mlp_adapt() const {
    if constexpr (sizeof(T) == sizeof(float)) {
      return mlp_adapt_f32;
    } else {
      return mlp_adapt_f64;
    }
  }
  template <class T>
  const Heads<T>& heads() const {
    if constexpr (sizeof(T) == sizeof(float)) {
      return heads_f32;
    } else {
      return heads_f64;
    }
  }
  template <class T>
  const Gradients<T>& gradients() const {
    if constexpr (sizeof(T) == sizeof(float)) {
      return gradients_f32;
    } else {
      return gradients_f64;
    }
  }
};

// the sets built for this architecture; isa/choose.cpp knows which
namespace baseline {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace neon {
extern const Kernels kernels;
}

}  // namespace mtml

// Functions between these two lines are compiled for more than the architecture's oldest processor.
#define MTML_PRAGMA(text) _Pragma(#text)
#ifdef __clang__
#define MTML_TARGET_BEGIN(features) \
  MTML_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define MTML_TARGET_END MTML_PRAGMA(clang attribute pop)
#else
#define MTML_TARGET_BEGIN(features) MTML_PRAGMA(GCC push_options) MTML_PRAGMA(GCC target(features))
#define MTML_TARGET_END MTML_PRAGMA(GCC pop_options)
#endif
