// mlp_adapt under a sanitizer: random sizes and options, in every form of the weights and on threads, held against
// itself: a task alone against the batch, kept state against recomputed, one thread against many (all bit by bit), the
// forms against each other, and the gradient against differences of the loss; and the phases of a parallel region.
// `make sanitize` builds and runs it; arguments: number of configurations, seed.
#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "fuzz.h"
#include "mlp_adapt.h"
#include "mlp_problem.h"

using namespace mtml;

namespace {

// what the cotangents weigh
double value(const Problem<double>& p) {
  mlp_adapt_forward<double>(p.a, nullptr, threads());
  double sum = 0;
  for (size_t i = 0; i < p.losses.size(); ++i) sum += p.d_losses[i] * p.losses[i];
  for (size_t i = 0; i < p.fast.size(); ++i) sum += p.d_fast[i] * p.fast[i];
  for (size_t i = 0; p.a.d_outputs && i < p.outputs.size(); ++i) {
    if (std::isfinite(p.outputs[i])) sum += p.d_outputs[i] * p.outputs[i];
  }
  return sum;
}

template <class T>
void check(Problem<T>& p, Random& r) {
  num_threads = 1;
  unsetenv("MTML_FAST_FORM");
  mlp_adapt_gradients<T>(p.a, threads());
  const std::vector<T> expected = p.results();

  std::vector<T> state(mlp_adapt_state_size<T>(p.a));
  mlp_adapt_forward<T>(p.a, state.data(), threads());
  mlp_adapt_backward<T>(p.a, state.data(), threads());
  expect(same_bits(p.results(), expected), "kept state");
  num_threads = static_cast<int>(r.integer(2, 4));
  mlp_adapt_gradients<T>(p.a, threads());
  expect(same_bits(p.results(), expected), "threads");
  for (const char* form : {"dense", "gram", "gram_cross", "factored"}) {
    setenv("MTML_FAST_FORM", form, 1);
    mlp_adapt_gradients<T>(p.a, threads());
    // a kink of the activation may fall on either side in float32: those are compared in float64
    if (sizeof(T) == sizeof(double)) expect(close(p.results(), expected, 1e-9), form);
  }
  unsetenv("MTML_FAST_FORM");
}

// the gradient along a random direction of the parameters, by differences
void check_gradient(Problem<double>& p, Random& r) {
  if (p.a.options.first_order || p.a.options.activation == Activation::kRelu ||
      p.a.options.activation == Activation::kLeakyRelu || p.a.options.norm) {
    return;
  }
  num_threads = 1;
  mlp_adapt_gradients<double>(p.a, threads());
  double along = 0, size = 0;
  std::vector<std::vector<double>> start = p.params, direction = p.params;
  for (size_t i = 0; i < start.size(); ++i) {
    for (size_t j = 0; j < start[i].size(); ++j) {
      direction[i][j] = r.normal();
      along += direction[i][j] * p.gradients[i][j];
      size += std::abs(direction[i][j] * p.gradients[i][j]);
    }
  }
  auto at = [&](double step) {
    for (size_t i = 0; i < start.size(); ++i) {
      for (size_t j = 0; j < start[i].size(); ++j) p.params[i][j] = start[i][j] + step * direction[i][j];
    }
    return value(p);
  };
  const double h = 1e-6, difference = (at(h) - at(-h)) / (2 * h);
  p.params = start;
  expect(std::abs(difference - along) <= 1e-4 * size + 1e-6,
         "gradient " + std::to_string(difference) + " " + std::to_string(along));
}

// Every element of every phase once, after all of the phase before; a failure comes out, and nothing hangs.
void check_phases(Random& r) {
  num_threads = static_cast<int>(r.integer(1, 4));
  const bool fails = r.chance(0.2);
  const int64_t phases = r.integer(0, 6);
  std::vector<std::vector<int64_t>> seen;
  for (int64_t i = 0; i < phases; ++i) seen.emplace_back(r.integer(0, 40));
  const int64_t failing = fails && phases > 0 ? r.integer(0, phases - 1) : -1;
  Phases work(threads(), 1e9);
  for (int64_t i = 0; i < phases; ++i) {
    work.then(static_cast<int64_t>(seen[i].size()), r.integer(-1, 12), [&, i](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j) {
        // it reads what other threads wrote in the phase before
        const bool complete =
            i == 0 || std::all_of(seen[i - 1].begin(), seen[i - 1].end(), [](int64_t n) { return n == 1; });
        seen[i][j] += complete ? 1 : 100;
      }
      if (i == failing) throw std::runtime_error("on purpose");
    });
  }
  bool failed = false;
  try {
    work.run();
  } catch (const std::runtime_error&) {
    failed = true;
  }
  expect(failed == (failing >= 0 && !seen[failing].empty()), "phases: failure");
  if (failed) return;
  for (const auto& phase : seen) {
    expect(std::all_of(phase.begin(), phase.end(), [](int64_t n) { return n == 1; }), "phases: once, in order");
  }
}

}  // namespace

int main(int argc, char** argv) {
  return run(argc, argv, [](int i, Random& r) {
    check_phases(r);
    if (i % 2) {
      Problem<float> p(r, 70);
      check(p, r);
    } else {
      Problem<double> p(r, 70);
      check(p, r);
      check_gradient(p, r);
    }
  });
}
