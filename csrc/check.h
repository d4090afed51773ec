// The only way in which C++ refuses an argument: one line that says what it must be and what it was. Python receives it
// as ValueError. The shapes that such lines show, and what is said where memory runs out.
#pragma once

#include <algorithm>
#include <cstdint>
#include <new>
#include <ostream>
#include <sstream>
#include <stdexcept>
#include <string>

namespace mtml {

template <class... Parts>
std::string message(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

struct Shape {
  const int64_t* sizes;
  int64_t dim;

  bool operator==(const Shape& other) const {
    return std::equal(sizes, sizes + dim, other.sizes, other.sizes + other.dim);
  }
};

inline std::ostream& operator<<(std::ostream& out, const Shape& shape) {
  out << "[";
  for (int64_t axis = 0; axis < shape.dim; ++axis) out << (axis ? ", " : "") << shape.sizes[axis];
  return out << "]";
}

enum class Dtype { kFloat32, kFloat64, kInt64, kBool, kOther };

inline int64_t size_of(const Shape& shape) {
  int64_t n = 1;
  for (int64_t axis = 0; axis < shape.dim; ++axis) n *= shape.sizes[axis];
  return n;
}

// A contiguous array as a door hands it on.
struct Array {
  Shape shape;
  Dtype dtype;
  const void* data;

  int64_t size() const { return size_of(shape); }
  int64_t back() const { return shape.sizes[shape.dim - 1]; }
};

// Python receives it as MemoryError.
class NoMemory : public std::bad_alloc {
 public:
  explicit NoMemory(const std::string& wanted) : text_("mtml_fast: there is no memory for " + wanted) {}
  const char* what() const noexcept override { return text_.c_str(); }

 private:
  std::string text_;
};

}  // namespace mtml

#define MTML_CHECK(condition, ...)                                               \
  do {                                                                           \
    if (!(condition)) throw std::invalid_argument(::mtml::message(__VA_ARGS__)); \
  } while (false)
