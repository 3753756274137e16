// Pixels along an axis and the taps that meet them, blocks of pixels, and the integer divisions that plans need.
//
// BWW and the masked BWI go by *classes*: pixels of one operand (the checked one in BWW, x in the masked BWI) that are
// a stride apart meet the same taps, and neighbours in a class meet neighbours in a sub-image of the other operand. A
// class is cut into blocks of images x rows x columns. The pixels that a block meets, halo included, have *positions*
// one after another; padding between rows may be shared.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <utility>
#include <vector>

namespace sparsetrain {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
inline int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -ceil_div(-a, b); }
inline int64_t floor_mod(int64_t a, int64_t b) { return a - floor_div(a, b) * b; }

// Lines of 64 bytes that `bytes` of a pixel lie in at most, where pixels follow each other at `pitch` bytes and these
// begin a multiple of gcd(pitch, 64) bytes after the begin of a line.
inline int64_t lines_of(int64_t bytes, int64_t pitch) {
  constexpr int64_t kLine = 64;
  return ceil_div(bytes + kLine - std::gcd(pitch, kLine), kLine);
}

// Pixels start, start + step, ... of a class.
struct PixelAxis {
  int64_t start, step, count;
};

// Taps that a kernel computes together, and where they meet the other operand.
struct TapAxis {
  int64_t tap, tap_step;  // kernel index of tap 0, and from tap to tap
  int taps;
  int64_t start, step, count;  // the sub-image: pixels start, start + step, ... of the other operand
  int64_t offset;              // pixel u of the class and tap j meet sub-image pixel u + j + offset
};

// A class of pixels of lhs along one axis, and the taps that they meet.
struct AxisClass {
  PixelAxis pixels;
  TapAxis taps;
};

inline int64_t strided_count(int64_t size, int64_t start, int64_t step) {
  return start < size ? ceil_div(size - start, step) : 0;
}

// Pixels phase, phase + stride, ..., for each phase that has pixels or meets taps, and the taps that they meet, none
// perhaps, in the order of out. Phases without either, of a stride beyond the input, are left out. (A tap that no pixel
// meets still has a gradient: zero.)
inline std::vector<AxisClass> split_axis(int64_t size, int64_t out_size, int64_t kernel, int64_t stride, int64_t pad) {
  std::vector<int64_t> phases(static_cast<size_t>(std::min(stride, size)));
  std::iota(phases.begin(), phases.end(), int64_t{0});
  for (int64_t tap = 0; tap < std::min(stride, kernel); ++tap) {
    const int64_t phase = floor_mod(tap - pad, stride);
    if (phase >= size) phases.push_back(phase);
  }
  std::sort(phases.begin(), phases.end());
  std::vector<AxisClass> classes;
  for (const int64_t phase : phases) {
    const int64_t residue = (phase + pad) % stride;  // pixel y meets tap r in out row (y + pad - r) / stride
    const int64_t taps = residue < kernel ? ceil_div(kernel - residue, stride) : 0;
    const int64_t last = residue + (taps - 1) * stride;
    classes.push_back({{phase, stride, strided_count(size, phase, stride)},
                       {last, -stride, static_cast<int>(taps), 0, 1, out_size, (phase + pad - last) / stride}});
  }
  return classes;
}

// Cuts a run of taps into `pieces` of nearly equal length.
inline std::vector<TapAxis> cut(const TapAxis& axis, int pieces) {
  std::vector<TapAxis> parts;
  for (int i = 0, first = 0; i < pieces; ++i) {
    TapAxis part = axis;
    part.taps = (axis.taps - first + pieces - i - 1) / (pieces - i);
    part.tap += first * axis.tap_step;
    part.offset += first;
    first += part.taps;
    parts.push_back(part);
  }
  return parts;
}

// Padding before and after the sub-image pixels that all `pixels` pixels of a class meet: what neighbours may share.
inline int64_t shared_halo(const TapAxis& axis, int64_t pixels) {
  const int64_t before = std::max<int64_t>(0, -axis.offset);
  const int64_t after = std::max<int64_t>(0, axis.offset + pixels + axis.taps - 1 - axis.count);
  return std::min<int64_t>({before, after, axis.taps - 1});
}

// The positions that `pixels` pixels of a class from `first` on meet along an axis, and those of them, [begin, end),
// that are not padding. Position i is sub-image pixel at + i.
struct Meeting {
  int64_t positions, at, begin, end;
  Meeting(const TapAxis& axis, int64_t first, int64_t pixels)
      : positions(pixels + axis.taps - 1),
        at(first + axis.offset),
        begin(std::clamp<int64_t>(-at, 0, positions)),
        end(std::clamp<int64_t>(axis.count - at, begin, positions)) {}
};

// Pixels [begin, end) of a class along an axis, and those of a run of taps that any of them meets outside of padding.
struct Part {
  int64_t begin, end;
  PixelAxis of(const PixelAxis& whole) const { return {whole.start + begin * whole.step, whole.step, end - begin}; }
  int first(const TapAxis& axis) const { return static_cast<int>(std::max<int64_t>(0, 1 - end - axis.offset)); }
  int last(const TapAxis& axis) const {
    return static_cast<int>(std::min<int64_t>(axis.taps, axis.count - begin - axis.offset));
  }
  TapAxis of(const TapAxis& whole, int first_tap, int last_tap) const {
    TapAxis axis = whole;
    axis.tap += first_tap * whole.tap_step;
    axis.taps = last_tap - first_tap;
    axis.offset += first_tap + begin;
    return axis;
  }
};

// Taps [top, bottom) x [left, right).
struct TapRectangle {
  int top, bottom, left, right;
  bool empty() const { return top >= bottom || left >= right; }
};

// Those that any of the pixels rows x columns meets, enlarged until offered(rows, columns) is true, as it is for all of
// them.
template <class Offered>
TapRectangle taps_met(const Part& rows, const Part& columns, const TapAxis& row_taps, const TapAxis& column_taps,
                      Offered&& offered) {
  TapRectangle taps = {rows.first(row_taps), rows.last(row_taps), columns.first(column_taps),
                       columns.last(column_taps)};
  while (!taps.empty() && !offered(taps.bottom - taps.top, taps.right - taps.left)) {
    if (taps.right < column_taps.taps) {
      ++taps.right;
    } else if (taps.left > 0) {
      --taps.left;
    } else if (taps.bottom < row_taps.taps) {
      ++taps.bottom;
    } else {
      --taps.top;
    }
  }
  return taps;
}

// Pixels at either end of an axis that meet padding with some taps; `of` names the axis of a group of taps.
template <class Group>
std::pair<int64_t, int64_t> ends_of(const PixelAxis& pixels, const std::vector<Group>& groups, TapAxis Group::* of) {
  int64_t before = 0, after = 0;
  for (const Group& group : groups) {
    const TapAxis& axis = group.*of;
    before = std::max(before, -axis.offset);
    after = std::max(after, pixels.count + axis.taps - 1 + axis.offset - axis.count);
  }
  return {before, after};
}

// Calls f(row, all columns) for each row of pixels beyond `rows`, and f(rows, column) for each column beyond `columns`.
template <class F>
void for_borders(int64_t row_count, int64_t column_count, const Part& rows, const Part& columns, F&& f) {
  for (int64_t y = 0; y < row_count; ++y) {
    if (y < rows.begin || y >= rows.end) f(Part{y, y + 1}, Part{0, column_count});
  }
  for (int64_t x = 0; x < column_count; ++x) {
    if (x < columns.begin || x >= columns.end) f(rows, Part{x, x + 1});
  }
}

// Calls f(rows, columns) for the pixels that are left when the rows that meet padding with some taps of any group are
// cut off, then for those without such columns either; unless none are left.
template <class Group, class F>
void for_cuts(const PixelAxis& rows, const PixelAxis& columns, const std::vector<Group>& groups, F&& f) {
  const auto [top, bottom] = ends_of(rows, groups, &Group::rows);
  const auto [left, right] = ends_of(columns, groups, &Group::columns);
  const Part inner_rows{top, rows.count - bottom}, inner_columns{left, columns.count - right};
  if (inner_rows.begin >= inner_rows.end || columns.count == 0) return;
  f(inner_rows, Part{0, columns.count});
  if (inner_columns.begin < inner_columns.end) f(inner_rows, inner_columns);
}

// A block of pixels of a class: first image, row and column, and how many of each.
struct Block {
  int64_t image, row, column, images, rows, columns;
};

// Positions of a block.
struct Positions {
  int64_t pitch;       // between rows; halos of neighbouring rows overlap where both are padding
  int64_t image_rows;  // rows between images

  int64_t position(int64_t image, int64_t row, int64_t column) const {
    return (image * image_rows + row) * pitch + column;
  }
};

// The pixels of a class and how they are cut into blocks.
struct PixelBlocks : Positions {
  PixelAxis rows, columns;
  int64_t block_images, block_rows, block_columns;
  int64_t blocks[3];  // images, rows, columns

  int64_t block_count() const { return blocks[0] * blocks[1] * blocks[2]; }
  Block block(int64_t index, int64_t images) const {
    Block b;
    b.column = index % blocks[2] * block_columns;
    b.row = index / blocks[2] % blocks[1] * block_rows;
    b.image = index / (blocks[2] * blocks[1]) * block_images;
    b.images = std::min(block_images, images - b.image);
    b.rows = std::min(block_rows, rows.count - b.row);
    b.columns = std::min(block_columns, columns.count - b.column);
    return b;
  }
};

}  // namespace sparsetrain
