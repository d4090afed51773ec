// torch.ops.mtml_fast.mlp_adapt and mlp_adapt_backward on CUDA, and the same without autograd (with an underscore); the
// kernels are in cuda/mlp_adapt.cu. Nobody reads here what lies on the device: values are not checked.
#include "cuda/mlp_adapt.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <sstream>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/mlp_adapt_call.h"
#include "cuda/linear_adapt.h"
#include "cuda/tensors.h"

namespace mtml {
namespace {

template <class T>
struct Kernels;
template <>
struct Kernels<float> : cuda::MlpKernels<float> {
  static constexpr auto linear_serves = mtml_cuda_linear_adapt_serves_f32;
  static constexpr auto linear_state = mtml_cuda_linear_adapt_state_size_f32;
  static constexpr auto linear_workspace = mtml_cuda_linear_adapt_workspace_size_f32;
  static constexpr auto linear_forward = mtml_cuda_linear_adapt_forward_f32;
  static constexpr auto linear_backward = mtml_cuda_linear_adapt_backward_f32;
};
template <>
struct Kernels<double> : cuda::MlpKernels<double> {
  static constexpr auto linear_serves = mtml_cuda_linear_adapt_serves_f64;
  static constexpr auto linear_state = mtml_cuda_linear_adapt_state_size_f64;
  static constexpr auto linear_workspace = mtml_cuda_linear_adapt_workspace_size_f64;
  static constexpr auto linear_forward = mtml_cuda_linear_adapt_forward_f64;
  static constexpr auto linear_backward = mtml_cuda_linear_adapt_backward_f64;
};

// A head on features that stay is adapted in dual form, where its rows are counted by the host.
template <class T>
bool is_linear(const MlpArguments<T>& a) {
  return !a.support.offsets && !a.query.offsets && Kernels<T>::linear_serves(&a);
}

template <class T>
bool is_gram(const MlpArguments<T>& a) {
  return !is_linear(a) && Kernels<T>::is_gram(&a);
}

// elements of what the forward sweep leaves for the reverse, or needs for itself
template <class T>
int64_t state_size(const MlpArguments<T>& a, bool keeps) {
  return is_linear(a) ? Kernels<T>::linear_state(&a) : Kernels<T>::state(&a, is_gram(a), keeps);
}

void check_layers(int64_t layers) {
  MTML_CHECK(layers <= cuda::kMlpLayers, "mlp_adapt: params must be those of at most ", cuda::kMlpLayers,
             " layers on a CUDA device, got ", layers, "; mtml_fast.backend('reference') takes more");
}

Tensor room(const Tensor& like, const Shape& shape) {
  return torch::stable::new_empty(like, {shape.sizes, static_cast<size_t>(shape.dim)});
}
Tensor room(const Tensor& like, int64_t size) { return torch::stable::new_empty(like, {size}); }

// The tensors that products over all tasks' rows take: [H, D] or one for each task, [T, N, D], [T, Q, D].
struct Features {
  Tensor weight, support, query;
};

// The products of a first layer in Gram form, by torch's own library; owns them.
template <class T>
class Products {
 public:
  cuda::MlpGram<T> gram{};

  // what the forward sweep takes
  void forward(const Features& x) {
    const Tensor weight = torch::stable::transpose(x.weight, 0, 1);
    gram.support_z = keep(matmul(rows(x.support), weight));
    gram.query_z = keep(matmul(rows(x.query), weight));
    gram.gram = keep(matmul(x.support, turned(x.support)));
    gram.cross = keep(matmul(x.query, turned(x.support)));
  }
  // what the reverse takes, with room for what it gives
  void backward(const Features& x, int64_t width) {
    gram.gram = keep(matmul(x.support, turned(x.support)));
    gram.cross_transposed = keep(matmul(x.support, turned(x.query)));
    support_u_ = room_of(x.support, width);
    query_u_ = room_of(x.query, width);
    gram.support_u = data<T>(support_u_);
    gram.query_u = data<T>(query_u_);
  }
  // the weight's gradient, behind the reverse: what the sums add up
  void finish(const Features& x) {
    gram.support_gradient = keep(matmul(torch::stable::transpose(support_u_, 0, 1), rows(x.support)));
    gram.query_gradient = keep(matmul(torch::stable::transpose(query_u_, 0, 1), rows(x.query)));
  }

 private:
  Tensors kept_;
  Tensor support_u_, query_u_;

  // of matrices, or of as many as there are tasks, into an array of their own type: what products return is of another
  // under autocast
  static Tensor matmul(const Tensor& a, const Tensor& b) {
    std::vector<int64_t> sizes;
    for (int64_t axis = 0; axis + 1 < a.dim(); ++axis) sizes.push_back(a.size(axis));
    sizes.push_back(b.size(b.dim() - 1));
    using torch::stable::detail::from;
    StableIValue stack[] = {from(a), from(b), from(torch::stable::new_empty(a, sizes))};
    const char* op = a.dim() == 2 ? "aten::mm" : "aten::bmm";
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, "out", stack, TORCH_ABI_VERSION));
    return torch::stable::detail::to<Tensor>(stack[0]);
  }
  static Tensor turned(const Tensor& x) { return torch::stable::transpose(x, 1, 2); }
  static Tensor rows(const Tensor& x) { return torch::stable::flatten(x, 0, 1); }
  static Tensor room_of(const Tensor& x, int64_t width) {
    return torch::stable::new_empty(x, {x.size(0) * x.size(1), width});
  }
  const T* keep(const Tensor& x) {
    kept_.push_back(x);
    return static_cast<const T*>(kept_.back().const_data_ptr());
  }
};

// Outputs, losses, adapted parameters, and what the forward sweep leaves for the reverse.
template <class T>
Tensors saving(const Call& call, const Features& x, const std::vector<bool>& needs, bool always_steps,
               const Device& device, bool keeps_anyway = false) {
  MlpSetup<T> setup(call, /*readable=*/false);
  setup.want(needs);
  MlpArguments<T>& a = setup.arguments();
  check_layers(a.options.layers);
  const std::vector<int64_t> outputs = setup.outputs_shape(), losses = setup.losses_shape();
  const bool steps = always_steps || a.options.every_step;
  Tensors made;
  made.push_back(room(x.support, steps ? shape_of(outputs) : one_evaluation(shape_of(outputs))));
  made.push_back(room(x.support, steps ? shape_of(losses) : one_evaluation(shape_of(losses))));
  made.push_back(room(x.support, shape_of(setup.fast_shape())));
  a.outputs = data<T>(made[0]);
  a.losses = data<T>(made[1]);
  if (a.wants_fast) a.fast = data<T>(made[2]);
  const bool keeps = keeps_anyway || std::find(needs.begin(), needs.end(), true) != needs.end();
  // without a reverse it is the sweep's own workspace
  const Tensor state = room(x.support, state_size(a, keeps));
  Products<T> products;
  if (is_gram(a)) products.forward(x);
  check_launch("mlp_adapt", is_linear(a) ? Kernels<T>::linear_forward(&a, data<T>(state), device.stream())
                                         : Kernels<T>::forward(&a, is_gram(a) ? &products.gram : nullptr, keeps,
                                                               data<T>(state), device.stream()));
  made.push_back(keeps ? state : room(x.support, 0));
  return made;
}

template <class T>
Tensors backward(const Call& call, const Features& x, const Tensors& grad_outputs, const std::vector<bool>& needs,
                 const Tensor* given_state, const Device& device) {
  const bool keeps = given_state && given_state->numel() > 0;
  // without a state the forward sweep runs again
  const Tensor state = keeps ? *given_state : saving<T>(call, x, needs, true, device, true)[3];
  MlpSetup<T> setup(call, /*readable=*/false);
  MlpArguments<T>& a = setup.arguments();
  check_layers(a.options.layers);
  Tensors gradients;
  setup.give_gradients(needs, [&](const Shape& shape) {
    gradients.push_back(room(x.support, shape));
    return data<T>(gradients.back());
  });
  const Tensors cotangents = give_cotangents(setup, call, grad_outputs);
  const int64_t size = state_size(a, true);
  MTML_CHECK(state.numel() == size && state.is_contiguous() && dtype_of(state) == call.params[0].dtype,
             "mlp_adapt_backward: state must be the one of the forward sweep with ", size, " elements, got ",
             state.numel());
  const bool is_table = call.lr.size() == 1 && call.lr[0].shape.dim == 2;
  std::vector<int64_t> parameter_rows(call.params.size(), 0);
  for (size_t i = 0; !is_table && i < call.lr.size(); ++i) parameter_rows[i] = call.lr[i].shape.sizes[0];
  const cuda::MlpRateGradients<T> rates{setup.table_gradient(), is_table ? call.lr[0].shape.sizes[0] : 0,
                                        is_table ? call.lr[0].shape.sizes[1] : 0, parameter_rows.data()};
  const T* kept = static_cast<const T*>(state.const_data_ptr());
  if (!is_linear(a)) {
    const bool by_products = is_gram(a);
    Products<T> products;
    if (by_products) products.backward(x, a.options.widths[1]);
    const cuda::MlpGram<T>* gram = by_products ? &products.gram : nullptr;
    const Tensor scratch = workspace(x.support, Kernels<T>::workspace(&a, by_products));
    check_launch("mlp_adapt_backward", Kernels<T>::backward(&a, gram, kept, data<double>(scratch), device.stream()));
    if (by_products && a.params[0].gradient) products.finish(x);
    check_launch("mlp_adapt_backward", Kernels<T>::sums(&a, gram, &rates, data<double>(scratch), device.stream()));
    return gradients;
  }
  const Tensor sums = workspace(x.support, rates.table ? a.num_params * setup.tasks() * a.options.steps : 0);
  if (rates.table) setup.give_rate_sums(data<double>(sums));
  const Tensor scratch = room(x.support, Kernels<T>::linear_workspace(&a));
  check_launch("mlp_adapt_backward", Kernels<T>::linear_backward(&a, kept, data<T>(scratch), device.stream()));
  check_launch("mlp_adapt_backward", Kernels<T>::rates(&a, &rates, data<double>(sums), device.stream()));
  return gradients;
}

// The form of each layer and what lies in the device's memory, as mlp_adapt_plan of the CPU says it.
template <class T>
std::string plan(const Call& call) {
  MlpSetup<T> setup(call, /*readable=*/false);
  setup.want(call.needs);
  const MlpArguments<T>& a = setup.arguments();
  check_layers(a.options.layers);
  const bool backward = std::find(call.needs.begin(), call.needs.end(), true) != call.needs.end();
  int64_t bytes = state_size(a, backward) * static_cast<int64_t>(sizeof(T));
  if (backward && is_linear(a)) bytes += Kernels<T>::linear_workspace(&a) * static_cast<int64_t>(sizeof(T));
  if (backward && !is_linear(a)) bytes += Kernels<T>::workspace(&a, is_gram(a)) * static_cast<int64_t>(sizeof(double));
  std::ostringstream out;
  out << "{\"layers\": [";
  for (int64_t l = 0; l < a.options.layers; ++l) {
    const bool by_rows = l == 0 && (is_linear(a) || is_gram(a));
    out << (l ? ", " : "") << "{\"in\": " << a.options.widths[l] << ", \"out\": " << a.options.widths[l + 1]
        << ", \"form\": \"" << (by_rows ? "gram" : "dense") << "\"}";
  }
  out << "], \"bytes\": " << bytes << "}";
  return out.str();
}

// All tensors of a call, whose device theirs must be.
Tensors all_of(const Tensors& params, const Tensors& lr, std::initializer_list<Tensor> more,
               std::initializer_list<MaybeTensor> optional) {
  Tensors all = params;
  all.insert(all.end(), lr.begin(), lr.end());
  all.insert(all.end(), more.begin(), more.end());
  for (const MaybeTensor& x : optional)
    if (x) all.push_back(*x);
  return all;
}

#define MLP_ADAPT_TENSORS \
  all_of(params, lr, {support_x, support_y, query_x}, {query_y, support_offsets, query_offsets, class_mask})

std::tuple<Tensor, Tensor, Tensor> mlp_adapt_cuda(MLP_ADAPT_PARAMETERS) {
  const Call call(MLP_ADAPT_ARGUMENTS);
  const Tensors tensors = MLP_ADAPT_TENSORS;
  const Device device("mlp_adapt", {&tensors});
  const Tensors made = call.is_float()
                           ? saving<float>(call, {params[0], support_x, query_x}, no_needs(call), true, device)
                           : saving<double>(call, {params[0], support_x, query_x}, no_needs(call), true, device);
  return {made[0], made[1], made[2]};
}

Tensors backward_cuda(const Tensors& grad_outputs, MLP_ADAPT_PARAMETERS, const std::vector<bool>& needs) {
  const Call call(MLP_ADAPT_ARGUMENTS);
  const Tensors tensors = MLP_ADAPT_TENSORS;
  const Device device("mlp_adapt_backward", {&tensors, &grad_outputs});
  return call.is_float()
             ? backward<float>(call, {params[0], support_x, query_x}, grad_outputs, needs, nullptr, device)
             : backward<double>(call, {params[0], support_x, query_x}, grad_outputs, needs, nullptr, device);
}

Features features(const Call& call, const Tensors& tensors) {
  const size_t support = call.params.size() + call.lr.size();
  return {tensors[0], tensors[support], tensors[support + 1]};
}

Tensors saving_cuda(const Tensors& tensors, const Tensor& settings) {
  const Call call(tensors, settings);
  const Device device("mlp_adapt", {&tensors});
  return call.is_float() ? saving<float>(call, features(call, tensors), call.needs, false, device)
                         : saving<double>(call, features(call, tensors), call.needs, false, device);
}

Tensor plan_cuda(const Tensors& tensors, const Tensor& settings, bool) {
  const Call call(tensors, settings);
  const Device device("mlp_adapt", {&tensors});
  return bytes_of(call.is_float() ? plan<float>(call) : plan<double>(call));
}

Tensors backward_from_state_cuda(const Tensors& grad_outputs, const Tensors& tensors, const Tensor& settings,
                                 const Tensor& state) {
  const Call call(tensors, settings);
  // cotangents that stand for zeros may lie anywhere
  Tensors given;
  for (const Tensor& x : grad_outputs)
    if (x.numel() > 0) given.push_back(x);
  const Device device("mlp_adapt_backward", {&tensors, &given});
  return call.is_float() ? backward<float>(call, features(call, tensors), grad_outputs, call.needs, &state, device)
                         : backward<double>(call, features(call, tensors), grad_outputs, call.needs, &state, device);
}

}  // namespace
}  // namespace mtml

STABLE_TORCH_LIBRARY_IMPL(mtml_fast, CUDA, m) {
  m.impl("mlp_adapt", TORCH_BOX(&mtml::mlp_adapt_cuda));
  m.impl("mlp_adapt_backward", TORCH_BOX(&mtml::backward_cuda));
  m.impl("_mlp_adapt_saving", TORCH_BOX(&mtml::saving_cuda));
  m.impl("_mlp_adapt_backward", TORCH_BOX(&mtml::backward_from_state_cuda));
  m.impl("_mlp_adapt_plan", TORCH_BOX(&mtml::plan_cuda));
}
