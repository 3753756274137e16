// Runs plans of the masked BWI, for the operations that choose them.
#pragma once

#include "conv.h"
#include "isa.h"
#include "parallel.h"
#include "plan_masked.h"

namespace sparsetrain {

// `densities` are those of x and g that led to the plan in `mode`, auto or sparse.
void run_masked(const MaskedPlan& plan, const Kernels& kernels, const ConvShape& shape, Mode mode,
                const Densities& densities, ConstTensor g, ConstTensor rhs, ConstTensor x, Tensor dlhs,
                Executor& executor);

}  // namespace sparsetrain
