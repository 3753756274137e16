#include "plan_masked.h"

#include <algorithm>
#include <cstdio>
#include <iterator>

#include "kernels.h"
#include "parallel.h"
#include "plan_data.h"

namespace sparsetrain {
namespace {

// Below, non-zeros ask for few of the lines that they could meet: where there is one multiply-add a cycle, and
// elsewhere.
constexpr double kFewSingleFma = 0.18, kFew = 0.25;
constexpr double kEmptyCost = 1;  // writing zeros where no tap meets a class, per element
// Skipping the zeros of g, as a share of the dense BWI: what it costs whatever their number, per non-zero, and at most.
constexpr double kSkippingCost = 0.2, kSkippingSlope = 0.9;
constexpr double kSkippingCost1x1 = 0.25, kSkippingSlope1x1 = 1.0;
constexpr double kSkippingMost = 1.1;
constexpr int64_t kEntryBytes = 6;    // of an entry of a list and its value
constexpr int64_t kThreadBlocks = 3;  // for each thread, where there are several: all are done at about the same time
constexpr double kRounding = 1.5;     // entries that fill up the last group of a list
constexpr double kPiece = 0.008;      // what each further piece of taps adds to a multiply-add of a product

// Costs in multiply-adds of a vector of the dense BWI, fitted to measurements.
struct Costs {
  double product;  // a multiply-add of a product: bound by loads; the sum over lanes is in it
  double element;  // listing an element of x and storing one of dlhs
  double channel;  // of a product, per channel, block and step: its filter, the mispredicted end
  double filter;   // packing a vector of a kernel that does not stay in L2, and fetching it again
  double zero;     // zeroing as the result is written: reading x, per element, at most
  double margin;   // a product must promise this share of the other ways' cost: they are surer
  // Of a class of points:
  double point;          // a point and block of channels: the mispredicted end
  double point_vector;   // its features, per vector
  double point_entry;    // an entry of its list: the sum over lanes
  double point_fma;      // a multiply-add of an entry
  double point_wide;     // as many times that in steps of more than eight vectors
  double point_once;     // a point, however many blocks and steps
  double point_element;  // listing and storing an element
};

Costs costs_of(const PlanMachine& machine) {
  if (machine.single_fma())
    return {
        .product = 1.12,
        .element = 1.8,
        .channel = 110,
        .filter = 15,
        .zero = 1.1,
        .margin = 0.98,
        .point = 20,
        .point_vector = 1.4,
        .point_entry = 1.5,
        .point_fma = 1,
        .point_wide = 1.13,
        .point_once = 18,
        .point_element = 0.9,
    };
  return {
      .product = 1.22,
      .element = 4,
      .channel = 110,
      .filter = 26,
      .zero = 1.3,
      .margin = 0.85,
      .point = 35,
      .point_vector = 3.3,
      .point_entry = 2.8,
      .point_fma = 0.91,
      .point_wide = 1,
      .point_once = 35,
      .point_element = 2.1,
  };
}

std::vector<TapAxis> cut(const TapAxis& axis) { return cut(axis, (axis.taps + kMaskedTaps - 1) / kMaskedTaps); }

// The narrowest step for `left` features, or the widest there is. Half the widest exists.
int step_width(const TapAxis& rows, const TapAxis& columns, int64_t left, const PlanMachine& machine) {
  int widest = 1 << (kMaskedVectorChoices - 1);
  while (!masked_offered(rows.taps, columns.taps, widest, machine.registers)) widest /= 2;
  while (widest > 1 && widest / 2 * machine.lanes >= left &&
         masked_offered(rows.taps, columns.taps, widest / 2, machine.registers)) {
    widest /= 2;
  }
  return widest;
}

void add_step(const TapAxis& rows, const TapAxis& columns, int64_t first, int vectors, MaskedPlan& plan,
              MaskedClass& cls) {
  const int64_t width = static_cast<int64_t>(vectors) * plan.lanes, count = std::min(width, plan.shape.k - first);
  const int64_t row = columns.taps * width, channel = rows.taps * row;
  cls.steps.push_back({rows, columns, first, static_cast<int>(count), vectors, plan.filter_floats, channel, row});
  plan.filters.push_back(cls.steps.back());
  plan.filter_floats += plan.shape.c * channel;
}

void add_steps(const TapAxis& rows, const TapAxis& columns, const PlanMachine& machine, MaskedPlan& plan,
               MaskedClass& cls) {
  for (int64_t first = 0; first < plan.shape.k; first += cls.steps.back().features) {
    add_step(rows, columns, first, step_width(rows, columns, plan.shape.k - first, machine), plan, cls);
  }
}

// Channels whose filters stay near with this many vectors of features. Few non-zeros ask for few of them in turn: then
// longer lists are worth a block that is larger than L1. Where there is one multiply-add a cycle, all of L1 is worth it
// in any case.
int64_t filter_block(int64_t channels, int vectors, double density, const PlanMachine& machine) {
  const bool single = machine.single_fma();
  const int64_t tenths = density < (single ? kFewSingleFma : kFew) ? 14 : single ? 10 : 7;
  const int64_t fits = machine.caches.l1_bytes * tenths / 10 / (4 * vectors * machine.lanes);
  const int64_t most = std::max<int64_t>(machine.lanes, fits / machine.lanes * machine.lanes);
  return round_up(ceil_div(channels, ceil_div(channels, most)), machine.lanes);  // even blocks
}

// Of a point of x, with steps of this many vectors.
double point_cost(const ConvShape& shape, int64_t steps, int vectors, double density, const PlanMachine& machine) {
  const Costs costs = costs_of(machine);
  const double channels = static_cast<double>(shape.c);
  const int64_t blocks = ceil_div(shape.c, filter_block(shape.c, vectors, density, machine));
  const double lists = static_cast<double>(steps * blocks);
  const double entries = density * channels * static_cast<double>(steps) + kRounding * lists;
  const double fma = costs.point_fma * (vectors > 8 ? costs.point_wide : 1);
  return lists * (costs.point + costs.point_vector * vectors) + entries * (costs.point_entry + fma * vectors) +
         costs.point_once + costs.point_element * channels;
}

void add_point_steps(const TapAxis& rows, const TapAxis& columns, double density, const PlanMachine& machine,
                     MaskedPlan& plan, MaskedClass& cls) {
  const int64_t needed = ceil_div(plan.shape.k, plan.lanes);
  int64_t best_steps = 0;
  int best = 0;
  double best_cost = 0;
  for (int vectors = 1; vectors <= kMaxPointVectors; ++vectors) {
    if (!point_offered(vectors, machine.registers)) continue;
    const int64_t steps = ceil_div(needed, vectors);
    const double cost = point_cost(plan.shape, steps, vectors, density, machine);
    if (best == 0 || cost < best_cost) {
      best = vectors;
      best_steps = steps;
      best_cost = cost;
    }
  }
  cls.filter_block = filter_block(plan.shape.c, best, density, machine);
  for (int64_t i = 0; i < best_steps; ++i) add_step(rows, columns, i * best * plan.lanes, best, plan, cls);
}

// The block with its halo has at most `budget` pixels; fewest blocks, because every block reads all filters.
void block_pixels(const ConvShape& shape, int64_t budget, MaskedClass& cls) {
  const int64_t height = cls.rows.count, width = cls.columns.count;
  int64_t fewest = 0;
  // Fewer pieces have more columns than fit.
  for (int64_t pieces = std::max<int64_t>(1, width / budget); pieces <= width; ++pieces) {
    const int64_t columns = ceil_div(width, pieces);
    int64_t halo_columns = 0, halo_rows = 0,
            halo_images = 0;  // beyond a row, a block, an image
    for (const MaskedStep& step : cls.steps) {
      const int64_t shared = columns == width ? shared_halo(step.columns, width) : 0;
      halo_columns = std::max(halo_columns, step.columns.taps - 1 - shared);
      halo_rows = std::max<int64_t>(halo_rows, step.rows.taps - 1);
      halo_images = std::max(halo_images, step.rows.taps - 1 - shared_halo(step.rows, height));
    }
    const int64_t pitch = columns + halo_columns;
    if ((1 + halo_rows) * pitch > budget && columns > 16) continue;
    const int64_t most_rows = std::max<int64_t>(1, budget / pitch - halo_rows);
    const int64_t rows = ceil_div(height, ceil_div(height, most_rows));
    int64_t images = 1, image_rows = rows + halo_rows;
    if (columns == width && rows == height) {
      image_rows = rows + halo_images;
      images = std::clamp<int64_t>(budget / (image_rows * pitch), 1, shape.n);
      images = ceil_div(shape.n, ceil_div(shape.n, images));
    }
    const int64_t blocks[3] = {ceil_div(shape.n, images), ceil_div(height, rows), ceil_div(width, columns)};
    const int64_t count = blocks[0] * blocks[1] * blocks[2];
    if (fewest == 0 || count < fewest) {
      fewest = count;
      cls.block_images = images;
      cls.block_rows = rows;
      cls.block_columns = columns;
      cls.pitch = pitch;
      cls.image_rows = image_rows;
      std::copy(blocks, blocks + 3, cls.blocks);
    }
    if (rows == height || columns <= 16) break;
  }
}

double pixels_of(const MaskedPlan& plan, const MaskedClass& cls) {
  return static_cast<double>(plan.shape.n * cls.rows.count * cls.columns.count);
}

// Pixels of a block: of a product, so that its g stays in L1, or nearly where that was found to pay: for few non-zeros
// or taps; of points, as many as meet each filter block often: above 64, while their lists and values take no more than
// L2, and in any case while room for all of them takes no more than four.
int64_t block_budget(const MaskedPlan& plan, const MaskedClass& cls, double density, const PlanMachine& machine) {
  constexpr int64_t kFewPoints = 64, kMostPoints = 256;
  const auto& caches = machine.caches;
  if (!cls.points) {
    int widest = 1, taps = 1;
    for (const MaskedStep& step : cls.steps) {
      widest = std::max(widest, step.vectors);
      taps = std::max(taps, step.rows.taps * step.columns.taps);
    }
    const int64_t tenths = !machine.single_fma() ? 9 : density < kFewSingleFma ? 12 : taps <= 4 ? 10 : 9;
    return std::clamp<int64_t>(caches.l1_bytes * tenths / 10 / (4 * widest * plan.lanes), 16, 1024);
  }
  const int64_t room = kEntryBytes * round_up(plan.shape.c, plan.lanes);
  const auto entries = static_cast<int64_t>(density * static_cast<double>(room)) + 1;
  int64_t points = std::min(kMostPoints, std::max(kFewPoints, caches.l2_bytes / entries));
  if (machine.threads > 1) {  // blocks for all threads, rather than cutting the channels
    const auto pixels = static_cast<int64_t>(pixels_of(plan, cls));
    points = std::min(points, std::max(kFewPoints, pixels / (kThreadBlocks * machine.threads)));
  }
  return std::max<int64_t>(16, std::min(points, 4 * caches.l2_bytes / room));
}

// Multiply-adds of a class, padding included.
double multiply_adds(const MaskedPlan& plan, const MaskedClass& cls) {
  double vectors = 0;
  for (const MaskedStep& step : cls.steps) vectors += step.rows.taps * step.columns.taps * step.vectors;
  return pixels_of(plan, cls) * static_cast<double>(plan.shape.c) * vectors;
}

double product_cost(const MaskedPlan& plan, const MaskedClass& cls, double density, const PlanMachine& machine) {
  const Costs costs = costs_of(machine);
  const double pixels = pixels_of(plan, cls), channels = static_cast<double>(plan.shape.c);
  const int64_t steps = static_cast<int64_t>(cls.steps.size());
  if (steps == 0) return kEmptyCost * pixels * channels;
  if (cls.points) {
    return pixels * point_cost(plan.shape, steps, cls.steps.front().vectors, density, machine);
  }
  const int64_t pieces =
      std::count_if(cls.steps.begin(), cls.steps.end(), [](const MaskedStep& step) { return step.feature == 0; });
  const double fma = costs.product * (1 + kPiece * static_cast<double>(pieces - 1));
  return density * fma * multiply_adds(plan, cls) + costs.element * pixels * channels +
         static_cast<double>(cls.block_count() * steps) * channels * costs.channel;
}

// The pixels rows x columns of a class with the taps that any of them meets, or a few more.
MaskedClass part_of(const MaskedClass& whole, const Part& rows, const Part& columns, const MaskedPlan& plan,
                    double density, const PlanMachine& machine) {
  MaskedClass part = whole;
  part.rows = rows.of(whole.rows);
  part.columns = columns.of(whole.columns);
  part.steps.clear();
  TapRectangle taps{};
  for (const MaskedStep& step : whole.steps) {
    // Steps with the same taps follow each other and stay alike: they meet the same pixels of g.
    const auto offered = [&](int tap_rows, int tap_columns) {
      return std::all_of(whole.steps.begin(), whole.steps.end(), [&](const MaskedStep& other) {
        return other.rows.tap != step.rows.tap || other.columns.tap != step.columns.tap ||
               masked_offered(tap_rows, tap_columns, other.vectors, machine.registers);
      });
    };
    if (step.feature == 0) taps = taps_met(rows, columns, step.rows, step.columns, offered);
    if (taps.empty()) continue;
    MaskedStep met = step;
    met.rows = rows.of(step.rows, taps.top, taps.bottom);
    met.columns = columns.of(step.columns, taps.left, taps.right);
    met.filter += taps.top * step.filter_row + taps.left * step.vectors * plan.lanes;
    part.steps.push_back(met);
  }
  part.points = part.steps.empty();
  block_pixels(plan.shape, block_budget(plan, part, density, machine), part);
  return part;
}

// Adds a class of products to the plan, its borders cut off where the whole gains by it.
void add_product(const MaskedClass& whole, double density, const PlanMachine& machine, MaskedPlan& plan) {
  // Every block passes by all filters once more, which may have to come from L3.
  const bool far = 4 * plan.shape.rhs_size() > machine.caches.l2_bytes / 2;
  const double pass = far ? costs_of(machine).channel / 2 * static_cast<double>(plan.shape.c) : 0;
  const auto cost_of = [&](const MaskedClass& cls) {
    return product_cost(plan, cls, density, machine) +
           pass * static_cast<double>(cls.block_count() * static_cast<int64_t>(cls.steps.size()));
  };
  std::vector<MaskedClass> best = {whole};
  double least = cost_of(whole);
  for_cuts(whole.rows, whole.columns, whole.steps, [&](const Part& rows, const Part& columns) {
    std::vector<MaskedClass> parts;
    double cost = 0;
    const auto add = [&](const Part& part_rows, const Part& part_columns) {
      parts.push_back(part_of(whole, part_rows, part_columns, plan, density, machine));
      cost += cost_of(parts.back());
    };
    add(rows, columns);
    for_borders(whole.rows.count, whole.columns.count, rows, columns, add);
    if (cost < 0.99 * least) least = cost, best = std::move(parts);
  });
  std::move(best.begin(), best.end(), std::back_inserter(plan.classes));
}

// Returns the multiply-adds of the dense BWI, which has no idle lanes for features that do not fill a vector.
double plan_product(double density, const PlanMachine& machine, MaskedPlan& plan) {
  double dense = 0;
  const ConvShape& shape = plan.shape;
  const std::vector<AxisClass> columns = split_axis(shape.w, shape.ow, shape.s, shape.stride_w, shape.pad_left);
  const std::vector<AxisClass> whole_rows = {{{0, 1, shape.w}, {}}};  // of rows that meet no tap: there may be many
  for (const AxisClass& row : split_axis(shape.h, shape.oh, shape.r, shape.stride_h, shape.pad_top)) {
    for (const AxisClass& column : row.taps.taps == 0 ? whole_rows : columns) {
      if (row.pixels.count == 0 || column.pixels.count == 0) continue;
      MaskedClass cls{};
      cls.rows = row.pixels;
      cls.columns = column.pixels;
      const int taps = row.taps.taps * column.taps.taps;
      cls.points = taps <= 1;
      cls.filter_block = shape.c;
      if (taps == 1) {
        add_point_steps(row.taps, column.taps, density, machine, plan, cls);
      } else if (taps > 1) {
        for (const TapAxis& rows : cut(row.taps)) {
          for (const TapAxis& columns : cut(column.taps)) add_steps(rows, columns, machine, plan, cls);
        }
      }
      block_pixels(shape, block_budget(plan, cls, density, machine), cls);
      dense += pixels_of(plan, cls) * static_cast<double>(shape.c * taps * shape.k) / plan.lanes;
      cls.points ? plan.classes.push_back(cls) : add_product(cls, density, machine, plan);
    }
  }
  return dense;
}

// Channels of an item.
void cut_channels(const PlanMachine& machine, MaskedPlan& plan) {
  const ConvShape& shape = plan.shape;
  // Lists and values of a product, for each pixel and channel, share L2 with filters that pass by.
  // Where all classes are of points, items have all channels, unless threads are short of blocks: block_budget() sees
  // to their room.
  int64_t pixels = 0, blocks = 0;
  for (const MaskedClass& cls : plan.classes) {
    if (!cls.points) pixels = std::max(pixels, cls.block_images * cls.block_rows * cls.block_columns + 64);
    blocks += cls.block_count();
  }
  const int64_t unit = std::max(plan.lanes, 16);
  const int64_t most = pixels == 0 ? round_up(shape.c, unit)
                                   : std::max(unit, machine.caches.l2_bytes / 2 / (kEntryBytes * pixels) / unit * unit);
  int64_t pieces = ceil_div(shape.c, most);
  // Few blocks: threads share them by channels. Each copies g again.
  if (!plan.serial && blocks * pieces < kThreadBlocks * machine.threads && machine.threads > 1) {
    pieces = std::max(pieces, std::min(ceil_div(kThreadBlocks * machine.threads, blocks), ceil_div(shape.c, 2 * unit)));
  }
  plan.channel_block = round_up(ceil_div(shape.c, pieces), unit);
}

// What reading x for its zeros costs the ordinary BWI, per element: most where operands do not stay in the caches,
// unless there is little to do for each of their lines.
double zero_cost(const ConvShape& shape, const PlanMachine& machine) {
  constexpr double kNear = 0.25, kMuch = 8192;
  const double zero = costs_of(machine).zero;
  if (4 * (2 * shape.lhs_size() + shape.out_size()) < machine.caches.l3_bytes / 4) return kNear * zero;
  return zero * (kNear + (1 - kNear) * std::min(1.0, static_cast<double>(shape.rhs_size()) / kMuch));
}

// `dense`: multiply-adds of the dense BWI.
void estimate(const Densities& densities, const PlanMachine& machine, double dense, MaskedPlan& plan) {
  const Costs costs = costs_of(machine);
  const ConvShape& shape = plan.shape;
  double product = 0, elements = 0;
  for (const MaskedClass& cls : plan.classes) {
    product += product_cost(plan, cls, densities.lhs, machine);
    elements += pixels_of(plan, cls) * static_cast<double>(shape.c);
  }
  if (4 * plan.filter_floats > machine.caches.l2_bytes / 2) product += costs.filter * plan.filter_floats / plan.lanes;
  plan.product_cost = product;
  const double zero = zero_cost(shape, machine) * elements;
  // The ordinary BWI has vectors of input features, of which the last may be mostly idle.
  dense *= static_cast<double>(round_up(shape.c, lanes_for(shape.c, machine.caches, plan.lanes))) /
           static_cast<double>(shape.c);
  const bool one_tap = shape.r * shape.s == 1;
  const double share =
      one_tap ? kSkippingCost1x1 + kSkippingSlope1x1 * densities.g : kSkippingCost + kSkippingSlope * densities.g;
  plan.g_cost = dense * std::min(kSkippingMost, share) + zero;
  plan.dense_cost = dense + zero;
}

}  // namespace

MaskedPlan plan_masked(const ConvShape& given, Mode mode, const Densities& densities, const PlanMachine& machine) {
  MaskedPlan plan{};
  plan.shape = given.flattened();
  const ConvShape& shape = plan.shape;
  plan.lanes = machine.lanes;
  plan.stream = streams_lhs(shape, machine);
  const double dense = plan_product(densities.lhs, machine, plan);
  estimate(densities, machine, dense, plan);
  const double ordinary = mode == Mode::kAuto ? std::min(plan.dense_cost, plan.g_cost) : plan.g_cost;
  plan.serial = too_small_for_threads(plan.product_cost, plan.filter_floats / plan.lanes);
  cut_channels(machine, plan);
  plan.product = plan.product_cost < costs_of(machine).margin * ordinary;
  plan.sparse = plan.product || mode == Mode::kSparse || (mode == Mode::kAuto && plan.g_cost < plan.dense_cost);
  return plan;
}

Description describe_masked(const ConvShape& shape, const Densities& densities, const PlanMachine& machine) {
  const MaskedPlan plan = plan_masked(shape, Mode::kAuto, densities, machine);
  Description out;
  const MaskedClass& cls = plan.classes.front();
  out.add("path", plan.product ? "product" : !plan.sparse ? "dense" : "g");
  out.add("channel_block", plan.channel_block);
  out.add("pixel_classes", plan.classes.size());
  out.add_block("pixel_block", cls.block_images, cls.block_rows, cls.block_columns);
  out.add("steps", cls.steps.size());
  if (!cls.steps.empty()) {
    const MaskedStep& step = cls.steps.front();
    if (cls.points) out.add("filter_block", cls.filter_block);
    out.add("step", std::to_string(step.rows.taps) + "x" + std::to_string(step.columns.taps) + "x" +
                        std::to_string(step.vectors * plan.lanes));
  }
  out.add("serial", plan.serial);
  out.add("product_cost", plan.product_cost);
  out.add("g_cost", plan.g_cost);
  out.add("dense_cost", plan.dense_cost);
  return out;
}

}  // namespace sparsetrain
