// The kernels of csrc/cuda/sgd_step.cu on a CPU, by cuda_shim: random trees, options and numbers of blocks against
// plain loops in float64; the same bits twice and for a task alone; the launches of a call; errors of a launch.
// Arguments: number of calls, seed, and a barrier to leave out (file:line), which must then show. Prints the barriers
// it has met.
#include <algorithm>
#include <cstdio>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cuda/sgd_step.h"
#include "cuda_check.h"

using namespace mtml;

namespace {

enum RateForm { kNumber, kTask, kParameter, kBoth };

// float and double under one name
int step(const SgdLeaf<float>* l, int64_t n, int64_t tasks, const SgdOptions& o, double* w, void* s) {
  return mtml_cuda_sgd_step_f32(l, n, tasks, &o, w, s);
}
int step(const SgdLeaf<double>* l, int64_t n, int64_t tasks, const SgdOptions& o, double* w, void* s) {
  return mtml_cuda_sgd_step_f64(l, n, tasks, &o, w, s);
}
int step_backward(const SgdLeaf<float>* l, const SgdLeafGradient<float>* g, int64_t n, int64_t tasks,
                  const SgdOptions& o, int one_rate, double* w, void* s) {
  return mtml_cuda_sgd_step_backward_f32(l, g, n, tasks, &o, one_rate, w, s);
}
int step_backward(const SgdLeaf<double>* l, const SgdLeafGradient<double>* g, int64_t n, int64_t tasks,
                  const SgdOptions& o, int one_rate, double* w, void* s) {
  return mtml_cuda_sgd_step_backward_f64(l, g, n, tasks, &o, one_rate, w, s);
}

template <class T>
T* pointer(std::vector<T>& x) {
  return x.empty() ? nullptr : x.data();
}

// One call: arrays of exactly the right size, so that a sanitizer sees every step outside.
template <class T>
struct Problem {
  int64_t num_tasks;
  SgdOptions options;
  bool one_rate, wants_dp, wants_dg, wants_dm, wants_dlr;
  std::vector<int64_t> sizes;
  std::vector<RateForm> forms;
  // [leaves][T * size]; lr and dlr in the rate's layout, one of them where all leaves share it
  std::vector<std::vector<T>> p, g, m, lr, u, w, new_p, new_m, dp, dg, dm, dlr;

  int64_t num_leaves() const { return static_cast<int64_t>(sizes.size()); }
  size_t rate_of(int64_t leaf) const { return one_rate ? 0 : leaf; }
  bool momentum() const { return options.momentum != 0; }
  bool clips() const { return std::isfinite(options.clip); }

  explicit Problem(Random& random) {
    num_tasks = random.integer(0, 5);
    options = {random.chance(0.5) ? 0.9 : 0.0, random.chance(0.5) ? 0.1 : 0.0,
               random.chance(0.6) ? std::exp(random.normal() + 2) : std::numeric_limits<double>::infinity()};
    // more leaves than a launch takes, and leaves of more than a slice, now and then
    const int64_t leaves = random.chance(0.1) ? random.integer(29, 60) : random.integer(1, 5);
    for (int64_t l = 0; l < leaves; ++l) sizes.push_back(random.integer(0, leaves > 5 ? 9 : 70));
    if (random.chance(0.1)) sizes[0] = random.integer(4000, 9000), num_tasks = std::min<int64_t>(num_tasks, 2);
    one_rate = random.chance(0.3);
    auto fill = [&](int64_t n) {
      std::vector<T> x(n);
      for (T& value : x) value = static_cast<T>(random.normal());
      return x;
    };
    wants_dp = random.chance(0.8), wants_dg = random.chance(0.8);
    wants_dm = momentum() && random.chance(0.8), wants_dlr = random.chance(0.8);
    for (int64_t l = 0; l < leaves; ++l) {
      const int64_t n = num_tasks * sizes[l];
      p.push_back(fill(n)), g.push_back(fill(n)), u.push_back(fill(n));
      m.push_back(fill(momentum() ? n : 0)), w.push_back(fill(momentum() ? n : 0));
      forms.push_back(one_rate && l ? forms[0] : static_cast<RateForm>(random.integer(0, one_rate ? kTask : kBoth)));
      const int64_t rates[] = {1, num_tasks, sizes[l], n};
      if (!one_rate || l == 0) lr.push_back(fill(rates[forms[l]]));
    }
    // a task whose gradient is zero is not clipped
    if (num_tasks > 0 && random.chance(0.2))
      for (int64_t l = 0; l < leaves; ++l) std::fill_n(g[l].begin(), sizes[l], T{0});
  }

  std::string text() const {
    std::string s = std::string(sizeof(T) == 4 ? "f32" : "f64") + ", T=" + std::to_string(num_tasks) + ", sizes";
    for (int64_t n : sizes) s += " " + std::to_string(n);
    s += ", rates";
    for (int form : forms) s += " " + std::to_string(form);
    return s + (one_rate ? " (one)" : "") + ", momentum " + std::to_string(options.momentum) + ", decay " +
           std::to_string(options.weight_decay) + ", clip " + std::to_string(options.clip) + ", blocks " +
           std::to_string(shim::max_blocks);
  }

  // for tasks [first, first + count)
  std::vector<SgdLeaf<T>> leaves(int64_t first) {
    std::vector<SgdLeaf<T>> result;
    for (int64_t l = 0; l < num_leaves(); ++l) {
      const int64_t n = sizes[l], start = first * n;
      const int64_t lr_task = forms[l] == kTask ? 1 : forms[l] == kBoth ? n : 0;
      result.push_back({n, pointer(p[l]) + start, pointer(g[l]) + start, momentum() ? pointer(m[l]) + start : nullptr,
                        pointer(lr[rate_of(l)]) + first * lr_task, lr_task, forms[l] >= kParameter ? 1 : 0,
                        pointer(new_p[l]) + start, momentum() ? pointer(new_m[l]) + start : nullptr});
    }
    return result;
  }

  void run(int64_t first, int64_t count, cudaStream_t stream) {
    const T nan = std::numeric_limits<T>::quiet_NaN();
    auto like = [&](const std::vector<std::vector<T>>& xs) {
      std::vector<std::vector<T>> result;
      for (const auto& x : xs) result.emplace_back(x.size(), nan);
      return result;
    };
    new_p = like(p), new_m = like(m), dp = like(p), dg = like(p), dm = like(m), dlr = like(lr);
    auto workspace = [&](int backward) {
      const int64_t n = mtml_cuda_sgd_step_workspace(sizes.data(), num_leaves(), count, &options, backward);
      return std::vector<double>(n, std::numeric_limits<double>::quiet_NaN());
    };
    const auto table = leaves(first);
    auto room = workspace(0);
    expect(step(table.data(), num_leaves(), count, options, pointer(room), stream) == cudaSuccess, "forward");

    std::vector<SgdLeafGradient<T>> gradients;
    for (int64_t l = 0; l < num_leaves(); ++l) {
      const int64_t start = first * sizes[l];
      gradients.push_back({pointer(u[l]) + start, momentum() ? pointer(w[l]) + start : nullptr,
                           wants_dp ? pointer(dp[l]) + start : nullptr, wants_dg ? pointer(dg[l]) + start : nullptr,
                           wants_dm ? pointer(dm[l]) + start : nullptr,
                           wants_dlr ? pointer(dlr[rate_of(l)]) + first * table[l].lr_task : nullptr, nullptr});
    }
    room = workspace(1);
    expect(step_backward(table.data(), gradients.data(), num_leaves(), count, options, one_rate, pointer(room),
                         stream) == cudaSuccess,
           "backward");
  }
};

// A value in float64, and the sum of the sizes of its terms, by which its rounding is measured.
struct Exact {
  double value = 0, size = 0;
  void add(double term) { value += term, size += std::fabs(term); }
};

template <class T>
void compare(const std::vector<T>& got, const std::vector<Exact>& exact, const std::string& what) {
  for (size_t i = 0; i < got.size(); ++i) {
    const double error = std::fabs(static_cast<double>(got[i]) - exact[i].value);
    // up to 16 terms are added in T; norms and factors round once each
    const double allowed = 16 * std::numeric_limits<T>::epsilon() * exact[i].size;
    expect(error <= allowed, what + "[" + std::to_string(i) + "] = " + std::to_string(got[i]) + ", exactly " +
                                 std::to_string(exact[i].value));
  }
}

template <class T>
void check_values(Problem<T>& a) {
  const auto table = a.leaves(0);
  std::vector<std::vector<Exact>> dlr;
  for (const auto& rate : a.lr) dlr.emplace_back(rate.size());
  std::vector<std::vector<Exact>> new_p, new_m, dp, dg, dm;
  for (int64_t l = 0; l < a.num_leaves(); ++l)
    for (auto* xs : {&new_p, &new_m, &dp, &dg, &dm}) xs->emplace_back(a.p[l].size());

  const double momentum = static_cast<T>(a.options.momentum), decay = static_cast<T>(a.options.weight_decay);
  for (int64_t t = 0; t < a.num_tasks; ++t) {
    auto rate = [&](int64_t l, int64_t i) -> int64_t { return t * table[l].lr_task + i * table[l].lr_element; };
    double squares = 0, s_dot_g = 0, s_dot_g_size = 0;
    for (int64_t l = 0; l < a.num_leaves(); ++l) {
      for (int64_t i = 0; i < a.sizes[l]; ++i) {
        const int64_t e = t * a.sizes[l] + i;
        const double g = a.g[l][e], lr_u = static_cast<double>(table[l].lr[rate(l, i)]) * a.u[l][e];
        squares += g * g;
        s_dot_g += g * ((a.momentum() ? a.w[l][e] : 0) - lr_u);
        s_dot_g_size += std::fabs(g) * ((a.momentum() ? std::fabs(a.w[l][e]) : 0) + std::fabs(lr_u));
      }
    }
    const double norm = std::sqrt(squares), damped = norm + 1e-6;
    const bool clipped = a.clips() && norm > 0 && a.options.clip / damped < 1;
    const double scale = clipped ? a.options.clip / damped : 1;
    const double slope = clipped ? a.options.clip / (norm * damped * damped) : 0;
    for (int64_t l = 0; l < a.num_leaves(); ++l) {
      for (int64_t i = 0; i < a.sizes[l]; ++i) {
        const int64_t e = t * a.sizes[l] + i;
        const double p = a.p[l][e], g = a.g[l][e], u = a.u[l][e], lr = table[l].lr[rate(l, i)];
        Exact d, s;
        d.add(scale * g), d.add(decay * p), s.add(-lr * u);
        if (a.momentum()) d.add(momentum * a.m[l][e]), s.add(a.w[l][e]);
        new_m[l][e] = d;
        new_p[l][e] = {p - lr * d.value, std::fabs(p) + std::fabs(lr) * d.size};
        dp[l][e] = {u + decay * s.value, std::fabs(u) + decay * s.size};
        dm[l][e] = {momentum * s.value, momentum * s.size};
        dg[l][e] = {scale * s.value - slope * s_dot_g * g, scale * s.size + slope * s_dot_g_size * std::fabs(g)};
        Exact& to = dlr[a.rate_of(l)][rate(l, i)];
        to.value -= u * d.value, to.size += std::fabs(u) * d.size;
      }
    }
  }
  for (int64_t l = 0; l < a.num_leaves(); ++l) {
    compare(a.new_p[l], new_p[l], "new_p"), compare(a.new_m[l], new_m[l], "new_m");
    if (a.wants_dp) compare(a.dp[l], dp[l], "dp");
    if (a.wants_dg) compare(a.dg[l], dg[l], "dg");
    if (a.wants_dm) compare(a.dm[l], dm[l], "dm");
  }
  for (size_t r = 0; r < a.lr.size() && a.wants_dlr; ++r) compare(a.dlr[r], dlr[r], "dlr");
}

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b, int64_t begin, int64_t end) {
  return begin >= end || std::memcmp(a.data() + begin, b.data() + begin, (end - begin) * sizeof(T)) == 0;
}

// the run that `a` holds against another of tasks [first, last)
template <class T>
void check_bits(Problem<T>& a, const Problem<T>& before, int64_t first, int64_t last, const std::string& what) {
  for (int64_t l = 0; l < a.num_leaves(); ++l) {
    const int64_t begin = first * a.sizes[l], end = last * a.sizes[l], end_m = a.momentum() ? end : begin;
    expect(same_bits(a.new_p[l], before.new_p[l], begin, end), what + ": new_p");
    expect(same_bits(a.new_m[l], before.new_m[l], begin, end_m), what + ": new_m");
    expect(same_bits(a.dp[l], before.dp[l], begin, end), what + ": dp");
    expect(same_bits(a.dg[l], before.dg[l], begin, end), what + ": dg");
    expect(same_bits(a.dm[l], before.dm[l], begin, end_m), what + ": dm");
    const size_t r = a.rate_of(l);
    if (a.forms[l] == kTask) expect(same_bits(a.dlr[r], before.dlr[r], first, last), what + ": dlr");
    if (a.forms[l] == kBoth) expect(same_bits(a.dlr[r], before.dlr[r], begin, end), what + ": dlr");
  }
}

// As cuda/sgd_step.h states: one launch for 28 leaves, one more to clip, one more for each kind of shared rate.
template <class T>
std::vector<std::string> expected_launches(const Problem<T>& a) {
  std::vector<std::string> result;
  auto add = [&](const char* kernel, auto blocks_of) {
    for (int64_t first = 0; first < a.num_leaves(); first += 28) {
      int64_t elements = 0;
      for (int64_t l = first; l < std::min<int64_t>(first + 28, a.num_leaves()); ++l) elements += a.sizes[l];
      if (blocks_of(elements)) result.push_back(kernel);
    }
  };
  auto per_task = [&](int64_t elements) { return elements > 0 && a.num_tasks > 0; };
  for (const char* kernel : {"sgd_step", "sgd_step_backward"}) {
    if (a.clips()) add("sgd_step_sums", per_task);
    add(kernel, per_task);
  }
  bool rates = false, shared_rates = false;
  for (int64_t l = 0; l < a.num_leaves() && a.wants_dlr; ++l) {
    rates = rates || a.forms[l] == kNumber || (a.forms[l] == kTask && a.num_tasks > 0);
    shared_rates = shared_rates || (a.forms[l] == kParameter && a.sizes[l] > 0);
  }
  if (shared_rates) add("sgd_step_shared_rates", [](int64_t elements) { return elements > 0; });
  if (rates && a.one_rate) result.push_back("sgd_step_rates");
  if (rates && !a.one_rate) add("sgd_step_rates", [](int64_t) { return true; });
  return result;
}

template <class T>
void check(Random& random) {
  const int64_t seen = random.integer(1, 40);
  shim::max_blocks = random.chance(0.5) ? seen : 2147483647;
  Problem<T> a(random);
  now = a.text();
  shim::Stream stream;
  a.run(0, a.num_tasks, &stream);
  check_values(a);
  std::vector<std::string> kernels;
  for (const shim::Launch& launch : stream.launches) {
    kernels.push_back(launch.kernel);
    expect(launch.shared_bytes == launch.threads / 32 * sizeof(double), "shared memory of " + launch.kernel);
  }
  expect(kernels == expected_launches(a), "launches");

  const Problem<T> before = a;
  a.run(0, a.num_tasks, &stream);
  check_bits(a, before, 0, a.num_tasks, "twice");
  for (size_t r = 0; r < a.lr.size() && a.wants_dlr; ++r)
    expect(same_bits(a.dlr[r], before.dlr[r], 0, a.dlr[r].size()), "twice: dlr");
  if (a.num_tasks > 0) {
    const int64_t task = random.integer(0, a.num_tasks - 1);
    a.run(task, 1, &stream);
    check_bits(a, before, task, task + 1, "alone");
  }
}

// A launch that CUDA refuses: its error comes back, nothing is launched after it, and nobody finds it later.
void check_errors() {
  now = "refused launches";
  float p[3] = {1, 2, 3}, g[3] = {1, 1, 1}, lr = 1, out[3];
  const SgdLeaf<float> leaf{3, p, g, nullptr, &lr, 0, 0, out, nullptr};
  const SgdOptions options{0, 0, 1.0};
  double room[1];
  for (int refused = 0; refused < 2; ++refused) {
    shim::Stream stream;
    shim::launches_until_error = refused;
    expect(step(&leaf, 1, 1, options, room, &stream) == cudaErrorInvalidConfiguration, "error");
    expect(static_cast<int>(stream.launches.size()) == refused, "launches before the error");
    expect(cudaGetLastError() == cudaSuccess, "an error left behind");
  }
  shim::launches_until_error = -1;
}

// A leaf so large that its slices are: more than a thousand of 4,096 elements.
void check_large() {
  now = "a large leaf";
  const int64_t n = 1024 * 4096 + 4099;
  std::vector<float> p(n, 1.0f), g(n, 1.0f), out(n);
  const float lr = 1;
  const SgdLeaf<float> leaf{n, p.data(), g.data(), nullptr, &lr, 0, 0, out.data(), nullptr};
  const SgdOptions options{0, 0, 1.0};
  const int64_t room = mtml_cuda_sgd_step_workspace(&n, 1, 1, &options, 0);
  expect(room == 1024, "slices");
  std::vector<double> workspace(room);
  shim::Stream stream;
  expect(step(&leaf, 1, 1, options, workspace.data(), &stream) == cudaSuccess, "forward");
  const float expected = 1 - static_cast<float>(1 / (std::sqrt(static_cast<double>(n)) + 1e-6));
  for (const float x : out) expect(std::fabs(x - expected) <= 1e-7f, "a large leaf");
}

}  // namespace

int main(int count, char** arguments) {
  const auto first = [](int64_t calls) {
    check_errors();
    if (calls >= 100) check_large();
  };
  return run_in_shim(count, arguments, first,
                     [](int64_t i, Random& random, uint64_t) { i % 2 ? check<double>(random) : check<float>(random); });
}
