// Plan of the masked BWI: a pure function of shape, machine and the measured densities. Nothing here touches a tensor.
//
// Three ways lead to the result. The *product* computes it only where x is non-zero (kernels_masked.h); or the ordinary
// BWI computes all of it, dense or skipping the zeros of g, and writes zeros where x rules the sum out. The cheapest by
// estimate is taken.
//
// The product goes by classes: pixels of x that are a stride apart meet the same taps, and neighbours in a class meet
// neighbouring pixels of g. Rows and columns of pixels that meet padding with some taps are classes of their own with
// fewer taps, if that saves more than their lists cost. Blocking, from outside in, in the order of the loops in
// run_masked.cc:
//   item           a block of pixels of a class, images x rows x columns, for a block of channels: listed once, values
//                  wait in L2 between steps
//   step           a rectangle of taps x a few vectors of features: what a product holds in registers; the block of g
//                  takes about all of L1
// A class that meets a single tap (1x1 kernels, and some classes of strided ones) exchanges the roles of g and the
// kernel: an item's pixels are *points*, lists are of a point's channels, and a step goes by blocks of channels, whose
// filters take L1 or a little more. Nothing is transposed or copied. A class that meets no tap is the same without any
// step.
//
// Scratch: per thread the lists and values of an item, half of L2, and a block of g, up to 1.2 L1; or for points room
// of four L2, of which non-zeros fill about one; per call the packed kernel. (Sixteen channels of a row of sixteen
// pixels, and sixteen points, may exceed these.)
#pragma once

#include <cstdint>
#include <vector>

#include "conv.h"
#include "pixels.h"
#include "plan.h"

namespace sparsetrain {

struct MaskedStep {
  TapAxis rows, columns;
  int64_t feature;  // the first
  int features, vectors;
  // Its filters in the packed kernel, [channel][row of taps][column][vectors * lanes]: floats before them, between
  // channels and between rows.
  int64_t filter, filter_channel, filter_row;
};

// Pixels of x.
struct MaskedClass : PixelBlocks {
  std::vector<MaskedStep> steps;  // none where no tap meets the class
  bool points;
  int64_t filter_block;  // of points: channels whose filters are met in turn
};

struct MaskedPlan {
  ConvShape shape;  // as computed: 1x1 kernels at stride 1 without padding are one long row of pixels
  bool product;     // else the ordinary BWI, then zeroing
  bool sparse;      // zeros are expected to save work: the product, or the ordinary BWI skipping those of g
  bool stream;      // the result by-passes the caches
  bool serial;      // a product too small for threads
  int lanes;
  std::vector<MaskedClass> classes;
  std::vector<MaskedStep> filters;  // of the packed kernel; steps have these, or some of their taps
  int64_t channel_block;
  int64_t filter_floats;                    // of the packed kernel
  double product_cost, g_cost, dense_cost;  // estimates, in multiply-adds of a vector

  double cost() const { return product ? product_cost : sparse ? g_cost : dense_cost; }
};

// `mode` is auto or sparse. densities.lhs is that of x. The number of threads changes how work is cut, never a sum.
MaskedPlan plan_masked(const ConvShape& shape, Mode mode, const Densities& densities, const PlanMachine& machine);

// What plan_masked would do in mode auto.
Description describe_masked(const ConvShape& shape, const Densities& densities, const PlanMachine& machine);

}  // namespace sparsetrain
