// Compiler helpers shared by the kernels and the Isa structs.
#pragma once

#include <cstddef>
#include <cstdint>
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

// Appends those of 64 integers that a word names to a list, and up to kListLanes of garbage. Returns how many.
template <class Isa>
ST_INLINE int list_word(uint16_t* list, uint64_t word, const uint16_t* integers) {
  constexpr uint64_t kLaneBits = (uint64_t{1} << Isa::kListLanes) - 1;
  const uint16_t* begin = list;
  for (int i = 0; i < 64; i += Isa::kListLanes) {
    const uint64_t lanes = word >> i & kLaneBits;
    if constexpr (Isa::kListLanes > Isa::kLanes) {
      Isa::compress_list(list, lanes, integers + i);
    } else {
      Isa::compress_u16(list, static_cast<uint32_t>(lanes), Isa::load_u16(integers + i));
    }
    list += __builtin_popcountll(lanes);
  }
  return static_cast<int>(list - begin);
}

// What is left to visit: the bits of a mask, or the entries of a list.
struct MaskLeft {
  uint64_t mask;
  ST_INLINE bool any() const { return mask != 0; }
  ST_INLINE size_t next() {
    const int bit = __builtin_ctzll(mask);
    mask &= mask - 1;
    return static_cast<size_t>(bit);
  }
};
struct ListLeft {
  const uint16_t *list, *end;
  ST_INLINE bool any() const { return list != end; }
  ST_INLINE size_t next() { return *list++; }
};

// Visits of one kind to the positions that are left.
template <class Left, class F>
struct Visits {
  Left left;
  F visit;
  ST_INLINE void turn() { visit(left.next()); }
  ST_INLINE void rest() {
    while (left.any()) turn();
  }
};
template <class F>
ST_INLINE Visits<MaskLeft, F> visits(uint64_t mask, F visit) {
  return {{mask}, visit};
}
template <class F>
ST_INLINE Visits<ListLeft, F> visits(const uint16_t* list, int count, F visit) {
  return {{list, list + count}, visit};
}

// All visits, kinds taking turns as long as there are some of each. Loads bound those that share none, multiply-adds
// those that do; side by side they fill up each other's time.
template <class... V>
ST_INLINE void take_turns(V... kinds) {
  while ((kinds.left.any() && ...)) (kinds.turn(), ...);
  (kinds.rest(), ...);
}

// Packed values one after another, each in all lanes.
template <class Isa>
struct Values {
  const float* next;
  ST_INLINE explicit Values(const float* at) : next(at) {}
  ST_INLINE typename Isa::Vec take() { return Isa::broadcast(next++); }
};

// The same out of a register, which is filled by whole lines (of an aligned buffer, whose end may be overrun by one):
// no load for each value.
template <class Isa>
struct TakenValues {
  static constexpr size_t kLine = Isa::kLanes * sizeof(float);
  const float* next;
  typename Isa::Vec few;  // the first one is that at `next`

  ST_INLINE explicit TakenValues(const float* at) : next(at) {
    const size_t skip = reinterpret_cast<uintptr_t>(at) % kLine / sizeof(float);
    few = Isa::load(at - skip);
    for (size_t i = 0; i < skip; ++i) Isa::take(few);
  }
  ST_INLINE typename Isa::Vec take() {
    const typename Isa::Vec value = Isa::take(few);
    ++next;
    if (__builtin_expect(reinterpret_cast<uintptr_t>(next) % kLine == 0, 0)) {
      few = Isa::load(next);
      __builtin_prefetch(next + 8 * Isa::kLanes);
    }
    return value;
  }
};

}  // namespace
}  // namespace sparsetrain
