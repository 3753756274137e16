#include "plan_weights.h"

#include <algorithm>

#include "kernels.h"
#include "parallel.h"

namespace sparsetrain {
namespace {

// Times taps; below: channels that share loads gain less than the ends of loops cost. Single channels have their values
// packed, which is worth more where one load a cycle leaves less to wait behind and taps are many.
constexpr double kPairDensity = 0.25, kPairDensitySingleFma = 1.75;
constexpr double kPairDensityFewTaps = 0.2;  // of two to eight taps, not times these
constexpr double kThreesDensity = 0.35;      // above: three channels instead of two, whose lists end seven times
// Between these neighbours share loads, where taps and features pay for their packing; above, too, where there is no
// room for three channels; and down to the least density where taps or features are many (one multiply-add a cycle).
constexpr double kNeighbourDensity = 0.4, kNeighbourDensitySingleFma = 0.13, kMostNeighbourDensity = 0.45;
constexpr double kLeastNeighbourDensity = 0.095;
constexpr int kNeighbourTaps = 9, kManyTaps = 16;
constexpr int64_t kNeighbourTapVectors = 48, kManyTapVectors = 160;
constexpr double kFew = 0.15;           // below: non-zeros are far apart in all that they meet
constexpr double kHalf = 0.5;           // up to here lists gain more by length than by a dense block well within L1
constexpr double kWideBoth = 0.35;      // below: one tap of both gradients meets pixels from L2 as well
constexpr int64_t kFoldChannels = 8;    // up to here, channels are folded with the columns of the kernel
constexpr int64_t kChunkPixels = 1024;  // of a class, per chunk, for its sums to be a small part of the work

// Costs in multiply-adds of a vector between registers.
struct Costs {
  double pack;              // transposing a vector of the checked operand, finding its zeros
  double group;             // copying a pixel's channels of one tile
  double copy;              // copying a vector of the dense operand
  double end;               // a mask word's mispredicted end, partly hidden
  double walk, mask_walk;   // a multiply-add of a walk of lists, of masks: broadcast and load come with it; at least
  double visit_fma, visit;  // where a visit is a few of them: each, and the visit
  double tile;              // a multiply-add of a tile
  double element;           // of the checked operand: ends of lists, as far as they are not where expected
  // Of a walk of both gradients: a multiply-add; a sum over lanes; a channel in a block and step; a vector of a kernel
  // that does not stay in L2; packing with masks a vector of lhs, expanding, transposing and writing its gradient.
  double walk_both, reduce, channel, filter, both;
};

Costs costs_of(const PlanMachine& machine) {
  if (machine.single_fma())
    return {
        .pack = 4,
        .group = 2,
        .copy = 3,
        .end = 6,
        .walk = 1.16,
        .mask_walk = 1.18,
        .visit_fma = 0.95,
        .visit = 1,
        .tile = 1.1,
        .element = 1,
        .walk_both = 0.92,
        .reduce = 4.5,
        .channel = 10,
        .filter = 12,
        .both = 10,
    };
  // Sixteen registers hold too few sums for channels to share loads.
  const double walk = machine.lanes == 8 ? 1.4 : 1.2;
  return {
      .pack = 8,
      .group = 4,
      .copy = 5,
      .end = 12,
      .walk = walk,
      .mask_walk = walk,
      .visit_fma = 0.86,
      .visit = 3.1,
      .tile = 1.12,
      .element = 0,
      .walk_both = 1.1,
      .reduce = 5,
      .channel = 20,
      .filter = 20,
      .both = 16,
  };
}

// A class along one axis: its checked pixels, and its taps (several runs when they meet different sub-images).
struct CheckedAxis {
  PixelAxis pixels;
  std::vector<TapAxis> taps;
};

std::vector<CheckedAxis> lhs_checked_axis(int64_t size, int64_t out_size, int64_t kernel, int64_t stride, int64_t pad) {
  std::vector<CheckedAxis> classes;
  for (const AxisClass& axis : split_axis(size, out_size, kernel, stride, pad)) {
    if (axis.taps.taps > 0) classes.push_back({axis.pixels, {axis.taps}});
  }
  return classes;
}

std::vector<CheckedAxis> g_checked_axis(int64_t size, int64_t out_size, int64_t kernel, int64_t stride, int64_t pad) {
  CheckedAxis all = {{0, 1, out_size}, {}};
  for (int64_t tap = 0; tap < std::min(stride, kernel); ++tap) {
    const int64_t offset = floor_div(tap - pad, stride), start = tap - pad - offset * stride;
    all.taps.push_back({tap, stride, static_cast<int>(ceil_div(kernel - tap, stride)), start, stride,
                        strided_count(size, start, stride), offset});
  }
  return {all};
}

// Whether such walks exist, of both gradients or of BWW alone.
bool offered(bool both, int rows, int columns, int vectors, const PlanMachine& machine) {
  return both ? both_offered(rows, columns, vectors, machine.registers)
              : walk_offered(rows, columns, vectors, machine.registers);
}

// The widest step for rows x columns taps: wide steps walk the masks less often, but pairs need twice the registers.
int widest_step(bool both, int rows, int columns, int64_t features, const PlanMachine& machine) {
  int widest = 1, paired = 0;
  for (int v = 1; v <= 8; v *= 2) {
    if (v > 1 && (v / 2) * machine.lanes >= features) break;
    if (!offered(both, rows, columns, v, machine)) continue;
    widest = v;
    if (!both && walk_together(2, rows * columns * v, machine.registers)) paired = v;
  }
  return paired * rows * columns >= 6 ? paired : widest;
}

void add_group(const TapAxis& rows, const TapAxis& columns, int vectors, std::vector<TapGroup>& groups) {
  const TapPlace place = {static_cast<int>(groups.size()), rows.taps * columns.taps, columns.taps, 0};
  groups.push_back({rows, columns, vectors, place});
}

void add_groups(const TapAxis& rows, const TapAxis& columns, bool sparse, bool both, double density, int64_t features,
                const PlanMachine& machine, std::vector<TapGroup>& groups) {
  const int lanes = machine.lanes;
  if (!sparse) {  // tiles take any taps
    const int vectors = features > 2 * lanes ? 4 : features > lanes ? 2 : 1;
    add_group(rows, columns, vectors, groups);
    return;
  }
  const int max_columns = machine.registers >= 32 ? kMaxTapColumns : 5;
  const int column_pieces =
      columns.taps <= max_columns && columns.taps != 6 ? 1 : static_cast<int>(ceil_div(columns.taps, 5));
  for (const TapAxis& part : cut(columns, column_pieces)) {
    int max_rows = kMaxTapRows;
    while (!offered(both, max_rows, part.taps, 1, machine)) --max_rows;
    for (const TapAxis& row_part : cut(rows, static_cast<int>(ceil_div(rows.taps, max_rows)))) {
      const int taps = row_part.taps * part.taps;
      int vectors = widest_step(both, row_part.taps, part.taps, features, machine);
      // Few non-zeros: packing them is cheap, and steps of half the features have room for twice the positions in L1,
      // so that sums move half as often. Single ones of eight vectors are left to masks. Fitted where there is one
      // multiply-add a cycle.
      if (!both && density < kFew && taps == 1 && machine.single_fma() && vectors == 8 && features >= 16 * lanes)
        vectors = 4;
      add_group(row_part, part, vectors, groups);
    }
  }
}

// What walks of a class read, and how many channels they take together.
void choose_lists(const WeightsPlan& plan, double density, const PlanMachine& machine, PixelClass& cls) {
  if (plan.both) {
    cls.lists = WeightsLists::kPacked;
    return;
  }
  // Cuts of channels are coarser for three, and few channels need none only where pixels are cut instead.
  const bool many_pixels = plan.shape.n * plan.shape.h * plan.shape.w >= 8 * kChunkPixels;
  bool twos = false, threes = plan.channels >= (many_pixels ? 4 : 12) * plan.lanes;
  bool lists = true, no_lists = true, columns = true;
  int taps = 1, fewest = cls.groups.front().place.taps, vectors = 1;
  for (const TapGroup& group : cls.groups) {
    const int group_taps = group.rows.taps * group.columns.taps;
    taps = std::max(taps, group_taps);
    fewest = std::min(fewest, group_taps);
    vectors = std::max(vectors, group.vectors);
    lists = lists && walk_lists(group_taps);
    no_lists = no_lists && !walk_lists(group_taps);
    columns = columns && group.columns.taps > 1;
    twos = twos || walk_together(2, group_taps * group.vectors, machine.registers);
    threes = threes && walk_lists(group_taps) && walk_together(3, group_taps * group.vectors, machine.registers);
  }
  const int64_t tap_vectors = taps * ceil_div(plan.features, machine.lanes);
  const bool many = taps >= kManyTaps || tap_vectors >= kManyTapVectors;
  const double least = !machine.single_fma() ? kNeighbourDensity
                       : many                ? kLeastNeighbourDensity
                                             : kNeighbourDensitySingleFma;
  if (!(threes && density > kMostNeighbourDensity) && columns && fewest >= kNeighbourTaps &&
      tap_vectors >= kNeighbourTapVectors && density >= least) {
    cls.lists = WeightsLists::kNeighbours;
    return;
  }
  const double single = taps == 1 ? kFew : taps < 9 ? kPairDensityFewTaps : kPairDensitySingleFma / taps;
  if (twos && density > (machine.single_fma() ? single : kPairDensity / taps)) {
    cls.together = threes && density > kThreesDensity ? 3 : 2;
  }
  const bool few = density < kFew && taps == 1 && vectors <= 4 && machine.single_fma();
  cls.lists = cls.together == 1 && (lists || few) ? WeightsLists::kPacked
              : no_lists                          ? WeightsLists::kMasks
                                                  : WeightsLists::kChannels;
}

int64_t balanced(int64_t size, int64_t most) { return ceil_div(size, ceil_div(size, std::max<int64_t>(1, most))); }

// Blocks of `columns` columns whose dense block has at most `budget` positions.
void block_by(const WeightsPlan& plan, int64_t columns, int64_t budget, int64_t halo_rows, PixelClass& cls) {
  cls.pitch = cls.image_rows = 0;
  cls.block_columns = columns;
  const bool full_columns = cls.block_columns == cls.columns.count;
  for (const TapGroup& group : cls.groups) {
    const int64_t shared = full_columns ? shared_halo(group.columns, cls.columns.count) : 0;
    cls.pitch = std::max(cls.pitch, cls.block_columns + group.columns.taps - 1 - shared);
  }
  cls.block_rows = balanced(cls.rows.count, std::min(cls.rows.count, budget / cls.pitch - halo_rows));
  const bool full_rows = full_columns && cls.block_rows == cls.rows.count;
  for (const TapGroup& group : cls.groups) {
    const int64_t shared = full_rows ? shared_halo(group.rows, cls.rows.count) : 0;
    cls.image_rows = std::max(cls.image_rows, cls.block_rows + group.rows.taps - 1 - shared);
  }
  cls.block_images =
      full_rows ? balanced(plan.shape.n, std::min(plan.shape.n, budget / (cls.image_rows * cls.pitch))) : 1;
  cls.positions = round_up(cls.position(cls.block_images - 1, cls.block_rows - 1, cls.block_columns), 64);
  cls.blocks[0] = ceil_div(plan.shape.n, cls.block_images);
  cls.blocks[1] = ceil_div(cls.rows.count, cls.block_rows);
  cls.blocks[2] = ceil_div(cls.columns.count, cls.block_columns);
}

void block_pixels(const WeightsPlan& plan, double density, const PlanMachine& machine, PixelClass& cls) {
  int64_t bytes = 4 * machine.lanes, halo_rows = 0, taps = 0;
  for (const TapGroup& group : cls.groups) {
    bytes = std::max<int64_t>(bytes, 4 * machine.lanes * group.vectors);
    halo_rows = std::max<int64_t>(halo_rows, group.rows.taps - 1);
    taps = std::max<int64_t>(taps, group.rows.taps * group.columns.taps);
  }
  // Positions of the dense block. Walks jump about in it: in L1, filled higher where a large halo makes few positions
  // of it, where a few taps leave little to do between the moves of sums, or zeros are many: lists are short then, and
  // touch it less. Tiles with several taps sweep it in order, from L2 as well, and gain from small halos and sums that
  // stay in registers for longer. Lists of both gradients must not be short: of wide steps twice L1.
  const bool few = halo_rows > 0 && (density < kFew || plan.both);
  const bool high = halo_rows > 2 || (taps > 1 && (taps <= 4 || (machine.single_fma() && density <= kHalf)));
  const TapGroup& first = cls.groups.front();
  const bool all = halo_rows == 0 && cls.lists == WeightsLists::kPacked && first.columns.taps == 1;
  const bool wide = plan.both && all && first.vectors == 8 && density < kWideBoth;
  const int64_t tenths = !plan.sparse ? 7 : wide ? 20 : few ? 11 : all ? 10 : high ? 9 : 7;
  const int64_t share =
      !plan.sparse && halo_rows > 0 ? machine.caches.l2_bytes / 8 : machine.caches.l1_bytes * tenths / 10;
  const int64_t budget = std::max<int64_t>(64, share / bytes);
  const bool line = plan.shape.h == 1 && plan.shape.oh == 1 && halo_rows == 0;
  cls.block_images = cls.block_rows = cls.block_columns = cls.pitch = cls.image_rows = 0;
  cls.positions = 0;
  cls.blocks[0] = cls.blocks[1] = cls.blocks[2] = 1;
  if (cls.rows.count == 0 || cls.columns.count == 0) return;  // one empty block, so that zeros get written
  if (line) return block_by(plan, std::min(cls.columns.count, budget / 64 * 64), budget, halo_rows, cls);
  // Of all widths the one that copies and moves the least for a pixel: positions of the dense block; sums, which come
  // and go with every channel.
  const double moves = static_cast<double>((2 * taps + 6) * std::min<int64_t>(plan.channels, 256));
  const double copy = costs_of(machine).copy;
  const int64_t most_columns = std::clamp<int64_t>(budget / (halo_rows + 4), 8, 64);
  double least = 0;
  PixelClass best = cls;
  for (int64_t columns = balanced(cls.columns.count, most_columns);;) {
    block_by(plan, columns, budget, halo_rows, cls);
    const double positions = static_cast<double>((cls.block_images * cls.image_rows + halo_rows) * cls.pitch);
    const double cost = (moves + copy * positions) * static_cast<double>(cls.block_count());
    if (best.block_columns == 0 || cost < 0.97 * least) best = cls, least = cost;
    if (columns <= 8) break;
    columns = balanced(cls.columns.count, columns - 1);
  }
  cls = best;
}

// What a class becomes without its borders: fewer pixels, all taps.
PixelClass inner_of(const PixelClass& whole, const Part& rows, const Part& columns) {
  PixelClass inner = whole;
  inner.rows = rows.of(whole.rows);
  inner.columns = columns.of(whole.columns);
  for (TapGroup& group : inner.groups) {
    group.rows.offset += rows.begin;
    group.columns.offset += columns.begin;
  }
  return inner;
}

// The pixels rows x columns of a class with the taps that any of them meets, or a few more. No groups if there are
// none.
PixelClass border_of(bool both, const PixelClass& whole, const Part& rows, const Part& columns,
                     const PlanMachine& machine) {
  PixelClass border{};
  border.lists = whole.lists;
  border.together = whole.together;
  border.rows = rows.of(whole.rows);
  border.columns = columns.of(whole.columns);
  for (const TapGroup& group : whole.groups) {
    const auto walked = [&](int tap_rows, int tap_columns) {
      return (both || walk_lists(tap_rows * tap_columns)) &&
             offered(both, tap_rows, tap_columns, group.vectors, machine);
    };
    const TapRectangle taps = taps_met(rows, columns, group.rows, group.columns, walked);
    if (taps.empty()) continue;
    TapGroup met = group;
    met.rows = rows.of(group.rows, taps.top, taps.bottom);
    met.columns = columns.of(group.columns, taps.left, taps.right);
    met.place.first = taps.top * group.columns.taps + taps.left;
    border.groups.push_back(met);
  }
  return border;
}

// What walking a class costs, in multiply-adds for a vector of features. Fitted to classes with and without borders;
// why lists of single columns cost more is not known.
double walk_cost(const WeightsPlan& plan, double density, const PlanMachine& machine, const PixelClass& cls) {
  constexpr double kList = 40, kColumn = 100;                        // a list, of single columns
  const double moves = plan.both ? 3 : 2, uses = plan.both ? 2 : 1;  // a sum in and out, a filter; of a vector of g
  const double copy = costs_of(machine).copy;
  const double channels = static_cast<double>(plan.channels);
  double cost = 0;
  cls.for_parts([&](const PixelClass& part) {
    const double pixels = static_cast<double>(plan.shape.n * part.rows.count * part.columns.count);
    for (const TapGroup& group : part.groups) {
      const int taps = group.rows.taps * group.columns.taps;
      cost += uses * pixels * channels * density * taps;
      const double list = (part.columns.count == 1 ? kColumn : kList) / group.vectors;
      cost += static_cast<double>(part.block_count()) *
              (channels * (moves * taps + list) + copy * static_cast<double>(part.positions));
    }
  });
  return cost;
}

// Cuts borders off a class whose walks gain by it.
void cut_borders(const WeightsPlan& plan, double density, const PlanMachine& machine, PixelClass& cls) {
  for (const TapGroup& group : cls.groups) {
    if (!plan.both && !walk_lists(group.rows.taps * group.columns.taps)) return;
  }
  PixelClass best = cls;
  for_cuts(cls.rows, cls.columns, cls.groups, [&](const Part& rows, const Part& columns) {
    PixelClass inner = inner_of(cls, rows, columns);
    bool lonely = false;  // a border meets no tap
    const auto add = [&](const Part& border_rows, const Part& border_columns) {
      const PixelClass border = border_of(plan.both, cls, border_rows, border_columns, machine);
      border.groups.empty() ? void(lonely = true) : inner.borders.push_back(border);
    };
    for_borders(cls.rows.count, cls.columns.count, rows, columns, add);
    if (lonely && plan.both) return;  // its gradients, zeros, must be written too
    block_pixels(plan, density, machine, inner);
    for (PixelClass& border : inner.borders) block_pixels(plan, density, machine, border);
    if (walk_cost(plan, density, machine, inner) < 0.99 * walk_cost(plan, density, machine, best)) best = inner;
  });
  cls = best;
}

// The share of pairs of a pixel and a tap that are not padding.
double met_share(const PixelAxis& pixels, const TapAxis& axis) {
  int64_t met = 0;
  for (int j = 0; j < axis.taps; ++j) {
    const int64_t begin = std::max<int64_t>(0, -(j + axis.offset));
    met += std::max<int64_t>(0, std::min(pixels.count, axis.count - j - axis.offset) - begin);
  }
  return static_cast<double>(met) / static_cast<double>(std::max<int64_t>(1, pixels.count * axis.taps));
}

// A tile of few taps and features loads about as much as it multiplies.
double tile_cost(int64_t taps, int vectors, const PlanMachine& machine) {
  const double alone = machine.registers == 32 ? 1.25 : 1.45;  // every multiply-add loads
  const double loads = taps > 4 ? 1 : vectors == 1 ? alone : vectors == 2 ? 1.12 : 1.07;
  return costs_of(machine).tile * loads;
}

int tile_channels(int vectors, int registers) { return (registers == 32 ? 24 : 12) / vectors; }

// What one way to run the call would cost: multiplying, and moving each operand once.
struct Estimate {
  double multiply = 0, pack = 0, copy = 0;  // `pack` the checked operand, `copy` the dense one
  double total() const { return multiply + pack + copy; }
};

Estimate estimate(const WeightsPlan& plan, double density, const PlanMachine& machine) {
  const Costs costs = costs_of(machine);
  Estimate cost;
  const auto add = [&](const PixelClass& cls) {
    const double pixels = static_cast<double>(plan.shape.n * cls.rows.count * cls.columns.count);
    for (const TapGroup& group : cls.groups) {
      const int64_t taps = group.rows.taps * group.columns.taps, vectors = ceil_div(plan.features, plan.lanes);
      const double tap_vectors = static_cast<double>(taps * vectors);
      if (plan.both) {
        const double steps = static_cast<double>(ceil_div(vectors, group.vectors)) * static_cast<double>(plan.channels);
        // Of a few multiply-adds, what an entry waits for is not hidden.
        const double reduce = costs.reduce * (taps * group.vectors < 4 ? 2 : 1);
        cost.multiply += pixels * density * (2 * costs.walk_both * tap_vectors * plan.channels + reduce * steps) +
                         costs.channel * steps * static_cast<double>(cls.block_count());
      } else if (plan.sparse) {
        const double walk = std::max(walk_lists(static_cast<int>(taps)) ? costs.walk : costs.mask_walk,
                                     costs.visit_fma + costs.visit / static_cast<double>(taps * group.vectors));
        cost.multiply +=
            pixels * plan.channels *
            (density * walk * tap_vectors + costs.end / 64 * static_cast<double>(ceil_div(vectors, group.vectors)));
      } else {
        const int64_t tile = tile_channels(group.vectors, machine.registers), tiles = ceil_div(plan.channels, tile);
        const double met = met_share(cls.rows, group.rows) * met_share(cls.columns, group.columns);
        cost.multiply += pixels * tiles * tile * tile_cost(taps, group.vectors, machine) * tap_vectors * met;
        cost.pack += pixels * tiles * costs.group;
      }
      cost.copy += pixels * vectors * costs.copy;
    }
    if (plan.sparse) {
      const double pack = costs.pack + (plan.both ? costs.both : 0);
      cost.pack += pixels * static_cast<double>(ceil_div(plan.channels, plan.lanes)) * pack;
      // Lists of all positions or of none end where expected.
      const double unexpected = std::min(1 - density, 8 * density);
      cost.multiply += pixels * static_cast<double>(plan.channels) * unexpected * costs.element;
    }
  };
  for (const PixelClass& cls : plan.classes) cls.for_parts(add);
  const int64_t rhs = plan.shape.rhs_size();
  if (plan.both && 4 * rhs > machine.caches.l2_bytes / 2) {
    const double places = 1 + 0.12 * static_cast<double>(plan.shape.r * plan.shape.s);  // its lines come from
    cost.multiply += costs.filter * places * static_cast<double>(rhs) / plan.lanes;
  }
  return cost;
}

WeightsPlan plan_path(const ConvShape& shape, bool lhs_checked, bool sparse, bool both, double density,
                      const PlanMachine& machine) {
  WeightsPlan plan{};
  plan.shape = shape;
  plan.lhs_checked = lhs_checked;
  plan.sparse = sparse;
  plan.both = both;
  plan.lanes = machine.lanes;
  plan.channels = lhs_checked ? shape.c : shape.k;
  plan.features = lhs_checked ? shape.k : shape.c;
  const auto axis = lhs_checked ? lhs_checked_axis : g_checked_axis;
  const std::vector<CheckedAxis> rows = axis(shape.h, shape.oh, shape.r, shape.stride_h, shape.pad_top);
  const std::vector<CheckedAxis> columns = axis(shape.w, shape.ow, shape.s, shape.stride_w, shape.pad_left);
  for (const CheckedAxis& row : rows) {
    for (const CheckedAxis& column : columns) {
      PixelClass cls{};
      cls.together = 1;
      cls.rows = row.pixels;
      cls.columns = column.pixels;
      for (const TapAxis& row_taps : row.taps) {
        for (const TapAxis& column_taps : column.taps) {
          add_groups(row_taps, column_taps, sparse, both, density, plan.features, machine, cls.groups);
        }
      }
      if (sparse) choose_lists(plan, density, machine, cls);
      block_pixels(plan, density, machine, cls);
      if (sparse) cut_borders(plan, density, machine, cls);
      plan.classes.push_back(cls);
    }
  }
  plan.take = machine.single_fma();
  return plan;
}

// A way to cut drhs into items.
struct Cut {
  int64_t channel_block, feature_block;
};

// The time until so many threads are done, each of which takes the next item whenever it has none: rounds of average
// items, or the largest one. Every item packs its channels and copies its features.
double makespan(const WeightsPlan& plan, const Cut& cut, const Estimate& cost, int threads) {
  const int64_t channel_blocks = ceil_div(plan.channels, cut.channel_block);
  const int64_t feature_blocks = ceil_div(plan.features, cut.feature_block);
  const int64_t items = plan.chunks * channel_blocks * feature_blocks;
  const double work =
      cost.multiply + cost.pack * static_cast<double>(feature_blocks) + cost.copy * static_cast<double>(channel_blocks);
  const double channels = std::min(1.0, static_cast<double>(cut.channel_block) / static_cast<double>(plan.channels));
  const double features = std::min(1.0, static_cast<double>(cut.feature_block) / static_cast<double>(plan.features));
  const double largest = cost.multiply * channels * features + cost.pack * channels + cost.copy * features;
  return std::max(largest / static_cast<double>(plan.chunks),
                  work * static_cast<double>(ceil_div(items, threads)) / static_cast<double>(items));
}

// Cuts drhs into items. The panel of an item (its sums between pixel blocks) and a packed pixel block should stay in
// L2; every cut repeats packing (along features) or copying (along channels).
void cut_items(const PlanMachine& machine, const Estimate& cost, WeightsPlan& plan) {
  int64_t taps = 1, all_taps = 0, positions = 64, pixels = 0, blocks = 0, widest = 1;
  bool borders = false, threes = false;
  for (const PixelClass& cls : plan.classes) {
    int64_t class_taps = 0;
    for (const TapGroup& group : cls.groups) {
      class_taps += group.rows.taps * group.columns.taps;
      widest = std::max<int64_t>(widest, group.vectors);
    }
    taps = std::max(taps, class_taps);
    cls.for_parts([&positions](const PixelClass& part) { positions = std::max(positions, part.positions); });
    blocks = std::max(blocks, cls.block_count());
    borders = borders || !cls.borders.empty();
    threes = threes || cls.together == 3;
    pixels = std::max(pixels, plan.shape.n * cls.rows.count * cls.columns.count);
    all_taps += class_taps;
  }
  // 24: whole tiles for every choice of vectors. Channels walked together stay together however threads cut the work,
  // because the order of their sums depends on it.
  const int64_t unit = !plan.sparse ? 24 : threes ? 3 * plan.lanes : plan.lanes;
  const int64_t width = widest * plan.lanes;
  const int64_t panel = machine.caches.l2_bytes * 4;
  plan.feature_block = round_up(plan.features, width);
  int64_t most_channels = machine.caches.l2_bytes / 3 / (4 * positions);
  if (plan.both) most_channels = std::min(most_channels, panel / (4 * taps * plan.feature_block));
  plan.channel_block = round_up(balanced(plan.channels, std::max(unit, most_channels / unit * unit)), unit);
  // The gradient of lhs adds up over all features. Else, with one block, its sums go straight to drhs.
  if (!plan.both && (blocks > 1 || borders || !plan.lhs_checked)) {
    const int64_t most =
        std::max(width, panel / (4 * taps * std::min(plan.channel_block, plan.channels)) / width * width);
    plan.feature_block = round_up(balanced(plan.features, most), width);
  }
  // Chunks of the pixels repeat no packing or copying, but their sums must be added: where pixels are many for the size
  // of drhs. By shape alone, because the sums depend on it.
  const int64_t sums = 4 * round_up(plan.channels, unit) * round_up(plan.features, width) * all_taps;
  plan.chunks = 1;
  // Walks of both gradients cannot be cut by features.
  const int64_t least_pixels = plan.both ? kChunkPixels / 2 : kChunkPixels, least_blocks = plan.both ? 2 : 8;
  while (!plan.serial && plan.chunks < 8 && pixels >= plan.chunks * least_pixels &&
         blocks >= least_blocks * plan.chunks && 2 * plan.chunks * sums <= 4 * machine.caches.l2_bytes) {
    plan.chunks *= 2;
  }
  if (machine.threads == 1 || plan.serial) return;
  // Items for all threads, which are done at about the same time: few, and more of them only where they gain by it.
  const int64_t channel_pieces = plan.channel_blocks(), feature_pieces = plan.feature_blocks();
  const int64_t most_items = std::max(4 * machine.threads / plan.chunks, channel_pieces * feature_pieces);
  const int64_t narrowest = std::min(std::max<int64_t>(width, 64), plan.feature_block);
  Cut best = {plan.channel_block, plan.feature_block};
  double least = makespan(plan, best, cost, machine.threads);
  for (int64_t c = channel_pieces; c * feature_pieces <= most_items; ++c) {
    const int64_t channel_block = round_up(ceil_div(plan.channels, c), unit);
    if (ceil_div(plan.channels, channel_block) < c) continue;  // the same block as before
    for (int64_t f = feature_pieces; c * f <= most_items; ++f) {
      const Cut cut = {channel_block, round_up(ceil_div(plan.features, f), width)};
      if (cut.feature_block < narrowest || (plan.both && f > 1)) break;
      if (ceil_div(plan.features, cut.feature_block) < f) continue;
      const double time = makespan(plan, cut, cost, machine.threads);
      if (time < 0.99 * least) best = cut, least = time;
    }
  }
  plan.channel_block = best.channel_block;
  plan.feature_block = best.feature_block;
}

}  // namespace

int step_vectors(int64_t left, int vectors, int lanes) {
  while (vectors > 1 && static_cast<int64_t>(vectors / 2) * lanes >= left) vectors /= 2;
  // More than a quarter of the lanes idle: full vectors first, the rest in a step of its own.
  if (vectors > 1 && 4 * left < 3 * static_cast<int64_t>(vectors) * lanes) vectors /= 2;
  return vectors;
}

WeightsPlan plan_weights(const ConvShape& given, Mode mode, const Densities& densities, const PlanMachine& machine) {
  ConvShape shape = given.flattened();
  Fold fold;
  if (shape.s > 1 && shape.c <= kFoldChannels && shape.c * shape.s <= 8 * kFoldChannels) {
    fold = {shape.s, shape.stride_w, shape.pad_left, shape.w, shape.c};
    shape.c *= shape.s;
    shape.w = shape.ow;
    shape.s = shape.stride_w = 1;
    shape.pad_left = 0;
  }
  Estimate cost[2];
  const auto cheaper = [&](bool sparse) {
    const WeightsPlan lhs = plan_path(shape, true, sparse, false, densities.lhs, machine);
    const WeightsPlan g = plan_path(shape, false, sparse, false, densities.g, machine);
    const Estimate lhs_cost = estimate(lhs, densities.lhs, machine), g_cost = estimate(g, densities.g, machine);
    const bool lhs_checked = lhs_cost.total() <= g_cost.total();
    cost[sparse] = lhs_checked ? lhs_cost : g_cost;
    return lhs_checked ? lhs : g;
  };
  const WeightsPlan sparse = cheaper(true), dense = cheaper(false);
  const double sparse_cost = cost[true].total(), dense_cost = cost[false].total();
  WeightsPlan best = mode == Mode::kSparse || (mode == Mode::kAuto && sparse_cost < dense_cost) ? sparse : dense;
  best.sparse_cost = sparse_cost;
  best.dense_cost = dense_cost;
  best.fold = fold;
  best.serial = too_small_for_threads(std::min(sparse_cost, dense_cost), ceil_div(shape.rhs_size(), best.lanes));
  cut_items(machine, cost[best.sparse], best);
  return best;
}

WeightsPlan plan_both_walks(const ConvShape& given, const Densities& densities, const PlanMachine& machine) {
  const ConvShape shape = given.flattened();
  WeightsPlan none{};
  none.shape = shape;
  if (!both_offered(1, 1, 1, machine.registers) || shape.c < machine.lanes) return none;
  WeightsPlan plan = plan_path(shape, true, true, true, densities.lhs, machine);
  int64_t pixels = 0;
  for (const PixelClass& cls : plan.classes) {
    cls.for_parts([&pixels](const PixelClass& part) { pixels += part.rows.count * part.columns.count; });
  }
  if (pixels != shape.h * shape.w) return none;
  const Estimate cost = estimate(plan, densities.lhs, machine);
  plan.sparse_cost = cost.total();
  plan.stream = streams_lhs(shape, machine);
  plan.serial = too_small_for_threads(plan.sparse_cost, ceil_div(shape.rhs_size(), plan.lanes));
  cut_items(machine, cost, plan);
  return plan;
}

Description describe_blocking(const WeightsPlan& plan) {
  Description out;
  out.add("checked", plan.lhs_checked ? "lhs" : "g");
  out.add("folded_columns", plan.fold.taps);
  out.add("channel_block", plan.channel_block);
  out.add("feature_block", plan.feature_block);
  out.add("serial", plan.serial);
  out.add("chunks", plan.chunks);
  out.add("items", plan.items());
  out.add("pixel_classes", plan.classes.size());
  const PixelClass& cls = plan.classes.front();
  const char* lists[] = {"masks", "channels", "packed", "neighbours"};
  out.add("lists", plan.sparse ? lists[static_cast<int>(cls.lists)] : "none");
  out.add("together", cls.together);
  out.add("borders", cls.borders.size());
  out.add_block("pixel_block", cls.block_images, cls.block_rows, cls.block_columns);
  std::string groups;
  for (const TapGroup& group : cls.groups) {
    if (!groups.empty()) groups += " ";
    groups += std::to_string(group.rows.taps) + "x" + std::to_string(group.columns.taps) + "x" +
              std::to_string(group.vectors * plan.lanes);
  }
  out.add("tap_groups", groups);
  return out;
}

Description describe_weights(const ConvShape& shape, const Densities& densities, const PlanMachine& machine) {
  const WeightsPlan plan = plan_weights(shape, Mode::kAuto, densities, machine);
  Description out = describe_blocking(plan);
  out.add("path", plan.sparse ? "sparse" : "dense");
  // Of the checked operand.
  out.add("break_even_density", break_even([&](double d) {
            const Densities tried = plan.lhs_checked ? Densities{d, 1} : Densities{1, d};
            return plan_weights(shape, Mode::kSparse, tried, machine).sparse_cost < plan.dense_cost;
          }));
  out.add("sparse_cost", plan.sparse_cost);
  out.add("dense_cost", plan.dense_cost);
  return out;
}

}  // namespace sparsetrain
