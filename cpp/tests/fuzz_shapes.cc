// Random shapes through all operations, on every ISA of the machine, in every dtype. .ci/fuzz builds and runs it.
//
// Small integers, of which every order of summation gives the same bits, against a plain loop over the definition in
// conv.h. Then real numbers, twice: the bits must not depend on the number of threads, on which of them came late, on
// what lies in scratch memory or on where arrays lie. Arrays end, or begin, at a page that nobody may touch.
// Usage: fuzz_shapes [cases] [seed]
#include <sys/mman.h>
#include <unistd.h>

#include <array>
#include <cstdio>
#include <cstdlib>
#include <iterator>
#include <random>
#include <stdexcept>
#include <thread>
#include <vector>

#include "conv.h"
#include "isa.h"
#include "parallel.h"

using namespace sparsetrain;

namespace {

// Helpers that start at once, or late, or whose executor refuses them.
class FuzzExecutor : public Executor {
 public:
  explicit FuzzExecutor(int threads) : threads_(threads) {}
  ~FuzzExecutor() override {
    for (std::thread& t : workers_) t.join();
    for (auto& task : late_) task();
  }
  int concurrency() const override { return threads_; }
  void schedule(std::function<void()> task) override {
    if (++scheduled_ % 5 == 0) throw std::runtime_error("no more helpers");
    if (scheduled_ % 3 == 0) {
      late_.push_back(std::move(task));
    } else {
      workers_.emplace_back(std::move(task));
    }
  }

 private:
  int threads_, scheduled_ = 0;
  std::vector<std::thread> workers_;
  std::vector<std::function<void()>> late_;
};

constexpr const char* kDTypeNames[kDTypes] = {"float32", "bfloat16", "float16"};

// Memory between two pages that fault; what is asked for touches one of them.
class Fenced {
 public:
  Fenced(size_t bytes, bool at_end) : bytes_(bytes) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    mapped_ = (bytes + page - 1) / page * page + 2 * page;
    base_ = static_cast<char*>(mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED || mprotect(base_ + page, mapped_ - 2 * page, PROT_READ | PROT_WRITE) != 0) {
      throw std::runtime_error("no memory");
    }
    data_ = at_end ? base_ + mapped_ - page - bytes : base_ + page;
  }
  ~Fenced() { munmap(base_, mapped_); }
  Fenced(const Fenced&) = delete;
  Fenced& operator=(const Fenced&) = delete;
  char* data() const { return data_; }
  size_t size() const { return bytes_; }

 private:
  size_t bytes_, mapped_;
  char *base_, *data_;
};

// An array of some dtype, and back. Roundings are those of the ISA in force, which tests/test_dtypes.py checks.
class Array {
 public:
  Array(const std::vector<float>& values, DType dtype, bool at_end = true)
      : memory_(values.size() * size_of(dtype), at_end), dtype_(dtype) {
    const int64_t n = static_cast<int64_t>(values.size());
    kernels().data.finish[index_of(dtype)][index_of(dtype)]({values.data(), n, 1, n, memory_.data(), n, nullptr});
  }
  operator ConstTensor() const { return {memory_.data(), dtype_}; }
  Tensor out() { return {memory_.data(), dtype_}; }
  std::vector<float> values() const {
    std::vector<float> wide(memory_.size() / size_of(dtype_));
    kernels().data.widen[index_of(dtype_)](memory_.data(), wide.data(), static_cast<int64_t>(wide.size()));
    return wide;
  }

 private:
  Fenced memory_;
  DType dtype_;
};

struct Case {
  ConvShape s;
  std::vector<float> lhs, rhs, g;
};

constexpr const char* kOperations[] = {"conv_fwd",
                                       "conv_bwd_input",
                                       "conv_bwd_weights",
                                       "conv_bwd_input_masked",
                                       "conv_bwd_both, of lhs",
                                       "conv_bwd_both, of rhs"};
using Values = std::array<std::vector<float>, std::size(kOperations)>;  // of the operations' results, in this order

// What the operations make of a case.
struct Results {
  Array out, dlhs, drhs, masked, both_lhs, both_rhs;

  Results(const Case& c, Mode mode, DType operands, DType result, int threads, bool at_end)
      : out(std::vector<float>(c.g.size(), 77), result, at_end),
        dlhs(std::vector<float>(c.lhs.size(), 77), result, at_end),
        drhs(std::vector<float>(c.rhs.size(), 77), result, at_end),
        masked(std::vector<float>(c.lhs.size(), 77), result, at_end),
        both_lhs(std::vector<float>(c.lhs.size(), 77), result, at_end),
        both_rhs(std::vector<float>(c.rhs.size(), 77), result, at_end) {
    const Array lhs(c.lhs, operands, at_end), rhs(c.rhs, operands, at_end), g(c.g, operands, at_end);
    FuzzExecutor executor(threads);
    conv_fwd(c.s, mode, lhs, rhs, out.out(), executor);
    conv_bwd_input(c.s, mode, g, rhs, dlhs.out(), executor);
    conv_bwd_weights(c.s, mode, lhs, g, drhs.out(), executor);
    conv_bwd_input_masked(c.s, mode, g, rhs, lhs, masked.out(), executor);
    conv_bwd_both(c.s, mode, g, rhs, lhs, both_lhs.out(), both_rhs.out(), executor);
  }
  Values values() const {
    return {out.values(), dlhs.values(), drhs.values(), masked.values(), both_lhs.values(), both_rhs.values()};
  }
};

template <class F>
void for_each_product(const ConvShape& s, F f) {
  for (int64_t n = 0; n < s.n; ++n)
    for (int64_t oy = 0; oy < s.oh; ++oy)
      for (int64_t ox = 0; ox < s.ow; ++ox)
        for (int64_t r = 0; r < s.r; ++r)
          for (int64_t q = 0; q < s.s; ++q) {
            const int64_t y = oy * s.stride_h + r - s.pad_top, x = ox * s.stride_w + q - s.pad_left;
            if (y < 0 || y >= s.h || x < 0 || x >= s.w) continue;
            f(((n * s.h + y) * s.w + x) * s.c, (r * s.s + q) * s.c * s.k, ((n * s.oh + oy) * s.ow + ox) * s.k);
          }
}

// `against`: what `want` was computed by.
bool same(const char* isa, const Case& c, DType operands, const char* against, const Values& want, const Values& got) {
  bool ok = true;
  for (size_t op = 0; op < want.size(); ++op) {
    for (size_t i = 0; i < want[op].size(); ++i) {
      if (want[op][i] == got[op][i]) continue;
      const ConvShape& s = c.s;
      std::printf(
          "%s %s of %s: [%zu] is %g, %g by %s; n%ld h%ld w%ld c%ld r%ld s%ld k%ld stride %ld %ld pad %ld %ld "
          "out %ldx%ld\n",
          isa, kOperations[op], kDTypeNames[index_of(operands)], i, got[op][i], want[op][i], against, (long)s.n,
          (long)s.h, (long)s.w, (long)s.c, (long)s.r, (long)s.s, (long)s.k, (long)s.stride_h, (long)s.stride_w,
          (long)s.pad_top, (long)s.pad_left, (long)s.oh, (long)s.ow);
      ok = false;
      break;
    }
  }
  return ok;
}

}  // namespace

int main(int argc, char** argv) {
  const int cases = argc > 1 ? std::atoi(argv[1]) : 300;
  std::mt19937 random(argc > 2 ? std::atoi(argv[2]) : 1);
  const auto pick = [&](std::vector<int64_t> v) { return v[random() % v.size()]; };
  int passed = 0, failed = 0;
  for (int i = 0; i < cases; ++i) {
    Case c;
    ConvShape& s = c.s;
    s.n = pick({1, 1, 2, 5});
    s.h = pick({1, 2, 3, 5, 7, 14});
    s.w = pick({1, 2, 3, 4, 7, 8, 15, 33});
    s.c = pick({1, 3, 8, 15, 16, 17, 33, 64, 100});
    s.k = pick({1, 3, 8, 15, 16, 17, 33, 64, 130});
    s.r = pick({1, 1, 2, 3, 3, 5, 7, 9});
    s.s = pick({1, 1, 2, 3, 3, 4, 5, 7, 11});
    s.stride_h = pick({1, 1, 2, 3});
    s.stride_w = pick({1, 1, 2, 3, 4});
    s.pad_top = random() % (s.r + 2);
    s.pad_left = random() % (s.s + 2);
    const int64_t h = s.h + s.pad_top + random() % (s.r + 1) - s.r, w = s.w + s.pad_left + random() % (s.s + 1) - s.s;
    if (h < 0 || w < 0) continue;
    s.oh = h / s.stride_h + 1;
    s.ow = w / s.stride_w + 1;
    const double density = pick({0, 5, 30, 60, 100}) / 100.0;
    const auto fill = [&](std::vector<float>& v, int64_t size, double d) {
      v.resize(size);
      for (float& x : v)
        x = (random() % 1000) / 1000.0 < d ? static_cast<float>(static_cast<int>(random() % 9) - 4) : 0.0f;
    };
    fill(c.lhs, s.n * s.h * s.w * s.c, density);
    fill(c.rhs, s.r * s.s * s.c * s.k, 1);
    fill(c.g, s.n * s.oh * s.ow * s.k, pick({0, 10, 50, 100}) / 100.0);
    Values exact = {std::vector<float>(c.g.size()), std::vector<float>(c.lhs.size()), std::vector<float>(c.rhs.size())};
    auto& [out, dlhs, drhs, masked, both_lhs, both_rhs] = exact;
    for_each_product(s, [&](int64_t a, int64_t b, int64_t o) {
      for (int64_t ci = 0; ci < s.c; ++ci)
        for (int64_t ki = 0; ki < s.k; ++ki) {
          out[o + ki] += c.lhs[a + ci] * c.rhs[b + ci * s.k + ki];
          dlhs[a + ci] += c.g[o + ki] * c.rhs[b + ci * s.k + ki];
          drhs[b + ci * s.k + ki] += c.lhs[a + ci] * c.g[o + ki];
        }
    });
    masked = dlhs;
    for (size_t j = 0; j < masked.size(); ++j) {
      if (c.lhs[j] == 0) masked[j] = 0;
    }
    both_lhs = masked;
    both_rhs = drhs;
    const Mode mode = static_cast<Mode>(random() % 3);
    for (const std::string& isa : available_isas()) {
      set_isa(isa);
      const DType operands = static_cast<DType>(random() % kDTypes), result = random() % 4 ? operands : DType::kF32;
      const auto threads = [&random] { return static_cast<int>(random() % 4) + 1; };
      const Results got(c, mode, operands, result, threads(), random() % 2 != 0);
      Values want = exact;
      for (std::vector<float>& values : want) values = Array(values, result).values();  // rounded as the results are
      Case real = c;
      for (std::vector<float>* values : {&real.lhs, &real.rhs, &real.g}) {
        for (float& x : *values) x *= static_cast<float>(random() % 1000 + 1) / 777;
      }
      const Results once(real, mode, operands, result, threads(), true);
      const Results again(real, mode, operands, result, threads(), false);
      const bool ok = same(isa.c_str(), c, operands, "the definition", want, got.values()) &
                      same(isa.c_str(), c, operands, "the same call before", once.values(), again.values());
      ok ? ++passed : ++failed;
    }
    if (failed > 10) break;
  }
  int64_t together = 0;
  for (const auto& [path, calls] : counters()) {
    if (path == "conv_bwd_both/sparse") together = calls;
  }
  std::printf("%d passed, %d failed; both gradients by the same walks %ld times\n", passed, failed, (long)together);
  return failed == 0 ? 0 : 1;
}
