// Element types of tensors, and views of tensors whose element type is known at run time only.
//
// All arithmetic is float32. Kernels that read a tensor widen its values as they load them, kernels that write one
// narrow as they store, so a narrow tensor is never copied as a whole.
//
//   widening   is exact. Subnormal float16 values are ordinary float32 ones; subnormal bfloat16 values stay subnormal,
//              and count as zeros where threads flush subnormals, as XLA's do.
//   narrowing  rounds to nearest, ties to even; what is too large becomes infinite, NaN stays NaN. float16 results may
//              be subnormal. bfloat16 ones are where the float32 sum was, which flushing threads do not produce.
#pragma once

#include <cstdint>

namespace sparsetrain {

enum class DType : int { kF32, kBf16, kF16 };
constexpr int kDTypes = 3;

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

constexpr int64_t size_of(DType dtype) { return dtype == DType::kF32 ? 4 : 2; }

struct ConstTensor {
  const void* data;
  DType dtype;
  int64_t size() const { return size_of(dtype); }  // of an element
  const void* at(int64_t element) const { return static_cast<const char*>(data) + element * size(); }
};

struct Tensor {
  void* data;
  DType dtype;
  int64_t size() const { return size_of(dtype); }
  void* at(int64_t element) const { return static_cast<char*>(data) + element * size(); }
};

// For tables of kernels by element type.
constexpr int index_of(DType dtype) { return static_cast<int>(dtype); }
template <class T>
constexpr int kIndexOf = -1;
template <>
constexpr int kIndexOf<float> = index_of(DType::kF32);
template <>
constexpr int kIndexOf<Bf16> = index_of(DType::kBf16);
template <>
constexpr int kIndexOf<F16> = index_of(DType::kF16);

}  // namespace sparsetrain
