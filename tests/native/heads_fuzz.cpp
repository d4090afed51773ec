// heads and heads_loss under a sanitizer: random rows, widths, outputs, losses and masks, each result held against
// plain loops (heads_truth.h), one thread against many and a task alone against the batch, bit by bit. `make sanitize`
// builds and runs it; arguments: number of configurations, seed.
#include <array>
#include <stdexcept>

#include "heads_truth.h"

using namespace mtml;

namespace {

// What HeadTensors points to, in its order, in memory of exactly the right size; an empty one is absent.
constexpr int kTensors = 5;
template <class T>
using Values = std::array<std::vector<T>, kTensors>;

template <class T>
HeadTensors<T> pointers(Values<T>& of) {
  return {of[0].data(), of[1].data(), of[2].data(), of[3].data(), of[4].data()};
}
template <class T>
HeadTensors<const T> pointers(const Values<T>& of) {
  return {of[0].data(), of[1].data(), of[2].data(), of[3].data(), of[4].data()};
}

// What the calls on one problem give.
template <class T>
struct Results {
  std::vector<T> z, d_q, losses, values;
  Values<T> backward, second, of_loss, scaled;
};

template <class T>
struct Problem {
  int64_t tasks, features, hidden;
  Activation activation;
  std::vector<int64_t> offsets{0}, out_offsets{0}, z_offsets{0};
  Values<T> in, cotangent;
  std::vector<T> q, d_losses;

  std::vector<int64_t> loss_of_task, labels;
  bool one_loss = false;
  std::vector<T> targets, class_weights;
  std::vector<char> row_mask, output_mask;
  double label_smoothing, delta;
  int64_t ignore_index;

  bool wants[kTensors], wants_d_q;

  Problem() = default;
  explicit Problem(Random& r) {
    draw_sizes(r);
    draw_values(r);
    draw_targets(r);
  }

  int64_t rows(int64_t t) const { return offsets[t + 1] - offsets[t]; }
  int64_t outputs(int64_t t) const { return out_offsets[t + 1] - out_offsets[t]; }

  HeadsBatch<T> batch() const {
    return {tasks, features, hidden, offsets.data(), out_offsets.data(), z_offsets.data(), activation, pointers(in)};
  }

  HeadsTargets<T> to() const {
    const auto of = [](const auto& values) { return values.empty() ? nullptr : values.data(); };
    const auto mask = [&](const std::vector<char>& values) { return reinterpret_cast<const bool*>(of(values)); };
    return {loss_of_task.data(), one_loss,          of(labels),      of(targets),  mask(row_mask),
            mask(output_mask),   of(class_weights), label_smoothing, ignore_index, delta};
  }

  // elements before task t of each of the tensors, up to T
  int64_t begin(int tensor, int64_t t) const {
    const int64_t inner = hidden ? hidden : features;
    const int64_t begins[] = {offsets[t] * features, out_offsets[t] * inner, out_offsets[t], t * hidden * features,
                              t * hidden};
    return begins[tensor];
  }
  Values<T> part_of(const Values<T>& all, int64_t t) const {
    Values<T> result;
    for (int i = 0; i < kTensors; ++i) result[i] = part(all[i], begin(i, t), begin(i, t + 1) - begin(i, t));
    return result;
  }
  std::vector<T> of_outputs(const std::vector<T>& all, int64_t t) const {
    return part(all, z_offsets[t], z_offsets[t + 1] - z_offsets[t]);
  }

  Problem alone(int64_t t) const {
    Problem one = *this;
    one.tasks = 1;
    one.offsets = {0, rows(t)};
    one.out_offsets = {0, outputs(t)};
    one.z_offsets = {0, rows(t) * outputs(t)};
    one.in = part_of(in, t);
    one.cotangent = part_of(cotangent, t);
    one.q = of_outputs(q, t);
    one.d_losses = part(d_losses, t, 1);
    one.loss_of_task = {loss_of_task[one_loss ? 0 : t]};
    one.labels = part(labels, offsets[t], rows(t));
    one.row_mask = part(row_mask, offsets[t], rows(t));
    one.targets = of_outputs(targets, t);
    one.output_mask = part(output_mask, z_offsets[t], z_offsets[t + 1] - z_offsets[t]);
    one.class_weights = part(class_weights, out_offsets[t], outputs(t));
    return one;
  }

  Values<T> room_for_wanted() const {
    Values<T> result;
    for (int i = 0; i < kTensors; ++i) {
      // those of the parameters that there are, x and the weight always
      if (wants[i] && (i < 2 || !in[i].empty())) result[i] = room<T>(begin(i, tasks));
    }
    return result;
  }

  Results<T> run() const {
    const HeadsBatch<T> b = batch();
    Results<T> results{room<T>(z_offsets[tasks]),
                       room<T>(wants_d_q ? z_offsets[tasks] : 0),
                       room<T>(tasks),
                       room<T>(tasks),
                       room_for_wanted(),
                       room_for_wanted(),
                       room_for_wanted(),
                       room_for_wanted()};
    heads_forward(b, results.z.data(), threads());
    heads_backward(b, q.data(), pointers(results.backward), threads());
    heads_double_backward(b, q.data(), pointers(cotangent), wants_d_q ? results.d_q.data() : nullptr,
                          pointers(results.second), threads());
    heads_loss(b, to(), results.losses.data(), d_losses.data(), pointers(results.of_loss), threads());
    // the losses alone, and their gradients for cotangents that come later
    heads_loss<T>(b, to(), results.values.data(), nullptr, {}, threads());
    expect(same_bits(results.values, results.losses), "losses alone");
    heads_loss<T>(b, to(), results.values.data(), nullptr, pointers(results.scaled), threads());
    expect(same_bits(results.values, results.losses), "losses without cotangents");
    heads_scale(b, d_losses.data(), pointers(results.scaled), threads());
    return results;
  }

 private:
  void draw_sizes(Random& r) {
    const auto width = [&] { return r.integer(1, r.chance(0.25) ? 70 : 18); };
    tasks = r.chance(0.05) ? 0 : r.integer(1, 6);
    features = r.chance(0.05) ? 0 : width();
    hidden = r.chance(0.5) ? 0 : width();
    activation = static_cast<Activation>(r.integer(0, 9));
    const int64_t one_width = r.chance(0.3) ? width() : -1;
    // many outputs; several blocks of rows, also by their width; several parts of a task
    enum { kPlain, kOutputs, kBlocks, kWide, kParts };
    const int64_t draw = r.integer(0, 39);
    const int64_t form = draw < 2 ? kOutputs : draw < 5 ? kBlocks : draw < 6 ? kWide : draw < 7 ? kParts : kPlain;
    if (form != kPlain) tasks = r.integer(1, 3);
    if (form == kBlocks || form == kParts) features = r.integer(1, 6), hidden = r.chance(0.5) ? 0 : r.integer(1, 6);
    if (form == kWide) features = r.integer(250, 400), hidden = r.chance(0.5) ? 0 : r.integer(1, 6);
    if (form == kOutputs) features = r.integer(1, 12), hidden = r.chance(0.5) ? 0 : r.integer(1, 9);
    const int64_t special = r.integer(0, std::max<int64_t>(tasks, 1) - 1);
    for (int64_t t = 0; t < tasks; ++t) {
      int64_t n = r.chance(0.12) ? 0 : r.chance(0.15) ? 1 : r.integer(2, 40);
      int64_t C = one_width > 0 ? one_width : r.chance(0.05) ? 0 : r.chance(0.2) ? 1 : width();
      if (form != kPlain) C = std::min<int64_t>(C, 5);
      if (t == special) {
        if (form == kBlocks) n = r.integer(500, 1100);
        if (form == kWide) n = r.integer(40, 110);
        if (form == kParts) n = r.integer(4000, 6300);
        if (form == kOutputs) C = r.integer(900, 1100), n = std::min<int64_t>(n, 9);
      }
      offsets.push_back(offsets.back() + n);
      out_offsets.push_back(out_offsets.back() + C);
      z_offsets.push_back(z_offsets.back() + n * C);
    }
  }

  void draw_values(Random& r) {
    const double spread = 1 / std::sqrt(static_cast<double>(1 + (hidden ? hidden : features)));
    const double hidden_spread = 1 / std::sqrt(static_cast<double>(1 + features));
    const double sizes[] = {1, spread, 0.3, hidden_spread, 0.3};
    const bool has[] = {true, true, r.chance(0.8), true, r.chance(0.8)};
    for (int i = 0; i < kTensors; ++i) {
      if (has[i]) in[i] = r.normals<T>(begin(i, tasks), sizes[i]);
      const bool exists = i < 2 || !in[i].empty();
      if (exists && r.chance(0.8)) cotangent[i] = r.normals<T>(begin(i, tasks), sizes[i]);
      wants[i] = r.chance(0.75);
    }
    wants_d_q = r.chance(0.75);
    q = r.normals<T>(z_offsets[tasks]);
    d_losses = r.chance(0.2) ? std::vector<T>(tasks, T(1)) : r.normals<T>(tasks);
  }

  void draw_targets(Random& r) {
    one_loss = r.chance(0.4);
    const bool no_classes = r.chance(0.3);
    const auto draw = [&] { return r.integer(no_classes ? 1 : 0, 3); };
    for (int64_t t = 0; t < (one_loss ? 1 : tasks); ++t) loss_of_task.push_back(draw());
    bool classes = false, values = false;
    for (const int64_t loss : loss_of_task) {
      (loss == static_cast<int64_t>(HeadLoss::kCrossEntropy) ? classes : values) = true;
    }
    label_smoothing = r.chance(0.5) ? 0 : r.chance(0.2) ? 1 : 0.1;
    // a class may be ignored
    ignore_index = r.chance(0.8) ? -100 : 0;
    delta = r.chance(0.3) ? 1 : 0.3;
    const int64_t all_rows = offsets[tasks], all_outputs = z_offsets[tasks];
    if (r.chance(0.3)) {
      row_mask = std::vector<char>(all_rows);
      for (char& takes_part : row_mask) takes_part = r.chance(0.7);
    } else if (!classes && r.chance(0.6)) {
      output_mask = std::vector<char>(all_outputs);
      for (char& takes_part : output_mask) takes_part = r.chance(0.7);
    }
    if (classes) {
      labels = std::vector<int64_t>(all_rows);
      const double ignored = r.chance(0.5) ? 0 : r.chance(0.1) ? 1 : 0.3;
      for_each_row([&](int64_t t, int64_t row) {
        const int64_t C = outputs(t);
        labels[row] = C == 0 || r.chance(ignored) ? ignore_index : r.integer(0, C - 1);
        // whatever a row that takes no part holds
        if (!row_mask.empty() && !row_mask[row] && r.chance(0.5)) labels[row] = 5000;
      });
      if (r.chance(0.4)) {
        class_weights = r.normals<T>(out_offsets[tasks]);
        for (T& weight : class_weights) weight = r.chance(0.1) ? T(0) : std::abs(weight);
      }
    }
    if (values) {
      targets = r.normals<T>(all_outputs);
      for_each_row([&](int64_t t, int64_t row) {
        const bool bits = loss(t) == HeadLoss::kBce;
        for (int64_t c = 0; c < outputs(t); ++c) {
          const int64_t at = z_offsets[t] + (row - offsets[t]) * outputs(t) + c;
          if (bits) targets[at] = r.chance(0.2) ? T(0.3) : static_cast<T>(r.chance(0.5));
          const bool takes_part = (row_mask.empty() || row_mask[row]) && (output_mask.empty() || output_mask[at]);
          // a missing one
          if (!takes_part || loss(t) == HeadLoss::kCrossEntropy) targets[at] = std::numeric_limits<T>::quiet_NaN();
        }
      });
    }
  }

  HeadLoss loss(int64_t t) const { return static_cast<HeadLoss>(loss_of_task[one_loss ? 0 : t]); }

  // f(task, row)
  template <class F>
  void for_each_row(const F& f) const {
    for (int64_t t = 0; t < tasks; ++t) {
      for (int64_t row = offsets[t]; row < offsets[t + 1]; ++row) f(t, row);
    }
  }
};

template <class T>
bool same_bits(const Values<T>& a, const Values<T>& b) {
  for (int i = 0; i < kTensors; ++i) {
    if (!mtml::same_bits(a[i], b[i])) return false;
  }
  return true;
}

// of the results of all tasks those of task t, and those of the task alone
template <class T>
void expect_same(const Results<T>& a, const Results<T>& b, const std::string& what) {
  expect(mtml::same_bits(a.z, b.z), what + ": forward");
  expect(same_bits(a.backward, b.backward), what + ": backward");
  expect(mtml::same_bits(a.d_q, b.d_q) && same_bits(a.second, b.second), what + ": double_backward");
  expect(mtml::same_bits(a.losses, b.losses) && same_bits(a.of_loss, b.of_loss), what + ": loss");
  expect(same_bits(a.scaled, b.scaled), what + ": scale");
}

template <class T>
void expect_close(const Values<T>& results, const typename HeadTruth<T>::Gradients& expected, const std::string& what) {
  const char* const names[] = {"x", "weight", "bias", "hidden_weight", "hidden_bias"};
  const Matrix<T>* const all[] = {&expected.x, &expected.weight, &expected.bias, &expected.hidden_weight,
                                  &expected.hidden_bias};
  for (int i = 0; i < kTensors; ++i) {
    if (!results[i].empty()) mtml::expect_close(results[i], all[i]->values, what + " of " + names[i]);
  }
}

// one task and its results against plain loops
template <class T>
void check_values(const Problem<T>& one, const Results<T>& results) {
  const HeadTruth<T> truth(one.batch());
  mtml::expect_close(results.z, truth.z.values, "forward");
  const Matrix<T> q(truth.R, truth.C, one.q.data());
  expect_close(results.backward, truth.backward(q), "backward");
  Matrix<T> d_q, slope;
  expect_close(results.second, truth.double_backward(q, pointers(one.cotangent), d_q), "double_backward");
  if (one.wants_d_q) mtml::expect_close(results.d_q, d_q.values, "double_backward of q");
  const Bounded<T> loss = truth.loss(one.to(), slope);
  mtml::expect_close<T>(results.losses, {loss}, "loss");
  for (Bounded<T>& value : slope.values) value = value * Bounded<T>(one.d_losses[0]);
  const auto gradients = truth.backward(slope);
  expect_close(results.of_loss, gradients, "loss");
  expect_close(results.scaled, gradients, "scale");
}

// a label that is no class is refused before anything is written
template <class T>
void check_refusal(Problem<T> p, Random& r) {
  const int64_t row = p.labels.empty() ? 0 : r.integer(0, static_cast<int64_t>(p.labels.size()) - 1);
  if (p.labels.empty() || (!p.row_mask.empty() && !p.row_mask[row])) return;
  int64_t task = 0;
  while (p.offsets[task + 1] <= row) ++task;
  if (p.to().loss(task) != HeadLoss::kCrossEntropy) return;
  p.labels[row] = r.chance(0.5) ? p.outputs(task) : -1;
  if (p.labels[row] == p.ignore_index) return;
  Values<T> gradient = p.room_for_wanted();
  std::vector<T> losses = room<T>(p.tasks);
  const std::vector<T> before = losses;
  const Values<T> gradient_before = gradient;
  bool refused = false;
  try {
    heads_loss(p.batch(), p.to(), losses.data(), p.d_losses.data(), pointers(gradient), threads());
  } catch (const std::invalid_argument&) {
    refused = true;
  }
  expect(refused && mtml::same_bits(losses, before) && same_bits(gradient, gradient_before), "label that is no class");
}

template <class T>
void check(Random& r) {
  const Problem<T> p(r);
  num_threads = 1;
  const Results<T> results = p.run();
  num_threads = static_cast<int>(r.integer(2, 4));
  expect_same(p.run(), results, "threads");
  check_refusal(p, r);
  for (int64_t t = 0; t < p.tasks; ++t) {
    const Problem<T> one = p.alone(t);
    const Results<T> together{p.of_outputs(results.z, t),     p.of_outputs(results.d_q, t),
                              part(results.losses, t, 1),     part(results.values, t, 1),
                              p.part_of(results.backward, t), p.part_of(results.second, t),
                              p.part_of(results.of_loss, t),  p.part_of(results.scaled, t)};
    expect_same(one.run(), together, "alone");
    check_values(one, together);
  }
}

}  // namespace

int main(int argc, char** argv) {
  return run(argc, argv, [](int i, Random& r) { i % 2 ? check<float>(r) : check<double>(r); });
}
