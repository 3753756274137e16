// The ordinary BWI with the zeros of x put into its result as it is written: what the masked BWI falls back to.
#pragma once

#include "conv.h"
#include "kernels.h"

namespace sparsetrain {

// `density` is that of g, as a sample says.
void conv_bwd_input_where(const Kernels& kernels, const ConvShape& shape, Mode mode, double density, ConstTensor g,
                          ConstTensor rhs, ConstTensor x, Tensor dlhs, Executor& executor);

}  // namespace sparsetrain
