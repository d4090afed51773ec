#include "gradients.h"

#include <algorithm>
#include <vector>

#include "isa/choose.h"
#include "memory.h"
#include "phases.h"

namespace mtml {
namespace {

// Columns that one thread takes at a time, and whose sums are added up in their order, whatever the number of threads.
// With T tasks they are enough for the sums of all pieces, [T, T] each, to stay below a thirtieth of the gradients.
constexpr int64_t kColumns = 32768, kColumnsPerTask = 64;

// Reading and writing takes the time: so many operations of Phases' measure for each element.
constexpr double kOperations = 12;

template <class T>
class Pieces {
 public:
  explicit Pieces(const GradientLeaves<T>& g) : columns_(std::max(kColumns, kColumnsPerTask * g.tasks)) {
    for (int64_t l = 0; l < g.count; ++l) all_ += g.leaves[l].size;
    elements_ = static_cast<double>(all_) * static_cast<double>(g.tasks);
  }

  int64_t count() const { return (all_ + columns_ - 1) / columns_; }
  double elements() const { return elements_; }

  // f(piece, begin, end, scratch)
  template <class F>
  void run(const Threads& threads, double operations, int64_t scratch_size, const F& f) const {
    Phases phases(threads, operations);
    phases.then(count(), 1, [&](int64_t first, int64_t last) {
      Memory<double> scratch(scratch_size);
      for (int64_t piece = first; piece < last; ++piece) {
        f(piece, piece * columns_, std::min(all_, (piece + 1) * columns_), scratch);
      }
    });
    phases.run();
  }

 private:
  int64_t columns_, all_ = 0;
  double elements_;
};

// to[i] = the sum over pieces of sums[piece * n + i]
template <class To>
void add_up(const double* sums, int64_t pieces, int64_t n, To* to) {
  for (int64_t i = 0; i < n; ++i) {
    double total = 0;
    for (int64_t piece = 0; piece < pieces; ++piece) total += sums[piece * n + i];
    to[i] = static_cast<To>(total);
  }
}

}  // namespace

template <class T>
void gradient_gram(const GradientLeaves<T>& g, double* gram, Threads threads) {
  const Gradients<T>& core = kernels().gradients<T>();
  const Pieces<T> pieces(g);
  const int64_t size = g.tasks * g.tasks;
  Memory<double> sums(pieces.count() * size);
  pieces.run(threads, pieces.elements() * std::max(kOperations, double(g.tasks)), core.gram_scratch(g.tasks),
             [&](int64_t piece, int64_t begin, int64_t end, double* scratch) {
               core.gram(g, begin, end, sums + piece * size, scratch);
             });
  add_up(sums, pieces.count(), size, gram);
}

template <class T>
void gradient_gram_backward(const GradientLeaves<T>& g, const double* d_gram, Threads threads) {
  const Gradients<T>& core = kernels().gradients<T>();
  const int64_t tasks = g.tasks;
  std::vector<double> s(tasks * tasks);
  for (int64_t i = 0; i < tasks; ++i) {
    for (int64_t j = 0; j < tasks; ++j) s[i * tasks + j] = d_gram[i * tasks + j] + d_gram[j * tasks + i];
  }
  const Pieces<T> pieces(g);
  pieces.run(threads, pieces.elements() * std::max(kOperations, 2 * double(tasks)), core.gram_backward_scratch(tasks),
             [&](int64_t, int64_t begin, int64_t end, double* scratch) {
               core.gram_backward(g, begin, end, s.data(), scratch);
             });
}

template <class T>
void gradient_combine(const GradientLeaves<T>& g, const T* w, Threads threads) {
  const Pieces<T> pieces(g);
  pieces.run(threads, pieces.elements() * kOperations, 0,
             [&](int64_t, int64_t begin, int64_t end, double*) { kernels().gradients<T>().combine(g, begin, end, w); });
}

template <class T>
void gradient_combine_backward(const GradientLeaves<T>& g, const T* w, const T* const* u, T* d_w, Threads threads) {
  const Pieces<T> pieces(g);
  Memory<double> sums(d_w ? pieces.count() * g.tasks : 0);
  pieces.run(threads, pieces.elements() * kOperations, 0, [&](int64_t piece, int64_t begin, int64_t end, double*) {
    kernels().gradients<T>().combine_backward(g, begin, end, w, u, d_w ? sums + piece * g.tasks : nullptr);
  });
  if (d_w) add_up(sums, pieces.count(), g.tasks, d_w);
}

#define MTML_GRADIENTS(T)                                                                 \
  template void gradient_gram(const GradientLeaves<T>&, double*, Threads);                \
  template void gradient_gram_backward(const GradientLeaves<T>&, const double*, Threads); \
  template void gradient_combine(const GradientLeaves<T>&, const T*, Threads);            \
  template void gradient_combine_backward(const GradientLeaves<T>&, const T*, const T* const*, T*, Threads);
MTML_GRADIENTS(float)
MTML_GRADIENTS(double)
#undef MTML_GRADIENTS

}  // namespace mtml
