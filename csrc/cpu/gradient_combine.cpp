// torch.ops.mtml_fast.gradient_combine and gradient_combine_backward on the CPU; the maths is in
// core/gradient_combine.h.
#include "cpu/gradient_leaves.h"

namespace mtml {
namespace {

template <class T>
const T* weights_of(Leaves& leaves, const Tensor& weights) {
  const Array array = leaves.arrays(weights);
  MTML_CHECK(array.shape == (Shape{&leaves.tasks, 1}) && array.dtype == leaves.dtype,
             "gradient_combine: weights must be [T=", leaves.tasks, "] of the dtype of gradients, got ", array.shape);
  return static_cast<const T*>(array.data);
}

template <class T>
Tensors forward(Leaves& leaves, const Tensor& weights) {
  Tensors made;
  const auto parts = leaves.with<T>([&](size_t i) {
    made.push_back(empty<T>(Leaves::shape(leaves.all()[i])));
    return data<T>(made.back());
  });
  gradient_combine(view(leaves, parts), weights_of<T>(leaves, weights), threads());
  return made;
}

Tensors gradient_combine_cpu(const Tensors& gradients, const Tensor& weights) {
  Leaves leaves(gradients);
  return leaves.is_float() ? forward<float>(leaves, weights) : forward<double>(leaves, weights);
}

template <class T>
Tensors backward(Leaves& leaves, const Tensors& grad_outputs, const Tensor& weights, const std::vector<bool>& needs) {
  std::vector<const T*> u;
  for (size_t i = 0; i < grad_outputs.size(); ++i) {
    const Array array = leaves.arrays(grad_outputs[i]);
    const Shape expected = Leaves::shape(leaves.all()[i]);
    MTML_CHECK(array.shape == expected && array.dtype == leaves.dtype, "gradient_combine_backward: grad_outputs[", i,
               "] must be ", expected, " of the dtype of gradients, got ", array.shape);
    u.push_back(static_cast<const T*>(array.data));
  }
  Tensors made;
  const auto parts = leaves.with_room<T>(needs, made);
  T* d_weights = nullptr;
  if (needs.back()) {
    made.push_back(empty<T>(Shape{&leaves.tasks, 1}));
    d_weights = data<T>(made.back());
  }
  gradient_combine_backward(view(leaves, parts), weights_of<T>(leaves, weights), u.data(), d_weights, threads());
  return made;
}

Tensors gradient_combine_backward_cpu(const Tensors& grad_outputs, const Tensors& gradients, const Tensor& weights,
                                      const std::vector<bool>& needs) {
  Leaves leaves(gradients);
  MTML_CHECK(grad_outputs.size() == gradients.size(),
             "gradient_combine_backward: grad_outputs must hold one cotangent per leaf (", gradients.size(), "), got ",
             grad_outputs.size());
  MTML_CHECK(needs.size() == gradients.size() + 1,
             "gradient_combine_backward: needs must hold one bool per leaf and one (", gradients.size() + 1, "), got ",
             needs.size());
  return leaves.is_float() ? backward<float>(leaves, grad_outputs, weights, needs)
                           : backward<double>(leaves, grad_outputs, weights, needs);
}

}  // namespace
}  // namespace mtml

STABLE_TORCH_LIBRARY_IMPL(mtml_fast, CPU, m) {
  m.impl("gradient_combine", TORCH_BOX(&mtml::gradient_combine_cpu));
  m.impl("gradient_combine_backward", TORCH_BOX(&mtml::gradient_combine_backward_cpu));
}
