// Threads and scratch memory of one call.
//
// A handler runs on XLA's intra-op pool and gets its helpers from the same pool, so it must never wait for a task that
// has not started: run_phases lets the caller drain an atomic queue together with whatever helpers do start, and waits
// only for items that a running thread has already claimed. It is right with a pool of any size, one thread and
// several concurrent callers included.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

namespace sparsetrain {

// Where helpers come from; handlers.cc wraps XLA's pool, tests may pass an executor without threads.
class Executor {
 public:
  virtual ~Executor() = default;
  virtual int concurrency() const { return 1; }  // the caller included
  virtual void schedule(std::function<void()> task) { (void)task; }
};

// Whether a call of so many multiply-adds of a vector, two of them a cycle, that also packs or writes so many vectors,
// is done before a helper has started.
inline bool too_small_for_threads(double multiply_adds, int64_t written) {
  constexpr double kSerialCost = 150'000, kWriteCost = 8;
  return multiply_adds + kWriteCost * static_cast<double>(written) < kSerialCost;
}

// An executor without helpers for what is too small for them.
inline Executor& helpers_unless(bool serial, Executor& executor) {
  static Executor alone;
  return serial ? alone : executor;
}

// Independent items; all items of a phase end before the first item of the next phase begins.
struct Phase {
  int64_t items = 0;
  std::function<void(int64_t item)> body;
};

// Runs the phases in order on the caller and helpers. Rethrows the first exception that a body threw.
void run_phases(Executor& executor, std::vector<Phase> phases);

// Scratch of the calling thread: one 64-byte aligned block that grows to the largest request and stays (a plan bounds
// its requests to a small multiple of the cache sizes). `begin` forgets earlier pieces, `take` cuts the next one.
class Scratch {
 public:
  static Scratch& local();
  void begin(size_t bytes);
  template <class T>
  T* take(size_t count) {
    return static_cast<T*>(take_bytes(count * sizeof(T)));
  }
  // Bytes that `take<T>(count)` consumes, for sizing `begin`.
  template <class T>
  static constexpr size_t size(size_t count) {
    return (count * sizeof(T) + 127) / 64 * 64;
  }
  ~Scratch();

 private:
  void* take_bytes(size_t bytes);
  char* base_ = nullptr;
  size_t capacity_ = 0, used_ = 0;
};

// A block shared by the threads of one call (a packed kernel, partial sums), taken from and given back to a small
// process-wide free list (eight blocks, 256 MiB at most), so that a training step does not map and fault the same pages
// again at every call. None of 0 bytes.
class SharedBuffer {
 public:
  explicit SharedBuffer(size_t bytes);
  ~SharedBuffer();
  SharedBuffer(const SharedBuffer&) = delete;
  SharedBuffer& operator=(const SharedBuffer&) = delete;
  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_;
  size_t bytes_;
};

}  // namespace sparsetrain
