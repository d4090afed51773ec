// x86-64 with AVX2 and FMA (2013 and later).
#include "isa/kernels.h"

#ifdef __x86_64__
MTML_TARGET_BEGIN("avx2,fma")
#define MTML_ISA avx2
#define MTML_VECTOR_BYTES 32
#include "isa/instantiate.h"
MTML_TARGET_END
#endif
