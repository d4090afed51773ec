// torch.ops.mtml_fast.heads, heads_backward and heads_double_backward on the CPU; the maths is in core/heads.h, the
// division of the work in heads.cpp.
#include "cpu/heads_call.h"

namespace mtml {
namespace {

template <class T>
const T* cotangent(Arrays& arrays, const Tensor& given, const Shape& like, const HeadsCall& call, const char* name) {
  const Array array = arrays(given);
  MTML_CHECK(array.shape == like && array.dtype == call.x.dtype, "heads: ", name, " must be ", like,
             " of the dtype of x, got shape ", array.shape);
  return static_cast<const T*>(array.data);
}

template <class T>
Tensor forward(const HeadsCall& call) {
  const HeadsSetup<T> setup(call);
  const int64_t size = setup.num_outputs();
  Tensor z = empty<T>(Shape{&size, 1});
  heads_forward(setup.batch(), data<T>(z), threads());
  return z;
}

template <class T>
Tensors backward(HeadsCall& call, const Tensors& grad_outputs, const std::vector<bool>& needs) {
  const HeadsSetup<T> setup(call);
  const int64_t size = setup.num_outputs();
  MTML_CHECK(grad_outputs.size() == 1, "heads_backward: grad_outputs must hold 1 cotangent, got ", grad_outputs.size());
  const T* q = cotangent<T>(call.arrays, grad_outputs[0], Shape{&size, 1}, call, "grad_outputs[0]");
  Tensors made;
  heads_backward(setup.batch(), q, call.room<T>(needs, 0, made), threads());
  return made;
}

template <class T>
Tensors double_backward(HeadsCall& call, const Tensors& grad_results, const Tensors& grad_outputs,
                        const std::vector<bool>& needs, const std::vector<bool>& double_needs) {
  const HeadsSetup<T> setup(call);
  const int64_t size = setup.num_outputs();
  const Shape outputs{&size, 1};
  const size_t wanted = static_cast<size_t>(std::count(needs.begin(), needs.end(), true));
  MTML_CHECK(grad_outputs.size() == 1 && needs.size() == call.differentiable().size() && grad_results.size() == wanted,
             "heads_double_backward: grad_outputs must hold 1 cotangent, grad_results one for each result of "
             "heads_backward, got ",
             grad_outputs.size(), " and ", grad_results.size());
  const T* q = cotangent<T>(call.arrays, grad_outputs[0], outputs, call, "grad_outputs[0]");
  size_t input = 0, result = 0;
  const auto cotangents = call.tensors<const T>([&](const Array& like) -> const T* {
    if (!needs[input++]) return nullptr;
    return cotangent<T>(call.arrays, grad_results[result++], like.shape, call, "grad_results");
  });
  Tensors made;
  T* d_q = nullptr;
  if (!double_needs.empty() && double_needs[0]) {
    made.push_back(empty<T>(outputs));
    d_q = data<T>(made[0]);
  }
  heads_double_backward(setup.batch(), q, cotangents, d_q, call.room<T>(double_needs, 1, made), threads());
  return made;
}

Tensor heads_cpu(HEADS_PARAMETERS) {
  const HeadsCall call(HEADS_ARGUMENTS);
  return call.is_float() ? forward<float>(call) : forward<double>(call);
}

Tensors heads_backward_cpu(const Tensors& grad_outputs, HEADS_PARAMETERS, const std::vector<bool>& needs) {
  HeadsCall call(HEADS_ARGUMENTS);
  return call.is_float() ? backward<float>(call, grad_outputs, needs) : backward<double>(call, grad_outputs, needs);
}

Tensors heads_double_backward_cpu(const Tensors& grad_results, const Tensors& grad_outputs, HEADS_PARAMETERS,
                                  const std::vector<bool>& needs, const std::vector<bool>& double_needs) {
  HeadsCall call(HEADS_ARGUMENTS);
  return call.is_float() ? double_backward<float>(call, grad_results, grad_outputs, needs, double_needs)
                         : double_backward<double>(call, grad_results, grad_outputs, needs, double_needs);
}

}  // namespace
}  // namespace mtml

STABLE_TORCH_LIBRARY_IMPL(mtml_fast, CPU, m) {
  m.impl("heads", TORCH_BOX(&mtml::heads_cpu));
  m.impl("heads_backward", TORCH_BOX(&mtml::heads_backward_cpu));
  m.impl("heads_double_backward", TORCH_BOX(&mtml::heads_double_backward_cpu));
}
