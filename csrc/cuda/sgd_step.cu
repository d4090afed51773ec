// The kernels of sgd_step: see cuda/sgd_step.h. A leaf's row of one task is cut into slices, and a block takes one.
// What is summed over more than a slice lies in the workspace, a double a slice, and is added up in the order of the
// slices: no atomics, so the same bits every time, and for a task alone and in any batch.
#include "cuda/sgd_step.h"

#include <algorithm>
#include <vector>

#include "cuda/block.h"
#include "cuda/element.h"
#include "cuda/launch.h"
// after element.h, which brings what it needs
#include "core/sgd_step_row.h"

namespace mtml::cuda {

constexpr int kThreads = 256;
// of one launch: they are the kernel's argument, which every CUDA takes up to 4 KB
constexpr int kLeaves = 28;
// a slice has 16 elements for each thread, more where a task would have more than about a thousand slices: each block
// adds up those of its task
constexpr int64_t kSliceSize = 16 * kThreads, kSlicesPerTask = 1024;
// terms that a thread adds in T before they go into a double: the error does not grow with the length
constexpr int kShortSum = 16;

template <class T>
struct Tree {
  SgdLeaf<T> leaves[kLeaves];
  SgdLeafGradient<T> gradients[kLeaves];
  // of each leaf, counted over the whole tree
  int64_t first_slice[kLeaves + 1];
  int64_t num_leaves;  // of this launch
  int64_t num_slices;  // of a task in the whole tree
  int64_t slice_size;
  int64_t num_tasks;
  int64_t blocks;
  SgdOptions options;
  // in the workspace, null where not needed
  double* squares;    // of the gradient          [T, num_slices]
  double* s_dot_g;    //                          [T, num_slices]
  double* rate_sums;  // of the rates' gradients  [T, num_slices]
  double* scale;      // the clipping factors     [T]
};
static_assert(sizeof(Tree<double>) <= 4096);

// The elements [begin, end) of one task in one leaf.
struct Slice {
  int64_t task;
  int64_t index;
  int64_t leaf;
  int64_t begin;
  int64_t end;

  template <class T>
  __device__ Slice(const Tree<T>& tree, int64_t block) : leaf(0) {
    const int64_t slices = tree.first_slice[tree.num_leaves] - tree.first_slice[0];
    task = block / slices;
    index = tree.first_slice[0] + block % slices;
    while (index >= tree.first_slice[leaf + 1]) ++leaf;
    begin = (index - tree.first_slice[leaf]) * tree.slice_size;
    end = begin + tree.slice_size;
    if (end > tree.leaves[leaf].size) end = tree.leaves[leaf].size;
  }
};

// the sum of f(i) over a slice, for every thread
template <class T, class F>
__device__ double slice_sum(const Slice& slice, double* room, const F& f) {
  double total = 0;
  int64_t i = slice.begin + threadIdx.x;
  while (i < slice.end) {
    T part = 0;
    for (int n = 0; n < kShortSum && i < slice.end; ++n, i += blockDim.x) part += f(i);
    total += part;
  }
  return block_sum(total, room);
}

// the sum of a run of the workspace, for every thread
__device__ double run_sum(const double* sums, int64_t count, double* room) {
  double total = 0;
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) total += sums[i];
  return block_sum(total, room);
}

template <class T>
__device__ double gradient_norm(const Tree<T>& tree, int64_t task, double* room) {
  return sqrt(run_sum(tree.squares + task * tree.num_slices, tree.num_slices, room));
}

// First launch, where gradients are clipped: each slice's part of |g|^2, and of <s, g> for the reverse.
template <class T>
__global__ void __launch_bounds__(kThreads) sgd_step_sums(const __grid_constant__ Tree<T> tree) {
  double* room = shared_memory<double>();
  for (int64_t block = blockIdx.x; block < tree.blocks; block += gridDim.x) {
    const Slice slice(tree, block);
    const SgdLeaf<T>& leaf = tree.leaves[slice.leaf];
    const Row<T> row(leaf, tree.options, 1, slice.task);
    const int64_t place = slice.task * tree.num_slices + slice.index;
    const double squares = slice_sum<T>(slice, room, [&](int64_t i) { return row.g[i] * row.g[i]; });
    if (threadIdx.x == 0) tree.squares[place] = squares;
    if (!tree.s_dot_g) continue;
    const CotangentRow<T> cotangent(tree.gradients[slice.leaf], slice.task * leaf.size);
    const double s_dot_g =
        slice_sum<T>(slice, room, [&](int64_t i) { return cotangent.template at<T>(row, i) * row.g[i]; });
    if (threadIdx.x == 0) tree.s_dot_g[place] = s_dot_g;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) sgd_step(const __grid_constant__ Tree<T> tree) {
  double* room = shared_memory<double>();
  for (int64_t block = blockIdx.x; block < tree.blocks; block += gridDim.x) {
    const Slice slice(tree, block);
    const SgdLeaf<T>& leaf = tree.leaves[slice.leaf];
    double scale = 1;
    if (clips(tree.options)) scale = clip_factor(gradient_norm(tree, slice.task, room), tree.options.clip);
    const Row<T> row(leaf, tree.options, scale, slice.task);
    T* new_p = leaf.new_p + slice.task * leaf.size;
    T* new_m = leaf.new_m ? leaf.new_m + slice.task * leaf.size : nullptr;
    for (int64_t i = slice.begin + threadIdx.x; i < slice.end; i += blockDim.x) step_element<T>(new_p, new_m, row, i);
  }
}

// All gradients but those of rates that tasks or elements share, for which it leaves the clipping factors and sums.
template <class T>
__global__ void __launch_bounds__(kThreads) sgd_step_backward(const __grid_constant__ Tree<T> tree) {
  double* room = shared_memory<double>();
  for (int64_t block = blockIdx.x; block < tree.blocks; block += gridDim.x) {
    const Slice slice(tree, block);
    const SgdLeaf<T>& leaf = tree.leaves[slice.leaf];
    const SgdLeafGradient<T>& to = tree.gradients[slice.leaf];
    double scale = 1, through_norm = 0;
    if (clips(tree.options)) {
      const double norm = gradient_norm(tree, slice.task, room);
      scale = clip_factor(norm, tree.options.clip);
      // the same for all threads: the sums are
      if (tree.s_dot_g && scale != 1) {
        const double s_dot_g = run_sum(tree.s_dot_g + slice.task * tree.num_slices, tree.num_slices, room);
        through_norm = clip_slope(norm, tree.options.clip, s_dot_g);
      }
    }
    if (tree.scale && slice.index == 0 && threadIdx.x == 0) tree.scale[slice.task] = scale;

    const Row<T> row(leaf, tree.options, scale, slice.task);
    const int64_t start = slice.task * leaf.size;
    const CotangentRow<T> cotangent(to, start);
    const T norm_factor = static_cast<T>(through_norm);
    if (to.dp || to.dg || to.dm) {
      for (int64_t i = slice.begin + threadIdx.x; i < slice.end; i += blockDim.x)
        step_element_backward<T>(to, row, cotangent, norm_factor, start, i);
    }
    if (to.dlr && leaf.lr_element != 0 && leaf.lr_task != 0) {
      for (int64_t i = slice.begin + threadIdx.x; i < slice.end; i += blockDim.x)
        to.dlr[start + i] = -cotangent.template minus_dlr<T>(row, i);
    }
    if (to.dlr && leaf.lr_element == 0) {
      const double sum = slice_sum<T>(slice, room, [&](int64_t i) { return cotangent.template minus_dlr<T>(row, i); });
      if (threadIdx.x == 0) tree.rate_sums[slice.task * tree.num_slices + slice.index] = -sum;
    }
  }
}

// Rates without an element axis: the sums of their slices, of one task or of all. One block a rate and task.
template <class T>
__global__ void __launch_bounds__(kThreads) sgd_step_rates(const __grid_constant__ Tree<T> tree) {
  double* room = shared_memory<double>();
  for (int64_t block = blockIdx.x; block < tree.blocks; block += gridDim.x) {
    const int64_t leaf = block % tree.num_leaves, task = block / tree.num_leaves;
    T* dlr = tree.gradients[leaf].dlr;
    const bool of_task = tree.leaves[leaf].lr_task != 0;
    // without tasks there is still a rate that they would share
    if (!dlr || tree.leaves[leaf].lr_element != 0 || task >= (of_task ? tree.num_tasks : 1)) continue;
    const int64_t begin = tree.first_slice[leaf], count = tree.first_slice[leaf + 1] - begin;
    double total = 0;
    for (int64_t t = task; t < (of_task ? task + 1 : tree.num_tasks); ++t)
      for (int64_t i = threadIdx.x; i < count; i += blockDim.x)
        total += tree.rate_sums[t * tree.num_slices + begin + i];
    total = block_sum(total, room);
    if (threadIdx.x == 0) dlr[task] = static_cast<T>(total);
  }
}

// A rate for each element that all tasks share: a thread adds up the tasks of one element.
template <class T>
__global__ void __launch_bounds__(kThreads) sgd_step_shared_rates(const __grid_constant__ Tree<T> tree) {
  for (int64_t block = blockIdx.x; block < tree.blocks; block += gridDim.x) {
    const Slice slice(tree, block);
    const SgdLeaf<T>& leaf = tree.leaves[slice.leaf];
    const SgdLeafGradient<T>& to = tree.gradients[slice.leaf];
    if (!to.dlr || leaf.lr_element == 0 || leaf.lr_task != 0) continue;
    for (int64_t i = slice.begin + threadIdx.x; i < slice.end; i += blockDim.x) {
      double total = 0;
      for (int64_t t = 0; t < tree.num_tasks;) {
        T part = 0;
        for (int n = 0; n < kShortSum && t < tree.num_tasks; ++n, ++t) {
          const Row<T> row(leaf, tree.options, tree.scale[t], t);
          part += CotangentRow<T>(to, t * leaf.size).template minus_dlr<T>(row, i);
        }
        total -= part;
      }
      to.dlr[i] = static_cast<T>(total);
    }
  }
}

// How the leaves of a tree are cut; depends on nothing but their sizes.
struct Cut {
  int64_t slice_size;
  std::vector<int64_t> first_slice{0};  // [leaves + 1]
  int threads;

  template <class Sizes>
  Cut(int64_t num_leaves, const Sizes& sizes) {
    int64_t elements = 0, largest = 1;
    for (int64_t l = 0; l < num_leaves; ++l) {
      elements += sizes(l);
      largest = std::max(largest, sizes(l));
    }
    slice_size = std::max(kSliceSize, (elements + kSlicesPerTask - 1) / kSlicesPerTask);
    threads = static_cast<int>((std::min<int64_t>(largest, kThreads) + kWarp - 1) / kWarp * kWarp);
    into_slices(num_leaves, sizes);
  }
  // the same leaves in slices of an element for each thread
  template <class Sizes>
  Cut(const Cut& coarse, int64_t num_leaves, const Sizes& sizes) : slice_size(coarse.threads), threads(coarse.threads) {
    into_slices(num_leaves, sizes);
  }

  int64_t num_slices() const { return first_slice.back(); }

 private:
  template <class Sizes>
  void into_slices(int64_t num_leaves, const Sizes& sizes) {
    for (int64_t l = 0; l < num_leaves; ++l)
      first_slice.push_back(first_slice.back() + (sizes(l) + slice_size - 1) / slice_size);
  }
};

// One call: its leaves, which go to the kernels kLeaves at a time, and what all launches share.
template <class T>
struct Call {
  const SgdLeaf<T>* leaves;
  const SgdLeafGradient<T>* gradients;  // null forward
  int64_t num_leaves;
  cudaStream_t stream;
  Tree<T> tree{};
  cudaError_t error = cudaSuccess;

  // blocks_of(slices, leaves): how many blocks a launch has
  template <class Blocks>
  void run(void (*kernel)(Tree<T>), const Cut& cut, const Blocks& blocks_of) {
    tree.slice_size = cut.slice_size;
    for (int64_t first = 0; first < num_leaves && error == cudaSuccess; first += kLeaves) {
      tree.num_leaves = std::min<int64_t>(kLeaves, num_leaves - first);
      for (int64_t l = 0; l < tree.num_leaves; ++l) {
        tree.leaves[l] = leaves[first + l];
        if (gradients) tree.gradients[l] = gradients[first + l];
      }
      std::copy_n(cut.first_slice.begin() + first, tree.num_leaves + 1, tree.first_slice);
      tree.blocks = blocks_of(tree.first_slice[tree.num_leaves] - tree.first_slice[0], tree.num_leaves);
      error = launch(kernel, tree.blocks, cut.threads, block_sum_bytes(cut.threads), stream, tree);
    }
  }
};

template <class T>
int forward(const SgdLeaf<T>* leaves, int64_t num_leaves, int64_t num_tasks, const SgdOptions& options,
            double* workspace, void* stream) {
  const Cut cut(num_leaves, [&](int64_t l) { return leaves[l].size; });
  Call<T> call{leaves, nullptr, num_leaves, static_cast<cudaStream_t>(stream)};
  call.tree.options = options;
  call.tree.num_tasks = num_tasks;
  call.tree.num_slices = cut.num_slices();
  call.tree.squares = workspace;
  const auto per_slice = [&](int64_t slices, int64_t) { return num_tasks * slices; };
  if (clips(options)) call.run(sgd_step_sums<T>, cut, per_slice);
  call.run(sgd_step<T>, cut, per_slice);
  return call.error;
}

template <class T>
int backward(const SgdLeaf<T>* leaves, const SgdLeafGradient<T>* gradients, int64_t num_leaves, int64_t num_tasks,
             const SgdOptions& options, bool one_rate, double* workspace, void* stream) {
  const auto sizes = [&](int64_t l) { return leaves[l].size; };
  const Cut cut(num_leaves, sizes);
  bool any_dg = false, rates = false, shared_rates = false;
  for (int64_t l = 0; l < num_leaves; ++l) {
    any_dg = any_dg || gradients[l].dg;
    if (!gradients[l].dlr) continue;
    rates = rates || leaves[l].lr_element == 0;
    shared_rates = shared_rates || (leaves[l].lr_element != 0 && leaves[l].lr_task == 0 && leaves[l].size > 0);
  }
  const int64_t sums = num_tasks * cut.num_slices();
  Call<T> call{leaves, gradients, num_leaves, static_cast<cudaStream_t>(stream)};
  call.tree.options = options;
  call.tree.num_tasks = num_tasks;
  call.tree.num_slices = cut.num_slices();
  call.tree.squares = workspace;
  call.tree.s_dot_g = any_dg ? workspace + sums : nullptr;
  call.tree.rate_sums = workspace + 2 * sums;
  call.tree.scale = shared_rates ? workspace + 3 * sums : nullptr;

  const auto per_slice = [&](int64_t slices, int64_t) { return num_tasks * slices; };
  if (clips(options)) call.run(sgd_step_sums<T>, cut, per_slice);
  call.run(sgd_step_backward<T>, cut, per_slice);
  if (shared_rates) {
    const Cut fine(cut, num_leaves, sizes);
    call.run(sgd_step_shared_rates<T>, fine, [](int64_t slices, int64_t) { return slices; });
  }
  if (rates && one_rate) {
    // all slices of the tree are those of its one rate
    Cut whole = cut;
    whole.first_slice = {0, cut.num_slices()};
    call.num_leaves = 1;
    call.run(sgd_step_rates<T>, whole, [&](int64_t, int64_t) { return std::max<int64_t>(1, num_tasks); });
  } else if (rates) {
    call.run(sgd_step_rates<T>, cut, [&](int64_t, int64_t n) { return n * std::max<int64_t>(1, num_tasks); });
  }
  return call.error;
}

}  // namespace mtml::cuda

extern "C" {

int64_t mtml_cuda_sgd_step_workspace(const int64_t* sizes, int64_t num_leaves, int64_t num_tasks,
                                     const mtml::SgdOptions* options, int backward) {
  const int64_t sums = num_tasks * mtml::cuda::Cut(num_leaves, [&](int64_t l) { return sizes[l]; }).num_slices();
  if (backward) return 3 * sums + num_tasks;
  return mtml::cuda::clips(*options) ? sums : 0;
}

int mtml_cuda_sgd_step_f32(const mtml::SgdLeaf<float>* leaves, int64_t num_leaves, int64_t num_tasks,
                           const mtml::SgdOptions* options, double* workspace, void* stream) {
  return mtml::cuda::forward(leaves, num_leaves, num_tasks, *options, workspace, stream);
}
int mtml_cuda_sgd_step_f64(const mtml::SgdLeaf<double>* leaves, int64_t num_leaves, int64_t num_tasks,
                           const mtml::SgdOptions* options, double* workspace, void* stream) {
  return mtml::cuda::forward(leaves, num_leaves, num_tasks, *options, workspace, stream);
}

int mtml_cuda_sgd_step_backward_f32(const mtml::SgdLeaf<float>* leaves, const mtml::SgdLeafGradient<float>* gradients,
                                    int64_t num_leaves, int64_t num_tasks, const mtml::SgdOptions* options,
                                    int one_rate, double* workspace, void* stream) {
  return mtml::cuda::backward(leaves, gradients, num_leaves, num_tasks, *options, one_rate, workspace, stream);
}
int mtml_cuda_sgd_step_backward_f64(const mtml::SgdLeaf<double>* leaves, const mtml::SgdLeafGradient<double>* gradients,
                                    int64_t num_leaves, int64_t num_tasks, const mtml::SgdOptions* options,
                                    int one_rate, double* workspace, void* stream) {
  return mtml::cuda::backward(leaves, gradients, num_leaves, num_tasks, *options, one_rate, workspace, stream);
}

}  // extern "C"
