// Plan of BWW: a pure function of shape, machine and the measured densities. Nothing here touches a tensor.
//
// One operand is *checked* (walked, or broadcast by a tile: one channel at a time), the other *dense* (vectors of
// features). Both passes over the images are the same kind of correlation:
//   lhs checked   the lhs pixels fall into stride x stride classes; the taps that a class meets are stride apart in the
//                 kernel and meet neighbouring pixels of g
//   g checked     all pixels of g form one class; taps stride apart meet neighbouring pixels of one of stride x stride
//                 sub-images of lhs
// So in each *class* of checked pixels, each *group* of taps (a rectangle that a kernel is instantiated for) pairs
// checked pixel u and tap j with pixel u + j + offset of a sub-image of the dense operand. Where that is padding, tiles
// leave it out pixel by pixel; for walks, the *borders* of a class are classes of their own with fewer taps, if that
// saves more than their lists and sums cost.
//
// Blocking, from outside in, in the order of the loops in run_weights.cc:
//   item           a channel block x feature block of drhs x a chunk of the pixels: what a thread works on. Chunks come
//                  first, where pixels are many for the size of drhs, because they repeat no packing or copying; their
//                  sums are added in order, and their number depends on the shape alone. Blocks are as few as keep all
//                  threads busy for the same time, because each packs its channels and copies its features again
//   pixel block    images x rows x columns of a class: packed once per item; sums wait in a panel between blocks
//   group, step    taps x vectors of features in registers: the dense block of a step stays in L1
//
// Walks of both gradients (kernels_both.h) go the same way. Their items have all features, because the gradient of lhs
// is a sum over these, and its values wait beside the packed block.
//
// Scratch: per thread a panel of at most 4 L2 (it streams), a packed block of about a third of L2 with lists of
// positions half as large (room for twice and one and a half times that where neighbours are apart, no more of it
// used), and a dense block of about L1; per call the sums of all chunks, at most 4 L2. For both gradients, values of
// another third of L2, and per call the packed kernel. (A kernel or image row that is itself larger than these may
// exceed them.)
#pragma once

#include <cstdint>
#include <vector>

#include "conv.h"
#include "kernels.h"
#include "pixels.h"
#include "plan.h"

namespace sparsetrain {

// Where the sums of a group lie: among those of a class's own group number `group`, which has `taps` taps in rows of
// `columns`; `first` is the number there of this group's first tap.
struct TapPlace {
  int group, taps, columns, first;
};

struct TapGroup {
  TapAxis rows, columns;
  int vectors;  // of features in a step
  TapPlace place;
};

// Pixels of the checked operand.
struct PixelClass : PixelBlocks {
  std::vector<TapGroup> groups;
  int64_t positions;   // of a block, a multiple of 64
  WeightsLists lists;  // what walks read
  int together;        // channels that share loads of the dense operand
  // Rows and columns of pixels that meet padding with some taps: walked apart, without (most of) these. They add to
  // the sums of this class, which has the pixels in between.
  std::vector<PixelClass> borders;
  // Calls f for the class and each of its borders.
  template <class F>
  void for_parts(F&& f) const {
    f(*this);
    for (const PixelClass& border : borders) f(border);
  }
};

// Few channels leave lanes idle. They are folded with the kernel's columns: pixel x of the folded lhs is the window of
// `taps` pixels that out column x meets, taps * channels "channels" that lie side by side in NHWC, and drhs has them
// side by side too. Nothing is copied but windows that reach into the padding.
struct Fold {
  int64_t taps = 0;                                        // 0: not folded
  int64_t stride = 1, pad = 0, columns = 0, channels = 0;  // of the given shape
};

struct WeightsPlan {
  ConvShape shape;  // as computed: 1x1 kernels at stride 1 without padding are one long row of pixels; or folded
  Fold fold;
  bool lhs_checked;
  bool sparse;  // walks; else tiles
  bool both;    // walks make the masked gradient of lhs as well
  bool stream;  // which by-passes the caches
  bool take;    // packed values come out of a register
  bool serial;  // too small for threads
  int lanes;
  int64_t channels, features;  // of the checked and the dense operand
  std::vector<PixelClass> classes;
  int64_t channel_block, feature_block;
  int64_t chunks;                  // of the pixel blocks of each class, summed in order at the end
  double sparse_cost, dense_cost;  // estimates that led to `sparse`, in multiply-adds of a vector

  double cost() const { return sparse ? sparse_cost : dense_cost; }
  int64_t channel_blocks() const { return ceil_div(channels, channel_block); }
  int64_t feature_blocks() const { return ceil_div(features, feature_block); }
  int64_t items() const { return chunks * channel_blocks() * feature_blocks(); }
};

WeightsPlan plan_weights(const ConvShape& shape, Mode mode, const Densities& densities, const PlanMachine& machine);

// The plan of walks over lhs that make both gradients, `sparse_cost` that of both; `both` is false where there are
// none: the machine has no such walks, some pixels of lhs meet no tap, or channels are too few to fill a vector.
WeightsPlan plan_both_walks(const ConvShape& shape, const Densities& densities, const PlanMachine& machine);

// The vectors of the step that begins with `left` features to go, at most `vectors`: few lanes idle, few steps.
int step_vectors(int64_t left, int vectors, int lanes);

// What plans of BWW and of walks of both gradients have.
Description describe_blocking(const WeightsPlan& plan);

// What plan_weights would do in mode auto.
Description describe_weights(const ConvShape& shape, const Densities& densities, const PlanMachine& machine);

}  // namespace sparsetrain
