// What a call of mlp_adapt brings, from torch's tensors to arrays: the same on every device.
// The operators without autograd take a list of tensors and one tensor of numbers: each argument of an operator costs
// 0.1 us and more, which small networks notice.
#pragma once

#include <optional>
#include <string>
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

inline Shape shape_of(const std::vector<int64_t>& sizes) { return {sizes.data(), static_cast<int64_t>(sizes.size())}; }

// without the axis of steps, of size 1
inline Shape one_evaluation(const Shape& shape) { return {shape.sizes + 1, shape.dim - 1}; }

// The cotangents of outputs, losses and fast, handed to the core; the result owns them.
template <class T>
Tensors give_cotangents(MlpSetup<T>& setup, const Call& call, const Tensors& grad_outputs) {
  MlpArguments<T>& a = setup.arguments();
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
  return copies;
}

inline std::vector<bool> no_needs(const Call& call) {
  return std::vector<bool>(call.params.size() + call.lr.size() + 2);
}

}  // namespace
}  // namespace mtml
