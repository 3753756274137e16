// Masked BWI: dlhs where x is non-zero, exactly zero elsewhere.
#include <algorithm>

#include "conv.h"
#include "isa.h"
#include "parallel.h"

namespace sparsetrain {
namespace {

// Writes +0 wherever x is zero (NaN is not).
void zero_where_inactive(const float* x, float* dlhs, int64_t count) {
  for (int64_t i = 0; i < count; ++i) dlhs[i] = x[i] == 0 ? 0 : dlhs[i];
}

}  // namespace

void conv_bwd_input_masked(const ConvShape& shape, Mode mode, const float* g, const float* rhs, const float* x,
                           float* dlhs, Executor& executor) {
  count(mode == Mode::kDense ? "conv_bwd_input_masked/dense" : "conv_bwd_input_masked/sparse");
  conv_bwd_input(shape, mode, g, rhs, dlhs, executor);
  constexpr int64_t kPiece = 1 << 15;
  const int64_t size = shape.n * shape.h * shape.w * shape.c;
  run_phases(executor, {{(size + kPiece - 1) / kPiece, [&](int64_t i) {
                           const int64_t begin = i * kPiece;
                           zero_where_inactive(x + begin, dlhs + begin, std::min(kPiece, size - begin));
                         }}});
}

}  // namespace sparsetrain
