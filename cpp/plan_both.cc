#include "plan_both.h"

namespace sparsetrain {

BothPlan plan_both(const ConvShape& shape, Mode mode, const Densities& densities, const PlanMachine& machine) {
  // Fitted where there is one multiply-add a cycle; elsewhere walks of both must promise more.
  const double margin = machine.single_fma() ? 1.04 : 0.97;
  BothPlan plan{.input = plan_masked(shape, mode, densities, machine),
                .weights = plan_weights(shape, mode, densities, machine),
                .both = plan_both_walks(shape, densities, machine),
                .together = false};
  plan.together = plan.both.both && plan.both.sparse_cost < margin * (plan.input.cost() + plan.weights.cost());
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
