// The table of kernels that one instruction set offers. The code around the kernels is compiled once, for any machine,
// and reaches them through this table only. kernels_<isa>.cc instantiate kernels_data.h, kernels_weights.h and
// kernels_masked.h; tables are constants, so that no code for one machine runs on another.
//
// Kernels that read or write tensors come by element type: [kDTypes] is indexed with index_of(dtype), the pointers have
// no type, and pitches and offsets count elements. Everything between them is float32.
#pragma once

#include <cstddef>
#include <cstdint>

#include "dtype.h"

namespace sparsetrain {

// Room for the row sweeps of FWD and BWI, see kernels_data.h.
constexpr int kMaxTaps = 5;                  // taps of one sweep along x; wider kernels are split
constexpr int kMaxVectors = 8;               // vectors of output features of one sweep
constexpr int kMaxBlock = 64;                // input channels of one sweep: a bit each in a 64-bit mask
constexpr int kTallTaps = 3, kTallRows = 3;  // of a sweep that takes all rows of the kernel

constexpr int kFmaBurst = 12;  // enough to hide the latency, few enough for 16 registers

// How a scan leaves the values of a row and channel block, for the sweeps that read them.
enum class Packing {
  kAll,      // every value: pixel by pixel
  kSingles,  // the non-zeros, pixel by pixel
  kPairs,    // the non-zeros of pixels 0 and 1, of 2 and 3, ...: of the first where the second has one, too, of the
             // second there, then what is left of the first, and of the second
};

// Memory to be fetched into L2, some for each row of a sweep: lines of 64 bytes one after another if pieces is 0, else
// `rows` rows of `pieces` pieces of some lines.
struct Ahead {
  const char* at;
  int each;  // lines, or rows, for each row of the sweep
  int rows, pieces, lines;
  ptrdiff_t row_pitch, piece_pitch;  // bytes
};

// One sweep: a row of input pixels, one block of input channels, the taps of one filter row (or of all, in tall
// sweeps), one block of output features. Pixel i contributes value[i][c] * filter[c][t][:] to output column first + i +
// taps-1-t. The sums of a row lie in scratch that has room for all columns that the pixels reach, first .. first +
// taps-1 + pixels (one more if that is odd), also where the result has none.
struct SweepRow {
  const float* values;    // packed, as kPairs or kSingles
  const uint64_t* masks;  // a pixel's channels to visit, a bit each; zero for the one that makes an odd number even
  float* sums;            // [column][vectors * lanes], of column 0
  bool zero;              // sums start from zero
  float* out;             // not null: where the sums should go instead, all features of columns [0, columns)
};

// A visit of few multiply-adds would wait for those of the one before to the same sums. So visits of sweeps over packed
// values take turns at this many sets of sums, which come together when a column is finished.
constexpr int sets_of_sums(int taps, int vectors) { return taps * vectors < 4 ? 2 : 1; }

struct SweepArgs {
  const SweepRow* rows;
  int count;
  bool pairs;           // two pixels share filter loads; else pixel by pixel (few non-zeros)
  bool take;            // single values come out of a register: for machines with few loads for each multiply-add
  const float* filter;  // [channel][tap][vectors * lanes], 64-byte aligned; of tall sweeps [channel][tap][row][lanes]
  ptrdiff_t row_pitch;  // of tall sweeps: floats from the sums of a row of the kernel to those of the next
  int pixels;
  int first;                        // may be negative
  int columns;                      // of the result
  ptrdiff_t out_pitch;              // floats between columns of out
  bool stream;                      // out by-passes the caches (64-byte aligned)
  Ahead filter_ahead, input_ahead;  // what is read later, fetched on the side
};

// The same for values that are not packed, and for sums that may go to their final place.
struct PlacedSweepArgs {
  const float* values;
  ptrdiff_t value_pitch;  // floats between pixels
  const uint64_t* masks;
  uint64_t all_channels;  // the mask of a pixel without zeros: as many low bits as the block has channels
  uint64_t pair_mask;
  const float* filter;
  int pixels;
  int first;             // may be negative; columns outside [0, columns) are dropped
  int columns;           // output columns of the row
  const float* tile;     // [columns][vectors * lanes], partial sums so far; null: start from zero
  float* out;            // where sums go: the tile again, or the final row
  ptrdiff_t out_pitch;   // floats between columns of out
  int out_features;      // features that exist in out, 1..vectors * lanes
  const float* keep;     // where this is zero, zero goes to out; same pitch as out. Null: all sums go there
  int value_lines;       // lines of 64 bytes of a pixel's block that point sweeps fetch into L1 two pixels ahead
  const char* prefetch;  // sweeps fetch this many lines of 64 bytes from here into L2 at every step, on the side
  int prefetch_lines;
  bool stream;  // out by-passes the caches (64-byte aligned, out_features whole vectors)
  bool fetch;   // float32 out comes from beyond L2: its lines are fetched some columns before they are written
  // 1-tap sweeps that finish a narrow result store it themselves: while they wait for loads, rounding is free.
  DType out_dtype;   // float32: the above holds; else
  void* narrow_out;  // this stands for `out`, and neither `keep` nor `stream` is there
};

// Scan of a row: masks, and a copy of the values per channel block. Channel block b of pixel i goes to
// masks[b*mask_pitch + i] and, with Packing::kAll, to copy[b*copy_pitch + i*block + ...], where tails are zero; packed
// values of a block go to copy[b*copy_pitch + ...], and kPackedSlack floats behind them may be overwritten. Returns the
// number of non-zeros.
constexpr int kPackedSlack = 16;
struct ScanArgs {
  const void* values;
  ptrdiff_t value_pitch;
  int pixels;
  int channels;
  int block;        // channels of a block, <= kMaxBlock, multiple of lanes
  uint64_t* masks;  // null: copy of all only, and nothing is counted
  ptrdiff_t mask_pitch;
  float* copy;  // null: masks only
  ptrdiff_t copy_pitch;
  Packing packing;
};

// Moves rows of sums to their place in a tensor: out[row][i] = sums[row][i], i < features.
struct FinishArgs {
  const float* sums;
  ptrdiff_t pitch;  // floats between rows
  int64_t rows;
  int64_t features;
  void* out;
  ptrdiff_t out_pitch;
  const void* keep;     // where this is zero, zero goes to out; same pitch as out. Null: all sums go there
  bool stream = false;  // float32 by-passes the caches (64-byte aligned, whole vectors), if `keep` is null
  bool fetch = false;   // out comes from beyond L2, as in sweeps
};

struct DataKernels {
  // `rounds` times kFmaBurst independent multiply-adds of a vector, nothing else: the peak that figures are compared
  // with.
  void (*fma_burst)(int64_t rounds);
  // [taps][vectors]; null: not offered. Returns whether rows with an `out` went there.
  bool (*sweep[kMaxTaps + 1][kMaxVectors + 1])(const SweepArgs&);
  // A vector of features, all kTallRows rows of a kernel of kTallTaps columns; null: not offered. A row's `sums` and
  // `zero` are for the first of these, `out` for the last; the others add to sums.
  bool (*tall_sweep)(const SweepArgs&);
  // Of one tap, for which packing would take too long.
  void (*point_sweep[kMaxVectors + 1])(const PlacedSweepArgs&);
  // Of all channels of all pixels: neither masks nor pair_mask are looked at.
  void (*dense_sweep[kMaxTaps + 1][kMaxVectors + 1])(const PlacedSweepArgs&);
  int dense_pixels[kMaxTaps + 1][kMaxVectors + 1];  // that it takes at a time
  void (*stream_fence)();                           // after sweeps that streamed, before another thread may read
  int64_t (*scan[kDTypes])(const ScanArgs&);
  void (*widen[kDTypes])(const void* src, float* dst, int64_t count);
  // Cuts rows into blocks of `width`: dst[b * block_pitch + i * dst_pitch + j] = src[i][b * width + j], i < rows,
  // b * width + j < cols; pads the last block up to width with zeros.
  void (*pack[kDTypes])(const void* src, ptrdiff_t src_pitch, float* dst, ptrdiff_t dst_pitch, ptrdiff_t block_pitch,
                        int rows, int cols, int width);
  // dst[j][i] = src[i][j], i < rows, j < cols; pads i up to a multiple of lanes with zeros.
  void (*transpose[kDTypes])(const void* src, ptrdiff_t src_pitch, float* dst, ptrdiff_t dst_pitch, int rows, int cols);
  void (*finish[kDTypes][kDTypes])(const FinishArgs&);  // [of keep][of out]; null unless they agree or out is float32
};

// BWW, see kernels_weights.h for the algorithm. The *checked* operand is lhs or g; the other one is the *dense*
// operand.
constexpr int kMaxTapRows = 5;  // taps of one walk: a rectangle of the kernel, larger kernels are cut into several
constexpr int kMaxTapColumns = 7;
constexpr int kVectorChoices = 4;  // a walk takes 1, 2, 4 or 8 vectors of features, indexed by the logarithm

// Which walks exist: as many accumulators as the registers hold, and no shape that another two replace as well.
constexpr bool walk_offered(int rows, int columns, int vectors, int registers) {
  if (rows * columns * vectors > registers - 4) return false;
  if (rows * columns == 1) return true;
  if (vectors == 8) return rows * columns == 2;
  if (vectors == 4) return rows <= 2 && columns <= 3;
  if (vectors == 2) return rows <= 3 && columns <= 5 && columns >= rows - 1;
  return columns != 6 && columns >= rows - 1;
}

// Whether a walk reads lists of positions, or walks the bits of masks, whose ends are mispredicted word by word but
// which need no making: lists where an entry leads to many multiply-adds, and where steps are narrow (so that many
// positions fit L1). By taps alone: the order of a sum must not depend on how threads cut the features into steps.
constexpr bool walk_lists(int taps) { return taps >= 4; }

// What a walk reads of a block of the checked operand.
enum class WeightsLists {
  kMasks,     // bits of masks, and values in place
  kChannels,  // lists of positions by sets of channels (masks where walks have no lists), and values in place
  kPacked,    // each channel's list, and its packed values
  // The same in two lists: non-zeros at neighbouring positions, by the first of each two; and the others. Only for taps
  // that have lists in any case.
  kNeighbours,
};

// Transposes a block of the checked operand: a line of values and a bit mask of its non-zeros per channel.
struct WeightsPackArgs {
  const void* const* pixels;  // channel 0 of each position; positions without a pixel point to zeros
  int positions;              // multiple of 64
  int channels;
  float* values;  // [channel][value_pitch]; written for channels rounded up to lanes
  ptrdiff_t value_pitch;
  uint64_t* masks;  // [channel][positions / 64]
};

constexpr int kPackPixels = 16;
// Leaves the non-zeros alone instead: a line of values per channel, a list of their positions, and their number; or
// these twice, for neighbours (both values and the position of the first) and for the others.
struct WeightsPackListsArgs {
  const void* const* pixels;  // as above, but none for positions between rows
  const uint16_t* positions;  // of each pixel
  int count;                  // of pixels, a multiple of kPackPixels
  int channels;
  bool neighbours;
  float* values;  // [channel][value_pitch]: count + 16 of each kind
  ptrdiff_t value_pitch;
  uint16_t* lists;  // [channel][list_pitch]: count / 2 + 16 of neighbours, count + 16 of others
  ptrdiff_t list_pitch;
  ptrdiff_t other_values, other_list;  // from a channel's neighbours to its others
  uint16_t* counts;                    // [channel], or [channel][neighbours, others]
  bool apart;                          // lines of neighbouring pixels have places of their own in L1
  // If not null, a bit for each pixel of each channel as well, [channel][words]; what is beyond the last pixel stays as
  // it was. Not with neighbours; for 16 lanes only.
  uint64_t* masks;
  int words;  // >= count / 64
};

// Copies `features` of the pixels of the dense operand to [position][width]; the rest of width is zero.
struct WeightsCopyArgs {
  const void* const* pixels;  // of each position; where it is padding, zeros
  int64_t positions;
  int64_t feature;  // the first
  int features;
  float* to;
  int width;  // multiple of lanes
};

// Lines that a later kernel will read: fetched into L2 bit by bit while this one computes.
struct WeightsPrefetch {
  const void* const* pixels;
  int64_t count;   // of pixels
  int64_t offset;  // bytes from a pixel to the first line
  int64_t lines;   // of 64 bytes
};

// Where the sums of a walk or tile live between pixel blocks, and where they go after the last one.
struct WeightsPanel {
  float* sums;                                 // [channel][tap][vectors * lanes]
  ptrdiff_t channel, row;                      // floats between channels and between rows of taps; tiles have all taps
  bool first;                                  // sums start from zero
  float* out;                                  // null: keep them in `sums`; else drhs of channel 0, tap 0
  ptrdiff_t out_channel, out_row, out_column;  // floats between channels, tap rows and tap columns of out
  int out_features;                            // of vectors * lanes, how many exist in out
};

// Whether a walk has registers for `together` channels of `sums` vectors each: beside them, their values and one dense
// vector.
constexpr bool walk_together(int together, int sums, int registers) {
  return together * sums + together + 1 <= registers;
}

// Lists the positions of every channel's non-zeros. Channels come `together`: for each set of them a list of the
// positions where these and no others are non-zero. The lists follow each other in the order of a Gray code, 1, 3, 2
// for two channels and 1, 3, 2, 6, 7, 5, 4 for three (bit i stands for channel i): of two channels, either one's
// positions lie side by side.
struct WeightsListArgs {
  const uint64_t* masks;  // [channel][words], zero for channels that complete the last set
  int words;              // 64 positions each
  int channels;
  int together;
  const uint16_t* positions;  // 0, 1, 2, ...: of all words
  uint16_t* lists;            // [channel / together][list_pitch]
  ptrdiff_t list_pitch;       // >= 64 * words + kListPad
  uint16_t* counts;           // [channel / together][2^together - 1]
};
constexpr int kListPad = 32;  // what a list may be overrun by while it is written
constexpr int kMaxTogether = 3;
constexpr int list_set(int index) { return (index + 1) ^ (index + 1) >> 1; }

// For every non-zero of every channel: sums[channel][tap] += value * dense[position + tap].
struct WeightsWalkArgs {
  const float* values;
  ptrdiff_t value_pitch;
  const uint64_t* masks;  // as in WeightsListArgs; walks without lists read these
  int words;
  const uint16_t* lists;  // as WeightsListArgs or WeightsPackListsArgs left them
  ptrdiff_t list_pitch;
  const uint16_t* counts;
  WeightsLists kind;
  ptrdiff_t other_values, other_list;  // as in WeightsPackListsArgs
  bool take;  // packed values come out of a register: for machines with few loads for each multiply-add
  int channels;
  int together;        // channels that share loads of the dense operand; more than one: not packed; 3: with lists
  const float* dense;  // of position 0, tap 0: [position][vectors * lanes], 64-byte aligned
  ptrdiff_t tap_row;   // positions between rows of taps
  WeightsPanel panel;
  WeightsPrefetch next[2];
};

// The same sums without looking for zeros: a register tile of channels x vectors, tap by tap.
struct WeightsTileArgs {
  const float* values;  // [channel group][image][row][column][channels of a tile]
  ptrdiff_t group_pitch;
  int channels;
  int images, rows, columns;     // of the block
  const float* dense;            // as in a walk
  ptrdiff_t image_pitch, pitch;  // positions between images and between rows
  int tap_rows, tap_columns;
  ptrdiff_t tap_row;
  // Rows [row_begin - r, row_end - r) of pixels meet the dense image with row r of taps, and so do columns; what others
  // meet is padding and left out.
  int row_begin, row_end, column_begin, column_end;
  WeightsPanel panel;
  WeightsPrefetch next[2];
};

// Copies pixels to the layout that tiles read: groups of `group` channels, pixel by pixel, zero beyond `channels`.
struct WeightsGroupArgs {
  const void* const* pixels;
  int64_t count;
  int channels;
  float* values;  // room for one vector beyond the end
  ptrdiff_t group_pitch;
};

// Moves one tap of a panel to its place in drhs with channels and features exchanged: out[feature][channel].
struct WeightsTransposeArgs {
  const float* sums;  // [channel][channel_pitch]
  ptrdiff_t channel_pitch;
  int channels, features;
  void* out;
  ptrdiff_t out_pitch;
};

// Adds the sums of all parts, `pitch` floats apart, to those of the first, in order. `count` is a multiple of lanes.
struct WeightsAddArgs {
  float* sums;
  ptrdiff_t pitch;
  int64_t parts, count;
};

struct WeightsKernels {
  int64_t (*count_nonzero[kDTypes])(const void* values, int64_t count);
  int64_t (*pack[kDTypes])(const WeightsPackArgs&);             // returns the number of non-zeros
  int64_t (*pack_lists[kDTypes])(const WeightsPackListsArgs&);  // the same
  void (*list)(const WeightsListArgs&);
  void (*copy[kDTypes])(const WeightsCopyArgs&);
  void (*walk[kMaxTapRows + 1][kMaxTapColumns + 1][kVectorChoices])(const WeightsWalkArgs&);  // null: not offered
  void (*group[kDTypes][kVectorChoices])(const WeightsGroupArgs&);                            // null beyond 4 vectors
  void (*tile[kVectorChoices])(const WeightsTileArgs&);
  int tile_channels[kVectorChoices];
  void (*add)(const WeightsAddArgs&);
  void (*transpose[kDTypes])(const WeightsTransposeArgs&);
};

// BWW and the masked BWI at once, see kernels_both.h for the algorithm.

// Which walks of both exist: the sums of a channel and its filter sit in registers, beside four sums of entries, two
// values and a vector of g.
constexpr bool both_offered(int rows, int columns, int vectors, int registers) {
  return registers >= 32 && 2 * rows * columns * vectors + 7 <= registers &&
         walk_offered(rows, columns, vectors, registers);
}

struct BothWalkArgs {
  WeightsWalkArgs walk;  // of packed lists and single channels
  const float* filter;   // of the first channel, laid out as the sums in the panel
  // [channel][walk.value_pitch]: += the sum over taps and features of filter * g, for every entry. Up to three more are
  // overwritten.
  float* sums;
  bool first;  // these start from zero
};

struct BothKernels {
  void (*walk[kMaxTapRows + 1][kMaxTapColumns + 1][kVectorChoices])(const BothWalkArgs&);  // null: not offered
};

// Masked BWI, see kernels_masked.h for the algorithm. The pixels of a block of x are its *slots*; a *position* is a
// place in the scratch copy of g.
constexpr int kMaskedTaps = 3;           // rows and columns of taps of one product; larger kernels are cut into several
constexpr int kMaskedVectorChoices = 4;  // a product takes 1, 2, 4 or 8 vectors of features, indexed by logarithm

// Which products exist: the filter of a channel sits in registers, beside four sums. Of each rectangle of taps the
// widest and half of it, so that the last step of few features is not mostly padding; and those as narrow for which
// borders leave two thirds of the taps. A single tap goes by points.
constexpr bool masked_offered(int rows, int columns, int vectors, int registers) {
  const int most = registers - 5, needed = rows * columns * vectors;
  return rows * columns > 1 && needed <= most && 5 * needed > most;
}

// Masks of x, and the active slots of every channel, by the position that the first tap of each meets.
struct MaskedListArgs {
  const void* const* pixels;  // channel 0 of x, of each slot; null beyond the last slot
  int words;                  // 64 slots each
  int channels;
  const uint16_t* positions;  // of each slot
  uint64_t* masks;            // [channel rounded up to lanes][words]
  uint16_t* lists;   // [channel rounded up to lanes][capacity]; followed by up to three zeros, for whole groups of four
  int capacity;      // >= 64 * words + 16
  uint16_t* counts;  // [channel rounded up to lanes]
};

// values[channel][entry] += the sum over taps and features of filter * g, for every entry of the lists.
struct MaskedProductArgs {
  const uint16_t* lists;
  const uint16_t* counts;
  int capacity;
  int channels;
  const float* g;                        // [position][vectors * lanes], 64-byte aligned
  int tap_row;                           // positions between rows of taps
  const float* filter;                   // [channel][row of taps][column][vectors * lanes]
  ptrdiff_t filter_channel, filter_row;  // floats between channels and between rows of taps
  float* values;                         // [channel][capacity]
  bool first;                            // values start from zero
  WeightsPrefetch next[2];
};

// Writes the values to the pixels of dlhs, and zeros where a slot is not active.
struct MaskedStoreArgs {
  const uint64_t* masks;
  int words;
  int channels;
  const float* values;
  int capacity;
  void* const* pixels;  // channel 0 of each slot
  int slots;
  bool stream;      // float32 only
  uint16_t* taken;  // [channel rounded up to lanes], scratch
};

// A class of pixels that meet a single tap goes pixel by pixel instead of channel by channel: its *points*.
constexpr int kMaxPointVectors = 16;  // of features in one step

// Which point products exist: a pixel's features sit in registers, beside four sums.
constexpr bool point_offered(int vectors, int registers) {
  return vectors <= registers - 5 && (vectors <= 8 || vectors % 4 == 0);
}

// Lists the active channels of every pixel, block by block of channels.
struct PointListArgs {
  const void* const* pixels;  // channel 0 of x
  int count;                  // of pixels
  int channels, block;        // block: a multiple of lanes
  const uint16_t* offsets;    // of the channels of a block in a filter block, in units of 8 bytes
  uint16_t* lists;            // [block][entry]; a pixel's are filled up with zeros to whole groups of four
  ptrdiff_t pitch;            // entries between blocks, >= count * block + 32
  int* starts;                // [block][count + 1]: where a pixel's entries begin; the last is where they end
  uint16_t* masks;            // [pixel][channels / lanes, rounded up]: a bit per channel
};

// values[entry] += the sum over features of filter * g, for every entry of the lists of one block of channels.
struct PointProductArgs {
  const uint16_t* lists;
  const int* starts;
  int count;             // of pixels
  const void* const* g;  // feature 0 of each, and of kPointsAhead more, which are fetched
  int64_t feature;       // the first of the step
  int features;          // at most vectors * lanes; filters are zero beyond
  const float* filter;   // [channel][vectors * lanes], 64-byte aligned
  float* values;
  bool first;  // values start from zero
};
constexpr int kPointsAhead = 4;

// Writes the values to the pixels of dlhs, and zeros where a channel is not active.
struct PointStoreArgs {
  const uint16_t* masks;  // null: nothing is active
  const float* values;    // [block][entry]
  ptrdiff_t pitch;
  const int* starts;    // [block][count + 1]
  void* const* pixels;  // channel 0 of dlhs
  int count, channels, block;
  bool stream;  // float32 only
};

struct MaskedKernels {
  void (*lists[kDTypes])(const MaskedListArgs&);
  void (*product[kMaskedTaps + 1][kMaskedTaps + 1][kMaskedVectorChoices])(const MaskedProductArgs&);  // null: none
  void (*store[kDTypes])(const MaskedStoreArgs&);
  void (*point_lists[kDTypes])(const PointListArgs&);
  void (*point_product[kDTypes][kMaxPointVectors + 1])(const PointProductArgs&);  // null: none
  void (*point_store[kDTypes])(const PointStoreArgs&);
};

struct Kernels {
  const char* isa;
  int lanes;
  int registers;
  DataKernels data;
  WeightsKernels weights;
  MaskedKernels masked;
  BothKernels both;
  const Kernels* narrow;  // of half the lanes; null: none
};

extern const Kernels kKernelsPortable;
#if defined(__x86_64__)
extern const Kernels kKernelsAvx2;
extern const Kernels kKernelsAvx512;

// What AVX-512 with VBMI2 does in another way than AVX-512 alone.
struct ListKernels {
  void (*list)(const WeightsListArgs&);
  int64_t (*pack_lists[kDTypes])(const WeightsPackListsArgs&);
  void (*lists[kDTypes])(const MaskedListArgs&);
  void (*point_lists[kDTypes])(const PointListArgs&);
};
extern const ListKernels kListsAvx512Vbmi2;
#endif

}  // namespace sparsetrain
