// x86-64 with AVX-512 F, VL, DQ and BW (servers since 2017, AMD since 2022).
#include "isa/kernels.h"

#ifdef __x86_64__
MTML_TARGET_BEGIN("avx512f,avx512vl,avx512dq,avx512bw,avx2,fma")
#define MTML_ISA avx512
#define MTML_VECTOR_BYTES 64
#include "isa/instantiate.h"
MTML_TARGET_END
#endif
