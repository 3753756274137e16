// BWW and the masked BWI at once: both meet every non-zero of lhs with the same vectors of g.
//
//   drhs[tap][c][k] = sum over pixels of lhs[pixel][c] * g[pixel + tap][k]
//   dlhs[pixel][c]  = sum over taps and k of rhs[tap][c][k] * g[pixel + tap][k], where lhs[pixel][c] is non-zero
//
// It is the walk of kernels_weights.h over packed lists; beside a channel's sums, its filter sits in registers as well,
// and each vector of g serves two multiply-adds: one with the value for the sums of the taps, one with the filter for
// the entry's own sum. Four of the latter become one vector by a tree of shuffles, as in kernels_masked.h. So loads do
// not bound it, and lists, copies and mispredicted ends are paid for once.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels.h"
#include "kernels_weights.h"
#include "simd.h"

namespace sparsetrain {
namespace {

template <class Isa, int kRows, int kColumns, int kVectors>
struct BothWalk {
  using Vec = typename Isa::Vec;
  using Sums = Walk<Isa, kRows, kColumns, kVectors>;
  static constexpr int kRow = kColumns * kVectors, kCount = kRows * kRow, kWidth = kVectors * Isa::kLanes;
  // Entries whose sums are added up together; that take turns, as registers allow.
  static constexpr int kTogether = 4, kTurn = 2 * kCount + 9 <= Isa::kRegisters ? 4 : 2;

  // Adds the products of kEntries entries.
  template <int kEntries>
  static ST_INLINE void visit(const float* dense, ptrdiff_t row, const uint16_t* list, const float* values,
                              const Vec (&filter)[kCount], Vec (&acc)[kCount], Vec* sums) {
    const float* window[kEntries];
    Vec value[kEntries];
    unroll<kEntries>([&](auto e) ST_LAMBDA {
      window[e] = dense + static_cast<size_t>(list[e]) * kWidth;
      ST_OPAQUE(window[e]);
      value[e] = Isa::broadcast(values + e);
    });
    unroll<kRows>([&](auto r) ST_LAMBDA {
      unroll<kRow>([&](auto i) ST_LAMBDA {
        constexpr int t = r * kRow + i;
        unroll<kEntries>([&](auto e) ST_LAMBDA {
          const Vec y = Isa::load_shared(window[e] + i * Isa::kLanes);
          acc[t] = Isa::fma(value[e], y, acc[t]);
          sums[e] = Isa::fma(filter[t], y, sums[e]);
        });
      });
      if constexpr (r + 1 < kRows) {
        unroll<kEntries>([&](auto e) ST_LAMBDA {
          window[e] += row;
          ST_OPAQUE(window[e]);
        });
      }
    });
  }

  static void run(const BothWalkArgs& args) {
    const WeightsWalkArgs& walk = args.walk;
    const float* dense = walk.dense;
    const ptrdiff_t row = walk.tap_row * kWidth, filter_channel = walk.panel.channel, filter_row = walk.panel.row;
    Prefetcher next_dense(walk.next[0], walk.channels), next_checked(walk.next[1], walk.channels);
    for (int c = 0; c < walk.channels; ++c) {
      next_dense.turn();
      next_checked.turn();
      Sums::prefetch_sums(walk.panel, c + 1);
      Vec acc[kCount], filter[kCount];
      Sums::load(walk.panel, c, acc);
      const float* from = args.filter + c * filter_channel;
      unroll<kRows>([&](auto r) ST_LAMBDA {
        unroll<kRow>([&](auto i) ST_LAMBDA {
          filter[r * kRow + i] = Isa::load(from + r * filter_row + i * Isa::kLanes);
          __builtin_prefetch(from + filter_channel + r * filter_row + i * Isa::kLanes);
        });
      });
      const uint16_t* list = walk.lists + c * walk.list_pitch;
      const float* values = walk.values + c * walk.value_pitch;
      float* sums = args.sums + c * walk.value_pitch;
      int count = walk.counts[c];
      for (; count >= kTogether; count -= kTogether) {
        Vec own[kTogether];
        unroll<kTogether>([&](auto e) ST_LAMBDA { own[e] = Isa::zero(); });
        unroll<kTogether / kTurn>([&](auto turn) ST_LAMBDA {
          visit<kTurn>(dense, row, list + turn * kTurn, values + turn * kTurn, filter, acc, own + turn * kTurn);
        });
        Isa::add_sums(sums, args.first, own[0], own[1], own[2], own[3]);
        list += kTogether;
        values += kTogether;
        sums += kTogether;
      }
      if (count > 0) {  // nothing that is not there may meet g, which may be infinite
        Vec own[kTogether];
        unroll<kTogether>([&](auto e) ST_LAMBDA { own[e] = Isa::zero(); });
        unroll<kTogether - 1>([&](auto e) ST_LAMBDA {
          if (e < count) visit<1>(dense, row, list + e, values + e, filter, acc, own + e);
        });
        Isa::add_sums(sums, args.first, own[0], own[1], own[2], own[3]);
      }
      Sums::save(walk.panel, c, acc);
    }
  }
};

template <class Isa, int kRows, int kColumns, int kChoice>
constexpr void offer_both(BothKernels& table) {
  if constexpr (both_offered(kRows, kColumns, 1 << kChoice, Isa::kRegisters)) {
    table.walk[kRows][kColumns][kChoice] = BothWalk<Isa, kRows, kColumns, (1 << kChoice)>::run;
  }
  if constexpr (kChoice + 1 < kVectorChoices) {
    offer_both<Isa, kRows, kColumns, kChoice + 1>(table);
  } else if constexpr (kColumns < kMaxTapColumns) {
    offer_both<Isa, kRows, kColumns + 1, 0>(table);
  } else if constexpr (kRows < kMaxTapRows) {
    offer_both<Isa, kRows + 1, 1, 0>(table);
  }
}

template <class Isa>
constexpr BothKernels both_kernels() {
  BothKernels table{};
  offer_both<Isa, 1, 1, 0>(table);
  return table;
}

}  // namespace
}  // namespace sparsetrain
