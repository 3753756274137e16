// Runs FWD and BWI over a DataPlan: packs the kernel, then tile by tile scans and sweeps.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "conv.h"
#include "isa.h"
#include "parallel.h"
#include "pixels.h"
#include "plan_data.h"
#include "run_data.h"
#include "zeros.h"

namespace sparsetrain {
namespace {

// Of pixels, columns, rows or blocks.
struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// The kernel in the order in which the sweeps read it: [feature block][class][channel block][kernel row][strand], each
// a filter block [channel][tap][feature]. For tall sweeps one of all kernel rows: [channel][tap][kernel row][feature].
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
                               channel_block * plan_.kernel_rows * row_floats(block, cls) +
                               r * (plan_.tall ? features : row_floats(block, cls)));
  }

  // The filter blocks of one kernel row, of feature blocks that have as many vectors as the first of them.
  void pack_row(const Kernels& kernels, ConstTensor rhs, Range blocks, size_t cls, int64_t channel_block, int64_t r,
                float* dst) const {
    const int64_t features = vectors(blocks.begin) * lanes_, f0 = blocks.begin * plan_.vectors * lanes_;
    const int64_t valid = std::min(blocks.size() * features, plan_.features - f0);
    const int64_t block_pitch = floats_per_feature_ * features;
    const int64_t c0 = channel_block * plan_.channel_block;
    const int64_t channels = std::min<int64_t>(plan_.channel_block, plan_.channels - c0);
    for (const Strand& strand : plan_.classes[cls].strands) {
      const int64_t tap_pitch = plan_.tall ? plan_.kernel_rows * features : features, pitch = strand.taps * tap_pitch;
      for (int t = 0; t < strand.taps; ++t) {
        const int64_t tap = r * plan_.kernel_columns + strand.tap[t];
        float* to = dst + t * tap_pitch;
        if (plan_.op == DataOp::kFwd) {
          kernels.data.pack[index_of(rhs.dtype)](rhs.at((tap * plan_.channels + c0) * plan_.features + f0),
                                                 plan_.features, to, pitch, block_pitch, static_cast<int>(channels),
                                                 static_cast<int>(valid), static_cast<int>(features));
          continue;
        }
        for (int64_t f = 0; f < valid; f += features, to += block_pitch) {
          const int64_t here = std::min(features, valid - f), whole = round_up(here, lanes_);
          kernels.data.transpose[index_of(rhs.dtype)](rhs.at((tap * plan_.features + f0 + f) * plan_.channels + c0),
                                                      plan_.channels, to, pitch, static_cast<int>(here),
                                                      static_cast<int>(channels));
          for (int64_t c = 0; c < channels && whole < features; ++c) {
            std::fill(to + c * pitch + whole, to + c * pitch + features, 0.0f);
          }
        }
      }
      dst += plan_.channel_block * pitch;
    }
  }

  // What pack_row reads of the kernel for a feature block, if all taps of the row are in one class of columns.
  Ahead source(ConstTensor rhs, int64_t block, int64_t r, int64_t channel_block) const {
    const int64_t f0 = block * plan_.vectors * lanes_, c0 = channel_block * plan_.channel_block;
    const int64_t features = std::min(vectors(block) * lanes_, plan_.features - f0);
    const int64_t channels = std::min<int64_t>(plan_.channel_block, plan_.channels - c0);
    const bool fwd = plan_.op == DataOp::kFwd;
    const int64_t size = rhs.size(), rows = plan_.channels, cols = plan_.features;
    const int64_t tap = r * plan_.kernel_columns * rows * cols;
    const void* at = rhs.at(tap + (fwd ? c0 * cols + f0 : f0 * rows + c0));
    return {.at = static_cast<const char*>(at),
            .each = 0,
            .rows = static_cast<int>(fwd ? channels : features),
            .pieces = static_cast<int>(plan_.kernel_columns),
            .lines = static_cast<int>(((fwd ? features : channels) * size + 63) / 64),
            .row_pitch = (fwd ? cols : rows) * size,
            .piece_pitch = rows * cols * size};
  }

  // The filter blocks of all features and classes.
  void pack(const Kernels& kernels, ConstTensor rhs, int64_t channel_block, int64_t r, float* packed) const {
    const int64_t whole = plan_.last_vectors == plan_.vectors ? plan_.blocks : plan_.blocks - 1;
    for (size_t cls = 0; cls < plan_.classes.size(); ++cls) {
      for (const Range blocks : {Range{0, whole}, Range{whole, plan_.blocks}}) {
        if (blocks.size() == 0) continue;
        pack_row(kernels, rhs, blocks, cls, channel_block, r, packed + offset(blocks.begin, cls, channel_block, r));
      }
    }
  }

 private:
  const DataPlan& plan_;
  int lanes_;
  int64_t floats_per_feature_;
  std::vector<int64_t> taps_before_;
};

// Row y of image n of the input; `slot` is its place in the scratch of a tile.
struct InputRow {
  int64_t n, y, slot;
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
      slot_ += (pixels.size() + 1) / 2 * 2;  // whole pairs
    }
  }

  // Rows of an image.
  struct Image {
    int64_t n;
    Range rows;
    int64_t slot;  // of its first row
  };
  const std::vector<Image>& images() const { return images_; }
  int64_t rows() const { return rows_; }
  // Of sums: those that its rows meet in tall sweeps, also if the tile has none such.
  int64_t tall_rows() const {
    int64_t count = rows_;
    for (const Image& image : images_) count += image.rows.size() > 0 ? plan_.kernel_rows - 1 : 0;
    return count;
  }

  int64_t scratch_bytes() const { return Scratch::size<uint64_t>(masks()) + Scratch::size<float>(values()); }

  void take(Scratch& scratch) {
    masks_ = scratch.take<uint64_t>(masks());
    values_ = scratch.take<float>(values());
  }

  // The share of non-zeros in every few pixels.
  double sample(const Kernels& kernels) const {
    constexpr int64_t kStep = 16, kShortStep = 5, kShort = 64;  // pixels from one to the next; of a short row
    // What looking at a pixel takes, in multiply-adds, should be a hundredth of what its like lead to. But some are
    // needed, and not all in one column.
    const double channels = static_cast<double>(plan_.in_channels), look = 20 + channels / 8;
    const double wanted = 100 * look / (channels * plan_.value_work);
    const double most = static_cast<double>(rows_ * slot_) / 8;
    const int64_t rare = static_cast<int64_t>(std::min(wanted, most)) | 1;
    int64_t nonzeros = 0, elements = 0, skip = 0;
    const bool folded = plan_.fold > 0;
    for (const Image& image : images_) {
      for (int64_t y = image.rows.begin; y < image.rows.end; ++y) {
        for (size_t p = 0; p < phases_.size(); ++p) {
          const Range pixels = folded ? folded_columns() : phases_[p].pixels;
          const int64_t step = std::max(rare, pixels.size() < kShort ? kShortStep : kStep);
          // Goes on in the next row, so that a short one does not show little but its borders.
          const int64_t first = pixels.begin + skip;
          const int64_t count = std::min(ceil_div(std::max<int64_t>(pixels.end - first, 0), step), slot_);
          skip = std::max<int64_t>(first + count * step - pixels.end, 0);
          if (count == 0) continue;
          ScanArgs args{};
          args.values =
              folded ? input_.at(input_row(image.n, y) + first * plan_.in_channels) : pixel(image.n, y, p, first);
          args.value_pitch = (folded ? 1 : plan_.phases[p].step) * plan_.in_channels * step;
          args.pixels = static_cast<int>(count);
          args.channels = static_cast<int>(plan_.in_channels);
          args.block = plan_.channel_block;
          args.masks = masks_;  // not the last word
          args.mask_pitch = rows_ * slot_;
          nonzeros += kernels.data.scan[index_of(input_.dtype)](args);
          elements += count * plan_.in_channels;
        }
      }
    }
    return elements == 0 ? 0.0 : static_cast<double>(nonzeros) / static_cast<double>(elements);
  }

  // For dense sweeps: makes copies, if the plan wants some.
  void copy(const Kernels& kernels) {
    if (plan_.copy) scan(kernels, false, Packing::kAll);
  }

  // For sparse sweeps: makes masks, and packs the values if the plan wants that. Returns the share of non-zeros.
  double mask(const Kernels& kernels, bool pairs) {
    return scan(kernels, true, !plan_.packs ? Packing::kAll : pairs ? Packing::kPairs : Packing::kSingles);
  }

  // The mask of a pixel whose channels are all to be visited.
  uint64_t all_channels(int64_t channel_block) const {
    const int64_t left = plan_.channels - channel_block * plan_.channel_block;
    return ~uint64_t{0} >> (64 - std::min<int64_t>(plan_.channel_block, left));
  }

  // Row y of image n.
  InputRow row(int64_t n, int64_t y) const {
    const Image& image = images_[n - images_.front().n];
    return {n, y, image.slot + y - image.rows.begin};
  }

  // Points a sweep at an input row, for the columns `u` of a strand.
  void aim(const InputRow& row, const Strand& strand, Range u, int64_t channel_block, PlacedSweepArgs* args) const {
    const Range pixels = met<1>(strand, u);
    args->masks = masks_ + mask_index(row.slot, strand.phase, channel_block) + pixels.begin;
    args->all_channels = all_channels(channel_block);
    if (plan_.fold > 0) {
      args->values = folded_row(row.slot) + pixels.begin * plan_.fold + channel_block * plan_.channel_block;
      args->value_pitch = plan_.fold;
    } else if (plan_.copy) {
      args->values = copied_row(row.slot, strand.phase, channel_block) + pixels.begin * plan_.channel_block;
      args->value_pitch = plan_.channel_block;
    } else {
      // float32: narrow values are swept from a copy
      const void* first = pixel(row.n, row.y, strand.phase, phases_[strand.phase].pixels.begin + pixels.begin);
      args->values = static_cast<const float*>(first) + channel_block * plan_.channel_block;
      args->value_pitch = plan_.phases[strand.phase].step * plan_.channels;
    }
    args->pixels = static_cast<int>(pixels.size());
    args->first = static_cast<int>(first_column(strand, u) + pixels.begin);
  }

  // How packed sweeps of a strand go over the columns `u`: the same for all rows.
  struct Way {
    int64_t begin;  // of the tile's pixels of the strand's phase: the first one swept
    int pixels;
    int first;    // column of the first tap's sum of the first pixel
    Range reach;  // columns that the pixels write to
  };
  Way way(const Strand& strand, Range u) const {
    const Range pixels = met<2>(strand, u);
    const int64_t first = first_column(strand, u) + pixels.begin;
    return {pixels.begin,
            static_cast<int>(pixels.size()),
            static_cast<int>(first),
            {first, first + (pixels.size() + 1) / 2 * 2 + strand.taps - 1}};
  }
  void aim(const InputRow& row, const Strand& strand, const Way& way, int64_t channel_block, SweepRow* to) const {
    const uint64_t* masks = masks_ + mask_index(row.slot, strand.phase, channel_block);
    int64_t values = 0;  // of the pixels before
    for (int64_t i = 0; i < way.begin; ++i) values += __builtin_popcountll(masks[i]);
    to->masks = masks + way.begin;
    to->values = copied_row(row.slot, strand.phase, channel_block) + values;
  }

 private:
  int64_t first_column(const Strand& strand, Range u) const {
    return strand.first + phases_[strand.phase].pixels.begin - u.begin;
  }
  // Of the tile's pixels of a phase, those that meet the columns `u`, by whole units: packed ones come in pairs.
  template <int64_t kUnit>
  Range met(const Strand& strand, Range u) const {
    const int64_t first = first_column(strand, u), pixels = phases_[strand.phase].pixels.size();
    const int64_t begin = std::clamp<int64_t>(1 - strand.taps - first, 0, pixels) / kUnit * kUnit;
    const int64_t end = std::clamp<int64_t>(u.size() - first, begin, pixels);
    return {begin, std::min(pixels, (end + kUnit - 1) / kUnit * kUnit)};
  }
  struct PhaseSlot {
    Range pixels;
    int64_t slot;
  };
  int64_t masks() const { return plan_.channel_blocks() * rows_ * slot_; }
  int64_t values() const {
    if (plan_.fold > 0) return rows_ * folded_floats();
    return plan_.copy ? plan_.channel_blocks() * copy_pitch() : 0;
  }
  int64_t copy_pitch() const { return rows_ * slot_ * plan_.channel_block + kPackedSlack; }
  float* copied_row(int64_t row, size_t phase, int64_t channel_block) const {
    return values_ + channel_block * copy_pitch() + (row * slot_ + phases_[phase].slot) * plan_.channel_block;
  }

  double scan(const Kernels& kernels, bool masks, Packing packing) {
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
            args.value_pitch = plan_.fold;
          } else {
            args.values = pixel(image.n, y, p, phases_[p].pixels.begin);
            args.value_pitch = plan_.phases[p].step * plan_.channels;
          }
          args.pixels = static_cast<int>(phases_[p].pixels.size());
          args.channels = static_cast<int>(plan_.channels);
          args.block = plan_.channel_block;
          args.masks = masks ? masks_ + mask_index(row, p, 0) : nullptr;
          args.mask_pitch = rows_ * slot_;
          args.copy = plan_.copy && plan_.fold == 0 ? copied_row(row, p, 0) : nullptr;
          args.copy_pitch = copy_pitch();
          args.packing = packing;
          if (args.masks != nullptr || args.copy != nullptr) nonzeros += kernels.data.scan[index_of(dtype)](args);
          elements += args.pixels * plan_.channels;
        }
      }
    }
    return elements == 0 ? 0.0 : static_cast<double>(nonzeros) / static_cast<double>(elements);
  }

  // Of the input, those that the windows of the tile look at.
  Range folded_columns() const {
    const int64_t begin = (phases_[0].pixels.begin * plan_.fold - plan_.fold_pad) / plan_.in_channels;
    const int64_t end = begin + folded_floats() / plan_.in_channels;
    return {std::clamp<int64_t>(begin, 0, plan_.in_columns), std::clamp<int64_t>(end, 0, plan_.in_columns)};
  }
  int64_t folded_floats() const { return (phases_[0].pixels.size() - 1) * plan_.fold + plan_.channels; }
  float* folded_row(int64_t row) const { return values_ + row * folded_floats(); }

  // The windows of the tile's pixels in input row y, with the zeros of the padding.
  const float* copy_folded_row(const Kernels& kernels, int64_t n, int64_t y, int64_t row) const {
    const int64_t width = plan_.in_columns * plan_.in_channels;
    const int64_t begin = phases_[0].pixels.begin * plan_.fold - plan_.fold_pad, end = begin + folded_floats();
    const int64_t src = input_row(n, y);
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
    return input_.at(input_row(n, y) + x * plan_.channels);
  }
  // Its first value.
  int64_t input_row(int64_t n, int64_t y) const {
    return (n * plan_.in_rows + y) * plan_.in_columns * plan_.in_channels;
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
class InputAhead {
 public:
  // `sweeps` of `columns` columns each are to fetch `bytes` from `begin`.
  InputAhead(const void* begin, int64_t bytes, int64_t columns, int64_t sweeps)
      : next_(static_cast<const char*>(begin)), end_(next_ + bytes) {
    const int64_t steps = std::max<int64_t>(1, sweeps * ((columns + 1) / 2));
    lines_ = static_cast<int>(ceil_div(bytes / 64, steps));
  }
  // The last sweeps may go a little beyond: lines are dealt out evenly.
  void aim(int64_t columns, PlacedSweepArgs* args) {
    args->prefetch = next_;
    args->prefetch_lines = next_ < end_ ? lines_ : 0;
    next_ += 64 * args->prefetch_lines * ((columns + 1) / 2);
  }
  // For so many rows of a packed sweep.
  void aim(int64_t columns, int64_t rows, SweepArgs* args) {
    if (next_ >= end_) return;
    const int64_t lines = lines_ * ((columns + 1) / 2);
    args->input_ahead.at = next_;
    args->input_ahead.each = static_cast<int>(lines);
    next_ += 64 * lines * rows;
  }

 private:
  const char *next_, *end_;
  int lines_;
};

struct Call {
  const DataPlan& plan;
  double density;  // of the input
  const Kernels& kernels;
  const PackedKernel& layout;
  Mode mode;
  ConstTensor input;
  ConstTensor rhs;
  const float* packed;  // null: few tiles, each packs what it needs, one kernel row at a time
  ConstTensor keep;     // zeros of this, of the shape of the result, are zeros of the result; or null
  Tensor result;
  bool stream, fetch;  // how it is written: past the caches; fetched before, from beyond L2
  // Whether sums go to their place as they are.
  bool plain() const { return keep.data == nullptr && result.dtype == DType::kF32; }
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

// Sums of a tile in scratch: rows of columns with room on both sides for what sweeps over packed values put there.
struct SumsLayout {
  int64_t pitch = 0, before = 0, after = 0;  // columns between rows; columns before the first and after the last row

  // Of all classes of columns.
  SumsLayout(const DataPlan& plan, const TileInput& input, Range columns, bool packed) {
    for (const ColumnClass& c : plan.classes) {
      const Range u = columns_of(c, columns);
      pitch = std::max(pitch, u.size());
      for (const Strand& s : c.strands) {
        if (!packed || u.size() <= 0) continue;
        const Range reach = input.way(s, u).reach;
        before = std::max(before, -reach.begin);
        after = std::max(after, reach.end - u.size());
      }
    }
    pitch += std::max(before, after);
  }
  int64_t columns(int64_t rows) const { return before + rows * pitch + after; }

  static Range columns_of(const ColumnClass& c, Range columns) {
    return {columns.begin / c.step, std::min(c.columns, columns.end / c.step)};
  }
};

// Sums one feature block of one class of columns over all channels and taps.
class BlockSweeper {
 public:
  // `sums` is column 0 of the first row; `finished` has room for Call::finish_columns, `row_filter` for the filter
  // blocks of a kernel row if the call packs none.
  BlockSweeper(const Call& call, const TileInput& input, Walk walk, Range rows, Range columns, const SumsLayout& layout,
               float* sums, float* finished, float* row_filter, InputAhead* ahead)
      : call_(call),
        input_(input),
        walk_(walk),
        rows_(rows),
        columns_(columns),
        layout_(layout),
        sums_(sums),
        finished_(finished),
        row_filter_(row_filter),
        ahead_(ahead) {
    const DataPlan& plan = call.plan;
    if (plan.tall) {
      place_tall();
      return;
    }
    kernel_rows_.resize(rows.size());
    meetings_.resize(plan.kernel_rows);
    for (int64_t g = rows.begin; g < rows.end; ++g) {
      Range& range = kernel_rows_[g - rows.begin];
      range = {plan.kernel_rows, -1};
      for (int64_t r = 0; r < plan.kernel_rows; ++r) {
        const int64_t y = plan.input_row(g % plan.out_rows, r);
        if (y < 0) continue;
        range.begin = std::min(range.begin, r);
        range.end = r;
        meetings_[r].push_back({g, input.row(g / plan.out_rows, y)});
      }
    }
  }

  void run(size_t cls, int64_t block) {
    const DataPlan& plan = call_.plan;
    class_ = &plan.classes[cls];
    u_ = SumsLayout::columns_of(*class_, columns_);
    if (u_.size() <= 0) return;
    block_ = block;
    vectors_ = call_.layout.vectors(block);
    features_ = vectors_ * call_.kernels.lanes;
    first_feature_ = block * plan.vectors * call_.kernels.lanes;
    valid_ = std::min(features_, plan.features - first_feature_);
    if (walk_ == Walk::kNone) {
      for (int64_t g = rows_.begin; g < rows_.end; ++g) write_zeros(g);
      return;
    }
    ways_.clear();
    for (const Strand& strand : class_->strands) ways_.push_back(input_.way(strand, u_));
    if (plan.tall) return run_tall();
    for (int64_t g = rows_.begin; g < rows_.end; ++g) {
      if (kernel_rows_[g - rows_.begin].end < 0 || class_->strands.empty()) write_zeros(g);
    }
    const int64_t channel_blocks = plan.channel_blocks();
    for (int64_t cb = 0; cb < channel_blocks; ++cb) {
      for (int64_t r = 0; r < plan.kernel_rows; ++r) {
        const float* filter = row_filter_;
        if (call_.packed != nullptr) {
          filter = call_.packed + call_.layout.offset(block, cls, cb, r);
        } else {
          call_.layout.pack_row(call_.kernels, call_.rhs, {block, block + 1}, cls, cb, r, row_filter_);
        }
        for (size_t i = 0; i < class_->strands.size(); ++i) {
          const Sweep sweep{class_->strands[i], ways_[i], filter, cb, r, i == 0, i + 1 == class_->strands.size()};
          walk_ == Walk::kDense || !plan.packs ? run_placed(sweep) : run_packed(sweep);
          filter += plan.channel_block * sweep.strand.taps * features_;
        }
      }
    }
  }

 private:
  // Of a strand of kernel row r over all rows of the tile that it meets.
  struct Sweep {
    const Strand& strand;
    const TileInput::Way& way;
    const float* filter;
    int64_t channel_block, r;
    bool first_strand, last_strand;
  };
  struct Meeting {
    int64_t g;
    InputRow input;
  };
  struct Tall {
    int64_t slot;  // of the sums of the first kernel row
    int64_t last;  // row of the tile that the last kernel row completes; -1: none
    InputRow input;
  };

  // Where the sums of the tile's rows are, and what each row of the input adds to. In the order in which the first
  // kernel row meets a row of the result before the others do.
  void place_tall() {
    const DataPlan& plan = call_.plan;
    const int64_t more = plan.kernel_rows - 1;
    const bool fwd = plan.op == DataOp::kFwd;
    slots_.assign(rows_.size(), -1);
    complete_.assign(rows_.size(), false);
    fresh_.assign(input_.tall_rows(), false);
    int64_t slot = 0;
    for (const TileInput::Image& image : input_.images()) {
      if (image.rows.size() == 0) continue;
      // Kernel row r of input row y adds to y + pad - r (FWD) or y - pad + r.
      const int64_t first = image.rows.begin + (fwd ? plan.row_pad - more : -plan.row_pad);
      const int64_t before = image.n * plan.out_rows - rows_.begin;  // from rows of the result to rows of the tile
      const auto in_tile = [&](int64_t y) {
        return y >= 0 && y < plan.out_rows && y + before >= 0 && y + before < rows_.size();
      };
      for (int64_t i = 0; i < image.rows.size() + more; ++i) {
        if (in_tile(first + i)) slots_[first + i + before] = slot + i;
      }
      for (int64_t i = 0; i < image.rows.size(); ++i) {
        const int64_t last = first + (fwd ? i : i + more);
        tall_.push_back({slot + (fwd ? i + more : i), in_tile(last) ? last + before : -1,
                         input_.row(image.n, image.rows.begin + i)});
        fresh_[tall_.back().slot] = true;
        if (in_tile(last)) complete_[last + before] = true;
      }
      slot += image.rows.size() + more;
    }
    if (!fwd) std::reverse(tall_.begin(), tall_.end());
  }

  void run_tall() {
    const int64_t row = layout_.pitch * features_, before = layout_.before * features_;
    const TileInput::Way& way = ways_.front();
    for (size_t slot = 0; slot < fresh_.size(); ++slot) {
      float* sums = sums_ + static_cast<int64_t>(slot) * row;
      if (!fresh_[slot] || !covers(way)) std::fill(sums - before, sums + row, 0.0f);
    }
    SweepArgs args = packed_args(way);
    args.row_pitch = call_.plan.op == DataOp::kFwd ? -row : row;
    bool placed = false;
    for (int64_t cb = 0; cb < call_.plan.channel_blocks() && way.pixels > 0; ++cb) {
      const bool last = cb + 1 == call_.plan.channel_blocks();
      sweep_rows_.clear();
      for (const Tall& t : tall_) {
        SweepRow& to = sweep_rows_.emplace_back();
        input_.aim(t.input, class_->strands.front(), way, cb, &to);
        to.sums = sums_ + t.slot * row;
        to.zero = cb == 0 && covers(way);
        if (plain() && last && t.last >= 0) to.out = out_of(rows_.begin + t.last);
      }
      aim(&args, call_.packed + call_.layout.offset(block_, 0, cb, 0));
      placed = call_.kernels.data.tall_sweep(args) && plain();
    }
    for (int64_t i = 0; i < rows_.size(); ++i) {
      if (placed && complete_[i]) continue;
      slots_[i] < 0 ? write_zeros(rows_.begin + i) : finish(rows_.begin + i, u_, sums_ + slots_[i] * row);
    }
  }

  // Whether packed sweeps may write the result themselves.
  bool plain() const { return call_.plain() && valid_ == features_; }
  float* out_of(int64_t g) const { return static_cast<float*>(call_.result.at(result_index(g, u_))); }
  // Whether a sweep reaches all columns.
  bool covers(const TileInput::Way& way) const {
    return way.pixels > 0 && way.reach.begin <= 0 && way.reach.end >= u_.size();
  }
  // For all packed sweeps that go one way.
  SweepArgs packed_args(const TileInput::Way& way) const {
    SweepArgs args{};
    args.pairs = walk_ == Walk::kPairs;
    args.take = call_.plan.take;
    args.pixels = way.pixels;
    args.first = way.first;
    args.columns = static_cast<int>(u_.size());
    args.out_pitch = result_pitch();
    args.stream = call_.stream;
    return args;
  }
  // Over the rows at hand.
  void aim(SweepArgs* args, const float* filter) {
    args->rows = sweep_rows_.data();
    args->count = static_cast<int>(sweep_rows_.size());
    args->filter = filter;
    ahead_->aim(u_.size(), args->count, args);
  }

  float* sums_of(int64_t g) const { return sums_ + (g - rows_.begin) * layout_.pitch * features_; }

  // A part of a row of the result.
  int64_t result_index(int64_t g, Range part) const {
    const int64_t x = class_->start + part.begin * class_->step;
    return (g * call_.plan.out_columns + x) * call_.plan.features + first_feature_;
  }
  const void* keep_at(int64_t index) const { return call_.keep.data == nullptr ? nullptr : call_.keep.at(index); }
  int64_t result_pitch() const { return class_->step * call_.plan.features; }

  void write_zeros(int64_t g) const {
    PlacedSweepArgs args{};
    place(g, args, [&](Range part) {
      args.columns = static_cast<int>(part.size());
      call_.kernels.data.point_sweep[vectors_](args);
    });
  }

  // Whether it is the first or the last sweep of row g of the result.
  bool is_first(const Sweep& s, int64_t g) const {
    return s.first_strand && s.channel_block == 0 && s.r == kernel_rows_[g - rows_.begin].begin;
  }
  bool is_last(const Sweep& s, int64_t g) const {
    return s.last_strand && s.channel_block + 1 == call_.plan.channel_blocks() &&
           s.r == kernel_rows_[g - rows_.begin].end;
  }

  // The filter block that comes next, as it lies in memory.
  Ahead filter_ahead(const Sweep& s, int sweep_rows) const {
    const DataPlan& plan = call_.plan;
    const auto share = [&](int64_t all) { return static_cast<int>(ceil_div(all, sweep_rows)); };
    Ahead ahead{};
    if (sweep_rows == 0) return ahead;
    if (call_.packed != nullptr) {
      const int64_t floats = plan.channel_block * s.strand.taps * features_;
      ahead.at = reinterpret_cast<const char*>(s.filter + floats);
      ahead.each = share(floats / 16);
      return ahead;
    }
    const bool next_row = s.r + 1 < plan.kernel_rows, next_channels = s.channel_block + 1 < plan.channel_blocks();
    const int64_t cb = next_row ? s.channel_block : next_channels ? s.channel_block + 1 : 0;
    const int64_t block = next_row || next_channels ? block_ : block_ + 1;
    if (block == plan.blocks) return ahead;
    ahead = call_.layout.source(call_.rhs, block, next_row ? s.r + 1 : 0, cb);
    ahead.each = share(ahead.rows);
    return ahead;
  }

  void run_packed(const Sweep& s) {
    sweep_rows_.clear();
    for (const Meeting& m : meetings_[s.r]) {
      // In place: a copy would wait for these stores one by one.
      SweepRow& row = sweep_rows_.emplace_back();
      input_.aim(m.input, s.strand, s.way, s.channel_block, &row);
      row.sums = sums_of(m.g);
      row.zero = is_first(s, m.g);
      if (row.zero && !covers(s.way)) {
        std::fill(row.sums, row.sums + u_.size() * features_, 0.0f);
        row.zero = false;
      }
      if (plain() && is_last(s, m.g)) row.out = out_of(m.g);
    }
    SweepArgs args = packed_args(s.way);
    aim(&args, s.filter);
    args.filter_ahead = filter_ahead(s, args.count);
    const bool placed = s.way.pixels > 0 && call_.kernels.data.sweep[s.strand.taps][vectors_](args);
    if (placed && plain()) return;
    for (const Meeting& m : meetings_[s.r]) {
      if (is_last(s, m.g)) finish(m.g, u_, sums_of(m.g));
    }
  }

  // Moves a part of a row of sums to the result.
  void finish(int64_t g, Range part, const float* sums) const {
    const int64_t at = result_index(g, part);
    call_.kernels.data.finish[index_of(call_.input.dtype)][index_of(call_.result.dtype)]({.sums = sums,
                                                                                          .pitch = features_,
                                                                                          .rows = part.size(),
                                                                                          .features = valid_,
                                                                                          .out = call_.result.at(at),
                                                                                          .out_pitch = result_pitch(),
                                                                                          .keep = keep_at(at),
                                                                                          .stream = call_.stream,
                                                                                          .fetch = call_.fetch});
  }

  void run_placed(const Sweep& s) const {
    const DataKernels& table = call_.kernels.data;
    const auto kernel =
        walk_ == Walk::kDense ? table.dense_sweep[s.strand.taps][vectors_] : table.point_sweep[vectors_];
    PlacedSweepArgs args{};
    args.filter = s.filter;
    args.pair_mask = walk_ == Walk::kPairs ? ~uint64_t{0} : 0;
    // A copy is contiguous, which the hardware sees; pixels in place may lie a page apart. Where a multiply-add has one
    // load, fetching all of a pixel for a few values costs more than it gains.
    const bool few = call_.plan.take && walk_ == Walk::kSingles;
    args.value_lines = call_.plan.copy || walk_ == Walk::kDense || few ? 0 : (call_.plan.channel_block + 15) / 16;
    for (const Meeting& m : meetings_[s.r]) {
      float* tile = sums_of(m.g);
      const bool first = is_first(s, m.g);
      const auto sweep = [&](Range part) {
        args.columns = static_cast<int>(part.size());
        args.tile = first ? nullptr : tile + (part.begin - u_.begin) * features_;
        input_.aim(m.input, s.strand, part, s.channel_block, &args);
        ahead_->aim(part.size(), &args);
        kernel(args);
      };
      if (is_last(s, m.g)) {
        place(m.g, args, sweep);
      } else {
        to_scratch(tile, args);
        sweep(u_);
      }
    }
  }

  void to_scratch(float* out, PlacedSweepArgs& args) const {
    args.out_dtype = DType::kF32;
    args.out = out;
    args.keep = nullptr;
    args.out_pitch = features_;
    args.out_features = static_cast<int>(features_);
    args.stream = args.fetch = false;
  }

  // The last sweep of a row: sweep(part) runs it for a range of columns.
  template <class F>
  void place(int64_t g, PlacedSweepArgs& args, F&& sweep) const {
    const int64_t step = call_.finish_columns(u_.size());
    for (Range part{u_.begin, 0}; part.begin < u_.end; part.begin = part.end) {
      part.end = std::min(u_.end, part.begin + step);
      if (call_.finishes()) {
        to_scratch(finished_, args);
        sweep(part);
        finish(g, part, finished_);
        continue;
      }
      const int64_t at = result_index(g, part);
      args.out_dtype = call_.result.dtype;
      args.narrow_out = call_.result.at(at);
      args.out = static_cast<float*>(args.narrow_out);
      args.keep = static_cast<const float*>(keep_at(at));
      args.out_pitch = result_pitch();
      args.out_features = static_cast<int>(valid_);
      args.stream = call_.stream;
      args.fetch = call_.fetch;
      sweep(part);
    }
  }

  const Call& call_;
  const TileInput& input_;
  const Walk walk_;
  const Range rows_, columns_;
  const SumsLayout& layout_;
  float *sums_, *finished_, *row_filter_;
  InputAhead* ahead_;
  std::vector<Range> kernel_rows_;  // of each row of the tile: [first, last], or first > last if it has none
  std::vector<std::vector<Meeting>> meetings_;  // of each kernel row: what it brings together
  // Of tall sweeps:
  std::vector<Tall> tall_;
  std::vector<int64_t> slots_;  // of each row of the tile, its sums; -1: it meets no input
  std::vector<bool> complete_;  // of each row of the tile: the last kernel row meets it
  std::vector<bool> fresh_;     // of each slot: the first kernel row meets it
  // Of the block at hand:
  const ColumnClass* class_ = nullptr;
  Range u_{0, 0};                     // its columns
  std::vector<TileInput::Way> ways_;  // of its strands
  std::vector<SweepRow> sweep_rows_;
  int64_t block_ = 0, vectors_ = 0, features_ = 0, first_feature_ = 0, valid_ = 0;
};

void count_path(DataOp op, bool dense) {
  if (op == DataOp::kFwd) return count(dense ? "conv_fwd/dense" : "conv_fwd/sparse");
  count(dense ? "conv_bwd_input/dense" : "conv_bwd_input/sparse");
}

// Prepares the input for the way that its zeros suggest. Of a tile like the whole operand, it is looked at once.
Walk choose_walk(const Call& call, TileInput& input) {
  const DataPlan& plan = call.plan;
  const auto dense = [&](double density) {
    return call.mode != Mode::kSparse && !plan.tall && (call.mode == Mode::kDense || density >= plan.dense_density);
  };
  if (dense(call.density) && (call.mode == Mode::kDense || dense(input.sample(call.kernels)))) {
    input.copy(call.kernels);
    return Walk::kDense;
  }
  const bool pairs = call.density >= plan.pair_density;
  const double density = input.mask(call.kernels, pairs);
  if (density == 0) return Walk::kNone;
  if (dense(density)) {
    input.copy(call.kernels);
    return Walk::kDense;
  }
  // Near the threshold both do, and packing again would cost more.
  constexpr float kMargin = 1.5f;
  const bool other = pairs ? kMargin * density < plan.pair_density : density > kMargin * plan.pair_density;
  if (other && plan.packs) input.mask(call.kernels, !pairs);
  return (pairs != other) ? Walk::kPairs : Walk::kSingles;
}

// The part of the input that a tile reads, if that is whole rows or one row; else none.
Range input_of(const DataPlan& plan, int64_t tile) {
  if (plan.row_tiles() == 1) {
    if (!plan.pointwise) return {0, 0};
    const int64_t column = tile * plan.tile_columns;
    return {column * plan.channels, std::min(plan.out_columns, column + plan.tile_columns) * plan.channels};
  }
  if (plan.column_tiles() > 1) return {0, 0};
  const int64_t row = tile * plan.tile_rows, last = std::min(plan.images * plan.out_rows, row + plan.tile_rows) - 1;
  const int64_t n0 = row / plan.out_rows, n1 = last / plan.out_rows;
  const int64_t y0 = plan.input_rows(row % plan.out_rows, row % plan.out_rows + 1).first;
  const int64_t y1 = plan.input_rows(last % plan.out_rows, last % plan.out_rows + 1).second;
  const int64_t pitch = plan.in_columns * plan.in_channels;
  return {(n0 * plan.in_rows + y0) * pitch, (n1 * plan.in_rows + y1) * pitch};
}

// The tiles of a call, dealt out to its threads share by share. A thread keeps to a tile, of which it has found the
// zeros. When all tiles have been begun it helps with one, however late or slow the others are.
class TileQueue {
 public:
  TileQueue(const DataPlan& plan, int threads) : plan_(plan), share_(plan.share(threads)), taken_(plan.tiles()) {
    for (std::atomic<int64_t>& taken : taken_) taken.store(0, std::memory_order_relaxed);
  }

  // The next share of a tile, empty when none is left.
  Range take(int64_t tile) {
    const int64_t begin = std::min(plan_.blocks, taken_[tile].fetch_add(share_, std::memory_order_relaxed));
    return {begin, std::min(plan_.blocks, begin + share_)};
  }

  struct Share {
    int64_t tile;
    Range blocks;  // empty: all is done or in other hands
  };
  // The first share of a tile for a thread that has none.
  Share begin() {
    const int64_t tiles = plan_.tiles(), tile = begun_.fetch_add(1, std::memory_order_relaxed);
    if (tile < tiles) {
      const Range blocks = take(tile);
      if (blocks.size() > 0) return {tile, blocks};
    }
    while (tiles > 0) {
      const auto least = std::min_element(taken_.begin(), taken_.end(), [](const auto& a, const auto& b) {
        return a.load(std::memory_order_relaxed) < b.load(std::memory_order_relaxed);
      });
      const double left = static_cast<double>(plan_.blocks - least->load(std::memory_order_relaxed));
      // Finding the zeros again takes as long as a multiply-add for each value; what is left should take longer.
      if (left <= 0 || plan_.visited * plan_.value_work * left < static_cast<double>(plan_.blocks)) break;
      const Range blocks = take(least - taken_.begin());
      if (blocks.size() > 0) return {least - taken_.begin(), blocks};
    }
    return {0, {0, 0}};
  }

 private:
  const DataPlan& plan_;
  const int64_t share_;
  std::atomic<int64_t> begun_{0};
  std::vector<std::atomic<int64_t>> taken_;  // blocks of each tile
};

// The shares of a tile that this thread gets, from `share` on. `next` is what it will probably read next of the input,
// elements; empty if unknown.
void run_tile(const Call& call, Range rows, Range columns, TileQueue::Share share, Range next, TileQueue* queue) {
  const DataPlan& plan = call.plan;
  TileInput input(plan, call.input, rows, columns);
  const int64_t block_features = plan.vectors * call.kernels.lanes;
  const SumsLayout layout(plan, input, columns, plan.packs);
  const int64_t sum_floats = layout.columns(plan.tall ? input.tall_rows() : rows.size()) * block_features;
  int64_t row_floats = 0;
  for (size_t cls = 0; cls < plan.classes.size() && call.packed == nullptr; ++cls) {
    row_floats = std::max(row_floats, call.layout.row_floats(0, cls));
  }
  const int64_t finished_floats = call.finishes() ? call.finish_columns(columns.size()) * block_features : 0;
  Scratch& scratch = Scratch::local();
  scratch.begin(input.scratch_bytes() + Scratch::size<float>(sum_floats) + Scratch::size<float>(finished_floats) +
                Scratch::size<float>(row_floats));
  input.take(scratch);
  float* sums = scratch.take<float>(sum_floats) + layout.before * block_features;
  float* finished = scratch.take<float>(finished_floats);
  float* row_filter = scratch.take<float>(row_floats);
  const Walk walk = choose_walk(call, input);
  const bool dense = walk == Walk::kDense;
  int64_t sweeps = 0;
  for (const ColumnClass& c : plan.classes) sweeps += c.strands.size();
  sweeps *= (plan.tall ? input.rows() : rows.size() * plan.kernel_rows) * plan.blocks * plan.channel_blocks();
  InputAhead ahead(call.input.at(next.begin), next.size() * call.input.size(), columns.size(), sweeps);
  BlockSweeper sweeper(call, input, walk, rows, columns, layout, sums, finished, row_filter, &ahead);
  for (; share.blocks.size() > 0; share.blocks = queue->take(share.tile)) {
    const auto [begin, end] = share.blocks;
    if (begin == 0) count_path(plan.op, dense);
    for (size_t cls = 0; cls < plan.classes.size(); ++cls) {
      for (int64_t block = begin; block < end; ++block) sweeper.run(cls, block);
    }
  }
  if (call.stream) call.kernels.data.stream_fence();
}

// `density` is that of the input.
void conv_data(const Kernels& isa, DataOp op, const ConvShape& shape, Mode mode, double density, ConstTensor input,
               ConstTensor rhs, ConstTensor keep, Tensor result, Executor& executor) {
  const Kernels& k = kernels_for(op == DataOp::kFwd ? shape.k : shape.c, machine(), isa);
  const DataPlan plan = plan_data(op, shape, mode, input.dtype, density, machine(), k);
  const PackedKernel layout(plan, k.lanes);
  const int64_t channel_blocks = plan.channel_blocks();
  const int64_t column_tiles = plan.column_tiles(), tiles = plan.tiles();
  const bool packs_ahead = tiles > 2 || plan.tall;
  SharedBuffer packed(packs_ahead ? layout.floats() * sizeof(float) : 64);
  const bool stream = plan.stream && fills_lines(result);
  const int64_t result_bytes = plan.images * plan.out_rows * plan.out_columns * plan.features * result.size();
  const Call call{.plan = plan,
                  .density = density,
                  .kernels = k,
                  .layout = layout,
                  .mode = mode,
                  .input = input,
                  .rhs = rhs,
                  .packed = packs_ahead ? packed.as<float>() : nullptr,
                  .keep = keep,
                  .result = result,
                  .stream = stream,
                  .fetch = !stream && result_bytes > 2 * machine().l2_bytes};

  Executor& threads = helpers_unless(plan.serial, executor);
  const int concurrency = threads.concurrency();
  TileQueue queue(plan, concurrency);
  run_phases(
      threads,
      {
          {packs_ahead ? channel_blocks * plan.kernel_rows : 0,
           [&](int64_t i) { layout.pack(k, rhs, i / plan.kernel_rows, i % plan.kernel_rows, packed.as<float>()); }},
          {std::min<int64_t>(concurrency, plan.shares(concurrency)),
           [&](int64_t) {
             const int64_t step = plan.classes.front().step;
             for (auto share = queue.begin(); share.blocks.size() > 0; share = queue.begin()) {
               const int64_t row = share.tile / column_tiles * plan.tile_rows;
               const int64_t column = share.tile % column_tiles * plan.tile_columns;
               const int64_t later = share.tile + concurrency;  // threads take tiles in turn
               run_tile(call, {row, std::min(plan.images * plan.out_rows, row + plan.tile_rows)},
                        {column, std::min(round_up(plan.out_columns, step), column + plan.tile_columns)}, share,
                        later < tiles ? input_of(plan, later) : Range{0, 0}, &queue);
             }
           }},
      });
}

// The same with no mask on the result: measures the input's zeros first.
void conv_measured(DataOp op, const ConvShape& shape, Mode mode, ConstTensor input, ConstTensor rhs, Tensor result,
                   Executor& executor) {
  const Kernels& k = kernels();  // once: another may be set meanwhile
  const bool fwd = op == DataOp::kFwd;
  const int64_t input_size = fwd ? shape.lhs_size() : shape.out_size();
  const int64_t result_size = fwd ? shape.out_size() : shape.lhs_size();
  const double sample = mode == Mode::kDense ? 1 : density(k, input, input_size);
  if (zero_of_zeros(k, sample, input, input_size, {{result, result_size}}, executor)) return count_path(op, false);
  conv_data(k, op, shape, mode, sample, input, rhs, {nullptr, input.dtype}, result, executor);
}

}  // namespace

void conv_fwd(const ConvShape& shape, Mode mode, ConstTensor lhs, ConstTensor rhs, Tensor out, Executor& executor) {
  conv_measured(DataOp::kFwd, shape, mode, lhs, rhs, out, executor);
}

void conv_bwd_input(const ConvShape& shape, Mode mode, ConstTensor g, ConstTensor rhs, Tensor dlhs,
                    Executor& executor) {
  conv_measured(DataOp::kBwdInput, shape, mode, g, rhs, dlhs, executor);
}

void conv_bwd_input_where(const Kernels& kernels, const ConvShape& shape, Mode mode, double density, ConstTensor g,
                          ConstTensor rhs, ConstTensor x, Tensor dlhs, Executor& executor) {
  conv_data(kernels, DataOp::kBwdInput, shape, mode, density, g, rhs, x, dlhs, executor);
}

}  // namespace sparsetrain
