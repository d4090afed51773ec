// What gradient_gram and gradient_combine ask of their arguments: one set of rules for both doors, torch (cpu/) and
// NumPy (numpy/).
#pragma once

#include <vector>

#include "check.h"
#include "gradients.h"

namespace mtml {

// Leaves [T, ...] of one dtype.
class GradientInputs {
 public:
  explicit GradientInputs(std::vector<Array> leaves) : leaves_(std::move(leaves)) {
    MTML_CHECK(!leaves_.empty(), "gradients must hold at least one tensor, got none");
    MTML_CHECK(dtype() == Dtype::kFloat32 || dtype() == Dtype::kFloat64, "gradients must be float32 or float64");
    for (size_t i = 0; i < leaves_.size(); ++i) {
      const Shape& shape = leaves_[i].shape;
      MTML_CHECK(shape.dim > 0 && shape.sizes[0] == leaves_[0].shape.sizes[0], "gradients[", i,
                 "] must be [T, ...] with the T of gradients[0], got shape ", shape);
      MTML_CHECK(leaves_[i].dtype == dtype(), "gradients[", i, "] must have the dtype of gradients[0]");
    }
  }

  size_t count() const { return leaves_.size(); }
  int64_t tasks() const { return leaves_[0].shape.sizes[0]; }
  Dtype dtype() const { return leaves_[0].dtype; }
  bool is_float() const { return dtype() == Dtype::kFloat32; }
  const Shape& shape(size_t leaf) const { return leaves_[leaf].shape; }
  // of one task
  Shape task_shape(size_t leaf) const { return {shape(leaf).sizes + 1, shape(leaf).dim - 1}; }

  template <class T>
  const T* weights(const Array& array) const {
    const int64_t size = tasks();
    MTML_CHECK(array.shape == (Shape{&size, 1}) && array.dtype == dtype(), "weights must be [T=", size,
               "] of the dtype of gradients, got shape ", array.shape);
    return static_cast<const T*>(array.data);
  }

  // the leaves, each with what to(its index) gives it to write
  template <class T, class To>
  std::vector<GradientLeaf<T>> leaves(const To& to) const {
    std::vector<GradientLeaf<T>> result;
    for (size_t i = 0; i < leaves_.size(); ++i) {
      result.push_back({size_of(task_shape(i)), static_cast<const T*>(leaves_[i].data), to(i)});
    }
    return result;
  }

  template <class T>
  GradientLeaves<T> view(const std::vector<GradientLeaf<T>>& leaves) const {
    return {tasks(), leaves.data(), static_cast<int64_t>(leaves.size())};
  }

 private:
  std::vector<Array> leaves_;
};

}  // namespace mtml
