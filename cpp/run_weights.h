// Runs plans of BWW, for the operations that choose them.
#pragma once

#include "conv.h"
#include "isa.h"
#include "parallel.h"
#include "plan_weights.h"

namespace sparsetrain {

// What walks of both gradients read and write beside the operands and result of BWW.
struct InputGradient {
  ConstTensor rhs;
  Tensor dlhs;
};

// `input`: if plan.both, else null.
void run_weights(const WeightsPlan& plan, const Kernels& kernels, ConstTensor lhs, ConstTensor g, Tensor drhs,
                 const InputGradient* input, Executor& executor);

}  // namespace sparsetrain
