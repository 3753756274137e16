// What the plans of all operations share: what they are made for, and how they are printed.
#pragma once

#include <cstdint>
#include <cstdio>
#include <map>
#include <string>
#include <type_traits>

#include "conv.h"
#include "isa.h"

namespace sparsetrain {

// Densities (fraction of non-zeros) of the operands, measured or assumed.
struct Densities {
  double lhs = 1, g = 1;
};

// What BWW and the masked BWI are planned for.
struct PlanMachine {
  Machine caches;
  int lanes, registers;
  int threads;  // changes how work is cut, never a sum

  bool single_fma() const { return caches.single_fma(lanes); }
};

// Whether the gradient of lhs is to by-pass the caches, as far as shapes tell.
inline bool streams_lhs(const ConvShape& shape, const PlanMachine& machine) {
  return shape.c % machine.lanes == 0 && 4 * shape.lhs_size() > machine.caches.l3_bytes / 4;
}

// What a plan would do, by name, for explain and tests. The key "lax", when there, holds the reason why XLA's own
// convolution beats all paths for this shape, whatever the values; mode "auto" then takes that one.
class Description {
 public:
  template <class T>
  void add(const char* key, const T& value) {
    if constexpr (std::is_floating_point_v<T>) {
      char text[32];
      std::snprintf(text, sizeof text, "%.4g", static_cast<double>(value));
      lines_[key] = text;
    } else if constexpr (std::is_arithmetic_v<T>) {
      lines_[key] = std::to_string(value);
    } else {
      lines_[key] = value;
    }
  }
  // Of pixels, in images, rows and columns.
  void add_block(const char* key, int64_t images, int64_t rows, int64_t columns) {
    add(key, std::to_string(images) + "x" + std::to_string(rows) + "x" + std::to_string(columns));
  }
  const std::map<std::string, std::string>& lines() const { return lines_; }

 private:
  std::map<std::string, std::string> lines_;
};

// The density, 0 to 1, up to which `pays(density)` is true.
template <class F>
double break_even(F&& pays) {
  double below = pays(1.0) ? 1 : 0, above = 1;
  while (above - below > 1.0 / 4096) {
    const double middle = (below + above) / 2;
    (pays(middle) ? below : above) = middle;
  }
  return below;
}

}  // namespace sparsetrain
