// Compiler helpers shared by the kernels and the Isa structs.
#pragma once

#define ST_INLINE __attribute__((always_inline)) inline
#define ST_NOINLINE __attribute__((noinline))

// Complete unrolling of a short loop with a constant bound: it is what keeps an accumulator array in registers.
#if defined(__clang__)
#define ST_UNROLL _Pragma("clang loop unroll(full)")
#else
#define ST_UNROLL _Pragma("GCC unroll 64")
#endif

// Hides where a pointer came from, so that the compiler addresses off this register instead of folding the whole
// computation into slow indexed operands.
#define ST_OPAQUE(pointer) asm("" : "+r"(pointer))
