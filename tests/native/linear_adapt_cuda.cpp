// The kernels of csrc/cuda/linear_adapt.cu on a CPU, by cuda_shim: random calls with every option against the inner
// loop written out, dense weights and all, in long double: off by at most twice the error of the same loop in the
// kernel's own type, and a few roundings; the same bits twice, and for a task alone; the launches of a call; errors of
// a launch. Arguments: number of calls, seed, and a barrier to leave out (file:line), which must then show. Prints the
// barriers it has met.
#include <algorithm>
#include <cstdio>
#include <limits>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "cuda/linear_adapt.h"
#include "cuda_check.h"
#include "linear_truth.h"

using namespace mtml;

namespace {

// float and double under one name
bool serves(const MlpArguments<float>& a) { return mtml_cuda_linear_adapt_serves_f32(&a); }
bool serves(const MlpArguments<double>& a) { return mtml_cuda_linear_adapt_serves_f64(&a); }
int64_t state_size(const MlpArguments<float>& a) { return mtml_cuda_linear_adapt_state_size_f32(&a); }
int64_t state_size(const MlpArguments<double>& a) { return mtml_cuda_linear_adapt_state_size_f64(&a); }
int64_t workspace_size(const MlpArguments<float>& a) { return mtml_cuda_linear_adapt_workspace_size_f32(&a); }
int64_t workspace_size(const MlpArguments<double>& a) { return mtml_cuda_linear_adapt_workspace_size_f64(&a); }
int forward(const MlpArguments<float>& a, float* state, cudaStream_t s) {
  return mtml_cuda_linear_adapt_forward_f32(&a, state, s);
}
int forward(const MlpArguments<double>& a, double* state, cudaStream_t s) {
  return mtml_cuda_linear_adapt_forward_f64(&a, state, s);
}
int backward(const MlpArguments<float>& a, const float* state, float* work, cudaStream_t s) {
  return mtml_cuda_linear_adapt_backward_f32(&a, state, work, s);
}
int backward(const MlpArguments<double>& a, const double* state, double* work, cudaStream_t s) {
  return mtml_cuda_linear_adapt_backward_f64(&a, state, work, s);
}

// One call: arrays of exactly the right size, so that a sanitizer sees every step outside.
template <class T>
struct Problem {
  using Value = T;
  int64_t tasks, classes, features, steps, evaluations;
  int64_t widths[2];
  std::vector<T> w, b, rate_w, rate_b;
  std::vector<int64_t> support_offsets{0}, query_offsets{0}, support_labels, query_labels;
  std::vector<T> support_x, query_x, support_targets, query_targets;
  std::vector<char> mask;
  std::vector<T> d_outputs, d_losses, d_fast;
  MlpParameter<T> params[2]{};
  MlpArguments<T> a{};
  bool wants_w, wants_b, wants_rates, wants_support, wants_query, ragged_support, ragged_query;

  int64_t size() const { return classes * features + (a.options.bias ? classes : 0); }

  explicit Problem(Random& r) {
    MlpOptions& o = a.options;
    o.tasks = tasks = r.integer(0, 4);
    o.layers = 1;
    o.steps = steps = r.integer(0, 4);
    // one of them is large now and then: more columns than a warp reads at once, classes than it has lanes, rows than
    // a tile
    const int64_t large = r.integer(0, 7);
    features = widths[0] = large == 0 ? r.integer(130, 200) : r.integer(1, 20);
    classes = widths[1] = large == 1 ? r.integer(8, 40) : r.integer(1, 7);
    // rows of which each begins at a multiple of 16 bytes
    if (r.chance(0.5)) features = widths[0] = (features + 3) / 4 * 4;
    o.widths = widths;
    o.bias = r.chance(0.8);
    o.first_order = r.chance(0.2);
    o.every_step = r.chance(0.3);
    o.loss = static_cast<Loss>(r.integer(0, 2));
    o.norm_eps = 1e-5;
    o.momentum = r.chance(0.4) ? 0.9 : 0;
    o.weight_decay = r.chance(0.4) ? 0.1 : 0;
    o.clip = std::numeric_limits<double>::infinity();
    evaluations = o.every_step ? steps + 1 : 1;

    const int64_t most = large == 2 ? 40 : 9;
    const auto rows = [&](bool ragged, std::vector<int64_t>& offsets, std::vector<T>& x, std::vector<int64_t>& labels,
                          std::vector<T>& targets) {
      const int64_t all = r.integer(r.chance(0.1) ? 0 : 1, most);
      for (int64_t t = 0; t < tasks; ++t) offsets.push_back(offsets.back() + (ragged ? r.integer(0, most) : all));
      const double scale = 1 / std::sqrt(std::sqrt(static_cast<double>(features)));
      x = normals(r, offsets.back() * features, scale);
      for (int64_t i = 0; i < offsets.back(); ++i) labels.push_back(r.integer(0, classes - 1));
      targets = normals(r, offsets.back() * classes, 1);
      if (o.loss == Loss::kBce)
        for (T& y : targets) y = y > 0;
    };
    ragged_support = r.chance(0.5), ragged_query = r.chance(0.5);
    rows(ragged_support, support_offsets, support_x, support_labels, support_targets);
    rows(ragged_query, query_offsets, query_x, query_labels, query_targets);
    if (r.chance(0.4)) {
      for (int64_t i = 0; i < tasks * classes; ++i) mask.push_back(r.chance(0.7));
      for (int64_t t = 0; t < tasks; ++t) {
        // the labels' classes exist
        for (int64_t i = support_offsets[t]; i < support_offsets[t + 1]; ++i) mask[t * classes + support_labels[i]] = 1;
        for (int64_t i = query_offsets[t]; i < query_offsets[t + 1]; ++i) mask[t * classes + query_labels[i]] = 1;
      }
    }

    const bool per_task_w = r.chance(0.3), per_task_b = r.chance(0.3), per_step = r.chance(0.6);
    w = normals(r, (per_task_w ? tasks : 1) * classes * features, 1 / std::sqrt(static_cast<double>(features)));
    b = normals(r, (per_task_b ? tasks : 1) * classes, 0.5);
    for (auto* rate : {&rate_w, &rate_b})
      for (int64_t k = 0; k < (per_step ? steps : 1); ++k) rate->push_back(static_cast<T>(0.3 + 0.1 * r.normal()));
    wants_rates = r.chance(0.6), wants_w = r.chance(0.8), wants_b = o.bias && r.chance(0.8);
    wants_support = r.chance(0.6), wants_query = r.chance(0.6);
    params[0] = {w.data(), per_task_w ? classes * features : 0, r.chance(0.85), rate_w.data(), per_step, 0, {}, {}, {}};
    params[1] = {b.data(), per_task_b ? classes : 0, r.chance(0.85), rate_b.data(), per_step, 0, {}, {}, {}};
    // nobody needs a rate of what does not move
    for (MlpParameter<T>& param : params)
      if (!param.moves) param.rate = nullptr;
    a.params = params;
    a.num_params = 1 + o.bias;

    const int64_t all_rows = query_offsets.back();
    d_outputs = normals(r, r.chance(0.6) ? evaluations * all_rows * classes : 0, 0.3);
    d_losses = normals(r, r.chance(0.9) ? evaluations * tasks : 0, 1);
    d_fast = normals(r, r.chance(0.4) ? tasks * size() : 0, 0.3);
    const bool labelled = r.chance(0.9), classes_loss = o.loss == Loss::kCrossEntropy;
    a.support = {support_x.data(),
                 classes_loss ? support_labels.data() : nullptr,
                 classes_loss ? nullptr : support_targets.data(),
                 ragged_support ? support_offsets.data() : nullptr,
                 longest(support_offsets),
                 nullptr,
                 support_offsets.back()};
    a.query = {query_x.data(),
               labelled && classes_loss ? query_labels.data() : nullptr,
               labelled && !classes_loss ? query_targets.data() : nullptr,
               ragged_query ? query_offsets.data() : nullptr,
               longest(query_offsets),
               nullptr,
               query_offsets.back()};
    a.class_mask = mask.empty() ? nullptr : reinterpret_cast<const bool*>(mask.data());
    a.wants_fast = !d_fast.empty();
    a.d_outputs = d_outputs.empty() ? nullptr : d_outputs.data();
    a.d_losses = d_losses.empty() ? nullptr : d_losses.data();
    a.d_fast = d_fast.empty() ? nullptr : d_fast.data();
  }
  Problem(const Problem&) = delete;

  static std::vector<T> normals(Random& r, int64_t n, double scale) {
    std::vector<T> x(n);
    for (T& value : x) value = static_cast<T>(scale * r.normal());
    return x;
  }
  static int64_t longest(const std::vector<int64_t>& offsets) {
    int64_t result = 0;
    for (size_t t = 0; t + 1 < offsets.size(); ++t) result = std::max(result, offsets[t + 1] - offsets[t]);
    return result;
  }

  std::string text() const {
    const MlpOptions& o = a.options;
    return std::string(sizeof(T) == 4 ? "f32" : "f64") + ", T=" + std::to_string(tasks) +
           " N=" + std::to_string(a.support.max_rows) + (ragged_support ? " ragged" : "") +
           " Q=" + std::to_string(a.query.max_rows) + (ragged_query ? " ragged" : "") +
           " D=" + std::to_string(features) + " C=" + std::to_string(classes) + " K=" + std::to_string(steps) +
           ", loss " + std::to_string(static_cast<int>(o.loss)) + (o.bias ? ", bias" : "") +
           (mask.empty() ? "" : ", mask") + (o.first_order ? ", first order" : "") +
           (o.every_step ? ", every step" : "") + (o.momentum != 0 ? ", momentum" : "") +
           (o.weight_decay != 0 ? ", decay" : "") + ", moves " + std::to_string(params[0].moves) +
           std::to_string(params[1].moves) + ", blocks " + std::to_string(shim::max_blocks);
  }

  // of the whole call, or with the rows of tasks [first, first + count) as a call of its own
  Results<T> run(int64_t first, int64_t count, cudaStream_t stream) {
    const T nan = std::numeric_limits<T>::quiet_NaN();
    const auto room = [&](int64_t n) { return std::vector<T>(n, nan); };
    const int64_t C = classes, D = features;
    Results<T> r;
    MlpArguments<T> call = a;
    MlpParameter<T> own[2] = {params[0], params[1]};
    call.options.tasks = count;
    call.params = own;
    std::vector<int64_t> offsets[2];
    std::vector<T> d_outputs_own, d_losses_own;
    const auto cut = [&](MlpRows<T>& of, const std::vector<int64_t>& all, std::vector<int64_t>& part) {
      const int64_t begin = all[first];
      of.x += begin * D;
      if (of.labels) of.labels += begin;
      if (of.targets) of.targets += begin * C;
      for (int64_t t = first; t <= first + count; ++t) part.push_back(all[t] - begin);
      if (of.offsets) of.offsets = part.data();
      of.max_rows = longest(part);
      return part.back();
    };
    const int64_t support_rows = cut(call.support, support_offsets, offsets[0]);
    const int64_t query_rows = cut(call.query, query_offsets, offsets[1]);
    // rectangular calls of no tasks know their rows too
    if (count == 0) call.support.max_rows = a.support.max_rows, call.query.max_rows = a.query.max_rows;
    for (int64_t s = 0; s < evaluations; ++s) {
      const auto part = [](std::vector<T>& to, const std::vector<T>& from, int64_t begin, int64_t n) {
        if (!from.empty()) to.insert(to.end(), from.begin() + begin, from.begin() + begin + n);
      };
      part(d_outputs_own, d_outputs, (s * query_offsets.back() + query_offsets[first]) * C, query_rows * C);
      part(d_losses_own, d_losses, s * tasks + first, count);
    }
    if (call.d_outputs) call.d_outputs = d_outputs_own.data();
    if (call.d_losses) call.d_losses = d_losses_own.data();
    if (call.d_fast) call.d_fast += first * size();
    if (call.class_mask) call.class_mask += first * C;

    r.outputs = room(evaluations * query_rows * C), call.outputs = r.outputs.data();
    r.losses = room(evaluations * count), call.losses = r.losses.data();
    if (a.wants_fast) r.fast = room(count * size()), call.fast = r.fast.data();
    std::vector<double> sums[2];
    for (int p = 0; p < 1 + a.options.bias; ++p) {
      const int64_t elements = p ? C : C * D;
      own[p].start += first * own[p].task_stride;
      std::vector<T>& gradient = p ? r.bias : r.weight;
      if (p ? wants_b : wants_w)
        gradient = room((own[p].task_stride ? count : 1) * elements), own[p].gradient = gradient.data();
      sums[p].resize(wants_rates ? count * steps : 0, nan);
      if (wants_rates) own[p].rate_sums = sums[p].data();
    }
    if (wants_support) r.support = room(support_rows * D), call.support.x_gradient = r.support.data();
    if (wants_query) r.query = room(query_rows * D), call.query.x_gradient = r.query.data();

    expect(serves(call), "serves");
    std::vector<T> state = room(state_size(call)), work = room(workspace_size(call));
    expect(forward(call, state.data(), stream) == cudaSuccess, "forward");
    expect(backward(call, state.data(), work.data(), stream) == cudaSuccess, "backward");
    for (double x : sums[0]) r.weight_rate.push_back(static_cast<T>(x));
    for (double x : sums[1]) r.bias_rate.push_back(static_cast<T>(x));
    return r;
  }
};

// the largest error, NaN where one is; infinities must agree
template <class U>
double error_of(const std::vector<U>& got, const std::vector<long double>& exact) {
  double result = 0;
  for (size_t i = 0; i < exact.size(); ++i) {
    if (static_cast<long double>(got[i]) == exact[i]) continue;
    const double error = static_cast<double>(std::fabs(static_cast<long double>(got[i]) - exact[i]));
    if (!(error <= result)) result = error;
  }
  return result;
}

template <class T>
void check_values(const Problem<T>& p, const Results<T>& got) {
  const Plain<long double, Problem<T>> exact(p);
  const auto values = list(exact.r), sizes = list(exact.sizes);
  const auto mine = list(got), plain = list(Plain<T, Problem<T>>(p).r);
  for (size_t i = 0; i < values.size(); ++i) {
    expect(mine[i].size() == values[i].size(), std::string("size of ") + kNames[i]);
    if (mine[i].size() != values[i].size()) continue;
    long double size = 0;
    for (const long double x : sizes[i]) size = std::max(size, x);
    const double unit = std::numeric_limits<T>::epsilon() * static_cast<double>(size);
    const double error = error_of(mine[i], values[i]), theirs = error_of(plain[i], values[i]);
    expect(error <= 2 * theirs + 16 * unit, std::string(kNames[i]) + " off by " + std::to_string(error / unit) +
                                                " units, plain by " + std::to_string(theirs / unit));
  }
}

// what of a whole call's results is task t's
template <class T>
Results<T> part_of(const Problem<T>& p, const Results<T>& r, int64_t t) {
  Results<T> part;
  const auto cut = [](std::vector<T>& to, const std::vector<T>& from, int64_t begin, int64_t n) {
    if (!from.empty()) to.insert(to.end(), from.begin() + begin, from.begin() + begin + n);
  };
  const int64_t C = p.classes, D = p.features, q_begin = p.query_offsets[t], s_begin = p.support_offsets[t];
  const int64_t q = p.query_offsets[t + 1] - q_begin, n = p.support_offsets[t + 1] - s_begin;
  for (int64_t s = 0; s < p.evaluations; ++s) {
    cut(part.outputs, r.outputs, (s * p.query_offsets.back() + q_begin) * C, q * C);
    cut(part.losses, r.losses, s * p.tasks + t, 1);
  }
  cut(part.fast, r.fast, t * p.size(), p.size());
  if (p.params[0].task_stride) cut(part.weight, r.weight, t * C * D, C * D);
  if (p.params[1].task_stride) cut(part.bias, r.bias, t * C, C);
  cut(part.weight_rate, r.weight_rate, t * p.steps, p.steps);
  cut(part.bias_rate, r.bias_rate, t * p.steps, p.steps);
  cut(part.support, r.support, s_begin * D, n * D);
  cut(part.query, r.query, q_begin * D, q * D);
  return part;
}

template <class T>
void expect_same(const Results<T>& a, const Results<T>& b, const std::string& what) {
  const auto some = list(a), others = list(b);
  for (size_t i = 0; i < some.size(); ++i) expect(same_bits(some[i], others[i]), what + ": " + kNames[i]);
}

template <class T>
void check_alone(Problem<T>& p, const Results<T>& all, int64_t t, cudaStream_t stream) {
  Results<T> alone = p.run(t, 1, stream);
  // what tasks share is a sum over them in the one and of one in the other
  if (!p.params[0].task_stride) alone.weight.clear();
  if (!p.params[1].task_stride) alone.bias.clear();
  expect_same(alone, part_of(p, all, t), "alone");
}

// A label that is none makes NaN of its own task.
template <class T>
void check_label(Problem<T>& p, const Results<T>& before, Random& random, cudaStream_t stream) {
  const bool of_query = random.chance(0.5);
  std::vector<int64_t>& labels = of_query ? p.query_labels : p.support_labels;
  const std::vector<int64_t>& offsets = of_query ? p.query_offsets : p.support_offsets;
  if (p.a.options.loss != Loss::kCrossEntropy || labels.empty() || !p.a.query.labels) return;
  if (!of_query && (p.steps == 0 || !(p.params[0].moves || (p.a.options.bias && p.params[1].moves)))) return;
  const int64_t row = random.integer(0, labels.size() - 1), label = labels[row];
  labels[row] = random.chance(0.5) ? p.classes : -1;
  const Results<T> r = p.run(0, p.tasks, stream);
  labels[row] = label;
  for (int64_t t = 0; t < p.tasks; ++t) {
    const Results<T> part = part_of(p, r, t);
    if (row < offsets[t] || row >= offsets[t + 1]) {
      expect_same(part, part_of(p, before, t), "a label of another task");
    } else if (of_query || p.query_offsets[t] < p.query_offsets[t + 1]) {
      expect(std::isnan(part.losses.back()), "a label that is none");
    }
  }
}

template <class T>
void check(Random& random) {
  const int64_t blocks = random.integer(1, 3);
  shim::max_blocks = random.chance(0.5) ? blocks : 2147483647;
  Problem<T> p(random);
  now = p.text();
  shim::Stream stream;
  const Results<T> got = p.run(0, p.tasks, &stream);
  std::vector<std::string> kernels, expected;
  for (const shim::Launch& launch : stream.launches) kernels.push_back(launch.kernel);
  if (p.tasks) expected = {"linear_adapt", "linear_adapt_backward"};
  if ((p.wants_w && !p.params[0].task_stride) || (p.wants_b && !p.params[1].task_stride))
    expected.push_back("linear_adapt_sums");
  expect(kernels == expected, "launches");
  check_values(p, got);
  if (p.tasks == 0) return;
  if (random.chance(0.3)) expect_same(p.run(0, p.tasks, &stream), got, "twice");
  if (random.chance(0.5)) check_alone(p, got, random.integer(0, p.tasks - 1), &stream);
  if (random.chance(0.3)) check_label(p, got, random, &stream);
}

// What is not for these kernels, and a launch that CUDA refuses: its error comes back and nothing is launched after it.
void check_refused() {
  now = "what is refused";
  Random random{std::mt19937_64(1)};
  Problem<float> p(random);
  while (p.tasks == 0 || !p.wants_w || p.params[0].task_stride || !p.params[0].moves) {
    p.~Problem();
    new (&p) Problem<float>(random);
  }
  const auto changed = [&](auto change) {
    MlpArguments<float> a = p.a;
    MlpParameter<float> own[2] = {p.params[0], p.params[1]};
    a.params = own;
    change(a, own);
    return serves(a);
  };
  using A = MlpArguments<float>;
  using P = MlpParameter<float>;
  expect(changed([](A&, P*) {}), "the call as it was");
  expect(!changed([](A& a, P*) { a.options.layers = 2; }), "two layers");
  expect(!changed([](A& a, P*) { a.options.clip = 1; }), "clipping");
  expect(!changed([](A&, P* params) { params[0].rate_element = 1; }), "rates by element");
  expect(changed([](A& a, P*) { a.support.max_rows = 120; }), "many rows");
  expect(!changed([](A& a, P*) { a.support.max_rows = 160; }), "too many rows");

  std::vector<float> w(p.classes * p.features), b(p.classes);
  p.params[0].gradient = w.data();
  A a = p.a;
  std::vector<float> state(state_size(a)), work(workspace_size(a));
  for (int refused = 0; refused < 3; ++refused) {
    shim::Stream stream;
    shim::launches_until_error = refused;
    int error = forward(a, state.data(), &stream);
    if (!error) error = backward(a, state.data(), work.data(), &stream);
    expect(error == cudaErrorInvalidConfiguration, "error");
    expect(static_cast<int>(stream.launches.size()) == refused, "launches before the error");
    expect(cudaGetLastError() == cudaSuccess, "an error left behind");
  }
  shim::launches_until_error = -1;
}

}  // namespace

int main(int count, char** arguments) {
  return run_in_shim(
      count, arguments, [](int64_t) { check_refused(); },
      [](int64_t i, Random& random, uint64_t) { i % 2 ? check<double>(random) : check<float>(random); });
}
