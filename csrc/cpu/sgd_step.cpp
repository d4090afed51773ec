// torch.ops.mtml_fast.sgd_step and sgd_step_backward on the CPU; the maths is in core/sgd_step.h.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "cpu/sgd_step_call.h"
#include "isa/choose.h"

namespace mtml {
namespace {

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

template <class T>
Tensors forward(const Arguments& a) {
  Tensors results;
  const auto leaves = a.leaves<T>(results);
  parallel_over_tasks(a.num_tasks, a.elements_per_task, [&](int64_t begin, int64_t end) {
    kernels().sgd_step<T>().forward(leaves.data(), leaves.size(), a.options, begin, end);
  });
  return results;
}

template <class T>
Tensors backward(const Arguments& a, const Tensors& grad_outputs, const std::vector<bool>& needs) {
  const size_t num_leaves = a.params.size(), num_rates = a.lr.size();
  const auto leaves = a.leaves<T>();
  GradientResults<T> results(a, grad_outputs, needs);
  auto& gradients = results.gradients;
  const auto& dlr = results.dlr;
  // what each task adds to a rate without an element axis  [rates, T]
  std::vector<double> rate_sums(num_rates * a.num_tasks);
  std::vector<double> scale(a.num_tasks);
  for (size_t i = 0; i < num_leaves; ++i) {
    if (!gradients[i].dlr || a.rates[i].element != 0) continue;
    gradients[i].dlr = nullptr;
    gradients[i].dlr_task = rate_sums.data() + a.rate_of(i) * a.num_tasks;
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
  return results.tensors;
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
  const Tensors cotangents = a.checked_cotangents(grad_outputs, needs);
  return a.dtype == ScalarType::Float ? backward<float>(a, cotangents, needs) : backward<double>(a, cotangents, needs);
}

}  // namespace
}  // namespace mtml

STABLE_TORCH_LIBRARY_IMPL(mtml_fast, CPU, m) {
  m.impl("sgd_step", TORCH_BOX(&mtml::sgd_step_cpu));
  m.impl("sgd_step_backward", TORCH_BOX(&mtml::sgd_step_backward_cpu));
}
