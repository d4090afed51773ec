// The kernels of mlp_adapt in tests/native/cuda_shim: random calls with every option. In float64 the gradient is held
// against differences of what forward sweeps give, in float32 both are held against float64; and all results bit by bit
// against the same call with less shared memory, on fewer blocks, and a task alone. Arguments: the number of calls, the
// seed, and the barrier to leave out.
#include "cuda/mlp_adapt.h"

#include <cstdio>
#include <string>

#include "cuda_check.h"
#include "mlp_problem.h"

using namespace mtml;

namespace {

// A problem as a GPU gets it: without the host's knowledge of offsets, and with rates' gradients as one table.
template <class T>
struct Call : Problem<T> {
  using Problem<T>::a;
  std::vector<T> table, table_gradient;
  std::vector<int64_t> parameter_rows;

  Call(Random& r, bool everything = false) : Problem<T>(r, 40, everything) {
    // as many rows in all tasks now and then: then arrays of rows may lie in shared memory
    if (r.chance(0.6) || everything) {
      make_regular(a.support, this->support_offsets);
      make_regular(a.query, this->query_offsets);
      // the labels' classes exist in their new tasks too
      const int64_t classes = this->widths.back();
      for (int64_t t = 0; a.class_mask && t < a.options.tasks; ++t) {
        for (int64_t i = t * a.support.max_rows; i < (t + 1) * a.support.max_rows; ++i)
          this->mask[t * classes + this->support_labels[i]] = 1;
        for (int64_t i = t * a.query.max_rows; i < (t + 1) * a.query.max_rows; ++i)
          this->mask[t * classes + this->query_labels[i]] = 1;
      }
      // what has no row any more has no result
      const int64_t evaluations = a.options.every_step ? a.options.steps + 1 : 1;
      this->outputs.resize(evaluations * a.query.all_rows * this->widths.back());
      if (a.support.x_gradient) this->support_gradient.resize(a.support.all_rows * this->widths[0]);
      if (a.query.x_gradient) this->query_gradient.resize(a.query.all_rows * this->widths[0]);
    } else {
      a.support.max_rows = a.query.max_rows = 0;
    }
    const int64_t steps = std::max<int64_t>(1, a.options.steps);
    parameter_rows.assign(a.num_params, 1);
    for (auto& parameter : this->parameters) parameter.rate_sums = nullptr;
    if (!a.wants_rates || a.params[0].rate_element) return;
    // [K, parameters]
    table.resize(steps * a.num_params);
    table_gradient.resize(table.size());
    for (int64_t p = 0; p < a.num_params; ++p) {
      for (int64_t k = 0; k < steps; ++k) table[k * a.num_params + p] = this->rates[p][k];
      this->parameters[p].rate = table.data() + p;
      this->parameters[p].rate_step = a.num_params;
    }
  }

  // the largest of its tasks stands for all: fewer rows than there are
  static void make_regular(MlpRows<T>& rows, std::vector<int64_t>& offsets) {
    const int64_t tasks = static_cast<int64_t>(offsets.size()) - 1;
    rows.max_rows = offsets[tasks] / tasks;
    for (int64_t t = 0; t <= tasks; ++t) offsets[t] = t * rows.max_rows;
    rows.all_rows = offsets[tasks];
    rows.offsets = nullptr;
  }

  void run(shim::Stream* stream, bool keeps = true) {
    const T nothing = std::numeric_limits<T>::quiet_NaN();
    for (auto* results : {&this->outputs, &this->losses, &this->fast, &table_gradient})
      std::fill(results->begin(), results->end(), nothing);
    const bool is_gram = cuda::MlpKernels<T>::is_gram(&a);
    Products products(*this, is_gram);
    const cuda::MlpGram<T>* gram = is_gram ? &products.gram : nullptr;
    std::vector<T> state(cuda::MlpKernels<T>::state(&a, is_gram, keeps), nothing);
    expect(cuda::MlpKernels<T>::forward(&a, gram, keeps, state.data(), stream) == cudaSuccess, "forward");
    if (!keeps) return;
    const cuda::MlpRateGradients<T> rates{table_gradient.empty() ? nullptr : table_gradient.data(),
                                          std::max<int64_t>(1, a.options.steps), a.num_params, parameter_rows.data()};
    std::vector<double> room(cuda::MlpKernels<T>::workspace(&a, is_gram), nothing);
    expect(cuda::MlpKernels<T>::backward(&a, gram, state.data(), room.data(), stream) == cudaSuccess, "backward");
    if (is_gram) products.finish(*this);
    expect(cuda::MlpKernels<T>::sums(&a, gram, &rates, room.data(), stream) == cudaSuccess, "sums");
  }

  // What a first layer in Gram form is given: products over all tasks' rows.
  struct Products {
    cuda::MlpGram<T> gram{};
    std::vector<T> support_z, query_z, xx, qx, xq, support_u, query_u, support_gradient, query_gradient;

    Products(const Call& call, bool is_gram) {
      if (!is_gram) return;
      const MlpArguments<T>& a = call.a;
      const int64_t D = call.widths[0], H = call.widths[1], N = a.support.max_rows, Q = a.query.max_rows;
      const T *x = a.support.x, *xq = a.query.x, *weight = a.params[0].start;
      // a [rows, D] times b [columns, D]
      const auto dots = [&](std::vector<T>& to, const T* a, int64_t rows, const T* b, int64_t columns) {
        for (int64_t i = 0; i < rows; ++i) {
          for (int64_t j = 0; j < columns; ++j) {
            double sum = 0;
            for (int64_t d = 0; d < D; ++d) sum += double(a[i * D + d]) * b[j * D + d];
            to.push_back(static_cast<T>(sum));
          }
        }
      };
      dots(support_z, x, a.support.all_rows, weight, H);
      dots(query_z, xq, a.query.all_rows, weight, H);
      for (int64_t t = 0; t < a.options.tasks; ++t) {
        dots(xx, x + t * N * D, N, x + t * N * D, N);
        dots(qx, xq + t * Q * D, Q, x + t * N * D, N);
        dots(this->xq, x + t * N * D, N, xq + t * Q * D, Q);
      }
      support_u.resize(support_z.size());
      query_u.resize(query_z.size());
      support_gradient.resize(H * D);
      query_gradient.resize(H * D);
      gram = {support_z.data(), query_z.data(),          xx.data(),
              qx.data(),        this->xq.data(),         support_u.data(),
              query_u.data(),   support_gradient.data(), query_gradient.data()};
    }

    void finish(const Call& call) {
      const int64_t D = call.widths[0], H = call.widths[1];
      const auto outer = [&](std::vector<T>& to, const std::vector<T>& u, const T* x, int64_t rows) {
        for (int64_t o = 0; o < H; ++o) {
          for (int64_t d = 0; d < D; ++d) {
            double sum = 0;
            for (int64_t row = 0; row < rows; ++row) sum += double(u[row * H + o]) * x[row * D + d];
            to[o * D + d] = static_cast<T>(sum);
          }
        }
      };
      outer(support_gradient, support_u, call.a.support.x, call.a.support.all_rows);
      outer(query_gradient, query_u, call.a.query.x, call.a.query.all_rows);
    }
  };

  std::vector<T> results() const {
    std::vector<T> all = Problem<T>::results();
    all.insert(all.end(), table_gradient.begin(), table_gradient.end());
    return all;
  }

  double value() {
    shim::Stream stream;
    run(&stream, false);
    double sum = 0;
    for (size_t i = 0; i < this->losses.size(); ++i) sum += double(this->d_losses[i]) * this->losses[i];
    for (size_t i = 0; i < this->fast.size(); ++i) sum += double(this->d_fast[i]) * this->fast[i];
    for (size_t i = 0; a.d_outputs && i < this->outputs.size(); ++i)
      if (std::isfinite(this->outputs[i])) sum += double(this->d_outputs[i]) * this->outputs[i];
    return sum;
  }

  bool has_kinks() const {
    return a.options.activation == Activation::kRelu || a.options.activation == Activation::kLeakyRelu ||
           a.options.activation == Activation::kElu;
  }
};

template <class T>
void check(Random& r, uint64_t seed, bool everything) {
  Random same{std::mt19937_64(seed)};
  Call<T> p(same, everything);
  shim::max_blocks = shim::max_shared = 2147483647;
  shim::Stream stream;
  p.run(&stream);
  std::vector<std::string> kernels;
  for (const shim::Launch& launch : stream.launches) kernels.push_back(launch.kernel);
  std::vector<std::string> expected = {"mlp_adapt", "mlp_adapt_backward"};
  // nothing to add up where every task has its own start and rates stay
  if (p.a.params[0].task_stride == 0 || p.a.wants_rates) expected.push_back("mlp_adapt_sums");
  expect(kernels == expected, "launches");

  const std::vector<T> results = p.results();
  for (const T x : results) expect(!std::isnan(x), "a result that nobody wrote");
  // from none of it to all of it
  shim::max_shared = r.chance(0.3) ? 1024 : r.integer(1024, 60000);
  shim::max_blocks = r.integer(1, 3);
  p.run(&stream);
  expect(same_bits(p.results(), results), "less shared memory, fewer blocks");
  check_alone(p, r.integer(0, p.a.options.tasks - 1));
}

// a task alone: what does not add up over tasks has the same bits
template <class T>
void check_alone(Call<T>& p, int64_t t) {
  const MlpArguments<T> a = p.a;
  if (!a.support.offsets || a.params[0].task_stride == 0) return;
  const std::vector<T> losses = p.losses, dx = p.support_gradient;
  const std::vector<std::vector<T>> gradients = p.gradients;
  const int64_t evaluations = a.options.every_step ? a.options.steps + 1 : 1, tasks = a.options.tasks;
  std::vector<int64_t> support{0, p.support_offsets[t + 1] - p.support_offsets[t]};
  std::vector<int64_t> query{0, p.query_offsets[t + 1] - p.query_offsets[t]};
  const int64_t first = p.support_offsets[t], first_query = p.query_offsets[t], width = p.widths[0];
  const int64_t classes = p.widths.back();
  std::vector<T> outputs(evaluations * query[1] * classes), alone(evaluations), d_losses(evaluations);
  for (int64_t s = 0; s < evaluations; ++s) d_losses[s] = p.d_losses[s * tasks + t];
  const auto rows_of = [&](MlpRows<T>& rows, const std::vector<int64_t>& offsets, int64_t from) {
    rows.x += from * width;
    if (rows.labels) rows.labels += from;
    if (rows.targets) rows.targets += from * classes;
    if (rows.x_gradient) rows.x_gradient += from * width;
    rows.offsets = offsets.data();
    rows.all_rows = offsets[1];
  };
  p.a.options.tasks = 1;
  rows_of(p.a.support, support, first);
  rows_of(p.a.query, query, first_query);
  if (p.a.class_mask) p.a.class_mask += t * classes;
  p.a.outputs = outputs.data();
  p.a.losses = alone.data();
  p.a.fast = nullptr;
  p.a.wants_fast = false;
  p.a.d_outputs = p.a.d_fast = nullptr;
  p.a.d_losses = d_losses.data();
  for (size_t i = 0; i < p.parameters.size(); ++i) {
    p.parameters[i].start += t * p.parameters[i].task_stride;
    p.parameters[i].gradient += t * p.parameters[i].task_stride;
  }
  shim::Stream stream;
  shim::max_blocks = shim::max_shared = 2147483647;
  p.run(&stream);
  for (int64_t s = 0; s < evaluations; ++s)
    expect(std::memcmp(&alone[s], &losses[s * tasks + t], sizeof(T)) == 0, "alone: losses");
  if (a.d_outputs || a.d_fast) return;
  for (size_t i = 0; i < gradients.size(); ++i) {
    const int64_t size = p.sizes[i];
    expect(std::memcmp(p.gradients[i].data() + t * size, gradients[i].data() + t * size, size * sizeof(T)) == 0,
           "alone: gradients");
  }
  const int64_t begin = first * width, count = support[1] * width;
  expect(dx.empty() || std::memcmp(p.support_gradient.data() + begin, dx.data() + begin, count * sizeof(T)) == 0,
         "alone: feature gradients");
}

// the first layer in Gram form against the dense one, in float64
void check_gram(Random& r, uint64_t seed) {
  Random same{std::mt19937_64(seed)};
  Call<double> p(same);
  MlpArguments<double>& a = p.a;
  a.options.momentum = a.options.weight_decay = 0;
  a.options.clip = std::numeric_limits<double>::infinity();
  a.wants_fast = a.wants_support_x = a.wants_query_x = false;
  a.support.x_gradient = a.query.x_gradient = nullptr;
  a.fast = nullptr;
  a.d_fast = nullptr;
  shim::Stream stream;
  shim::max_blocks = shim::max_shared = 2147483647;
  p.run(&stream);
  const std::vector<double> dense = p.results();
  shim::gram_weights = -1;
  shim::max_shared = r.chance(0.5) ? 2147483647 : r.integer(1024, 60000);
  if (mtml_cuda_mlp_adapt_is_gram_f64(&a)) {
    p.run(&stream);
    expect(close(p.results(), dense, 1e-9), "Gram form");
  }
  shim::gram_weights = 8192;
}

// float32 against float64, of the same numbers
void check_precision(uint64_t seed) {
  Random one{std::mt19937_64(seed)}, two{std::mt19937_64(seed)};
  Call<float> p(one);
  Call<double> exact(two);
  if (p.has_kinks()) return;
  shim::max_blocks = shim::max_shared = 2147483647;
  shim::Stream stream;
  p.run(&stream);
  exact.run(&stream);
  const std::vector<float> results = p.results();
  const std::vector<double> wide = exact.results();
  expect(close(std::vector<double>(results.begin(), results.end()), wide, 2e-3), "float32");
}

// the gradient along a random direction of everything that has one, by differences
void check_gradient(Random& r, uint64_t seed) {
  Random same{std::mt19937_64(seed)};
  Call<double> p(same);
  // differences tell little where a norm has few rows
  if (p.a.options.first_order || p.a.options.norm || p.has_kinks()) return;
  shim::max_blocks = shim::max_shared = 2147483647;
  shim::Stream stream;
  p.run(&stream);
  double along = 0, size = 0;
  std::vector<std::pair<std::vector<double>*, std::vector<double>>> moved;
  const auto add = [&](std::vector<double>& values, const std::vector<double>& gradient) {
    if (gradient.empty()) return;
    std::vector<double> direction(values.size());
    // rows that are nobody's have no gradient
    for (size_t i = 0; i < gradient.size(); ++i) {
      direction[i] = r.normal();
      along += direction[i] * gradient[i];
      size += std::abs(direction[i] * gradient[i]);
    }
    moved.emplace_back(&values, direction);
  };
  for (size_t i = 0; i < p.params.size(); ++i) add(p.params[i], p.gradients[i]);
  for (size_t i = 0; i < p.rates.size(); ++i) add(p.rates[i], p.rate_gradients[i]);
  add(p.table, p.table_gradient);
  add(p.support_x, p.support_gradient);
  add(p.query_x, p.query_gradient);
  const auto at = [&](double step) {
    for (auto& [values, direction] : moved)
      for (size_t i = 0; i < values->size(); ++i) (*values)[i] += step * direction[i];
    const double value = p.value();
    for (auto& [values, direction] : moved)
      for (size_t i = 0; i < values->size(); ++i) (*values)[i] -= step * direction[i];
    return value;
  };
  const double h = 1e-6, difference = (at(h) - at(-h)) / (2 * h);
  expect(std::abs(difference - along) <= 1e-4 * size + 1e-6,
         "gradient " + std::to_string(difference) + ", " + std::to_string(along));
}

// A launch that CUDA refuses: its error comes back, and nothing is launched after it.
void check_errors() {
  now = "refused launches";
  Random r{std::mt19937_64(1)};
  Call<float> p(r);
  std::vector<float> state(mtml_cuda_mlp_adapt_state_f32(&p.a, 0, 1));
  std::vector<double> room(mtml_cuda_mlp_adapt_workspace_f32(&p.a, 0));
  const cuda::MlpRateGradients<float> rates{nullptr, 0, 0, p.parameter_rows.data()};
  shim::Stream stream;
  const auto refused = [&](int error, const char* what) {
    expect(error == cudaErrorInvalidConfiguration && stream.launches.empty(), what);
    shim::launches_until_error = 0;
  };
  shim::launches_until_error = 0;
  refused(mtml_cuda_mlp_adapt_f32(&p.a, nullptr, 1, state.data(), &stream), "forward");
  refused(mtml_cuda_mlp_adapt_backward_f32(&p.a, nullptr, state.data(), room.data(), &stream), "backward");
  p.parameters[0].gradient = p.gradients[0].data();
  refused(mtml_cuda_mlp_adapt_sums_f32(&p.a, nullptr, &rates, room.data(), &stream), "sums");
  expect(cudaGetLastError() == cudaSuccess, "an error left behind");
  shim::launches_until_error = -1;
}

}  // namespace

int main(int count, char** arguments) {
  return run_in_shim(
      count, arguments, [](int64_t) { check_errors(); },
      [](int64_t i, Random&, uint64_t first) {
        const uint64_t seed = first + static_cast<uint64_t>(i);
        now = "call " + std::to_string(i);
        Random r{std::mt19937_64(seed)};
        // what a barrier guards shows at once
        const bool everything = i < 2;
        i % 2 ? check<double>(r, seed, everything) : check<float>(r, seed, everything);
        i % 2 ? check_gradient(r, seed) : check_precision(seed);
        check_gram(r, seed);
      });
}
