// Plan of FWD and BWI: a pure function of shape and machine. Nothing here touches a tensor.
//
// Both operations gather: every pixel of the result (out in FWD, dlhs in BWI; "columns" below) sums over pixels of the
// checked operand (lhs in FWD, g in BWI; "pixels" below) times one tap of the kernel each. Along x this splits into
// *strands*, in which pixel i and tap t meet column first + i + taps-1-t: a stride-1 correlation, what the sweep
// kernels compute (kernels_data.h).
//   FWD, stride 1: one strand. FWD, stride st: tap s and tap s + st meet pixels st apart, so the taps fall into st
//   strands by s modulo st, each on its own sub-grid of pixels.
//   BWI, stride st: the columns fall into st classes by x modulo st, and each class gets one strand (or none).
//   FWD of few channels (an image): a window of a row is one run of kernel_columns * channels floats, so its taps fold
//   into the channels: one tap, pixels are output columns, and neighbouring pixels overlap.
//   Kernels wider than kMaxTaps: the taps of a strand are cut into several.
// Along y no splitting is needed: each row of the result has a list of (input row, kernel row). Where features fill one
// vector, tall sweeps take all kernel rows of an input row at once and add to as many rows of the result.
//
// Blocking, from outside in, in the order of the loops in run_data.cc:
//   tile           rows x columns of the result, for all features: its input is scanned once by each thread that
//                  takes part in it (masks; a copy, of the non-zeros alone where sparse sweeps pack). Narrow values are
//                  widened into that copy, so sweeps read float32; it stays in L2 as the input does that is swept in
//                  place
//   share          of a tile's feature blocks: what a thread takes at a time
//   feature block  vectors * lanes features; partial sums of a tile and one block stay in L2
//   channel block  with the taps of one strand and a feature block it makes a filter block that stays in L1
//   kernel row, strand, row of the tile: one sweep
//
// Scratch: per thread a tile's sums, a fifth of L2, a few columns for each row and, in tall sweeps, four rows for each
// image, and the copy of its input with masks, twice L2 and the halo of the kernel's rows; per call the packed kernel.
// (A single row that is larger than these may exceed them.)
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "conv.h"
#include "isa.h"
#include "pixels.h"
#include "plan.h"

namespace sparsetrain {

enum class DataOp { kFwd, kBwdInput };

struct Strand {
  int phase;      // which scan of the input row
  int64_t first;  // column of pixel 0 under the last tap; may be negative
  int taps;
  int64_t tap[kMaxTaps];  // kernel column of each tap
};

// Pixels start, start + step, ... of an input row.
struct Phase1d {
  int64_t start, step, pixels;
};

// Columns start, start + step, ... of a row of the result, and all that is summed into them.
struct ColumnClass {
  int64_t start, step, columns;
  std::vector<Strand> strands;
};

struct DataPlan {
  DataOp op;
  // The problem in gather form. 1x1 kernels at stride 1 without padding become one long row.
  int64_t images, in_rows, in_columns, channels;  // of the checked operand
  int64_t out_rows, out_columns, features;        // of the result
  int64_t kernel_rows, kernel_columns, row_stride, row_pad;
  std::vector<Phase1d> phases;
  std::vector<ColumnClass> classes;

  int vectors;           // of a feature block
  int last_vectors;      // of the last feature block
  int64_t blocks;        // feature blocks
  int channel_block;     // channels of a filter block, <= kMaxBlock
  int64_t tile_rows;     // of the images' rows taken together
  int64_t tile_columns;  // multiple of the classes' step
  bool pointwise;        // the kernel has one tap
  bool copy;             // scan copies the values: packed ones, and narrow ones, which it widens
  bool packs;            // sparse sweeps read packed values, not pixels
  bool tall;             // sparse sweeps take all rows of the kernel at once, and no tile runs dense
  int64_t in_channels;   // of the operand itself; `channels` counts folded ones
  int64_t fold;          // > 0: taps are folded into channels, and a pixel is `fold` floats after the one before it
  int64_t fold_pad;      // zero floats before the first value of a folded row
  bool stream;           // the result by-passes the caches
  double value_work;     // multiply-adds of a vector that a value of the input leads to, if it is visited
  double visited;        // the share of values that are expected to be: of dense plans, all
  bool take;             // single values come out of a register
  bool serial;           // too small for threads
  float dense_density;   // a tile with at least this share of non-zeros runs dense, unless tall; above 1: none does
  float pair_density;    // a tile with at least this share of non-zeros walks pixel pairs

  int64_t channel_blocks() const { return ceil_div(channels, channel_block); }
  int64_t row_tiles() const { return ceil_div(images * out_rows, tile_rows); }
  int64_t column_tiles() const { return ceil_div(out_columns, tile_columns); }
  int64_t tiles() const { return row_tiles() * column_tiles(); }
  // Feature blocks of a tile that a thread takes at a time, of so many threads.
  int64_t share(int threads) const { return threads > 1 ? ceil_div(blocks, 8) : blocks; }
  int64_t shares(int threads) const { return tiles() * ceil_div(blocks, share(threads)); }
  // Input row under kernel row r for row y of the result; -1 when there is none.
  int64_t input_row(int64_t y, int64_t r) const;
  // Range of input rows that rows [y0, y1) of one image need.
  std::pair<int64_t, int64_t> input_rows(int64_t y0, int64_t y1) const;
};

// Lanes of the vectors for a result of so many features, of `lanes` or half as many. Where there is one multiply-add of
// whole vectors a cycle and two of half as many lanes, a half that would be idle is better left out, if it is a quarter
// or more of all.
int lanes_for(int64_t features, const Machine& machine, int lanes);
// The kernels of so many lanes, of those of one ISA.
const Kernels& kernels_for(int64_t features, const Machine& machine, const Kernels& kernels);

// `kernels` are those for its features, `dtype` is that of the operands, `density` the share of non-zeros that the
// checked one is expected to have: dense tiles like other blocks than sparse ones, and few non-zeros others than many.
// In mode auto each tile still decides by its own density, unless sweeps are tall.
DataPlan plan_data(DataOp op, const ConvShape& shape, Mode mode, DType dtype, double density, const Machine& machine,
                   const Kernels& kernels);

// What plan_data would do with float32 in mode auto. `isa`: the kernels of the ISA in force.
Description describe_data(DataOp op, const ConvShape& shape, double density, const Machine& machine,
                          const Kernels& isa);

}  // namespace sparsetrain
