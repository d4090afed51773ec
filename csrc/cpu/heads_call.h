// What heads and heads_loss share: the arguments of the heads, and one array for each of them that has a gradient.
#pragma once

#include <string>
#include <vector>

#include "cpu/tensors.h"
#include "heads_check.h"

namespace mtml {
namespace {

#define HEADS_PARAMETERS                                                                                \
  const Tensor &x, const Tensor &offsets, const Tensor &weight, const MaybeTensor &bias,                \
      const MaybeTensor &out_offsets, const MaybeTensor &hidden_weight, const MaybeTensor &hidden_bias, \
      const Text &activation
#define HEADS_ARGUMENTS x, offsets, weight, bias, out_offsets, hidden_weight, hidden_bias, activation

class HeadsCall : public HeadsInputs {
 public:
  Arrays arrays;

  explicit HeadsCall(HEADS_PARAMETERS) {
    this->x = arrays(x);
    this->offsets = arrays(offsets);
    this->weight = arrays(weight);
    this->bias = arrays(bias);
    this->out_offsets = arrays(out_offsets);
    this->hidden_weight = arrays(hidden_weight);
    this->hidden_bias = arrays(hidden_bias);
    this->activation = activation.value;
    const Dtype dtype = this->x.dtype;
    MTML_CHECK(dtype == Dtype::kFloat32 || dtype == Dtype::kFloat64, "heads: x must be float32 or float64");
  }

  bool is_float() const { return x.dtype == Dtype::kFloat32; }

  // x and the parameters that there are
  std::vector<const Array*> differentiable() const {
    std::vector<const Array*> result = {&x, &weight};
    for (const auto* array : {&bias, &hidden_weight, &hidden_bias}) {
      if (*array) result.push_back(&**array);
    }
    return result;
  }

  // one value for each of them, in HeadTensors' order, from `next(array)`
  template <class T, class Next>
  HeadTensors<T> tensors(const Next& next) const {
    HeadTensors<T> result{};
    result.x = next(x);
    result.weight = next(weight);
    if (bias) result.bias = next(*bias);
    if (hidden_weight) result.hidden_weight = next(*hidden_weight);
    if (hidden_bias) result.hidden_bias = next(*hidden_bias);
    return result;
  }

  // room for the gradients that `needs` asks for, from its element `first` on; they are added to `made`
  template <class T>
  HeadTensors<T> room(const std::vector<bool>& needs, size_t first, Tensors& made) const {
    const size_t expected = first + differentiable().size();
    MTML_CHECK(needs.size() == expected, "heads: needs must hold one bool per input tensor (", expected, "), got ",
               needs.size());
    size_t input = first;
    return tensors<T>([&](const Array& like) -> T* {
      if (!needs[input++]) return nullptr;
      made.push_back(empty<T>(like.shape));
      return data<T>(made.back());
    });
  }
};

}  // namespace
}  // namespace mtml
