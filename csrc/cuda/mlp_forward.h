// The forward sweep of mlp_adapt for one task: K steps on its support rows, then its query rows.
#pragma once

#include "cuda/mlp_sweep.h"

namespace mtml::cuda {

template <class T>
__device__ void Sweep<T>::forward() {
  theta_ = view(c.theta, 0);
  start();
  __syncthreads();
  for (int64_t k = 0; k < c.steps; ++k) {
    if (c.every_step) evaluate(k);
    save(c.theta, k);
    record_ = view(c.record, k);
    layers(support());
    loss_of_support();
    __syncthreads();
    layers_backward();
    step(k);
    save(c.record, k);
    __syncthreads();
  }
  evaluate(c.evaluations - 1);
  save(c.theta, c.steps);
  if (c.fast) write_parameters(theta_.fixed, c.fast + t * c.fast_size);
}

template <class T>
__device__ void Sweep<T>::start() {
  T* theta = theta_.fixed;
  T* w = c.w.fixed_size ? view(c.w, 0).fixed : nullptr;
  for_params([&](int, int l, int kind, const Param<T>& param) {
    const T* from = param.start + t * param.task_stride;
    for_places(l, kind, [&](int64_t i, int64_t place) {
      theta[place] = from[i];
      if (w) w[place] = 0;
    });
  });
  if (c.is_gram) for_first_rows(n_, [&](int64_t at, int64_t) { moved()[at] = 0; });
}

// rows through all layers of theta
template <class T>
__device__ void Sweep<T>::layers(const Batch& batch) {
  const T* theta = theta_.fixed;
  for (int l = 0; l <= last(); ++l) {
    const Layer& layer = c.layers[l];
    const LayerRows& places = batch.is_query ? layer.query : layer.support;
    const LayerRows& next =
        batch.is_query ? c.layers[l < last() ? l + 1 : l].query : c.layers[l < last() ? l + 1 : l].support;
    const T* in = l == 0 ? batch.x : array(batch.at, places.h, batch.rows);
    T* z = layer.hidden ? nullptr : array(batch.at, places.z, batch.rows);
    T *y = array(batch.at, places.y, batch.rows), *xh = array(batch.at, places.xh, batch.rows);
    T* h = layer.hidden ? array(batch.at, next.h, batch.rows) : nullptr;
    const bool norm = has_norm(l);
    const T* bias = layer.at[kBias] == kAbsent ? nullptr : theta + layer.at[kBias];
    const T* z0 = !is_gram(l, kWeight) ? nullptr
                  : batch.is_query     ? c.gram.query_z + first(c.query) * layer.out
                                       : c.gram.support_z + first(c.support) * layer.out;
    products<T>(batch.rows, layer.out,
                z0 ? product_with_moved(batch.is_query)
                   : product_with_weight(l, in, l == 0 ? layer.in : layer.ld_in, l > 0 || batch.quads),
                {}, [&](int64_t row, int o, T value) {
                  if (z0) value += z0[row * layer.out + o];
                  if (bias) value += bias[o];
                  const int64_t at = row * layer.ld_out + o;
                  if (!layer.hidden) {
                    z[at] = value;
                  } else if (norm) {
                    xh[at] = value;
                  } else {
                    if (y) y[at] = value;
                    h[at] = activate(c.activation, value);
                  }
                });
    __syncthreads();
    if (!norm) continue;
    // its rows belong to the thread that has the channel
    T* to = y ? y : h;
    batch_norm<T>(batch.rows, layer.out, layer.ld_out, xh, theta + layer.at[kGain], theta + layer.at[kShift],
                  c.norm_eps, to, xh, vector(batch.at, places.r));
    for_channel_rows(layer, batch.rows, [&](int64_t at) { h[at] = activate(c.activation, to[at]); });
    __syncthreads();
  }
}

// outputs become p, and d is the loss's derivative by them
template <class T>
__device__ void Sweep<T>::loss_of_support() {
  const Layer& layer = c.layers[last()];
  T *p = of_step(layer.support.z), *d = of_step(layer.d);
  const T mean = static_cast<T>(mean_of(n_));
  for_loss_rows<T>(c.loss, n_, outputs(), mask_, [&](int64_t row, const LossRow<T>& one) {
    T* z = p + row * layer.ld_out;
    one.forward(z, loss_label(c.support, row), loss_targets(c.support, row), mean, z, d + row * layer.ld_out);
  });
}

template <class T>
__device__ void Sweep<T>::layers_backward() {
  for (int l = last(); l > 0; --l) {
    const Layer &layer = c.layers[l], &below = c.layers[l - 1];
    const T *h = of_step(layer.support.h), *y = of_step(below.support.y);
    T *e = of_step(below.e), *d = of_step(below.d), *dy = c.norm ? of_step(below.dy) : d;
    products<T>(n_, layer.in, product_back(l, of_step(layer.d), theta_.fixed), {}, [&](int64_t row, int i, T value) {
      const int64_t at = row * layer.ld_in + i;
      if (e) e[at] = value;
      dy[at] = times_slope(c.activation, value, y ? y[at] : T(0), h[at]);
    });
    __syncthreads();
    if (!c.norm) continue;
    batch_norm_backward<T>(n_, below.out, below.ld_out, dy, of_step(below.support.xh), vector(record_, below.support.r),
                           theta_.fixed + below.at[kGain], d, vector(record_, below.dgain),
                           vector(record_, below.dshift));
    __syncthreads();
  }
}

// theta_{k+1} = theta_k - a m, m = momentum * m + scale * g + weight_decay * theta_k
template <class T>
__device__ void Sweep<T>::step(int64_t k) {
  double scale = 1;
  if (c.clip < INFINITY) scale = clip_factor(sqrt(squares_of_gradient()), c.clip);
  const T factor = static_cast<T>(scale);
  const T* theta = theta_.fixed;
  T* next = view(c.theta, k + 1).fixed;
  T* m = c.w.fixed_size ? view(c.w, 0).fixed : nullptr;
  T* velocity = c.velocity.fixed_size ? in_device(c.velocity, k).fixed : nullptr;
  for_params([&](int, int l, int kind, const Param<T>& param) {
    if (!param.moves) {
      if (next == theta) return;
      for_places(l, kind, [&](int64_t, int64_t place) { next[place] = theta[place]; });
      return;
    }
    for_gradient(l, kind, [&](int64_t i, int64_t place, T gradient) {
      T d = factor * gradient;
      // a term whose factor is 0 is left out, so that an infinite parameter does not turn into NaN
      if (c.weight_decay != 0) d += c.weight_decay * theta[place];
      if (m) {
        d += c.momentum * m[place];
        m[place] = d;
        if (velocity) velocity[place] = d;
      }
      next[place] = theta[place] - rate(param, k, i) * d;
    });
  });
  theta_.fixed = next;
  const Param<T>& weight = param(0, kWeight);
  if (!c.is_gram || !weight.moves) return;
  const T* d = of_step(c.layers[0].d);
  const T scaled = rate(weight, k, 0);
  for_first_rows(n_, [&](int64_t at, int64_t) { moved()[at] -= scaled * d[at]; });
}

// the query rows through theta: evaluation s
template <class T>
__device__ void Sweep<T>::evaluate(int64_t s) {
  const View at = view(c.evaluation, s);
  layers(query(at));
  const Layer& layer = c.layers[last()];
  const T* z = array(at, layer.query.z, q_);
  if (c.losses) {
    const bool labelled = c.query.labels || c.query.targets;
    double sum = 0;
    for_loss_rows<T>(c.loss, labelled ? q_ : 0, outputs(), mask_, [&](int64_t row, const LossRow<T>& one) {
      const T loss = one.forward(z + row * layer.ld_out, loss_label(c.query, row), loss_targets(c.query, row), T(0),
                                 nullptr, nullptr);
      if (one.lane == 0) sum += static_cast<double>(loss);
    });
    sum = block_sum(sum, room_);
    if (threadIdx.x == 0) c.losses[s * c.tasks + t] = labelled ? static_cast<T>(sum * mean_of(q_)) : T(0);
  }
  if (c.outputs) {
    T* to = c.outputs + (s * c.query.all + first(c.query)) * outputs();
    const T nothing = c.loss == Loss::kCrossEntropy ? -T(INFINITY) : T(0);
    for (int64_t i = threadIdx.x; i < q_ * outputs(); i += blockDim.x) {
      const int o = static_cast<int>(i % outputs());
      to[i] = mask_ && !mask_[o] ? nothing : z[i / outputs() * layer.ld_out + o];
    }
  }
  save(c.evaluation, s);
}

template <class T>
__device__ void Sweep<T>::write_parameters(const T* vector, T* to) const {
  for_params([&](int, int l, int kind, const Param<T>& param) {
    for_places(l, kind, [&](int64_t i, int64_t place) { to[i] = vector[place]; });
    to += param.size;
  });
}

}  // namespace mtml::cuda
