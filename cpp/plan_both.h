// Plan of BWW and the masked BWI of one call, which have two operands in common: by walks that make both gradients
// (kernels_both.h), or each by itself, whichever is cheaper by estimate; in mode sparse by such walks wherever there
// are any. A pure function of shape, machine and the measured densities.
#pragma once

#include "conv.h"
#include "plan.h"
#include "plan_masked.h"
#include "plan_weights.h"

namespace sparsetrain {

struct BothPlan {
  MaskedPlan input;
  WeightsPlan weights;
  WeightsPlan both;  // instead of these two, if `together`
  bool together;
};

// `mode` is auto or sparse. densities.lhs is that of x.
BothPlan plan_both(const ConvShape& shape, Mode mode, const Densities& densities, const PlanMachine& machine);

// What plan_both would do in mode auto.
Description describe_both(const ConvShape& shape, const Densities& densities, const PlanMachine& machine);

}  // namespace sparsetrain
