// torch's tensors as the core takes them: contiguous arrays, room for results, and torch's threads.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <functional>
#include <list>
#include <optional>
#include <string>
#include <vector>

#include "heads_check.h"

namespace mtml {

// A str of the schema: std::string's own conversion, in torch up to 2.13, never frees the copy that it makes.
struct Text {
  std::string value;
};

}  // namespace mtml

template <>
struct torch::stable::detail::ToImpl<mtml::Text> {
  static mtml::Text call(StableIValue value, uint64_t, bool) {
    const StringHandle handle = to<StringHandle>(value);
    size_t length;
    const char* text;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    STABLE_TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &text));
    mtml::Text result{std::string(text, length)};
    STABLE_TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return result;
  }
};

namespace mtml {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using MaybeTensor = std::optional<Tensor>;

// Contiguous arrays of tensors; keeps the copies that it has to make.
class Arrays {
 public:
  Array operator()(const Tensor& x) {
    const Tensor* from = &x;
    if (!x.is_contiguous()) {
      copies_.push_back(torch::stable::contiguous(x));
      from = &copies_.back();
    }
    const auto sizes = from->sizes();
    return {{sizes.data(), static_cast<int64_t>(sizes.size())}, dtype_of(x), from->const_data_ptr()};
  }
  std::optional<Array> operator()(const MaybeTensor& x) { return x ? std::optional<Array>((*this)(*x)) : std::nullopt; }

 private:
  std::list<Tensor> copies_;

  static Dtype dtype_of(const Tensor& x) {
    switch (x.scalar_type()) {
      case ScalarType::Float:
        return Dtype::kFloat32;
      case ScalarType::Double:
        return Dtype::kFloat64;
      case ScalarType::Long:
        return Dtype::kInt64;
      case ScalarType::Bool:
        return Dtype::kBool;
      default:
        return Dtype::kOther;
    }
  }
};

// torch's own threads; within one of its regions the caller is alone
inline Threads threads() {
  return {torch::stable::get_num_threads(), [](int64_t copies, const std::function<void()>& work) {
            torch::stable::parallel_for(0, copies, 1, [&](int64_t, int64_t) { work(); });
          }};
}

// By the C interface: the dispatcher would cost a microsecond more for each.
template <class T>
Tensor empty(const Shape& shape) {
  constexpr int64_t kAxes = 8;
  int64_t strides[kAxes];
  MTML_CHECK(shape.dim <= kAxes, "at most ", kAxes, " axes, got shape ", shape);
  int64_t stride = 1;
  for (int64_t axis = shape.dim - 1; axis >= 0; --axis) {
    strides[axis] = stride;
    stride *= std::max<int64_t>(1, shape.sizes[axis]);
  }
  const int32_t dtype = sizeof(T) == sizeof(float) ? aoti_torch_dtype_float32() : aoti_torch_dtype_float64();
  AtenTensorHandle handle;
  const auto error =
      aoti_torch_empty_strided(shape.dim, shape.sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, &handle);
  if (error != AOTI_TORCH_SUCCESS) throw NoMemory(message("a tensor of shape ", shape));
  return Tensor(handle);
}

template <class T>
T* data(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

// What heads and heads_loss share: the arguments of the heads, and one array for each of them that has a gradient.
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
