// The only way in which C++ refuses an argument: one line that says what it must be and what it was. Python receives it
// as ValueError.
#pragma once

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

}  // namespace mtml

#define MTML_CHECK(condition, ...)                                               \
  do {                                                                           \
    if (!(condition)) throw std::invalid_argument(::mtml::message(__VA_ARGS__)); \
  } while (false)
