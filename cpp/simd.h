// Compiler helpers shared by the kernels and the Isa structs.
#pragma once

#include <utility>

#define ST_INLINE __attribute__((always_inline)) inline
#define ST_LAMBDA __attribute__((always_inline))
#define ST_NOINLINE __attribute__((noinline))

// Hides where a pointer came from, so that the compiler addresses off this register instead of folding the whole
// computation into slow indexed operands.
#define ST_OPAQUE(pointer) asm("" : "+r"(pointer))

namespace sparsetrain {
namespace {

template <int I>
struct Index {
  constexpr operator int() const { return I; }
};

template <class F, int... I>
ST_INLINE void unroll_indices(F&& f, std::integer_sequence<int, I...>) {
  (f(Index<I>{}), ...);
}

// unroll<N>(f) calls f(0), ..., f(N-1) with the index as a compile-time constant: it is what keeps an accumulator array
// in registers. (Pragmas would do, but gcc 12 hands an inner loop's unrolling on to the loops around it.)
template <int N, class F>
ST_INLINE void unroll(F&& f) {
  unroll_indices(f, std::make_integer_sequence<int, N>{});
}

}  // namespace
}  // namespace sparsetrain
