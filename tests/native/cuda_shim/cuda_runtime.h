// CUDA on a CPU, for tests: with this folder in front of the include path, g++ compiles a .cu as C++, and its kernels
// run with a fiber for each CUDA thread, one block after the other, threads and blocks in an order drawn at random.
//
// What it is strict about: shared memory is NaN before each block, and under AddressSanitizer poisoned behind the bytes
// that the launch asked for; to ThreadSanitizer each fiber is a thread, which nothing but a barrier orders: no shuffle,
// no warp, no order of running; threads that wait at different barriers, or end while others wait, stop the program;
// launches that CUDA refuses are refused. A stream records its launches.
//
// What it does not see: two blocks that write the same place.
#pragma once

#include <cxxabi.h>
#include <dlfcn.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size) static_cast<void>(0)
#define ASAN_UNPOISON_MEMORY_REGION(address, size) static_cast<void>(0)
#endif
// the shim's own work is not the kernel's
#define CUDA_SHIM_UNSEEN __attribute__((no_sanitize("thread"), noinline))

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
// dynamic shared memory alone, by `extern`: an array of a fixed size would be each thread's own
#define __shared__

// CUDA's are of the type of their argument
using std::erfc, std::exp, std::expm1, std::fabs, std::log, std::log1p, std::sqrt, std::tanh;

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin };

// of csrc/cuda: what a test may ask for
#define MTML_MLP_THREADS 96
#define MTML_MAX_BLOCKS shim::max_blocks
#define MTML_MAX_SHARED shim::max_shared
#define MTML_GRAM_WEIGHTS shim::gram_weights

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
inline int64_t max_blocks = 2147483647, max_shared = 2147483647, gram_weights = 8192;
inline int64_t launches_until_error = -1;
inline std::mt19937_64 order;
// the barrier to leave out, as "file:line", and those that were reached
inline std::string left_out;
inline std::set<std::string> barriers;

inline constexpr size_t kSharedBytes = 227 * 1024, kSharedWithoutAsking = 48 * 1024;
inline dim3 thread_index, block_index, block_size, grid_size;
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

enum State { kReady, kAtBarrier, kInExchange, kDone };

// A CUDA thread.
struct Fiber {
  static constexpr size_t kStackBytes = 256 * 1024;
  unsigned index;
  State state = kDone;
  Site site{};
  // the value that it hands to its warp
  uint64_t value = 0;
  uint64_t barriers_met = 0;
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(kStackBytes);
  void* sanitizer = nullptr;
};

inline std::deque<Fiber> fibers;
inline Fiber* running = nullptr;
inline ucontext_t scheduler;
inline void* scheduler_sanitizer = nullptr;
inline const void* scheduler_stack = nullptr;
inline size_t scheduler_stack_bytes = 0;
inline void (*work)(void*) = nullptr;
inline void* work_argument = nullptr;
// what a barrier orders, and what the launch does: addresses for ThreadSanitizer
// Barriers take turns: who is slow must not see what the fast did after a barrier by the time that they reach the next.
inline char barrier_order[2], launch_order;

inline void release(void* address) {
#if defined(__SANITIZE_THREAD__)
  __tsan_release(address);
#else
  static_cast<void>(address);
#endif
}
inline void acquire(void* address) {
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(address);
#else
  static_cast<void>(address);
#endif
}

// From a fiber back to the scheduler, until that runs it again.
CUDA_SHIM_UNSEEN inline void leave(State state, const Site& site) {
  Fiber* self = running;
  self->state = state;
  self->site = site;
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(scheduler_sanitizer, __tsan_switch_to_fiber_no_sync);
#elif defined(__SANITIZE_ADDRESS__)
  void* fake;
  __sanitizer_start_switch_fiber(&fake, scheduler_stack, scheduler_stack_bytes);
#endif
  swapcontext(&self->context, &scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

CUDA_SHIM_UNSEEN inline void enter(Fiber& fiber) {
  running = &fiber;
  thread_index = dim3(fiber.index, 0, 0);
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(fiber.sanitizer, __tsan_switch_to_fiber_no_sync);
#elif defined(__SANITIZE_ADDRESS__)
  void* fake;
  __sanitizer_start_switch_fiber(&fake, fiber.stack.data(), Fiber::kStackBytes);
#endif
  swapcontext(&scheduler, &fiber.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

// a fiber's life: one block after the other
inline void live() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
#endif
  while (true) {
    acquire(&launch_order);
    work(work_argument);
    release(&launch_order);
    leave(kDone, {"the end", 0});
  }
}

inline void have_fibers(unsigned count) {
  while (fibers.size() < count) {
    Fiber& fiber = fibers.emplace_back();
    fiber.index = static_cast<unsigned>(fibers.size() - 1);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = Fiber::kStackBytes;
    makecontext(&fiber.context, live, 0);
#if defined(__SANITIZE_THREAD__)
    fiber.sanitizer = __tsan_create_fiber(0);
#endif
  }
#if defined(__SANITIZE_THREAD__)
  scheduler_sanitizer = __tsan_get_current_fiber();
#endif
}

// whether all of [begin, end) wait for the same; those that do are ready then
inline bool meet(unsigned begin, unsigned end, State state) {
  for (unsigned t = begin; t < end; ++t)
    if (fibers[t].state != state) return false;
  const Site site = fibers[begin].site;
  for (unsigned t = begin; t < end; ++t) {
    const Site& other = fibers[t].site;
    if (other.line != site.line || other.file != site.file)
      stop("threads meet at " + site.text() + " and at " + other.text());
    fibers[t].state = kReady;
  }
  if (state == kAtBarrier) barriers.insert(site.text());
  return true;
}

// One block: each thread runs until it waits, in an order drawn anew each time.
CUDA_SHIM_UNSEEN inline void run_block() {
  const unsigned count = block_size.x;
  std::vector<unsigned> turn(count);
  for (unsigned t = 0; t < count; ++t) turn[t] = t, fibers[t].state = kReady, fibers[t].barriers_met = 0;
  release(&launch_order);
  while (true) {
    std::shuffle(turn.begin(), turn.end(), order);
    for (const unsigned t : turn)
      if (fibers[t].state == kReady) enter(fibers[t]);
    bool go_on = meet(0, count, kAtBarrier);
    for (unsigned t = 0; t < count; t += 32) go_on = meet(t, t + 32, kInExchange) || go_on;
    if (go_on) continue;
    const Fiber& first = fibers[0];
    for (const Fiber& fiber : fibers)
      if (fiber.index < count && fiber.state != first.state)
        stop("a thread waits at " + first.site.text() + ", another at " + fiber.site.text());
    break;
  }
  acquire(&launch_order);
}

inline void sync_threads(const Site& site) {
  if (!left_out.empty() && left_out == site.text()) return;
  Fiber* self = running;
  char* order = &barrier_order[self->barriers_met++ % 2];
  release(order);
  leave(kAtBarrier, site);
  acquire(order);
}

// the value of another lane; orders nothing
CUDA_SHIM_UNSEEN inline uint64_t from_lane(uint64_t value, unsigned lane, const Site& site) {
  Fiber* self = running;
  self->value = value;
  leave(kInExchange, site);
  const uint64_t result = fibers[self->index / 32 * 32 + lane].value;
  // before anyone hands out the next
  leave(kInExchange, site);
  return result;
}

template <class T>
T from_lane(unsigned mask, T value, unsigned lane, const Site& site) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  if (mask != ~0u) stop("a shuffle of a part of a warp at " + site.text());
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = from_lane(bits, lane, site);
  std::memcpy(&value, &bits, sizeof(T));
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

#define __shfl_xor_sync(mask, value, lanes) \
  shim::from_lane(mask, value, threadIdx.x % 32 ^ static_cast<unsigned>(lanes), {__FILE__, __LINE__})

inline cudaError_t cudaGetLastError() { return std::exchange(shim::last_error, cudaSuccess); }
inline const char* cudaGetErrorString(cudaError_t) { return "invalid configuration argument"; }
inline const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaErrorInvalidConfiguration ? "cudaErrorInvalidConfiguration" : "cudaErrorInvalidValue";
}

inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  return *value = static_cast<int>(shim::kSharedBytes), cudaSuccess;
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
  shim::block_size = block;
  shim::grid_size = grid;
  ASAN_POISON_MEMORY_REGION(mtml_shared, shim::kSharedBytes);
  ASAN_UNPOISON_MEMORY_REGION(mtml_shared, shared_bytes);
  struct Work {
    void (*kernel)(P...);
    void** arguments;
  } work{kernel, arguments};
  shim::work = [](void* x) {
    const Work& w = *static_cast<Work*>(x);
    shim::call(w.kernel, w.arguments, std::index_sequence_for<P...>{});
  };
  shim::work_argument = &work;
  shim::have_fibers(block.x);
  for (const unsigned b : blocks) {
    shim::block_index = dim3(b, 0, 0);
    // NaN in every type
    std::memset(mtml_shared, 0xff, shared_bytes);
    shim::run_block();
  }
  return cudaSuccess;
}
