// What mlp_adapt does for all tasks at once: copies of the shared weights, the first layer's product, and the sums over
// the tasks that are the shared parameters' gradients.
#pragma once

#include "core/mlp_vectors.h"
#include "core/packed.h"

namespace mtml::MTML_ISA {

template <class T>
void mlp_prepare(const MlpCall<T>& c, int64_t begin, int64_t end, int64_t parts) {
  const MlpPlan& plan = *c.plan;
  if (begin == 0 && !plan.theta_per_task) gather_theta(c, 0, c.shared + plan.theta_0);
  for (int64_t l = 0; l < plan.num_layers; ++l) {
    const MlpLayer& L = plan.layers[l];
    const T* weight = c.arguments->params[L.weight].start;
    if (L.form == Form::kDense) {
      if (begin == 0 && !plan.theta_per_task && !L.transposed)
        transpose<T>(L.out, L.in, weight, L.in, T(1), c.shared + L.packed_in, L.ld_out);
      continue;
    }
    // panels of W^T [in, out] and of W [out, in]
    auto pack_part = [&](int64_t k, int64_t n, int64_t row, int64_t col, int64_t at) {
      if (at == kAbsent) return;
      const int64_t panels = (n + kPanel<T> - 1) / kPanel<T>;
      pack<T>(k, n, weight, row, col, c.shared + at, panels * begin / parts, panels * end / parts);
    };
    pack_part(L.in, L.out, 1, L.in, L.packed_in);
    pack_part(L.out, L.in, L.in, 1, L.packed_out);
  }
}

template <class T>
void mlp_first_products(const MlpCall<T>& c, int64_t begin, int64_t end) {
  const MlpArguments<T>& a = *c.arguments;
  const MlpLayer& L = c.plan->layers[0];
  const int64_t support_rows = a.support.offsets[a.options.tasks];
  auto rows = [&](int64_t first, int64_t last, const T* x, T* to) {
    if (first >= last) return;
    packed_product<T>(last - first, L.out, L.in, x + first * L.in, L.in, c.shared + L.packed_in, nullptr,
                      to + first * L.ld_out, L.ld_out);
  };
  rows(begin, end < support_rows ? end : support_rows, a.support.x, c.first_support);
  rows(begin > support_rows ? begin - support_rows : 0, end - support_rows, a.query.x, c.first_query);
}

template <class T>
void mlp_weight_gradient(const MlpCall<T>& c, int64_t l, int64_t first, int64_t last, const T* state, const T* kept,
                         bool add, int64_t begin, int64_t end, T* scratch) {
  const MlpArguments<T>& a = *c.arguments;
  const MlpPlan& plan = *c.plan;
  const MlpLayer& L = plan.layers[l];
  // as many segments as go into one call: the sums over the tasks go on where they stopped
  constexpr int64_t kSegments = 64;
  Segment<T> segments[kSegments];
  int64_t count = 0;
  const int64_t i_begin = begin * kPanel<T>, i_end = end * kPanel<T> < L.in ? end * kPanel<T> : L.in;
  if (i_begin >= i_end) return;
  auto flush = [&](bool always) {
    if (count == 0 && !always) return;
    outer_sum<T>(segments, count, L.out, L.in, a.params[L.weight].gradient, L.in, add, i_begin, i_end, scratch);
    add = true;
    count = 0;
  };
  auto push = [&](int64_t rows, const T* d, const T* h, int64_t ld_h) {
    if (rows == 0) return;
    if (count == kSegments) flush(false);
    segments[count++] = {rows, d, L.ld_out, h, ld_h, T(1)};
  };
  // First what comes through the steps, which is many small terms, then the few large ones of the query rows: in one
  // sum with them, each of the small would be rounded as they are.
  for (int pass = 0; pass < 2; ++pass) {
    const bool is_query = pass == 1;
    for (int64_t place = first; place < last; ++place) {
      const int64_t t = c.order ? c.order[place] : place;
      const T *own = state + (place - first) * plan.state_size, *own_kept = kept + (place - first) * plan.kept_size;
      const int64_t n = a.support.offsets[t + 1] - a.support.offsets[t];
      const int64_t q = a.query.offsets[t + 1] - a.query.offsets[t];
      if (is_query && L.form == Form::kGram) {
        push(q, own_kept + L.q_sum, a.query.x + a.query.offsets[t] * L.in, L.in);
      } else if (is_query) {
        push(plan.evaluations * q, own_kept + L.qd, own + L.hq, L.ld_in);
      } else if (L.form == Form::kGram) {
        push(n, own_kept + L.row_sum, a.support.x + a.support.offsets[t] * L.in, L.in);
      } else if (!a.options.first_order) {
        push(plan.steps * n, own_kept + L.rd, own + L.h, L.ld_in);
        push(plan.steps * n, own + L.d, own_kept + L.rh, L.ld_in);
      }
    }
  }
  flush(!add);
}

// Gram form with a dense query side: what the support rows add to the task's own cotangent of the weight
template <class T>
void finish_weight_u(const MlpCall<T>& c, const Task<T>& task) {
  const MlpLayer& L = c.plan->layers[0];
  product<T>(L.out, L.in, task.kept + L.weight_u, L.ld_in, kAdd, nullptr,
             {{task.kept + L.row_sum, 1, L.ld_out}, {task.x, task.ld_x, kPanel<T>}, task.n});
}

template <class T>
void mlp_sum_tasks(const T* vectors, int64_t stride, int64_t tasks, int64_t begin, int64_t end, T* total) {
  for_each<T>(end - begin, [&](int64_t i, auto lane) {
    using V = decltype(lane);
    V sum = load<V>(total + begin + i);
    for (int64_t first = 0; first < tasks; first += kShortSum) {
      const int64_t last = first + kShortSum < tasks ? first + kShortSum : tasks;
      V part{};
      for (int64_t t = first; t < last; ++t) part += load<V>(vectors + t * stride + begin + i);
      sum += part;
    }
    store(total + begin + i, sum);
  });
}

}  // namespace mtml::MTML_ISA
