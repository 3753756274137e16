// The ordinary BWI with the zeros of x put into its result as it is written: what the masked BWI falls back to.
#pragma once

#include "conv.h"

namespace sparsetrain {

void conv_bwd_input_where(const ConvShape& shape, Mode mode, const float* g, const float* rhs, const float* x,
                          float* dlhs, Executor& executor);

}  // namespace sparsetrain
