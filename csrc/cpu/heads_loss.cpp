// torch.ops.mtml_fast.heads_loss and heads_loss_backward on the CPU, and, with an underscore, the losses together with
// their gradients, without autograd; the maths is in core/heads_loss.h.
#include "cpu/heads_call.h"

namespace mtml {
namespace {

#define HEADS_LOSS_PARAMETERS                                                                                          \
  const Tensor &x, const MaybeTensor &labels, const MaybeTensor &targets, const Tensor &offsets, const Tensor &weight, \
      const MaybeTensor &bias, const MaybeTensor &out_offsets, const MaybeTensor &hidden_weight,                       \
      const MaybeTensor &hidden_bias, const MaybeTensor &class_weights, const MaybeTensor &mask,                       \
      const Text &activation, const std::vector<int64_t>&losses, double label_smoothing, int64_t ignore_index,         \
      double delta
#define HEADS_LOSS_ARGUMENTS                                                                                           \
  x, labels, targets, offsets, weight, bias, out_offsets, hidden_weight, hidden_bias, class_weights, mask, activation, \
      losses, label_smoothing, ignore_index, delta

class LossCall : public HeadsCall, public HeadsLossInputs {
 public:
  explicit LossCall(HEADS_LOSS_PARAMETERS) : HeadsCall(HEADS_ARGUMENTS) {
    this->labels = arrays(labels);
    this->targets = arrays(targets);
    this->class_weights = arrays(class_weights);
    this->mask = arrays(mask);
    this->losses = losses;
    this->label_smoothing = label_smoothing;
    this->ignore_index = ignore_index;
    this->delta = delta;
  }
};

template <class T>
const T* factors(HeadsCall& call, const Tensor& d_losses, int64_t tasks) {
  const Array array = call.arrays(d_losses);
  MTML_CHECK(array.shape == (Shape{&tasks, 1}) && array.dtype == call.x.dtype,
             "heads_loss: the losses' cotangent must be [T=", tasks, "] of the dtype of x, got shape ", array.shape);
  return static_cast<const T*>(array.data);
}

// The losses, and behind them the gradients that are needed, of the sum of d_losses[t] (1 without it) times them.
template <class T>
Tensors run(LossCall& call, const std::vector<bool>& needs, const Tensor* d_losses) {
  const HeadsSetup<T> setup(call);
  const int64_t tasks = setup.batch().tasks;
  const T* scales = d_losses ? factors<T>(call, *d_losses, tasks) : nullptr;
  Tensors made;
  made.push_back(empty<T>(Shape{&tasks, 1}));
  HeadTensors<T> gradient{};
  if (!needs.empty()) gradient = call.room<T>(needs, 0, made);
  heads_loss(setup.batch(), setup.targets(call), data<T>(made[0]), scales, gradient, threads());
  return made;
}

Tensors run(LossCall& call, const std::vector<bool>& needs, const Tensor* d_losses) {
  return call.is_float() ? run<float>(call, needs, d_losses) : run<double>(call, needs, d_losses);
}

Tensor heads_loss_cpu(HEADS_LOSS_PARAMETERS) {
  LossCall call(HEADS_LOSS_ARGUMENTS);
  return run(call, {}, nullptr)[0];
}

Tensors gradients_cpu(HEADS_LOSS_PARAMETERS, const std::vector<bool>& needs) {
  LossCall call(HEADS_LOSS_ARGUMENTS);
  return run(call, needs, nullptr);
}

Tensors heads_loss_backward_cpu(const Tensors& grad_outputs, HEADS_LOSS_PARAMETERS, const std::vector<bool>& needs) {
  MTML_CHECK(grad_outputs.size() == 1, "heads_loss_backward: grad_outputs must hold 1 cotangent, got ",
             grad_outputs.size());
  LossCall call(HEADS_LOSS_ARGUMENTS);
  Tensors made = run(call, needs, &grad_outputs[0]);
  made.erase(made.begin());
  return made;
}

// Multiplies each task's part of the gradients, as _heads_loss_gradients gives them, by d_losses[t].
template <class T>
void scale(HeadsCall& call, const Tensors& gradients, const Tensor& d_losses, const std::vector<bool>& needs) {
  const HeadsSetup<T> setup(call);
  const int64_t tasks = setup.batch().tasks;
  const size_t wanted = static_cast<size_t>(std::count(needs.begin(), needs.end(), true));
  MTML_CHECK(needs.size() == call.differentiable().size() && gradients.size() == wanted,
             "heads_loss: gradients must be those of the inputs that are needed, got ", gradients.size());
  size_t input = 0, next = 0;
  const auto to = call.tensors<T>([&](const Array& like) -> T* {
    if (!needs[input++]) return nullptr;
    const Tensor& x = gradients[next++];
    const Array array = call.arrays(x);
    MTML_CHECK(x.is_contiguous() && array.shape == like.shape && array.dtype == call.x.dtype,
               "heads_loss: gradients must be contiguous and like their inputs ", like.shape, ", got ", array.shape);
    return data<T>(x);
  });
  heads_scale(setup.batch(), factors<T>(call, d_losses, tasks), to, threads());
}

void scale_cpu(const Tensors& gradients, const Tensor& d_losses, HEADS_PARAMETERS, const std::vector<bool>& needs) {
  HeadsCall call(HEADS_ARGUMENTS);
  return call.is_float() ? scale<float>(call, gradients, d_losses, needs)
                         : scale<double>(call, gradients, d_losses, needs);
}

}  // namespace
}  // namespace mtml

STABLE_TORCH_LIBRARY_IMPL(mtml_fast, CPU, m) {
  m.impl("heads_loss", TORCH_BOX(&mtml::heads_loss_cpu));
  m.impl("heads_loss_backward", TORCH_BOX(&mtml::heads_loss_backward_cpu));
  m.impl("_heads_loss_gradients", TORCH_BOX(&mtml::gradients_cpu));
  m.impl("_heads_loss_scale", TORCH_BOX(&mtml::scale_cpu));
}
