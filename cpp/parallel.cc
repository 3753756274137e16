#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <thread>

namespace sparsetrain {
namespace {

void* allocate(size_t bytes) {
  void* p = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
  if (p == nullptr) throw std::bad_alloc();
  return p;
}

// One call's queue. Helpers hold it by shared_ptr: one that starts after the call has returned finds every item
// claimed and touches no body.
struct Gang {
  struct Counter {
    alignas(64) std::atomic<int64_t> next{0};
    alignas(64) std::atomic<int64_t> done{0};
  };
  explicit Gang(std::vector<Phase> p) : phases(std::move(p)), counters(phases.size()) {}

  void work() {
    for (size_t i = 0; i < phases.size(); ++i) {
      const int64_t items = phases[i].items;
      for (;;) {
        const int64_t item = counters[i].next.fetch_add(1, std::memory_order_relaxed);
        if (item >= items) break;
        try {
          if (!failed.load(std::memory_order_relaxed)) phases[i].body(item);
        } catch (...) {
          std::lock_guard<std::mutex> lock(mutex);
          if (!failed.exchange(true)) error = std::current_exception();
        }
        counters[i].done.fetch_add(1, std::memory_order_release);
      }
      // Every missing item is in the hands of a thread that runs: this wait is short and cannot deadlock.
      for (int spins = 0; counters[i].done.load(std::memory_order_acquire) < items; ++spins) {
        if (spins > 256) std::this_thread::yield();
      }
    }
  }

  std::vector<Phase> phases;
  std::vector<Counter> counters;
  std::atomic<bool> failed{false};
  std::mutex mutex;
  std::exception_ptr error;
};

struct FreeList {
  static constexpr ptrdiff_t kMaxBlocks = 8;
  static constexpr size_t kMaxBytes = size_t{1} << 28;
  struct Block {
    void* data;
    size_t bytes;
  };
  std::mutex mutex;
  std::vector<Block> blocks;
};

// Never destroyed: a pool thread may still return a block while the process exits.
FreeList& free_list() {
  static FreeList* list = new FreeList;
  return *list;
}

}  // namespace

void run_phases(Executor& executor, std::vector<Phase> phases) {
  int64_t widest = 0;
  for (const Phase& phase : phases) widest = std::max(widest, phase.items);
  auto gang = std::make_shared<Gang>(std::move(phases));
  const int64_t helpers = std::min<int64_t>(executor.concurrency(), widest) - 1;
  try {
    for (int64_t i = 0; i < helpers; ++i) executor.schedule([gang] { gang->work(); });
  } catch (...) {
    // Fewer helpers do as well. Those that were scheduled use what the caller holds: it must not leave before all is
    // done.
  }
  gang->work();
  if (gang->failed.load()) std::rethrow_exception(gang->error);
}

Scratch& Scratch::local() {
  static thread_local Scratch scratch;
  return scratch;
}

void Scratch::begin(size_t bytes) {
  used_ = 0;
  if (bytes <= capacity_) return;
  std::free(base_);
  base_ = nullptr;
  capacity_ = 0;
  base_ = static_cast<char*>(allocate(bytes));
  capacity_ = bytes;
}

void* Scratch::take_bytes(size_t bytes) {
  const size_t step = (bytes + 127) / 64 * 64;
  if (used_ + step > capacity_) throw std::bad_alloc();
  void* p = base_ + used_;
  used_ += step;
  return p;
}

Scratch::~Scratch() { std::free(base_); }

SharedBuffer::SharedBuffer(size_t bytes) : data_(nullptr), bytes_(bytes) {
  if (bytes == 0) return;
  FreeList& list = free_list();
  {
    std::lock_guard<std::mutex> lock(list.mutex);
    auto best = list.blocks.end();
    for (auto it = list.blocks.begin(); it != list.blocks.end(); ++it) {
      if (it->bytes >= bytes && it->bytes <= 4 * bytes + (1 << 16) &&
          (best == list.blocks.end() || it->bytes < best->bytes)) {
        best = it;
      }
    }
    if (best != list.blocks.end()) {
      data_ = best->data;
      bytes_ = best->bytes;
      list.blocks.erase(best);
    }
  }
  if (data_ == nullptr) data_ = allocate(bytes);
}

SharedBuffer::~SharedBuffer() {
  if (data_ == nullptr) return;
  FreeList& list = free_list();
  std::vector<FreeList::Block> evicted;  // freed without the lock
  {
    std::lock_guard<std::mutex> lock(list.mutex);
    list.blocks.push_back({data_, bytes_});
    size_t bytes = 0;
    for (const FreeList::Block& block : list.blocks) bytes += block.bytes;
    auto kept = list.blocks.begin();
    for (; list.blocks.end() - kept > FreeList::kMaxBlocks || bytes > FreeList::kMaxBytes; ++kept) bytes -= kept->bytes;
    evicted.assign(list.blocks.begin(), kept);
    list.blocks.erase(list.blocks.begin(), kept);
  }
  for (const FreeList::Block& block : evicted) std::free(block.data);
}

}  // namespace sparsetrain
