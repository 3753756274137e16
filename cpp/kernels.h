// The table of kernels that one instruction set offers. The code around the kernels is compiled once, for any machine,
// and reaches them through this table only. kernels_<isa>.cc instantiate kernels_data.h and kernels_weights.h.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sparsetrain {

// Room for the row sweeps of FWD and BWI, see kernels_data.h.
constexpr int kMaxTaps = 5;     // taps of one sweep along x; wider kernels are split
constexpr int kMaxVectors = 8;  // vectors of output features of one sweep
constexpr int kMaxBlock = 64;   // input channels of one sweep: a bit each in a 64-bit mask

// One sweep: a row of input pixels, one block of input channels, the taps of one filter row, one block of output
// features. Pixel i contributes values[i*value_pitch + c] * filter[c][t][:] to output column first + i + taps-1-t.
struct SweepArgs {
  const float* values;
  ptrdiff_t value_pitch;  // floats between pixels
  const uint64_t* masks;  // a pixel's channels to visit, a bit each
  uint64_t pair_mask;     // all ones: two pixels share filter loads; zero: pixel by pixel (few non-zeros)
  const float* filter;    // [channel][tap][vectors * lanes], 64-byte aligned
  int pixels;
  int first;          // may be negative; columns outside [0, columns) are dropped
  int columns;        // output columns of the row
  const float* tile;  // [columns][vectors * lanes], partial sums so far; null: start from zero
  float* out;         // where sums go: the tile again, or the final row
  ptrdiff_t out_pitch;  // floats between columns of out
  int out_lanes;        // lanes of the last vector that exist in out, 1..lanes
  bool stream;          // out by-passes the caches (64-byte aligned, whole vectors)
};

// Scan of a row: masks, and a contiguous copy of the values per channel block. Channel block b of pixel i goes to
// masks[b*mask_pitch + i] and copy[b*copy_pitch + i*block + ...]; tails are zero. Returns the number of non-zeros.
struct ScanArgs {
  const float* values;
  ptrdiff_t value_pitch;
  int pixels;
  int channels;
  int block;  // channels of a block, <= kMaxBlock, multiple of lanes
  uint64_t* masks;
  ptrdiff_t mask_pitch;
  float* copy;  // null: masks only
  ptrdiff_t copy_pitch;
};

struct DataKernels {
  void (*sweep[kMaxTaps + 1][kMaxVectors + 1])(const SweepArgs&);  // [taps][vectors]; null: not offered
  int64_t (*scan)(const ScanArgs&);
  // dst[j][i] = src[i][j], i < rows, j < cols; pads i up to a multiple of lanes with zeros.
  void (*transpose)(const float* src, ptrdiff_t src_pitch, float* dst, ptrdiff_t dst_pitch, int rows, int cols);
};

struct WeightsKernels;  // kernels_weights_table.h

struct Kernels {
  const char* isa;
  int lanes;
  int registers;
  DataKernels data;
  const WeightsKernels* weights;
};

extern const Kernels kKernelsPortable;
#if defined(__x86_64__)
extern const Kernels kKernelsAvx2;
extern const Kernels kKernelsAvx512;
#endif

}  // namespace sparsetrain
