// Work in phases, done by several threads within one parallel region: to wake a thread takes as long as a small phase,
// so it is done once, and the thread that calls has begun by then.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <thread>
#include <utility>

#include "core/threads.h"

namespace mtml {

class Phases {
 public:
  using Work = std::function<void(int64_t begin, int64_t end)>;

  // operations: floating-point operations of all phases together
  Phases(Threads threads, double operations)
      : run_(threads.run),
        threads_(int64_t(std::clamp(operations / threads.operations_each, 1.0, double(threads.count)))) {}

  int64_t threads() const { return threads_; }

  // Next: f over disjoint ranges that cover 0..n, at least `grain` long where possible, when all before is done. Which
  // ranges, and which thread has them, is left to chance.
  void then(int64_t n, int64_t grain, Work f) {
    if (n > 0) phases_.emplace_back(n, std::max<int64_t>(1, grain), std::move(f));
  }

  void run() {
    if (threads_ == 1) {
      for (Phase& phase : phases_) phase.f(0, phase.n);
      return;
    }
    run_(threads_, [this] { work(); });
    if (failure_) std::rethrow_exception(failure_);
  }

 private:
  struct Phase {
    Phase(int64_t size, int64_t least, Work work) : n(size), grain(least), f(std::move(work)), left(size) {}

    const int64_t n, grain;
    const Work f;
    std::atomic<int64_t> next{0}, left;  // first element that nobody has taken, elements that are not done
  };

  void (*run_)(int64_t, const std::function<void()>&);
  int64_t threads_;
  std::deque<Phase> phases_;
  std::atomic<bool> failed_{false};
  std::exception_ptr failure_;

  // A thread waits only for what another is doing at that moment, never for one that has yet to come.
  void work() {
    for (Phase& phase : phases_) {
      int64_t begin = 0, end = 0;
      while (take(phase, begin, end)) {
        // what follows a failure is not done, but counts as such
        if (!failed_.load(std::memory_order_relaxed)) attempt(phase.f, begin, end);
        phase.left.fetch_sub(end - begin, std::memory_order_acq_rel);
      }
      while (phase.left.load(std::memory_order_acquire) > 0) std::this_thread::yield();
    }
  }

  // the next range: half of each thread's share of what is left, so that all end at about the same time
  bool take(Phase& phase, int64_t& begin, int64_t& end) const {
    begin = phase.next.load(std::memory_order_relaxed);
    do {
      if (begin >= phase.n) return false;
      const int64_t left = phase.n - begin;
      end = begin + std::min(left, std::max(phase.grain, left / (2 * threads_)));
    } while (!phase.next.compare_exchange_weak(begin, end, std::memory_order_relaxed));
    return true;
  }

  // an exception must not leave the region, which may belong to a C interface
  void attempt(const Work& f, int64_t begin, int64_t end) {
    try {
      f(begin, end);
    } catch (...) {
      if (!failed_.exchange(true)) failure_ = std::current_exception();
    }
  }
};

}  // namespace mtml
