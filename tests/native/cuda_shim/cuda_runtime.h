// CUDA on a CPU, for tests: with this folder in front of the include path, g++ compiles a .cu as C++, and its kernels run
// with one thread for each CUDA thread, a block after the other, in an order drawn at random.
//
// What it is strict about: shared memory is NaN before each block, and under AddressSanitizer poisoned behind the bytes
// that the launch asked for; a shuffle orders no memory, so that ThreadSanitizer sees what only a barrier would order;
// threads that wait at different barriers, or end while others wait, stop the program; launches that CUDA refuses are
// refused. A stream records its launches.
//
// What it does not see: two blocks that write the same place, and what threads of a warp do in step.
#pragma once

#include <cxxabi.h>
#include <dlfcn.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size) static_cast<void>(0)
#define ASAN_UNPOISON_MEMORY_REGION(address, size) static_cast<void>(0)
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
// dynamic shared memory alone, by `extern`: an array of a fixed size would be each thread's own
#define __shared__

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

namespace shim {

struct Launch {
  std::string kernel;
  unsigned blocks, threads;
  size_t shared_bytes;
};
struct Stream {
  std::vector<Launch> launches;
};

// what a test may set
inline int64_t max_blocks = 2147483647;
inline int64_t launches_until_error = -1;
inline std::mt19937_64 order;
// the barrier to leave out, as "file:line", and those that were reached
inline std::string left_out;
inline std::set<std::string> barriers;

inline constexpr size_t kSharedBytes = 227 * 1024, kSharedWithoutAsking = 48 * 1024;
inline thread_local dim3 thread_index, block_index;
inline dim3 block_size, grid_size;
inline cudaError_t last_error = cudaSuccess;
inline std::set<const void*> may_use_more;

[[noreturn]] inline void stop(const std::string& what) {
  std::fprintf(stderr, "cuda_shim: %s\n", what.c_str());
  std::fflush(nullptr);
  std::_Exit(3);
}

struct Site {
  const char* file;
  int line;
  std::string text() const {
    const std::string path = file;
    return path.substr(path.rfind('/') + 1) + ":" + std::to_string(line);
  }
};

inline constexpr Site kBegin{"begin", 0}, kEnd{"end", 0};

// For all threads of a block; one that ends waits too, so that whoever waits elsewhere is found out.
class Barrier {
 public:
  void expect(unsigned threads) { threads_ = threads; }
  void wait(const Site& site) {
    std::unique_lock<std::mutex> lock(mutex_);
    if (waiting_ == 0) site_ = site;
    if (site_.line != site.line || site_.file != site.file)
      stop("threads of a block wait at " + site_.text() + " and at " + site.text());
    if (++waiting_ == threads_) {
      waiting_ = 0;
      ++generation_;
      barriers.insert(site.text());
      condition_.notify_all();
      return;
    }
    const uint64_t now = generation_;
    condition_.wait(lock, [&] { return generation_ != now; });
  }

 private:
  std::mutex mutex_;
  std::condition_variable condition_;
  Site site_{};
  unsigned threads_ = 0, waiting_ = 0;
  uint64_t generation_ = 0;
};
inline Barrier barrier;

inline void sync_threads(const Site& site) {
  if (left_out.empty() || left_out != site.text()) barrier.wait(site);
}

// The values of a warp's lanes, 32 bits and the number of the exchange in one word. All loads and stores are relaxed: the
// exchange itself is safe, and orders nothing else. Two sets suffice: a lane is never more than one exchange ahead.
struct Warp {
  std::atomic<uint64_t> words[2][32][2];
};
inline Warp warps[32];
inline thread_local uint32_t exchange = 0;

template <class T>
T from_lane(T value, unsigned lane) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  uint32_t halves[2] = {0, 0};
  std::memcpy(halves, &value, sizeof(T));
  auto& words = warps[thread_index.x / 32].words[++exchange % 2];
  for (int half = 0; half < 2; ++half)
    words[thread_index.x % 32][half].store(uint64_t{exchange} << 32 | halves[half], std::memory_order_relaxed);
  for (unsigned other = 0; other < 32; ++other) {
    for (int half = 0; half < 2; ++half) {
      uint64_t word;
      while ((word = words[other][half].load(std::memory_order_relaxed)) >> 32 != exchange) sched_yield();
      if (other == lane) halves[half] = static_cast<uint32_t>(word);
    }
  }
  std::memcpy(&value, halves, sizeof(T));
  return value;
}

inline std::string name_of(void* function) {
  Dl_info info;
  if (!dladdr(function, &info) || !info.dli_sname) stop("a kernel without a name: link with -rdynamic");
  char* text = abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, nullptr);
  std::string name = text ? text : info.dli_sname;
  std::free(text);
  // void mtml::cuda::sgd_step<float>(...) -> sgd_step
  name = name.substr(0, name.find_first_of("<("));
  return name.substr(name.find_last_of(": ") + 1);
}

template <class... P, size_t... I>
void call(void (*kernel)(P...), void** arguments, std::index_sequence<I...>) {
  kernel(*static_cast<P*>(arguments[I])...);
}

inline cudaError_t fail(cudaError_t error) { return last_error = error; }

}  // namespace shim

using cudaStream_t = shim::Stream*;

#define threadIdx shim::thread_index
#define blockIdx shim::block_index
#define blockDim shim::block_size
#define gridDim shim::grid_size
#define __syncthreads() shim::sync_threads({__FILE__, __LINE__})

// one definition for all files of a program
extern unsigned char mtml_shared[];
#define CUDA_SHIM_SHARED_MEMORY alignas(16) unsigned char mtml_shared[shim::kSharedBytes];

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  if (mask != ~0u) shim::stop("a shuffle of a part of a warp");
  return shim::from_lane(value, threadIdx.x % 32 ^ static_cast<unsigned>(lanes));
}

inline cudaError_t cudaGetLastError() { return std::exchange(shim::last_error, cudaSuccess); }
inline const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaErrorInvalidConfiguration ? "cudaErrorInvalidConfiguration" : "cudaErrorInvalidValue";
}

template <class... P>
cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), cudaFuncAttribute, int bytes) {
  if (bytes < 0 || static_cast<size_t>(bytes) > shim::kSharedBytes) return shim::fail(cudaErrorInvalidValue);
  shim::may_use_more.insert(reinterpret_cast<const void*>(kernel));
  return cudaSuccess;
}

template <class... P>
cudaError_t cudaLaunchKernel(void (*kernel)(P...), dim3 grid, dim3 block, void** arguments, size_t shared_bytes,
                             cudaStream_t stream) {
  const bool asked = shim::may_use_more.count(reinterpret_cast<const void*>(kernel)) > 0;
  const size_t limit = asked ? shim::kSharedBytes : shim::kSharedWithoutAsking;
  if (grid.x == 0 || block.x == 0 || block.x > 1024 || shared_bytes > limit || shim::launches_until_error-- == 0)
    return shim::fail(cudaErrorInvalidConfiguration);
  // the sum of a warp, and with it the exchange of lanes, is for whole warps
  if (block.x % 32 != 0) shim::stop("a block that is not whole warps");
  stream->launches.push_back({shim::name_of(reinterpret_cast<void*>(kernel)), grid.x, block.x, shared_bytes});

  std::vector<unsigned> blocks(grid.x);
  for (unsigned b = 0; b < grid.x; ++b) blocks[b] = b;
  std::shuffle(blocks.begin(), blocks.end(), shim::order);
  for (auto& warp : shim::warps)
    for (auto& set : warp.words)
      for (auto& lane : set)
        for (auto& word : lane) word.store(0, std::memory_order_relaxed);
  shim::block_size = block;
  shim::grid_size = grid;
  shim::barrier.expect(block.x);
  ASAN_POISON_MEMORY_REGION(mtml_shared, shim::kSharedBytes);
  ASAN_UNPOISON_MEMORY_REGION(mtml_shared, shared_bytes);

  std::vector<std::thread> threads;
  for (unsigned t = 0; t < block.x; ++t) {
    threads.emplace_back([&, t] {
      shim::thread_index = dim3(t, 0, 0);
      for (const unsigned b : blocks) {
        shim::block_index = dim3(b, 0, 0);
        if (t == 0) std::memset(mtml_shared, 0xff, shared_bytes);
        shim::barrier.wait(shim::kBegin);
        shim::call(kernel, arguments, std::index_sequence_for<P...>{});
        shim::barrier.wait(shim::kEnd);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  return cudaSuccess;
}
