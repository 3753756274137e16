// Masked BWI: runs a MaskedPlan. kernels_masked.h has the algorithm, plan_masked.h the blocking.
#include <algorithm>
#include <cstring>
#include <vector>

#include "conv.h"
#include "isa.h"
#include "parallel.h"
#include "plan_masked.h"
#include "run_data.h"

namespace sparsetrain {
namespace {

constexpr int64_t kPackChannels = 32;  // of the kernel, packed at a time

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// A block of pixels of a class: first image, row and column, and how many of each.
struct Block {
  int64_t image, row, column, images, rows, columns;
};

class MaskedRun {
 public:
  MaskedRun(const MaskedPlan& plan, int threads, ConstTensor g, ConstTensor rhs, ConstTensor x, Tensor dlhs,
            float* filter)
      : plan_(plan),
        threads_(threads),
        kernels_(kernels()),
        g_(g),
        rhs_(rhs),
        x_(x),
        dlhs_(dlhs),
        dtype_(index_of(g.dtype)),
        filter_(filter) {
    // Vectors of narrow values are half lines, which would leave the write-combining buffers one by one.
    stream_ = plan.stream && dlhs.dtype == DType::kF32 && reinterpret_cast<uintptr_t>(dlhs.data) % 64 == 0;
    for (const MaskedClass& cls : plan.classes) {
      for (const MaskedStep& step : cls.steps) {
        steps_.push_back(&step);
        const int64_t positions = position(cls, cls.block_images - 1, cls.block_rows + step.rows.taps - 2,
                                           cls.block_columns + step.columns.taps - 1);
        g_positions_ = std::max(g_positions_, positions);
        g_floats_ = std::max(g_floats_, positions * step.vectors * plan.lanes);
      }
      slots_ = std::max(slots_, round_up(cls.block_images * cls.block_rows * cls.block_columns, 64));
    }
    capacity_ = slots_ + 16;  // room for whole vectors; lists at multiples of 64 would share cache sets
  }

  int64_t packs() const { return static_cast<int64_t>(steps_.size()) * ceil_div(plan_.shape.c, kPackChannels); }

  // Copies the filters of a step, for some channels, to the order in which products read them.
  void pack(int64_t index) const {
    const ConvShape& s = plan_.shape;
    const int64_t pieces = ceil_div(s.c, kPackChannels);
    const MaskedStep& step = *steps_[index / pieces];
    const int64_t begin = index % pieces * kPackChannels, end = std::min(s.c, begin + kPackChannels);
    const int64_t width = static_cast<int64_t>(step.vectors) * plan_.lanes, taps = step.rows.taps * step.columns.taps;
    for (int64_t t = 0; t < taps; ++t) {
      const int64_t r = step.rows.tap + t / step.columns.taps * step.rows.tap_step;
      const int64_t q = step.columns.tap + t % step.columns.taps * step.columns.tap_step;
      int64_t from = ((r * s.s + q) * s.c + begin) * s.k + step.feature;
      float* to = filter_ + step.filter + (begin * taps + t) * width;
      for (int64_t c = begin; c < end; ++c, from += s.k, to += taps * width) {
        kernels_.data.widen[dtype_](rhs_.at(from), to, step.features);
        std::fill(to + step.features, to + width, 0.0f);
      }
    }
  }

  int64_t items() const {
    int64_t blocks = 0;
    for (const MaskedClass& cls : plan_.classes) blocks += cls.block_count();
    return blocks * ceil_div(plan_.shape.c, plan_.channel_block);
  }

  void run(int64_t index) const {
    const Item item = item_of(index);
    const int64_t next = index + threads_;  // probably this thread's
    run_item(item, next < items() ? item_of(next) : Item{item.cls, {}, 0, 0});
  }

 private:
  struct Item {
    const MaskedClass* cls;
    Block block;
    int64_t channel, channels;
  };

  Item item_of(int64_t index) const {
    const int64_t pieces = ceil_div(plan_.shape.c, plan_.channel_block);
    const int64_t channel = index % pieces * plan_.channel_block;
    int64_t block = index / pieces;
    const MaskedClass* cls = plan_.classes.data();
    for (; block >= cls->block_count(); ++cls) block -= cls->block_count();
    return {cls, block_of(*cls, block), channel, std::min(plan_.channel_block, plan_.shape.c - channel)};
  }

  static int64_t position(const MaskedClass& cls, int64_t image, int64_t row, int64_t column) {
    return (image * cls.image_rows + row) * cls.pitch + column;
  }

  Block block_of(const MaskedClass& cls, int64_t index) const {
    Block b;
    b.column = index % cls.blocks[2] * cls.block_columns;
    b.row = index / cls.blocks[2] % cls.blocks[1] * cls.block_rows;
    b.image = index / (cls.blocks[2] * cls.blocks[1]) * cls.block_images;
    b.images = std::min(cls.block_images, plan_.shape.n - b.image);
    b.rows = std::min(cls.block_rows, cls.rows.count - b.row);
    b.columns = std::min(cls.block_columns, cls.columns.count - b.column);
    return b;
  }

  // Elements before channel 0 of a pixel in x and dlhs.
  int64_t pixel(const MaskedClass& cls, int64_t n, int64_t row, int64_t column) const {
    const ConvShape& s = plan_.shape;
    const int64_t y = cls.rows.start + row * cls.rows.step, x = cls.columns.start + column * cls.columns.step;
    return ((n * s.h + y) * s.w + x) * s.c;
  }

  void run_item(const Item& item, const Item& ahead) const {
    const MaskedClass& cls = *item.cls;
    const Block& block = item.block;
    const int64_t channels = item.channels;
    const int64_t zeros_size = std::max(channels, plan_.shape.k) + 64, words = slots_ / 64;
    const int64_t lines = round_up(channels, 16);
    Scratch& scratch = Scratch::local();
    scratch.begin(Scratch::size<void*>(slots_) * 2 + Scratch::size<void*>(g_positions_) +
                  Scratch::size<uint16_t>(slots_) + Scratch::size<float>(zeros_size) +
                  Scratch::size<uint64_t>(lines * words) + Scratch::size<uint16_t>(lines * capacity_) +
                  Scratch::size<uint16_t>(lines + 16) + Scratch::size<float>(lines * capacity_) +
                  Scratch::size<float>(g_floats_) + Scratch::size<float>(capacity_));
    const void** x_pixels = scratch.take<const void*>(slots_);
    void** pixels = scratch.take<void*>(slots_);
    const void** g_pixels = scratch.take<const void*>(g_positions_);
    uint16_t* positions = scratch.take<uint16_t>(slots_);
    float* zeros = scratch.take<float>(zeros_size);
    uint64_t* masks = scratch.take<uint64_t>(lines * words);
    uint16_t* lists = scratch.take<uint16_t>(lines * capacity_);
    uint16_t* counts = scratch.take<uint16_t>(lines + 16);
    float* values = scratch.take<float>(lines * capacity_);
    float* g = scratch.take<float>(g_floats_);
    float* unused = scratch.take<float>(capacity_);  // pack's values: only its masks are wanted

    const int capacity = static_cast<int>(capacity_), channel_count = static_cast<int>(channels);
    std::fill_n(zeros, zeros_size, 0.0f);
    const int64_t slots = point_at_x(item, x_pixels);
    for (int64_t slot = 0; slot < slots; ++slot) {
      const int64_t row = slot / block.columns;
      pixels[slot] = dlhs_.at(slot_pixel(item, row / block.rows, row % block.rows, slot % block.columns));
      positions[slot] = static_cast<uint16_t>(position(cls, row / block.rows, row % block.rows, slot % block.columns));
    }
    // Nothing is active in the rest of the slots, nor where no tap meets the class.
    std::fill(x_pixels + (cls.steps.empty() ? 0 : slots), x_pixels + slots_, zeros);
    std::fill(positions + slots, positions + slots_, uint16_t{0});
    kernels_.weights.pack[dtype_]({x_pixels, static_cast<int>(slots_), channel_count, unused, 0, masks});
    const MaskedKernels& table = kernels_.masked;
    table.lists({masks, static_cast<int>(words), channel_count, positions, lists, capacity, counts});
    // While a step computes, the g of the next one comes into L2, and a share of the next item's x.
    const int64_t ahead_slots = point_at_x(ahead, x_pixels), steps = cls.steps.size();
    for (int64_t i = 0; i < steps; ++i) {
      const MaskedStep& step = cls.steps[i];
      const int width = step.vectors * plan_.lanes, choice = __builtin_ctz(static_cast<unsigned>(step.vectors));
      const int64_t count = point_at_g(cls, step, block, zeros, g_pixels);
      kernels_.weights.copy[dtype_]({g_pixels, count, step.feature, step.features, g, width});
      const WeightsPrefetch next_g = {g_pixels, i + 1 < steps ? count : 0, (step.feature + width) * g_.size(),
                                      ceil_div(width * g_.size(), 64)};
      const int64_t begin = ahead_slots * i / steps, end = ahead_slots * (i + 1) / steps;
      const WeightsPrefetch next_x = {x_pixels + begin, end - begin, 0, ceil_div(ahead.channels * x_.size(), 64)};
      const float* filter = filter_ + step.filter + item.channel * step.rows.taps * step.columns.taps * width;
      table.product[step.rows.taps][step.columns.taps][choice]({lists,
                                                                counts,
                                                                capacity,
                                                                channel_count,
                                                                g,
                                                                static_cast<int>(cls.pitch),
                                                                filter,
                                                                values,
                                                                i == 0,
                                                                {next_g, next_x}});
    }
    table.store[index_of(dlhs_.dtype)]({masks, static_cast<int>(words), channel_count, values, capacity, pixels,
                                        static_cast<int>(slots), stream_, counts});
  }

  // Elements before the item's first channel of a pixel of its block.
  int64_t slot_pixel(const Item& item, int64_t n, int64_t row, int64_t column) const {
    const Block& block = item.block;
    return pixel(*item.cls, block.image + n, block.row + row, block.column + column) + item.channel;
  }

  // Channel 0 of the item's pixels of x, in the order of their slots; returns how many.
  int64_t point_at_x(const Item& item, const void** pixels) const {
    const Block& block = item.block;
    const void** to = pixels;
    for (int64_t n = 0; n < block.images; ++n) {
      for (int64_t row = 0; row < block.rows; ++row) {
        for (int64_t column = 0; column < block.columns; ++column) {
          *to++ = x_.at(slot_pixel(item, n, row, column));
        }
      }
    }
    return to - pixels;
  }

  // The pixels of g that a step's taps meet in a block, zeros where they meet padding.
  int64_t point_at_g(const MaskedClass& cls, const MaskedStep& step, const Block& block, const float* zeros,
                     const void** pixels) const {
    const ConvShape& s = plan_.shape;
    const TapAxis &rows = step.rows, &columns = step.columns;
    const int64_t want_rows = block.rows + rows.taps - 1, want_columns = block.columns + columns.taps - 1;
    const int64_t first_row = block.row + rows.offset, first = block.column + columns.offset;
    const int64_t begin_row = std::clamp<int64_t>(-first_row, 0, want_rows);
    const int64_t end_row = std::clamp<int64_t>(rows.count - first_row, begin_row, want_rows);
    const int64_t begin = std::clamp<int64_t>(-first, 0, want_columns);
    const int64_t end = std::clamp<int64_t>(columns.count - first, begin, want_columns);
    const int64_t count = position(cls, block.images - 1, want_rows - 1, want_columns);
    std::fill_n(pixels, count, zeros);
    for (int64_t n = 0; n < block.images; ++n) {
      for (int64_t row = begin_row; row < end_row; ++row) {
        const int64_t from = (((block.image + n) * s.oh + first_row + row) * s.ow + first) * s.k;
        for (int64_t x = begin; x < end; ++x) pixels[position(cls, n, row, x)] = g_.at(from + x * s.k);
      }
    }
    return count;
  }

  const MaskedPlan& plan_;
  int threads_;
  const Kernels& kernels_;
  ConstTensor g_, rhs_, x_;
  Tensor dlhs_;
  int dtype_;  // of the operands, for tables of kernels
  float* filter_;
  bool stream_;
  std::vector<const MaskedStep*> steps_;
  int64_t slots_ = 0, g_positions_ = 1, g_floats_ = 1, capacity_;
};

}  // namespace

void conv_bwd_input_masked(const ConvShape& shape, Mode mode, ConstTensor g, ConstTensor rhs, ConstTensor x,
                           Tensor dlhs, Executor& executor) {
  const Kernels& isa = kernels();
  const int64_t size = shape.n * shape.h * shape.w * shape.c;
  Densities densities;
  if (mode != Mode::kDense) {
    densities.lhs = density(x, size);
    densities.g = density(g, shape.n * shape.oh * shape.ow * shape.k);
  }
  const MaskedPlan plan =
      plan_masked(shape, mode, densities, {machine(), isa.lanes, isa.registers, executor.concurrency()});
  count(plan.sparse ? "conv_bwd_input_masked/sparse" : "conv_bwd_input_masked/dense");
  if (!plan.product) {
    // In auto it may still skip, tile by tile.
    conv_bwd_input_where(shape, mode, g, rhs, x, dlhs, executor);
    return;
  }
  SharedBuffer filter((plan.filter_floats + 16) * sizeof(float));
  const MaskedRun run(plan, executor.concurrency(), g, rhs, x, dlhs, filter.as<float>());
  run_phases(executor, {{run.packs(), [&run](int64_t index) { run.pack(index); }},
                        {run.items(), [&run](int64_t index) { run.run(index); }}});
}

}  // namespace sparsetrain
