// What gradient_gram and gradient_combine share: their leaves, and room for the gradients of those that need one.
#pragma once

#include <vector>

#include "cpu/tensors.h"
#include "gradients_check.h"

namespace mtml {
namespace {

class GradientCall {
 public:
  Arrays arrays;
  const GradientInputs inputs;

  explicit GradientCall(const Tensors& gradients) : inputs(contiguous(gradients)) {}

  // the leaves, with room for the gradient of each that needs one, added to `made`
  template <class T>
  std::vector<GradientLeaf<T>> with_room(const std::vector<bool>& needs, Tensors& made) const {
    return inputs.leaves<T>([&](size_t i) -> T* {
      if (!needs[i]) return nullptr;
      made.push_back(empty<T>(inputs.shape(i)));
      return data<T>(made.back());
    });
  }

 private:
  std::vector<Array> contiguous(const Tensors& tensors) {
    std::vector<Array> result;
    for (const Tensor& x : tensors) result.push_back(arrays(x));
    return result;
  }
};

}  // namespace
}  // namespace mtml
