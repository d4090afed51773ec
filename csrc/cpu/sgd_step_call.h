// What a call of sgd_step brings, from torch's tensors to the pointers that kernels take: the same on every device.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <limits>
#include <optional>
#include <vector>

#include "core/sgd_step_args.h"
#include "sgd_step_check.h"

namespace mtml {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

inline std::vector<Shape> shapes(const Tensors& tensors) {
  std::vector<Shape> result;
  for (const Tensor& x : tensors) result.push_back({x.sizes().data(), x.dim()});
  return result;
}

inline Tensors contiguous(const Tensors& tensors, ScalarType dtype, const char* name) {
  Tensors result;
  for (const Tensor& x : tensors) {
    MTML_CHECK(x.scalar_type() == dtype, "sgd_step: ", name, " must all have the dtype of params[0], ",
               dtype == ScalarType::Float ? "float32" : "float64");
    result.push_back(x.is_contiguous() ? x : torch::stable::contiguous(x));
  }
  return result;
}

inline Tensors empty_like(const Tensors& tensors) {
  Tensors result;
  for (const Tensor& x : tensors) result.push_back(torch::stable::empty_like(x));
  return result;
}

// The arguments of one call, contiguous and checked.
struct Arguments {
  Tensors params, grads, lr, momentum_buffers;
  SgdOptions options;
  std::vector<RateStrides> rates;  // of each leaf
  ScalarType dtype;
  int64_t num_tasks;
  int64_t elements_per_task = 0;

  Arguments(const Tensors& p, const Tensors& g, const Tensors& rate, const Tensors& m, double momentum,
            double weight_decay, std::optional<double> clip)
      : options{momentum, weight_decay, clip.value_or(std::numeric_limits<double>::infinity())},
        rates(check_sgd_step(shapes(p), shapes(g), shapes(rate), shapes(m), momentum, weight_decay, options.clip)),
        dtype(p[0].scalar_type()),
        num_tasks(p[0].size(0)) {
    MTML_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double,
               "sgd_step: params must be float32 or float64");
    params = contiguous(p, dtype, "params");
    grads = contiguous(g, dtype, "grads");
    lr = contiguous(rate, dtype, "lr");
    momentum_buffers = contiguous(m, dtype, "momentum_buffers");
    for (const Tensor& x : params) elements_per_task += row_size(x);
  }

  // of one task; there may be none
  static int64_t row_size(const Tensor& leaf) {
    int64_t size = 1;
    for (int64_t axis = 1; axis < leaf.dim(); ++axis) size *= leaf.size(axis);
    return size;
  }

  size_t rate_of(size_t leaf) const { return lr.size() == 1 ? 0 : leaf; }

  template <class T>
  std::vector<SgdLeaf<T>> leaves() const {
    std::vector<SgdLeaf<T>> result;
    for (size_t i = 0; i < params.size(); ++i) {
      result.push_back({row_size(params[i]), params[i].const_data_ptr<T>(), grads[i].const_data_ptr<T>(),
                        momentum_buffers.empty() ? nullptr : momentum_buffers[i].const_data_ptr<T>(),
                        lr[rate_of(i)].const_data_ptr<T>(), rates[i].task, rates[i].element, nullptr, nullptr});
    }
    return result;
  }

  // with room for the results: the new parameters, then the new buffers
  template <class T>
  std::vector<SgdLeaf<T>> leaves(Tensors& results) const {
    results = empty_like(params);
    for (Tensor& x : empty_like(momentum_buffers)) results.push_back(x);
    std::vector<SgdLeaf<T>> result = leaves<T>();
    for (size_t i = 0; i < params.size(); ++i) {
      result[i].new_p = results[i].mutable_data_ptr<T>();
      if (!momentum_buffers.empty()) result[i].new_m = results[params.size() + i].mutable_data_ptr<T>();
    }
    return result;
  }

  // the cotangents, contiguous: one for each result
  Tensors checked_cotangents(const Tensors& grad_outputs, const std::vector<bool>& needs) const {
    const size_t outputs = params.size() + momentum_buffers.size();
    MTML_CHECK(grad_outputs.size() == outputs, "sgd_step_backward: grad_outputs must hold one cotangent per result (",
               outputs, "), got ", grad_outputs.size());
    const auto cotangent_shapes = shapes(grad_outputs), leaf_shapes = shapes(params);
    for (size_t i = 0; i < outputs; ++i) {
      const Shape& leaf = leaf_shapes[i % params.size()];
      MTML_CHECK(cotangent_shapes[i] == leaf, "sgd_step_backward: grad_outputs[", i, "] must be ", leaf, ", got ",
                 cotangent_shapes[i]);
    }
    const size_t inputs = params.size() + grads.size() + lr.size() + momentum_buffers.size();
    MTML_CHECK(needs.size() == inputs, "sgd_step_backward: needs must hold one bool per input tensor (", inputs,
               "), got ", needs.size());
    return contiguous(grad_outputs, dtype, "grad_outputs");
  }
};

// What the reverse returns: the gradients that are needed, in the order of the inputs; and where they go.
template <class T>
struct GradientResults {
  Tensors tensors;
  // `dlr` is in the layout of the leaf's rate, whatever that is
  std::vector<SgdLeafGradient<T>> gradients;
  std::vector<T*> dlr;  // of each rate

  GradientResults(const Arguments& a, const Tensors& cotangents, const std::vector<bool>& needs)
      : gradients(a.params.size()), dlr(a.lr.size()) {
    const size_t num_leaves = a.params.size();
    size_t input = 0;
    // the result for the next input, or null where it is not needed
    auto next = [&](const Tensor& like) -> T* {
      if (!needs[input++]) return nullptr;
      tensors.push_back(torch::stable::empty_like(like));
      return tensors.back().template mutable_data_ptr<T>();
    };
    for (size_t i = 0; i < num_leaves; ++i) {
      gradients[i].u = cotangents[i].template const_data_ptr<T>();
      if (!a.momentum_buffers.empty()) gradients[i].w = cotangents[num_leaves + i].template const_data_ptr<T>();
    }
    for (size_t i = 0; i < num_leaves; ++i) gradients[i].dp = next(a.params[i]);
    for (size_t i = 0; i < num_leaves; ++i) gradients[i].dg = next(a.grads[i]);
    for (size_t r = 0; r < dlr.size(); ++r) dlr[r] = next(a.lr[r]);
    for (size_t i = 0; i < a.momentum_buffers.size(); ++i) gradients[i].dm = next(a.momentum_buffers[i]);
    for (size_t i = 0; i < num_leaves; ++i) gradients[i].dlr = dlr[a.rate_of(i)];
  }
};

}  // namespace
}  // namespace mtml
