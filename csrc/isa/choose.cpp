#include "isa/choose.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace mtml {
namespace {

struct Candidate {
  const Kernels* kernels;
  bool runnable;
};

std::vector<Candidate> candidates() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw");
  return {{&baseline::kernels, true}, {&avx2::kernels, has_avx2}, {&avx512::kernels, has_avx512}};
#elif defined(__aarch64__)
  return {{&baseline::kernels, true}, {&neon::kernels, true}};
#else
  return {{&baseline::kernels, true}};
#endif
}

std::vector<std::string> names(bool only_runnable) {
  std::vector<std::string> result;
  for (const Candidate& candidate : candidates()) {
    if (candidate.runnable || !only_runnable) result.emplace_back(candidate.kernels->isa);
  }
  return result;
}

const Kernels* choose() {
  const char* wanted = std::getenv("MTML_FAST_ISA");
  const Kernels* best = nullptr;
  for (const Candidate& candidate : candidates()) {
    if (!candidate.runnable) continue;
    if (wanted && std::strcmp(wanted, candidate.kernels->isa) == 0) return candidate.kernels;
    best = candidate.kernels;
  }
  if (wanted && *wanted) {
    std::string possible;
    for (const std::string& name : isas_runnable()) possible += (possible.empty() ? "" : ", ") + name;
    std::fprintf(stderr, "mtml_fast: MTML_FAST_ISA must be one of %s on this machine, got '%s'; using %s\n",
                 possible.c_str(), wanted, best->isa);
  }
  return best;
}

const Kernels* const chosen = choose();

}  // namespace

const Kernels& kernels() { return *chosen; }

std::vector<std::string> isas_built() { return names(false); }

std::vector<std::string> isas_runnable() { return names(true); }

}  // namespace mtml
