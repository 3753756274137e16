#include "plan_both.h"

#include "parallel.h"

namespace sparsetrain {

BothPlan plan_both(const ConvShape& shape, Mode mode, const Densities& densities, const PlanMachine& machine) {
  BothPlan plan{.input = plan_masked(shape, mode, densities, machine),
                .weights = plan_weights(shape, mode, densities, machine),
                .both = {},
                .together = false};
  const double products = static_cast<double>(shape.out_size() * shape.r * shape.s) * static_cast<double>(shape.c);
  const double walks = 2 * densities.lhs * products / machine.lanes;
  // What planning takes is not worth it: fitted.
  if (mode == Mode::kAuto && too_small_for_threads(2 * walks, 0)) return plan;
  plan.both = plan_both_walks(shape, densities, machine);
  // Few channels and pixels: threads would find nothing to do. Not by their number, on which sums must not depend.
  constexpr int64_t kPieces = 4;
  const bool pieces = plan.both.chunks * ceil_div(shape.c, machine.lanes) >= kPieces;
  // Fitted where there is one multiply-add a cycle; elsewhere walks of both must promise more.
  const double margin = machine.single_fma() ? 1.04 : 0.97;
  const bool cheaper = pieces && plan.both.sparse_cost < margin * (plan.input.cost() + plan.weights.cost());
  plan.together = plan.both.both && (cheaper || mode == Mode::kSparse);
  return plan;
}

Description describe_both(const ConvShape& shape, const Densities& densities, const PlanMachine& machine) {
  const BothPlan plan = plan_both(shape, Mode::kAuto, densities, machine);
  Description out = plan.together ? describe_blocking(plan.both) : Description();
  out.add("path", plan.together ? "both" : "separate");
  out.add("separate_cost", plan.input.cost() + plan.weights.cost());
  if (plan.both.both) out.add("both_cost", plan.both.sparse_cost);
  return out;
}

}  // namespace sparsetrain
