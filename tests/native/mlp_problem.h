// A random call of mlp_adapt, with every option, for the programs that check its sweeps.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "core/mlp_adapt_args.h"

namespace mtml {
namespace {

// Everything that a call needs, in arrays of exactly the right size, so that a sanitizer sees every step outside.
template <class T>
struct Problem {
  std::vector<int64_t> widths;
  std::vector<std::vector<T>> params, rates, gradients, rate_gradients;
  std::vector<std::vector<double>> rate_sums;
  std::vector<int64_t> support_offsets{0}, query_offsets{0}, support_labels, query_labels;
  std::vector<T> support_x, query_x, support_targets, query_targets;
  std::vector<char> mask;
  std::vector<T> outputs, losses, fast, d_outputs, d_losses, d_fast, support_gradient, query_gradient;
  std::vector<MlpParameter<T>> parameters;
  MlpArguments<T> a{};

  // networks as wide as `widest` now and then; or a small one with all options at once
  template <class Random>
  Problem(Random& r, int64_t widest, bool everything = false) {
    const auto option = [&](double p) { return r.chance(p) || everything; };
    MlpOptions& o = a.options;
    o.tasks = r.integer(everything ? 2 : 1, everything ? 3 : 7);
    o.layers = r.integer(everything ? 3 : 1, everything ? 3 : 4);
    o.steps = r.integer(everything ? 2 : 0, everything ? 2 : 4);
    o.bias = option(0.8);
    o.norm = option(0.3);
    o.first_order = r.chance(0.2) && !everything;
    o.every_step = option(0.3);
    o.loss = static_cast<Loss>(r.integer(0, 2));
    o.activation = static_cast<Activation>(r.integer(0, 9));
    o.norm_eps = 1e-3;
    o.momentum = option(0.2) ? 0.9 : 0;
    o.weight_decay = option(0.2) ? 0.01 : 0;
    o.clip = option(0.2) ? everything ? 0.1 : 0.5 : std::numeric_limits<double>::infinity();
    const int64_t usual = everything ? 9 : 18;
    for (int64_t l = 0; l <= o.layers; ++l)
      widths.push_back(r.integer(everything ? 3 : 1, r.chance(0.2) && !everything ? widest : usual));
    o.widths = widths.data();
    const int64_t classes = widths.back(), steps = std::max<int64_t>(1, o.steps);
    const int64_t evaluations = o.every_step ? o.steps + 1 : 1;

    auto rows = [&](std::vector<int64_t>& offsets, std::vector<T>& x, std::vector<int64_t>& labels,
                    std::vector<T>& targets) {
      for (int64_t t = 0; t < o.tasks; ++t)
        offsets.push_back(offsets.back() + r.integer(everything ? 6 : 1, everything ? 8 : 12));
      for (int64_t i = 0; i < offsets.back() * widths[0]; ++i) x.push_back(static_cast<T>(r.normal()));
      for (int64_t i = 0; i < offsets.back(); ++i) labels.push_back(r.integer(0, classes - 1));
      for (int64_t i = 0; i < offsets.back() * classes; ++i) targets.push_back(static_cast<T>(r.chance(0.5)));
    };
    rows(support_offsets, support_x, support_labels, support_targets);
    rows(query_offsets, query_x, query_labels, query_targets);
    if (r.chance(0.3)) {
      for (int64_t i = 0; i < o.tasks * classes; ++i) mask.push_back(r.chance(0.7));
      for (int64_t t = 0; t < o.tasks; ++t) {
        // the labels' classes exist
        for (int64_t i = support_offsets[t]; i < support_offsets[t + 1]; ++i) mask[t * classes + support_labels[i]] = 1;
        for (int64_t i = query_offsets[t]; i < query_offsets[t + 1]; ++i) mask[t * classes + query_labels[i]] = 1;
      }
    }

    const bool by_element = r.chance(0.2) && !everything, per_task = r.chance(0.2) && !everything;
    const bool wants_rates = option(0.5);
    for (int64_t l = 0; l < o.layers; ++l) {
      auto add = [&](int64_t size, double around, double spread) {
        std::vector<T> values(per_task ? size * o.tasks : size);
        for (T& value : values) value = static_cast<T>(around + spread * r.normal());
        params.push_back(values);
        rates.emplace_back(by_element ? size : steps);
        for (T& rate : rates.back()) rate = static_cast<T>(0.02 + 0.02 * std::abs(r.normal()));
        sizes.push_back(size);
      };
      add(widths[l] * widths[l + 1], 0, 1 / std::sqrt(static_cast<double>(widths[l])));
      if (o.bias) add(widths[l + 1], 0, 0.1);
      if (o.norm && l + 1 < o.layers) {
        add(widths[l + 1], 1, 0.1);
        add(widths[l + 1], 0, 0.1);
      }
    }
    int64_t elements = 0;
    for (size_t p = 0; p < params.size(); ++p) {
      gradients.emplace_back(params[p].size());
      rate_gradients.emplace_back(by_element && wants_rates ? rates[p].size() : 0);
      rate_sums.emplace_back(!by_element && wants_rates ? o.tasks * o.steps : 0);
      elements += sizes[p];
      moves.push_back(option(0.85));
    }
    for (size_t p = 0; p < params.size(); ++p) {
      MlpParameter<T> parameter{};
      parameter.start = params[p].data();
      parameter.task_stride = per_task ? sizes[p] : 0;
      parameter.moves = moves[p];
      parameter.rate = rates[p].data();
      parameter.rate_step = by_element ? 0 : 1;
      parameter.rate_element = by_element;
      parameter.gradient = gradients[p].data();
      parameter.rate_sums = rate_sums[p].empty() ? nullptr : rate_sums[p].data();
      parameter.rate_gradient = rate_gradients[p].empty() ? nullptr : rate_gradients[p].data();
      parameters.push_back(parameter);
    }
    a.params = parameters.data();
    a.num_params = static_cast<int64_t>(parameters.size());
    const bool classes_loss = o.loss == Loss::kCrossEntropy;
    const bool features = option(0.5);
    support_gradient.resize(features ? support_x.size() : 0);
    query_gradient.resize(features ? query_x.size() : 0);
    auto as_rows = [&](auto& x, auto& labels, auto& targets, auto& offsets, auto& gradient) {
      int64_t longest = 0;
      for (int64_t t = 0; t < o.tasks; ++t) longest = std::max(longest, offsets[t + 1] - offsets[t]);
      return MlpRows<T>{x.data(),
                        classes_loss ? labels.data() : nullptr,
                        classes_loss ? nullptr : targets.data(),
                        offsets.data(),
                        longest,
                        gradient.empty() ? nullptr : gradient.data(),
                        offsets.back()};
    };
    a.support = as_rows(support_x, support_labels, support_targets, support_offsets, support_gradient);
    a.query = as_rows(query_x, query_labels, query_targets, query_offsets, query_gradient);
    a.class_mask = mask.empty() ? nullptr : reinterpret_cast<const bool*>(mask.data());
    a.wants_fast = r.chance(0.2);
    a.wants_rates = wants_rates;
    a.wants_support_x = a.wants_query_x = features;
    outputs.resize(evaluations * query_offsets.back() * classes);
    losses.resize(evaluations * o.tasks);
    fast.resize(a.wants_fast ? o.tasks * elements : 0);
    for (auto [to, from] : {std::pair{&d_outputs, &outputs}, {&d_losses, &losses}, {&d_fast, &fast}}) {
      for (size_t i = 0; i < from->size(); ++i) to->push_back(static_cast<T>(r.normal()));
    }
    a.outputs = outputs.data();
    a.losses = losses.data();
    a.fast = fast.empty() ? nullptr : fast.data();
    a.d_outputs = r.chance(0.7) ? d_outputs.data() : nullptr;
    a.d_losses = d_losses.data();
    a.d_fast = fast.empty() ? nullptr : d_fast.data();
  }
  Problem(const Problem&) = delete;

  std::vector<int64_t> sizes;
  std::vector<char> moves;

  std::vector<T*> inputs() {
    std::vector<T*> result;
    for (auto& p : params) result.push_back(p.data());
    return result;
  }

  // all results of forward and backward, one after the other
  std::vector<T> results() const {
    std::vector<T> all;
    auto append = [&](const auto& values) { all.insert(all.end(), values.begin(), values.end()); };
    append(outputs), append(losses), append(fast), append(support_gradient), append(query_gradient);
    for (const auto& g : gradients) append(g);
    for (const auto& g : rate_gradients) append(g);
    for (const auto& g : rate_sums) append(g);
    return all;
  }
};

template <class T>
bool close(const std::vector<T>& a, const std::vector<T>& b, double tolerance) {
  double scale = 1;
  for (const T x : a) scale = std::isfinite(x) ? std::max(scale, std::abs(double(x))) : scale;
  for (size_t i = 0; i < a.size(); ++i) {
    if (std::isfinite(a[i]) != std::isfinite(b[i])) return false;
    if (std::isfinite(a[i]) && std::abs(double(a[i]) - double(b[i])) > tolerance * scale) return false;
  }
  return a.size() == b.size();
}

}  // namespace
}  // namespace mtml
