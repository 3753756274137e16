// Runs FWD and BWI over a DataPlan: packs the kernel, then tile by tile scans and sweeps.
#include <algorithm>
#include <cstring>
#include <vector>

#include "conv.h"
#include "isa.h"
#include "parallel.h"
#include "plan_data.h"
#include "run_data.h"
#include "zeros.h"

namespace sparsetrain {
namespace {

// The kernel in the order in which the sweeps read it: [feature block][class][channel block][kernel row][strand], each
// a filter block [channel][tap][feature].
class PackedKernel {
 public:
  PackedKernel(const DataPlan& plan, int lanes) : plan_(plan), lanes_(lanes) {
    int64_t taps = 0;
    for (const ColumnClass& c : plan.classes) {
      taps_before_.push_back(taps);
      for (const Strand& s : c.strands) taps += s.taps;
    }
    floats_per_feature_ = taps * plan.kernel_rows * padded_channels();
  }

  int64_t padded_channels() const { return plan_.channel_blocks() * plan_.channel_block; }
  int64_t vectors(int64_t block) const { return block + 1 == plan_.blocks ? plan_.last_vectors : plan_.vectors; }
  size_t floats() const {
    return static_cast<size_t>(floats_per_feature_) * lanes_ *
           ((plan_.blocks - 1) * plan_.vectors + plan_.last_vectors);
  }

  // Floats of the filter blocks of one kernel row: all strands of a class.
  int64_t row_floats(int64_t block, size_t cls) const {
    int64_t taps = 0;
    for (const Strand& s : plan_.classes[cls].strands) taps += s.taps;
    return taps * plan_.channel_block * vectors(block) * lanes_;
  }

  size_t offset(int64_t block, size_t cls, int64_t channel_block, int64_t r) const {
    const int64_t features = vectors(block) * lanes_;
    return static_cast<size_t>(block * floats_per_feature_ * plan_.vectors * lanes_ +
                               taps_before_[cls] * padded_channels() * plan_.kernel_rows * features +
                               (channel_block * plan_.kernel_rows + r) * row_floats(block, cls));
  }

  // The filter blocks of one kernel row.
  void pack_row(const Kernels& kernels, ConstTensor rhs, int64_t block, size_t cls, int64_t channel_block, int64_t r,
                float* dst) const {
    const int64_t features = vectors(block) * lanes_, f0 = block * plan_.vectors * lanes_;
    const int64_t valid = std::min(features, plan_.features - f0), whole = (valid + lanes_ - 1) / lanes_ * lanes_;
    const int64_t c0 = channel_block * plan_.channel_block;
    const int64_t channels = std::min<int64_t>(plan_.channel_block, plan_.channels - c0);
    for (const Strand& strand : plan_.classes[cls].strands) {
      const int64_t pitch = strand.taps * features;
      for (int t = 0; t < strand.taps; ++t) {
        const int64_t tap = r * plan_.kernel_columns + strand.tap[t];
        float* to = dst + t * features;
        if (plan_.op == DataOp::kFwd) {
          const int64_t src = (tap * plan_.channels + c0) * plan_.features + f0;
          for (int64_t c = 0; c < channels; ++c) {
            kernels.data.widen[index_of(rhs.dtype)](rhs.at(src + c * plan_.features), to + c * pitch, valid);
            std::fill(to + c * pitch + valid, to + c * pitch + features, 0.0f);
          }
        } else {
          const void* src = rhs.at((tap * plan_.features + f0) * plan_.channels + c0);
          kernels.data.transpose[index_of(rhs.dtype)](src, plan_.channels, to, pitch, static_cast<int>(valid),
                                                      static_cast<int>(channels));
          for (int64_t c = 0; c < channels && whole < features; ++c) {
            std::fill(to + c * pitch + whole, to + c * pitch + features, 0.0f);
          }
        }
      }
      dst += plan_.channel_block * pitch;
    }
  }

  // The filter blocks of all classes and kernel rows.
  void pack(const Kernels& kernels, ConstTensor rhs, int64_t block, int64_t channel_block, float* packed) const {
    for (size_t cls = 0; cls < plan_.classes.size(); ++cls) {
      for (int64_t r = 0; r < plan_.kernel_rows; ++r) {
        pack_row(kernels, rhs, block, cls, channel_block, r, packed + offset(block, cls, channel_block, r));
      }
    }
  }

 private:
  const DataPlan& plan_;
  int lanes_;
  int64_t floats_per_feature_;
  std::vector<int64_t> taps_before_;
};

// Range of pixels or columns along x.
struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// The input of one tile: which rows and pixels, their masks and values.
class TileInput {
 public:
  TileInput(const DataPlan& plan, ConstTensor input, Range rows, Range columns) : plan_(plan), input_(input) {
    for (int64_t n = rows.begin / plan.out_rows; n * plan.out_rows < rows.end; ++n) {
      const int64_t y0 = std::max<int64_t>(0, rows.begin - n * plan.out_rows);
      const int64_t y1 = std::min(plan.out_rows, rows.end - n * plan.out_rows);
      const auto [begin, end] = plan.input_rows(y0, y1);
      images_.push_back({n, {begin, end}, rows_});
      rows_ += end - begin;
    }
    const int64_t step = plan.classes.front().step;
    for (size_t p = 0; p < plan.phases.size(); ++p) {
      Range pixels{plan.phases[p].pixels, 0};
      for (const ColumnClass& c : plan.classes) {
        const Range u{columns.begin / step, std::min(c.columns, columns.end / step)};
        for (const Strand& s : c.strands) {
          if (s.phase != static_cast<int>(p)) continue;
          pixels.begin = std::min(pixels.begin, std::max<int64_t>(0, u.begin - s.first - s.taps + 1));
          pixels.end = std::max(pixels.end, std::min(plan.phases[p].pixels, u.end - s.first));
        }
      }
      if (pixels.end < pixels.begin) pixels.end = pixels.begin;
      phases_.push_back({pixels, slot_});
      slot_ += pixels.size();
    }
  }

  int64_t scratch_bytes() const { return Scratch::size<uint64_t>(masks()) + Scratch::size<float>(values()); }

  void take(Scratch& scratch) {
    masks_ = scratch.take<uint64_t>(masks());
    values_ = scratch.take<float>(values());
  }

  // Makes masks and copies; returns the share of non-zeros. With step > 1 only looks at every step-th pixel. Without
  // `masks` only copies.
  double scan(const Kernels& kernels, int64_t step, bool masks = true) {
    int64_t nonzeros = 0, elements = 0;
    for (const Image& image : images_) {
      for (int64_t y = image.rows.begin; y < image.rows.end; ++y) {
        const int64_t row = image.slot + y - image.rows.begin;
        for (size_t p = 0; p < phases_.size(); ++p) {
          if (phases_[p].pixels.size() == 0) continue;
          ScanArgs args{};
          DType dtype = input_.dtype;
          if (plan_.fold > 0) {
            args.values = copy_folded_row(kernels, image.n, y, row);
            dtype = DType::kF32;
            args.value_pitch = plan_.fold * step;
          } else {
            args.values = pixel(image.n, y, p, phases_[p].pixels.begin);
            args.value_pitch = plan_.phases[p].step * plan_.channels * step;
          }
          args.pixels = static_cast<int>((phases_[p].pixels.size() + step - 1) / step);
          args.channels = static_cast<int>(plan_.channels);
          args.block = plan_.channel_block;
          args.masks = masks ? masks_ + mask_index(row, p, 0) : nullptr;
          args.mask_pitch = rows_ * slot_;
          const bool copy = plan_.copy && plan_.fold == 0 && step == 1;
          args.copy = copy ? values_ + mask_index(row, p, 0) * plan_.channel_block : nullptr;
          args.copy_pitch = rows_ * slot_ * plan_.channel_block;
          if (args.masks != nullptr || args.copy != nullptr) nonzeros += kernels.data.scan[index_of(dtype)](args);
          elements += args.pixels * plan_.channels;
        }
      }
    }
    return elements == 0 ? 0.0 : static_cast<double>(nonzeros) / static_cast<double>(elements);
  }

  // The mask of a pixel whose channels are all to be visited.
  uint64_t all_channels(int64_t channel_block) const {
    const int64_t left = plan_.channels - channel_block * plan_.channel_block;
    return ~uint64_t{0} >> (64 - std::min<int64_t>(plan_.channel_block, left));
  }

  // Points a sweep at input row y of image n, for the columns `u` of a strand.
  void aim(int64_t n, int64_t y, const Strand& strand, Range u, int64_t channel_block, SweepArgs* args) const {
    const Image& image = images_[n - images_.front().n];
    const PhaseSlot& phase = phases_[strand.phase];
    const int64_t begin =
        std::max(phase.pixels.begin, std::min(phase.pixels.end, u.begin - strand.first - strand.taps + 1));
    const int64_t end = std::max(begin, std::min(phase.pixels.end, u.end - strand.first));
    const int64_t index =
        mask_index(image.slot + y - image.rows.begin, strand.phase, channel_block) + begin - phase.pixels.begin;
    args->masks = masks_ + index;
    args->all_channels = all_channels(channel_block);
    if (plan_.fold > 0) {
      args->values = folded_row(image.slot + y - image.rows.begin) + (begin - phase.pixels.begin) * plan_.fold +
                     channel_block * plan_.channel_block;
      args->value_pitch = plan_.fold;
    } else if (plan_.copy) {
      args->values = values_ + index * plan_.channel_block;
      args->value_pitch = plan_.channel_block;
    } else {
      const void* first = pixel(n, y, strand.phase, begin);  // float32: narrow values are swept from a copy
      args->values = static_cast<const float*>(first) + channel_block * plan_.channel_block;
      args->value_pitch = plan_.phases[strand.phase].step * plan_.channels;
    }
    args->pixels = static_cast<int>(end - begin);
    args->first = static_cast<int>(strand.first + begin - u.begin);
  }

 private:
  struct Image {
    int64_t n;
    Range rows;
    int64_t slot;  // of its first row
  };
  struct PhaseSlot {
    Range pixels;
    int64_t slot;
  };
  int64_t masks() const { return plan_.channel_blocks() * rows_ * slot_; }
  int64_t values() const {
    if (plan_.fold > 0) return rows_ * folded_floats();
    return plan_.copy ? masks() * plan_.channel_block : 0;
  }
  int64_t folded_floats() const { return (phases_[0].pixels.size() - 1) * plan_.fold + plan_.channels; }
  float* folded_row(int64_t row) const { return values_ + row * folded_floats(); }

  // The windows of the tile's pixels in input row y, with the zeros of the padding.
  const float* copy_folded_row(const Kernels& kernels, int64_t n, int64_t y, int64_t row) const {
    const int64_t width = plan_.in_columns * plan_.in_channels;
    const int64_t begin = phases_[0].pixels.begin * plan_.fold - plan_.fold_pad, end = begin + folded_floats();
    const int64_t src = (n * plan_.in_rows + y) * width;
    float* dst = folded_row(row);
    const int64_t from = std::clamp<int64_t>(0, begin, end), to = std::clamp(width, from, end);
    std::fill(dst, dst + (from - begin), 0.0f);
    kernels.data.widen[index_of(input_.dtype)](input_.at(src + from), dst + (from - begin), to - from);
    std::fill(dst + (to - begin), dst + (end - begin), 0.0f);
    return dst;
  }

  int64_t mask_index(int64_t row, size_t phase, int64_t channel_block) const {
    return (channel_block * rows_ + row) * slot_ + phases_[phase].slot;
  }
  const void* pixel(int64_t n, int64_t y, size_t phase, int64_t i) const {
    const int64_t x = plan_.phases[phase].start + i * plan_.phases[phase].step;
    return input_.at(((n * plan_.in_rows + y) * plan_.in_columns + x) * plan_.channels);
  }

  const DataPlan& plan_;
  ConstTensor input_;
  std::vector<Image> images_;
  std::vector<PhaseSlot> phases_;
  int64_t rows_ = 0, slot_ = 0;
  uint64_t* masks_ = nullptr;
  float* values_ = nullptr;
};

// Input that this thread will probably scan next, fetched into L2 while it sweeps.
class Ahead {
 public:
  // `sweeps` of `columns` columns each are to fetch `bytes` from `begin`.
  Ahead(const void* begin, int64_t bytes, int64_t columns, int64_t sweeps)
      : next_(static_cast<const char*>(begin)), end_(next_ + bytes) {
    const int64_t steps = std::max<int64_t>(1, sweeps * ((columns + 1) / 2));
    lines_ = static_cast<int>((bytes / 64 + steps - 1) / steps);
  }
  void aim(int64_t columns, SweepArgs* args) {
    const int64_t bytes = 64 * lines_ * ((columns + 1) / 2);
    args->prefetch = next_;
    args->prefetch_lines = next_ + bytes <= end_ ? lines_ : 0;
    next_ += args->prefetch_lines > 0 ? bytes : 0;
  }

 private:
  const char *next_, *end_;
  int lines_;
};

struct Call {
  const DataPlan& plan;
  const Kernels& kernels;
  const PackedKernel& layout;
  Mode mode;
  ConstTensor input;
  ConstTensor rhs;
  const float* packed;  // null: few tiles, each packs what it needs, one kernel row at a time
  ConstTensor keep;     // zeros of this, of the shape of the result, are zeros of the result; or null
  Tensor result;
  bool stream;
  // Whether the last sweep of a row leaves its sums in scratch, from where they are converted to their place.
  bool finishes() const {
    if (keep.data != nullptr) return keep.dtype != DType::kF32;
    return result.dtype != DType::kF32 && !plan.pointwise && plan.fold == 0;
  }
  // Of so many columns at a time. One tap does so little for a sum that converting it from L2 would show.
  int64_t finish_columns(int64_t columns) const {
    return finishes() && plan.pointwise ? std::min<int64_t>(columns, 16) : columns;
  }
};

// How the sweeps of a tile go through their input; kNone: it is all zero.
enum class Walk { kDense, kPairs, kSingles, kNone };

// Sums one feature block of one class of columns over all channels and taps.
void sweep_block(const Call& call, const TileInput& input, Walk walk, Range rows, Range columns, size_t cls,
                 int64_t block, float* sums, float* finished, float* row_filter, Ahead* ahead) {
  const DataPlan& plan = call.plan;
  const ColumnClass& column_class = plan.classes[cls];
  const Range u{columns.begin / column_class.step, std::min(column_class.columns, columns.end / column_class.step)};
  if (u.size() <= 0) return;
  const int64_t vectors = call.layout.vectors(block), features = vectors * call.kernels.lanes;
  const int64_t f0 = block * plan.vectors * call.kernels.lanes;
  const int64_t valid = std::min(features, plan.features - f0);
  SweepArgs args{};
  args.pair_mask = walk == Walk::kPairs ? ~uint64_t{0} : 0;
  const DataKernels& table = call.kernels.data;
  // A copy is contiguous, which the hardware sees; pixels in place may lie a page apart.
  args.value_lines = plan.copy ? 0 : (plan.channel_block + 15) / 16;
  const auto to_scratch = [&](float* out) {
    args.out_dtype = DType::kF32;
    args.out = out;
    args.keep = nullptr;
    args.out_pitch = features;
    args.out_features = static_cast<int>(features);
    args.stream = false;
  };
  // The last sweep of a row of the tile: sweep(part) runs it for a range of columns.
  const auto finish = [&](int64_t g, auto&& sweep) {
    const int64_t pitch = column_class.step * plan.features, step = call.finish_columns(u.size());
    for (Range part{u.begin, 0}; part.begin < u.end; part.begin = part.end) {
      part.end = std::min(u.end, part.begin + step);
      const int64_t x = column_class.start + part.begin * column_class.step;
      const int64_t pixel = (g * plan.out_columns + x) * plan.features + f0;
      const void* keep = call.keep.data == nullptr ? nullptr : call.keep.at(pixel);
      void* out = call.result.at(pixel);
      if (call.finishes()) {
        to_scratch(finished);
        sweep(part);
        call.kernels.data.finish[index_of(call.input.dtype)][index_of(call.result.dtype)](
            {finished, features, part.size(), valid, out, pitch, keep});
        continue;
      }
      args.out_dtype = call.result.dtype;
      args.narrow_out = out;
      args.out = static_cast<float*>(out);
      args.keep = static_cast<const float*>(keep);
      args.out_pitch = pitch;
      args.out_features = static_cast<int>(valid);
      args.stream = call.stream && valid == features;
      sweep(part);
    }
  };

  // Kernel rows that exist for each row of the tile: [first, last], or first > last when there are none.
  std::vector<Range> kernel_rows(rows.size());
  for (int64_t g = rows.begin; g < rows.end; ++g) {
    Range& range = kernel_rows[g - rows.begin];
    range = {plan.kernel_rows, -1};
    for (int64_t r = 0; r < plan.kernel_rows; ++r) {
      if (plan.input_row(g % plan.out_rows, r) < 0) continue;
      range.begin = std::min(range.begin, r);
      range.end = r;
    }
    if (walk == Walk::kNone || range.end < 0 || column_class.strands.empty()) {
      args.tile = nullptr;
      args.pixels = 0;
      finish(g, [&](Range part) {
        args.columns = static_cast<int>(part.size());
        table.sweep[1][vectors](args);
      });
    }
  }

  if (walk == Walk::kNone) return;
  const int64_t channel_blocks = plan.channel_blocks();
  for (int64_t cb = 0; cb < channel_blocks; ++cb) {
    for (int64_t r = 0; r < plan.kernel_rows; ++r) {
      const float* filter = row_filter;
      if (call.packed != nullptr) {
        filter = call.packed + call.layout.offset(block, cls, cb, r);
      } else {
        call.layout.pack_row(call.kernels, call.rhs, block, cls, cb, r, row_filter);
      }
      for (size_t i = 0; i < column_class.strands.size(); ++i) {
        const Strand& strand = column_class.strands[i];
        args.filter = filter;
        filter += plan.channel_block * strand.taps * features;
        const auto sweep = (walk == Walk::kDense ? table.dense_sweep : table.sweep)[strand.taps][vectors];
        for (int64_t g = rows.begin; g < rows.end; ++g) {
          const int64_t y = plan.input_row(g % plan.out_rows, r);
          if (y < 0) continue;
          const Range& range = kernel_rows[g - rows.begin];
          float* tile = sums + (g - rows.begin) * u.size() * features;
          const bool first = cb == 0 && r == range.begin && i == 0;
          const auto sweep_part = [&](Range part) {
            args.columns = static_cast<int>(part.size());
            args.tile = first ? nullptr : tile + (part.begin - u.begin) * features;
            input.aim(g / plan.out_rows, y, strand, part, cb, &args);
            ahead->aim(part.size(), &args);
            sweep(args);
          };
          if (cb + 1 == channel_blocks && r == range.end && i + 1 == column_class.strands.size()) {
            finish(g, sweep_part);
          } else {
            to_scratch(tile);
            sweep_part(u);
          }
        }
      }
    }
  }
}

void count_path(DataOp op, bool dense) {
  if (op == DataOp::kFwd) return count(dense ? "conv_fwd/dense" : "conv_fwd/sparse");
  count(dense ? "conv_bwd_input/dense" : "conv_bwd_input/sparse");
}

// `next` is the range of columns that this thread will probably run next; empty if unknown.
void run_tile(const Call& call, Range rows, Range columns, Range blocks, Range next) {
  const DataPlan& plan = call.plan;
  TileInput input(plan, call.input, rows, columns);
  const int64_t sums = rows.size() * columns.size() * plan.vectors * call.kernels.lanes;
  int64_t row_floats = 0;
  for (size_t cls = 0; cls < plan.classes.size() && call.packed == nullptr; ++cls) {
    row_floats = std::max(row_floats, call.layout.row_floats(0, cls));
  }
  const int64_t finished_floats =
      call.finishes() ? call.finish_columns(columns.size()) * plan.vectors * call.kernels.lanes : 0;
  Scratch& scratch = Scratch::local();
  scratch.begin(input.scratch_bytes() + Scratch::size<float>(sums) + Scratch::size<float>(finished_floats) +
                Scratch::size<float>(row_floats));
  input.take(scratch);
  float* tile = scratch.take<float>(sums);
  float* finished = scratch.take<float>(finished_floats);
  float* row_filter = scratch.take<float>(row_floats);
  // A dense tile needs its input scanned only for the copy, so a sample goes first.
  constexpr int64_t kSampleStep = 16;
  const bool maybe_dense = call.mode != Mode::kSparse && (call.mode == Mode::kDense || !plan.pointwise ||
                                                          input.scan(call.kernels, kSampleStep) >= plan.dense_density);
  const bool surely_dense = maybe_dense && (call.mode == Mode::kDense || plan.pointwise);
  if (surely_dense && plan.copy) input.scan(call.kernels, 1, false);
  const double density = surely_dense ? 1 : input.scan(call.kernels, 1);
  const bool dense = maybe_dense && density >= plan.dense_density;
  const Walk walk = dense                          ? Walk::kDense
                    : density >= plan.pair_density ? Walk::kPairs
                    : density > 0                  ? Walk::kSingles
                                                   : Walk::kNone;
  if (blocks.begin == 0) count_path(plan.op, dense);
  // Only 1x1 kernels, where the input is one long row, do so little with a value that reading it shows.
  Ahead ahead(call.input.at(next.begin * plan.channels), next.size() * plan.channels * call.input.size(),
              columns.size(), blocks.size() * plan.channel_blocks());
  for (size_t cls = 0; cls < plan.classes.size(); ++cls) {
    for (int64_t block = blocks.begin; block < blocks.end; ++block) {
      sweep_block(call, input, walk, rows, columns, cls, block, tile, finished, row_filter, &ahead);
    }
  }
  if (call.stream) call.kernels.data.stream_fence();
}

// `density` is that of the input.
void conv_data(DataOp op, const ConvShape& shape, Mode mode, double density, ConstTensor input, ConstTensor rhs,
               ConstTensor keep, Tensor result, Executor& executor) {
  const Kernels& k = kernels();
  const DataPlan plan = plan_data(op, shape, mode, input.dtype, density, machine(), k);
  const PackedKernel layout(plan, k.lanes);
  const int64_t channel_blocks = plan.channel_blocks();
  const int64_t row_tiles = plan.row_tiles(), column_tiles = plan.column_tiles(), tiles = row_tiles * column_tiles;
  const bool packs_ahead = tiles > 2;
  SharedBuffer packed(packs_ahead ? layout.floats() * sizeof(float) : 64);
  const bool aligned = reinterpret_cast<uintptr_t>(result.data) % 64 == 0;
  const Call call{plan,
                  k,
                  layout,
                  mode,
                  input,
                  rhs,
                  packs_ahead ? packed.as<float>() : nullptr,
                  keep,
                  result,
                  plan.stream && aligned && result.dtype == DType::kF32};

  Executor& threads = helpers_unless(plan.serial, executor);
  // Few tiles: give each thread several shares of the features. Each scans the tile again.
  const int64_t shares = threads.concurrency() > 1 ? 3 * threads.concurrency() : 1;
  const int64_t groups = std::clamp<int64_t>(tiles == 0 ? 1 : (shares + tiles - 1) / tiles, 1, plan.blocks);
  run_phases(threads,
             {
                 {packs_ahead ? plan.blocks * channel_blocks : 0,
                  [&](int64_t i) { layout.pack(k, rhs, i / channel_blocks, i % channel_blocks, packed.as<float>()); }},
                 {tiles * groups,
                  [&](int64_t i) {
                    const int64_t tile = i / groups, group = i % groups;
                    const int64_t row = tile / column_tiles * plan.tile_rows;
                    const int64_t column = tile % column_tiles * plan.tile_columns;
                    const int64_t step = plan.classes.front().step;
                    // Threads take items in turn, so the next of this thread is about `concurrency` items on.
                    const int64_t later = (i + threads.concurrency()) / groups * plan.tile_columns;
                    const bool fetch = plan.pointwise && row_tiles == 1 && later > column && later < plan.out_columns;
                    run_tile(
                        call, {row, std::min(plan.images * plan.out_rows, row + plan.tile_rows)},
                        {column, std::min((plan.out_columns + step - 1) / step * step, column + plan.tile_columns)},
                        {plan.blocks * group / groups, plan.blocks * (group + 1) / groups},
                        {fetch ? later : 0, fetch ? std::min(plan.out_columns, later + plan.tile_columns) : 0});
                  }},
             });
}

// The same with no mask on the result: measures the input's zeros first.
void conv_measured(DataOp op, const ConvShape& shape, Mode mode, ConstTensor input, ConstTensor rhs, Tensor result,
                   Executor& executor) {
  const bool fwd = op == DataOp::kFwd;
  const int64_t input_size = fwd ? shape.lhs_size() : shape.out_size();
  const int64_t result_size = fwd ? shape.out_size() : shape.lhs_size();
  const double sample = mode == Mode::kDense ? 1 : density(input, input_size);
  if (zero_of_zeros(sample, input, input_size, result, result_size, executor)) return count_path(op, false);
  conv_data(op, shape, mode, sample, input, rhs, {nullptr, input.dtype}, result, executor);
}

}  // namespace

void conv_fwd(const ConvShape& shape, Mode mode, ConstTensor lhs, ConstTensor rhs, Tensor out, Executor& executor) {
  conv_measured(DataOp::kFwd, shape, mode, lhs, rhs, out, executor);
}

void conv_bwd_input(const ConvShape& shape, Mode mode, ConstTensor g, ConstTensor rhs, Tensor dlhs,
                    Executor& executor) {
  conv_measured(DataOp::kBwdInput, shape, mode, g, rhs, dlhs, executor);
}

void conv_bwd_input_where(const ConvShape& shape, Mode mode, double density, ConstTensor g, ConstTensor rhs,
                          ConstTensor x, Tensor dlhs, Executor& executor) {
  conv_data(DataOp::kBwdInput, shape, mode, density, g, rhs, x, dlhs, executor);
}

}  // namespace sparsetrain
