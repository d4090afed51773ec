// torch.ops.mtml_fast.sgd_step and sgd_step_backward on CUDA; the kernels are in cuda/sgd_step.cu.
#include "cuda/sgd_step.h"

#include <torch/csrc/stable/library.h>

#include <optional>
#include <vector>

#include "cpu/sgd_step_call.h"
#include "cuda/tensors.h"

namespace mtml {
namespace {

template <class T>
Tensor workspace_of(const Arguments& a, const std::vector<SgdLeaf<T>>& leaves, bool backward) {
  std::vector<int64_t> sizes;
  for (const auto& leaf : leaves) sizes.push_back(leaf.size);
  return workspace(a.params[0],
                   mtml_cuda_sgd_step_workspace(sizes.data(), sizes.size(), a.num_tasks, &a.options, backward));
}

template <class T, class Kernels>
Tensors forward(const Arguments& a, const Device& device, const Kernels& kernels) {
  Tensors results;
  const auto leaves = a.leaves<T>(results);
  const Tensor room = workspace_of(a, leaves, false);
  check_launch("sgd_step", kernels(leaves.data(), leaves.size(), a.num_tasks, &a.options,
                                   room.mutable_data_ptr<double>(), device.stream()));
  return results;
}

template <class T, class Kernels>
Tensors backward(const Arguments& a, const Tensors& cotangents, const std::vector<bool>& needs, const Device& device,
                 const Kernels& kernels) {
  const auto leaves = a.leaves<T>();
  const GradientResults<T> results(a, cotangents, needs);
  const Tensor room = workspace_of(a, leaves, true);
  const bool one_rate = a.lr.size() == 1;
  check_launch("sgd_step_backward", kernels(leaves.data(), results.gradients.data(), leaves.size(), a.num_tasks,
                                            &a.options, one_rate, room.mutable_data_ptr<double>(), device.stream()));
  return results.tensors;
}

Tensors sgd_step_cuda(const Tensors& params, const Tensors& grads, const Tensors& lr, const Tensors& momentum_buffers,
                      double momentum, double weight_decay, std::optional<double> clip) {
  const Arguments a(params, grads, lr, momentum_buffers, momentum, weight_decay, clip);
  const Device device("sgd_step", {&params, &grads, &lr, &momentum_buffers});
  return a.dtype == ScalarType::Float ? forward<float>(a, device, mtml_cuda_sgd_step_f32)
                                      : forward<double>(a, device, mtml_cuda_sgd_step_f64);
}

Tensors sgd_step_backward_cuda(const Tensors& grad_outputs, const Tensors& params, const Tensors& grads,
                               const Tensors& lr, const Tensors& momentum_buffers, double momentum, double weight_decay,
                               std::optional<double> clip, const std::vector<bool>& needs) {
  const Arguments a(params, grads, lr, momentum_buffers, momentum, weight_decay, clip);
  const Tensors cotangents = a.checked_cotangents(grad_outputs, needs);
  const Device device("sgd_step_backward", {&params, &grads, &lr, &momentum_buffers, &grad_outputs});
  return a.dtype == ScalarType::Float ? backward<float>(a, cotangents, needs, device, mtml_cuda_sgd_step_backward_f32)
                                      : backward<double>(a, cotangents, needs, device, mtml_cuda_sgd_step_backward_f64);
}

}  // namespace
}  // namespace mtml

STABLE_TORCH_LIBRARY_IMPL(mtml_fast, CUDA, m) {
  m.impl("sgd_step", TORCH_BOX(&mtml::sgd_step_cuda));
  m.impl("sgd_step_backward", TORCH_BOX(&mtml::sgd_step_backward_cuda));
}
