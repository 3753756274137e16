// Isa for any machine: 4 lanes through the compiler's vector extension. Also the definition of what every Isa offers.
//
//   load, store       any alignment, of float, Bf16 or F16: lanes are float32, converted as dtype.h says
//   load_n, store_n   the first n <= kLanes lanes; the rest reads as zero, is not written, and never touched in memory
//   store_two         both vectors, one after the other
//   stream            aligned, may by-pass the caches
//   load_shared       of float, for several uses: from a register, when gcc would rather read memory again for each
//   broadcast         one float to all lanes
//   take              the first lane to all lanes; the others move on by one. Only where kTakes
//   fma_shared        adds a * b to sum, where several of them take the same b, which is in a register
//   nonzero           a bit per lane that is neither +0.0 nor -0.0
//   keep              the lanes named by mask, zero elsewhere
//   add_sums          p[0..4) = (first ? 0 : p[0..4)) + the sums of the lanes of a, b, c, d
//   compress          lanes named by mask, in order, to p[0..]; kLanes floats are written, the rest is garbage
//   load_u16          kLanes 16-bit integers, as compress_u16 wants them
//   compress_u16      compress for these
//   compress_list     the same for kListLanes 16-bit integers in memory. Only where these are more than kLanes
//   transpose_bits    words[i] bit j = masks[j] bit i, i < kLanes, j < 64
//   expand            p[0..popcount) to the lanes named by mask, zero elsewhere; kLanes floats are read
//   transpose         r[i][j] <-> r[j][i]
//   load_columns      of float: r[i][j] = rows[j][first + i]. Only where kLoadsColumns
#pragma once

#include <cstdint>
#include <cstring>

#include "dtype.h"
#include "simd.h"

namespace sparsetrain {
namespace {

// By integers, so that they work on any machine, whether it flushes subnormals or not.
ST_INLINE float widen(Bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
ST_INLINE float widen(F16 x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
  uint32_t bits = 0;
  if (rest > 0x7c00) {
    bits = 0x7fc00000 | rest << 13;  // NaN, quiet
  } else if (rest == 0x7c00) {
    bits = 0x7f800000;
  } else if (rest >= 0x0400) {
    bits = (rest << 13) + (112u << 23);
  } else {
    const float subnormal = static_cast<float>(rest) * 0x1p-24f;
    std::memcpy(&bits, &subnormal, sizeof bits);
  }
  bits |= sign;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
ST_INLINE void narrow(float x, Bf16* to) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const bool nan = (bits & 0x7fffffff) > 0x7f800000;
  to->bits = static_cast<uint16_t>(nan ? bits >> 16 | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
ST_INLINE void narrow(float x, F16* to) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
  uint32_t half;
  if (rest > 0x7f800000) {
    half = 0x7e00 | (rest >> 13 & 0x1ff);
  } else if (rest >= 0x477ff000) {  // 65520, half-way between the largest value and the next power of two
    half = 0x7c00;
  } else if (rest >= 0x38800000) {  // 2^-14, the smallest normal value
    half = ((rest + 0xfff + (rest >> 13 & 1)) >> 13) - (112u << 10);
  } else {  // in [0.5, 1) the last bit of a float stands for 2^-24, as that of a subnormal does
    float magnitude;
    std::memcpy(&magnitude, &rest, sizeof magnitude);
    magnitude += 0.5f;
    std::memcpy(&half, &magnitude, sizeof half);
    half -= 0x3f000000;
  }
  to->bits = static_cast<uint16_t>(sign | half);
}

struct Portable {
  static constexpr int kLanes = 4;
  static constexpr int kRegisters = 16;
  static constexpr bool kTakes = false;
  static constexpr bool kLoadsColumns = false;
  typedef float Vec __attribute__((vector_size(16)));

  static ST_INLINE Vec zero() { return Vec{0, 0, 0, 0}; }
  static ST_INLINE Vec load(const float* p) {
    Vec v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  static ST_INLINE Vec load_n(const float* p, int n) {
    Vec v = zero();
    for (int i = 0; i < n; ++i) v[i] = p[i];
    return v;
  }
  static ST_INLINE void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }
  static ST_INLINE void store_n(float* p, Vec v, int n) {
    for (int i = 0; i < n; ++i) p[i] = v[i];
  }
  template <class Narrow>
  static ST_INLINE Vec load(const Narrow* p) {
    return load_n(p, kLanes);
  }
  template <class Narrow>
  static ST_INLINE Vec load_n(const Narrow* p, int n) {
    Vec v = zero();
    for (int i = 0; i < n; ++i) v[i] = widen(p[i]);
    return v;
  }
  template <class Narrow>
  static ST_INLINE void store(Narrow* p, Vec v) {
    store_n(p, v, kLanes);
  }
  template <class Narrow>
  static ST_INLINE void store_n(Narrow* p, Vec v, int n) {
    for (int i = 0; i < n; ++i) narrow(v[i], p + i);
  }
  template <class T>
  static ST_INLINE void store_two(T* p, Vec a, Vec b) {
    store(p, a);
    store(p + kLanes, b);
  }
  static ST_INLINE void stream(float* p, Vec v) { store(p, v); }
  static ST_INLINE void stream_fence() {}
  static ST_INLINE Vec broadcast(const float* p) { return Vec{*p, *p, *p, *p}; }
  static ST_INLINE Vec load_shared(const float* p) { return load(p); }
  static ST_INLINE Vec add(Vec a, Vec b) { return a + b; }
  static ST_INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
  static ST_INLINE void fma_shared(Vec a, Vec b, Vec& sum) { sum = fma(a, b, sum); }
  static ST_INLINE float sum(Vec v) { return (v[0] + v[2]) + (v[1] + v[3]); }
  static ST_INLINE void add_sums(float* p, bool first, Vec a, Vec b, Vec c, Vec d) {
    const Vec sums = {sum(a), sum(b), sum(c), sum(d)};
    store(p, first ? sums : add(sums, load(p)));
  }
  static ST_INLINE uint32_t nonzero(Vec v) {
    return (v[0] != 0 ? 1u : 0) | (v[1] != 0 ? 2u : 0) | (v[2] != 0 ? 4u : 0) | (v[3] != 0 ? 8u : 0);
  }
  static ST_INLINE Vec keep(uint32_t mask, Vec v) {
    for (int i = 0; i < kLanes; ++i) v[i] = mask >> i & 1 ? v[i] : 0;
    return v;
  }
  static ST_INLINE void compress(float* p, uint32_t mask, Vec v) {
    for (int i = 0; i < kLanes; ++i) {
      *p = v[i];
      p += mask >> i & 1;
    }
  }
  struct U16 {
    uint16_t v[kLanes];
  };
  static ST_INLINE U16 load_u16(const uint16_t* p) {
    U16 v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  static ST_INLINE void compress_u16(uint16_t* p, uint32_t mask, U16 src) {
    for (int i = 0; i < kLanes; ++i) {
      *p = src.v[i];
      p += mask >> i & 1;
    }
  }
  static constexpr int kListLanes = kLanes;
  static ST_INLINE void transpose_bits(const uint16_t* masks, uint64_t* words) {
    uint64_t w[kLanes] = {};
    for (int j = 0; j < 64; ++j) {
      for (int i = 0; i < kLanes; ++i) w[i] |= static_cast<uint64_t>(masks[j] >> i & 1) << j;
    }
    std::memcpy(words, w, sizeof w);
  }
  static ST_INLINE Vec expand(uint32_t mask, const float* p) {
    Vec v = zero();
    for (int i = 0; i < kLanes; ++i) {
      if (mask >> i & 1) v[i] = *p++;
    }
    return v;
  }
  static ST_INLINE void transpose(Vec (&r)[kLanes]) {
    for (int i = 0; i < kLanes; ++i) {
      for (int j = i + 1; j < kLanes; ++j) {
        const float x = r[i][j];
        r[i][j] = r[j][i];
        r[j][i] = x;
      }
    }
  }
};

}  // namespace
}  // namespace sparsetrain
