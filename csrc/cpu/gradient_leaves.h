// What gradient_gram and gradient_combine share: the leaves of the tasks' gradients, and room for those of them that a
// backward pass is asked for.
#pragma once

#include <vector>

#include "cpu/tensors.h"
#include "gradients.h"

namespace mtml {
namespace {

class Leaves {
 public:
  Arrays arrays;
  int64_t tasks;
  Dtype dtype;

  explicit Leaves(const Tensors& gradients) {
    MTML_CHECK(!gradients.empty(), "gradients must hold at least one tensor, got none");
    for (const Tensor& x : gradients) leaves_.push_back(arrays(x));
    const Array& first = leaves_[0];
    dtype = first.dtype;
    tasks = first.shape.dim ? first.shape.sizes[0] : 0;
    MTML_CHECK(dtype == Dtype::kFloat32 || dtype == Dtype::kFloat64, "gradients must be float32 or float64");
    for (const Array& leaf : leaves_) {
      MTML_CHECK(leaf.dtype == dtype && leaf.shape.dim > 0 && leaf.shape.sizes[0] == tasks,
                 "gradients must all be [T=", tasks, ", ...] of one dtype, got ", leaf.shape);
    }
  }

  const std::vector<Array>& all() const { return leaves_; }
  bool is_float() const { return dtype == Dtype::kFloat32; }

  // of one task
  static Shape shape(const Array& leaf) { return {leaf.shape.sizes + 1, leaf.shape.dim - 1}; }

  // each with what to(leaf's index) gives it to write
  template <class T, class To>
  std::vector<GradientLeaf<T>> with(const To& to) const {
    std::vector<GradientLeaf<T>> result;
    for (size_t i = 0; i < leaves_.size(); ++i) {
      result.push_back({size_of(shape(leaves_[i])), static_cast<const T*>(leaves_[i].data), to(i)});
    }
    return result;
  }

  // each with room for its gradient, where that is needed; it is added to `made`
  template <class T>
  std::vector<GradientLeaf<T>> with_room(const std::vector<bool>& needs, Tensors& made) const {
    return with<T>([&](size_t i) -> T* {
      if (!needs[i]) return nullptr;
      made.push_back(empty<T>(leaves_[i].shape));
      return data<T>(made.back());
    });
  }

 private:
  std::vector<Array> leaves_;
};

template <class T>
GradientLeaves<T> view(const Leaves& leaves, const std::vector<GradientLeaf<T>>& parts) {
  return {leaves.tasks, parts.data(), static_cast<int64_t>(parts.size())};
}

}  // namespace
}  // namespace mtml
