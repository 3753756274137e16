// The Python module: registrations, the choice of ISA, counters, and plans for tests and explain.
#include <nanobind/nanobind.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <map>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "conv.h"
#include "handlers.h"
#include "isa.h"
#include "plan.h"
#include "plan_both.h"
#include "plan_data.h"
#include "plan_masked.h"
#include "plan_weights.h"
#include "zeros.h"

namespace nb = nanobind;
using namespace sparsetrain;

namespace {

// `density` is that of the operand whose zeros are skipped, of lhs where there is a choice. `fmas`, if given: for
// a machine like this one with so many 512-bit multiply-adds a cycle. `threads` are those of BWW, the masked BWI and
// both.
std::map<std::string, std::string> plan(const std::string& component, const std::vector<int64_t>& dims,
                                        const std::vector<int64_t>& geometry, double density, std::optional<int> fmas,
                                        int threads) {
  if (dims.size() != 7) throw std::invalid_argument("dims must be [N, H, W, C, K, R, S]");
  if (threads < 1) throw std::invalid_argument("plan: threads must be positive");
  if (geometry.size() != 6) throw std::invalid_argument("geometry must have 6 numbers");
  ConvShape shape{.n = dims[0],
                  .h = dims[1],
                  .w = dims[2],
                  .c = dims[3],
                  .r = dims[5],
                  .s = dims[6],
                  .k = dims[4],
                  .oh = 0,
                  .ow = 0,
                  .stride_h = geometry[0],
                  .stride_w = geometry[1],
                  .pad_top = geometry[2],
                  .pad_left = geometry[4]};
  const auto all_positive = [](std::initializer_list<int64_t> values) {
    return std::all_of(values.begin(), values.end(), [](int64_t x) { return x > 0; });
  };
  bool positive =
      all_positive({shape.n, shape.h, shape.w, shape.c, shape.k, shape.r, shape.s, shape.stride_h, shape.stride_w});
  if (positive) {
    shape.oh = out_pixels(shape.h, geometry[2], geometry[3], shape.r, shape.stride_h);
    shape.ow = out_pixels(shape.w, geometry[4], geometry[5], shape.s, shape.stride_w);
    positive = all_positive({shape.oh, shape.ow});
  }
  if (!positive) throw std::invalid_argument("plan: every dimension, of the result too, and stride must be positive");
  Machine machine = sparsetrain::machine();
  machine.fmas = fmas.value_or(machine.fmas);
  if (machine.fmas != 1 && machine.fmas != 2) throw std::invalid_argument("plan: fmas must be 1 or 2");
  const Kernels& k = kernels();
  const PlanMachine plan_machine{machine, k.lanes, k.registers, threads};
  Description description;
  if (component == "fwd") {
    description = describe_data(DataOp::kFwd, shape, density, machine, k);
  } else if (component == "bwd_input") {
    description = describe_data(DataOp::kBwdInput, shape, density, machine, k);
  } else if (component == "bwd_weights") {
    description = describe_weights(shape, Densities{density, 1}, plan_machine);
  } else if (component == "bwd_input_masked") {
    description = describe_masked(shape, Densities{density, 1}, plan_machine);
  } else if (component == "bwd_both") {
    description = describe_both(shape, Densities{density, 1}, plan_machine);
  } else {
    throw std::invalid_argument("plan: unknown component '" + component + "'");
  }
  // Measured 0.24 to 0.67 of XLA's own vector code up to half zeros, whatever the shape.
  if (&k == &kKernelsPortable) description.add("lax", "the portable kernels lose to XLA's own convolution");
  return description.lines();
}

DType dtype_named(const std::string& name) {
  if (name == "float32") return DType::kF32;
  if (name == "bfloat16") return DType::kBf16;
  if (name == "float16") return DType::kF16;
  throw std::invalid_argument("unknown dtype '" + name + "'; known: float32, bfloat16, float16");
}

// The conversions of the ISA in force, on raw little-endian values.
nb::bytes widen(const std::string& dtype, const nb::bytes& values) {
  const ConstTensor from{values.data(), dtype_named(dtype)};
  std::vector<float> to(values.size() / static_cast<size_t>(from.size()));
  kernels().data.widen[index_of(from.dtype)](from.data, to.data(), static_cast<int64_t>(to.size()));
  return nb::bytes(to.data(), to.size() * sizeof(float));
}

nb::bytes narrow(const std::string& dtype, const nb::bytes& values) {
  const DType to = dtype_named(dtype);
  std::vector<float> from(values.size() / sizeof(float));
  std::memcpy(from.data(), values.data(), from.size() * sizeof(float));
  std::vector<char> out(from.size() * static_cast<size_t>(size_of(to)));
  const int64_t count = static_cast<int64_t>(from.size());
  kernels().data.finish[index_of(to)][index_of(to)]({from.data(), count, 1, count, out.data(), count, nullptr});
  return nb::bytes(out.data(), out.size());
}

// As handlers measure it before they plan.
double density_of(const std::string& dtype, const nb::bytes& values) {
  const ConstTensor tensor{values.data(), dtype_named(dtype)};
  const int64_t count = static_cast<int64_t>(values.size()) / tensor.size();
  if (count < 1) throw std::invalid_argument("density: no values");
  return density(kernels(), tensor, count);
}

}  // namespace

NB_MODULE(_native, m) {
  m.def("registrations", [] {
    nb::dict out;
    for (const auto& [name, handler] : registrations()) out[name] = nb::capsule(handler);
    return out;
  });
  m.def("isa", [] { return std::string(kernels().isa); });
  m.def("available_isas", &available_isas);
  m.def("set_isa", &set_isa, nb::arg("name"));
  m.def("machine", [] {
    return std::map<std::string, int64_t>{{"l1_bytes", machine().l1_bytes},
                                          {"l2_bytes", machine().l2_bytes},
                                          {"l3_bytes", machine().l3_bytes},
                                          {"fmas", machine().fmas}};
  });
  m.def("counters", [] {
    const auto pairs = counters();
    return std::map<std::string, int64_t>(pairs.begin(), pairs.end());
  });
  m.def("measure_peak", &measure_peak, nb::arg("seconds"), nb::call_guard<nb::gil_scoped_release>());
  m.def("reset_counters", &reset_counters);
  m.def("widen", &widen, nb::arg("dtype"), nb::arg("values"));
  m.def("narrow", &narrow, nb::arg("dtype"), nb::arg("values"));
  m.def("density", &density_of, nb::arg("dtype"), nb::arg("values"));
  m.def("plan", &plan, nb::arg("component"), nb::arg("dims"), nb::arg("geometry"), nb::arg("density"),
        nb::arg("fmas") = nb::none(), nb::arg("threads") = 1);
}
