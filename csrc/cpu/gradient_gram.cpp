// torch.ops.mtml_fast.gradient_gram and gradient_gram_backward on the CPU; the maths is in core/gradient_gram.h.
#include "cpu/gradient_leaves.h"

namespace mtml {
namespace {

template <class T>
Tensor forward(const Leaves& leaves) {
  const int64_t sizes[] = {leaves.tasks, leaves.tasks};
  Tensor gram = empty<double>(Shape{sizes, 2});
  const auto parts = leaves.with<T>([](size_t) { return nullptr; });
  gradient_gram(view(leaves, parts), data<double>(gram), threads());
  return gram;
}

Tensor gradient_gram_cpu(const Tensors& gradients) {
  const Leaves leaves(gradients);
  return leaves.is_float() ? forward<float>(leaves) : forward<double>(leaves);
}

template <class T>
Tensors backward(Leaves& leaves, const Tensors& grad_outputs, const std::vector<bool>& needs) {
  const int64_t sizes[] = {leaves.tasks, leaves.tasks};
  const Array d_gram = leaves.arrays(grad_outputs[0]);
  MTML_CHECK(d_gram.shape == (Shape{sizes, 2}) && d_gram.dtype == Dtype::kFloat64,
             "gradient_gram_backward: grad_outputs[0] must be ", (Shape{sizes, 2}), " of float64, got ", d_gram.shape);
  Tensors made;
  const auto parts = leaves.with_room<T>(needs, made);
  gradient_gram_backward(view(leaves, parts), static_cast<const double*>(d_gram.data), threads());
  return made;
}

Tensors gradient_gram_backward_cpu(const Tensors& grad_outputs, const Tensors& gradients,
                                   const std::vector<bool>& needs) {
  Leaves leaves(gradients);
  MTML_CHECK(grad_outputs.size() == 1, "gradient_gram_backward: grad_outputs must hold 1 cotangent, got ",
             grad_outputs.size());
  MTML_CHECK(needs.size() == gradients.size(), "gradient_gram_backward: needs must hold one bool per leaf (",
             gradients.size(), "), got ", needs.size());
  return leaves.is_float() ? backward<float>(leaves, grad_outputs, needs)
                           : backward<double>(leaves, grad_outputs, needs);
}

}  // namespace
}  // namespace mtml

STABLE_TORCH_LIBRARY_IMPL(mtml_fast, CPU, m) {
  m.impl("gradient_gram", TORCH_BOX(&mtml::gradient_gram_cpu));
  m.impl("gradient_gram_backward", TORCH_BOX(&mtml::gradient_gram_backward_cpu));
}
