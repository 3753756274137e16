// Which instruction sets this machine has (CPUID and what the operating system saves), and the one in force.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace sparsetrain {

struct Machine {
  int64_t l1_bytes;  // data cache of a core
  int64_t l2_bytes;
  int64_t l3_bytes;  // shared
};

std::vector<std::string> available_isas();  // best first
void set_isa(const std::string& name);      // throws std::invalid_argument, naming what is available
const Kernels& kernels();                   // of the ISA in force
const Machine& machine();

// Counters by path, for tests and explain: "conv_fwd/sparse" and so on.
void count(const char* path);

}  // namespace sparsetrain
