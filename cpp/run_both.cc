// BWW and the masked BWI of one call: by walks that make both gradients, or one after the other.
#include "conv.h"
#include "isa.h"
#include "parallel.h"
#include "plan_both.h"
#include "run_masked.h"
#include "run_weights.h"
#include "zeros.h"

namespace sparsetrain {

void conv_bwd_both(const ConvShape& shape, Mode mode, ConstTensor g, ConstTensor rhs, ConstTensor x, Tensor dlhs,
                   Tensor drhs, Executor& executor) {
  if (mode == Mode::kDense) {
    count("conv_bwd_both/separate");
    conv_bwd_input_masked(shape, mode, g, rhs, x, dlhs, executor);
    return conv_bwd_weights(shape, mode, x, g, drhs, executor);
  }
  const Kernels& k = kernels();  // once: another may be set meanwhile
  const Densities densities = {density(k, x, shape.lhs_size()), density(k, g, shape.out_size())};
  const auto all_zero = [&](double sample, ConstTensor operand, int64_t count) {
    return zero_of_zeros(k, sample, operand, count, {{dlhs, shape.lhs_size()}, {drhs, shape.rhs_size()}}, executor);
  };
  if (all_zero(densities.lhs, x, shape.lhs_size()) || all_zero(densities.g, g, shape.out_size())) {
    count("conv_bwd_both/separate");
    count("conv_bwd_input_masked/sparse");
    count("conv_bwd_weights/sparse");
    return;
  }
  const BothPlan plan = plan_both(shape, mode, densities, {machine(), k.lanes, k.registers, executor.concurrency()});
  if (plan.together) {
    count("conv_bwd_both/sparse");
    count("conv_bwd_input_masked/sparse");
    const InputGradient input = {rhs, dlhs};
    return run_weights(plan.both, k, x, g, drhs, &input, executor);
  }
  count("conv_bwd_both/separate");
  run_masked(plan.input, k, shape, mode, densities, g, rhs, x, dlhs, executor);
  run_weights(plan.weights, k, x, g, drhs, nullptr, executor);
}

}  // namespace sparsetrain
