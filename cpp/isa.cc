#include "isa.h"

#include <unistd.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <fstream>
#include <stdexcept>

namespace sparsetrain {
namespace {

#if defined(__x86_64__)
// Not among the names that every compiler's __builtin_cpu_supports knows.
bool has_f16c() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C) != 0;
}

// Avx512's kernels but for those that make lists.
const Kernels& kernels_avx512_vbmi2() {
  static const Kernels kernels = [] {
    Kernels k = kKernelsAvx512;
    k.isa = "avx512_vbmi2";
    k.weights.list = kListsAvx512Vbmi2.list;
    std::copy_n(kListsAvx512Vbmi2.pack_lists, kDTypes, k.weights.pack_lists);
    std::copy_n(kListsAvx512Vbmi2.lists, kDTypes, k.masked.lists);
    std::copy_n(kListsAvx512Vbmi2.point_lists, kDTypes, k.masked.point_lists);
    return k;
  }();
  return kernels;
}
#endif

std::vector<const Kernels*> usable_kernels() {
  std::vector<const Kernels*> list;
#if defined(__x86_64__)
  // These ask CPUID for the instructions and XCR0 for whether the operating system saves the registers.
  __builtin_cpu_init();
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") && has_f16c();
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    if (__builtin_cpu_supports("avx512vbmi2")) list.push_back(&kernels_avx512_vbmi2());
    list.push_back(&kKernelsAvx512);
  }
  if (avx2) list.push_back(&kKernelsAvx2);
#endif
  list.push_back(&kKernelsPortable);
  return list;
}

std::atomic<const Kernels*>& current() {
  static std::atomic<const Kernels*> kernels{usable_kernels().front()};
  return kernels;
}

// Linux's own table first: for the last level of a many-chip AMD package, sysconf adds up caches that no single core
// can fill.
int64_t cache_bytes(int index, int name, int64_t fallback) {
  std::ifstream file("/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(index) + "/size");
  int64_t kib = 0;
  char unit = 0;
  if (file >> kib >> unit && kib > 0 && unit == 'K') return kib << 10;
  const long bytes = sysconf(name);
  return bytes > 0 ? bytes : fallback;
}

// CPUID does not say. Units for 256 bits come in pairs everywhere; whether 512 bits have two as well shows in the time
// that as many multiply-adds take.
int measure_fmas() {
#if defined(__x86_64__)
  if (usable_kernels().front()->lanes != kKernelsAvx512.lanes) return 2;
  const auto seconds = [](const Kernels& k) {
    const auto start = std::chrono::steady_clock::now();
    k.data.fma_burst(1000);
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  };
  // In turn, and the best of many: plans and so the order of sums depend on the answer, which noise must not change.
  double wide = 1, narrow = 1;
  for (int i = 0; i < 200; ++i) {
    wide = std::min(wide, seconds(kKernelsAvx512));
    narrow = std::min(narrow, seconds(kKernelsAvx2));
  }
  return wide > 1.5 * narrow ? 1 : 2;
#else
  return 2;
#endif
}

constexpr const char* kPaths[] = {
    "conv_fwd/sparse",         "conv_fwd/dense",         "conv_bwd_input/sparse",        "conv_bwd_input/dense",
    "conv_bwd_weights/sparse", "conv_bwd_weights/dense", "conv_bwd_input_masked/sparse", "conv_bwd_input_masked/dense",
    "conv_bwd_both/sparse",    "conv_bwd_both/separate",
};
constexpr size_t kPathCount = sizeof kPaths / sizeof kPaths[0];
std::atomic<int64_t> path_counts[kPathCount];

}  // namespace

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Kernels* k : usable_kernels()) names.emplace_back(k->isa);
  return names;
}

void set_isa(const std::string& name) {
  std::string available;
  for (const Kernels* k : usable_kernels()) {
    if (name == k->isa) {
      current().store(k);
      return;
    }
    available += available.empty() ? k->isa : std::string(", ") + k->isa;
  }
  throw std::invalid_argument("unknown or unavailable ISA '" + name + "'; this machine offers: " + available);
}

const Kernels& kernels() { return *current().load(std::memory_order_relaxed); }

const Machine& machine() {
  static const Machine machine = {
#if defined(_SC_LEVEL1_DCACHE_SIZE)
      cache_bytes(0, _SC_LEVEL1_DCACHE_SIZE, 32 << 10),
      cache_bytes(2, _SC_LEVEL2_CACHE_SIZE, 512 << 10),
      cache_bytes(3, _SC_LEVEL3_CACHE_SIZE, 8 << 20),
#else
      32 << 10,
      512 << 10,
      8 << 20,
#endif
      measure_fmas(),
  };
  return machine;
}

double measure_peak(double seconds) {
  using Clock = std::chrono::steady_clock;
  constexpr int64_t kRounds = 20000;
  const Kernels& k = kernels();
  const double flops = 2.0 * kRounds * kFmaBurst * k.lanes;
  std::vector<double> rates;
  const auto begin = Clock::now();
  do {
    const auto start = Clock::now();
    k.data.fma_burst(kRounds);
    rates.push_back(flops / std::chrono::duration<double>(Clock::now() - start).count() / 1e9);
  } while (std::chrono::duration<double>(Clock::now() - begin).count() < seconds);
  std::nth_element(rates.begin(), rates.begin() + static_cast<ptrdiff_t>(rates.size() / 2), rates.end());
  return rates[rates.size() / 2];
}

void count(const char* path) {
  for (size_t i = 0; i < kPathCount; ++i) {
    if (std::strcmp(path, kPaths[i]) == 0) {
      path_counts[i].fetch_add(1, std::memory_order_relaxed);
      return;
    }
  }
  throw std::logic_error(std::string("no such path: ") + path);
}

std::vector<std::pair<std::string, int64_t>> counters() {
  std::vector<std::pair<std::string, int64_t>> out;
  for (size_t i = 0; i < kPathCount; ++i) out.emplace_back(kPaths[i], path_counts[i].load());
  return out;
}

void reset_counters() {
  for (auto& c : path_counts) c.store(0);
}

}  // namespace sparsetrain
