// Which instruction sets this machine has (CPUID and what the operating system saves), and the one in force.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "kernels.h"

namespace sparsetrain {

struct Machine {
  int64_t l1_bytes;  // data cache of a core
  int64_t l2_bytes;
  int64_t l3_bytes;  // shared
  int fmas;          // vector multiply-adds a cycle of the best ISA, 1 or 2

  // Whether vectors of so many lanes have one multiply-add a cycle, behind which what else there is to do hides.
  bool single_fma(int lanes) const { return lanes == 16 && fmas == 1; }
};

std::vector<std::string> available_isas();  // best first
void set_isa(const std::string& name);      // throws std::invalid_argument, naming what is available
const Kernels& kernels();                   // of the ISA in force
const Machine& machine();

// GF/s of one thread that does nothing but multiply-adds in registers: the median of short bursts over `seconds`.
double measure_peak(double seconds);

// How often each path ran, for tests and benchmarks: "conv_fwd/sparse", ... FWD and BWI count tiles, BWW counts calls.
// `path` must be one of the names in isa.cc.
void count(const char* path);
std::vector<std::pair<std::string, int64_t>> counters();
void reset_counters();

}  // namespace sparsetrain
