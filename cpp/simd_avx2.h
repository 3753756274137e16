// Isa for AVX2, FMA and F16C: 8 lanes, 16 registers. See simd_portable.h for what each operation means.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "dtype.h"
#include "simd.h"

namespace sparsetrain {
namespace {

// kCompress[m] moves the lanes named by the bits of m to the front; kExpand[m] is its inverse.
struct LaneTables {
  alignas(32) int32_t compress[256][8];
  alignas(32) int32_t expand[256][8];
  alignas(16) uint8_t compress_u16[256][16];
  constexpr LaneTables() : compress{}, expand{}, compress_u16{} {
    for (int m = 0; m < 256; ++m) {
      int n = 0;
      for (int i = 0; i < 8; ++i) {
        if (m >> i & 1) {
          compress[m][n] = i;
          expand[m][i] = n;
          compress_u16[m][2 * n] = static_cast<uint8_t>(2 * i);
          compress_u16[m][2 * n + 1] = static_cast<uint8_t>(2 * i + 1);
          ++n;
        }
      }
    }
  }
};
constexpr LaneTables kLaneTables;

struct Avx2 {
  static constexpr int kLanes = 8;
  static constexpr int kRegisters = 16;
  static constexpr bool kTakes = false;
  static constexpr bool kLoadsColumns = false;
  using Vec = __m256;

  static ST_INLINE Vec zero() { return _mm256_setzero_ps(); }
  static ST_INLINE Vec load(const float* p) { return _mm256_loadu_ps(p); }
  static ST_INLINE Vec load_n(const float* p, int n) { return _mm256_maskload_ps(p, first(n)); }
  static ST_INLINE void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
  static ST_INLINE void store_n(float* p, Vec v, int n) { _mm256_maskstore_ps(p, first(n), v); }
  static ST_INLINE void stream(float* p, Vec v) { _mm256_stream_ps(p, v); }
  static ST_INLINE void stream_fence() { _mm_sfence(); }
  static ST_INLINE Vec load(const Bf16* p) { return widen_bf16(load_16(p)); }
  static ST_INLINE Vec load_n(const Bf16* p, int n) { return widen_bf16(load_16_n(p, n)); }
  static ST_INLINE void store(Bf16* p, Vec v) { store_16(p, narrow_bf16(v)); }
  static ST_INLINE void store_n(Bf16* p, Vec v, int n) { store_16_n(p, narrow_bf16(v), n); }
  static ST_INLINE Vec load(const F16* p) { return _mm256_cvtph_ps(load_16(p)); }
  static ST_INLINE Vec load_n(const F16* p, int n) { return _mm256_cvtph_ps(load_16_n(p, n)); }
  static ST_INLINE void store(F16* p, Vec v) { store_16(p, narrow_f16(v)); }
  static ST_INLINE void store_n(F16* p, Vec v, int n) { store_16_n(p, narrow_f16(v), n); }
  template <class T>
  static ST_INLINE void store_two(T* p, Vec a, Vec b) {
    store(p, a);
    store(p + kLanes, b);
  }
  static ST_INLINE Vec broadcast(const float* p) { return _mm256_broadcast_ss(p); }
  static ST_INLINE Vec load_shared(const float* p) {
    Vec v = load(p);
    asm("" : "+x"(v));
    return v;
  }
  static ST_INLINE Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
  static ST_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
  // Left to itself, gcc may add into b's register and then move sums about, some of them through the stack.
  static ST_INLINE void fma_shared(Vec a, Vec b, Vec& sum) {
    asm("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
  }
  static ST_INLINE float sum(Vec v) {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
  }
  static ST_INLINE void add_sums(float* p, bool first, Vec a, Vec b, Vec c, Vec d) {
    const __m256 x = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    const __m128 z = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    _mm_storeu_ps(p, first ? z : _mm_add_ps(z, _mm_loadu_ps(p)));
  }
  static ST_INLINE uint32_t nonzero(Vec v) {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(v, _mm256_setzero_ps(), _CMP_NEQ_UQ)));
  }
  static ST_INLINE Vec keep(uint32_t mask, Vec v) {
    const __m256i bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i kept = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(mask)), bits), bits);
    return _mm256_and_ps(v, _mm256_castsi256_ps(kept));
  }
  static ST_INLINE void compress(float* p, uint32_t mask, Vec v) {
    const __m256i lanes = _mm256_load_si256(reinterpret_cast<const __m256i*>(kLaneTables.compress[mask]));
    _mm256_storeu_ps(p, _mm256_permutevar8x32_ps(v, lanes));
  }
  using U16 = __m128i;
  static ST_INLINE U16 load_u16(const uint16_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
  static ST_INLINE void compress_u16(uint16_t* p, uint32_t mask, U16 src) {
    const __m128i bytes = _mm_load_si128(reinterpret_cast<const __m128i*>(kLaneTables.compress_u16[mask]));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_shuffle_epi8(src, bytes));
  }
  static constexpr int kListLanes = kLanes;
  static ST_INLINE void transpose_bits(const uint16_t* masks, uint64_t* words) {
    // Bytes of 32 masks each, whose sign bits are collected eight times.
    const __m256i* from = reinterpret_cast<const __m256i*>(masks);
    const auto bytes = [&](int half) ST_LAMBDA {
      const __m256i a = _mm256_loadu_si256(from + 2 * half), b = _mm256_loadu_si256(from + 2 * half + 1);
      return _mm256_permute4x64_epi64(_mm256_packus_epi16(a, b), 0xd8);
    };
    __m256i low = bytes(0), high = bytes(1);
    unroll<8>([&](auto i) ST_LAMBDA {
      words[7 - i] = static_cast<uint32_t>(_mm256_movemask_epi8(low)) |
                     static_cast<uint64_t>(static_cast<uint32_t>(_mm256_movemask_epi8(high))) << 32;
      low = _mm256_add_epi8(low, low);
      high = _mm256_add_epi8(high, high);
    });
  }
  static ST_INLINE Vec expand(uint32_t mask, const float* p) {
    const __m256i lanes = _mm256_load_si256(reinterpret_cast<const __m256i*>(kLaneTables.expand[mask]));
    return keep(mask, _mm256_permutevar8x32_ps(_mm256_loadu_ps(p), lanes));
  }
  static ST_INLINE void transpose(Vec (&r)[kLanes]) {
    __m256 t[8];
    unroll<4>([&](auto step) ST_LAMBDA {
      constexpr int i = 2 * step;
      t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
      t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    });
    unroll<2>([&](auto step) ST_LAMBDA {
      constexpr int i = 4 * step;
      r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
      r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
      r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
      r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    });
    unroll<4>([&](auto i) ST_LAMBDA {
      t[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
      t[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
    });
    unroll<8>([&](auto i) ST_LAMBDA { r[i] = t[i]; });
  }

 private:
  static ST_INLINE __m128i load_16(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
  static ST_INLINE __m128i load_16_n(const void* p, int n) {
    uint16_t lanes[kLanes] = {};
    std::memcpy(lanes, p, static_cast<size_t>(n) * sizeof(uint16_t));
    return load_16(lanes);
  }
  static ST_INLINE void store_16(void* p, __m128i v) { _mm_storeu_si128(static_cast<__m128i*>(p), v); }
  static ST_INLINE void store_16_n(void* p, __m128i v, int n) {
    uint16_t lanes[kLanes];
    store_16(lanes, v);
    std::memcpy(p, lanes, static_cast<size_t>(n) * sizeof(uint16_t));
  }
  static ST_INLINE Vec widen_bf16(__m128i v) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16));
  }
  static ST_INLINE __m128i narrow_bf16(Vec v) {
    const __m256i bits = _mm256_castps_si256(v), high = _mm256_srli_epi32(bits, 16);
    const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
    const __m256i wide = _mm256_blendv_epi8(_mm256_srli_epi32(rounded, 16), quiet, nan);
    return _mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
  }
  static ST_INLINE __m128i narrow_f16(Vec v) { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }
  static ST_INLINE __m256i first(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
};

}  // namespace
}  // namespace sparsetrain
