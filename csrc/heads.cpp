#include "heads.h"

#include <algorithm>
#include <vector>

#include "check.h"
#include "isa/choose.h"
#include "memory.h"

namespace mtml {
namespace {

// A task's rows are one part, or several of at least so many rows, whose sums are added in their order: how many is a
// matter of the task alone, not of the threads.
constexpr int64_t kPartRows = 2048, kParts = 32;

struct Part {
  int64_t task, begin, end;  // rows
  int64_t sums;              // elements before its own sums; -1: the task's only part, which writes the results
};

// where the values of a task begin, and x of the part
template <class T, class V>
HeadTensors<V> of_part(const HeadsBatch<T>& b, const HeadTensors<V>& all, int64_t task, int64_t row) {
  const int64_t out = b.out_offsets[task], inner = b.hidden ? b.hidden : b.features;
  const auto at = [](V* values, int64_t element) { return values ? values + element : nullptr; };
  return {at(all.x, row * b.features), at(all.weight, out * inner), at(all.bias, out),
          at(all.hidden_weight, task * b.hidden * b.features), at(all.hidden_bias, task * b.hidden)};
}

// f(values, their number) for every parameter of a task
template <class T, class V, class F>
void for_each_parameter(const HeadsBatch<T>& b, const HeadTensors<V>& of_task, int64_t outputs, const F& f) {
  f(of_task.weight, outputs * (b.hidden ? b.hidden : b.features));
  f(of_task.bias, outputs);
  f(of_task.hidden_weight, b.hidden * b.features);
  f(of_task.hidden_bias, b.hidden);
}

// Asks for memory ahead of its use, where it is little.
template <class V>
void fetch(const V* values, int64_t n) {
  constexpr int64_t kLine = 64 / sizeof(V), kMost = (16 << 10) / sizeof(V);
  if (!values || n > kMost) return;
  for (int64_t i = 0; i < n; i += kLine) __builtin_prefetch(values + i);
}

// The parts of a batch, and the sums of those that share a task.
template <class T>
class Parts {
 public:
  Parts(const HeadsBatch<T>& batch, const HeadTensors<T>& gradient)
      : b_(batch), gradient_(gradient), fewest_(INT64_MAX), sums_(plan()) {}

  int64_t count() const { return static_cast<int64_t>(parts_.size()); }

  // f(part's index, its place, call, gradient, scratch) for all parts; `factor` times the operations of a forward pass
  template <class F>
  void run(const Threads& threads, double factor, bool second, const F& f) {
    const double inner = static_cast<double>(b_.hidden ? b_.hidden : b_.features);
    const double operations = 2 * (static_cast<double>(b_.rows()) * b_.features * b_.hidden +
                                   inner * static_cast<double>(b_.z_offsets[b_.tasks]));
    Phases phases(threads, factor * operations);
    const Heads<T>& core = kernels().heads<T>();
    const int64_t scratch_size = count() ? core.scratch(b_.features, b_.hidden, fewest_, most_, second) : 0;
    phases.then(count(), 1, [&](int64_t begin, int64_t end) {
      Memory<T> scratch(scratch_size);
      for (int64_t i = begin; i < end; ++i) {
        const Part& part = parts_[i];
        if (i + 1 < end) fetch_head(parts_[i + 1].task);
        const HeadCall<T> call = {part.end - part.begin, b_.features,   b_.hidden,
                                  outputs_of(part.task), b_.activation, of_part(b_, b_.in, part.task, part.begin)};
        f(i, part, core, call, part.sums < 0 ? of_part(b_, gradient_, part.task, part.begin) : sums_of(part), scratch);
      }
    });
    phases.then(static_cast<int64_t>(divided_.size()), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) add_sums(divided_[i]);
    });
    phases.run();
  }

 private:
  const HeadsBatch<T>& b_;
  const HeadTensors<T>& gradient_;
  std::vector<Part> parts_;
  std::vector<int64_t> divided_;  // the first part of each task that has several
  int64_t fewest_, most_ = 0;     // outputs of a task
  Memory<T> sums_;

  int64_t outputs_of(int64_t task) const { return b_.out_offsets[task + 1] - b_.out_offsets[task]; }

  // A small head is read once and its gradient written once: memory is what it would wait for.
  void fetch_head(int64_t task) const {
    const auto ask = [](const auto* values, int64_t size) { fetch(values, size); };
    for_each_parameter(b_, of_part(b_, b_.in, task, 0), outputs_of(task), ask);
    for_each_parameter(b_, of_part(b_, gradient_, task, 0), outputs_of(task), ask);
  }

  // lists the parts; the size of all their sums
  int64_t plan() {
    parts_.reserve(b_.tasks);
    int64_t sums = 0;
    for (int64_t t = 0; t < b_.tasks; ++t) {
      const int64_t begin = b_.offsets[t], rows = b_.offsets[t + 1] - begin, outputs = outputs_of(t);
      if (rows == 0) {
        for_each_parameter(b_, of_part(b_, gradient_, t, begin), outputs, [](T* values, int64_t size) {
          if (values) std::fill_n(values, size, T(0));
        });
        continue;
      }
      fewest_ = std::min(fewest_, outputs);
      most_ = std::max(most_, outputs);
      const int64_t parts = std::clamp<int64_t>(rows / kPartRows, 1, kParts);
      if (parts > 1) divided_.push_back(count());
      for (int64_t p = 0; p < parts; ++p) {
        parts_.push_back({t, begin + rows * p / parts, begin + rows * (p + 1) / parts, parts > 1 ? sums : -1});
        if (parts == 1) continue;
        for_each_parameter(b_, of_part(b_, gradient_, t, begin), outputs, [&sums](T* values, int64_t size) {
          if (values) sums += size;
        });
      }
    }
    return sums;
  }

  // where a part of several leaves its sums
  HeadTensors<T> sums_of(const Part& part) {
    HeadTensors<T> to = of_part(b_, gradient_, part.task, part.begin);
    T* next = sums_ + part.sums;
    const auto place = [&next](T*& values, int64_t size) {
      if (!values) return;
      values = next;
      next += size;
    };
    const int64_t outputs = outputs_of(part.task);
    place(to.weight, outputs * (b_.hidden ? b_.hidden : b_.features));
    place(to.bias, outputs);
    place(to.hidden_weight, b_.hidden * b_.features);
    place(to.hidden_bias, b_.hidden);
    return to;
  }

  void add_sums(int64_t first) {
    const int64_t task = parts_[first].task, outputs = outputs_of(task);
    int64_t last = first;
    while (last < count() && parts_[last].task == task) ++last;
    const int64_t size = last - first > 1 ? parts_[first + 1].sums - parts_[first].sums : 0;
    const T* from = sums_ + parts_[first].sums;
    for_each_parameter(b_, of_part(b_, gradient_, task, 0), outputs, [&](T* values, int64_t n) {
      if (!values) return;
      for (int64_t i = 0; i < n; ++i) {
        T total = from[i];
        for (int64_t p = 1; p < last - first; ++p) total += from[p * size + i];
        values[i] = total;
      }
      from += n;
    });
  }
};

// What a task's rows count: what the sum of their losses is divided by.
template <class T>
double count_of(const HeadsBatch<T>& b, const HeadsTargets<T>& targets, int64_t task) {
  const int64_t begin = b.offsets[task], end = b.offsets[task + 1];
  const int64_t outputs = b.out_offsets[task + 1] - b.out_offsets[task];
  double count = 0;
  if (targets.loss(task) == HeadLoss::kCrossEntropy) {
    const T* weights = targets.class_weights ? targets.class_weights + b.out_offsets[task] : nullptr;
    int64_t rows = 0;
    for (int64_t row = begin; row < end; ++row) {
      const int64_t label = targets.labels[row];
      if (label == targets.ignore_index || (targets.row_mask && !targets.row_mask[row])) continue;
      MTML_CHECK(label >= 0 && label < outputs, "y must be in 0..", outputs - 1, " in row ", row, ", got ", label);
      ++rows;
      if (weights) count += weights[label];
    }
    return weights ? count : static_cast<double>(rows);
  }
  if (targets.output_mask) {
    const bool* mask = targets.output_mask + b.z_offsets[task];
    return static_cast<double>(std::count(mask, mask + (end - begin) * outputs, true));
  }
  const int64_t rows =
      targets.row_mask ? std::count(targets.row_mask + begin, targets.row_mask + end, true) : end - begin;
  return static_cast<double>(rows * outputs);
}

}  // namespace

template <class T>
void heads_forward(const HeadsBatch<T>& b, T* z, Threads threads) {
  const HeadTensors<T> none{};
  Parts<T> parts(b, none);
  parts.run(
      threads, 1, false, [&](int64_t, const Part& part, auto& core, auto& call, const HeadTensors<T>&, T* scratch) {
        core.forward(call, z + b.z_offsets[part.task] + (part.begin - b.offsets[part.task]) * call.outputs, scratch);
      });
}

template <class T>
void heads_backward(const HeadsBatch<T>& b, const T* q, const HeadTensors<T>& gradient, Threads threads) {
  Parts<T> parts(b, gradient);
  parts.run(threads, 3, false,
            [&](int64_t, const Part& part, auto& core, auto& call, const HeadTensors<T>& to, T* scratch) {
              core.backward(call, q + b.z_offsets[part.task] + (part.begin - b.offsets[part.task]) * call.outputs, to,
                            scratch);
            });
}

template <class T>
void heads_double_backward(const HeadsBatch<T>& b, const T* q, const HeadTensors<const T>& cotangent, T* d_q,
                           const HeadTensors<T>& gradient, Threads threads) {
  HeadTensors<T> moving = gradient;
  moving.bias = nullptr;
  if (gradient.bias) std::fill_n(gradient.bias, b.outputs(), T(0));
  Parts<T> parts(b, moving);
  parts.run(threads, 8, true,
            [&](int64_t, const Part& part, auto& core, auto& call, const HeadTensors<T>& to, T* scratch) {
              const int64_t at = b.z_offsets[part.task] + (part.begin - b.offsets[part.task]) * call.outputs;
              core.double_backward(call, q + at, of_part(b, cotangent, part.task, part.begin), d_q ? d_q + at : nullptr,
                                   to, scratch);
            });
}

template <class T>
void heads_loss(const HeadsBatch<T>& b, const HeadsTargets<T>& targets, T* losses, const T* d_losses,
                const HeadTensors<T>& gradient, Threads threads) {
  // refuses labels, so before anything is written
  std::vector<double> counts(b.tasks);
  for (int64_t t = 0; t < b.tasks; ++t) counts[t] = count_of(b, targets, t);
  Parts<T> parts(b, gradient);
  std::vector<double> sums(parts.count());
  std::vector<int64_t> task_of(parts.count());
  const bool wants = gradient.x || gradient.weight || gradient.bias || gradient.hidden_weight || gradient.hidden_bias;
  parts.run(threads, wants ? 3 : 1, false,
            [&](int64_t i, const Part& part, auto& core, auto& call, const HeadTensors<T>& to, T* scratch) {
              const int64_t t = part.task, row = part.begin - b.offsets[t], at = b.z_offsets[t] + row * call.outputs;
              const HeadTargets<T> own = {targets.loss(t),
                                          targets.labels ? targets.labels + part.begin : nullptr,
                                          targets.targets ? targets.targets + at : nullptr,
                                          targets.row_mask ? targets.row_mask + part.begin : nullptr,
                                          targets.output_mask ? targets.output_mask + at : nullptr,
                                          targets.class_weights ? targets.class_weights + b.out_offsets[t] : nullptr,
                                          targets.label_smoothing,
                                          targets.ignore_index,
                                          targets.delta};
              const double scale = counts[t] == 0 ? 0 : (d_losses ? static_cast<double>(d_losses[t]) : 1) / counts[t];
              task_of[i] = t;
              sums[i] = core.loss(call, own, scale, to, scratch);
            });
  std::vector<double> totals(b.tasks);
  for (size_t i = 0; i < sums.size(); ++i) totals[task_of[i]] += sums[i];
  for (int64_t t = 0; t < b.tasks; ++t) losses[t] = static_cast<T>(counts[t] == 0 ? 0 : totals[t] / counts[t]);
}

template <class T>
void heads_scale(const HeadsBatch<T>& b, const T* d_losses, const HeadTensors<T>& gradient, Threads threads) {
  if (std::all_of(d_losses, d_losses + b.tasks, [](T d) { return d == 1; })) return;
  const double elements = static_cast<double>(b.rows()) * b.features;
  Phases phases(threads, elements);
  phases.then(b.tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const HeadTensors<T> own = of_part(b, gradient, t, b.offsets[t]);
      const auto scale = [d = d_losses[t]](T* values, int64_t n) {
        for (int64_t i = 0; values && i < n; ++i) values[i] *= d;
      };
      scale(own.x, (b.offsets[t + 1] - b.offsets[t]) * b.features);
      for_each_parameter(b, own, b.out_offsets[t + 1] - b.out_offsets[t], scale);
    }
  });
  phases.run();
}

#define HEADS_OF(T)                                                                                              \
  template void heads_forward<T>(const HeadsBatch<T>&, T*, Threads);                                             \
  template void heads_backward<T>(const HeadsBatch<T>&, const T*, const HeadTensors<T>&, Threads);               \
  template void heads_double_backward<T>(const HeadsBatch<T>&, const T*, const HeadTensors<const T>&, T*,        \
                                         const HeadTensors<T>&, Threads);                                        \
  template void heads_loss<T>(const HeadsBatch<T>&, const HeadsTargets<T>&, T*, const T*, const HeadTensors<T>&, \
                              Threads);                                                                          \
  template void heads_scale<T>(const HeadsBatch<T>&, const T*, const HeadTensors<T>&, Threads);
HEADS_OF(float)
HEADS_OF(double)
#undef HEADS_OF

}  // namespace mtml
