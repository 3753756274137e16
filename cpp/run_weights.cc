// BWW: runs a WeightsPlan. kernels_weights.h has the algorithm, plan_weights.h the blocking.
#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

#include "conv.h"
#include "isa.h"
#include "parallel.h"
#include "plan_weights.h"
#include "run_weights.h"
#include "zeros.h"

namespace sparsetrain {
namespace {

constexpr ptrdiff_t kLinePad = 16;  // floats between lines of values, so that lines do not share cache sets

int log2_of(int vectors) { return __builtin_ctz(static_cast<unsigned>(vectors)); }
// For bounds that nothing reaches.
int clamped(int64_t a) { return static_cast<int>(std::clamp<int64_t>(a, -(1 << 30), 1 << 30)); }

struct Image {
  ConstTensor values;
  int64_t rows, columns, channels;
  Fold fold;
};

// The channels and features of drhs that an item computes, and its chunk of the pixels.
struct Item {
  int64_t channel, channels, feature, features, chunk;
};

Item item_of(const WeightsPlan& plan, int64_t index) {
  const int64_t channel_blocks = plan.channel_blocks(), feature_blocks = plan.feature_blocks();
  Item item;
  item.channel = index % channel_blocks * plan.channel_block;
  item.channels = std::min(plan.channel_block, plan.channels - item.channel);
  item.feature = index / channel_blocks % feature_blocks * plan.feature_block;
  item.features = std::min(plan.feature_block, plan.features - item.feature);
  item.chunk = index / (channel_blocks * feature_blocks);
  return item;
}

// Whole tiles, for every choice of vectors.
int64_t panel_channels(const WeightsPlan& plan) { return round_up(plan.channel_block, 24); }

// Calls f(step's first feature, features, vectors, offset of its sums in the panel) for each step of a group, or of one
// whose sums lie among that one's. `offset` runs on from group to group.
template <class F>
void for_steps(const WeightsPlan& plan, const TapGroup& group, const Item& item, int64_t& offset, F&& f) {
  for (int64_t first = 0; first < item.features;) {
    const int vectors = step_vectors(item.features - first, group.vectors, plan.lanes);
    const int64_t width = vectors * plan.lanes, features = std::min(width, item.features - first);
    f(first, static_cast<int>(features), vectors, offset);
    offset += panel_channels(plan) * group.place.taps * width;
    first += features;
  }
}

// Floats of the panel of a class, of its first `groups` groups.
int64_t panel_floats(const WeightsPlan& plan, const PixelClass& cls, const Item& item, size_t groups) {
  int64_t offset = 0;
  for (size_t i = 0; i < groups; ++i) for_steps(plan, cls.groups[i], item, offset, [](int64_t, int, int, int64_t) {});
  return offset;
}
int64_t panel_floats(const WeightsPlan& plan, const PixelClass& cls, const Item& item) {
  return panel_floats(plan, cls, item, cls.groups.size());
}

// Pointers to the pixels of a block: position by position, where those without a pixel point to zeros; or one by one.
struct PixelTable {
  const void** pixels;
  int64_t count;
  char* windows;        // those of a folded image that reach into the padding
  uint16_t* positions;  // of pixels one by one, for lists
  bool one_run;         // of the dense operand: each pixel follows the one before in memory
};

// Points `to` at `count` pixels of a row of an image, `step` apart, at their channel `channel`.
void point_at_row(const Image& image, int64_t n, int64_t y, int64_t x, int64_t step, int64_t count, int64_t channel,
                  const void** to, char*& windows) {
  const Fold& fold = image.fold;
  const int64_t size = image.values.size();
  if (fold.taps == 0) {
    const void* first = image.values.at(((n * image.rows + y) * image.columns + x) * image.channels + channel);
    const char* pixel = static_cast<const char*>(first);
    for (int64_t i = 0; i < count; ++i, pixel += step * image.channels * size) to[i] = pixel;
    return;
  }
  const char* row = static_cast<const char*>(image.values.at((n * image.rows + y) * fold.columns * fold.channels));
  for (int64_t i = 0; i < count; ++i, x += step) {
    const int64_t want = x * fold.stride - fold.pad;
    const int64_t begin = std::clamp<int64_t>(want, 0, fold.columns);
    const int64_t end = std::clamp<int64_t>(want + fold.taps, begin, fold.columns);
    if (end - begin == fold.taps) {
      to[i] = row + (begin * fold.channels + channel) * size;
      continue;
    }
    std::memset(windows, 0, image.channels * size);
    std::memcpy(windows + (begin - want) * (begin < end) * fold.channels * size, row + begin * fold.channels * size,
                (end - begin) * fold.channels * size);
    to[i] = windows + channel * size;
    windows += image.channels * size;
  }
}

// How many windows of a row reach into the padding.
int64_t padded_windows(const Image& image) {
  const Fold& fold = image.fold;
  if (fold.taps == 0) return 0;
  int64_t padded = 0;
  for (int64_t x = 0; x < image.columns; ++x) {
    const int64_t begin = x * fold.stride - fold.pad;
    padded += begin < 0 || begin + fold.taps > fold.columns;
  }
  return padded;
}

// Scratch of one thread. Tables come in twos: of what is computed, and of what comes next, to be prefetched.
struct ItemScratch {
  float* zeros;
  PixelTable checked[2], dense[2];
  float* values;  // packed pixels of the checked operand
  uint64_t* masks;
  uint16_t* lists;  // of the non-zeros in them
  uint16_t* counts;
  const uint16_t* positions;  // 0, 1, 2, ...
  float* copy;                // a step's block of the dense operand
  float* panel;
  // Of walks of both gradients: where the pixels of a block lie in dlhs, and the sums of their non-zeros.
  void** pixels;
  float* sums;
};

class WeightsRun {
 public:
  // `input`: if plan.both, else null; `filters` then has room for filter_floats(plan).
  WeightsRun(const WeightsPlan& plan, const Kernels& kernels, ConstTensor lhs, ConstTensor g, Tensor drhs,
             const InputGradient* input, float* filters)
      : plan_(plan),
        kernels_(kernels),
        table_(kernels.weights),
        drhs_(drhs),
        input_(input),
        filters_(filters),
        dtype_(index_of(lhs.dtype)),
        size_(lhs.size()) {
    const ConvShape& s = plan.shape;
    const Image lhs_image = {lhs, s.h, s.w, s.c, plan.fold}, g_image = {g, s.oh, s.ow, s.k, {}};
    checked_ = plan.lhs_checked ? lhs_image : g_image;
    dense_ = plan.lhs_checked ? g_image : lhs_image;
    stream_ = plan.stream && fills_lines(input->dlhs);
    size_scratch();
  }

  // Of the packed filters of walks of both gradients.
  static int64_t filter_floats(const WeightsPlan& plan) {
    int64_t floats = 0;
    for (const PixelClass& cls : plan.classes) floats += filter_floats(plan, panel_floats(plan, cls, item_of(plan, 0)));
    return floats;
  }

  int64_t packs() const {
    int64_t groups = 0;
    for (const PixelClass& cls : plan_.classes) groups += static_cast<int64_t>(cls.groups.size());
    return groups * ceil_div(plan_.channels, kPackChannels);
  }

  // Copies the filters of all steps of a group, for some channels, to the order in which walks of both gradients read
  // them, that of the sums: the kernel is read line by line.
  void pack_filters(int64_t index) const {
    const ConvShape& s = plan_.shape;
    const int64_t pieces = ceil_div(s.c, kPackChannels), piece = index % pieces;
    const Item item = item_of(plan_, 0);
    float* filters = filters_;
    const PixelClass* cls = plan_.classes.data();
    size_t number = static_cast<size_t>(index / pieces);
    for (; number >= cls->groups.size(); ++cls) {
      filters += filter_floats(plan_, panel_floats(plan_, *cls, item));
      number -= cls->groups.size();
    }
    const TapGroup& group = cls->groups[number];
    const int taps = group.place.taps;
    const int64_t begin = panel_floats(plan_, *cls, item, number);
    for (int tap = 0; tap < taps; ++tap) {
      const int64_t r = group.rows.tap + tap / group.columns.taps * group.rows.tap_step;
      const int64_t q = group.columns.tap + tap % group.columns.taps * group.columns.tap_step;
      for (int64_t c = piece * kPackChannels; c < std::min(s.c, (piece + 1) * kPackChannels); ++c) {
        int64_t offset = begin;
        for_steps(plan_, group, item, offset, [&](int64_t first, int features, int vectors, int64_t sums) {
          const int64_t width = vectors * plan_.lanes;
          float* to = filters + filter_floats(plan_, sums) + (c * taps + tap) * width;
          kernels_.data.widen[dtype_](input_->rhs.at(((r * s.s + q) * s.c + c) * s.k + first), to, features);
          std::fill(to + features, to + width, 0.0f);
        });
      }
    }
  }

  int64_t items() const { return plan_.items(); }
  size_t chunk_bytes() const { return plan_.chunks * chunk_floats() * sizeof(float); }
  int64_t reductions() const { return items() / plan_.chunks * slices() * static_cast<int64_t>(plan_.classes.size()); }

  // `chunk_panels`: room for all sums of each chunk, or null when there is one chunk only.
  void run(int64_t index, float* chunk_panels) const {
    const Item item = item_of(plan_, index);
    ItemScratch scratch = take_scratch();
    int64_t base = index % (items() / plan_.chunks) * item_floats_ + item.chunk * chunk_floats();
    const float* filters = filters_;
    for (const PixelClass& cls : plan_.classes) {
      if (chunk_panels != nullptr) scratch.panel = chunk_panels + base;
      run_class(cls, item, filters, scratch);
      if (chunk_panels == nullptr && !direct()) store(cls, item, scratch.panel, 0, item.channels);
      const int64_t floats = panel_floats(plan_, cls, item_of(plan_, 0));
      base += floats;
      if (plan_.both) filters += filter_floats(plan_, floats);
    }
  }

  // Adds the chunks' sums for a slice of an item's channels, in order, and stores them.
  void reduce(int64_t index, float* chunk_panels) const {
    const int64_t slice = index % slices(), class_index = index / slices() % static_cast<int64_t>(plan_.classes.size());
    const int64_t item_index = index / slices() / static_cast<int64_t>(plan_.classes.size());
    const Item item = item_of(plan_, item_index);
    const int64_t begin = slice * kSliceChannels, end = std::min(begin + kSliceChannels, item.channels);
    if (begin >= end) return;
    const PixelClass& cls = plan_.classes[class_index];
    float* panel = chunk_panels + item_index * item_floats_;
    for (int64_t i = 0; i < class_index; ++i) panel += panel_floats(plan_, plan_.classes[i], item_of(plan_, 0));
    int64_t offset = 0;
    for (const TapGroup& group : cls.groups) {
      const int64_t taps = group.rows.taps * group.columns.taps;
      for_steps(plan_, group, item, offset, [&](int64_t, int, int vectors, int64_t sums) {
        const int64_t channel = taps * vectors * plan_.lanes;
        table_.add({panel + sums + begin * channel, chunk_floats(), plan_.chunks, (end - begin) * channel});
      });
    }
    store(cls, item, panel, begin, end);
  }

 private:
  static constexpr int64_t kSliceChannels = 32;
  static constexpr int64_t kPackChannels = 16;  // of the kernel, packed at a time

  // What floats of a panel, for all channels, are among the filters.
  static int64_t filter_floats(const WeightsPlan& plan, int64_t floats) {
    return floats / panel_channels(plan) * plan.channels;
  }
  int64_t slices() const { return ceil_div(plan_.channel_block, kSliceChannels); }
  int64_t chunk_floats() const { return items() / plan_.chunks * item_floats_; }

  // Neighbours in memory that are a multiple of 2 KiB apart share sets of L1: sixteen lines of theirs do not stay
  // there. (Every second pixel of half that pitch does no harm: measured.)
  bool lines_apart() const { return checked_.channels * size_ % 2048 != 0; }

  bool packed(const PixelClass& part) const {
    return plan_.sparse && (part.lists == WeightsLists::kPacked || part.lists == WeightsLists::kNeighbours);
  }
  // Of packed values and their lists: from a channel's neighbours to its others.
  ptrdiff_t other_values() const { return neighbours_ ? positions_ + kLinePad : 0; }
  ptrdiff_t other_list() const { return neighbours_ ? positions_ / 2 + kListPad : 0; }
  ptrdiff_t line() const { return other_values() + positions_ + kLinePad; }
  // An odd number of lines, so that the ends of lists, where they are written, do not share cache sets.
  ptrdiff_t list_pitch() const { return (other_list() + positions_ + kListPad) | kListPad; }

  // Whether a block of the dense operand lies as its copy would: pixel by pixel, all their features in one step.
  bool lies_as_copied(const PixelTable& table, int width) const {
    return table.one_run && width == dense_.channels && dense_.values.dtype == DType::kF32 &&
           reinterpret_cast<uintptr_t>(table.pixels[0]) % 64 == 0;
  }

  // The last walk of a panel writes drhs itself; sums are narrowed when they are complete.
  bool direct() const { return plan_.lhs_checked && plan_.chunks == 1 && drhs_.dtype == DType::kF32; }

  void size_scratch() {
    const Item item = item_of(plan_, 0);
    const auto fit = [this](const PixelClass& part) {
      positions_ = std::max(positions_, part.positions);
      neighbours_ = neighbours_ || part.lists == WeightsLists::kNeighbours;
      for (const TapGroup& group : part.groups) {
        const int64_t positions = part.positions + group.rows.taps * part.pitch + group.columns.taps;
        dense_positions_ = std::max(dense_positions_, positions);
        copy_floats_ = std::max(copy_floats_, positions * group.vectors * plan_.lanes);
        const int64_t rows = part.block_images * (part.block_rows + group.rows.taps);
        checked_windows_ = std::max(checked_windows_, rows * padded_windows(checked_) * checked_.channels * size_);
        dense_windows_ = std::max(dense_windows_, rows * padded_windows(dense_) * dense_.channels * size_);
      }
    };
    for (const PixelClass& cls : plan_.classes) {
      cls.for_parts(fit);
      const int64_t floats = panel_floats(plan_, cls, item);
      item_floats_ += floats;
      panel_floats_ = std::max(panel_floats_, floats);
    }
    if (plan_.chunks > 1) panel_floats_ = 0;  // they live in the shared buffer
  }

  ItemScratch take_scratch() const {
    const int64_t lines = panel_channels(plan_) + 64, words = positions_ / 64 + 1;
    const int64_t pixels = plan_.both ? positions_ : 0, sums = plan_.both ? lines * line() : 0;
    const int64_t values = lines * line(), zeros = std::max(plan_.channels, plan_.features) + 64;
    Scratch& scratch = Scratch::local();
    scratch.begin(2 * Scratch::size<void*>(positions_) + 2 * Scratch::size<void*>(dense_positions_) +
                  2 * Scratch::size<char>(checked_windows_) + 2 * Scratch::size<char>(dense_windows_) +
                  2 * Scratch::size<uint16_t>(positions_) + Scratch::size<float>(zeros) + Scratch::size<float>(values) +
                  Scratch::size<uint64_t>(lines * words) + Scratch::size<uint16_t>(lines * list_pitch()) +
                  Scratch::size<uint16_t>(3 * lines) + Scratch::size<uint16_t>(positions_) +
                  Scratch::size<float>(copy_floats_) + Scratch::size<float>(panel_floats_) +
                  Scratch::size<void*>(pixels) + Scratch::size<float>(sums));
    ItemScratch s;
    for (PixelTable& table : s.checked) {
      table = {scratch.take<const void*>(positions_), 0, scratch.take<char>(checked_windows_),
               scratch.take<uint16_t>(positions_), false};
    }
    for (PixelTable& table : s.dense) {
      table = {scratch.take<const void*>(dense_positions_), 0, scratch.take<char>(dense_windows_), nullptr, false};
    }
    s.zeros = scratch.take<float>(zeros);
    s.values = scratch.take<float>(values);
    s.masks = scratch.take<uint64_t>(lines * words);
    s.lists = scratch.take<uint16_t>(lines * list_pitch());
    s.counts = scratch.take<uint16_t>(3 * lines);
    uint16_t* positions = scratch.take<uint16_t>(positions_);
    for (int64_t i = 0; i < positions_; ++i) positions[i] = static_cast<uint16_t>(i);
    s.positions = positions;
    s.copy = scratch.take<float>(copy_floats_);
    s.panel = scratch.take<float>(panel_floats_);
    s.pixels = scratch.take<void*>(pixels);
    s.sums = scratch.take<float>(sums);
    std::memset(s.zeros, 0, zeros * sizeof(float));
    return s;
  }

  static int words_of(const PixelTable& table) { return static_cast<int>(ceil_div(table.count, 64)); }

  // A block of a class or of one of its borders.
  struct Place {
    const PixelClass* part;
    int64_t index;
  };

  // The blocks of an item. Those of borders come before the last of the class itself, which writes all sums out. Each
  // border's go to chunks from another one on: there may be fewer of them than chunks.
  std::vector<Place> places(const PixelClass& cls, const Item& item) const {
    std::vector<Place> places;
    const auto add = [&](const PixelClass& part, int64_t chunk) {
      const int64_t blocks = part.block_count();
      for (int64_t i = blocks * chunk / plan_.chunks; i < blocks * (chunk + 1) / plan_.chunks; ++i) {
        places.push_back({&part, i});
      }
    };
    add(cls, item.chunk);
    const size_t own = places.size();
    for (size_t i = 0; i < cls.borders.size(); ++i) {
      add(cls.borders[i], (item.chunk + static_cast<int64_t>(i) + 1) % plan_.chunks);
    }
    if (own > 0) std::rotate(places.begin() + own - 1, places.begin() + own, places.end());
    return places;
  }

  // `filters`: of the class, of all channels.
  void run_class(const PixelClass& cls, const Item& item, const float* filters, ItemScratch& scratch) const {
    const std::vector<Place> blocks = places(cls, item);
    // The first block starts all sums, unless it is one of a border's. A chunk may have none.
    const bool starts = !blocks.empty() && blocks.front().part == &cls;
    if (!starts) std::memset(scratch.panel, 0, panel_floats(plan_, cls, item) * sizeof(float));
    if (blocks.empty()) return;
    const auto point_at_first = [&](const Place& to, PixelTable& table) {
      point_at_dense(*to.part, to.part->groups[0], to.index, scratch, table);
    };
    point_at_checked(*blocks[0].part, blocks[0].index, item, scratch, scratch.checked[0]);
    point_at_first(blocks[0], scratch.dense[0]);
    for (size_t b = 0; b < blocks.size(); ++b) {
      const PixelClass& part = *blocks[b].part;
      const Block block = part.block(blocks[b].index, plan_.shape.n);
      const bool first_block = b == 0 && starts, last = b + 1 == blocks.size();
      const Place next_block = last ? Place{} : blocks[b + 1];
      const bool any = !plan_.sparse || pack(part, item, scratch) != 0;
      scratch.checked[1].count = 0;
      if (!last) point_at_checked(*next_block.part, next_block.index, item, scratch, scratch.checked[1]);
      if (!any && !first_block && !(direct() && last)) {  // nothing to add, nothing to start or to store
        if (plan_.both) store_input(block, item, scratch);
        if (!last) point_at_first(next_block, scratch.dense[0]);
        std::swap(scratch.checked[0], scratch.checked[1]);
        continue;
      }
      int64_t steps = 0, unused = 0, step = 0;
      for (const TapGroup& group : part.groups) {
        for_steps(plan_, group, item, unused, [&steps](int64_t, int, int, int64_t) { ++steps; });
      }
      int grouped = 0;
      for (size_t i = 0; i < part.groups.size(); ++i) {
        const TapGroup& group = part.groups[i];
        int64_t offset = panel_floats(plan_, cls, item, group.place.group);
        scratch.dense[1].count = 0;
        if (i + 1 < part.groups.size()) {
          point_at_dense(part, part.groups[i + 1], blocks[b].index, scratch, scratch.dense[1]);
        } else if (!last) {
          point_at_first(next_block, scratch.dense[1]);
        }
        for_steps(plan_, group, item, offset, [&](int64_t first, int features, int vectors, int64_t sums) {
          const int width = vectors * plan_.lanes;
          const int64_t feature = item.feature + first;
          const bool in_place = lies_as_copied(scratch.dense[0], width);
          if (any && !in_place) {
            table_.copy[dtype_]({.pixels = scratch.dense[0].pixels,
                                 .positions = scratch.dense[0].count,
                                 .feature = feature,
                                 .features = features,
                                 .to = scratch.copy,
                                 .width = width});
          }
          const bool more = first + features < item.features;
          const PixelTable& next = scratch.dense[more ? 0 : 1];
          const PixelTable& ahead = scratch.checked[1];
          const int64_t from = ahead.count * step / steps, to = ahead.count * (step + 1) / steps;
          ++step;
          const Step now = {
              .part = part,
              .group = group,
              .block = block,
              .vectors = vectors,
              .channels = static_cast<int>(item.channels),
              .dense = in_place ? static_cast<const float*>(scratch.dense[0].pixels[0]) : scratch.copy,
              .panel =
                  panel_of(group, item, first, features, width, scratch.panel + sums, first_block, direct() && last),
              .next_dense = {.pixels = next.pixels,
                             .count = next.count,
                             .offset = (more ? feature + width : item.feature) * size_,
                             .lines = lines_of(width * size_, dense_.channels * size_)},
              .next_checked = {.pixels = ahead.pixels + from,
                               .count = to - from,
                               .offset = 0,
                               .lines = lines_of(item.channels * size_, checked_.channels * size_)},
          };
          if (plan_.both) {
            const int64_t place = item.channel * group.place.taps + group.place.first;
            walk_both(now, filters + filter_floats(plan_, sums) + place * width, i == 0 && first == 0, scratch);
          } else if (plan_.sparse) {
            walk(now, scratch);
          } else {
            tile(now, grouped != vectors, scratch);
            grouped = vectors;
          }
        });
        std::swap(scratch.dense[0], scratch.dense[1]);
      }
      if (plan_.both) store_input(block, item, scratch);
      std::swap(scratch.checked[0], scratch.checked[1]);
    }
  }

  // A block meets a group of taps and a step of features: what its kernel is told, beside what lies in scratch.
  struct Step {
    const PixelClass& part;
    const TapGroup& group;
    const Block& block;
    int vectors, channels;
    const float* dense;
    WeightsPanel panel;
    WeightsPrefetch next_dense, next_checked;
  };

  WeightsWalkArgs walk_args(const Step& step, const ItemScratch& scratch) const {
    return {.values = scratch.values,
            .value_pitch = line(),
            .masks = scratch.masks,
            .words = words_of(scratch.checked[0]),
            .lists = scratch.lists,
            .list_pitch = list_pitch(),
            .counts = scratch.counts,
            .kind = step.part.lists,
            .other_values = other_values(),
            .other_list = other_list(),
            .take = plan_.take,
            .channels = step.channels,
            .together = step.part.together,
            .dense = step.dense,
            .tap_row = step.part.pitch,
            .panel = step.panel,
            .next = {step.next_dense, step.next_checked}};
  }

  void walk(const Step& step, const ItemScratch& scratch) const {
    const TapGroup& group = step.group;
    table_.walk[group.rows.taps][group.columns.taps][log2_of(step.vectors)](walk_args(step, scratch));
  }

  // `first`: of the steps that the block meets.
  void walk_both(const Step& step, const float* filter, bool first, const ItemScratch& scratch) const {
    const TapGroup& group = step.group;
    kernels_.both.walk[group.rows.taps][group.columns.taps][log2_of(step.vectors)](
        {.walk = walk_args(step, scratch), .filter = filter, .sums = scratch.sums, .first = first});
  }

  // Writes the gradient of lhs of a block.
  void store_input(const Block& block, const Item& item, const ItemScratch& scratch) const {
    const PixelTable& table = scratch.checked[0];
    const int slots = static_cast<int>(block.images * block.rows * block.columns);
    const char* lhs = static_cast<const char*>(checked_.values.data);
    for (int i = 0; i < slots; ++i) {
      scratch.pixels[i] = input_->dlhs.at((static_cast<const char*>(table.pixels[i]) - lhs) / size_);
    }
    kernels_.masked.store[index_of(input_->dlhs.dtype)]({.masks = scratch.masks,
                                                         .words = words_of(table),
                                                         .channels = static_cast<int>(item.channels),
                                                         .values = scratch.sums,
                                                         .capacity = static_cast<int>(line()),
                                                         .pixels = scratch.pixels,
                                                         .slots = slots,
                                                         .stream = stream_,
                                                         .taken = scratch.counts});
  }

  // `groups`: the checked pixels have not been grouped for steps as wide as this one.
  void tile(const Step& step, bool groups, const ItemScratch& scratch) const {
    const int choice = log2_of(step.vectors);
    const PixelTable& checked = scratch.checked[0];
    const ptrdiff_t group_pitch = checked.count * table_.tile_channels[choice] + 2 * kLinePad;
    if (groups) {
      table_.group[dtype_][choice]({.pixels = checked.pixels,
                                    .count = checked.count,
                                    .channels = step.channels,
                                    .values = scratch.values,
                                    .group_pitch = group_pitch});
    }
    const TapAxis &rows = step.group.rows, &columns = step.group.columns;
    const Block& block = step.block;
    table_.tile[choice]({.values = scratch.values,
                         .group_pitch = group_pitch,
                         .channels = step.channels,
                         .images = static_cast<int>(block.images),
                         .rows = static_cast<int>(block.rows),
                         .columns = static_cast<int>(block.columns),
                         .dense = step.dense,
                         .image_pitch = step.part.image_rows * step.part.pitch,
                         .pitch = step.part.pitch,
                         .tap_rows = rows.taps,
                         .tap_columns = columns.taps,
                         .tap_row = step.part.pitch,
                         .row_begin = clamped(-block.row - rows.offset),
                         .row_end = clamped(rows.count - block.row - rows.offset),
                         .column_begin = clamped(-block.column - columns.offset),
                         .column_end = clamped(columns.count - block.column - columns.offset),
                         .panel = step.panel,
                         .next = {step.next_dense, step.next_checked}});
  }

  // The pixels of a block of the checked operand: for masks position by position; one by one for lists of packed
  // values, up to whole vectors, and for tiles.
  void point_at_checked(const PixelClass& cls, int64_t index, const Item& item, const ItemScratch& scratch,
                        PixelTable& table) const {
    const Block block = cls.block(index, plan_.shape.n);
    char* windows = table.windows;
    table.count = 0;
    if (block.images == 0 || block.rows == 0 || block.columns == 0) return;
    const bool gaps = plan_.sparse && !packed(cls);
    const Positions positions = gaps ? Positions(cls) : Positions{block.columns, block.rows};
    table.count = positions.position(block.images - 1, block.rows - 1, block.columns);
    if (gaps) std::fill_n(table.pixels, round_up(table.count, 64), scratch.zeros);
    if (packed(cls)) {
      const int64_t count = round_up(table.count, kPackPixels);
      std::fill(table.pixels + table.count, table.pixels + count, scratch.zeros);
      std::fill(table.positions + table.count, table.positions + count, uint16_t{0});
      table.count = count;
    }
    for (int64_t image = 0; image < block.images; ++image) {
      for (int64_t row = 0; row < block.rows; ++row) {
        const void** to = table.pixels + positions.position(image, row, 0);
        point_at_row(checked_, block.image + image, cls.rows.start + (block.row + row) * cls.rows.step,
                     cls.columns.start + block.column * cls.columns.step, cls.columns.step, block.columns, item.channel,
                     to, windows);
        if (!packed(cls)) continue;
        std::iota(table.positions + (to - table.pixels), table.positions + (to - table.pixels) + block.columns,
                  static_cast<uint16_t>(cls.position(image, row, 0)));
      }
    }
  }

  // The pixels of the dense operand that a group's taps meet in a block, zeros where they meet padding.
  void point_at_dense(const PixelClass& cls, const TapGroup& group, int64_t index, const ItemScratch& scratch,
                      PixelTable& table) const {
    const Block block = cls.block(index, plan_.shape.n);
    table.count = 0;
    table.one_run = false;
    if (block.images == 0 || block.rows == 0 || block.columns == 0) return;
    const Meeting rows(group.rows, block.row, block.rows), columns(group.columns, block.column, block.columns);
    char* windows = table.windows;
    table.count = cls.position(block.images - 1, rows.positions - 1, columns.positions);
    std::fill_n(table.pixels, table.count, scratch.zeros);
    const int64_t count = columns.end - columns.begin, step = group.columns.step;
    table.one_run = count == table.count && rows.begin < rows.end && step == 1 && dense_.fold.taps == 0;
    if (count == 0) return;
    const int64_t first = group.columns.start + (columns.at + columns.begin) * step;
    for (int64_t image = 0; image < block.images; ++image) {
      for (int64_t row = rows.begin; row < rows.end; ++row) {
        point_at_row(dense_, block.image + image, group.rows.start + (rows.at + row) * group.rows.step, first, step,
                     count, 0, table.pixels + cls.position(image, row, columns.begin), windows);
      }
    }
  }

  // Packs a block for walks. Returns the number of non-zeros.
  int64_t pack(const PixelClass& part, const Item& item, const ItemScratch& scratch) const {
    const PixelTable& table = scratch.checked[0];
    const int channels = static_cast<int>(item.channels), words = words_of(table);
    if (packed(part)) {
      return table_.pack_lists[dtype_]({.pixels = table.pixels,
                                        .positions = table.positions,
                                        .count = static_cast<int>(table.count),
                                        .channels = channels,
                                        .neighbours = part.lists == WeightsLists::kNeighbours,
                                        .values = scratch.values,
                                        .value_pitch = line(),
                                        .lists = scratch.lists,
                                        .list_pitch = list_pitch(),
                                        .other_values = other_values(),
                                        .other_list = other_list(),
                                        .counts = scratch.counts,
                                        .apart = lines_apart(),
                                        .masks = plan_.both ? scratch.masks : nullptr,
                                        .words = words});
    }
    const int64_t nonzeros = table_.pack[dtype_]({.pixels = table.pixels,
                                                  .positions = 64 * words,
                                                  .channels = channels,
                                                  .values = scratch.values,
                                                  .value_pitch = line(),
                                                  .masks = scratch.masks});
    std::fill_n(scratch.masks + channels * words, (kMaxTogether - 1) * words, 0);  // completes the last set
    if (part.lists == WeightsLists::kChannels) {
      table_.list({.masks = scratch.masks,
                   .words = words,
                   .channels = channels,
                   .together = part.together,
                   .positions = scratch.positions,
                   .lists = scratch.lists,
                   .list_pitch = list_pitch(),
                   .counts = scratch.counts});
    }
    return nonzeros;
  }

  // Where drhs has tap 0 of a group, for a channel of the checked and a feature of the dense operand.
  void* drhs_at(const TapGroup& group, int64_t channel, int64_t feature) const {
    const ConvShape& s = plan_.shape;
    const int64_t c = plan_.lhs_checked ? channel : feature, k = plan_.lhs_checked ? feature : channel;
    return drhs_.at(((group.rows.tap * s.s + group.columns.tap) * s.c + c) * s.k + k);
  }

  WeightsPanel panel_of(const TapGroup& group, const Item& item, int64_t first, int features, int width, float* sums,
                        bool first_block, bool to_drhs) const {
    const ConvShape& s = plan_.shape;
    const TapPlace& place = group.place;
    float* out = to_drhs ? static_cast<float*>(drhs_at(group, item.channel, item.feature + first)) : nullptr;
    return {.sums = sums + place.first * width,
            .channel = place.taps * width,
            .row = place.columns * width,
            .first = first_block,
            .out = out,
            .out_channel = s.k,
            .out_row = group.rows.tap_step * s.s * s.c * s.k,
            .out_column = group.columns.tap_step * s.c * s.k,
            .out_features = features};
  }

  // Moves the sums of channels begin..end of an item to drhs.
  void store(const PixelClass& cls, const Item& item, const float* panel, int64_t begin, int64_t end) const {
    const ConvShape& s = plan_.shape;
    int64_t offset = 0;
    for (const TapGroup& group : cls.groups) {
      const int taps = group.rows.taps * group.columns.taps;
      for_steps(plan_, group, item, offset, [&](int64_t first, int features, int vectors, int64_t sums) {
        const int64_t width = static_cast<int64_t>(vectors) * plan_.lanes;
        for (int t = 0; t < taps; ++t) {
          const float* from = panel + sums + begin * taps * width + t * width;
          const int64_t tap =
              t / group.columns.taps * group.rows.tap_step * s.s + t % group.columns.taps * group.columns.tap_step;
          void* to =
              Tensor{drhs_at(group, item.channel + begin, item.feature + first), drhs_.dtype}.at(tap * s.c * s.k);
          const int out = index_of(drhs_.dtype);
          if (plan_.lhs_checked) {
            kernels_.data.finish[out][out]({.sums = from,
                                            .pitch = taps * width,
                                            .rows = end - begin,
                                            .features = features,
                                            .out = to,
                                            .out_pitch = s.k,
                                            .keep = nullptr});
          } else {
            table_.transpose[out]({.sums = from,
                                   .channel_pitch = taps * width,
                                   .channels = static_cast<int>(end - begin),
                                   .features = features,
                                   .out = to,
                                   .out_pitch = s.k});
          }
        }
      });
    }
  }

  const WeightsPlan& plan_;
  const Kernels& kernels_;
  const WeightsKernels& table_;
  Image checked_, dense_;
  Tensor drhs_;
  const InputGradient* input_;
  float* filters_;
  bool stream_ = false;  // dlhs by-passes the caches
  int dtype_;            // of the operands, for tables of kernels
  int64_t size_;         // of one of their elements
  bool neighbours_ = false;
  int64_t positions_ = 0, dense_positions_ = 0, checked_windows_ = 0, dense_windows_ = 0, copy_floats_ = 0,
          panel_floats_ = 0, item_floats_ = 0;
};

}  // namespace

void run_weights(const WeightsPlan& plan, const Kernels& kernels, ConstTensor lhs, ConstTensor g, Tensor drhs,
                 const InputGradient* input, Executor& executor) {
  count(plan.sparse ? "conv_bwd_weights/sparse" : "conv_bwd_weights/dense");
  SharedBuffer filters(plan.both ? (WeightsRun::filter_floats(plan) + 16) * sizeof(float) : 0);
  const WeightsRun run(plan, kernels, lhs, g, drhs, input, filters.as<float>());
  std::vector<Phase> phases;
  if (plan.both) phases.push_back({run.packs(), [&run](int64_t index) { run.pack_filters(index); }});
  SharedBuffer panels(plan.chunks > 1 ? run.chunk_bytes() : 0);
  float* sums = plan.chunks > 1 ? panels.as<float>() : nullptr;
  phases.push_back({run.items(), [&run, sums](int64_t item) { run.run(item, sums); }});
  if (plan.chunks > 1) {
    phases.push_back({run.reductions(), [&run, sums](int64_t index) { run.reduce(index, sums); }});
  }
  run_phases(helpers_unless(plan.serial, executor), std::move(phases));
}

void conv_bwd_weights(const ConvShape& shape, Mode mode, ConstTensor lhs, ConstTensor g, Tensor drhs,
                      Executor& executor) {
  const Kernels& k = kernels();  // once: another may be set meanwhile
  Densities densities;
  if (mode != Mode::kDense) {
    densities.lhs = density(k, lhs, shape.lhs_size());
    densities.g = density(k, g, shape.out_size());
  }
  if (zero_of_zeros(k, densities.lhs, lhs, shape.lhs_size(), {{drhs, shape.rhs_size()}}, executor) ||
      zero_of_zeros(k, densities.g, g, shape.out_size(), {{drhs, shape.rhs_size()}}, executor)) {
    count("conv_bwd_weights/sparse");
    return;
  }
  const WeightsPlan plan =
      plan_weights(shape, mode, densities, {machine(), k.lanes, k.registers, executor.concurrency()});
  run_weights(plan, k, lhs, g, drhs, nullptr, executor);
}

}  // namespace sparsetrain
