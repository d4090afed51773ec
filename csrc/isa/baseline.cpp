// What every processor of the architecture has: SSE2 on x86-64, NEON on aarch64.
#include "isa/kernels.h"

#define MTML_ISA baseline
#define MTML_VECTOR_BYTES 16
#include "isa/instantiate.h"
