// The sweeps of mlp_adapt for one task, by one block of threads: K inner steps and the query rows forward, and the
// exact reverse of it all (docs/maths/mlp_adapt.md), every layer in dense form. What a phase leaves for others is
// behind a barrier; within a phase a thread reads what others wrote before it, and writes what nobody else does.
#pragma once

#include "cuda/mlp_block.h"
// after element.h, which brings what it needs
#include "core/sgd_step_row.h"

namespace mtml::cuda {

template <class T>
class Sweep {
 public:
  // `shared` holds what the rooms have there; `room` is block_sum_bytes, and behind it a double for each parameter and
  // warp where rates are to be learned
  __device__ Sweep(const Network<T>& network, int64_t task, T* shared, double* room)
      : c(network),
        t(task),
        shared_(shared),
        room_(room),
        mask_(network.class_mask ? network.class_mask + task * outputs() : nullptr),
        existing_(outputs()),
        n_(count(network.support)),
        q_(count(network.query)) {
    if (!mask_) return;
    existing_ = 0;
    for (int o = 0; o < outputs(); ++o) existing_ += mask_[o];
  }

  __device__ void forward() {
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

  __device__ void backward() {
    u_ = view(c.u, 0).fixed;
    direction_ = view(c.direction, 0).fixed;
    tangent_ = view(c.tangent, 0);
    start_backward();
    theta_ = fetch(c.theta, c.steps);
    evaluate_backward(c.evaluations - 1);
    for (int64_t k = c.steps - 1; k >= 0; --k) {
      // whoever still reads theta_{k+1}
      __syncthreads();
      theta_ = fetch(c.theta, k);
      record_ = fetch(c.record, k);
      __syncthreads();
      direction(k);
      if (!c.first_order) {
        __syncthreads();
        hessian(k);
      }
      if (c.every_step) evaluate_backward(k);
    }
    __syncthreads();
    finish_backward();
  }

 private:
  struct View {
    T *fixed, *rows;
  };
  // the support or the query rows of a task on their way through the layers
  struct Batch {
    const T* x;
    int64_t rows;
    bool quads, is_query;
    View at;
  };

  const Network<T>& c;
  const int64_t t;
  T* const shared_;
  double* const room_;
  const bool* const mask_;
  int64_t existing_;
  const int64_t n_, q_;
  View theta_, record_, tangent_;
  T *u_, *direction_;

  __device__ int last() const { return c.num_layers - 1; }
  __device__ int outputs() const { return c.layers[last()].out; }
  __device__ int64_t count(const Rows<T>& rows) const {
    return rows.offsets ? rows.offsets[t + 1] - rows.offsets[t] : rows.count;
  }
  __device__ int64_t first(const Rows<T>& rows) const { return rows.offsets ? rows.offsets[t] : t * rows.count; }
  __device__ const T* features(const Rows<T>& rows) const { return rows.x + first(rows) * c.layers[0].in; }
  __device__ const T* loss_targets(const Rows<T>& rows, int64_t row) const {
    return rows.targets ? rows.targets + (first(rows) + row) * outputs() : nullptr;
  }
  __device__ int64_t loss_label(const Rows<T>& rows, int64_t row) const {
    return rows.labels ? rows.labels[first(rows) + row] : 0;
  }
  // what a row's loss counts for in the task's
  __device__ double mean_of(int64_t rows) const {
    if (c.loss == Loss::kCrossEntropy) return 1.0 / static_cast<double>(rows);
    return 1.0 / static_cast<double>(rows * (existing_ ? existing_ : 1));
  }

  // ---- rooms

  __device__ View in_device(const Room<T>& room, int64_t slot) const {
    const Rows<T>& of = room.is_query ? c.query : c.support;
    return {room.fixed ? room.fixed + (t * room.slots + slot) * room.fixed_size : nullptr,
            room.rows ? room.rows + (first(of) * room.slots + slot * count(of)) * room.row_size : nullptr};
  }
  __device__ View in_shared(const Room<T>& room) const {
    return {shared_ + room.shared, shared_ + room.shared + room.fixed_size};
  }
  // where a slot is worked on
  __device__ View view(const Room<T>& room, int64_t slot) const {
    return room.shared != kAbsent ? in_shared(room) : in_device(room, room.slots > 1 ? slot : 0);
  }
  __device__ void copy(const View& from, const View& to, const Room<T>& room) const {
    const int64_t rows = (room.is_query ? q_ : n_) * room.row_size;
    for (int64_t i = threadIdx.x; i < room.fixed_size; i += blockDim.x) to.fixed[i] = from.fixed[i];
    for (int64_t i = threadIdx.x; i < rows; i += blockDim.x) to.rows[i] = from.rows[i];
  }
  // from shared memory to a slot that the reverse will ask for
  __device__ void save(const Room<T>& room, int64_t slot) const {
    if (room.shared != kAbsent && (room.fixed || room.rows)) copy(in_shared(room), in_device(room, slot), room);
  }
  __device__ View fetch(const Room<T>& room, int64_t slot) const {
    if (room.shared == kAbsent) return in_device(room, slot);
    copy(in_device(room, slot), in_shared(room), room);
    return in_shared(room);
  }

  __device__ T* array(const View& view, int place, int64_t rows) const {
    return place == kAbsent ? nullptr : view.rows + place * rows;
  }
  __device__ T* vector(const View& view, int place) const { return view.fixed + place; }
  __device__ T* of_step(int place) const { return array(record_, place, n_); }
  __device__ T* of_tangent(int place) const { return array(tangent_, place, n_); }

  __device__ bool has_norm(int l) const { return c.norm && c.layers[l].hidden; }
  // A norm behind a layer takes any constant away, so the derivative by its bias is zero, and not the rounding errors
  // that its terms would leave.
  __device__ bool bias_counts(int l) const { return c.layers[l].at[kBias] != kAbsent && !has_norm(l); }
  __device__ const Param<T>& param(int l, int kind) const { return c.params[c.param[l][kind]]; }

  // f(p, l, kind, parameter)
  template <class F>
  __device__ void for_params(const F& f) const {
    for (int l = 0; l < c.num_layers; ++l) {
      for (int kind = 0; kind < kKinds; ++kind) {
        const int p = c.param[l][kind];
        if (p != kAbsent) f(p, l, kind, c.params[p]);
      }
    }
  }

  // the first layer's weight in Gram form has no place in a vector
  __device__ bool is_gram(int l, int kind) const { return l == 0 && kind == kWeight && c.is_gram; }

  // f(element of the user's array, place in a parameter vector) for this thread's elements; the same in every phase
  template <class F>
  __device__ void for_places(int l, int kind, const F& f) const {
    if (is_gram(l, kind)) return;
    const Layer& layer = c.layers[l];
    if (kind == kWeight) {
      outer_products<T>(layer.out, layer.in, {}, {}, [&](int o, int i, T) {
        f(static_cast<int64_t>(o) * layer.in + i, layer.at[kWeight] + static_cast<int64_t>(o) * layer.ld_weight + i);
      });
    } else {
      for (int o = threadIdx.x; o < layer.out; o += blockDim.x) f(o, layer.at[kind] + o);
    }
  }

  // f(element, place, inner gradient), by the record of a step
  template <class F>
  __device__ void for_gradient(int l, int kind, const F& f) const {
    if (is_gram(l, kind)) return;
    const Layer& layer = c.layers[l];
    const T* d = of_step(layer.d);
    if (kind == kWeight) {
      const T* h = l == 0 ? features(c.support) : of_step(layer.support.h);
      const Outer<T> product{d, layer.ld_out, h, l == 0 ? layer.in : layer.ld_in, n_};
      outer_products<T>(layer.out, layer.in, product, {}, [&](int o, int i, T gradient) {
        f(static_cast<int64_t>(o) * layer.in + i, layer.at[kWeight] + static_cast<int64_t>(o) * layer.ld_weight + i,
          gradient);
      });
      return;
    }
    const bool counts = kind != kBias || bias_counts(l);
    for (int o = threadIdx.x; o < layer.out; o += blockDim.x) {
      T gradient = 0;
      if (kind == kGain) gradient = vector(record_, layer.dgain)[o];
      if (kind == kShift) gradient = vector(record_, layer.dshift)[o];
      if (kind == kBias && counts) gradient = column_sum(d + o, layer.ld_out, n_);
      f(o, layer.at[kind] + o, gradient);
    }
  }

  // ---- the first layer in Gram form

  __device__ T* moved() const { return view(c.moved, 0).rows; }
  __device__ T* support_u() const { return c.gram.support_u + first(c.support) * c.layers[0].out; }
  __device__ T* query_u() const { return c.gram.query_u + first(c.query) * c.layers[0].out; }

  // f(place in rows of the layer's outputs, place in rows without padding) for elements of this thread
  template <class F>
  __device__ void for_first_rows(int64_t rows, const F& f) const {
    const Layer& layer = c.layers[0];
    for (int64_t i = threadIdx.x; i < rows * layer.out; i += blockDim.x)
      f(i / layer.out * layer.ld_out + i % layer.out, i);
  }

  // (X X^T) E, of the support or the query rows: what the layer's outputs have moved by
  __device__ Factors<T> product_with_moved(bool is_query) const {
    const Layer& layer = c.layers[0];
    const T* rows = is_query ? c.gram.cross + t * q_ * n_ : c.gram.gram + t * n_ * n_;
    const int terms = param(0, kWeight).moves ? static_cast<int>(n_) : 0;
    return {rows, n_, n_ % 4 == 0, moved(), layer.ld_out, 1, terms};
  }

  // f(row, output, element) of X U^T, with U = query_u^T Xq + support_u^T X the cotangent of the weight
  template <class F>
  __device__ void for_features_times_cotangent(const F& f) const {
    const Layer& layer = c.layers[0];
    const T *cross = c.gram.cross_transposed + t * n_ * q_, *gram = c.gram.gram + t * n_ * n_;
    products<T>(n_, layer.out, {cross, q_, q_ % 4 == 0, query_u(), layer.out, 1, static_cast<int>(q_)},
                {gram, n_, n_ % 4 == 0, support_u(), layer.out, 1, static_cast<int>(n_)}, f);
  }

  // ---- forward

  __device__ void start() {
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

  __device__ Batch support() const { return {features(c.support), n_, c.support.quads, false, record_}; }
  __device__ Batch query(const View& at) const { return {features(c.query), q_, c.query.quads, true, at}; }

  // rows through all layers of theta
  __device__ void layers(const Batch& batch) {
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

  // in W^T
  __device__ Factors<T> product_with_weight(int l, const T* in, int64_t ld, bool quads) const {
    const Layer& layer = c.layers[l];
    return {in, ld, quads, theta_.fixed + layer.at[kWeight], 1, layer.ld_weight, layer.in};
  }
  // d V, of a parameter vector
  __device__ Factors<T> product_back(int l, const T* d, const T* vector) const {
    const Layer& layer = c.layers[l];
    return {d, layer.ld_out, true, vector + layer.at[kWeight], layer.ld_weight, 1, layer.out};
  }

  // f(place) for the rows of this thread's channels
  template <class F>
  __device__ void for_channel_rows(const Layer& layer, int64_t rows, const F& f) const {
    for (int o = threadIdx.x; o < layer.out; o += blockDim.x)
      for (int64_t row = 0; row < rows; ++row) f(row * layer.ld_out + o);
  }

  // outputs become p, and d is the loss's derivative by them
  __device__ void loss_of_support() {
    const Layer& layer = c.layers[last()];
    T *p = of_step(layer.support.z), *d = of_step(layer.d);
    const T mean = static_cast<T>(mean_of(n_));
    for_loss_rows<T>(c.loss, n_, outputs(), mask_, [&](int64_t row, const LossRow<T>& one) {
      T* z = p + row * layer.ld_out;
      one.forward(z, loss_label(c.support, row), loss_targets(c.support, row), mean, z, d + row * layer.ld_out);
    });
  }

  __device__ void layers_backward() {
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
      batch_norm_backward<T>(n_, below.out, below.ld_out, dy, of_step(below.support.xh),
                             vector(record_, below.support.r), theta_.fixed + below.at[kGain], d,
                             vector(record_, below.dgain), vector(record_, below.dshift));
      __syncthreads();
    }
  }

  __device__ static T rate(const Param<T>& param, int64_t k, int64_t i) {
    return param.rate[k * param.rate_step + i * param.rate_element];
  }

  // theta_{k+1} = theta_k - a m, m = momentum * m + scale * g + weight_decay * theta_k
  __device__ void step(int64_t k) {
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

  __device__ double squares_of_gradient() {
    double squares = 0;
    for_params([&](int, int l, int kind, const Param<T>& param) {
      if (param.moves)
        for_gradient(l, kind,
                     [&](int64_t, int64_t, T g) { squares += static_cast<double>(g) * static_cast<double>(g); });
    });
    return block_sum(squares, room_);
  }

  // the query rows through theta: evaluation s
  __device__ void evaluate(int64_t s) {
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

  __device__ void write_parameters(const T* vector, T* to) const {
    for_params([&](int, int l, int kind, const Param<T>& param) {
      for_places(l, kind, [&](int64_t i, int64_t place) { to[i] = vector[place]; });
      to += param.size;
    });
  }

  // ---- backward

  __device__ void start_backward() {
    T* w = c.w.fixed_size ? view(c.w, 0).fixed : nullptr;
    const T* from = c.d_fast ? c.d_fast + t * c.fast_size : nullptr;
    for_params([&](int, int l, int kind, const Param<T>& param) {
      for_places(l, kind, [&](int64_t i, int64_t place) {
        u_[place] = from ? from[i] : T(0);
        if (w) w[place] = 0;
        for (int64_t row = 0; row < c.rate_u.slots; ++row) in_device(c.rate_u, row).fixed[place] = 0;
      });
      if (from) from += param.size;
    });
    zero_features(c.support);
    zero_features(c.query);
    if (!c.is_gram) return;
    for_first_rows(n_, [&](int64_t, int64_t i) { support_u()[i] = 0; });
    for_first_rows(q_, [&](int64_t, int64_t i) { query_u()[i] = 0; });
  }
  __device__ void zero_features(const Rows<T>& rows) const {
    if (!rows.x_gradient) return;
    const int64_t width = c.layers[0].in;
    for (int64_t i = threadIdx.x; i < count(rows) * width; i += blockDim.x)
      rows.x_gradient[first(rows) * width + i] = 0;
  }

  // the cotangents of evaluation s, back to theta
  __device__ void evaluate_backward(int64_t s) {
    const View at = fetch(c.evaluation, s), deltas = view(c.delta, 0);
    // this, and theta
    __syncthreads();
    loss_backward(s, array(at, c.layers[last()].query.z, q_), array(deltas, c.layers[last()].delta, q_));
    __syncthreads();
    for (int l = last(); l >= 0; --l) {
      const Layer& layer = c.layers[l];
      const T* delta = array(deltas, layer.delta, q_);
      if (l == 0) {
        add_to_features(c.query, q_, layer, product_back(0, delta, theta_.fixed), {});
        break;
      }
      const Layer& below = c.layers[l - 1];
      const T *h = array(at, layer.query.h, q_), *y = array(at, below.query.y, q_);
      T* to = array(deltas, below.delta, q_);
      products<T>(q_, layer.in, product_back(l, delta, theta_.fixed), {}, [&](int64_t row, int i, T value) {
        const int64_t place = row * layer.ld_in + i;
        to[place] = times_slope(c.activation, value, y ? y[place] : T(0), h[place]);
      });
      __syncthreads();
      if (!c.norm) continue;
      T* sums = vector(tangent_, below.sums);
      batch_norm_backward<T>(q_, below.out, below.ld_out, to, array(at, below.query.xh, q_), vector(at, below.query.r),
                             theta_.fixed + below.at[kGain], to, sums, sums + below.ld_out);
      add_norm_sums(below, sums);
      __syncthreads();
    }
    add_cotangents(true, [&](int l) {
      const Layer& layer = c.layers[l];
      const T* h = l == 0 ? features(c.query) : array(at, layer.query.h, q_);
      const T* delta = array(deltas, layer.delta, q_);
      return Pair{{delta, layer.ld_out, h, l == 0 ? layer.in : layer.ld_in, q_}, {}, delta};
    });
  }

  // cotangent of the last layer's outputs: of the losses through them, and their own
  __device__ void loss_backward(int64_t s, const T* z, T* delta) {
    const Layer& layer = c.layers[last()];
    const bool labelled = c.d_losses && (c.query.labels || c.query.targets);
    const T scale = labelled ? static_cast<T>(mean_of(q_)) : T(0);
    const T weight = labelled ? c.d_losses[s * c.tasks + t] : T(0);
    const T* given = c.d_outputs ? c.d_outputs + (s * c.query.all + first(c.query)) * outputs() : nullptr;
    for_loss_rows<T>(c.loss, q_, outputs(), mask_, [&](int64_t row, const LossRow<T>& one) {
      T* d = delta + row * layer.ld_out;
      if (labelled)
        one.forward(z + row * layer.ld_out, loss_label(c.query, row), loss_targets(c.query, row), scale, nullptr, d);
      for (int o = one.lane; o < outputs(); o += one.lanes) {
        T value = labelled ? weight * d[o] : T(0);
        if (given && one.has(o)) value += given[row * outputs() + o];
        d[o] = value;
      }
    });
  }

  // what a layer's rows add to the cotangents: of its weight, and, by the derivatives `by_bias`, of its bias
  struct Pair {
    Outer<T> first, second;
    const T* by_bias;
  };
  template <class F>
  __device__ void add_cotangents(bool is_query, const F& of_layer) {
    for (int l = 0; l < c.num_layers; ++l) {
      const Layer& layer = c.layers[l];
      const Pair pair = of_layer(l);
      if (is_gram(l, kWeight)) {
        T* to = is_query ? query_u() : support_u();
        for_first_rows(pair.first.rows, [&](int64_t at, int64_t i) { to[i] += pair.by_bias[at]; });
      } else {
        T* weight = u_ + layer.at[kWeight];
        outer_products<T>(layer.out, layer.in, pair.first, pair.second, [&](int o, int i, T value) {
          weight[static_cast<int64_t>(o) * layer.ld_weight + i] += value;
        });
      }
      if (!bias_counts(l)) continue;
      for (int o = threadIdx.x; o < layer.out; o += blockDim.x)
        u_[layer.at[kBias] + o] += column_sum(pair.by_bias + o, layer.ld_out, pair.first.rows);
    }
  }

  // the cotangents of gain and shift, by the thread that has the channel
  __device__ void add_norm_sums(const Layer& layer, const T* sums) {
    for (int o = threadIdx.x; o < layer.out; o += blockDim.x) {
      u_[layer.at[kGain] + o] += sums[o];
      u_[layer.at[kShift] + o] += sums[layer.ld_out + o];
    }
  }

  __device__ void add_to_features(const Rows<T>& rows, int64_t num_rows, const Layer& layer, const Factors<T>& a,
                                  const Factors<T>& b) {
    if (!rows.x_gradient) return;
    T* to = rows.x_gradient + first(rows) * layer.in;
    products<T>(num_rows, layer.in, a, b, [&](int64_t row, int i, T value) { to[row * layer.in + i] += value; });
  }

  // The reverse of `step` but for the gradient's own dependence on theta_k: from the cotangents u of theta_{k+1} and w
  // of m,
  //
  //     s = w - a u,   r = scale * s (- the part through the norm),   u += weight_decay * s,   w = momentum * s,
  //
  // and the rates' gradients -u * m.
  __device__ void direction(int64_t k) {
    T *u = u_, *r = direction_;
    T* w = c.w.fixed_size ? view(c.w, 0).fixed : nullptr;
    const T* theta = theta_.fixed;
    const T* velocity = c.velocity.fixed_size ? in_device(c.velocity, k).fixed : nullptr;
    const bool clips = c.clip < INFINITY;
    double scale = 1, through_norm = 0;
    if (clips) {
      const double norm = sqrt(squares_of_gradient());
      scale = clip_factor(norm, c.clip);
      // the same for all threads
      if (scale != 1) {
        double s_dot_g = 0;
        for_params([&](int, int l, int kind, const Param<T>& param) {
          if (!param.moves) return;
          for_gradient(l, kind, [&](int64_t i, int64_t place, T g) {
            T s = -(rate(param, k, i) * u[place]);
            if (w) s += w[place];
            s_dot_g += static_cast<double>(s) * static_cast<double>(g);
          });
        });
        through_norm = clip_slope(norm, c.clip, block_sum(s_dot_g, room_));
      }
    }
    const T factor = static_cast<T>(scale), norm_factor = static_cast<T>(through_norm);
    double* const sums = room_ + blockDim.x / kWarp;
    for_params([&](int p, int l, int kind, const Param<T>& param) {
      if (!param.moves) {
        for_places(l, kind, [&](int64_t, int64_t place) { r[place] = 0; });
        return;
      }
      T* rate_u = param.rate_gradient ? in_device(c.rate_u, param.rate_step != 0 ? k : 0).fixed : nullptr;
      const bool by_rate = rate_u || c.rate_sums_wanted;
      double total = 0;
      const auto element = [&](int64_t i, int64_t place, T g) {
        if (by_rate) {
          T moved = factor * g;
          if (c.weight_decay != 0) moved += c.weight_decay * theta[place];
          if (velocity) moved = velocity[place];
          if (rate_u) rate_u[place] -= u[place] * moved;
          total -= static_cast<double>(u[place]) * static_cast<double>(moved);
        }
        T s = -(rate(param, k, i) * u[place]);
        if (w) s += w[place];
        T to = factor * s;
        if (through_norm != 0) to -= norm_factor * g;
        r[place] = to;
        if (c.weight_decay != 0) u[place] += c.weight_decay * s;
        if (w) w[place] = c.momentum * s;
      };
      if (is_gram(l, kind) && c.rate_sums_wanted) {
        const T* d = of_step(c.layers[0].d);
        for_features_times_cotangent([&](int64_t row, int o, T value) {
          total -= static_cast<double>(value) * static_cast<double>(d[row * c.layers[0].ld_out + o]);
        });
      }
      // the gradient is computed again only where something asks for it
      if (through_norm != 0 || (by_rate && !velocity)) {
        for_gradient(l, kind, element);
      } else {
        for_places(l, kind, [&](int64_t i, int64_t place) { element(i, place, T(0)); });
      }
      if (!c.rate_sums_wanted) return;
      total = warp_sum(total);
      if (threadIdx.x % kWarp == 0) sums[p * (blockDim.x / kWarp) + threadIdx.x / kWarp] = total;
    });
    if (!c.rate_sums_wanted) return;
    __syncthreads();
    for (int p = threadIdx.x; p < c.num_params; p += blockDim.x) {
      double total = 0;
      if (c.params[p].moves)
        for (unsigned warp = 0; warp < blockDim.x / kWarp; ++warp) total += sums[p * (blockDim.x / kWarp) + warp];
      c.rate_sums[(p * c.tasks + t) * c.steps + k] = total;
    }
  }

  // u += the Hessian of the support loss at theta_k times the direction, by the R-operator
  __device__ void hessian(int64_t k) {
    const T* v = direction_;
    for (int l = 0; l <= last(); ++l) {
      const Layer& layer = c.layers[l];
      const T* h = l == 0 ? features(c.support) : of_step(layer.support.h);
      const T* rh = l == 0 ? nullptr : of_tangent(layer.rh);
      const Layer& above = c.layers[l < last() ? l + 1 : l];
      T *ry = of_tangent(layer.ry), *rxh = of_tangent(layer.rxh), *rz = of_tangent(layer.rd);
      T* next = layer.hidden ? of_tangent(above.rh) : nullptr;
      const T *y = of_step(layer.support.y), *out = layer.hidden ? of_step(above.support.h) : nullptr;
      const bool norm = has_norm(l);
      const T* bias = bias_counts(l) ? v + layer.at[kBias] : nullptr;
      Factors<T> through{}, moved{};
      if (l > 0) through = product_with_weight(l, rh, layer.ld_in, true);
      if (param(l, kWeight).moves)
        moved = {h,
                 l == 0 ? layer.in : layer.ld_in,
                 l > 0 || c.support.quads,
                 v + layer.at[kWeight],
                 1,
                 layer.ld_weight,
                 layer.in};
      const auto output = [&](int64_t row, int o, T value) {
        if (bias) value += bias[o];
        const int64_t at = row * layer.ld_out + o;
        if (!layer.hidden) {
          rz[at] = value;
        } else if (norm) {
          rxh[at] = value;
        } else {
          if (ry) ry[at] = value;
          next[at] = times_slope(c.activation, value, y ? y[at] : T(0), out[at]);
        }
      };
      if (is_gram(l, kWeight)) {
        const Param<T>& weight = param(l, kWeight);
        const T scaled = weight.moves ? -rate(weight, k, 0) : T(0);
        for_features_times_cotangent([&](int64_t row, int o, T value) { output(row, o, scaled * value); });
      } else {
        products<T>(n_, layer.out, through, moved, output);
      }
      __syncthreads();
      if (!norm) continue;
      T* to = ry ? ry : next;
      batch_norm_tangent<T>(n_, layer.out, layer.ld_out, rxh, of_step(layer.support.xh),
                            vector(record_, layer.support.r), theta_.fixed + layer.at[kGain], v + layer.at[kGain],
                            v + layer.at[kShift], rxh, vector(tangent_, layer.rr), to);
      for_channel_rows(layer, n_,
                       [&](int64_t at) { next[at] = times_slope(c.activation, to[at], y ? y[at] : T(0), out[at]); });
      __syncthreads();
    }
    const Layer& top = c.layers[last()];
    const T mean = static_cast<T>(mean_of(n_));
    for_loss_rows<T>(c.loss, n_, outputs(), mask_, [&](int64_t row, const LossRow<T>& one) {
      one.tangent(of_step(top.support.z) + row * top.ld_out, mean, of_tangent(top.rd) + row * top.ld_out);
    });
    __syncthreads();
    for (int l = last(); l >= 0; --l) {
      const Layer& layer = c.layers[l];
      const T *rd = of_tangent(layer.rd), *d = of_step(layer.d);
      const Factors<T> through = product_back(l, rd, theta_.fixed);
      Factors<T> moved{};
      if (param(l, kWeight).moves) moved = product_back(l, d, v);
      if (l == 0) {
        add_to_features(c.support, n_, layer, through, moved);
        break;
      }
      const Layer& below = c.layers[l - 1];
      const T *h = of_step(layer.support.h), *y = of_step(below.support.y), *e = of_step(below.e),
              *ry = of_tangent(below.ry);
      T* to = of_tangent(below.rd);
      products<T>(n_, layer.in, through, moved, [&](int64_t row, int i, T value) {
        const int64_t at = row * layer.ld_in + i;
        const T input = y ? y[at] : T(0);
        to[at] = c.act_is_linear ? times_slope(c.activation, value, input, h[at])
                                 : slope_tangent(c.activation, value, e[at], ry[at], input, h[at]);
      });
      __syncthreads();
      if (!c.norm) continue;
      T* sums = vector(tangent_, below.sums);
      batch_norm_backward_tangent<T>(n_, below.out, below.ld_out, of_step(below.dy), to, of_step(below.support.xh),
                                     of_tangent(below.rxh), vector(record_, below.support.r),
                                     vector(tangent_, below.rr), theta_.fixed + below.at[kGain], v + below.at[kGain],
                                     to, sums, sums + below.ld_out);
      add_norm_sums(below, sums);
      __syncthreads();
    }
    add_cotangents(false, [&](int l) {
      const Layer& layer = c.layers[l];
      const T *rd = of_tangent(layer.rd), *d = of_step(layer.d);
      if (l == 0) return Pair{{rd, layer.ld_out, features(c.support), layer.in, n_}, {}, rd};
      return Pair{{rd, layer.ld_out, of_step(layer.support.h), layer.ld_in, n_},
                  {d, layer.ld_out, of_tangent(layer.rh), layer.ld_in, n_},
                  rd};
    });
  }

  __device__ void finish_backward() {
    // for the sums over tasks
    save(c.u, 0);
    for_params([&](int, int l, int kind, const Param<T>& param) {
      if (!param.gradient || param.task_stride == 0) return;
      T* to = param.gradient + t * param.task_stride;
      for_places(l, kind, [&](int64_t i, int64_t place) { to[i] = u_[place]; });
    });
  }
};

}  // namespace mtml::cuda
