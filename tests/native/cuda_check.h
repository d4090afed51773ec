// What the programs that check a kernel in cuda_shim share: their arguments (the number of calls, the seed, the barrier
// to leave out), and what they print.
#pragma once

#include <cuda_runtime.h>

#include <cstdlib>

#include "check.h"

CUDA_SHIM_SHARED_MEMORY;

namespace mtml {
namespace {

// check(i, random, seed) for each call, after `first`, until one fails; the exit status of the program
template <class First, class Check>
int run_in_shim(int count, char** arguments, const First& first, const Check& check) {
  const int64_t calls = count > 1 ? std::atoll(arguments[1]) : 20;
  const uint64_t seed = count > 2 ? std::strtoull(arguments[2], nullptr, 10) : std::random_device()();
  if (count > 3) shim::left_out = arguments[3];
  std::printf("seed %llu\n", static_cast<unsigned long long>(seed));
  Random random{std::mt19937_64(seed)};
  shim::order.seed(seed);
  first(calls);
  for (int64_t i = 0; i < calls && failures == 0; ++i) check(i, random, seed);
  for (const std::string& barrier : shim::barriers)
    if (barrier != "begin:0" && barrier != "end:0") std::printf("barrier %s\n", barrier.c_str());
  std::printf("%s\n", failures ? "FAILED" : "ok");
  return failures ? 1 : 0;
}

}  // namespace
}  // namespace mtml
