// torch.ops.mtml_fast.mlp_adapt and mlp_adapt_backward on the CPU, and the same without autograd (with an underscore)
// for those who bring their own; the sweeps are in mlp_adapt.h, the rules for the arguments in mlp_adapt_check.h.
// The operators without autograd take a list of tensors and one tensor of numbers: each argument of an operator costs
// 0.1 us and more, which small networks notice.
#include "mlp_adapt.h"

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/tensors.h"
#include "mlp_adapt_check.h"

namespace mtml {
namespace {

// The operator's arguments, which every function of this file takes.
#define MLP_ADAPT_PARAMETERS                                                                                         \
  const Tensors &params, const Tensors &lr, const Tensor &support_x, const Tensor &support_y, const Tensor &query_x, \
      const MaybeTensor &query_y, const MaybeTensor &support_offsets, const MaybeTensor &query_offsets,              \
      const MaybeTensor &class_mask, const std::vector<bool>&adapted, int64_t steps, const Text &loss,               \
      const Text &activation, bool bias, bool norm, double norm_eps, double momentum, double weight_decay,           \
      std::optional<double> clip, bool first_order, bool every_step, bool return_parameters
#define MLP_ADAPT_ARGUMENTS                                                                                       \
  params, lr, support_x, support_y, query_x, query_y, support_offsets, query_offsets, class_mask, adapted, steps, \
      loss, activation, bias, norm, norm_eps, momentum, weight_decay, clip, first_order, every_step, return_parameters

// What the operators without autograd take besides tensors: float64 numbers, read one after the other.
class Numbers {
 public:
  explicit Numbers(const Tensor& x) {
    MTML_CHECK(x.dim() == 1 && x.is_contiguous() && dtype_of(x) == Dtype::kFloat64,
               "mlp_adapt: settings must be float64 numbers in a row");
    at_ = static_cast<const double*>(x.const_data_ptr());
    end_ = at_ + x.numel();
  }

  double number() {
    MTML_CHECK(at_ != end_, "mlp_adapt: settings must hold a number for each setting, got too few");
    return *at_++;
  }
  bool flag() { return number() != 0; }
  int64_t integer() {
    // what does not fit has no integer; numbers that are not exact (from 2^53 on) are too large for any setting
    constexpr double kMax = int64_t{1} << 62;
    const double x = number();
    MTML_CHECK(x >= -kMax && x <= kMax, "mlp_adapt: settings must be within 2^62 where they count, got ", x);
    return static_cast<int64_t>(x);
  }
  // behind their count
  std::vector<bool> flags() {
    std::vector<bool> result(count());
    for (size_t i = 0; i < result.size(); ++i) result[i] = flag();
    return result;
  }
  std::string text() {
    std::string result(count(), ' ');
    for (char& letter : result) letter = static_cast<char>(integer());
    return result;
  }
  void end() const {
    MTML_CHECK(at_ == end_, "mlp_adapt: settings must hold a number for each setting, got ", end_ - at_, " more");
  }

 private:
  const double *at_, *end_;

  size_t count() {
    const int64_t n = integer();
    MTML_CHECK(n >= 0 && n <= end_ - at_, "mlp_adapt: settings must hold ", n, " more numbers, got ", end_ - at_);
    return static_cast<size_t>(n);
  }
};

// The tensors of one call as contiguous arrays.
class Call : public MlpInputs {
 public:
  // which tensors of params, lr, support_x and query_x a derivative is asked for
  std::vector<bool> needs;

  explicit Call(MLP_ADAPT_PARAMETERS)
      : MlpInputs{{},         {},
                  {},         {},
                  {},         {},
                  {},         {},
                  {},         adapted,
                  steps,      loss,
                  activation, bias,
                  norm,       norm_eps,
                  momentum,   weight_decay,
                  clip,       first_order,
                  every_step, return_parameters} {
    this->params.reserve(params.size());
    for (const Tensor& x : params) this->params.push_back(arrays_(x));
    this->lr.reserve(lr.size());
    for (const Tensor& x : lr) this->lr.push_back(arrays_(x));
    this->support_x = arrays_(support_x);
    this->support_y = arrays_(support_y);
    this->query_x = arrays_(query_x);
    this->query_y = arrays_(query_y);
    this->support_offsets = arrays_(support_offsets);
    this->query_offsets = arrays_(query_offsets);
    this->class_mask = arrays_(class_mask);
    check_params();
  }

  // tensors: params, lr, support_x, query_x, support_y, and what there is of query_y, support_offsets, query_offsets,
  // class_mask. settings: how many params, which of those four there are, needs, and the other arguments.
  Call(const Tensors& tensors, const Tensor& settings) : MlpInputs{} {
    Numbers next(settings);
    const int64_t num_params = next.integer();
    std::optional<Array>* const given[] = {&query_y, &support_offsets, &query_offsets, &class_mask};
    bool is_given[4];
    size_t others = 1;
    for (bool& is : is_given) others += is = next.flag();
    needs = next.flags();
    adapted = next.flags();
    steps = next.integer();
    loss = next.text();
    activation = next.text();
    bias = next.flag();
    norm = next.flag();
    norm_eps = next.number();
    momentum = next.number();
    weight_decay = next.number();
    clip = next.number();
    first_order = next.flag();
    every_step = next.flag();
    return_parameters = next.flag();
    next.end();

    const int64_t num_rates = static_cast<int64_t>(needs.size()) - num_params - 2;
    MTML_CHECK(num_params >= 0 && num_rates >= 0 && tensors.size() == needs.size() + others,
               "mlp_adapt: tensors must be as many as settings say, got ", tensors.size());
    auto tensor = tensors.begin();
    params.reserve(num_params);
    for (int64_t i = 0; i < num_params; ++i) params.push_back(arrays_(*tensor++));
    lr.reserve(num_rates);
    for (int64_t i = 0; i < num_rates; ++i) lr.push_back(arrays_(*tensor++));
    support_x = arrays_(*tensor++);
    query_x = arrays_(*tensor++);
    support_y = arrays_(*tensor++);
    for (size_t i = 0; i < 4; ++i) {
      if (is_given[i]) *given[i] = arrays_(*tensor++);
    }
    check_params();
  }

  bool is_float() const { return params[0].dtype == Dtype::kFloat32; }

 private:
  Arrays arrays_;

  void check_params() const {
    MTML_CHECK(!params.empty(), "mlp_adapt: params must hold at least one layer, got none");
    const Dtype dtype = params[0].dtype;
    MTML_CHECK(dtype == Dtype::kFloat32 || dtype == Dtype::kFloat64, "mlp_adapt: params must be float32 or float64");
  }
};

Shape shape_of(const std::vector<int64_t>& sizes) { return {sizes.data(), static_cast<int64_t>(sizes.size())}; }

// without the axis of steps, of size 1
Shape one_evaluation(const Shape& shape) { return {shape.sizes + 1, shape.dim - 1}; }

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

  MTML_CHECK(grad_outputs.size() == 3, "mlp_adapt_backward: grad_outputs must hold 3 cotangents, got ",
             grad_outputs.size());
  const std::vector<int64_t> shapes[3] = {setup.outputs_shape(), setup.losses_shape(), setup.fast_shape()};
  const T** const cotangents[3] = {&a.d_outputs, &a.d_losses, &a.d_fast};
  Tensors copies;
  for (size_t i = 0; i < 3; ++i) {
    const Tensor& given = grad_outputs[i];
    // a cotangent without elements stands for zeros
    if (given.numel() == 0) continue;
    copies.push_back(given.is_contiguous() ? given : torch::stable::contiguous(given));
    const auto sizes = copies.back().sizes();
    const Shape shape{sizes.data(), static_cast<int64_t>(sizes.size())};
    const Shape expected = shape_of(shapes[i]);
    const bool fits = shape == expected || (i < 2 && !a.options.every_step && shape == one_evaluation(expected));
    MTML_CHECK(fits && dtype_of(given) == call.params[0].dtype, "mlp_adapt_backward: grad_outputs[", i, "] must be ",
               expected, " of the dtype of params[0], got ", shape);
    *cotangents[i] = static_cast<const T*>(copies.back().const_data_ptr());
  }
  // constants have no cotangent
  if (!setup.labelled()) a.d_losses = nullptr;

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

std::vector<bool> no_needs(const Call& call) { return std::vector<bool>(call.params.size() + call.lr.size() + 2); }

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

// the text of the plan, one byte a character
Tensor plan_cpu(const Tensors& tensors, const Tensor& settings, bool keeps_state) {
  const Call call(tensors, settings);
  const std::string text = call.is_float() ? plan<float>(call, keeps_state) : plan<double>(call, keeps_state);
  const int64_t size = static_cast<int64_t>(text.size());
  const Tensor result = empty(Shape{&size, 1}, aoti_torch_dtype_uint8());
  std::copy(text.begin(), text.end(), data<char>(result));
  return result;
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
