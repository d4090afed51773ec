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

#include "check.h"
#include "core/threads.h"

namespace mtml {

// A str of the schema: std::string's own conversion, in torch up to 2.13, never frees the copy that it makes.
struct Text {
  std::string value;
  operator const std::string&() const { return value; }
};

}  // namespace mtml

template <>
struct torch::stable::detail::ToImpl<mtml::Text> {
  static mtml::Text call(StableIValue value, uint64_t, bool) {
    const StringHandle handle = to<StringHandle>(value);
    size_t length;
    const char* text;
    TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &text));
    mtml::Text result{std::string(text, length)};
    TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return result;
  }
};

namespace mtml {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using MaybeTensor = std::optional<Tensor>;

inline Dtype dtype_of(const Tensor& x) {
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
  // arrays point to the copies, so that they must not move
  std::list<Tensor> copies_;
};

// torch's own threads; within one of its regions the caller is alone
inline Threads threads() {
  return {torch::stable::get_num_threads(), [](int64_t copies, const std::function<void()>& work) {
            torch::stable::parallel_for(0, copies, 1, [&](int64_t, int64_t) { work(); });
          }};
}

// By the C interface: the dispatcher would cost a microsecond more for each.
inline Tensor empty(const Shape& shape, int32_t dtype) {
  constexpr int64_t kAxes = 8;
  int64_t strides[kAxes];
  MTML_CHECK(shape.dim <= kAxes, "at most ", kAxes, " axes, got shape ", shape);
  int64_t stride = 1;
  for (int64_t axis = shape.dim - 1; axis >= 0; --axis) {
    strides[axis] = stride;
    stride *= std::max<int64_t>(1, shape.sizes[axis]);
  }
  AtenTensorHandle handle;
  const auto error =
      aoti_torch_empty_strided(shape.dim, shape.sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, &handle);
  if (error != AOTI_TORCH_SUCCESS) throw NoMemory(message("a tensor of shape ", shape));
  return Tensor(handle);
}

template <class T>
Tensor empty(const Shape& shape) {
  return empty(shape, sizeof(T) == sizeof(float) ? aoti_torch_dtype_float32() : aoti_torch_dtype_float64());
}

template <class T>
T* data(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

// one byte a character
inline Tensor bytes_of(const std::string& text) {
  const int64_t size = static_cast<int64_t>(text.size());
  const Tensor result = empty(Shape{&size, 1}, aoti_torch_dtype_uint8());
  std::copy(text.begin(), text.end(), data<char>(result));
  return result;
}

}  // namespace
}  // namespace mtml
