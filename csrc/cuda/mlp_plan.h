// Where the arrays of a call of mlp_adapt lie, decided on the host by sizes alone.
#pragma once

#include <algorithm>
#include <vector>

#include "cuda/mlp_network.h"
// for what an activation asks for
#include "cuda/mlp_block.h"

// a test may take fewer
#ifndef MTML_MLP_THREADS
#define MTML_MLP_THREADS 256
#endif

namespace mtml::cuda {

constexpr int kThreads = MTML_MLP_THREADS;

constexpr int64_t up_to_four(int64_t n) { return (n + 3) / 4 * 4; }

template <class T>
class Plan {
 public:
  Network<T> network{};
  int64_t shared_bytes = 0;

  Plan(const MlpArguments<T>& arguments, const MlpGram<T>* gram, bool keeps, bool is_backward)
      : a(arguments), keeps_(keeps), is_backward_(is_backward) {
    const MlpOptions& o = a.options;
    Network<T>& c = network;
    c.num_layers = static_cast<int>(o.layers);
    c.num_params = static_cast<int>(a.num_params);
    c.tasks = o.tasks;
    c.steps = o.steps;
    c.evaluations = o.every_step ? o.steps + 1 : 1;
    c.loss = o.loss;
    c.activation = o.activation;
    c.norm = o.norm;
    c.first_order = o.first_order;
    c.every_step = o.every_step;
    c.act_is_linear = is_linear(o.activation);
    c.norm_eps = o.norm_eps;
    c.clip = o.clip;
    c.momentum = static_cast<T>(o.momentum);
    c.weight_decay = static_cast<T>(o.weight_decay);
    c.support = rows_of(a.support);
    c.query = rows_of(a.query);
    c.class_mask = a.class_mask;
    c.outputs = a.outputs;
    c.losses = a.losses;
    c.fast = a.fast;
    c.d_outputs = a.d_outputs;
    c.d_losses = a.d_losses;
    c.d_fast = a.d_fast;
    c.is_gram = gram != nullptr;
    if (gram) c.gram = *gram;
    lay_out_layers();
    lay_out_rooms();
  }

  // ---- the forward sweep's memory and the reverse's; these give addresses and count

  int64_t place_state(T* state) {
    Counter room{state};
    Network<T>& c = network;
    for (Room<T>* of : {&c.theta, &c.record, &c.evaluation, &c.velocity}) room.take(*of, c);
    if (is_backward_) return room.count;
    room.take(c.w, c);
    room.take(c.moved, c);
    return room.count;
  }

  // in doubles
  int64_t place_workspace(double* workspace) {
    Network<T>& c = network;
    // behind it arrays are read by fours
    const int64_t sums = a.wants_rates ? up_to_four(c.num_params * c.tasks * c.steps) : 0;
    c.rate_sums = workspace;
    Counter room{workspace ? reinterpret_cast<T*>(workspace + sums) : nullptr};
    for (Room<T>* of : {&c.u, &c.direction, &c.tangent, &c.delta, &c.w, &c.rate_u}) room.take(*of, c);
    return sums + (room.count * static_cast<int64_t>(sizeof(T)) + 7) / 8;
  }

  // what of the rooms fits into a block's shared memory, those first that are read most
  void place_shared(int64_t limit_bytes) {
    Network<T>& c = network;
    c.shared_doubles = kThreads / kWarp * (1 + (c.rate_sums_wanted ? c.num_params : 0));
    c.shared_doubles += c.shared_doubles % 2;  // so that what follows may be read by fours
    const int64_t doubles = c.shared_doubles * static_cast<int64_t>(sizeof(double));
    const int64_t limit = (limit_bytes - doubles) / static_cast<int64_t>(sizeof(T));
    int64_t used = 0;
    std::vector<Room<T>*> order = {&c.theta, &c.moved, &c.record, &c.evaluation, &c.w};
    if (is_backward_) order = {&c.theta, &c.direction, &c.record, &c.tangent, &c.u, &c.delta, &c.evaluation, &c.w};
    for (Room<T>* room : order) {
      const Rows<T>& rows = room->is_query ? c.query : c.support;
      const bool known = room->row_size == 0 || (!rows.offsets && rows.count > 0);
      const int64_t size = room->fixed_size + room->row_size * rows.count;
      if (!known || size == 0 || size > limit - used) continue;
      room->shared = used;
      used += size;
    }
    shared_bytes = doubles + used * static_cast<int64_t>(sizeof(T));
  }

 private:
  const MlpArguments<T>& a;
  const bool keeps_, is_backward_;
  // vectors and rows so far, of a step, of an evaluation and of the reverse
  int record_fixed_ = 0, record_rows_ = 0, evaluation_fixed_ = 0, evaluation_rows_ = 0, tangent_fixed_ = 0,
      tangent_rows_ = 0, delta_rows_ = 0;

  // addresses one after the other
  struct Counter {
    T* base;
    int64_t count = 0;

    void take(Room<T>& room, const Network<T>& c) {
      const Rows<T>& rows = room.is_query ? c.query : c.support;
      room.fixed = base && room.fixed_size ? base + count : nullptr;
      count += c.tasks * room.slots * room.fixed_size;
      room.rows = base && room.row_size ? base + count : nullptr;
      count += rows.all * room.slots * room.row_size;
    }
  };

  Rows<T> rows_of(const MlpRows<T>& rows) const {
    const bool quads = a.options.widths[0] % 4 == 0 && reinterpret_cast<uintptr_t>(rows.x) % 16 == 0;
    return {rows.x,        rows.labels,     rows.targets, rows.offsets, rows.offsets ? 0 : rows.max_rows,
            rows.all_rows, rows.x_gradient, quads};
  }

  static int take(int* so_far, int size) {
    const int place = *so_far;
    *so_far += size;
    return place;
  }

  void lay_out_layers() {
    Network<T>& c = network;
    const MlpOptions& o = a.options;
    const bool keeps_y = needs_input(o.activation);
    const bool second = !c.act_is_linear && !o.first_order;
    int p = 0;
    for (int l = 0; l < c.num_layers; ++l) {
      Layer& layer = c.layers[l];
      layer.in = static_cast<int>(o.widths[l]);
      layer.out = static_cast<int>(o.widths[l + 1]);
      layer.ld_in = static_cast<int>(up_to_four(layer.in));
      layer.ld_out = static_cast<int>(up_to_four(layer.out));
      // odd, so that neither a column's nor a row's elements share a bank of shared memory
      layer.ld_weight = layer.in | 1;
      layer.hidden = l + 1 < c.num_layers;
      const bool norm = o.norm && layer.hidden;
      const bool has[kKinds] = {true, o.bias, norm, norm};
      for (int kind = 0; kind < kKinds; ++kind) {
        layer.at[kind] = kAbsent;
        c.param[l][kind] = kAbsent;
        if (!has[kind]) continue;
        const MlpParameter<T>& from = a.params[p];
        const int64_t size = kind == kWeight ? static_cast<int64_t>(layer.out) * layer.in : layer.out;
        c.params[p] = {from.start,
                       from.task_stride,
                       from.moves,
                       from.rate,
                       from.rate_step,
                       from.rate_element,
                       from.gradient,
                       from.rate_gradient,
                       size,
                       0,
                       l,
                       kind};
        c.param[l][kind] = p++;
        c.fast_size += size;
        if (c.is_gram && l == 0 && kind == kWeight) continue;
        layer.at[kind] = c.theta_size;
        c.theta_size += up_to_four(kind == kWeight ? static_cast<int64_t>(layer.out) * layer.ld_weight : layer.out);
      }

      for (const bool is_query : {false, true}) {
        LayerRows& places = is_query ? layer.query : layer.support;
        int* rows = is_query ? &evaluation_rows_ : &record_rows_;
        int* fixed = is_query ? &evaluation_fixed_ : &record_fixed_;
        places.h = l > 0 ? take(rows, layer.ld_in) : kAbsent;
        places.y = layer.hidden && keeps_y ? take(rows, layer.ld_out) : kAbsent;
        places.xh = norm ? take(rows, layer.ld_out) : kAbsent;
        places.z = layer.hidden ? kAbsent : take(rows, layer.ld_out);
        places.r = norm ? take(fixed, layer.ld_out) : kAbsent;
      }
      layer.d = take(&record_rows_, layer.ld_out);
      layer.dy = norm ? take(&record_rows_, layer.ld_out) : kAbsent;
      layer.e = layer.hidden && second ? take(&record_rows_, layer.ld_out) : kAbsent;
      layer.dgain = norm ? take(&record_fixed_, layer.ld_out) : kAbsent;
      layer.dshift = norm ? take(&record_fixed_, layer.ld_out) : kAbsent;
      layer.rh = l > 0 ? take(&tangent_rows_, layer.ld_in) : kAbsent;
      layer.ry = layer.hidden && second ? take(&tangent_rows_, layer.ld_out) : kAbsent;
      layer.rxh = norm ? take(&tangent_rows_, layer.ld_out) : kAbsent;
      layer.rd = take(&tangent_rows_, layer.ld_out);
      layer.rr = norm ? take(&tangent_fixed_, layer.ld_out) : kAbsent;
      layer.sums = norm ? take(&tangent_fixed_, 2 * layer.ld_out) : kAbsent;
      layer.delta = take(&delta_rows_, layer.ld_out);
    }
  }

  void lay_out_rooms() {
    Network<T>& c = network;
    bool per_step = false, per_element = false;
    for (int64_t p = 0; p < a.num_params; ++p) {
      if (!a.params[p].rate_gradient) continue;
      per_element = true;
      per_step = per_step || a.params[p].rate_step != 0;
    }
    c.rate_sums_wanted = is_backward_ && a.wants_rates && a.params[0].rate_element == 0;
    const bool momentum = a.options.momentum != 0;
    const int64_t all = kAbsent;
    const auto room = [&](int64_t fixed, int64_t rows, int64_t slots, bool is_query) {
      return Room<T>{fixed, rows, slots, all, is_query, nullptr, nullptr};
    };
    c.theta = room(c.theta_size, 0, keeps_ ? c.steps + 1 : 1, false);
    c.record = room(record_fixed_, record_rows_, keeps_ ? c.steps : 1, false);
    c.evaluation = room(evaluation_fixed_, evaluation_rows_, keeps_ ? c.evaluations : 1, true);
    c.velocity = room(momentum && keeps_ && a.wants_rates ? c.theta_size : 0, 0, c.steps, false);
    c.w = room(momentum ? c.theta_size : 0, 0, 1, false);
    c.moved = room(0, c.is_gram ? c.layers[0].ld_out : 0, 1, false);
    c.u = room(c.theta_size, 0, 1, false);
    c.direction = room(c.theta_size, 0, 1, false);
    c.tangent = room(tangent_fixed_, c.first_order ? 0 : tangent_rows_, 1, false);
    c.delta = room(0, delta_rows_, 1, true);
    c.rate_u = room(per_element ? c.theta_size : 0, 0, per_step ? c.steps : 1, false);
    if (!per_element) c.rate_u.slots = 0;
  }
};

}  // namespace mtml::cuda
