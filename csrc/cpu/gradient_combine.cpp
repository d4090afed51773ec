// torch.ops.mtml_fast.gradient_combine and gradient_combine_backward on the CPU; the maths is in
// core/gradient_combine.h.
#include "cpu/gradient_leaves.h"

namespace mtml {
namespace {

template <class T>
Tensors forward(GradientCall& call, const Tensor& weights) {
  const T* w = call.inputs.weights<T>(call.arrays(weights));
  Tensors made;
  const auto leaves = call.inputs.leaves<T>([&](size_t i) {
    made.push_back(empty<T>(call.inputs.task_shape(i)));
    return data<T>(made.back());
  });
  gradient_combine(call.inputs.view(leaves), w, threads());
  return made;
}

Tensors gradient_combine_cpu(const Tensors& gradients, const Tensor& weights) {
  GradientCall call(gradients);
  return call.inputs.is_float() ? forward<float>(call, weights) : forward<double>(call, weights);
}

template <class T>
Tensors backward(GradientCall& call, const Tensors& grad_outputs, const Tensor& weights,
                 const std::vector<bool>& needs) {
  const T* w = call.inputs.weights<T>(call.arrays(weights));
  std::vector<const T*> u;
  for (size_t i = 0; i < grad_outputs.size(); ++i) {
    const Array array = call.arrays(grad_outputs[i]);
    const Shape expected = call.inputs.task_shape(i);
    MTML_CHECK(array.shape == expected && array.dtype == call.inputs.dtype(),
               "gradient_combine_backward: grad_outputs[", i, "] must be ", expected,
               " of the dtype of gradients, got ", array.shape);
    u.push_back(static_cast<const T*>(array.data));
  }
  Tensors made;
  const auto leaves = call.with_room<T>(needs, made);
  T* d_weights = nullptr;
  if (needs.back()) {
    const int64_t tasks = call.inputs.tasks();
    made.push_back(empty<T>(Shape{&tasks, 1}));
    d_weights = data<T>(made.back());
  }
  gradient_combine_backward(call.inputs.view(leaves), w, u.data(), d_weights, threads());
  return made;
}

Tensors gradient_combine_backward_cpu(const Tensors& grad_outputs, const Tensors& gradients, const Tensor& weights,
                                      const std::vector<bool>& needs) {
  GradientCall call(gradients);
  MTML_CHECK(grad_outputs.size() == gradients.size(),
             "gradient_combine_backward: grad_outputs must hold one cotangent per leaf (", gradients.size(), "), got ",
             grad_outputs.size());
  MTML_CHECK(needs.size() == gradients.size() + 1,
             "gradient_combine_backward: needs must hold one bool per leaf and one (", gradients.size() + 1, "), got ",
             needs.size());
  return call.inputs.is_float() ? backward<float>(call, grad_outputs, weights, needs)
                                : backward<double>(call, grad_outputs, weights, needs);
}

}  // namespace
}  // namespace mtml

STABLE_TORCH_LIBRARY_IMPL(mtml_fast, CPU, m) {
  m.impl("gradient_combine", TORCH_BOX(&mtml::gradient_combine_cpu));
  m.impl("gradient_combine_backward", TORCH_BOX(&mtml::gradient_combine_backward_cpu));
}
