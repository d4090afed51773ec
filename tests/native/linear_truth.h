// mlp_adapt of one layer, written out: what the CUDA kernels of a linear head are held against.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "core/mlp_adapt_args.h"

namespace mtml {
namespace {

// What a call computes.
template <class U>
struct Results {
  std::vector<U> outputs, losses, fast, weight, bias, weight_rate, bias_rate, support, query;
};
template <class U>
std::vector<std::vector<U>> list(const Results<U>& r) {
  return {r.outputs, r.losses, r.fast, r.weight, r.bias, r.weight_rate, r.bias_rate, r.support, r.query};
}
constexpr const char* kNames[] = {"outputs",     "losses",    "fast",      "weight", "bias",
                                  "weight rate", "bias rate", "support x", "query x"};

// The inner loop with its weights, and its reverse, step by step as docs/maths/mlp_adapt.md has them, in type U.
template <class U, class Problem>
struct Plain {
  using T = typename Problem::Value;
  const Problem& problem;
  const MlpArguments<T>& a;
  int64_t C, D, K;
  U momentum, decay;
  Results<U> r;
  // of each result the sum of its terms' sizes, by which rounding is measured
  Results<U> sizes;

  explicit Plain(const Problem& p)
      : problem(p),
        a(p.a),
        C(p.classes),
        D(p.features),
        K(p.steps),
        momentum(static_cast<T>(p.a.options.momentum)),
        decay(static_cast<T>(p.a.options.weight_decay)) {
    const int64_t rows = p.query_offsets.back(), S = p.evaluations;
    r.outputs.resize(S * rows * C), r.losses.resize(S * p.tasks);
    if (a.wants_fast) r.fast.resize(p.tasks * p.size());
    if (p.wants_w) r.weight.resize((p.params[0].task_stride ? p.tasks : 1) * C * D);
    if (p.wants_b) r.bias.resize((p.params[1].task_stride ? p.tasks : 1) * C);
    if (p.wants_rates) r.weight_rate.resize(p.tasks * K);
    if (p.wants_rates && a.options.bias) r.bias_rate.resize(p.tasks * K);
    if (p.wants_support) r.support.resize(p.support_offsets.back() * D);
    if (p.wants_query) r.query.resize(p.query_offsets.back() * D);
    sizes = r;
    for (int64_t t = 0; t < p.tasks; ++t) task(t);
  }

  // parameters of a task: [C][D + 1], the bias behind each row of the weight
  using Params = std::vector<U>;

  struct Data {
    const T* x;
    const int64_t* labels;
    const T* targets;
    const bool* mask;
    int64_t rows;
  };
  bool has(const Data& data, int64_t c) const { return !data.mask || data.mask[c]; }

  std::vector<U> outputs(const Params& th, const Data& data, std::vector<U>* size = nullptr) const {
    std::vector<U> z(data.rows * C);
    if (size) size->resize(data.rows * C);
    for (int64_t i = 0; i < data.rows; ++i) {
      for (int64_t c = 0; c < C; ++c) {
        U sum = 0;
        for (int64_t d = 0; d < D; ++d) sum += static_cast<U>(data.x[i * D + d]) * th[c * (D + 1) + d];
        z[i * C + c] = sum + th[c * (D + 1) + D];
        for (int64_t d = 0; size && d <= D; ++d)
          (*size)[i * C + c] += std::abs((d < D ? static_cast<U>(data.x[i * D + d]) : U(1)) * th[c * (D + 1) + d]);
      }
    }
    return z;
  }

  // the loss, its derivative by z, and the tangent of that along rz
  U loss(const Data& data, const std::vector<U>& z, std::vector<U>* d, const std::vector<U>* rz,
         std::vector<U>* rd) const {
    int64_t count = 0;
    for (int64_t c = 0; c < C; ++c) count += has(data, c);
    const bool entropy = a.options.loss == Loss::kCrossEntropy;
    const U mean = U(1) / static_cast<U>(std::max<int64_t>(data.rows, 1) * (entropy ? 1 : std::max<int64_t>(count, 1)));
    U total = 0;
    if (d) d->assign(data.rows * C, 0);
    if (rd) rd->assign(data.rows * C, 0);
    for (int64_t i = 0; i < data.rows; ++i) {
      U top = -std::numeric_limits<U>::infinity(), sum = 0, dot = 0;
      for (int64_t c = 0; c < C; ++c)
        if (has(data, c)) top = std::max(top, z[i * C + c]);
      for (int64_t c = 0; c < C; ++c)
        if (has(data, c)) sum += std::exp(z[i * C + c] - top);
      for (int64_t c = 0; rz && c < C; ++c)
        if (has(data, c)) dot += std::exp(z[i * C + c] - top) / sum * (*rz)[i * C + c];
      for (int64_t c = 0; c < C; ++c) {
        if (!has(data, c)) continue;
        const int64_t e = i * C + c;
        U derivative, slope;
        if (entropy) {
          const U p = std::exp(z[e] - top) / sum;
          const bool is = data.labels[i] == c;
          if (is) total += std::log(sum) + top - z[e];
          derivative = p - (is ? U(1) : U(0));
          slope = rz ? p * ((*rz)[e] - dot) : U(0);
        } else if (a.options.loss == Loss::kMse) {
          const U difference = z[e] - data.targets[e];
          total += difference * difference;
          derivative = 2 * difference;
          slope = rz ? 2 * (*rz)[e] : U(0);
        } else {
          const U p = U(1) / (U(1) + std::exp(-z[e]));
          total += std::max(z[e], U(0)) - z[e] * data.targets[e] + std::log1p(std::exp(-std::abs(z[e])));
          derivative = p - data.targets[e];
          slope = rz ? p * (1 - p) * (*rz)[e] : U(0);
        }
        if (d) (*d)[e] = mean * derivative;
        if (rd) (*rd)[e] = mean * slope;
      }
    }
    return mean * total;
  }

  // to += d^T [x, 1]
  void add_outer(const Data& data, const std::vector<U>& d, Params& to, Params& to_size) const {
    for (int64_t c = 0; c < C; ++c) {
      for (int64_t e = 0; e <= D; ++e) {
        U sum = 0, size = 0;
        for (int64_t i = 0; i < data.rows; ++i) {
          const U term = d[i * C + c] * (e < D ? static_cast<U>(data.x[i * D + e]) : U(1));
          sum += term, size += std::abs(term);
        }
        to[c * (D + 1) + e] += sum, to_size[c * (D + 1) + e] += size;
      }
    }
  }
  // dx += d W
  void add_features(const Data& data, const std::vector<U>& d, const Params& th, std::vector<U>& dx,
                    std::vector<U>& dx_size) const {
    for (int64_t i = 0; i < data.rows; ++i) {
      for (int64_t e = 0; e < D; ++e) {
        U sum = 0, size = 0;
        for (int64_t c = 0; c < C; ++c) {
          const U term = d[i * C + c] * th[c * (D + 1) + e];
          sum += term, size += std::abs(term);
        }
        dx[i * D + e] += sum, dx_size[i * D + e] += size;
      }
    }
  }

  void task(int64_t t) {
    const Problem& p = problem;
    const MlpOptions& o = a.options;
    const int64_t S = p.evaluations, s_begin = p.support_offsets[t], q_begin = p.query_offsets[t];
    const int64_t q = p.query_offsets[t + 1] - q_begin, size = C * (D + 1);
    const bool* mask = a.class_mask ? a.class_mask + t * C : nullptr;
    const auto data_of = [&](const MlpRows<T>& of, int64_t begin, int64_t rows) {
      return Data{of.x + begin * D, of.labels ? of.labels + begin : nullptr,
                  of.targets ? of.targets + begin * C : nullptr, mask, rows};
    };
    const Data support = data_of(a.support, s_begin, p.support_offsets[t + 1] - s_begin);
    const Data query = data_of(a.query, q_begin, q);
    const bool labelled = query.labels || query.targets;
    const auto rate = [&](int64_t e, int64_t k) {
      const MlpParameter<T>& param = p.params[e % (D + 1) == D];
      return param.moves ? static_cast<U>(param.rate[k * param.rate_step]) : U(0);
    };
    const auto moves = [&](int64_t e) { return e % (D + 1) == D ? o.bias && p.params[1].moves : p.params[0].moves; };
    const auto is_bias = [&](int64_t e) { return e % (D + 1) == D; };

    Params th(size), velocity(size, U(0));
    for (int64_t c = 0; c < C; ++c) {
      for (int64_t d = 0; d < D; ++d) th[c * (D + 1) + d] = p.w[t * p.params[0].task_stride + c * D + d];
      th[c * (D + 1) + D] = o.bias ? p.b[t * p.params[1].task_stride + c] : T(0);
    }
    std::vector<Params> ths{th}, velocities{velocity};
    Params th_size(size), u_size(size, U(0));
    for (int64_t e = 0; e < size; ++e) th_size[e] = std::abs(th[e]);
    for (int64_t k = 0; k < K; ++k) {
      std::vector<U> d;
      loss(support, outputs(th, support), &d, nullptr, nullptr);
      Params g(size, U(0));
      add_outer(support, d, g, th_size);
      for (int64_t e = 0; e < size; ++e) {
        if (!moves(e)) continue;
        velocity[e] = momentum * velocity[e] + g[e] + decay * th[e];
        th[e] -= rate(e, k) * velocity[e];
      }
      ths.push_back(th), velocities.push_back(velocity);
    }

    Params u(size, U(0)), direction(size, U(0));
    for (int64_t e = 0; e < size; ++e) {
      const int64_t c = e / (D + 1), d = e % (D + 1), at = is_bias(e) ? C * D + c : c * D + d;
      if (is_bias(e) && !o.bias) continue;
      if (a.wants_fast) r.fast[t * p.size() + at] = th[e], sizes.fast[t * p.size() + at] = th_size[e];
      if (a.d_fast) u[e] = p.d_fast[t * p.size() + at], u_size[e] = std::abs(u[e]);
    }
    std::vector<U> dx(support.rows * D, U(0)), dxq(q * D, U(0)), dx_size = dx, dxq_size = dxq;
    const auto evaluate = [&](int64_t k, int64_t s) {
      std::vector<U> d(q * C, U(0)), z_size;
      const std::vector<U> z = outputs(ths[k], query, &z_size);
      r.losses[s * p.tasks + t] = labelled ? loss(query, z, &d, nullptr, nullptr) : U(0);
      for (const U size : z_size)
        sizes.losses[s * p.tasks + t] = std::max(sizes.losses[s * p.tasks + t], size * (1 + size));
      const U weight = a.d_losses ? static_cast<U>(p.d_losses[s * p.tasks + t]) : U(0);
      const int64_t start = (s * p.query_offsets.back() + q_begin) * C;
      for (int64_t i = 0; i < q * C; ++i) {
        const bool exists = has(query, i % C);
        r.outputs[start + i] = exists                          ? z[i]
                               : o.loss == Loss::kCrossEntropy ? -std::numeric_limits<U>::infinity()
                                                               : U(0);
        sizes.outputs[start + i] = z_size[i];
        d[i] = weight * d[i] + (a.d_outputs && exists ? static_cast<U>(p.d_outputs[start + i]) : U(0));
      }
      add_outer(query, d, u, u_size);
      add_features(query, d, ths[k], dxq, dxq_size);
    };
    evaluate(K, S - 1);
    for (int64_t k = K - 1; k >= 0; --k) {
      U sums[2] = {0, 0}, sum_sizes[2] = {0, 0};
      for (int64_t e = 0; e < size; ++e) {
        if (!moves(e)) continue;
        sums[is_bias(e)] -= u[e] * velocities[k + 1][e];
        sum_sizes[is_bias(e)] += u_size[e] * std::abs(velocities[k + 1][e]);
        direction[e] = momentum * direction[e] - rate(e, k) * u[e];
        u[e] += decay * direction[e], u_size[e] += std::abs(decay * direction[e]);
      }
      if (p.wants_rates) r.weight_rate[t * K + k] = sums[0], sizes.weight_rate[t * K + k] = sum_sizes[0];
      if (p.wants_rates && o.bias) r.bias_rate[t * K + k] = sums[1], sizes.bias_rate[t * K + k] = sum_sizes[1];
      if (!o.first_order) {
        const std::vector<U> z = outputs(ths[k], support), rz = outputs(direction, support);
        std::vector<U> d, rd;
        loss(support, z, &d, &rz, &rd);
        add_outer(support, rd, u, u_size);
        add_features(support, d, direction, dx, dx_size);
        add_features(support, rd, ths[k], dx, dx_size);
      }
      if (o.every_step) evaluate(k, k);
    }
    for (int64_t e = 0; e < size; ++e) {
      const int64_t c = e / (D + 1), d = e % (D + 1);
      const int64_t at_w = (p.params[0].task_stride ? t * C * D : 0) + c * D + d;
      const int64_t at_b = (p.params[1].task_stride ? t * C : 0) + c;
      if (is_bias(e) && p.wants_b) r.bias[at_b] += u[e], sizes.bias[at_b] += u_size[e];
      if (!is_bias(e) && p.wants_w) r.weight[at_w] += u[e], sizes.weight[at_w] += u_size[e];
    }
    const auto place = [](const std::vector<U>& from, std::vector<U>& to, int64_t begin) {
      if (!to.empty()) std::copy(from.begin(), from.end(), to.begin() + begin);
    };
    place(dx, r.support, s_begin * D), place(dx_size, sizes.support, s_begin * D);
    place(dxq, r.query, q_begin * D), place(dxq_size, sizes.query, q_begin * D);
  }
};

}  // namespace
}  // namespace mtml
