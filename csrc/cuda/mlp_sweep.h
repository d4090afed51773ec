// The sweeps of mlp_adapt for one task, by one block of threads: K inner steps and the query rows forward
// (mlp_forward.h), and the exact reverse of it all (mlp_backward.h, docs/maths/mlp_adapt.md), every layer but a large
// first one in dense form. What a phase leaves for others is behind a barrier; within a phase a thread reads what
// others wrote before it, and writes what nobody else does.
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

  __device__ void forward();
  __device__ void backward();

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

  // ---- what phases are made of

  __device__ Batch support() const { return {features(c.support), n_, c.support.quads, false, record_}; }
  __device__ Batch query(const View& at) const { return {features(c.query), q_, c.query.quads, true, at}; }

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

  __device__ static T rate(const Param<T>& param, int64_t k, int64_t i) {
    return param.rate[k * param.rate_step + i * param.rate_element];
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

  // ---- the phases: mlp_forward.h

  __device__ void start();
  __device__ void layers(const Batch& batch);
  __device__ void loss_of_support();
  __device__ void layers_backward();
  __device__ void step(int64_t k);
  __device__ void evaluate(int64_t s);
  __device__ void write_parameters(const T* vector, T* to) const;

  // ---- and mlp_backward.h

  __device__ void start_backward();
  __device__ void zero_features(const Rows<T>& rows) const;
  __device__ void evaluate_backward(int64_t s);
  __device__ void loss_backward(int64_t s, const T* z, T* delta);
  __device__ void direction(int64_t k);
  __device__ void hessian(int64_t k);
  __device__ void finish_backward();
};

}  // namespace mtml::cuda
