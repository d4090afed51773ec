// What the programs of `make sanitize` share: random calls in arrays of exactly the right size, on threads, in a
// process for each instruction set. A program has one function, a configuration, and hands it to `run`; its arguments
// are the number of configurations and the seed of the first.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <limits>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "core/threads.h"
#include "isa/choose.h"

// The address sanitizer fills new memory with NaN: what is read before it is written shows in the results.
extern "C" const char* __asan_default_options() { return "malloc_fill_byte=255:max_malloc_fill_size=1073741824"; }

namespace mtml {
namespace {

// of the calls that follow, however small they are
int num_threads = 1;

Threads threads() {
  return {num_threads,
          [](int64_t copies, const std::function<void()>& work) {
            std::vector<std::thread> others;
            for (int64_t i = 1; i < copies; ++i) others.emplace_back(work);
            work();
            for (std::thread& thread : others) thread.join();
          },
          1};
}

// room for n results: one that a call leaves out is seen
template <class T>
std::vector<T> room(int64_t n) {
  return std::vector<T>(n, std::numeric_limits<T>::quiet_NaN());
}

// elements [begin, begin + n), or nothing of nothing
template <class T>
std::vector<T> part(const std::vector<T>& all, int64_t begin, int64_t n) {
  return all.empty() ? all : std::vector<T>(all.begin() + begin, all.begin() + begin + n);
}

// the exit status of the program
int run(int argc, char** argv, void (*configuration)(int i, Random& random)) {
  const int count = argc > 1 ? std::atoi(argv[1]) : 300;
  const uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : std::random_device{}();
  if (!std::getenv("MTML_FAST_ISA")) {
    // a process has one instruction set, which it chooses as it begins
    for (const std::string& isa : isas_runnable()) {
      setenv("MTML_FAST_ISA", isa.c_str(), 1);
      const std::string again = std::string(argv[0]) + " " + std::to_string(count) + " " + std::to_string(seed);
      failures += std::system(again.c_str()) != 0;
    }
    return failures != 0;
  }
  for (int i = 0; i < count; ++i) {
    now = std::string(kernels().isa) + ", configuration " + std::to_string(i) + " of seed " + std::to_string(seed);
    Random random{std::mt19937_64(seed + static_cast<uint64_t>(i))};
    configuration(i, random);
  }
  std::printf("%s: %d configurations, seed %llu: %d failures\n", kernels().isa, count,
              static_cast<unsigned long long>(seed), failures);
  return failures != 0;
}

}  // namespace
}  // namespace mtml
