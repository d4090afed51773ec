// What native checks share: failures that are counted and shown, numbers drawn at random, comparison bit by bit.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

namespace mtml {
namespace {

int failures = 0;
std::string now;

void expect(bool condition, const std::string& what) {
  if (condition) return;
  ++failures;
  std::printf("FAILED %s: %s\n", what.c_str(), now.c_str());
}

struct Random {
  std::mt19937_64 engine;
  int64_t integer(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(engine); }
  bool chance(double p) { return std::uniform_real_distribution<double>(0, 1)(engine) < p; }
  double normal() { return std::normal_distribution<double>()(engine); }

  // of n elements, and no more memory
  template <class T>
  std::vector<T> normals(int64_t n, double size = 1) {
    std::vector<T> values(n);
    for (T& value : values) value = static_cast<T>(size * normal());
    return values;
  }
};

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

}  // namespace
}  // namespace mtml
