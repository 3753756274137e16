// Masked BWI: runs a MaskedPlan. kernels_masked.h has the algorithm, plan_masked.h the blocking.
#include <algorithm>
#include <vector>

#include "conv.h"
#include "isa.h"
#include "parallel.h"
#include "plan_masked.h"
#include "run_data.h"
#include "run_masked.h"
#include "zeros.h"

namespace sparsetrain {
namespace {

constexpr int64_t kPackChannels = 16;  // of the kernel, packed at a time

class MaskedRun {
 public:
  MaskedRun(const MaskedPlan& plan, const Kernels& kernels, int threads, ConstTensor g, ConstTensor rhs, ConstTensor x,
            Tensor dlhs, float* filter)
      : plan_(plan),
        threads_(threads),
        kernels_(kernels),
        g_(g),
        rhs_(rhs),
        x_(x),
        dlhs_(dlhs),
        dtype_(index_of(g.dtype)),
        filter_(filter) {
    stream_ = plan.stream && fills_lines(dlhs);
    for (const MaskedClass& cls : plan.classes) {
      if (cls.points) continue;
      for (const MaskedStep& step : cls.steps) {
        const int64_t positions = cls.position(cls.block_images - 1, cls.block_rows + step.rows.taps - 2,
                                               cls.block_columns + step.columns.taps - 1);
        g_positions_ = std::max(g_positions_, positions);
        g_floats_ = std::max(g_floats_, positions * step.vectors * plan.lanes);
      }
      slots_ = std::max(slots_, round_up(cls.block_images * cls.block_rows * cls.block_columns, 64));
    }
    for (size_t i = 0; i < plan.filters.size(); ++i) {
      if (plan.filters[i].feature == 0) first_filters_.push_back(i);
    }
    first_filters_.push_back(plan.filters.size());
    capacity_ = slots_ + 16;  // room for whole vectors; lists at multiples of 64 would share cache sets
  }

  int64_t packs() const {
    return static_cast<int64_t>(first_filters_.size() - 1) * ceil_div(plan_.shape.c, kPackChannels);
  }

  // Copies the filters of all steps that meet the same taps, for some channels, to the order in which products read
  // them: the kernel is read line by line.
  void pack(int64_t index) const {
    const ConvShape& s = plan_.shape;
    const int64_t pieces = ceil_div(s.c, kPackChannels);
    const size_t group = static_cast<size_t>(index / pieces);
    const MaskedStep* first = plan_.filters.data() + first_filters_[group];
    const MaskedStep* last = plan_.filters.data() + first_filters_[group + 1];
    const int64_t begin = index % pieces * kPackChannels, end = std::min(s.c, begin + kPackChannels);
    for (int64_t row = 0; row < first->rows.taps; ++row) {
      for (int64_t column = 0; column < first->columns.taps; ++column) {
        const int64_t r = first->rows.tap + row * first->rows.tap_step;
        const int64_t q = first->columns.tap + column * first->columns.tap_step;
        for (int64_t c = begin; c < end; ++c) {
          const int64_t from = ((r * s.s + q) * s.c + c) * s.k;
          for (const MaskedStep* step = first; step != last; ++step) {
            const int64_t width = static_cast<int64_t>(step->vectors) * plan_.lanes;
            float* to = filter_ + step->filter + c * step->filter_channel + row * step->filter_row + column * width;
            kernels_.data.widen[dtype_](rhs_.at(from + step->feature), to, step->features);
            std::fill(to + step->features, to + width, 0.0f);
          }
        }
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
    if (item.cls->points) return run_points(item);
    const Item none = {item.cls, {}, 0, 0}, ahead = index + threads_ < items() ? item_of(index + threads_) : none;
    run_product(item, ahead.cls->points ? none : ahead);
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
    return {cls, cls->block(block, plan_.shape.n), channel, std::min(plan_.channel_block, plan_.shape.c - channel)};
  }

  // Lines that so many features of a pixel of g, channels of one of x lie in.
  int64_t g_lines(int64_t features) const { return lines_of(features * g_.size(), plan_.shape.k * g_.size()); }
  int64_t x_lines(int64_t channels) const { return lines_of(channels * x_.size(), plan_.shape.c * x_.size()); }

  // Elements before channel 0 of a pixel in x and dlhs.
  int64_t pixel(const MaskedClass& cls, int64_t n, int64_t row, int64_t column) const {
    const ConvShape& s = plan_.shape;
    const int64_t y = cls.rows.start + row * cls.rows.step, x = cls.columns.start + column * cls.columns.step;
    return ((n * s.h + y) * s.w + x) * s.c;
  }

  // `ahead`: the item that is probably this thread's next, if it is of a product.
  void run_product(const Item& item, const Item& ahead) const {
    const MaskedClass& cls = *item.cls;
    const Block& block = item.block;
    const int64_t channels = item.channels, lines = round_up(channels, 16);
    const int64_t zeros_size = plan_.shape.k + 64, words = slots_ / 64;
    Scratch& scratch = Scratch::local();
    scratch.begin(Scratch::size<void*>(slots_) * 3 + Scratch::size<void*>(g_positions_) * 2 +
                  Scratch::size<uint16_t>(slots_) + Scratch::size<float>(zeros_size) +
                  Scratch::size<uint64_t>(lines * words) + Scratch::size<uint16_t>(lines * capacity_) +
                  Scratch::size<uint16_t>(lines + 16) + Scratch::size<float>(lines * capacity_) +
                  Scratch::size<float>(g_floats_));
    const void** x_pixels = scratch.take<const void*>(slots_);
    void** pixels = scratch.take<void*>(slots_);
    const void** ahead_x = scratch.take<const void*>(slots_);
    const void** g_pixels = scratch.take<const void*>(g_positions_);
    const void** ahead_g = scratch.take<const void*>(g_positions_);
    uint16_t* positions = scratch.take<uint16_t>(slots_);
    float* zeros = scratch.take<float>(zeros_size);
    uint64_t* masks = scratch.take<uint64_t>(lines * words);
    uint16_t* lists = scratch.take<uint16_t>(lines * capacity_);
    uint16_t* counts = scratch.take<uint16_t>(lines + 16);
    float* values = scratch.take<float>(lines * capacity_);
    float* g = scratch.take<float>(g_floats_);

    const int capacity = static_cast<int>(capacity_), channel_count = static_cast<int>(channels);
    std::fill_n(zeros, zeros_size, 0.0f);
    const int64_t slots = point_at(x_, item, x_pixels);
    point_at(dlhs_, item, pixels);
    for (int64_t n = 0, slot = 0; n < block.images; ++n) {
      for (int64_t row = 0; row < block.rows; ++row) {
        const int64_t first = cls.position(n, row, 0);
        for (int64_t i = 0; i < block.columns; ++i) positions[slot++] = static_cast<uint16_t>(first + i);
      }
    }
    std::fill(x_pixels + slots, x_pixels + round_up(slots, 64), nullptr);
    std::fill(positions + slots, positions + round_up(slots, 64), uint16_t{0});
    const MaskedKernels& table = kernels_.masked;
    const int used_words = static_cast<int>(ceil_div(slots, 64));
    table.lists[dtype_]({.pixels = x_pixels,
                         .words = used_words,
                         .channels = channel_count,
                         .positions = positions,
                         .masks = masks,
                         .lists = lists,
                         .capacity = capacity,
                         .counts = counts});
    const int64_t ahead_slots = point_at(x_, ahead, ahead_x), steps = static_cast<int64_t>(cls.steps.size());
    int64_t g_count = 0;
    for (int64_t i = 0; i < steps; ++i) {
      const MaskedStep& step = cls.steps[i];
      const int width = step.vectors * plan_.lanes, choice = __builtin_ctz(static_cast<unsigned>(step.vectors));
      // Steps differ in features first, then in taps.
      if (step.feature == 0) g_count = point_at_g(step, block, cls, zeros, g_pixels);
      kernels_.weights.copy[dtype_]({.pixels = g_pixels,
                                     .positions = g_count,
                                     .feature = step.feature,
                                     .features = step.features,
                                     .to = g,
                                     .width = width});
      // While a step computes, the g of the next one comes into L2, or of the next item, and a share of the latter's x.
      WeightsPrefetch next_g = {g_pixels, g_count, (step.feature + width) * g_.size(), g_lines(width)};
      if (i + 1 == steps) {
        next_g = {ahead_g, 0, 0, next_g.lines};
        if (ahead_slots > 0) {
          const MaskedClass& next = *ahead.cls;
          next_g.count = point_at_g(next.steps.front(), ahead.block, next, zeros, ahead_g);
        }
      }
      const int64_t begin = ahead_slots * i / steps, end = ahead_slots * (i + 1) / steps;
      const WeightsPrefetch next_x = {ahead_x + begin, end - begin, 0, x_lines(ahead.channels)};
      table.product[step.rows.taps][step.columns.taps][choice](
          {.lists = lists,
           .counts = counts,
           .capacity = capacity,
           .channels = channel_count,
           .g = g,
           .tap_row = static_cast<int>(cls.pitch),
           .filter = filter_ + step.filter + item.channel * step.filter_channel,
           .filter_channel = step.filter_channel,
           .filter_row = step.filter_row,
           .values = values,
           .first = i == 0,
           .next = {next_g, next_x}});
    }
    table.store[index_of(dlhs_.dtype)]({.masks = masks,
                                        .words = used_words,
                                        .channels = channel_count,
                                        .values = values,
                                        .capacity = capacity,
                                        .pixels = pixels,
                                        .slots = static_cast<int>(slots),
                                        .stream = stream_,
                                        .taken = counts});
  }

  // An item of a class that meets at most one tap.
  void run_points(const Item& item) const {
    const MaskedClass& cls = *item.cls;
    const Block& block = item.block;
    const int64_t channels = item.channels, filter_block = std::min(cls.filter_block, round_up(channels, plan_.lanes));
    const int64_t blocks = ceil_div(channels, filter_block), count = block.images * block.rows * block.columns;
    const int64_t zeros_size = plan_.shape.k + 64, vectors = ceil_div(channels, plan_.lanes);
    const int64_t pitch = round_up(count * filter_block, 64) + 32;
    Scratch& scratch = Scratch::local();
    scratch.begin(Scratch::size<void*>(count) * 2 + Scratch::size<void*>(count + kPointsAhead) +
                  Scratch::size<float>(zeros_size) + Scratch::size<uint16_t>(filter_block + 16) +
                  Scratch::size<uint16_t>(count * vectors) + Scratch::size<uint16_t>(blocks * pitch) +
                  Scratch::size<int>(blocks * (count + 1)) + Scratch::size<float>(blocks * pitch));
    const void** x_pixels = scratch.take<const void*>(count);
    void** pixels = scratch.take<void*>(count);
    const void** g_pixels = scratch.take<const void*>(count + kPointsAhead);
    float* zeros = scratch.take<float>(zeros_size);
    uint16_t* offsets = scratch.take<uint16_t>(filter_block + 16);
    uint16_t* masks = scratch.take<uint16_t>(count * vectors);
    uint16_t* lists = scratch.take<uint16_t>(blocks * pitch);
    int* starts = scratch.take<int>(blocks * (count + 1));
    float* values = scratch.take<float>(blocks * pitch);

    point_at(dlhs_, item, pixels);
    const int point_count = static_cast<int>(count), channel_count = static_cast<int>(channels);
    const MaskedKernels& table = kernels_.masked;
    if (!cls.steps.empty()) {
      const MaskedStep& first = cls.steps.front();
      const int64_t width = static_cast<int64_t>(first.vectors) * plan_.lanes;
      for (int64_t c = 0; c < filter_block; ++c) offsets[c] = static_cast<uint16_t>(c * width / 2);
      point_at(x_, item, x_pixels);
      table.point_lists[dtype_]({.pixels = x_pixels,
                                 .count = point_count,
                                 .channels = channel_count,
                                 .block = static_cast<int>(filter_block),
                                 .offsets = offsets,
                                 .lists = lists,
                                 .pitch = pitch,
                                 .starts = starts,
                                 .masks = masks});
      std::fill_n(zeros, zeros_size, 0.0f);
      point_at_g(first, block, {block.columns, block.rows}, zeros, g_pixels);
      std::fill_n(g_pixels + count, kPointsAhead, zeros);
    }
    for (const MaskedStep& step : cls.steps) {
      const int64_t width = static_cast<int64_t>(step.vectors) * plan_.lanes;
      for (int64_t b = 0; b < blocks; ++b) {
        table.point_product[dtype_][step.vectors](
            {.lists = lists + b * pitch,
             .starts = starts + b * (count + 1),
             .count = point_count,
             .g = g_pixels,
             .feature = step.feature,
             .features = step.features,
             .filter = filter_ + step.filter + (item.channel + b * filter_block) * width,
             .values = values + b * pitch,
             .first = step.feature == 0});
      }
    }
    table.point_store[index_of(dlhs_.dtype)]({.masks = cls.steps.empty() ? nullptr : masks,
                                              .values = values,
                                              .pitch = pitch,
                                              .starts = starts,
                                              .pixels = pixels,
                                              .count = point_count,
                                              .channels = channel_count,
                                              .block = static_cast<int>(filter_block),
                                              .stream = stream_});
  }

  // Channel 0 of the item's pixels of x or dlhs, in the order of their slots; returns how many.
  template <class View, class Pointer>
  int64_t point_at(const View& tensor, const Item& item, Pointer* pixels) const {
    const Block& block = item.block;
    const int64_t step = item.cls->columns.step * plan_.shape.c;
    Pointer* to = pixels;
    for (int64_t n = 0; n < block.images; ++n) {
      for (int64_t row = 0; row < block.rows; ++row) {
        int64_t at = pixel(*item.cls, block.image + n, block.row + row, block.column) + item.channel;
        for (int64_t column = 0; column < block.columns; ++column, at += step) *to++ = tensor.at(at);
      }
    }
    return to - pixels;
  }

  // Points at the pixels of g that a step's taps meet in a block, zeros where they meet padding. Returns how many.
  int64_t point_at_g(const MaskedStep& step, const Block& block, const Positions& positions, const float* zeros,
                     const void** pixels) const {
    const ConvShape& s = plan_.shape;
    const Meeting rows(step.rows, block.row, block.rows), columns(step.columns, block.column, block.columns);
    const int64_t count = positions.position(block.images - 1, rows.positions - 1, columns.positions);
    std::fill_n(pixels, count, zeros);
    for (int64_t n = 0; n < block.images; ++n) {
      for (int64_t row = rows.begin; row < rows.end; ++row) {
        int64_t from = (((block.image + n) * s.oh + rows.at + row) * s.ow + columns.at + columns.begin) * s.k;
        const void** to = pixels + positions.position(n, row, columns.begin);
        for (int64_t x = columns.begin; x < columns.end; ++x, from += s.k) *to++ = g_.at(from);
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
  std::vector<size_t> first_filters_;  // of the plan's, where other taps begin; and how many there are
  int64_t slots_ = 0, g_positions_ = 1, g_floats_ = 1, capacity_;
};

}  // namespace

void run_masked(const MaskedPlan& plan, const Kernels& kernels, const ConvShape& shape, Mode mode,
                const Densities& densities, ConstTensor g, ConstTensor rhs, ConstTensor x, Tensor dlhs,
                Executor& executor) {
  count(plan.sparse ? "conv_bwd_input_masked/sparse" : "conv_bwd_input_masked/dense");
  if (!plan.product) {
    // In auto it may still skip, tile by tile. Dense sweeps zero as they write, where walks pass over their sums again:
    // a large result should leave something to skip for that.
    constexpr double kFull = 0.97;
    const bool large = 4 * shape.lhs_size() > machine().l3_bytes / 4;
    const bool full = mode == Mode::kAuto && large && densities.g > kFull;
    conv_bwd_input_where(kernels, shape, full ? Mode::kDense : mode, densities.g, g, rhs, x, dlhs, executor);
    return;
  }
  SharedBuffer filter((plan.filter_floats + 16) * sizeof(float));
  Executor& threads = helpers_unless(plan.serial, executor);
  const MaskedRun run(plan, kernels, threads.concurrency(), g, rhs, x, dlhs, filter.as<float>());
  run_phases(threads, {{run.packs(), [&run](int64_t index) { run.pack(index); }},
                       {run.items(), [&run](int64_t index) { run.run(index); }}});
}

void conv_bwd_input_masked(const ConvShape& shape, Mode mode, ConstTensor g, ConstTensor rhs, ConstTensor x,
                           Tensor dlhs, Executor& executor) {
  const Kernels& k = kernels();  // once: another may be set meanwhile
  Densities densities;
  if (mode == Mode::kDense) {
    count("conv_bwd_input_masked/dense");
    return conv_bwd_input_where(k, shape, mode, densities.g, g, rhs, x, dlhs, executor);
  }
  densities.lhs = density(k, x, shape.lhs_size());
  densities.g = density(k, g, shape.out_size());
  if (zero_of_zeros(k, densities.lhs, x, shape.lhs_size(), {{dlhs, shape.lhs_size()}}, executor) ||
      zero_of_zeros(k, densities.g, g, shape.out_size(), {{dlhs, shape.lhs_size()}}, executor)) {
    count("conv_bwd_input_masked/sparse");
    return;
  }
  const MaskedPlan plan =
      plan_masked(shape, mode, densities, {machine(), k.lanes, k.registers, executor.concurrency()});
  run_masked(plan, k, shape, mode, densities, g, rhs, x, dlhs, executor);
}

}  // namespace sparsetrain
