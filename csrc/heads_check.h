// What heads and heads_loss ask of their arguments, and how they become what the core takes: one set of rules for both
// doors, torch (cpu/) and NumPy (numpy/). Whatever is let through here reads and writes inside its memory.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "check.h"
#include "heads.h"
#include "mlp_adapt_check.h"

namespace mtml {

// The arguments of one call, as the operator's schema has them.
struct HeadsInputs {
  Array x, offsets, weight;
  std::optional<Array> bias, out_offsets, hidden_weight, hidden_bias;
  std::string activation;
};

struct HeadsLossInputs {
  std::optional<Array> labels, targets, class_weights, mask;
  std::vector<int64_t> losses;
  double label_smoothing;
  int64_t ignore_index;
  double delta;
};

inline Activation head_activation(const std::string& name) {
  constexpr const char* kNames[] = {"relu", "tanh",       "gelu",    "gelu_tanh", "silu",
                                    "elu",  "leaky_relu", "sigmoid", "softplus",  "identity"};
  constexpr Activation kActivations[] = {
      Activation::kRelu, Activation::kTanh,      Activation::kGelu,    Activation::kGeluTanh, Activation::kSilu,
      Activation::kElu,  Activation::kLeakyRelu, Activation::kSigmoid, Activation::kSoftplus, Activation::kIdentity};
  for (size_t i = 0; i < std::size(kNames); ++i) {
    if (name == kNames[i]) return kActivations[i];
  }
  MTML_CHECK(false, "activation must be one of the activations of heads, got '", name, "'");
  return Activation::kIdentity;
}

// Calls that are checked, as the core takes them. The caller's arrays must outlive it.
template <class T>
class HeadsSetup {
 public:
  explicit HeadsSetup(const HeadsInputs& call) : call_(call) {
    MTML_CHECK(call.x.shape.dim == 2, "x must be [R, D], got shape ", call.x.shape);
    batch_.features = call.x.shape.sizes[1];
    batch_.offsets = offsets("offsets", call.offsets, call.x.shape.sizes[0]);
    batch_.tasks = call.offsets.shape.sizes[0] - 1;
    batch_.activation = head_activation(call.activation);
    const int64_t tasks = batch_.tasks;
    int64_t inner = batch_.features;
    if (call.hidden_weight) {
      const Shape& shape = call.hidden_weight->shape;
      MTML_CHECK(shape.dim == 3 && shape.sizes[0] == tasks && shape.sizes[2] == inner,
                 "hidden_weight must be [T=", tasks, ", H, D=", inner, "], got shape ", shape);
      inner = shape.sizes[1];
      MTML_CHECK(inner > 0, "hidden_weight must have a hidden layer of at least one unit, got shape ", shape);
      batch_.hidden = inner;
    }
    if (call.hidden_bias) {
      MTML_CHECK(call.hidden_weight, "hidden_bias must be None without hidden_weight, got shape ",
                 call.hidden_bias->shape);
      shape("hidden_bias", *call.hidden_bias, {tasks, inner});
    }
    const Shape& weight = call.weight.shape;
    MTML_CHECK(weight.dim == 2 && weight.sizes[1] == inner, "weight must be [sum of C_t, ",
               call.hidden_weight ? "H=" : "D=", inner, "], got shape ", weight);
    const int64_t outputs = weight.sizes[0];
    if (call.out_offsets) {
      batch_.out_offsets = offsets("out_offsets", *call.out_offsets, outputs);
      shape("out_offsets", *call.out_offsets, {tasks + 1});
    } else {
      MTML_CHECK(tasks == 0 || outputs % tasks == 0, "weight must have equally many rows for each of the ", tasks,
                 " tasks (or out_offsets must be given), got ", outputs);
      for (int64_t t = 0; t <= tasks; ++t) out_offsets_.push_back(tasks ? outputs / tasks * t : 0);
      batch_.out_offsets = out_offsets_.data();
    }
    if (call.bias) shape("bias", *call.bias, {outputs});
    z_offsets_.push_back(0);
    for (int64_t t = 0; t < tasks; ++t) {
      z_offsets_.push_back(z_offsets_[t] + (batch_.offsets[t + 1] - batch_.offsets[t]) *
                                               (batch_.out_offsets[t + 1] - batch_.out_offsets[t]));
    }
    batch_.z_offsets = z_offsets_.data();
    batch_.in = {data("x", call.x), data("weight", call.weight), data("bias", call.bias),
                 data("hidden_weight", call.hidden_weight), data("hidden_bias", call.hidden_bias)};
  }
  HeadsSetup(const HeadsSetup&) = delete;
  HeadsSetup& operator=(const HeadsSetup&) = delete;

  const HeadsBatch<T>& batch() const { return batch_; }
  // all outputs
  int64_t num_outputs() const { return z_offsets_.back(); }

  HeadsTargets<T> targets(const HeadsLossInputs& with) const {
    const int64_t rows = batch_.rows(), tasks = batch_.tasks;
    const int64_t given = static_cast<int64_t>(with.losses.size());
    MTML_CHECK(given == 1 || given == tasks, "loss must be one name, or one a task (", tasks, "), got ", given);
    bool classes = false, values = false;
    for (const int64_t loss : with.losses) {
      MTML_CHECK(loss >= 0 && loss <= static_cast<int64_t>(HeadLoss::kHuber), "loss must be one of 4, got ", loss);
      (loss == static_cast<int64_t>(HeadLoss::kCrossEntropy) ? classes : values) = true;
    }
    MTML_CHECK(with.label_smoothing >= 0 && with.label_smoothing <= 1, "label_smoothing must be in 0..1, got ",
               with.label_smoothing);
    MTML_CHECK(with.delta > 0, "delta must be above 0, got ", with.delta);
    MTML_CHECK(!classes || with.labels, "y must hold int64 labels for cross_entropy");
    MTML_CHECK(!values || with.targets, "y must hold targets for losses other than cross_entropy");
    HeadsTargets<T> result{};
    result.losses = with.losses.data();
    result.one_loss = given == 1;
    if (classes) {
      shape("y", *with.labels, {rows});
      MTML_CHECK(with.labels->dtype == Dtype::kInt64, "y must be int64 class labels");
      result.labels = static_cast<const int64_t*>(with.labels->data);
    }
    if (values) {
      MTML_CHECK(with.targets->shape.dim == 1 && with.targets->size() == num_outputs(), "y must be [", num_outputs(),
                 "], packed as the outputs of heads, got shape ", with.targets->shape);
      result.targets = data("y", with.targets);
    }
    if (with.class_weights) {
      shape("class_weights", *with.class_weights, {batch_.outputs()});
      result.class_weights = data("class_weights", with.class_weights);
    }
    if (with.mask) {
      const Array& mask = *with.mask;
      const bool of_rows = mask.size() == rows;
      MTML_CHECK(mask.dtype == Dtype::kBool && mask.shape.dim == 1 && (of_rows || mask.size() == num_outputs()),
                 "mask must be bool [R=", rows, "], or packed as the outputs of heads [", num_outputs(),
                 "], got shape ", mask.shape);
      MTML_CHECK(of_rows || !classes, "mask must be [R=", rows, "] where a task has cross_entropy, got shape ",
                 mask.shape);
      (of_rows ? result.row_mask : result.output_mask) = static_cast<const bool*>(mask.data);
    }
    result.label_smoothing = with.label_smoothing;
    result.ignore_index = with.ignore_index;
    result.delta = with.delta;
    return result;
  }

 private:
  const HeadsInputs& call_;
  HeadsBatch<T> batch_{};
  std::vector<int64_t> out_offsets_, z_offsets_;

  static void shape(const char* name, const Array& x, const std::vector<int64_t>& sizes) {
    const Shape expected{sizes.data(), static_cast<int64_t>(sizes.size())};
    MTML_CHECK(x.shape == expected, name, " must be ", expected, ", got shape ", x.shape);
  }

  const T* data(const char* name, const Array& x) const {
    MTML_CHECK(x.dtype == call_.x.dtype, name, " must have the dtype of x");
    return static_cast<const T*>(x.data);
  }
  const T* data(const char* name, const std::optional<Array>& x) const { return x ? data(name, *x) : nullptr; }

  // from 0 to `rows`, not decreasing
  static const int64_t* offsets(const char* name, const Array& x, int64_t rows) {
    MTML_CHECK(x.dtype == Dtype::kInt64, name, " must be int64");
    MTML_CHECK(x.shape.dim == 1 && x.size() > 0, name, " must be [T + 1], got shape ", x.shape);
    const int64_t* values = static_cast<const int64_t*>(x.data);
    const int64_t last = x.size() - 1;
    MTML_CHECK(values[0] == 0 && values[last] == rows, name, " must run from 0 to the number of rows ", rows, ", got ",
               values[0], " to ", values[last]);
    for (int64_t t = 0; t < last; ++t) {
      MTML_CHECK(values[t] <= values[t + 1], name, " must not decrease, got ", values[t], " then ", values[t + 1],
                 " at task ", t);
    }
    return values;
  }
};

}  // namespace mtml
