// torch.ops.mtml_fast.mlp_adapt and mlp_adapt_backward on the CPU, and the same without autograd (with an underscore)
// for those who bring their own; the sweeps are in mlp_adapt.h, the rules for the arguments in mlp_adapt_check.h.
#include "mlp_adapt.h"

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/mlp_adapt_call.h"
#include "cpu/tensors.h"

namespace mtml {
namespace {

// Room for outputs and losses, handed to the core. The operators without autograd give them an axis of steps only where
// there are several.
template <class T>
Tensors results(MlpSetup<T>& setup, bool always_steps) {
  MlpArguments<T>& a = setup.arguments();
  const std::vector<int64_t> outputs = setup.outputs_shape(), losses = setup.losses_shape();
  const bool steps = always_steps || a.options.every_step;
  Tensors made;
  made.reserve(4 + a.num_params);
  made.push_back(empty<T>(steps ? shape_of(outputs) : one_evaluation(shape_of(outputs))));
  made.push_back(empty<T>(steps ? shape_of(losses) : one_evaluation(shape_of(losses))));
  a.outputs = data<T>(made[0]);
  a.losses = data<T>(made[1]);
  if (!setup.labelled()) {
    // without labels the losses are zeros
    std::fill_n(a.losses, setup.evaluations() * setup.tasks(), T(0));
    a.losses = nullptr;
  }
  return made;
}

// Room for the gradients, behind the other results.
template <class T>
void give_gradients(MlpSetup<T>& setup, const std::vector<bool>& needs, Tensors& made) {
  made.reserve(made.size() + needs.size());
  setup.give_gradients(needs, [&](const Shape& shape) {
    made.push_back(empty<T>(shape));
    return data<T>(made.back());
  });
}

// outputs, losses, fast, and the state for the backward sweep, without elements where nothing is needed
template <class T>
Tensors saving(const Call& call, const std::vector<bool>& needs, bool always_steps) {
  MlpSetup<T> setup(call);
  setup.want(needs);
  Tensors made = results(setup, always_steps);
  made.push_back(empty<T>(shape_of(setup.fast_shape())));
  if (setup.arguments().wants_fast) setup.arguments().fast = data<T>(made[2]);
  const bool saves = setup.tasks() > 0 && std::find(needs.begin(), needs.end(), true) != needs.end();
  const int64_t size = saves ? mlp_adapt_state_size(setup.arguments()) : 0;
  made.push_back(empty<T>(Shape{&size, 1}));
  if (setup.tasks() > 0) mlp_adapt_forward(setup.arguments(), saves ? data<T>(made[3]) : nullptr, threads());
  return made;
}

template <class T>
Tensors backward(const Call& call, const Tensors& grad_outputs, const std::vector<bool>& needs, const Tensor* state) {
  MlpSetup<T> setup(call);
  MlpArguments<T>& a = setup.arguments();
  Tensors gradients;
  give_gradients(setup, needs, gradients);
  const Tensors cotangents = give_cotangents(setup, call, grad_outputs);

  if (setup.tasks() == 0) {
    setup.zero_gradients();
    return gradients;
  }
  const T* kept = nullptr;
  if (state && state->numel() > 0) {
    const int64_t size = mlp_adapt_state_size(a);
    MTML_CHECK(state->numel() == size && state->is_contiguous() && dtype_of(*state) == call.params[0].dtype,
               "mlp_adapt_backward: state must be the one of the forward sweep with ", size, " elements, got ",
               state->numel());
    kept = static_cast<const T*>(state->const_data_ptr());
  }
  mlp_adapt_backward(a, kept, threads());
  setup.finish_gradients();
  return gradients;
}

// outputs, losses, the mean over the tasks of the last losses, and the gradients of this mean
template <class T>
Tensors gradients(const Call& call) {
  const std::vector<bool>& needs = call.needs;
  MlpSetup<T> setup(call);
  MTML_CHECK(setup.labelled(), "mlp_adapt: query_y must be given where the mean loss is wanted");
  MlpArguments<T>& a = setup.arguments();
  Tensors made = results(setup, false);
  made.push_back(empty<T>(Shape{nullptr, 0}));
  give_gradients(setup, needs, made);
  const int64_t tasks = setup.tasks(), last = (setup.evaluations() - 1) * tasks;
  if (tasks == 0) {
    setup.zero_gradients();
  } else {
    std::vector<T> d_losses(last + tasks);
    std::fill_n(d_losses.data() + last, tasks, static_cast<T>(1.0 / static_cast<double>(tasks)));
    a.d_losses = d_losses.data();
    if (std::find(needs.begin(), needs.end(), true) != needs.end()) {
      mlp_adapt_gradients(a, threads());
    } else {
      mlp_adapt_forward(a, static_cast<T*>(nullptr), threads());
    }
    setup.finish_gradients();
  }
  double sum = 0;
  for (int64_t t = 0; t < tasks; ++t) sum += a.losses[last + t];
  *data<T>(made[2]) = static_cast<T>(sum / static_cast<double>(tasks));
  return made;
}

template <class T>
std::string plan(const Call& call, bool keeps_state) {
  MlpSetup<T> setup(call);
  setup.want(call.needs);
  const bool backward = std::find(call.needs.begin(), call.needs.end(), true) != call.needs.end();
  return mlp_adapt_plan(setup.arguments(), backward, keeps_state);
}

Tensors saving_cpu(const Tensors& tensors, const Tensor& settings) {
  const Call call(tensors, settings);
  return call.is_float() ? saving<float>(call, call.needs, false) : saving<double>(call, call.needs, false);
}

std::tuple<Tensor, Tensor, Tensor> mlp_adapt_cpu(MLP_ADAPT_PARAMETERS) {
  const Call call(MLP_ADAPT_ARGUMENTS);
  const Tensors made =
      call.is_float() ? saving<float>(call, no_needs(call), true) : saving<double>(call, no_needs(call), true);
  return {made[0], made[1], made[2]};
}

Tensors backward_from_state_cpu(const Tensors& grad_outputs, const Tensors& tensors, const Tensor& settings,
                                const Tensor& state) {
  const Call call(tensors, settings);
  return call.is_float() ? backward<float>(call, grad_outputs, call.needs, &state)
                         : backward<double>(call, grad_outputs, call.needs, &state);
}

Tensors backward_cpu(const Tensors& grad_outputs, MLP_ADAPT_PARAMETERS, const std::vector<bool>& needs) {
  const Call call(MLP_ADAPT_ARGUMENTS);
  return call.is_float() ? backward<float>(call, grad_outputs, needs, nullptr)
                         : backward<double>(call, grad_outputs, needs, nullptr);
}

Tensors gradients_cpu(const Tensors& tensors, const Tensor& settings) {
  const Call call(tensors, settings);
  return call.is_float() ? gradients<float>(call) : gradients<double>(call);
}

Tensor plan_cpu(const Tensors& tensors, const Tensor& settings, bool keeps_state) {
  const Call call(tensors, settings);
  return bytes_of(call.is_float() ? plan<float>(call, keeps_state) : plan<double>(call, keeps_state));
}

}  // namespace
}  // namespace mtml

STABLE_TORCH_LIBRARY_IMPL(mtml_fast, CPU, m) {
  m.impl("mlp_adapt", TORCH_BOX(&mtml::mlp_adapt_cpu));
  m.impl("mlp_adapt_backward", TORCH_BOX(&mtml::backward_cpu));
  m.impl("_mlp_adapt_saving", TORCH_BOX(&mtml::saving_cpu));
  m.impl("_mlp_adapt_backward", TORCH_BOX(&mtml::backward_from_state_cpu));
  m.impl("_mlp_adapt_gradients", TORCH_BOX(&mtml::gradients_cpu));
  m.impl("_mlp_adapt_plan", TORCH_BOX(&mtml::plan_cpu));
}
