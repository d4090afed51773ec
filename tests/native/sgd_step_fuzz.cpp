// sgd_step under a sanitizer: random leaves, also empty ones, with every form of rate, momentum, decay and clipping,
// each result held against plain loops, one thread against many and a task alone against the batch, bit by bit. `make
// sanitize` builds and runs it; arguments: number of configurations, seed.
#include "bounded.h"
#include "phases.h"

using namespace mtml;

namespace {

// of one leaf: where its rates are
enum Rate { kNumber, kTask, kElement, kTaskElement };

template <class T>
struct Leaf {
  int64_t size;
  Rate form;
  std::vector<T> p, g, m, lr;  // [T, size]; m empty without momentum
  std::vector<T> u, w;         // cotangents
  bool wants_p, wants_g, wants_m, wants_lr;

  int64_t lr_task() const { return form == kTask ? 1 : form == kTaskElement ? size : 0; }
  int64_t lr_element() const { return form == kElement || form == kTaskElement; }
  T rate(int64_t t, int64_t i) const { return lr[t * lr_task() + i * lr_element()]; }
};

// Of one leaf; dlr_task is double and for any form of rate that has no element.
template <class T>
struct LeafResults {
  std::vector<T> new_p, new_m, dp, dg, dm, dlr;
  std::vector<double> dlr_task;
};

template <class T>
struct Problem {
  int64_t tasks;
  SgdOptions options;
  std::vector<Leaf<T>> leaves;

  Problem() = default;
  explicit Problem(Random& r) {
    tasks = r.chance(0.05) ? 0 : r.chance(0.1) ? r.integer(17, 60) : r.integer(1, 7);
    options.momentum = r.chance(0.5) ? 0.9 : 0;
    options.weight_decay = r.chance(0.5) ? 0.1 : 0;
    options.clip = r.chance(0.4) ? std::numeric_limits<double>::infinity() : r.chance(0.8) ? 4 : 1e4;
    const int64_t count = r.integer(1, 5);
    for (int64_t l = 0; l < count; ++l) {
      Leaf<T> leaf;
      leaf.size = r.chance(0.1) ? 0 : r.integer(1, r.chance(0.1) ? 900 : 40);
      leaf.form = static_cast<Rate>(r.integer(0, 3));
      const int64_t all = tasks * leaf.size;
      leaf.p = r.normals<T>(all);
      leaf.g = r.normals<T>(all);
      leaf.u = r.normals<T>(all);
      if (options.momentum != 0) leaf.m = r.normals<T>(all), leaf.w = r.normals<T>(all);
      leaf.lr = r.normals<T>((leaf.form == kTask || leaf.form == kTaskElement ? tasks : 1) *
                             (leaf.lr_element() ? leaf.size : 1));
      leaf.wants_p = r.chance(0.8);
      leaf.wants_g = r.chance(0.8);
      leaf.wants_m = options.momentum != 0 && r.chance(0.8);
      leaf.wants_lr = r.chance(0.8);
      leaves.push_back(std::move(leaf));
    }
    // a task whose gradient is zero is not clipped, one with a small gradient neither
    for (int64_t t = 0; t < tasks; ++t) {
      const T size = r.chance(0.1) ? 0 : r.chance(0.3) ? T(0.01) : T(1);
      for (Leaf<T>& leaf : leaves) {
        for (int64_t i = 0; i < leaf.size; ++i) leaf.g[t * leaf.size + i] *= size;
      }
    }
  }

  Problem alone(int64_t t) const {
    Problem one = *this;
    one.tasks = 1;
    for (Leaf<T>& leaf : one.leaves) {
      for (auto* values : {&leaf.p, &leaf.g, &leaf.m, &leaf.u, &leaf.w}) {
        *values = part(*values, t * leaf.size, leaf.size);
      }
      leaf.lr = part(leaf.lr, t * leaf.lr_task(), leaf.lr_element() ? leaf.size : 1);
    }
    return one;
  }

  std::vector<LeafResults<T>> run() const {
    std::vector<LeafResults<T>> results(leaves.size());
    std::vector<SgdLeaf<T>> arguments;
    std::vector<SgdLeafGradient<T>> gradients;
    const auto data = [](auto& values) { return values.empty() ? nullptr : values.data(); };
    for (size_t l = 0; l < leaves.size(); ++l) {
      const Leaf<T>& leaf = leaves[l];
      LeafResults<T>& to = results[l];
      const int64_t all = tasks * leaf.size;
      to.new_p = room<T>(all);
      to.new_m = room<T>(options.momentum != 0 ? all : 0);
      to.dp = room<T>(leaf.wants_p ? all : 0);
      to.dg = room<T>(leaf.wants_g ? all : 0);
      to.dm = room<T>(leaf.wants_m ? all : 0);
      const bool by_element = leaf.lr_element();
      to.dlr = room<T>(leaf.wants_lr && by_element ? static_cast<int64_t>(leaf.lr.size()) : 0);
      // to these it adds
      to.dlr_task = std::vector<double>(leaf.wants_lr && !by_element ? tasks : 0);
      arguments.push_back({leaf.size, leaf.p.data(), leaf.g.data(), data(leaf.m), leaf.lr.data(), leaf.lr_task(),
                           leaf.lr_element(), to.new_p.data(), data(to.new_m)});
      gradients.push_back(
          {leaf.u.data(), data(leaf.w), data(to.dp), data(to.dg), data(to.dm), data(to.dlr), data(to.dlr_task)});
    }
    const SgdStep<T>& step = kernels().sgd_step<T>();
    const auto count = static_cast<int64_t>(leaves.size());
    std::vector<double> scale = room<double>(tasks);
    Phases work(threads(), 1e9);
    work.then(tasks, 1,
              [&](int64_t begin, int64_t end) { step.forward(arguments.data(), count, options, begin, end); });
    work.then(tasks, 1, [&](int64_t begin, int64_t end) {
      step.backward(arguments.data(), gradients.data(), count, options, scale.data(), begin, end);
    });
    for (int64_t l = 0; l < count; ++l) {
      if (!gradients[l].dlr || arguments[l].lr_task != 0) continue;
      work.then(leaves[l].size, 5, [&, l](int64_t begin, int64_t end) {
        step.shared_rate_backward(arguments[l], gradients[l], options, scale.data(), tasks, begin, end);
      });
    }
    work.run();
    return results;
  }
};

template <class T>
using Numbers = std::vector<Bounded<T>>;

// The formulas at the top of csrc/core/sgd_step.h, for all tasks.
template <class T>
void check_values(const Problem<T>& problem, const std::vector<LeafResults<T>>& results) {
  using B = Bounded<T>;
  const size_t count = problem.leaves.size();
  const auto& options = problem.options;
  const B momentum = B::rounded(options.momentum), decay = B::rounded(options.weight_decay);
  const bool moves = options.momentum != 0, decays = options.weight_decay != 0, clips = std::isfinite(options.clip);
  struct Expected {
    Numbers<T> new_p, new_m, dp, dg, dm;
    std::vector<Sum<T>> dlr;
  };
  std::vector<Expected> expected(count);
  for (size_t l = 0; l < count; ++l) {
    const Leaf<T>& leaf = problem.leaves[l];
    expected[l].dlr.resize(leaf.lr_element() ? leaf.lr.size() : problem.tasks);
  }

  for (int64_t t = 0; t < problem.tasks; ++t) {
    Sum<T> squares;
    for (const Leaf<T>& leaf : problem.leaves) {
      for (int64_t i = 0; i < leaf.size; ++i) {
        const B g = leaf.g[t * leaf.size + i];
        squares.add(g * g);
      }
    }
    const B norm = square_root(squares.result()), clip = B::rounded(options.clip), one = T(1);
    const B damped = norm + B::rounded(1e-6);
    const bool clipped = clips && norm.value > 0;
    const B scale = clipped ? below(clip / damped, one, clip / damped, one) : one;

    // s of each element, in the order of the leaves, and <s, g>
    Numbers<T> all_s;
    Sum<T> s_dot_g;
    for (const Leaf<T>& leaf : problem.leaves) {
      for (int64_t i = 0; i < leaf.size; ++i) {
        const int64_t at = t * leaf.size + i;
        B s = -(B(leaf.rate(t, i)) * B(leaf.u[at]));
        if (moves) s = s + B(leaf.w[at]);
        all_s.push_back(s);
        s_dot_g.add(s * B(leaf.g[at]));
      }
    }
    const B through_norm = clipped ? clip / (norm * damped * damped) * s_dot_g.result() : B();
    const B factor = clipped ? below(clip / damped, one, through_norm, B()) : B();

    auto next_s = all_s.begin();
    for (size_t l = 0; l < count; ++l) {
      const Leaf<T>& leaf = problem.leaves[l];
      Expected& to = expected[l];
      for (int64_t i = 0; i < leaf.size; ++i) {
        const int64_t at = t * leaf.size + i;
        const B p = leaf.p[at], g = leaf.g[at], u = leaf.u[at], s = *next_s++;
        Sum<T> direction;
        direction.add(scale * g);
        if (decays) direction.add(decay * p);
        if (moves) direction.add(momentum * B(leaf.m[at]));
        const B d = direction.result();
        to.new_m.push_back(d);
        to.new_p.push_back(p - B(leaf.rate(t, i)) * d);
        to.dg.push_back(scale * s - factor * g);
        to.dp.push_back(decays ? u + decay * s : u);
        to.dm.push_back(momentum * s);
        to.dlr[leaf.lr_element() ? t * leaf.lr_task() + i : t].add(-(u * d));
      }
    }
  }

  for (size_t l = 0; l < count; ++l) {
    const Leaf<T>& leaf = problem.leaves[l];
    expect_close(results[l].new_p, expected[l].new_p, "new_p");
    if (moves) expect_close(results[l].new_m, expected[l].new_m, "new_m");
    if (leaf.wants_p) expect_close(results[l].dp, expected[l].dp, "dp");
    if (leaf.wants_g) expect_close(results[l].dg, expected[l].dg, "dg");
    if (leaf.wants_m) expect_close(results[l].dm, expected[l].dm, "dm");
    if (!leaf.wants_lr) continue;
    Numbers<T> dlr;
    for (const Sum<T>& sum : expected[l].dlr) dlr.push_back(sum.result());
    // sums of a whole row are double
    Numbers<double> sums;
    for (const B& sum : dlr) sums.push_back({sum.value, sum.error});
    if (leaf.lr_element()) {
      expect_close(results[l].dlr, dlr, "dlr");
    } else {
      expect_close(results[l].dlr_task, sums, "dlr_task");
    }
  }
}

template <class T>
bool same_bits(const LeafResults<T>& a, const LeafResults<T>& b) {
  using mtml::same_bits;
  return same_bits(a.new_p, b.new_p) && same_bits(a.new_m, b.new_m) && same_bits(a.dp, b.dp) && same_bits(a.dg, b.dg) &&
         same_bits(a.dm, b.dm) && same_bits(a.dlr, b.dlr) && same_bits(a.dlr_task, b.dlr_task);
}

template <class T>
void check(Random& r) {
  const Problem<T> p(r);
  num_threads = 1;
  const auto results = p.run();
  check_values(p, results);
  num_threads = static_cast<int>(r.integer(2, 4));
  const auto on_threads = p.run();
  for (size_t l = 0; l < results.size(); ++l) expect(same_bits(on_threads[l], results[l]), "threads");
  for (int64_t t = 0; t < p.tasks; ++t) {
    const Problem<T> one = p.alone(t);
    const auto results_of_one = one.run();
    for (size_t l = 0; l < results.size(); ++l) {
      const Leaf<T>& leaf = p.leaves[l];
      const auto of_task = [&](const std::vector<T>& all) { return part(all, t * leaf.size, leaf.size); };
      LeafResults<T> together = {of_task(results[l].new_p),      of_task(results[l].new_m), of_task(results[l].dp),
                                 of_task(results[l].dg),         of_task(results[l].dm),    {},
                                 part(results[l].dlr_task, t, 1)};
      // the gradient of a rate that tasks share is their sum
      together.dlr = leaf.form == kTaskElement ? of_task(results[l].dlr) : results_of_one[l].dlr;
      expect(same_bits(results_of_one[l], together), "alone");
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  return run(argc, argv, [](int i, Random& r) { i % 2 ? check<float>(r) : check<double>(r); });
}
