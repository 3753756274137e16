// Masked BWI: dlhs[pixel][c] = sum over taps and k of rhs[tap][c][k] * g[pixel + tap][k], where x[pixel][c] is
// non-zero.
//
// The sparsity is that of the result, so vectors run along k, and every active (pixel, channel) ends in one sum over
// lanes. Work goes by blocks of pixels:
//
//   lists    per channel, from the masks of x: where in g the active pixels find their first tap
//   copy     of g with its halo, for one step of features, into scratch that L1 about holds: [position][features]
//   product  per channel: its filter, all taps x features of the step, sits in registers; four entries of the list at a
//            time meet their windows of g with one multiply-add with a memory operand for each filter vector. The four
//            sums over lanes become one vector of four values, by a tree of shuffles
//   store    expands each channel's values by its mask, transposes, and writes whole lines: the zeros come for free
//
// Loads bound the product: one per multiply-add. Long lists keep the mispredicted ends of loops rare, and four
// independent sums hide the latency of the multiply-adds.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kernels.h"
#include "kernels_weights.h"
#include "simd.h"

namespace sparsetrain {
namespace {

template <class Isa, class T>
void masked_lists(const MaskedListArgs& args) {
  constexpr int kLanes = Isa::kLanes;
  for (int c = 0; c < args.channels + kLanes - 1; ++c) args.counts[c] = 0;
  // All channels of 64 pixels in turn: a pixel's lines follow each other.
  for (int w = 0; w < args.words; ++w) {
    const void* const* pixels = args.pixels + 64 * w;
    const auto at = [&](int i) ST_LAMBDA { return static_cast<const T*>(pixels[i]); };
    int slots = 64;
    while (pixels[slots - 1] == nullptr) --slots;
    for (int first = 0; first < args.channels; first += kLanes) {
      const int channels = args.channels - first < kLanes ? args.channels - first : kLanes;
      uint16_t of_slot[64] = {};
      if (channels == kLanes) {
        for (int i = 0; i < slots; ++i) of_slot[i] = static_cast<uint16_t>(Isa::nonzero(Isa::load(at(i) + first)));
      } else {
        for (int i = 0; i < slots; ++i) {
          of_slot[i] = static_cast<uint16_t>(Isa::nonzero(Isa::load_n(at(i) + first, channels)));
        }
      }
      uint64_t of_channel[kLanes];
      Isa::transpose_bits(of_slot, of_channel);
      for (int c = 0; c < kLanes; ++c) {
        args.masks[static_cast<ptrdiff_t>(first + c) * args.words + w] = of_channel[c];
        uint16_t* list = args.lists + static_cast<ptrdiff_t>(first + c) * args.capacity;
        int count = args.counts[first + c];
        count += list_word<Isa>(list + count, of_channel[c], args.positions + 64 * w);
        std::memset(list + count, 0, 4 * sizeof(uint16_t));
        args.counts[first + c] = static_cast<uint16_t>(count);
      }
    }
  }
}

template <class Isa, int kRows, int kColumns, int kVectors>
struct MaskedProduct {
  using Vec = typename Isa::Vec;
  static constexpr int kCount = kRows * kColumns * kVectors;
  static constexpr int kWidth = kVectors * Isa::kLanes;
  static constexpr int kTogether = 4;

  // Adds the products of kTogether entries to their sums.
  static ST_INLINE void windows(const float* g, const uint16_t* list, ptrdiff_t row, const Vec (&filter)[kCount],
                                Vec (&sums)[kTogether]) {
    const float* window[kTogether];
    unroll<kTogether>([&](auto e) ST_LAMBDA {
      window[e] = g + static_cast<size_t>(list[e]) * kWidth;
      ST_OPAQUE(window[e]);
    });
    unroll<kRows>([&](auto r) ST_LAMBDA {
      unroll<kColumns * kVectors>([&](auto i) ST_LAMBDA {
        unroll<kTogether>([&](auto e) ST_LAMBDA {
          sums[e] = Isa::fma(filter[r * kColumns * kVectors + i], Isa::load(window[e] + i * Isa::kLanes), sums[e]);
        });
      });
      if constexpr (r + 1 < kRows) {
        unroll<kTogether>([&](auto e) ST_LAMBDA {
          window[e] += row;
          ST_OPAQUE(window[e]);
        });
      }
    });
  }

  static void run(const MaskedProductArgs& args) {
    const float* g = args.g;
    const ptrdiff_t row = static_cast<ptrdiff_t>(args.tap_row) * kWidth;
    const ptrdiff_t filter_channel = args.filter_channel, filter_row = args.filter_row;
    const float* next = args.filter;
    Prefetcher next_g(args.next[0], args.channels), next_x(args.next[1], args.channels);
    for (int c = 0; c < args.channels; ++c) {
      next_g.turn();
      next_x.turn();
      const uint16_t* list = args.lists + static_cast<ptrdiff_t>(c) * args.capacity;
      float* values = args.values + static_cast<ptrdiff_t>(c) * args.capacity;
      Vec filter[kCount];
      const float *from = next, *ahead = next += filter_channel;
      unroll<kRows>([&](auto r) ST_LAMBDA {
        unroll<kColumns * kVectors>([&](auto i) ST_LAMBDA {
          filter[r * kColumns * kVectors + i] = Isa::load(from + i * Isa::kLanes);
          __builtin_prefetch(ahead + i * Isa::kLanes);
        });
        from += filter_row;
        ahead += filter_row;
      });
      for (int count = args.counts[c]; count > 0; count -= kTogether, list += kTogether, values += kTogether) {
        Vec sums[kTogether];
        unroll<kTogether>([&](auto e) ST_LAMBDA { sums[e] = Isa::zero(); });
        windows(g, list, row, filter, sums);
        Isa::add_sums(values, args.first, sums[0], sums[1], sums[2], sums[3]);
      }
    }
  }
};

// kLanes pixels from slot p on, of which `slots` exist, for as many channels from `first` on. kWhole: all exist.
template <class Isa, class T, bool kWhole>
ST_INLINE void masked_store_lanes(const MaskedStoreArgs& args, int p, int slots, int first, int channels) {
  constexpr int kLanes = Isa::kLanes;
  constexpr uint32_t kLaneBits = (1u << kLanes) - 1;
  const ptrdiff_t words = args.words, capacity = args.capacity;
  const uint64_t* masks = args.masks + first * words + p / 64;
  const float* values = args.values + first * capacity;
  uint16_t* taken = args.taken + first;
  const int shift = p % 64;
  typename Isa::Vec v[kLanes];
  unroll<kLanes>([&](auto c) ST_LAMBDA {
    const bool exists = kWhole || c < channels;
    const uint32_t mask = exists ? static_cast<uint32_t>(masks[c * words] >> shift) & kLaneBits : 0;
    v[c] = Isa::expand(mask, values + c * capacity + taken[c]);
    taken[c] = static_cast<uint16_t>(taken[c] + __builtin_popcount(mask));
  });
  Isa::transpose(v);
  void* const* pixels = args.pixels + p;
  if constexpr (std::is_same_v<T, float>) {
    if (args.stream) {  // where channels fill whole lanes
      unroll<kLanes>([&](auto i) ST_LAMBDA {
        if (kWhole || i < slots) Isa::stream(static_cast<T*>(pixels[i]) + first, v[i]);
      });
      return;
    }
  }
  unroll<kLanes>([&](auto i) ST_LAMBDA {
    if (!kWhole && i >= slots) return;
    T* pixel = static_cast<T*>(pixels[i]) + first;
    kWhole || channels == kLanes ? Isa::store(pixel, v[i]) : Isa::store_n(pixel, v[i], channels);
  });
}

// A few pixels, all their channels, at a time: their lines follow each other in dlhs.
template <class Isa, class T>
void masked_store(const MaskedStoreArgs& args) {
  constexpr int kLanes = Isa::kLanes;
  for (int c = 0; c < args.channels + kLanes - 1; ++c) args.taken[c] = 0;
  for (int p = 0; p < args.slots; p += kLanes) {
    const int slots = args.slots - p < kLanes ? args.slots - p : kLanes;
    for (int first = 0; first < args.channels; first += kLanes) {
      const int channels = args.channels - first < kLanes ? args.channels - first : kLanes;
      if (slots == kLanes && channels == kLanes) {
        masked_store_lanes<Isa, T, true>(args, p, slots, first, channels);
      } else {
        masked_store_lanes<Isa, T, false>(args, p, slots, first, channels);
      }
    }
  }
  if (args.stream) Isa::stream_fence();
}

// ---- points ----

template <class Isa, class T>
void point_lists(const PointListArgs& args) {
  constexpr int kLanes = Isa::kLanes;
  const int blocks = (args.channels + args.block - 1) / args.block;
  for (int b = 0; b < blocks; ++b) args.starts[b * (args.count + 1)] = 0;
  uint16_t* masks = args.masks;
  for (int p = 0; p < args.count; ++p) {
    const T* x = static_cast<const T*>(args.pixels[p]);
    uint16_t* list = args.lists;
    int* start = args.starts + p;
    for (int first = 0; first < args.channels; first += args.block) {
      const int channels = args.channels - first < args.block ? args.channels - first : args.block;
      int entry = *start;
      for (int c = 0; c < channels; c += kLanes) {
        const T* from = x + first + c;
        const typename Isa::Vec v = channels - c >= kLanes ? Isa::load(from) : Isa::load_n(from, channels - c);
        const uint32_t mask = Isa::nonzero(v);
        *masks++ = static_cast<uint16_t>(mask);
        Isa::compress_u16(list + entry, mask, Isa::load_u16(args.offsets + c));
        entry += __builtin_popcount(mask);
      }
      std::memset(list + entry, 0, 4 * sizeof(uint16_t));
      start[1] = (entry + 3) & ~3;
      start += args.count + 1;
      list += args.pitch;
    }
  }
}

template <class Isa, class T, int kVectors>
struct PointProduct {
  using Vec = typename Isa::Vec;
  static constexpr int kLanes = Isa::kLanes, kTogether = 4;

  static ST_INLINE void load(const T* from, int features, Vec (&g)[kVectors]) {
    if (features == kVectors * kLanes) {
      unroll<kVectors>([&](auto v) ST_LAMBDA { g[v] = Isa::load(from + v * kLanes); });
      return;
    }
    unroll<kVectors>([&](auto v) ST_LAMBDA {
      const int left = features - v * kLanes;
      g[v] = left >= kLanes ? Isa::load(from + v * kLanes)
             : left > 0     ? Isa::load_n(from + v * kLanes, left)
                            : Isa::zero();
    });
  }

  static void run(const PointProductArgs& args) {
    constexpr int kLines = (kVectors * kLanes * sizeof(T) + 63) / 64;
    const char* filter = reinterpret_cast<const char*>(args.filter);
    // Stores of values cannot change these.
    const void* const* pixels = args.g;
    const int* starts = args.starts;
    const uint16_t* lists = args.lists;
    float* all_values = args.values;
    const int64_t feature = args.feature;
    const int features = args.features, count = args.count;
    const bool first = args.first;
    for (int p = 0; p < count; ++p) {
      const char* ahead = reinterpret_cast<const char*>(static_cast<const T*>(pixels[p + kPointsAhead]) + feature);
      unroll<kLines>([&](auto line) ST_LAMBDA { __builtin_prefetch(ahead + 64 * line, 0, 3); });
      Vec g[kVectors];
      load(static_cast<const T*>(pixels[p]) + feature, features, g);
      // From the starts, not from where the point before ended: its end is mispredicted.
      const int begin = starts[p];
      const uint16_t* list = lists + begin;
      float* values = all_values + begin;
      for (int groups = (starts[p + 1] - begin) / kTogether; groups > 0; --groups) {
        Vec sums[kTogether];
        const float* row[kTogether];
        unroll<kTogether>([&](auto e) ST_LAMBDA {
          sums[e] = Isa::zero();
          row[e] = reinterpret_cast<const float*>(filter + 8 * static_cast<size_t>(list[e]));
          ST_OPAQUE(row[e]);
        });
        unroll<kVectors>([&](auto v) ST_LAMBDA {
          unroll<kTogether>([&](auto e)
                                ST_LAMBDA { sums[e] = Isa::fma(g[v], Isa::load(row[e] + v * kLanes), sums[e]); });
        });
        Isa::add_sums(values, first, sums[0], sums[1], sums[2], sums[3]);
        list += kTogether;
        values += kTogether;
      }
    }
  }
};

template <class Isa, class T>
void point_store(const PointStoreArgs& args) {
  constexpr int kLanes = Isa::kLanes;
  const uint16_t* masks = args.masks;
  for (int p = 0; p < args.count; ++p) {
    const float* values = args.values;
    const int* start = args.starts + p;
    for (int first = 0; first < args.channels; first += args.block) {
      const int channels = args.channels - first < args.block ? args.channels - first : args.block;
      const float* from = masks != nullptr ? values + *start : nullptr;
      T* to = static_cast<T*>(args.pixels[p]) + first;
      for (int c = 0; c < channels; c += kLanes) {
        typename Isa::Vec v = Isa::zero();
        if (masks != nullptr) {
          const uint32_t mask = *masks++;
          v = Isa::expand(mask, from);
          from += __builtin_popcount(mask);
        }
        if constexpr (std::is_same_v<T, float>) {
          if (args.stream && channels - c >= kLanes) {
            Isa::stream(to + c, v);
            continue;
          }
        }
        channels - c < kLanes ? Isa::store_n(to + c, v, channels - c) : Isa::store(to + c, v);
      }
      values += args.pitch;
      start += args.count + 1;
    }
  }
  if (args.stream) Isa::stream_fence();
}

template <class Isa, class T, int kVectors>
constexpr void offer_point_product(MaskedKernels& table) {
  if constexpr (point_offered(kVectors, Isa::kRegisters)) {
    table.point_product[kIndexOf<T>][kVectors] = PointProduct<Isa, T, kVectors>::run;
  }
  if constexpr (kVectors < kMaxPointVectors) offer_point_product<Isa, T, kVectors + 1>(table);
}

template <class Isa, int kRows, int kColumns, int kChoice>
constexpr void offer_product(MaskedKernels& table) {
  if constexpr (masked_offered(kRows, kColumns, 1 << kChoice, Isa::kRegisters)) {
    table.product[kRows][kColumns][kChoice] = MaskedProduct<Isa, kRows, kColumns, (1 << kChoice)>::run;
  }
  if constexpr (kChoice + 1 < kMaskedVectorChoices) {
    offer_product<Isa, kRows, kColumns, kChoice + 1>(table);
  } else if constexpr (kColumns < kMaskedTaps) {
    offer_product<Isa, kRows, kColumns + 1, 0>(table);
  } else if constexpr (kRows < kMaskedTaps) {
    offer_product<Isa, kRows + 1, 1, 0>(table);
  }
}

template <class Isa, class T>
constexpr void offer_masked(MaskedKernels& table) {
  table.lists[kIndexOf<T>] = masked_lists<Isa, T>;
  table.store[kIndexOf<T>] = masked_store<Isa, T>;
  table.point_lists[kIndexOf<T>] = point_lists<Isa, T>;
  offer_point_product<Isa, T, 1>(table);
  table.point_store[kIndexOf<T>] = point_store<Isa, T>;
}

template <class Isa>
constexpr MaskedKernels masked_kernels() {
  MaskedKernels table{};
  offer_product<Isa, 1, 1, 0>(table);
  offer_masked<Isa, float>(table);
  offer_masked<Isa, Bf16>(table);
  offer_masked<Isa, F16>(table);
  return table;
}

}  // namespace
}  // namespace sparsetrain
