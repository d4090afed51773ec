// torch.ops.mtml_fast.sgd_step and sgd_step_backward on the CPU; the maths is in core/sgd_step.h.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <vector>

#include "isa/choose.h"
#include "sgd_step_check.h"

namespace mtml {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

// The least number of elements worth a thread of their own. One thread does 131,072 in 26 us; a second one costs 1 us
// where the threads spin between regions and 45 us where they sleep (OMP_WAIT_POLICY=passive).
constexpr int64_t kElementsPerThread = 131072;

int64_t grain(int64_t elements_per_item) {
  return std::max<int64_t>(1, kElementsPerThread / std::max<int64_t>(1, elements_per_item));
}

template <class F>
void parallel_over_tasks(int64_t num_tasks, int64_t elements_per_task, const F& f) {
  if (num_tasks > 0) torch::stable::parallel_for(0, num_tasks, grain(elements_per_task), f);
}

std::vector<Shape> shapes(const Tensors& tensors) {
  std::vector<Shape> result;
  for (const Tensor& x : tensors) result.push_back({x.sizes().data(), x.dim()});
  return result;
}

Tensors contiguous(const Tensors& tensors, ScalarType dtype, const char* name) {
  Tensors result;
  for (const Tensor& x : tensors) {
    MTML_CHECK(x.scalar_type() == dtype, "sgd_step: ", name, " must all have the dtype of params[0], ",
               dtype == ScalarType::Float ? "float32" : "float64");
    result.push_back(x.is_contiguous() ? x : torch::stable::contiguous(x));
  }
  return result;
}

Tensors empty_like(const Tensors& tensors) {
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
    if (num_tasks > 0) {
      for (const Tensor& x : params) elements_per_task += x.numel() / num_tasks;
    }
  }

  size_t rate_of(size_t leaf) const { return lr.size() == 1 ? 0 : leaf; }

  template <class T>
  std::vector<SgdLeaf<T>> leaves() const {
    std::vector<SgdLeaf<T>> result;
    for (size_t i = 0; i < params.size(); ++i) {
      result.push_back({num_tasks > 0 ? params[i].numel() / num_tasks : 0, params[i].const_data_ptr<T>(),
                        grads[i].const_data_ptr<T>(),
                        momentum_buffers.empty() ? nullptr : momentum_buffers[i].const_data_ptr<T>(),
                        lr[rate_of(i)].const_data_ptr<T>(), rates[i].task, rates[i].element, nullptr, nullptr});
    }
    return result;
  }
};

template <class T>
Tensors forward(const Arguments& a) {
  Tensors new_params = empty_like(a.params), new_buffers = empty_like(a.momentum_buffers);
  auto leaves = a.leaves<T>();
  for (size_t i = 0; i < leaves.size(); ++i) {
    leaves[i].new_p = new_params[i].mutable_data_ptr<T>();
    if (!new_buffers.empty()) leaves[i].new_m = new_buffers[i].mutable_data_ptr<T>();
  }
  parallel_over_tasks(a.num_tasks, a.elements_per_task, [&](int64_t begin, int64_t end) {
    kernels().sgd_step<T>().forward(leaves.data(), leaves.size(), a.options, begin, end);
  });
  new_params.insert(new_params.end(), new_buffers.begin(), new_buffers.end());
  return new_params;
}

template <class T>
Tensors backward(const Tensors& grad_outputs, const Arguments& a, const std::vector<bool>& needs) {
  const size_t num_leaves = a.params.size(), num_rates = a.lr.size();
  const auto leaves = a.leaves<T>();
  std::vector<SgdLeafGradient<T>> gradients(num_leaves);
  // what each task adds to a rate without an element axis  [rates, T]
  std::vector<double> rate_sums(num_rates * a.num_tasks);
  std::vector<double> scale(a.num_tasks);

  Tensors results;
  size_t input = 0;
  // the result for the next input, or null where it is not needed
  auto next = [&](const Tensor& like) -> T* {
    if (!needs[input++]) return nullptr;
    results.push_back(torch::stable::empty_like(like));
    return results.back().template mutable_data_ptr<T>();
  };
  for (size_t i = 0; i < num_leaves; ++i) {
    gradients[i].u = grad_outputs[i].template const_data_ptr<T>();
    if (!a.momentum_buffers.empty()) gradients[i].w = grad_outputs[num_leaves + i].template const_data_ptr<T>();
  }
  for (size_t i = 0; i < num_leaves; ++i) gradients[i].dp = next(a.params[i]);
  for (size_t i = 0; i < num_leaves; ++i) gradients[i].dg = next(a.grads[i]);
  std::vector<T*> dlr(num_rates);
  for (size_t r = 0; r < num_rates; ++r) dlr[r] = next(a.lr[r]);
  for (size_t i = 0; i < a.momentum_buffers.size(); ++i) gradients[i].dm = next(a.momentum_buffers[i]);
  for (size_t i = 0; i < num_leaves; ++i) {
    const size_t r = a.rate_of(i);
    if (!dlr[r]) continue;
    if (a.rates[i].element != 0) {
      gradients[i].dlr = dlr[r];
    } else {
      gradients[i].dlr_task = rate_sums.data() + r * a.num_tasks;
    }
  }

  parallel_over_tasks(a.num_tasks, a.elements_per_task, [&](int64_t begin, int64_t end) {
    kernels().sgd_step<T>().backward(leaves.data(), gradients.data(), num_leaves, a.options, scale.data(), begin, end);
  });

  // sums over the tasks: in their order, whatever the number of threads
  for (size_t i = 0; i < num_leaves; ++i) {
    if (gradients[i].dlr && a.rates[i].task == 0) {
      torch::stable::parallel_for(0, a.lr[a.rate_of(i)].numel(), grain(a.num_tasks), [&](int64_t begin, int64_t end) {
        kernels().sgd_step<T>().shared_rate_backward(leaves[i], gradients[i], a.options, scale.data(), a.num_tasks,
                                                     begin, end);
      });
    }
  }
  for (size_t r = 0; r < num_rates; ++r) {
    const RateStrides& form = a.rates[r];  // r is a leaf that uses rate r, also where all leaves share rate 0
    if (!dlr[r] || form.element != 0) continue;
    const double* sums = rate_sums.data() + r * a.num_tasks;
    double total = 0;
    for (int64_t t = 0; t < a.num_tasks; ++t) {
      total += sums[t];
      if (form.task != 0) dlr[r][t] = static_cast<T>(sums[t]);
    }
    if (form.task == 0) dlr[r][0] = static_cast<T>(total);
  }
  return results;
}

Tensors sgd_step_cpu(const Tensors& params, const Tensors& grads, const Tensors& lr, const Tensors& momentum_buffers,
                     double momentum, double weight_decay, std::optional<double> clip) {
  const Arguments a(params, grads, lr, momentum_buffers, momentum, weight_decay, clip);
  return a.dtype == ScalarType::Float ? forward<float>(a) : forward<double>(a);
}

Tensors sgd_step_backward_cpu(const Tensors& grad_outputs, const Tensors& params, const Tensors& grads,
                              const Tensors& lr, const Tensors& momentum_buffers, double momentum, double weight_decay,
                              std::optional<double> clip, const std::vector<bool>& needs) {
  const Arguments a(params, grads, lr, momentum_buffers, momentum, weight_decay, clip);
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
  const Tensors cotangents = contiguous(grad_outputs, a.dtype, "grad_outputs");
  return a.dtype == ScalarType::Float ? backward<float>(cotangents, a, needs) : backward<double>(cotangents, a, needs);
}

}  // namespace
}  // namespace mtml

STABLE_TORCH_LIBRARY_IMPL(mtml_fast, CPU, m) {
  m.impl("sgd_step", TORCH_BOX(&mtml::sgd_step_cpu));
  m.impl("sgd_step_backward", TORCH_BOX(&mtml::sgd_step_backward_cpu));
}
