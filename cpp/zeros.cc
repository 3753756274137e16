#include "zeros.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "isa.h"

namespace sparsetrain {

double density(ConstTensor values, int64_t count) {
  constexpr int64_t kRun = 64, kRuns = 512, kTurns = 8;
  const auto count_nonzero = kernels().weights.count_nonzero[index_of(values.dtype)];
  if (count <= 4 * kRun * kRuns) {
    return static_cast<double>(count_nonzero(values.data, count)) / static_cast<double>(count);
  }
  int64_t nonzeros = 0;
  for (int64_t turn = 0; turn < kTurns; ++turn) {
    for (int64_t group = 0; group < kRuns; group += kTurns) {
      const int64_t i = group + (group / kTurns + turn) % kTurns;  // not the same place in images of some size
      const uint64_t hash = (static_cast<uint64_t>(i) * 0x9e3779b97f4a7c15u) >> 40;  // 24 bits
      const int64_t slot = count / kRuns;
      const int64_t at = i * slot + static_cast<int64_t>(hash * static_cast<uint64_t>(slot - kRun) >> 24);
      nonzeros += count_nonzero(values.at(at), kRun);
    }
    // Most operands without a zero are dense: they are done after one turn.
    if (turn == 0 && nonzeros == kRuns / kTurns * kRun) return 1;
  }
  return static_cast<double>(nonzeros) / static_cast<double>(kRun * kRuns);
}

bool zero_of_zeros(double sample, ConstTensor operand, int64_t count, Tensor result, int64_t result_count,
                   Executor& executor) {
  if (sample > 0) return false;
  constexpr int64_t kChunk = 1 << 14;
  const auto chunks = [](int64_t values) { return (values + kChunk - 1) / kChunk; };
  const auto count_nonzero = kernels().weights.count_nonzero[index_of(operand.dtype)];
  std::atomic<bool> all_zero{true};
  run_phases(executor, {{chunks(count),
                         [&](int64_t index) {
                           if (!all_zero.load(std::memory_order_relaxed)) return;
                           const int64_t first = index * kChunk, values = std::min(kChunk, count - first);
                           if (count_nonzero(operand.at(first), values) > 0) all_zero.store(false);
                         }},
                        {chunks(result_count), [&](int64_t index) {
                           if (!all_zero.load()) return;
                           const int64_t first = index * kChunk, values = std::min(kChunk, result_count - first);
                           std::memset(result.at(first), 0, static_cast<size_t>(values * result.size()));
                         }}});
  return all_zero.load();
}

}  // namespace sparsetrain
