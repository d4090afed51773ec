// What sgd_step asks of its arguments: one set of rules for both doors, torch (cpu/) and NumPy (numpy/).
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "check.h"

namespace mtml {

// Where the rate of element i of task t lies: at t * task + i * element.
struct RateStrides {
  int64_t task;
  int64_t element;
};

// The form of one rate for a leaf [T, ...]: 0-dim, [T], [1, *shape] or [T, *shape].
inline RateStrides rate_strides(const Shape& lr, const Shape& leaf, size_t index) {
  if (lr.dim == 0) return {0, 0};
  const int64_t num_tasks = leaf.sizes[0];
  if (lr.dim == 1 && lr.sizes[0] == num_tasks) return {1, 0};
  const bool same_axes = lr.dim == leaf.dim && std::equal(lr.sizes + 1, lr.sizes + lr.dim, leaf.sizes + 1);
  MTML_CHECK(same_axes && (lr.sizes[0] == 1 || lr.sizes[0] == num_tasks), "sgd_step: lr[", index,
             "] must be 0-dim, [T], [1, *shape] or [T, *shape] for params of shape [T, *shape] = ", leaf, ", got ", lr);
  int64_t size = 1;
  for (int64_t axis = 1; axis < leaf.dim; ++axis) size *= leaf.sizes[axis];
  return {lr.sizes[0] == 1 ? 0 : size, 1};
}

// Refuses what does not fit together; returns the form of each leaf's rate.
inline std::vector<RateStrides> check_sgd_step(const std::vector<Shape>& params, const std::vector<Shape>& grads,
                                               const std::vector<Shape>& lr, const std::vector<Shape>& momentum_buffers,
                                               double momentum, double weight_decay, double clip) {
  MTML_CHECK(momentum >= 0 && momentum < 1, "sgd_step: momentum must be in [0, 1), got ", momentum);
  MTML_CHECK(weight_decay >= 0, "sgd_step: weight_decay must be >= 0, got ", weight_decay);
  MTML_CHECK(clip > 0, "sgd_step: clip must be > 0, got ", clip);
  MTML_CHECK(!params.empty(), "sgd_step: params must hold at least one leaf, got none");
  const size_t leaves = params.size();
  MTML_CHECK(grads.size() == leaves, "sgd_step: grads must hold one leaf per leaf of params (", leaves, "), got ",
             grads.size());
  MTML_CHECK(lr.size() == 1 || lr.size() == leaves, "sgd_step: lr must hold 1 or ", leaves, " rates, got ", lr.size());
  const size_t buffers = momentum == 0 ? 0 : leaves;
  MTML_CHECK(momentum_buffers.size() == buffers, "sgd_step: momentum_buffers must hold ", buffers,
             " leaves with momentum ", momentum, ", got ", momentum_buffers.size());

  std::vector<RateStrides> rates;
  for (size_t i = 0; i < leaves; ++i) {
    const Shape& leaf = params[i];
    MTML_CHECK(leaf.dim >= 1, "sgd_step: params[", i, "] must be [T, ...], got a 0-dim leaf");
    MTML_CHECK(leaf.sizes[0] == params[0].sizes[0], "sgd_step: params[", i, "] must have the ", params[0].sizes[0],
               " tasks of params[0], got shape ", leaf);
    MTML_CHECK(grads[i] == leaf, "sgd_step: grads[", i, "] must have the shape of params[", i, "] ", leaf, ", got ",
               grads[i]);
    MTML_CHECK(buffers == 0 || momentum_buffers[i] == leaf, "sgd_step: momentum_buffers[", i,
               "] must have the shape of params[", i, "] ", leaf, ", got ", momentum_buffers[i]);
    const size_t rate = lr.size() == 1 ? 0 : i;
    rates.push_back(rate_strides(lr[rate], leaf, rate));
    MTML_CHECK(lr.size() == leaves || rates[i].element == 0, "sgd_step: lr must be 0-dim or [T] where ", leaves,
               " leaves share it, got shape ", lr[0]);
  }
  return rates;
}

}  // namespace mtml
