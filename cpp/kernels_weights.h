// BWW: drhs[tap][c][k] = sum over pixels of lhs[pixel + tap][c] * g[pixel][k], skipping the zeros of one operand.
//
// The operand whose zeros are skipped is *checked*, the other is *dense*. Work goes by blocks of pixels:
//
//   pack   the block of the checked operand: transposed to one line of values per channel, and a bit mask of the
//          non-zeros of each line (a bit per *position*; positions between image rows are never set)
//   copy   the block of the dense operand with its halo, for one block of features, into scratch that stays in L1:
//          [position][features]. Rows follow each other at the pitch of the masks, so bit i of a mask meets tap (r, s)
//          at position i + r * tap_row + s, whatever the shape of the block. Not copied where it lies so already: 1x1
//          kernels whose features are one step
//   list   the positions of a channel's non-zeros, from its mask: a loop over a list ends once, one over a mask ends,
//          mispredicted, in every word. Walks of few multiply-adds a visit do without, unless they are packed
//   walk   per channel: the sums of all taps x features sit in registers; for every non-zero, a broadcast of its value
//          and one fused multiply-add with a memory operand per sum
//
// Loads bound the walk: one per multiply-add, plus one for the broadcast. Two things break the bound. *Neighbours*, two
// non-zeros of a channel at positions i and i + 1, meet the same dense vectors one column of taps apart: kColumns + 1
// loads for each row of taps serve 2 * kColumns multiply-adds, without a register for another sum. And channels walked
// *together*, two or three: where several are non-zero each load serves as many multiply-adds. These visits leave loads
// to spare and take turns with those that lack them.
//
// Where skipping does not pay, a *tile* of channels x features sits in registers instead and runs over all pixels, tap
// by tap. It reads the same scratch and leaves the same sums.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kernels.h"
#include "simd.h"

namespace sparsetrain {
namespace {

// ---- sums: from the panel to registers and back ----

// kVectors vectors for one channel and tap.
template <class Isa, int kVectors>
struct TapSums {
  using Vec = typename Isa::Vec;
  static constexpr int kWidth = kVectors * Isa::kLanes;

  static ST_INLINE void load(const WeightsPanel& panel, const float* sums, Vec* acc) {
    unroll<kVectors>([&](auto v) ST_LAMBDA { acc[v] = panel.first ? Isa::zero() : Isa::load(sums + v * Isa::kLanes); });
  }
  // `offset` is that of the place in panel.out, if there is one.
  static ST_INLINE void save(const WeightsPanel& panel, float* sums, ptrdiff_t offset, const Vec* acc) {
    float* to = panel.out == nullptr ? sums : panel.out + offset;
    if (panel.out == nullptr || panel.out_features == kWidth) {
      unroll<kVectors>([&](auto v) ST_LAMBDA { Isa::store(to + v * Isa::kLanes, acc[v]); });
      return;
    }
    unroll<kVectors>([&](auto v) ST_LAMBDA {
      const int left = panel.out_features - v * Isa::kLanes;
      if (left >= Isa::kLanes) {
        Isa::store(to + v * Isa::kLanes, acc[v]);
      } else if (left > 0) {
        Isa::store_n(to + v * Isa::kLanes, acc[v], left);
      }
    });
  }
};

// ---- prefetch ----

// Deals the lines of a WeightsPrefetch out over the turns of a loop.
class Prefetcher {
 public:
  ST_INLINE Prefetcher(const WeightsPrefetch& what, int64_t turns)
      : pixel_(what.pixels), end_(what.pixels + what.count), offset_(what.offset), lines_(what.lines) {
    quota_ = (what.count * what.lines + turns - 1) / turns;
  }
  ST_INLINE void turn() {
    for (int64_t i = 0; i < quota_ && pixel_ != end_; ++i) {
      __builtin_prefetch(static_cast<const char*>(*pixel_) + offset_ + 64 * line_, 0, 2);
      if (++line_ == lines_) {
        line_ = 0;
        ++pixel_;
      }
    }
  }

 private:
  const void* const* pixel_;
  const void* const* end_;
  int64_t offset_, lines_, quota_, line_ = 0;
};

// ---- walk ----

template <class Isa, int kRows, int kColumns, int kVectors>
struct Walk {
  using Vec = typename Isa::Vec;
  using Sums = TapSums<Isa, kVectors>;
  static constexpr int kTaps = kRows * kColumns;
  static constexpr int kCount = kTaps * kVectors;
  static constexpr int kWidth = kVectors * Isa::kLanes;

  static ST_INLINE void load(const WeightsPanel& panel, int64_t channel, Vec (&acc)[kCount]) {
    const float* sums = panel.sums + channel * panel.channel;
    const ptrdiff_t row = panel.row;
    unroll<kTaps>([&](auto t) ST_LAMBDA {
      Sums::load(panel, sums + t / kColumns * row + t % kColumns * kWidth, acc + t * kVectors);
    });
  }
  static ST_INLINE void save(const WeightsPanel& given, int64_t channel, const Vec (&acc)[kCount]) {
    const WeightsPanel panel = given;  // what is stored cannot change it
    float* sums = panel.sums + channel * panel.channel;
    const ptrdiff_t out = channel * panel.out_channel;
    unroll<kTaps>([&](auto t) ST_LAMBDA {
      Sums::save(panel, sums + t / kColumns * panel.row + t % kColumns * kWidth,
                 out + t / kColumns * panel.out_row + t % kColumns * panel.out_column, acc + t * kVectors);
    });
  }

  // Calls f(i, vector) with the dense vector of every sum i at the position that `dense` points to.
  template <bool kShared, class F>
  static ST_INLINE void each(const float* dense, ptrdiff_t row, F&& f) {
    ST_OPAQUE(dense);
    unroll<kRows>([&](auto r) ST_LAMBDA {
      unroll<kColumns * kVectors>([&](auto i) ST_LAMBDA {
        const float* from = dense + i * Isa::kLanes;
        f(Index<r * kColumns * kVectors + i>{}, kShared ? Isa::load_shared(from) : Isa::load(from));
      });
      if constexpr (r + 1 < kRows) {
        dense += row;
        ST_OPAQUE(dense);
      }
    });
  }

  static constexpr bool kLists = walk_lists(kTaps);

  // Adds the products of position i for the channels of a set; `value` is that of the first channel.
  template <int kSet, int kTogether>
  static ST_INLINE void visit(const WeightsWalkArgs& args, size_t i, const float* value, const float* dense,
                              Vec (&acc)[kTogether][kCount]) {
    Vec x[kTogether];
    unroll<kTogether>([&](auto j) ST_LAMBDA {
      if constexpr ((kSet >> j & 1) != 0) x[j] = Isa::broadcast(value + j * args.value_pitch);
    });
    constexpr bool kShared = (kSet & (kSet - 1)) != 0;
    each<kShared>(dense + i * kWidth, args.tap_row * kWidth, [&](auto t, Vec y) ST_LAMBDA {
      unroll<kTogether>([&](auto j) ST_LAMBDA {
        if constexpr ((kSet >> j & 1) == 0) return;
        if constexpr (kShared) {
          Isa::fma_shared(x[j], y, acc[j][t]);
        } else {
          acc[j][t] = Isa::fma(x[j], y, acc[j][t]);
        }
      });
    });
  }

  static ST_INLINE void visit_packed(const WeightsWalkArgs& args, size_t i, Vec value, Vec (&acc)[kCount]) {
    each<false>(args.dense + i * kWidth, args.tap_row * kWidth,
                [&](auto t, Vec y) ST_LAMBDA { acc[t] = Isa::fma(value, y, acc[t]); });
  }

  // Adds the products of positions i and i + 1.
  static ST_INLINE void visit_neighbours(const WeightsWalkArgs& args, size_t i, const float* value,
                                         Vec (&acc)[kCount]) {
    constexpr int kRow = kColumns * kVectors;
    const Vec first = Isa::broadcast(value), second = Isa::broadcast(value + 1);
    const float* dense = args.dense + i * kWidth;
    unroll<kRows>([&](auto r) ST_LAMBDA {
      ST_OPAQUE(dense);
      unroll<kRow + kVectors>([&](auto j) ST_LAMBDA {
        const Vec y = Isa::load_shared(dense + j * Isa::kLanes);
        if constexpr (j < kRow) Isa::fma_shared(first, y, acc[r * kRow + j]);
        if constexpr (j >= kVectors) Isa::fma_shared(second, y, acc[r * kRow + j - kVectors]);
      });
      dense += args.tap_row * kWidth;
    });
  }

  // ---- one loop for each way to walk ----

  static ST_INLINE void prefetch_sums(const WeightsPanel& panel, int64_t channel) {
    const float* sums = panel.sums + channel * panel.channel;
    unroll<kRows>([&](auto r) ST_LAMBDA {
      unroll<kColumns * kVectors>([&](auto i)
                                      ST_LAMBDA { __builtin_prefetch(sums + r * panel.row + i * Isa::kLanes, 0, 2); });
    });
  }

  // Calls add(c, values of channel c, list, counts, sums) for every kTogether channels; lists are those of kListed
  // channels, with kCounts counts.
  template <int kTogether, int kListed, int kCounts, class F>
  static ST_INLINE void for_channels(const WeightsWalkArgs& args, F&& add) {
    const int64_t turns = (args.channels + kTogether - 1) / kTogether;
    Prefetcher next_dense(args.next[0], turns), next_checked(args.next[1], turns);
    for (int c = 0; c < args.channels; c += kTogether) {
      next_dense.turn();
      next_checked.turn();
      if constexpr (kTaps >= 9) {  // many lines at once, maybe from beyond L2
        for (int j = 0; j < kTogether; ++j) prefetch_sums(args.panel, c + kTogether + j);
      }
      Vec acc[kTogether][kCount];
      unroll<kTogether>([&](auto j) ST_LAMBDA { load(args.panel, c + j, acc[j]); });
      add(c, args.values + c * args.value_pitch, args.lists + c / kListed * args.list_pitch,
          args.counts + c / kListed * kCounts, acc);
      unroll<kTogether>([&](auto j) ST_LAMBDA {
        if (c + j < args.channels) save(args.panel, c + j, acc[j]);
      });
    }
  }

  // Values that are packed.
  template <class V>
  static ST_NOINLINE void run_packed(const WeightsWalkArgs& args) {
    for_channels<1, 1, 1>(args, [&](int, const float* values, const uint16_t* list, const uint16_t* counts,
                                    Vec(&acc)[1][kCount]) ST_LAMBDA {
      V packed(values);
      take_turns(visits(list, counts[0], [&](size_t i) ST_LAMBDA { visit_packed(args, i, packed.take(), acc[0]); }));
    });
  }
  template <class V>
  static ST_NOINLINE void run_neighbours(const WeightsWalkArgs& args) {
    for_channels<1, 1, 2>(args, [&](int, const float* values, const uint16_t* list, const uint16_t* counts,
                                    Vec(&acc)[1][kCount]) ST_LAMBDA {
      V others(values + args.other_values);
      const auto two = [&](size_t i) ST_LAMBDA {
        visit_neighbours(args, i, values, acc[0]);
        values += 2;
      };
      const auto one = [&](size_t i) ST_LAMBDA { visit_packed(args, i, others.take(), acc[0]); };
      take_turns(visits(list, counts[0], two), visits(list + args.other_list, counts[1], one));
    });
  }
  template <class V>
  static ST_INLINE void run_values(const WeightsWalkArgs& args) {
    if constexpr (kLists) {
      if (args.kind == WeightsLists::kNeighbours) return run_neighbours<V>(args);
    }
    run_packed<V>(args);
  }

  // Values in place, the positions of one channel.
  static ST_INLINE void walk_one(const WeightsWalkArgs& args, int c, const float* values, const uint16_t* list,
                                 int count, Vec (&acc)[1][kCount]) {
    const float* dense = args.dense;
    const auto at = [&](size_t i) ST_LAMBDA { visit<1>(args, i, values + i, dense, acc); };
    if constexpr (kLists) {
      take_turns(visits(list, count, at));
    } else {
      const uint64_t* masks = args.masks + c * args.words;
      for (int w = 0; w < args.words; ++w, values += 64, dense += 64 * kWidth) take_turns(visits(masks[w], at));
    }
  }
  static ST_NOINLINE void run_ones(const WeightsWalkArgs& args) {
    for_channels<1, 1, 1>(args, [&](int c, const float* values, const uint16_t* list, const uint16_t* counts, auto& acc)
                                    ST_LAMBDA { walk_one(args, c, values, list, counts[0], acc); });
  }
  // Of channels in twos, but one after the other: each with a list that two of theirs make.
  static ST_NOINLINE void run_apart(const WeightsWalkArgs& args) {
    for_channels<1, 2, 3>(
        args, [&](int c, const float* values, const uint16_t* list, const uint16_t* counts, auto& acc) ST_LAMBDA {
          const bool second = c % 2 != 0;
          walk_one(args, c, values, second ? list + counts[0] : list, counts[second] + counts[1 + second], acc);
        });
  }
  static ST_NOINLINE void run_twos(const WeightsWalkArgs& args) {
    for_channels<2, 2, 3>(
        args, [&](int c, const float* values, const uint16_t* list, const uint16_t* counts, auto& acc) ST_LAMBDA {
          const float* dense = args.dense;
          const auto at = [&](auto set) {
            return [&](size_t i) ST_LAMBDA { visit<set>(args, i, values + i, dense, acc); };
          };
          if constexpr (kLists) {
            const uint16_t *ab = list + counts[0], *b = ab + counts[1];
            take_turns(visits(list, counts[0], at(Index<1>{})), visits(ab, counts[1], at(Index<3>{})),
                       visits(b, counts[2], at(Index<2>{})));
          } else {
            const uint64_t *masks_a = args.masks + c * args.words, *masks_b = masks_a + args.words;
            for (int w = 0; w < args.words; ++w, values += 64, dense += 64 * kWidth) {
              const uint64_t a = masks_a[w], b = masks_b[w];
              take_turns(visits(a & ~b, at(Index<1>{})), visits(a & b, at(Index<3>{})), visits(b & ~a, at(Index<2>{})));
            }
          }
        });
  }
  static ST_NOINLINE void run_threes(const WeightsWalkArgs& args) {
    for_channels<3, 3, 7>(
        args, [&](int, const float* values, const uint16_t* list, const uint16_t* counts, auto& acc) ST_LAMBDA {
          const auto next = [&](auto index) ST_LAMBDA {
            const uint16_t* begin = list;
            list += counts[index];
            return visits(begin, counts[index],
                          [&](size_t i) ST_LAMBDA { visit<list_set(index)>(args, i, values + i, args.dense, acc); });
          };
          const auto a = next(Index<0>{}), ab = next(Index<1>{}), b = next(Index<2>{}), bc = next(Index<3>{});
          const auto abc = next(Index<4>{}), ac = next(Index<5>{}), c = next(Index<6>{});
          take_turns(a, bc);
          take_turns(b, ac);
          take_turns(c, ab);
          take_turns(abc);
        });
  }

  static void run(const WeightsWalkArgs& args) {
    if (args.kind == WeightsLists::kPacked || args.kind == WeightsLists::kNeighbours) {
      if constexpr (Isa::kTakes) {
        if (args.take) return run_values<TakenValues<Isa>>(args);
      }
      return run_values<Values<Isa>>(args);
    }
    if (args.together == 1) return run_ones(args);
    if constexpr (kLists && walk_together(3, kCount, Isa::kRegisters)) {
      if (args.together == 3) return run_threes(args);
    }
    if constexpr (walk_together(2, kCount, Isa::kRegisters)) {
      run_twos(args);
    } else {
      run_apart(args);
    }
  }
};

// ---- tile ----

// Channels of a tile with kVectors vectors: the sums leave room for the dense vectors and one value.
template <class Isa, int kVectors>
constexpr int tile_channels() {
  return (Isa::kRegisters == 32 ? 24 : 12) / kVectors;
}

template <class Isa, int kVectors>
struct Tile {
  using Vec = typename Isa::Vec;
  using Sums = TapSums<Isa, kVectors>;
  static constexpr int kChannels = tile_channels<Isa, kVectors>();
  static constexpr int kWidth = kVectors * Isa::kLanes;

  // Of `count` rows or columns, those in [begin, end).
  struct Met {
    int begin, end;
    ST_INLINE Met(int from, int to, int count) : begin(from > 0 ? from : 0), end(to < count ? to : count) {}
  };

  static ST_INLINE void pixels(const WeightsTileArgs& args, int r, int s, const float* values,
                               Vec (&acc)[kChannels * kVectors]) {
    const Met rows(args.row_begin - r, args.row_end - r, args.rows);
    const Met columns(args.column_begin - s, args.column_end - s, args.columns);
    const float* dense = args.dense + (r * args.tap_row + s + columns.begin) * kWidth;
    values += columns.begin * kChannels;
    for (int image = 0; image < args.images; ++image) {
      for (int row = rows.begin; row < rows.end; ++row) {
        const float* y = dense + (image * args.image_pitch + row * args.pitch) * kWidth;
        const float* x = values + static_cast<ptrdiff_t>(image * args.rows + row) * args.columns * kChannels;
        for (int left = columns.end - columns.begin; left > 0; --left, y += kWidth, x += kChannels) {
          Vec vectors[kVectors];
          unroll<kVectors>([&](auto v) ST_LAMBDA { vectors[v] = Isa::load(y + v * Isa::kLanes); });
          unroll<kChannels>([&](auto c) ST_LAMBDA {
            const Vec value = Isa::broadcast(x + c);
            unroll<kVectors>(
                [&](auto v) ST_LAMBDA { acc[c * kVectors + v] = Isa::fma(value, vectors[v], acc[c * kVectors + v]); });
          });
        }
      }
    }
  }

  static void run(const WeightsTileArgs& args) {
    const WeightsPanel& panel = args.panel;
    const int taps = args.tap_rows * args.tap_columns;
    const float* values = args.values;
    const int64_t turns = static_cast<int64_t>((args.channels + kChannels - 1) / kChannels) * taps;
    Prefetcher next_dense(args.next[0], turns), next_checked(args.next[1], turns);
    for (int first = 0; first < args.channels; first += kChannels, values += args.group_pitch) {
      const int channels = args.channels - first < kChannels ? args.channels - first : kChannels;
      for (int t = 0; t < taps; ++t) {
        next_dense.turn();
        next_checked.turn();
        const int r = t / args.tap_columns, s = t % args.tap_columns;
        float* sums = panel.sums + (static_cast<int64_t>(first) * taps + t) * kWidth;
        const ptrdiff_t out = first * panel.out_channel + r * panel.out_row + s * panel.out_column;
        Vec acc[kChannels * kVectors];
        unroll<kChannels>([&](auto c) ST_LAMBDA { Sums::load(panel, sums + c * taps * kWidth, acc + c * kVectors); });
        pixels(args, r, s, values, acc);
        unroll<kChannels>([&](auto c) ST_LAMBDA {
          if (c < channels)
            Sums::save(panel, sums + c * taps * kWidth, out + c * panel.out_channel, acc + c * kVectors);
        });
      }
    }
  }

  template <class T>
  static void group(const WeightsGroupArgs& args) {
    for (int64_t i = 0; i < args.count; ++i) {
      const T* from = static_cast<const T*>(args.pixels[i]);
      float* to = args.values + i * kChannels;
      for (int first = 0; first < args.channels; first += kChannels, to += args.group_pitch) {
        // Whole vectors may run into the next pixel, which is written after this one.
        for (int c = 0; c < kChannels; c += Isa::kLanes) {
          const int left = args.channels - first - c;
          const typename Isa::Vec v = left >= Isa::kLanes ? Isa::load(from + first + c)
                                      : left > 0          ? Isa::load_n(from + first + c, left)
                                                          : Isa::zero();
          Isa::store(to + c, v);
        }
      }
    }
  }
};

// ---- moving data ----

template <class Isa, class T>
int64_t weights_count_nonzero(const void* from, int64_t count) {
  const T* values = static_cast<const T*>(from);
  int64_t nonzeros = 0, i = 0;
  for (; i + Isa::kLanes <= count; i += Isa::kLanes)
    nonzeros += __builtin_popcount(Isa::nonzero(Isa::load(values + i)));
  if (i < count) {
    nonzeros += __builtin_popcount(Isa::nonzero(Isa::load_n(values + i, static_cast<int>(count - i))));
  }
  return nonzeros;
}

// The loads and the transposition of kLanes positions of kLanes channels, of which `channels` exist. kParts: each
// position's line may be read several times.
template <class Isa, class T, bool kParts>
ST_INLINE void load_transposed(const void* const* pixels, int first, int channels,
                               typename Isa::Vec (&v)[Isa::kLanes]) {
  if constexpr (kParts && Isa::kLoadsColumns && std::is_same_v<T, float>) {
    if (channels == Isa::kLanes) return Isa::load_columns(pixels, static_cast<size_t>(first), v);
  }
  unroll<Isa::kLanes>([&](auto i) ST_LAMBDA {
    const T* from = static_cast<const T*>(pixels[i]) + first;
    v[i] = channels == Isa::kLanes ? Isa::load(from) : Isa::load_n(from, channels);
  });
  Isa::transpose(v);
}

template <class Isa, class T>
struct Pack {
  using Vec = typename Isa::Vec;
  static constexpr int kLanes = Isa::kLanes;

  // 64 positions of kLanes channels, of which `channels` exist.
  static ST_INLINE int64_t word(const void* const* pixels, int64_t first, int channels, float* values,
                                ptrdiff_t value_pitch, uint64_t* masks, ptrdiff_t mask_pitch) {
    uint64_t mask[kLanes];
    unroll<kLanes>([&](auto c) ST_LAMBDA { mask[c] = 0; });
    for (int p = 0; p < 64; p += kLanes) {
      Vec v[kLanes];
      load_transposed<Isa, T, false>(pixels + p, first, channels, v);
      unroll<kLanes>([&](auto c) ST_LAMBDA {
        Isa::store(values + c * value_pitch + p, v[c]);
        mask[c] |= static_cast<uint64_t>(Isa::nonzero(v[c])) << p;
      });
    }
    int64_t nonzeros = 0;
    for (int c = 0; c < channels; ++c) {
      masks[c * mask_pitch] = mask[c];
      nonzeros += __builtin_popcountll(mask[c]);
    }
    return nonzeros;
  }

  static int64_t run(const WeightsPackArgs& args) {
    const int words = args.positions / 64;
    int64_t nonzeros = 0;
    // All channels of 64 positions in turn: a pixel's lines follow each other.
    for (int w = 0; w < words; ++w) {
      for (int c = 0; c < args.channels; c += kLanes) {
        const int channels = args.channels - c < kLanes ? args.channels - c : kLanes;
        nonzeros += word(args.pixels + 64 * w, c, channels, args.values + c * args.value_pitch + 64 * w,
                         args.value_pitch, args.masks + static_cast<int64_t>(c) * words + w, words);
      }
    }
    return nonzeros;
  }
};

// Of kLanes pixels, those whose successor among them is at the next position.
template <class Isa>
ST_INLINE uint32_t followed(const uint16_t* positions) {
  uint32_t followed = 0;
  unroll<Isa::kLanes - 1>(
      [&](auto i) ST_LAMBDA { followed |= static_cast<uint32_t>(positions[i] + 1 == positions[i + 1]) << i; });
  return followed;
}

// Of every run of set bits, which end before the last bit, the first, third, fifth and so on.
ST_INLINE uint32_t every_second(uint32_t bits) {
  constexpr uint32_t kEven = 0x55555555;
  const uint32_t starts = bits & ~(bits << 1);
  const uint32_t even = bits & ~(bits + (starts & kEven));  // runs that start at an even bit: the sum carries over them
  return (even & kEven) | (bits & ~even & ~kEven);
}

enum class Entries { kPlain, kNeighbours, kMasks };

// The lists of kLanes channels from `first` on. kNear: L1 holds the lines of twice kLanes pixels; if not, the next
// lines of all pixels go to L2 meanwhile.
template <class Isa, class T, bool kNear, Entries kEntries>
ST_NOINLINE int64_t pack_list_lanes(const WeightsPackListsArgs& args, int first) {
  static_assert(kPackPixels % Isa::kLanes == 0);
  constexpr int kLanes = Isa::kLanes, kLine = 64 / sizeof(T);
  constexpr bool kNeighbours = kEntries == Entries::kNeighbours;
  const int channels = args.channels - first < kLanes ? args.channels - first : kLanes;
  float* values = args.values + first * args.value_pitch;
  uint16_t* lists = args.lists + first * args.list_pitch;
  int counts[kLanes] = {}, neighbours[kLanes] = {};  // of packed values
  for (int p = 0; p < args.count; p += kLanes) {
    typename Isa::Vec v[kLanes];
    if constexpr (kNear) {
      const int next = p + kLanes < args.count ? p + kLanes : p;
      unroll<kLanes>([&](auto i)
                         ST_LAMBDA { __builtin_prefetch(static_cast<const T*>(args.pixels[next + i]) + first, 0, 3); });
    } else if (first + kLine < args.channels) {
      unroll<kLanes>([&](auto i) ST_LAMBDA {
        __builtin_prefetch(static_cast<const T*>(args.pixels[p + i]) + first + kLine, 0, 2);
      });
    }
    load_transposed<Isa, T, kNear>(args.pixels + p, first, channels, v);
    const typename Isa::U16 positions = Isa::load_u16(args.positions + p);
    const uint32_t next = kNeighbours ? followed<Isa>(args.positions + p) : 0;
    unroll<kLanes>([&](auto c) ST_LAMBDA {
      if (c >= channels) return;
      uint32_t mask = Isa::nonzero(v[c]);
      if constexpr (kEntries == Entries::kMasks) {
        static_assert(kLanes == 16);
        const uint16_t bits = static_cast<uint16_t>(mask);
        std::memcpy(reinterpret_cast<char*>(args.masks + static_cast<ptrdiff_t>(first + c) * args.words) + p / 8, &bits,
                    2);
      }
      float* value = values + c * args.value_pitch;
      uint16_t* list = lists + c * args.list_pitch;
      if constexpr (kNeighbours) {
        const uint32_t firsts = every_second(mask & mask >> 1 & next), both = firsts | firsts << 1;
        Isa::compress(value + neighbours[c], both, v[c]);
        Isa::compress_u16(list + neighbours[c] / 2, firsts, positions);
        neighbours[c] += 2 * __builtin_popcount(firsts);
        mask &= ~both;
        value += args.other_values;
        list += args.other_list;
      }
      Isa::compress(value + counts[c], mask, v[c]);
      Isa::compress_u16(list + counts[c], mask, positions);
      counts[c] += __builtin_popcount(mask);
    });
  }
  int64_t nonzeros = 0;
  uint16_t* count = args.counts + (kNeighbours ? 2 : 1) * first;
  for (int c = 0; c < channels; ++c) {
    if (kNeighbours) *count++ = static_cast<uint16_t>(neighbours[c] / 2);
    *count++ = static_cast<uint16_t>(counts[c]);
    nonzeros += neighbours[c] + counts[c];
  }
  return nonzeros;
}

template <class Isa, class T, Entries kEntries>
int64_t pack_lists_as(const WeightsPackListsArgs& args) {
  const auto pack = args.apart ? pack_list_lanes<Isa, T, true, kEntries> : pack_list_lanes<Isa, T, false, kEntries>;
  int64_t nonzeros = 0;
  for (int first = 0; first < args.channels; first += Isa::kLanes) nonzeros += pack(args, first);
  return nonzeros;
}

template <class Isa, class T>
int64_t weights_pack_lists(const WeightsPackListsArgs& args) {
  if constexpr (Isa::kLanes == 16) {
    if (args.masks != nullptr) return pack_lists_as<Isa, T, Entries::kMasks>(args);
  }
  return args.neighbours ? pack_lists_as<Isa, T, Entries::kNeighbours>(args)
                         : pack_lists_as<Isa, T, Entries::kPlain>(args);
}

template <class Isa, int kTogether>
void weights_list(const WeightsListArgs& args) {
  static_assert(Isa::kListLanes <= kListPad);
  const uint64_t* masks = args.masks;
  uint16_t *lists = args.lists, *counts = args.counts;
  for (int c = 0; c < args.channels; c += kTogether, masks += kTogether * args.words, lists += args.list_pitch) {
    uint16_t* list = lists;
    unroll<(1 << kTogether) - 1>([&](auto index) ST_LAMBDA {
      const uint16_t* begin = list;
      for (int w = 0; w < args.words; ++w) {
        uint64_t mask = ~uint64_t{0};
        unroll<kTogether>([&](auto j) ST_LAMBDA {
          mask &= (list_set(index) >> j & 1) != 0 ? masks[j * args.words + w] : ~masks[j * args.words + w];
        });
        list += list_word<Isa>(list, mask, args.positions + 64 * w);
      }
      *counts++ = static_cast<uint16_t>(list - begin);
    });
  }
}

template <class Isa>
void weights_list_together(const WeightsListArgs& args) {
  if (args.together == 1) return weights_list<Isa, 1>(args);
  if (args.together == 2) return weights_list<Isa, 2>(args);
  weights_list<Isa, 3>(args);
}

template <class Isa, class T>
void weights_copy(const WeightsCopyArgs& args) {
  constexpr int kLanes = Isa::kLanes;
  float* to = args.to;
  for (int64_t i = 0; i < args.positions; ++i, to += args.width) {
    const T* from = static_cast<const T*>(args.pixels[i]) + args.feature;
    int f = 0;
    for (; f + kLanes <= args.features; f += kLanes) Isa::store(to + f, Isa::load(from + f));
    if (f < args.features) {
      Isa::store(to + f, Isa::load_n(from + f, args.features - f));
      f += kLanes;
    }
    for (; f < args.width; f += kLanes) Isa::store(to + f, Isa::zero());
  }
}

template <class Isa>
void weights_add(const WeightsAddArgs& args) {
  for (int64_t i = 0; i < args.count; i += Isa::kLanes) {
    float* sums = args.sums + i;
    typename Isa::Vec sum = Isa::load(sums);
    for (int64_t part = 1; part < args.parts; ++part) sum = Isa::add(sum, Isa::load(sums + part * args.pitch));
    Isa::store(sums, sum);
  }
}

template <class Isa, class T>
void weights_transpose(const WeightsTransposeArgs& args) {
  constexpr int kLanes = Isa::kLanes;
  for (int c = 0; c < args.channels; c += kLanes) {
    const int channels = args.channels - c < kLanes ? args.channels - c : kLanes;
    for (int f = 0; f < args.features; f += kLanes) {
      const int features = args.features - f < kLanes ? args.features - f : kLanes;
      typename Isa::Vec v[kLanes];
      unroll<kLanes>([&](auto i) ST_LAMBDA {
        v[i] = i < channels ? Isa::load(args.sums + (c + i) * args.channel_pitch + f) : Isa::zero();
      });
      Isa::transpose(v);
      T* out = static_cast<T*>(args.out) + f * args.out_pitch + c;
      unroll<kLanes>([&](auto i) ST_LAMBDA {
        if (i < features) Isa::store_n(out + i * args.out_pitch, v[i], channels);
      });
    }
  }
}

// ---- the table ----

template <class Isa, int kRows, int kColumns, int kChoice>
constexpr void offer_walk(WeightsKernels& table) {
  if constexpr (walk_offered(kRows, kColumns, 1 << kChoice, Isa::kRegisters)) {
    table.walk[kRows][kColumns][kChoice] = Walk<Isa, kRows, kColumns, (1 << kChoice)>::run;
  }
  if constexpr (kChoice + 1 < kVectorChoices) {
    offer_walk<Isa, kRows, kColumns, kChoice + 1>(table);
  } else if constexpr (kColumns < kMaxTapColumns) {
    offer_walk<Isa, kRows, kColumns + 1, 0>(table);
  } else if constexpr (kRows < kMaxTapRows) {
    offer_walk<Isa, kRows + 1, 1, 0>(table);
  }
}

template <class Isa, int kChoice>
constexpr void offer_tile(WeightsKernels& table) {
  table.group[kIndexOf<float>][kChoice] = Tile<Isa, (1 << kChoice)>::template group<float>;
  table.group[kIndexOf<Bf16>][kChoice] = Tile<Isa, (1 << kChoice)>::template group<Bf16>;
  table.group[kIndexOf<F16>][kChoice] = Tile<Isa, (1 << kChoice)>::template group<F16>;
  table.tile[kChoice] = Tile<Isa, (1 << kChoice)>::run;
  table.tile_channels[kChoice] = tile_channels<Isa, (1 << kChoice)>();
}

template <class Isa, class T>
constexpr void offer_moves(WeightsKernels& table) {
  table.count_nonzero[kIndexOf<T>] = weights_count_nonzero<Isa, T>;
  table.pack[kIndexOf<T>] = Pack<Isa, T>::run;
  table.pack_lists[kIndexOf<T>] = weights_pack_lists<Isa, T>;
  table.copy[kIndexOf<T>] = weights_copy<Isa, T>;
  table.transpose[kIndexOf<T>] = weights_transpose<Isa, T>;
}

template <class Isa>
constexpr WeightsKernels weights_kernels() {
  WeightsKernels table{};
  offer_moves<Isa, float>(table);
  offer_moves<Isa, Bf16>(table);
  offer_moves<Isa, F16>(table);
  table.list = weights_list_together<Isa>;
  table.add = weights_add<Isa>;
  offer_walk<Isa, 1, 1, 0>(table);
  offer_tile<Isa, 0>(table);
  offer_tile<Isa, 1>(table);
  offer_tile<Isa, 2>(table);
  return table;
}

}  // namespace
}  // namespace sparsetrain
