#include "zeros.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

namespace sparsetrain {

double density(const Kernels& kernels, ConstTensor values, int64_t count) {
  constexpr int64_t kRun = 64, kRuns = 512, kTurns = 8, kGroups = kRuns / kTurns, kAhead = 8;
  constexpr double kError = 0.0075;
  const auto count_nonzero = kernels.weights.count_nonzero[index_of(values.dtype)];
  if (count <= kRun * kRuns) {
    return static_cast<double>(count_nonzero(values.data, count)) / static_cast<double>(count);
  }
  const auto run = [&](int64_t index) {
    const int64_t turn = index / kGroups, group = index % kGroups;
    const int64_t i = group * kTurns + (group + turn) % kTurns;  // not the same place in images of some size
    const uint64_t hash = (static_cast<uint64_t>(i) * 0x9e3779b97f4a7c15u) >> 40;  // 24 bits
    const int64_t slot = count / kRuns;
    return values.at(i * slot + static_cast<int64_t>(hash * static_cast<uint64_t>(slot - kRun) >> 24));
  };
  const int64_t bytes = kRun * values.size();
  int64_t sum = 0, squares = 0;
  for (int64_t index = 0;; ++index) {
    // Runs are far apart, and each is done long before the next would come without being fetched.
    const char* later = static_cast<const char*>(run(std::min(index + kAhead, kRuns - 1)));
    for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(later + byte);
    __builtin_prefetch(later + bytes - 1);
    const int64_t nonzeros = count_nonzero(run(index), kRun);
    sum += nonzeros;
    squares += nonzeros * nonzeros;
    const int64_t runs = index + 1;
    if (runs % kGroups != 0) continue;
    const double mean = static_cast<double>(sum) / static_cast<double>(runs);
    const double variance = static_cast<double>(squares) / static_cast<double>(runs) - mean * mean;
    const double error = std::sqrt(std::max(0.0, variance) / static_cast<double>(runs));
    // Runs without a non-zero agree too soon where a few have some.
    if ((sum > 0 && error < kError * kRun) || runs == kRuns) return mean / kRun;
  }
}

bool zero_of_zeros(const Kernels& kernels, double sample, ConstTensor operand, int64_t count,
                   std::initializer_list<ResultExtent> results, Executor& executor) {
  if (sample > 0) return false;
  static constexpr int64_t kChunk = 1 << 14;
  const auto chunks = [](int64_t values) { return (values + kChunk - 1) / kChunk; };
  const auto count_nonzero = kernels.weights.count_nonzero[index_of(operand.dtype)];
  std::atomic<bool> all_zero{true};
  std::vector<Phase> phases = {{chunks(count), [&](int64_t index) {
                                  if (!all_zero.load(std::memory_order_relaxed)) return;
                                  const int64_t first = index * kChunk, values = std::min(kChunk, count - first);
                                  if (count_nonzero(operand.at(first), values) > 0) all_zero.store(false);
                                }}};
  for (const ResultExtent& result : results) {
    phases.push_back({chunks(result.count), [&all_zero, &result](int64_t index) {
                        if (!all_zero.load()) return;
                        const int64_t first = index * kChunk, values = std::min(kChunk, result.count - first);
                        std::memset(result.tensor.at(first), 0, static_cast<size_t>(values * result.tensor.size()));
                      }});
  }
  run_phases(executor, std::move(phases));
  return all_zero.load();
}

}  // namespace sparsetrain
