// What is asked of an operand's zeros before the work is planned.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "dtype.h"
#include "kernels.h"
#include "parallel.h"

namespace sparsetrain {

// Fraction of non-zeros of count > 0 values. Large tensors are sampled: short runs at places that depend on the size
// alone and that a multiplicative hash spreads, so that no period of channels or rows is favoured. They go on until
// they agree so far that the standard error of their mean is below .0075: 64 runs or 128 if zeros are spread evenly; at
// most 512, and so many where none of them has a non-zero.
double density(const Kernels& kernels, ConstTensor values, int64_t count);

// Where a result lies.
struct ResultExtent {
  Tensor tensor;
  int64_t count;
};

// Of convolutions of an operand whose density, as measured, is `sample`: where that is nothing and indeed all its
// `count` values are zero, sets the results to zero and returns true.
bool zero_of_zeros(const Kernels& kernels, double sample, ConstTensor operand, int64_t count,
                   std::initializer_list<ResultExtent> results, Executor& executor);

}  // namespace sparsetrain
