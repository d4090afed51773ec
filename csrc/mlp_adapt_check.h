// What mlp_adapt asks of its arguments, and how they become what the core takes: one set of rules for both doors, torch
// (cpu/) and NumPy (numpy/). Whatever is let through here reads and writes inside its memory.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "check.h"
#include "core/mlp_adapt_args.h"

namespace mtml {

// The arguments of one call, as the operator's schema has them.
struct MlpInputs {
  std::vector<Array> params, lr;
  Array support_x, support_y, query_x;
  std::optional<Array> query_y, support_offsets, query_offsets, class_mask;
  std::vector<bool> adapted;
  int64_t steps;
  std::string loss, activation;
  bool bias, norm;
  double norm_eps, momentum, weight_decay;
  std::optional<double> clip;
  bool first_order, every_step, return_parameters;
};

// A call that is checked, as the core takes it. The caller's arrays must outlive it.
template <class T>
class MlpSetup {
 public:
  // `readable`: whether arrays' values may be read here; on a GPU nobody looks at them
  explicit MlpSetup(const MlpInputs& call, bool readable = true) : call_(call), readable_(readable) {
    read_options();
    read_params();
    read_rows("support", call.support_x, &call.support_y, call.support_offsets, support_offsets_, arguments_.support);
    read_rows("query", call.query_x, call.query_y ? &*call.query_y : nullptr, call.query_offsets, query_offsets_,
              arguments_.query);
    read_rates();
    arguments_.params = params_.data();
    arguments_.num_params = static_cast<int64_t>(params_.size());
    arguments_.options.widths = widths_.data();
    arguments_.wants_fast = call.return_parameters;
  }
  MlpSetup(const MlpSetup&) = delete;
  MlpSetup& operator=(const MlpSetup&) = delete;

  // for the door to fill in results and cotangents
  MlpArguments<T>& arguments() { return arguments_; }

  int64_t tasks() const { return arguments_.options.tasks; }
  int64_t evaluations() const { return call_.every_step ? call_.steps + 1 : 1; }
  bool labelled() const { return call_.query_y.has_value(); }

  // [S, T, Q, C] or [S, R, C]
  std::vector<int64_t> outputs_shape() const {
    const Shape& rows = call_.query_x.shape;
    std::vector<int64_t> shape = {evaluations()};
    shape.insert(shape.end(), rows.sizes, rows.sizes + rows.dim - 1);
    shape.push_back(widths_.back());
    return shape;
  }
  std::vector<int64_t> losses_shape() const { return {evaluations(), tasks()}; }
  // [T, P]; none where they were not asked for
  std::vector<int64_t> fast_shape() const {
    if (!call_.return_parameters) return {0};
    int64_t size = 0;
    for (const int64_t n : sizes_) size += n;
    return {tasks(), size};
  }

  // Which tensors of params, lr, support_x and query_x a derivative will be asked for: one flag each, in this order.
  void want(const std::vector<bool>& needs) {
    const size_t num_params = params_.size(), inputs = num_params + call_.lr.size() + 2;
    MTML_CHECK(needs.size() == inputs, "mlp_adapt: needs must hold one bool per input tensor (", inputs, "), got ",
               needs.size());
    bool rates = false;
    for (size_t i = 0; i < call_.lr.size(); ++i) rates = rates || needs[num_params + i];
    arguments_.wants_rates = rates && call_.steps > 0;
    arguments_.wants_support_x = needs[inputs - 2];
    arguments_.wants_query_x = needs[inputs - 1];
  }

  // Room for the gradients: allocate(shape) gives it, once for each input that is needed, in order.
  template <class Allocate>
  void give_gradients(const std::vector<bool>& needs, const Allocate& allocate) {
    want(needs);
    size_t input = 0;
    auto next = [&](const Array& like) -> T* {
      if (!needs[input++]) return nullptr;
      T* gradient = allocate(like.shape);
      gradients_.push_back({gradient, like.size()});
      return gradient;
    };
    const int64_t steps = call_.steps, per_parameter = tasks() * steps;
    for (size_t i = 0; i < params_.size(); ++i) params_[i].gradient = next(call_.params[i]);
    for (size_t i = 0; i < call_.lr.size(); ++i) {
      T* gradient = next(call_.lr[i]);
      if (!gradient) continue;
      if (!readable_) {
        (is_table_ ? table_gradient_ : params_[i].rate_gradient) = gradient;
        continue;
      }
      // the rows of steps that are not taken, and the rates of parameters that stay, have a gradient of zero
      std::fill_n(gradient, call_.lr[i].size(), T(0));
      if (is_table_) {
        table_gradient_ = gradient;
        rate_sums_.assign(params_.size() * per_parameter, 0.0);
      } else if (params_[i].moves && steps > 0) {
        params_[i].rate_gradient = gradient;
      }
    }
    for (size_t i = 0; readable_ && table_gradient_ && steps > 0 && i < params_.size(); ++i) {
      if (params_[i].moves) params_[i].rate_sums = rate_sums_.data() + i * per_parameter;
    }
    arguments_.support.x_gradient = next(call_.support_x);
    arguments_.query.x_gradient = next(call_.query_x);
  }

  // Where a table of rates has its gradient, or null.
  T* table_gradient() const { return table_gradient_; }
  // Room [params, T, K] for what tasks add to the rates of a table.
  void give_rate_sums(double* room) {
    for (size_t i = 0; i < params_.size(); ++i) {
      if (params_[i].moves) params_[i].rate_sums = room + i * tasks() * call_.steps;
    }
  }

  // After the backward sweep: the gradient of a table of rates, summed over the tasks in their order.
  void finish_gradients() {
    if (!table_gradient_) return;
    const Array& table = call_.lr[0];
    const int64_t rows = table.shape.sizes[0], columns = table.shape.sizes[1], steps = call_.steps;
    std::vector<double> total(table.size());
    for (size_t i = 0; i < params_.size(); ++i) {
      const double* sums = params_[i].rate_sums;
      if (!sums) continue;
      double* column = total.data() + (columns == 1 ? 0 : i);
      for (int64_t t = 0; t < tasks(); ++t) {
        for (int64_t k = 0; k < steps; ++k) column[rows == 1 ? 0 : k * columns] += sums[t * steps + k];
      }
    }
    std::transform(total.begin(), total.end(), table_gradient_, [](double sum) { return static_cast<T>(sum); });
  }

  // Without tasks there is nothing to do, and every gradient is zero.
  void zero_gradients() {
    for (const auto& [gradient, size] : gradients_) std::fill_n(gradient, size, T(0));
  }

 private:
  struct Gradient {
    T* data;
    int64_t size;
  };

  const MlpInputs& call_;
  const bool readable_;
  MlpArguments<T> arguments_{};
  std::vector<MlpParameter<T>> params_;
  std::vector<int64_t> sizes_;   // elements of each parameter, without a task axis
  std::vector<int64_t> widths_;  // [L + 1]
  std::vector<int64_t> support_offsets_, query_offsets_;
  bool is_table_ = false;
  std::vector<Gradient> gradients_;
  T* table_gradient_ = nullptr;
  std::vector<double> rate_sums_;  // [params, T, K]

  static constexpr Dtype kDtype = sizeof(T) == sizeof(float) ? Dtype::kFloat32 : Dtype::kFloat64;

  static const T* values(const Array& array) { return static_cast<const T*>(array.data); }

  template <class... Name>
  static void check_dtype(const Array& array, const Name&... name) {
    MTML_CHECK(array.dtype == kDtype, "mlp_adapt: ", name..., " must have the dtype of params[0], ",
               kDtype == Dtype::kFloat32 ? "float32" : "float64");
  }

  void read_options() {
    MlpOptions& options = arguments_.options;
    const double infinity = std::numeric_limits<double>::infinity();
    // with a bound, so that no count of elements of a task overflows
    constexpr int64_t kMaxSteps = int64_t{1} << 31;
    MTML_CHECK(call_.steps >= 0 && call_.steps < kMaxSteps, "mlp_adapt: steps must be at least 0 and below ", kMaxSteps,
               ", got ", call_.steps);
    MTML_CHECK(call_.norm_eps > 0 && call_.norm_eps < infinity, "mlp_adapt: norm_eps must be finite, above 0, got ",
               call_.norm_eps);
    MTML_CHECK(call_.momentum >= 0 && call_.momentum < 1, "mlp_adapt: momentum must be in [0, 1), got ",
               call_.momentum);
    MTML_CHECK(call_.weight_decay >= 0 && call_.weight_decay < infinity,
               "mlp_adapt: weight_decay must be finite, at least 0, got ", call_.weight_decay);
    options.clip = call_.clip.value_or(infinity);
    MTML_CHECK(options.clip > 0, "mlp_adapt: clip must be above 0, got ", options.clip);
    options.steps = call_.steps;
    options.bias = call_.bias;
    options.norm = call_.norm;
    options.first_order = call_.first_order;
    options.every_step = call_.every_step;
    options.loss = choose("loss", call_.loss, {"cross_entropy", "mse", "bce"}, Loss::kCrossEntropy);
    options.activation =
        choose("activation", call_.activation,
               {"relu", "tanh", "gelu", "gelu_tanh", "silu", "elu", "leaky_relu", "sigmoid", "softplus", "identity"},
               Activation::kRelu);
    options.norm_eps = call_.norm_eps;
    options.momentum = call_.momentum;
    options.weight_decay = call_.weight_decay;
  }

  // The names are in the order of the enumeration, which starts with `first`.
  template <class Enumeration>
  static Enumeration choose(const char* argument, const std::string& value, std::initializer_list<const char*> names,
                            Enumeration first) {
    int32_t i = static_cast<int32_t>(first);
    for (const char* name : names) {
      if (value == name) return static_cast<Enumeration>(i);
      ++i;
    }
    std::string all;
    for (const char* name : names) all += (all.empty() ? "'" : ", '") + std::string(name) + "'";
    MTML_CHECK(false, "mlp_adapt: ", argument, " must be one of ", all, ", got '", value, "'");
    return first;
  }

  void read_params() {
    const size_t per_layer = 1 + call_.bias + 2 * call_.norm, count = call_.params.size();
    // the last layer has no norm
    const size_t layers = (count + 2 * call_.norm) / per_layer;
    MTML_CHECK(layers >= 1 && layers * per_layer == count + 2 * call_.norm, "mlp_adapt: params must hold weight",
               call_.bias ? ", bias" : "", call_.norm ? ", gain, shift" : "",
               " for every layer (the last without norm), got ", count, " tensors");
    MTML_CHECK(call_.adapted.size() == count, "mlp_adapt: adapted must hold one bool for each of the ", count,
               " params, got ", call_.adapted.size());
    const bool packed = call_.support_offsets.has_value();
    const Shape& rows = packed ? call_.support_offsets->shape : call_.support_x.shape;
    MTML_CHECK(rows.dim == (packed ? 1 : 3) && (!packed || rows.sizes[0] >= 1),
               "mlp_adapt: ", packed ? "support_offsets must be [T + 1]" : "support_x must be [T, N, D]",
               ", got shape ", rows);
    const int64_t tasks = packed ? rows.sizes[0] - 1 : rows.sizes[0];
    arguments_.options.tasks = tasks;
    arguments_.options.layers = static_cast<int64_t>(layers);

    params_.resize(count);
    sizes_.resize(count);
    widths_.reserve(layers + 1);
    for (size_t i = 0; i < count; ++i) {
      const Array& array = call_.params[i];
      const Shape& shape = array.shape;
      check_dtype(array, "params[", i, "]");
      const int64_t rank = own_rank(i);
      MTML_CHECK(shape.dim == rank || shape.dim == rank + 1, "mlp_adapt: params[", i, "] must be ",
                 rank == 2 ? "[O, I] or [T, O, I]" : "[O] or [T, O]", ", got shape ", shape);
      const bool own_start = shape.dim == rank + 1;
      MTML_CHECK(!own_start || shape.sizes[0] == tasks, "mlp_adapt: params[", i, "] must have a task axis of T=", tasks,
                 ", got shape ", shape);
      const int64_t* own = shape.sizes + own_start;
      if (rank == 2) {
        if (i == 0) widths_.push_back(own[1]);
        MTML_CHECK(own[1] == widths_.back(), "mlp_adapt: params[", i, "] must have shape [", own[0], ", ",
                   widths_.back(), "] per task, got ", shape);
        widths_.push_back(own[0]);
      } else {
        MTML_CHECK(own[0] == widths_.back(), "mlp_adapt: params[", i, "] must have shape [", widths_.back(),
                   "] per task, got ", shape);
      }
      sizes_[i] = rank == 2 ? own[0] * own[1] : own[0];
      params_[i] = {values(array), own_start ? sizes_[i] : 0, call_.adapted[i], nullptr, 0, 0, nullptr, nullptr,
                    nullptr};
    }
    if (call_.class_mask) {
      const Array& mask = *call_.class_mask;
      MTML_CHECK(mask.dtype == Dtype::kBool, "mlp_adapt: class_mask must be bool");
      const bool fits = mask.shape.dim == 2 && mask.shape.sizes[0] == tasks && mask.shape.sizes[1] == widths_.back();
      MTML_CHECK(fits, "mlp_adapt: class_mask must be [T=", tasks, ", C=", widths_.back(), "], got shape ", mask.shape);
      arguments_.class_mask = static_cast<const bool*>(mask.data);
    }
  }

  void read_rows(const char* name, const Array& x, const Array* y, const std::optional<Array>& given,
                 std::vector<int64_t>& own_offsets, MlpRows<T>& rows) {
    const int64_t tasks = arguments_.options.tasks, dim = given ? 2 : 3;
    check_dtype(x, name, "_x");
    MTML_CHECK(x.shape.dim == dim, "mlp_adapt: ", name, "_x must be ",
               given ? "[R, D]" : (name[0] == 's' ? "[T, N, D]" : "[T, Q, D]"), ", got shape ", x.shape);
    MTML_CHECK(x.back() == widths_[0], "mlp_adapt: ", name, "_x must have D=", widths_[0],
               " features, as params[0] has, got shape ", x.shape);
    if (given) {
      const Array& offsets = *given;
      MTML_CHECK(offsets.dtype == Dtype::kInt64, "mlp_adapt: ", name, "_offsets must be int64");
      MTML_CHECK(offsets.shape.dim == 1 && offsets.shape.sizes[0] >= 1, "mlp_adapt: ", name,
                 "_offsets must be [T + 1], got shape ", offsets.shape);
      MTML_CHECK(offsets.shape.sizes[0] - 1 == tasks, "mlp_adapt: ", name, "_x must hold the ", tasks,
                 " tasks of support_x, got ", offsets.shape.sizes[0] - 1);
      const int64_t* at = static_cast<const int64_t*>(offsets.data);
      rows.offsets = at;
      rows.all_rows = x.shape.sizes[0];
      if (readable_) check_offsets(name, at, rows);
    } else {
      MTML_CHECK(x.shape.sizes[0] == tasks, "mlp_adapt: ", name, "_x must hold the ", tasks,
                 " tasks of support_x, got ", x.shape.sizes[0]);
      rows.max_rows = x.shape.sizes[1];
      rows.all_rows = tasks * rows.max_rows;
      MTML_CHECK(tasks == 0 || rows.max_rows > 0, "mlp_adapt: ", name,
                 "_x must hold at least one row in every task, got shape ", x.shape);
      if (readable_) {
        own_offsets.resize(tasks + 1);
        for (int64_t t = 0; t <= tasks; ++t) own_offsets[t] = t * rows.max_rows;
        rows.offsets = own_offsets.data();
      }
    }
    rows.x = values(x);
    if (y) read_labels(name, x, *y, rows);
  }

  void check_offsets(const char* name, const int64_t* at, MlpRows<T>& rows) const {
    const int64_t tasks = arguments_.options.tasks;
    MTML_CHECK(at[0] == 0 && at[tasks] == rows.all_rows, "mlp_adapt: ", name,
               "_offsets must run from 0 to the number of rows ", rows.all_rows, ", got ", at[0], " to ", at[tasks]);
    for (int64_t t = 0; t < tasks; ++t) {
      MTML_CHECK(at[t] < at[t + 1], "mlp_adapt: ", name, "_offsets must increase (no task may be empty), got ", at[t],
                 " then ", at[t + 1], " at task ", t);
      rows.max_rows = std::max(rows.max_rows, at[t + 1] - at[t]);
    }
  }

  void read_labels(const char* name, const Array& x, const Array& y, MlpRows<T>& rows) {
    const int64_t classes = widths_.back(), leading = x.shape.dim - 1;
    const bool is_class = arguments_.options.loss == Loss::kCrossEntropy;
    const bool fits = y.shape.dim == leading + !is_class &&
                      std::equal(y.shape.sizes, y.shape.sizes + leading, x.shape.sizes) &&
                      (is_class || y.back() == classes);
    MTML_CHECK(fits, "mlp_adapt: ", name, "_y must be [", leading == 1 ? "R=" : "T=", x.shape.sizes[0],
               leading == 1 ? "" : message(name[0] == 's' ? ", N=" : ", Q=", x.shape.sizes[1]),
               is_class ? "" : message(", C=", classes), "], got shape ", y.shape);
    if (!is_class) {
      check_dtype(y, name, "_y");
      rows.targets = values(y);
      return;
    }
    MTML_CHECK(y.dtype == Dtype::kInt64, "mlp_adapt: ", name, "_y must be int64 class labels");
    rows.labels = static_cast<const int64_t*>(y.data);
    for (int64_t t = 0; readable_ && t < arguments_.options.tasks; ++t) {
      const bool* mask = arguments_.class_mask ? arguments_.class_mask + t * classes : nullptr;
      for (int64_t r = rows.offsets[t]; r < rows.offsets[t + 1]; ++r) {
        const int64_t label = rows.labels[r];
        MTML_CHECK(label >= 0 && label < classes, "mlp_adapt: ", name, "_y must be in 0..", classes - 1, ", got ",
                   label);
        MTML_CHECK(!mask || mask[label], "mlp_adapt: ", name, "_y must be a class of its task in class_mask, got ",
                   label, " in task ", t);
      }
    }
  }

  void read_rates() {
    const size_t count = params_.size();
    const int64_t steps = call_.steps, num_params = static_cast<int64_t>(count);
    is_table_ = call_.lr.size() == 1 && call_.lr[0].shape.dim == 2;
    MTML_CHECK(is_table_ || call_.lr.size() == count, "mlp_adapt: lr must hold one table or ", count, " tensors, got ",
               call_.lr.size());
    for (size_t i = 0; i < call_.lr.size(); ++i) {
      const Array& rate = call_.lr[i];
      check_dtype(rate, "lr[", i, "]");
      const T* values_of = values(rate);
      for (int64_t j = 0, n = rate.size(); readable_ && j < n; ++j) {
        MTML_CHECK(std::isfinite(values_of[j]), "mlp_adapt: lr must be finite, got ", values_of[j]);
      }
      const int64_t rank = own_rank(i);
      const int64_t* own = call_.params[i].shape.sizes + (call_.params[i].shape.dim - rank);
      const int64_t rows = rate.shape.dim > 0 ? rate.shape.sizes[0] : 0;
      const bool enough = rate.shape.dim > 0 && (rows == 1 || rows >= steps);
      if (is_table_) {
        const int64_t columns = rate.shape.sizes[1];
        MTML_CHECK(enough && (columns == 1 || columns == num_params), "mlp_adapt: lr must be [1 or K=", steps,
                   ", 1 or ", num_params, "], got shape ", rate.shape);
      } else {
        const bool fits = rate.shape.dim == rank + 1 && std::equal(own, own + rank, rate.shape.sizes + 1);
        MTML_CHECK(enough && fits, "mlp_adapt: lr[", i, "] must be [1 or K=", steps, ", *", Shape{own, rank},
                   "], got shape ", rate.shape);
      }
    }
    for (size_t i = 0; i < count; ++i) {
      const Array& rate = call_.lr[is_table_ ? 0 : i];
      const bool per_step = rate.shape.sizes[0] > 1;
      if (is_table_) {
        const int64_t columns = rate.shape.sizes[1];
        params_[i].rate = values(rate) + (columns == 1 ? 0 : i);
        params_[i].rate_step = per_step ? columns : 0;
      } else {
        params_[i].rate = values(rate);
        params_[i].rate_step = per_step ? sizes_[i] : 0;
        params_[i].rate_element = 1;
      }
    }
  }

  // axes of parameter i without a task axis: the first of a layer is its weight
  int64_t own_rank(size_t i) const { return i % (1 + call_.bias + 2 * call_.norm) == 0 ? 2 : 1; }
};

}  // namespace mtml
