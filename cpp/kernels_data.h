// Kernels of FWD and BWI, templated on an Isa (simd_portable.h says what one offers).
//
// Every convolution is a sum of stride-1 row sweeps (plan_data.h does the splitting), and a sweep is the paper's loop:
// compare the input with zero, walk the set bits of the mask, and for each do one broadcast and taps * vectors FMAs
// into accumulators that stay in registers while the row goes by (SparseTrain, section 3.2). On top of the paper:
//
// - Masks are made ahead (scan), for a whole tile: a compare that feeds a branch directly would queue behind the FMA
//   backlog and expose every mispredicted loop exit.
// - Two pixels a step. Channels that are non-zero in both load each filter vector once for two FMAs; then those of the
//   first pixel only, then those of the second only.
// - Only what is not zero is copied for the sweeps, in the order in which they want it (scan).
// - Of few features, all rows of the kernel in one visit (tall sweeps).
// - A step has no cases: sums lie in scratch, with padding for what pixels at the ends of a row reach beyond it.
//
// The accumulators are a window over taps + 1 output columns. Pixels x and x + 1 (x even) reach columns
// first + x .. first + x + taps; after them the first two columns are finished, and the window moves on by two.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "kernels.h"
#include "simd.h"

namespace sparsetrain {
namespace {

constexpr int kFetchedAhead = 8;  // columns of the result

// Columns of sums, from the tile to registers and from there to where they go.
template <class Isa, int kTaps, int kVectors>
struct Columns {
  static constexpr int kLanes = Isa::kLanes;
  static constexpr int kFeatures = kVectors * kLanes;
  using Vec = typename Isa::Vec;

  static ST_INLINE bool inside(const PlacedSweepArgs& a, int column) {
    return static_cast<unsigned>(column) < static_cast<unsigned>(a.columns);
  }

  static ST_INLINE void load(const float* tile, Vec (&sums)[kVectors]) {
    unroll<kVectors>([&](auto v) ST_LAMBDA { sums[v] = Isa::load(tile + v * kLanes); });
  }

  static ST_INLINE void clear(Vec (&sums)[kVectors]) {
    unroll<kVectors>([&](auto v) ST_LAMBDA { sums[v] = Isa::zero(); });
  }

  static ST_INLINE void load_if_inside(const PlacedSweepArgs& a, int column, Vec (&sums)[kVectors]) {
    if (a.tile != nullptr && inside(a, column)) {
      load(a.tile + static_cast<ptrdiff_t>(column) * kFeatures, sums);
    } else {
      clear(sums);
    }
  }

  // Whether columns go out by stores of whole vectors.
  static ST_INLINE bool plain(const PlacedSweepArgs& a) {
    return !a.stream && a.out_features == kFeatures && a.out_dtype == DType::kF32;
  }

  static ST_INLINE void fetch(const PlacedSweepArgs& a, const float* out) {
    if (!a.fetch) return;
    out += kFetchedAhead * a.out_pitch;
    unroll<kVectors>([&](auto v) ST_LAMBDA { __builtin_prefetch(out + v * kLanes); });
  }

  static ST_INLINE void store(const PlacedSweepArgs& a, ptrdiff_t offset, const Vec (&sums)[kVectors]) {
    float* out = a.out + offset;
    fetch(a, out);
    if (a.keep == nullptr) {
      unroll<kVectors>([&](auto v) ST_LAMBDA { Isa::store(out + v * kLanes, sums[v]); });
      return;
    }
    const float* keep = a.keep + offset;
    unroll<kVectors>([&](auto v) ST_LAMBDA {
      Isa::store(out + v * kLanes, Isa::keep(Isa::nonzero(Isa::load(keep + v * kLanes)), sums[v]));
      // Feature blocks and strided columns make holes that the hardware does not look across.
      __builtin_prefetch(keep + 6 * a.out_pitch + v * kLanes);
    });
  }

  template <class T>
  static ST_INLINE void store_narrow(const PlacedSweepArgs& a, int column, const Vec (&sums)[kVectors]) {
    T* out = static_cast<T*>(a.narrow_out) + column * a.out_pitch;
    if (a.out_features == kFeatures) {
      unroll<kVectors / 2>([&](auto v)
                               ST_LAMBDA { Isa::store_two(out + 2 * v * kLanes, sums[2 * v], sums[2 * v + 1]); });
      if constexpr (kVectors % 2 != 0) Isa::store(out + (kVectors - 1) * kLanes, sums[kVectors - 1]);
      return;
    }
    unroll<kVectors>([&](auto v) ST_LAMBDA {
      const int lanes = a.out_features - v * kLanes;
      if (lanes > 0) Isa::store_n(out + v * kLanes, sums[v], lanes < kLanes ? lanes : kLanes);
    });
  }

  // The other ways of a column to its place; nothing for a column that is not there.
  static ST_INLINE void store_specially(const PlacedSweepArgs& a, int column, Vec (&sums)[kVectors]) {
    if (!inside(a, column)) return;
    if constexpr (kTaps == 1) {
      if (a.out_dtype == DType::kBf16) return store_narrow<Bf16>(a, column, sums);
      if (a.out_dtype == DType::kF16) return store_narrow<F16>(a, column, sums);
    }
    float* out = a.out + column * a.out_pitch;
    if (a.keep != nullptr) {
      const float* keep = a.keep + column * a.out_pitch;
      unroll<kVectors>([&](auto v) ST_LAMBDA {
        const int lanes = a.out_features - v * kLanes;
        if (lanes <= 0) return;
        const Vec x = lanes >= kLanes ? Isa::load(keep + v * kLanes) : Isa::load_n(keep + v * kLanes, lanes);
        sums[v] = Isa::keep(Isa::nonzero(x), sums[v]);
        __builtin_prefetch(keep + 6 * a.out_pitch + v * kLanes);
      });
    }
    if (a.stream) {
      unroll<kVectors>([&](auto v) ST_LAMBDA {
        if (v * kLanes < a.out_features) Isa::stream(out + v * kLanes, sums[v]);
      });
      return;
    }
    fetch(a, out);
    unroll<kVectors>([&](auto v) ST_LAMBDA {
      const int lanes = a.out_features - v * kLanes;
      if (lanes >= kLanes) {
        Isa::store(out + v * kLanes, sums[v]);
      } else if (lanes > 0) {
        Isa::store_n(out + v * kLanes, sums[v], lanes);
      }
    });
  }
};

// Over values that are packed. kTall: of all rows of the kernel at once, a vector of features each, whose sums belong
// to as many rows of the result. Short visits become longer ones, and lists end once, not once for each row.
template <class Isa, int kTaps, int kVectors, bool kTall = false>
struct Sweep {
  static constexpr int kLanes = Isa::kLanes;
  static constexpr int kFeatures = kTall ? kLanes : kVectors * kLanes;
  static constexpr int kSets = sets_of_sums(kTaps, kVectors);
  static_assert((kTaps + 1) * kSets * kVectors + 3 <= Isa::kRegisters);
  using Vec = typename Isa::Vec;
  using Sums = Vec[kSets][kVectors];  // of a column
  using Window = Sums[kTaps + 1];

  static ST_INLINE const float* next(uint64_t& mask, const float* filter) {
    const float* f = filter + static_cast<size_t>(__builtin_ctzll(mask)) * (kTaps * kVectors * kLanes);
    mask &= mask - 1;
    ST_OPAQUE(f);
    return f;
  }

  // Calls f(set of sums, filter of the channel) for every channel in a mask.
  template <class F>
  static ST_INLINE void for_channels(uint64_t mask, const float* filter, F&& f) {
    while (visit_next<0>(mask, filter, f)) {
    }
  }
  template <int kSet, class F>
  static ST_INLINE bool visit_next(uint64_t& mask, const float* filter, F&& f) {
    if (mask == 0) return false;
    f(Index<kSet>{}, next(mask, filter));
    if constexpr (kSet + 1 < kSets) return visit_next<kSet + 1>(mask, filter, f);
    return true;
  }

  // Of pixel pairs, packed.
  struct Pairs {
    const float* next;
    ST_INLINE explicit Pairs(const float* at) : next(at) {}
  };

  // Channels of one pixel; its tap t belongs to window column kBase + taps-1-t. The first kLeft and the last kRight
  // columns of the window are not there.
  template <int kBase, int kLeft, int kRight, class V>
  static ST_INLINE void visit_single(Window& sums, uint64_t mask, V& values, const float* filter) {
    for_channels(mask, filter, [&](auto set, const float* f) ST_LAMBDA {
      const Vec value = values.take();
      unroll<kTaps * kVectors>([&](auto i) ST_LAMBDA {
        constexpr int p = kBase + kTaps - 1 - i / kVectors, v = i % kVectors;
        if constexpr (p >= kLeft && p <= kTaps - kRight) {
          Vec& sum = sums[p][set][v];
          sum = Isa::fma(value, Isa::load(f + i * kLanes), sum);
        }
      });
    });
  }

  template <int kLeft, int kRight>
  static ST_INLINE void visit_both(Window& sums, uint64_t mask, const float*& values0, const float*& values1,
                                   const float* filter) {
    for_channels(mask, filter, [&](auto set, const float* f) ST_LAMBDA {
      const Vec value0 = Isa::broadcast(values0++), value1 = Isa::broadcast(values1++);
      unroll<kTaps * kVectors>([&](auto i) ST_LAMBDA {
        constexpr int p = kTaps - 1 - i / kVectors, v = i % kVectors;
        const Vec w = Isa::load_shared(f + i * kLanes);
        if constexpr (p >= kLeft && p <= kTaps - kRight) Isa::fma_shared(value0, w, sums[p][set][v]);
        if constexpr (p + 1 >= kLeft && p + 1 <= kTaps - kRight) Isa::fma_shared(value1, w, sums[p + 1][set][v]);
      });
    });
  }

  // With few non-zeros, what a step does beside its visits is half of its time: no more than this.
  template <class V>
  struct Place {
    const uint64_t* masks;
    float* sums;        // of the window's first column
    const float* from;  // the same, or zeros, and what two columns are there: a branch would cost registers
    ptrdiff_t from_step;
    ptrdiff_t row_pitch;  // only for kTall
    const float* filter;
    float* out;  // of that column, too; only for kOut
    ptrdiff_t out_pitch;
    bool stream;
    V values;
  };

  // Tall sums may come from zeros for the first row of the kernel, and go out for the last.
  static constexpr bool first_row(int vector) { return !kTall || vector == 0; }
  static constexpr bool last_row(int vector) { return !kTall || vector == kVectors - 1; }

  // Of a vector of a column, among the sums.
  template <class V>
  static ST_INLINE ptrdiff_t place(const Place<V>& at, int column, int vector) {
    return column * kFeatures + vector * (kTall ? at.row_pitch : kLanes);
  }

  template <bool kOut, class V>
  static ST_INLINE void save(const Place<V>& at, int column, Sums& finished) {
    unroll<(kSets - 1) * kVectors>([&](auto i) ST_LAMBDA {
      Vec& sum = finished[0][i % kVectors];
      sum = Isa::add(sum, finished[1 + i / kVectors][i % kVectors]);
    });
    const auto& sums = finished[0];
    unroll<kVectors>([&](auto v) ST_LAMBDA {
      if constexpr (!kOut || !last_row(v)) {
        Isa::store(at.sums + place(at, column, v), sums[v]);
      } else {
        float* out = at.out + column * at.out_pitch + (kTall ? 0 : v * kLanes);
        at.stream ? Isa::stream(out, sums[v]) : Isa::store(out, sums[v]);
      }
    });
  }

  template <int kLeft, int kRight, class V>
  static ST_INLINE void visit(Window& sums, uint64_t mask0, uint64_t mask1, V& values, const float* filter) {
    visit_single<0, kLeft, kRight>(sums, mask0, values, filter);
    visit_single<1, kLeft, kRight>(sums, mask1, values, filter);
  }

  template <int kLeft, int kRight>
  static ST_INLINE void visit(Window& sums, uint64_t mask0, uint64_t mask1, Pairs& values, const float* filter) {
    const uint64_t both = mask0 & mask1;
    Values<Isa> rest(values.next + __builtin_popcountll(both));
    visit_both<kLeft, kRight>(sums, both, values.next, rest.next, filter);
    visit<kLeft, kRight>(sums, mask0 ^ both, mask1 ^ both, rest, filter);
    values.next = rest.next;
  }

  template <bool kOut, int kLeft, int kRight, class V>
  static ST_INLINE void step(Window& sums, Place<V>& at) {
    const uint64_t mask0 = at.masks[0], mask1 = at.masks[1];
    at.masks += 2;
    begin(at, kTaps - 1, sums);
    begin(at, kTaps, sums);
    at.from += at.from_step;
    visit<kLeft, kRight>(sums, mask0, mask1, at.values, at.filter);
    if constexpr (!kOut || kLeft == 0) save<kOut>(at, 0, sums[0]);
    if constexpr (kRight < kTaps) save<kOut>(at, 1, sums[1]);
    at.sums += 2 * kFeatures;
    if constexpr (kOut) at.out += 2 * at.out_pitch;
    unroll<(kTaps - 1) * kSets * kVectors>([&](auto i) ST_LAMBDA {
      constexpr int p = i / (kSets * kVectors), set = i / kVectors % kSets, v = i % kVectors;
      sums[p][set][v] = sums[p + 2][set][v];
    });
  }

  template <class V>
  static ST_INLINE void begin(const Place<V>& at, int column, Window& sums) {
    unroll<kSets * kVectors>([&](auto i) ST_LAMBDA {
      constexpr int set = i / kVectors, v = i % kVectors;
      const float* from = first_row(v) ? at.from : at.sums;
      sums[column][set][v] = set == 0 ? Isa::load(from + place(at, column, v)) : Isa::zero();
    });
  }

  template <class V>
  static ST_INLINE void load(const Place<V>& at, Window& sums) {
    unroll<kTaps - 1>([&](auto p) ST_LAMBDA { begin(at, p, sums); });
  }

  // Three taps of padded images are worth steps of their own at both ends, which leave out what is beyond them. With
  // sixteen registers gcc keeps sums of them in memory. One tap reaches nothing beyond.
  static constexpr bool kEnds = kTaps == 1 || (kTaps == 3 && Isa::kRegisters == 32);
  template <bool kOut, class V>
  static ST_INLINE void run_padded(Place<V> at, int pixels) {
    Window sums;
    load(at, sums);
    if constexpr (kTaps == 1) {
      const uint64_t* end = at.masks + pixels / 2 * 2;
      while (at.masks < end) step<kOut, 0, 0>(sums, at);
      if (pixels % 2 != 0) step<kOut, 0, 1>(sums, at);
    } else {
      const uint64_t* end = at.masks + (pixels - 1) / 2 * 2;
      step<kOut, 1, 0>(sums, at);
      while (at.masks < end) step<kOut, 0, 0>(sums, at);
      if (pixels % 2 == 0) {
        step<kOut, 0, 1>(sums, at);
        save<kOut>(at, 0, sums[0]);
      } else {
        step<kOut, 0, 2>(sums, at);
      }
    }
  }

  // Out of line: once a row, and gcc keeps what the steps need in registers.
  static ST_NOINLINE void fetch(Ahead& ahead) {
    if (ahead.pieces == 0) {
      for (int i = 0; i < ahead.each; ++i, ahead.at += 64) __builtin_prefetch(ahead.at, 0, 2);
      return;
    }
    for (int i = 0; i < ahead.each && ahead.rows > 0; ++i, --ahead.rows, ahead.at += ahead.row_pitch) {
      const char* piece = ahead.at;
      for (int p = 0; p < ahead.pieces; ++p, piece += ahead.piece_pitch) {
        for (int line = 0; line < ahead.lines; ++line) __builtin_prefetch(piece + 64 * line, 0, 2);
      }
    }
  }

  template <class V>
  static ST_INLINE bool run_over(const SweepArgs& args) {
    const SweepArgs a = args;
    const ptrdiff_t first = a.first;
    alignas(64) static constexpr float kZeros[(kTaps + 1) * kFeatures] = {};
    const bool padded = kEnds && a.first == -(kTaps / 2) && a.pixels == a.columns && a.pixels >= kTaps;
    Ahead filter_ahead = a.filter_ahead, input_ahead = a.input_ahead;
    for (const SweepRow *row = a.rows, *end = row + a.count; row < end; ++row) {
      fetch(filter_ahead);
      fetch(input_ahead);
      float* sums_at = row->sums + first * kFeatures;
      Place<V> at{row->masks,
                  sums_at,
                  row->zero ? kZeros : sums_at,
                  row->zero ? 0 : 2 * kFeatures,
                  a.row_pitch,
                  a.filter,
                  nullptr,
                  a.out_pitch,
                  a.stream,
                  V(row->values)};
      if constexpr (kEnds) {
        if (padded && row->out == nullptr) {
          run_padded<false>(at, a.pixels);
          continue;
        }
        if (padded) {
          at.out = row->out + first * a.out_pitch;
          run_padded<true>(at, a.pixels);
          continue;
        }
      }
      Window sums;
      load(at, sums);
      const uint64_t* last = at.masks + (a.pixels + 1) / 2 * 2;
      while (at.masks < last) step<false, 0, 0>(sums, at);
      unroll<kTaps - 1>([&](auto p) ST_LAMBDA { save<false>(at, p, sums[p]); });
    }
    return padded;
  }

  static bool run(const SweepArgs& a) {
    if (a.pairs) return run_over<Pairs>(a);
    if constexpr (Isa::kTakes) {
      if (a.take) return run_over<TakenValues<Isa>>(a);
    }
    return run_over<Values<Isa>>(a);
  }
};

// One tap, values in place, sums that may go straight to the result.
template <class Isa, int kVectors>
struct PointSweep {
  static constexpr int kLanes = Isa::kLanes;
  static constexpr int kFeatures = kVectors * kLanes;
  using Vec = typename Isa::Vec;
  using Columns = sparsetrain::Columns<Isa, 1, kVectors>;
  using Sums = Vec[kVectors];

  static ST_INLINE const float* filter_of(size_t channel, const float* filter) {
    const float* f = filter + channel * kFeatures;
    ST_OPAQUE(f);
    return f;
  }
  static ST_INLINE void add_single(Sums& sums, const float* value, const float* f) {
    const Vec x = Isa::broadcast(value);
    unroll<kVectors>([&](auto v) ST_LAMBDA { sums[v] = Isa::fma(x, Isa::load(f + v * kLanes), sums[v]); });
  }
  static ST_INLINE void add_both(Sums& sums0, Sums& sums1, const float* value0, const float* value1, const float* f) {
    const Vec x0 = Isa::broadcast(value0), x1 = Isa::broadcast(value1);
    unroll<kVectors>([&](auto v) ST_LAMBDA {
      const Vec w = Isa::load_shared(f + v * kLanes);
      Isa::fma_shared(x0, w, sums0[v]);
      Isa::fma_shared(x1, w, sums1[v]);
    });
  }

  // The loop visits every column once, also those that no pixel reaches. Most steps are `inner` ones, whose pixels and
  // columns all exist: with few non-zeros, what a step does beside its visits is half of its time.
  static void run(const PlacedSweepArgs& args) {
    const PlacedSweepArgs a = args;
    const char* prefetch = a.prefetch;
    const bool plain = Columns::plain(a);
    Sums sums0, sums1;
    const int begin = a.first > 0 ? -((a.first + 1) & ~1) : -a.first & ~1;
    const int inner_begin = -a.first > 0 ? -a.first : 0;
    const int inner_end = a.columns - 1 - a.first < a.pixels - 1 ? a.columns - 1 - a.first : a.pixels - 1;
    const float* pixel0 = a.values + begin * a.value_pitch;
    ptrdiff_t out = (a.first + begin) * a.out_pitch;
    for (int x = begin; a.first + x < a.columns; x += 2) {
      const int column = a.first + x;
      const bool inner = x >= inner_begin && x < inner_end;
      const float* pixel1 = pixel0 + a.value_pitch;
      uint64_t mask0, mask1;
      if (__builtin_expect(inner, 1)) {
        mask0 = a.masks[x];
        mask1 = a.masks[x + 1];
        if (a.tile != nullptr) {
          const float* tile = a.tile + static_cast<ptrdiff_t>(column) * kFeatures;
          Columns::load(tile, sums0);
          Columns::load(tile + kFeatures, sums1);
        } else {
          Columns::clear(sums0);
          Columns::clear(sums1);
        }
      } else {
        mask0 = static_cast<unsigned>(x) < static_cast<unsigned>(a.pixels) ? a.masks[x] : 0;
        mask1 = static_cast<unsigned>(x + 1) < static_cast<unsigned>(a.pixels) ? a.masks[x + 1] : 0;
        Columns::load_if_inside(a, column, sums0);
        Columns::load_if_inside(a, column + 1, sums1);
      }
      for (int i = 0; i < a.value_lines; ++i) {
        __builtin_prefetch(pixel1 + a.value_pitch + 16 * i, 0, 3);
        __builtin_prefetch(pixel1 + 2 * a.value_pitch + 16 * i, 0, 3);
      }
      for (int i = 0; i < a.prefetch_lines; ++i, prefetch += 64) __builtin_prefetch(prefetch, 0, 2);
      const uint64_t both = mask0 & mask1 & a.pair_mask;
      const auto both_at = [&](size_t c)
                               ST_LAMBDA { add_both(sums0, sums1, pixel0 + c, pixel1 + c, filter_of(c, a.filter)); };
      const auto at0 = [&](size_t c) ST_LAMBDA { add_single(sums0, pixel0 + c, filter_of(c, a.filter)); };
      const auto at1 = [&](size_t c) ST_LAMBDA { add_single(sums1, pixel1 + c, filter_of(c, a.filter)); };
      if constexpr (Isa::kRegisters == 32) {
        take_turns(visits(both, both_at), visits(mask0 ^ both, at0), visits(mask1 ^ both, at1));
      } else {  // turns spill
        take_turns(visits(both, both_at));
        take_turns(visits(mask0 ^ both, at0));
        take_turns(visits(mask1 ^ both, at1));
      }
      pixel0 = pixel1 + a.value_pitch;
      if (__builtin_expect(inner && plain, 1)) {
        Columns::store(a, out, sums0);
        Columns::store(a, out + a.out_pitch, sums1);
      } else {
        Columns::store_specially(a, column, sums0);
        Columns::store_specially(a, column + 1, sums1);
      }
      out += 2 * a.out_pitch;
    }
  }
};

// Pixels of a step of a dense sweep: what the registers hold.
template <class Isa, int kTaps, int kVectors>
constexpr int dense_pixels() {
  int pixels = 2;
  while (pixels < 8 && (kTaps + pixels) * kVectors + pixels + 2 <= Isa::kRegisters) ++pixels;
  return pixels;
}

// The same sums, of all channels whatever their values: with nothing to look up, a step takes more pixels, which share
// the loads of the filter.
template <class Isa, int kTaps, int kVectors>
struct DenseSweep {
  static constexpr int kLanes = Isa::kLanes;
  static constexpr int kFeatures = kVectors * kLanes;
  static constexpr int kPixels = dense_pixels<Isa, kTaps, kVectors>();
  using Vec = typename Isa::Vec;
  using Columns = sparsetrain::Columns<Isa, kTaps, kVectors>;
  using Window = Vec[kTaps + kPixels - 1][kVectors];

  // All channels of kCount neighbouring pixels.
  template <int kCount>
  static ST_INLINE void visit(Window& sums, int channels, const float* pixel, ptrdiff_t pitch, const float* filter) {
    const float* pixels[kCount];
    unroll<kCount>([&](auto p) ST_LAMBDA { pixels[p] = pixel + p * pitch; });
    for (int channel = 0; channel < channels; ++channel, filter += kTaps * kFeatures) {
      Vec values[kCount];
      unroll<kCount>([&](auto p) ST_LAMBDA { values[p] = Isa::broadcast(pixels[p] + channel); });
      unroll<kTaps * kVectors>([&](auto i) ST_LAMBDA {
        constexpr int t = i / kVectors, v = i % kVectors;
        const Vec w = Isa::load_shared(filter + i * kLanes);
        unroll<kCount>([&](auto p) ST_LAMBDA {
          Vec& sum = sums[p + kTaps - 1 - t][v];
          Isa::fma_shared(values[p], w, sum);
        });
      });
    }
  }

  static void run(const PlacedSweepArgs& args) {
    const PlacedSweepArgs a = args;
    const char* prefetch = a.prefetch;
    const bool plain = Columns::plain(a);
    const int channels = __builtin_popcountll(a.all_channels);
    const int lead = a.first + kTaps - 1;
    const int begin = lead > 0 ? -(lead + kPixels - 1) / kPixels * kPixels : -lead / kPixels * kPixels;
    Window sums;
    unroll<kTaps - 1>([&](auto p) ST_LAMBDA { Columns::clear(sums[p]); });
    for (int x = begin; a.first + x < a.columns; x += kPixels) {
      const int column = a.first + x;
      unroll<kPixels>([&](auto p)
                          ST_LAMBDA { Columns::load_if_inside(a, column + kTaps - 1 + p, sums[kTaps - 1 + p]); });
      // Steps begin at multiples of kPixels, so the pixels of a step that do not exist are its last or all.
      const int left = x < 0 ? 0 : a.pixels - x;
      const float* pixel = a.values + x * a.value_pitch;
      for (int i = 0; i < kPixels * a.prefetch_lines / 2; ++i, prefetch += 64) __builtin_prefetch(prefetch, 0, 2);
      if (__builtin_expect(left >= kPixels, 1)) {
        visit<kPixels>(sums, channels, pixel, a.value_pitch, a.filter);
      } else {
        unroll<kPixels - 1>([&](auto p) ST_LAMBDA {
          if (left == p + 1) visit<p + 1>(sums, channels, pixel, a.value_pitch, a.filter);
        });
      }
      if (plain && column >= 0 && column + kPixels <= a.columns) {
        unroll<kPixels>([&](auto p) ST_LAMBDA { Columns::store(a, (column + p) * a.out_pitch, sums[p]); });
      } else {
        unroll<kPixels>([&](auto p) ST_LAMBDA { Columns::store_specially(a, column + p, sums[p]); });
      }
      unroll<kTaps - 1>(
          [&](auto p) ST_LAMBDA { unroll<kVectors>([&](auto v) ST_LAMBDA { sums[p][v] = sums[p + kPixels][v]; }); });
    }
  }
};

// Channels c, c + 1, ... of a block: copies them, returns their bits.
template <class Isa, bool kMasks, bool kCopy>
ST_INLINE uint64_t scan_vector(typename Isa::Vec v, int c, float* copy) {
  if constexpr (kCopy) Isa::store(copy + c, v);
  return kMasks ? static_cast<uint64_t>(Isa::nonzero(v)) << c : 0;
}

template <class Isa, class T, bool kMasks, bool kCopy>
int64_t scan_rows(const ScanArgs& a) {
  int64_t count = 0;
  for (int x = 0; x < a.pixels; ++x) {
    const T* pixel = static_cast<const T*>(a.values) + x * a.value_pitch;
    uint64_t* masks = kMasks ? a.masks + x : nullptr;
    float* copy = kCopy ? a.copy + static_cast<ptrdiff_t>(x) * a.block : nullptr;
    for (int c0 = 0; c0 < a.channels; c0 += a.block) {
      const int channels = a.channels - c0 < a.block ? a.channels - c0 : a.block;
      uint64_t mask = 0;
      int c = 0;
      for (; c + Isa::kLanes <= channels; c += Isa::kLanes) {
        mask |= scan_vector<Isa, kMasks, kCopy>(Isa::load(pixel + c0 + c), c, copy);
      }
      if (c < channels) {
        mask |= scan_vector<Isa, kMasks, kCopy>(Isa::load_n(pixel + c0 + c, channels - c), c, copy);
      }
      if constexpr (kMasks) {
        *masks = mask;
        masks += a.mask_pitch;
        count += __builtin_popcountll(mask);
      }
      if constexpr (kCopy) copy += a.copy_pitch;
    }
  }
  return count;
}

// Of one pixel's block of channels.
template <class Isa, class T>
struct PixelBlock {
  const T* values;
  int channels;

  // f(c, vector of channels c, c + 1, ...)
  template <class F>
  ST_INLINE void each(F&& f) const {
    int c = 0;
    for (; c + Isa::kLanes <= channels; c += Isa::kLanes) f(c, Isa::load(values + c));
    if (c < channels) f(c, Isa::load_n(values + c, channels - c));
  }
  // Fetches a later pixel meanwhile: blocks of channels make gaps that the hardware does not look across.
  ST_INLINE uint64_t mask(ptrdiff_t later) const {
    uint64_t mask = 0;
    each([&](int c, typename Isa::Vec v) ST_LAMBDA {
      mask |= static_cast<uint64_t>(Isa::nonzero(v)) << c;
      __builtin_prefetch(values + later + c);
    });
    return mask;
  }
  // Appends the values of `mask`.
  ST_INLINE float* pack(uint64_t mask, float* to) const {
    constexpr uint64_t kLaneBits = (uint64_t{1} << Isa::kLanes) - 1;
    each([&](int c, typename Isa::Vec v) ST_LAMBDA {
      const uint32_t lanes = static_cast<uint32_t>(mask >> c & kLaneBits);
      Isa::compress(to, lanes, v);
      to += __builtin_popcount(lanes);
    });
    return to;
  }
};

template <class Isa, class T, bool kPairs>
int64_t scan_packed(const ScanArgs& a) {
  int64_t count = 0;
  uint64_t* masks = a.masks;
  float* copy = a.copy;
  for (int c0 = 0; c0 < a.channels; c0 += a.block, masks += a.mask_pitch, copy += a.copy_pitch) {
    PixelBlock<Isa, T> pixel{static_cast<const T*>(a.values) + c0,
                             a.channels - c0 < a.block ? a.channels - c0 : a.block};
    float* to = copy;
    const ptrdiff_t later = 8 * a.value_pitch;
    int x = 0;
    if constexpr (kPairs) {
      for (; x + 1 < a.pixels; x += 2) {
        PixelBlock<Isa, T> second{pixel.values + a.value_pitch, pixel.channels};
        const uint64_t mask0 = pixel.mask(later), mask1 = second.mask(later), both = mask0 & mask1;
        masks[x] = mask0;
        masks[x + 1] = mask1;
        to = pixel.pack(both, to);
        to = second.pack(both, to);
        to = pixel.pack(mask0 ^ both, to);
        to = second.pack(mask1 ^ both, to);
        pixel.values = second.values + a.value_pitch;
      }
    }
    for (; x < a.pixels; ++x, pixel.values += a.value_pitch) {
      uint64_t mask = 0;
      pixel.each([&](int c, typename Isa::Vec v) ST_LAMBDA {
        const uint32_t lanes = Isa::nonzero(v);
        mask |= static_cast<uint64_t>(lanes) << c;
        Isa::compress(to, lanes, v);
        to += __builtin_popcount(lanes);
        __builtin_prefetch(pixel.values + later + c);
      });
      masks[x] = mask;
    }
    if (x % 2 != 0) masks[x] = 0;
    count += to - copy;
  }
  return count;
}

template <class Isa, class T>
int64_t scan(const ScanArgs& args) {
  const ScanArgs a = args;
  if (a.masks == nullptr) return scan_rows<Isa, T, false, true>(a);
  if (a.copy != nullptr && a.packing == Packing::kPairs) return scan_packed<Isa, T, true>(a);
  if (a.copy != nullptr && a.packing == Packing::kSingles) return scan_packed<Isa, T, false>(a);
  return a.copy != nullptr ? scan_rows<Isa, T, true, true>(a) : scan_rows<Isa, T, true, false>(a);
}

template <class Isa, class T>
void widen_values(const void* src, float* dst, int64_t count) {
  const T* from = static_cast<const T*>(src);
  int64_t i = 0;
  for (; i + Isa::kLanes <= count; i += Isa::kLanes) Isa::store(dst + i, Isa::load(from + i));
  if (i < count) {
    const int left = static_cast<int>(count - i);
    Isa::store_n(dst + i, Isa::load_n(from + i, left), left);
  }
}

template <class Isa, class T>
void pack_rows(const void* src, ptrdiff_t src_pitch, float* dst, ptrdiff_t dst_pitch, ptrdiff_t block_pitch, int rows,
               int cols, int width) {
  const T* from = static_cast<const T*>(src);
  for (int i = 0; i < rows; ++i, from += src_pitch, dst += dst_pitch) {
    float* to = dst;
    for (int j0 = 0; j0 < cols; j0 += width, to += block_pitch) {
      for (int j = 0; j < width; j += Isa::kLanes) {
        const int left = cols - j0 - j;
        Isa::store(to + j, left >= Isa::kLanes ? Isa::load(from + j0 + j)
                           : left > 0          ? Isa::load_n(from + j0 + j, left)
                                               : Isa::zero());
        __builtin_prefetch(from + 8 * src_pitch + j0 + j);
      }
    }
  }
}

// kZero: keep is there.
template <class Isa, class Keep, class Out, bool kZero>
ST_INLINE void finish_rows(const FinishArgs& a) {
  constexpr int kLanes = Isa::kLanes;
  for (int64_t row = 0; row < a.rows; ++row) {
    const float* sums = a.sums + row * a.pitch;
    Out* out = static_cast<Out*>(a.out) + row * a.out_pitch;
    const Keep* keep = static_cast<const Keep*>(a.keep) + (kZero ? row * a.out_pitch : 0);
    int64_t i = 0;
    if (a.fetch) {
      const Out* ahead = out + kFetchedAhead * a.out_pitch;
      for (int64_t f = 0; f < a.features; f += 64 / sizeof(Out)) __builtin_prefetch(ahead + f);
    }
    if constexpr (!kZero) {
      if constexpr (std::is_same_v<Out, float>) {
        for (; a.stream && i + kLanes <= a.features; i += kLanes) Isa::stream(out + i, Isa::load(sums + i));
      }
      for (; i + 2 * kLanes <= a.features; i += 2 * kLanes) {
        Isa::store_two(out + i, Isa::load(sums + i), Isa::load(sums + i + kLanes));
      }
    }
    for (; i + kLanes <= a.features; i += kLanes) {
      typename Isa::Vec v = Isa::load(sums + i);
      if constexpr (kZero) v = Isa::keep(Isa::nonzero(Isa::load(keep + i)), v);
      Isa::store(out + i, v);
    }
    if (i < a.features) {
      const int left = static_cast<int>(a.features - i);
      typename Isa::Vec v = Isa::load_n(sums + i, left);
      if constexpr (kZero) v = Isa::keep(Isa::nonzero(Isa::load_n(keep + i, left)), v);
      Isa::store_n(out + i, v, left);
    }
  }
}

template <class Isa, class Keep, class Out>
void finish(const FinishArgs& args) {
  const FinishArgs a = args;
  a.keep != nullptr ? finish_rows<Isa, Keep, Out, true>(a) : finish_rows<Isa, Keep, Out, false>(a);
}

template <class Isa, class T>
void transpose(const void* src, ptrdiff_t src_pitch, float* dst, ptrdiff_t dst_pitch, int rows, int cols) {
  constexpr int kLanes = Isa::kLanes;
  for (int i = 0; i < rows; i += kLanes) {
    for (int j = 0; j < cols; j += kLanes) {
      const int width = cols - j < kLanes ? cols - j : kLanes;
      typename Isa::Vec r[kLanes];
      unroll<kLanes>([&](auto u) ST_LAMBDA {
        const T* row = static_cast<const T*>(src) + static_cast<ptrdiff_t>(i + u) * src_pitch + j;
        r[u] = i + u >= rows ? Isa::zero() : width == kLanes ? Isa::load(row) : Isa::load_n(row, width);
      });
      Isa::transpose(r);
      unroll<kLanes>([&](auto u) ST_LAMBDA {
        if (u < width) Isa::store(dst + (j + u) * dst_pitch + i, r[u]);
      });
    }
  }
}

template <class Isa>
void fma_burst(int64_t rounds) {
  // Different starts, which the compiler cannot see: equal sums would be computed once.
  float starts[kFmaBurst + 2];
  for (int i = 0; i < kFmaBurst; ++i) starts[i] = static_cast<float>(rounds % (i + 2));
  starts[kFmaBurst] = 0.999f;
  starts[kFmaBurst + 1] = 1e-3f;
  const float* start = starts;
  asm("" : "+r"(start) : : "memory");
  typename Isa::Vec sums[kFmaBurst];
  const typename Isa::Vec a = Isa::broadcast(start + kFmaBurst), b = Isa::broadcast(start + kFmaBurst + 1);
  unroll<kFmaBurst>([&](auto i) ST_LAMBDA { sums[i] = Isa::broadcast(start + i); });
  for (int64_t r = 0; r < rounds; ++r) {
    unroll<kFmaBurst>([&](auto i) ST_LAMBDA { sums[i] = Isa::fma(sums[i], a, b); });
  }
  typename Isa::Vec total = Isa::zero();
  unroll<kFmaBurst>([&](auto i) ST_LAMBDA { total = Isa::add(total, sums[i]); });
  volatile float sink = Isa::sum(total);
  (void)sink;
}

// A sweep needs its window, the filter vector and two broadcasts in registers.
// Seven vectors would save little over six or eight and cost compile time.
template <class Isa, int kTaps, int kVectors>
constexpr bool fits_registers() {
  return kVectors != 5 && kVectors != 7 && (kTaps + 1) * kVectors + (Isa::kRegisters == 32 ? 6 : 3) <= Isa::kRegisters;
}

template <class Isa, int kTaps, int kVectors>
constexpr void offer_sweep(DataKernels& table) {
  if constexpr (fits_registers<Isa, kTaps, kVectors>()) {
    table.sweep[kTaps][kVectors] = &Sweep<Isa, kTaps, kVectors>::run;
    if constexpr (kTaps == 1) table.point_sweep[kVectors] = &PointSweep<Isa, kVectors>::run;
    table.dense_sweep[kTaps][kVectors] = &DenseSweep<Isa, kTaps, kVectors>::run;
    table.dense_pixels[kTaps][kVectors] = dense_pixels<Isa, kTaps, kVectors>();
  }
  if constexpr (kVectors < kMaxVectors) {
    offer_sweep<Isa, kTaps, kVectors + 1>(table);
  } else if constexpr (kTaps < kMaxTaps) {
    offer_sweep<Isa, kTaps + 1, 1>(table);
  }
}

template <class Isa, class T>
constexpr void offer_data(DataKernels& table) {
  table.scan[kIndexOf<T>] = &scan<Isa, T>;
  table.widen[kIndexOf<T>] = &widen_values<Isa, T>;
  table.pack[kIndexOf<T>] = &pack_rows<Isa, T>;
  table.transpose[kIndexOf<T>] = &transpose<Isa, T>;
  table.finish[kIndexOf<T>][kIndexOf<T>] = &finish<Isa, T, T>;
  table.finish[kIndexOf<T>][kIndexOf<float>] = &finish<Isa, T, float>;
}

template <class Isa>
constexpr DataKernels data_kernels() {
  DataKernels table{};
  offer_sweep<Isa, 1, 1>(table);
  if constexpr (fits_registers<Isa, kTallTaps, kTallRows>()) {
    table.tall_sweep = &Sweep<Isa, kTallTaps, kTallRows, true>::run;
  }
  table.fma_burst = &fma_burst<Isa>;
  table.stream_fence = &Isa::stream_fence;
  offer_data<Isa, float>(table);
  offer_data<Isa, Bf16>(table);
  offer_data<Isa, F16>(table);
  return table;
}

}  // namespace
}  // namespace sparsetrain
