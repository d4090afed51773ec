// torch.ops.mtml_fast.gradient_gram and gradient_gram_backward on the CPU; the maths is in core/gradient_gram.h.
#include "cpu/gradient_leaves.h"

namespace mtml {
namespace {

template <class T>
Tensor forward(const GradientCall& call) {
  const int64_t sizes[] = {call.inputs.tasks(), call.inputs.tasks()};
  Tensor gram = empty<double>(Shape{sizes, 2});
  const auto leaves = call.inputs.leaves<T>([](size_t) { return nullptr; });
  gradient_gram(call.inputs.view(leaves), data<double>(gram), threads());
  return gram;
}

Tensor gradient_gram_cpu(const Tensors& gradients) {
  const GradientCall call(gradients);
  return call.inputs.is_float() ? forward<float>(call) : forward<double>(call);
}

template <class T>
Tensors backward(GradientCall& call, const Tensor& grad_output, const std::vector<bool>& needs) {
  const int64_t sizes[] = {call.inputs.tasks(), call.inputs.tasks()};
  const Array d_gram = call.arrays(grad_output);
  MTML_CHECK(d_gram.shape == (Shape{sizes, 2}) && d_gram.dtype == Dtype::kFloat64,
             "gradient_gram_backward: grad_outputs[0] must be ", (Shape{sizes, 2}), " of float64, got ", d_gram.shape);
  Tensors made;
  const auto leaves = call.with_room<T>(needs, made);
  gradient_gram_backward(call.inputs.view(leaves), static_cast<const double*>(d_gram.data), threads());
  return made;
}

Tensors gradient_gram_backward_cpu(const Tensors& grad_outputs, const Tensors& gradients,
                                   const std::vector<bool>& needs) {
  GradientCall call(gradients);
  MTML_CHECK(grad_outputs.size() == 1, "gradient_gram_backward: grad_outputs must hold 1 cotangent, got ",
             grad_outputs.size());
  MTML_CHECK(needs.size() == gradients.size(), "gradient_gram_backward: needs must hold one bool per leaf (",
             gradients.size(), "), got ", needs.size());
  return call.inputs.is_float() ? backward<float>(call, grad_outputs[0], needs)
                                : backward<double>(call, grad_outputs[0], needs);
}

}  // namespace
}  // namespace mtml

STABLE_TORCH_LIBRARY_IMPL(mtml_fast, CPU, m) {
  m.impl("gradient_gram", TORCH_BOX(&mtml::gradient_gram_cpu));
  m.impl("gradient_gram_backward", TORCH_BOX(&mtml::gradient_gram_backward_cpu));
}
