// The instruction set that serves this process: the widest that the processor has, or the one MTML_FAST_ISA names.
#pragma once

#include <string>
#include <vector>

#include "isa/kernels.h"

namespace mtml {

// chosen once, when the library is loaded
const Kernels& kernels();

// best last
std::vector<std::string> isas_built();
std::vector<std::string> isas_runnable();

}  // namespace mtml
