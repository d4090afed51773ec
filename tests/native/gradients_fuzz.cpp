// gradient_gram and gradient_combine under a sanitizer: random leaves, also empty ones, of any number of tasks, each
// result held against plain loops, and one thread against many, bit by bit. `make sanitize` builds and runs it;
// arguments: number of configurations, seed.
#include "bounded.h"
#include "gradients.h"

using namespace mtml;

namespace {

template <class T>
using Arrays = std::vector<std::vector<T>>;

template <class T>
struct Results {
  std::vector<double> gram;
  Arrays<T> gram_backward, combine, combine_backward;
  std::vector<T> d_w;
};

template <class T>
struct Problem {
  int64_t tasks;
  std::vector<int64_t> sizes;
  Arrays<T> g, u;  // [T, size], [size] a leaf
  std::vector<T> w;
  std::vector<double> d_gram;
  std::vector<bool> wants;  // of each leaf
  bool wants_d_w;

  explicit Problem(Random& r) {
    // a few tasks; many, in blocks of columns that become shorter; several pieces of columns
    const int64_t form = r.integer(0, 29);
    tasks = r.chance(0.05) ? 0 : form == 0 ? r.integer(200, 540) : r.integer(1, r.chance(0.2) ? 40 : 12);
    const int64_t leaves = r.integer(1, 5);
    if (form == 1) tasks = std::min<int64_t>(tasks, 7);
    for (int64_t l = 0; l < leaves; ++l) {
      const int64_t most = form == 0 ? 40 : r.chance(0.2) ? 1200 : r.chance(0.3) ? 300 : 35;
      sizes.push_back(r.chance(0.1) ? 0 : form == 1 ? r.integer(10000, 40000) : r.integer(1, most));
      g.push_back(r.normals<T>(tasks * sizes[l]));
      u.push_back(r.normals<T>(sizes[l]));
      wants.push_back(r.chance(0.8));
    }
    w = r.normals<T>(tasks);
    d_gram = r.normals<double>(tasks * tasks);
    wants_d_w = r.chance(0.8);
  }

  // f(leaves that write to what `to` has for them)
  template <class F>
  void with_leaves(Arrays<T>& to, const F& f) const {
    std::vector<GradientLeaf<T>> leaves;
    for (size_t l = 0; l < sizes.size(); ++l) {
      leaves.push_back({sizes[l], g[l].data(), l < to.size() && !to[l].empty() ? to[l].data() : nullptr});
    }
    f(GradientLeaves<T>{tasks, leaves.data(), static_cast<int64_t>(leaves.size())});
  }

  Results<T> run() const {
    Results<T> results;
    Arrays<T> none;
    results.gram = room<double>(tasks * tasks);
    for (size_t l = 0; l < sizes.size(); ++l) {
      results.gram_backward.push_back(room<T>(wants[l] ? tasks * sizes[l] : 0));
      results.combine.push_back(room<T>(sizes[l]));
    }
    results.combine_backward = results.gram_backward;
    results.d_w = room<T>(wants_d_w ? tasks : 0);
    std::vector<const T*> cotangents;
    for (const auto& values : u) cotangents.push_back(values.data());
    with_leaves(none, [&](const auto& leaves) { gradient_gram(leaves, results.gram.data(), threads()); });
    with_leaves(results.gram_backward,
                [&](const auto& leaves) { gradient_gram_backward(leaves, d_gram.data(), threads()); });
    with_leaves(results.combine, [&](const auto& leaves) { gradient_combine(leaves, w.data(), threads()); });
    with_leaves(results.combine_backward, [&](const auto& leaves) {
      gradient_combine_backward(leaves, w.data(), cotangents.data(), wants_d_w ? results.d_w.data() : nullptr,
                                threads());
    });
    return results;
  }
};

template <class T>
bool same_bits(const Arrays<T>& a, const Arrays<T>& b) {
  bool same = a.size() == b.size();
  for (size_t l = 0; same && l < a.size(); ++l) same = mtml::same_bits(a[l], b[l]);
  return same;
}

// M is a sum of doubles, and so is its gradient until it is rounded to T.
template <class T>
void check_gram(const Problem<T>& p, const Results<T>& results) {
  using Double = Bounded<double>;
  const int64_t tasks = p.tasks;
  std::vector<Sum<double>> sums(tasks * tasks);
  for (size_t l = 0; l < p.sizes.size(); ++l) {
    const int64_t n = p.sizes[l];
    for (int64_t i = 0; i < tasks; ++i) {
      for (int64_t j = 0; j < tasks; ++j) {
        for (int64_t k = 0; k < n; ++k) {
          sums[i * tasks + j].add(Double(double{p.g[l][i * n + k]}) * Double(double{p.g[l][j * n + k]}));
        }
      }
    }
    if (!p.wants[l]) continue;
    std::vector<Bounded<T>> gradient(tasks * n);
    for (int64_t i = 0; i < tasks; ++i) {
      for (int64_t k = 0; k < n; ++k) {
        Sum<double> sum;
        for (int64_t j = 0; j < tasks; ++j) {
          const Double s = Double(p.d_gram[i * tasks + j]) + Double(p.d_gram[j * tasks + i]);
          sum.add(s * Double(double{p.g[l][j * n + k]}));
        }
        const Double exact = sum.result();
        gradient[i * n + k] = Bounded<T>::rounded(exact.value, exact.error);
      }
    }
    expect_close(results.gram_backward[l], gradient, "gram_backward");
  }
  std::vector<Double> gram;
  for (const auto& sum : sums) gram.push_back(sum.result());
  expect_close(results.gram, gram, "gram");
  for (int64_t i = 0; i < tasks; ++i) {
    for (int64_t j = 0; j < i; ++j) expect(results.gram[i * tasks + j] == results.gram[j * tasks + i], "symmetric");
  }
}

template <class T>
void check_combine(const Problem<T>& p, const Results<T>& results) {
  std::vector<Sum<double>> sums(p.tasks);
  for (size_t l = 0; l < p.sizes.size(); ++l) {
    const int64_t n = p.sizes[l];
    std::vector<Bounded<T>> combined(n), gradient(p.tasks * n);
    for (int64_t k = 0; k < n; ++k) {
      Sum<T> sum;
      for (int64_t t = 0; t < p.tasks; ++t) {
        const T g = p.g[l][t * n + k], u = p.u[l][k];
        sum.add(Bounded<T>(p.w[t]) * Bounded<T>(g));
        gradient[t * n + k] = Bounded<T>(p.w[t]) * Bounded<T>(u);
        sums[t].add(Bounded<double>(double{g}) * Bounded<double>(double{u}));
      }
      combined[k] = sum.result();
    }
    expect_close(results.combine[l], combined, "combine");
    if (p.wants[l]) expect_close(results.combine_backward[l], gradient, "combine_backward");
  }
  if (!p.wants_d_w) return;
  std::vector<Bounded<T>> d_w;
  for (const auto& sum : sums) d_w.push_back(Bounded<T>::rounded(sum.result().value, sum.result().error));
  expect_close(results.d_w, d_w, "combine_backward of w");
}

template <class T>
void check(Random& r) {
  const Problem<T> p(r);
  num_threads = 1;
  const Results<T> results = p.run();
  check_gram(p, results);
  check_combine(p, results);
  num_threads = static_cast<int>(r.integer(2, 4));
  const Results<T> on_threads = p.run();
  expect(mtml::same_bits(on_threads.gram, results.gram), "threads: gram");
  expect(same_bits(on_threads.gram_backward, results.gram_backward), "threads: gram_backward");
  expect(same_bits(on_threads.combine, results.combine), "threads: combine");
  expect(same_bits(on_threads.combine_backward, results.combine_backward), "threads: combine_backward");
  expect(mtml::same_bits(on_threads.d_w, results.d_w), "threads: combine_backward of w");
}

}  // namespace

int main(int argc, char** argv) {
  return run(argc, argv, [](int i, Random& r) { i % 2 ? check<float>(r) : check<double>(r); });
}
