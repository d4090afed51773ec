// The threads that a door of the library has to give.
#pragma once

#include <cstdint>
#include <functional>

namespace mtml {

// What a door brings: run(copies, work) calls work() at least once and at most `copies` times, at the same time where
// it can, and returns when all calls have.
struct Threads {
  int64_t count = 1;
  void (*run)(int64_t copies, const std::function<void()>& work) = nullptr;
  // Least work worth a thread of its own: 60 to 100 us of small products, where to wake it and to wait for it takes 45.
  double operations_each = 6e6;
};

}  // namespace mtml
