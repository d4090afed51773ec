// aarch64, where NEON is part of the architecture.
#include "isa/kernels.h"

#ifdef __aarch64__
#define MTML_ISA neon
#define MTML_VECTOR_BYTES 16
#include "isa/instantiate.h"
#endif
