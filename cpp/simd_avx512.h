// Isa for AVX-512 F, BW, DQ, VL: 16 lanes, 32 registers. See simd_portable.h for what each operation means.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "dtype.h"
#include "simd.h"

namespace sparsetrain {
namespace {

struct Avx512 {
  static constexpr int kLanes = 16;
  static constexpr int kRegisters = 32;
  static constexpr bool kTakes = true;
  static constexpr bool kLoadsColumns = true;
  using Vec = __m512;

  static ST_INLINE Vec zero() { return _mm512_setzero_ps(); }
  static ST_INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
  static ST_INLINE Vec load_n(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
  static ST_INLINE void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
  static ST_INLINE void store_n(float* p, Vec v, int n) { _mm512_mask_storeu_ps(p, first(n), v); }
  static ST_INLINE void stream(float* p, Vec v) { _mm512_stream_ps(p, v); }
  static ST_INLINE void stream_fence() { _mm_sfence(); }
  static ST_INLINE Vec load(const Bf16* p) { return widen_bf16(load_16(p)); }
  static ST_INLINE Vec load_n(const Bf16* p, int n) { return widen_bf16(load_16_n(p, n)); }
  static ST_INLINE void store(Bf16* p, Vec v) { store_16(p, narrow_bf16(v)); }
  static ST_INLINE void store_n(Bf16* p, Vec v, int n) { store_16_n(p, narrow_bf16(v), n); }
  static ST_INLINE Vec load(const F16* p) { return _mm512_cvtph_ps(load_16(p)); }
  static ST_INLINE Vec load_n(const F16* p, int n) { return _mm512_cvtph_ps(load_16_n(p, n)); }
  static ST_INLINE void store(F16* p, Vec v) { store_16(p, narrow_f16(v)); }
  static ST_INLINE void store_n(F16* p, Vec v, int n) { store_16_n(p, narrow_f16(v), n); }
  static ST_INLINE void store_two(float* p, Vec a, Vec b) {
    store(p, a);
    store(p + kLanes, b);
  }
  static ST_INLINE void store_two(F16* p, Vec a, Vec b) {
    store(p, a);
    store(p + kLanes, b);
  }
  // NaNs are rare, and the two halves of a line are packed together.
  static ST_INLINE void store_two(Bf16* p, Vec a, Vec b) {
    if (__builtin_expect(_mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q) != 0, 0)) {
      store(p, a);
      store(p + kLanes, b);
      return;
    }
    const __m512i even = _mm512_set_epi16(31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1, 30, 28, 26, 24, 22,
                                          20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    const __m512i mixed = _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(round_bf16(a), 16), round_bf16(b));
    _mm512_storeu_si512(p, _mm512_permutexvar_epi16(even, mixed));
  }
  static ST_INLINE Vec broadcast(const float* p) { return _mm512_set1_ps(*p); }
  static ST_INLINE Vec take(Vec& v) {
    const Vec first = _mm512_broadcastss_ps(_mm512_castps512_ps128(v));
    const __m512i lanes = _mm512_castps_si512(v);
    v = _mm512_castsi512_ps(_mm512_alignr_epi32(lanes, lanes, 1));
    return first;
  }
  static ST_INLINE Vec load_shared(const float* p) {
    Vec v = load(p);
    asm("" : "+v"(v));
    return v;
  }
  static ST_INLINE Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
  static ST_INLINE Vec fma(Vec a, Vec b, Vec c) {
#ifdef SPARSETRAIN_SINGLE_FMA
    asm volatile("kunpckbw %%k0, %%k0, %%k7" : : : "k7");  // keeps the unit of the second multiply-add busy for a cycle
#endif
    return _mm512_fmadd_ps(a, b, c);
  }
  static ST_INLINE void fma_shared(Vec a, Vec b, Vec& sum) { sum = fma(a, b, sum); }
  static ST_INLINE float sum(Vec v) { return _mm512_reduce_add_ps(v); }
  static ST_INLINE void add_sums(float* p, bool first, Vec a, Vec b, Vec c, Vec d) {
    const __m512 ab = _mm512_add_ps(_mm512_mask_blend_ps(0xcccc, a, b), _mm512_shuffle_ps(a, b, 0x4e));
    const __m512 cd = _mm512_add_ps(_mm512_mask_blend_ps(0xcccc, c, d), _mm512_shuffle_ps(c, d, 0x4e));
    const __m512 x = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x88), _mm512_shuffle_ps(ab, cd, 0xdd));
    const __m256 y = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
    const __m128 z = _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
    _mm_storeu_ps(p, first ? z : _mm_add_ps(z, _mm_loadu_ps(p)));
  }
  static ST_INLINE uint32_t nonzero(Vec v) {
    uint32_t mask = _cvtmask16_u32(_mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_NEQ_UQ));
    asm("" : "+r"(mask));  // gcc 12 would spill a mask's 16 bits, and read back 32
    return mask;
  }
  static ST_INLINE Vec keep(uint32_t mask, Vec v) { return _mm512_maskz_mov_ps(static_cast<__mmask16>(mask), v); }
  static ST_INLINE void compress(float* p, uint32_t mask, Vec v) {
    _mm512_storeu_ps(p, _mm512_maskz_compress_ps(static_cast<__mmask16>(mask), v));
  }
  using U16 = __m512i;
  static ST_INLINE U16 load_u16(const uint16_t* p) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static ST_INLINE void compress_u16(uint16_t* p, uint32_t mask, U16 src) {
    const __m512i packed = _mm512_maskz_compress_epi32(static_cast<__mmask16>(mask), src);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(packed));
  }
  static constexpr int kListLanes = kLanes;
  static ST_INLINE void transpose_bits(const uint16_t* masks, uint64_t* words) {
    const __m512i a = _mm512_loadu_si512(masks), b = _mm512_loadu_si512(masks + 32);
    const auto join = [](__m256i lo, __m256i hi)
                          ST_LAMBDA { return _mm512_inserti64x4(_mm512_castsi256_si512(lo), hi, 1); };
    const __m512i low = join(_mm512_cvtepi16_epi8(a), _mm512_cvtepi16_epi8(b));
    const __m512i high =
        join(_mm512_cvtepi16_epi8(_mm512_srli_epi16(a, 8)), _mm512_cvtepi16_epi8(_mm512_srli_epi16(b, 8)));
    unroll<8>([&](auto i) ST_LAMBDA {
      const __m512i bit = _mm512_set1_epi8(static_cast<char>(1 << i));
      words[i] = _cvtmask64_u64(_mm512_test_epi8_mask(low, bit));
      words[8 + i] = _cvtmask64_u64(_mm512_test_epi8_mask(high, bit));
    });
  }
  static ST_INLINE Vec expand(uint32_t mask, const float* p) {
    Vec v = load(p);
    asm("" : "+v"(v));  // from memory it takes five cycles where two do (Zen 4)
    return _mm512_maskz_expand_ps(static_cast<__mmask16>(mask), v);
  }
  // Quarters of four rows are put together as they are loaded.
  static ST_INLINE void load_columns(const void* const* rows, size_t first, Vec (&r)[kLanes]) {
    unroll<4>([&](auto quarter) ST_LAMBDA {
      constexpr int j = 4 * quarter;
      const auto part = [&](int row)
                            ST_LAMBDA { return _mm_loadu_ps(static_cast<const float*>(rows[row]) + first + j); };
      __m512 t[4];
      unroll<4>([&](auto i) ST_LAMBDA {
        const __m512 two = _mm512_insertf32x4(_mm512_castps128_ps512(part(i)), part(i + 4), 1);
        t[i] = _mm512_insertf32x4(_mm512_insertf32x4(two, part(i + 8), 2), part(i + 12), 3);
      });
      const __m512 a = _mm512_unpacklo_ps(t[0], t[1]), b = _mm512_unpackhi_ps(t[0], t[1]);
      const __m512 c = _mm512_unpacklo_ps(t[2], t[3]), d = _mm512_unpackhi_ps(t[2], t[3]);
      r[j] = pairs_lo(a, c);
      r[j + 1] = pairs_hi(a, c);
      r[j + 2] = pairs_lo(b, d);
      r[j + 3] = pairs_hi(b, d);
    });
  }
  static ST_INLINE void transpose(Vec (&r)[kLanes]) {
    __m512 t[16];
    unroll<8>([&](auto step) ST_LAMBDA {
      constexpr int i = 2 * step;
      t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
      t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    });
    unroll<4>([&](auto step) ST_LAMBDA {
      constexpr int i = 4 * step;
      r[i] = pairs_lo(t[i], t[i + 2]);
      r[i + 1] = pairs_hi(t[i], t[i + 2]);
      r[i + 2] = pairs_lo(t[i + 1], t[i + 3]);
      r[i + 3] = pairs_hi(t[i + 1], t[i + 3]);
    });
    unroll<4>([&](auto j) ST_LAMBDA {
      const __m512 a = _mm512_shuffle_f32x4(r[j], r[j + 4], 0x88), b = _mm512_shuffle_f32x4(r[j], r[j + 4], 0xdd);
      const __m512 c = _mm512_shuffle_f32x4(r[j + 8], r[j + 12], 0x88);
      const __m512 d = _mm512_shuffle_f32x4(r[j + 8], r[j + 12], 0xdd);
      t[j] = _mm512_shuffle_f32x4(a, c, 0x88);
      t[j + 8] = _mm512_shuffle_f32x4(a, c, 0xdd);
      t[j + 4] = _mm512_shuffle_f32x4(b, d, 0x88);
      t[j + 12] = _mm512_shuffle_f32x4(b, d, 0xdd);
    });
    unroll<16>([&](auto i) ST_LAMBDA { r[i] = t[i]; });
  }

 private:
  static ST_INLINE __m256i load_16(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static ST_INLINE __m256i load_16_n(const void* p, int n) { return _mm256_maskz_loadu_epi16(first(n), p); }
  static ST_INLINE void store_16(void* p, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
  static ST_INLINE void store_16_n(void* p, __m256i v, int n) { _mm256_mask_storeu_epi16(p, first(n), v); }
  static ST_INLINE Vec widen_bf16(__m256i v) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
  }
  // The high halves are the result, unless it is NaN.
  static ST_INLINE __m512i round_bf16(Vec v) {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  }
  static ST_INLINE __m256i narrow_bf16(Vec v) {
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i quiet = _mm512_or_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(round_bf16(v), nan, quiet), 16));
  }
  static ST_INLINE __m256i narrow_f16(Vec v) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }
  static ST_INLINE __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1); }
  static ST_INLINE __m512 pairs_lo(__m512 a, __m512 b) {
    return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
  }
  static ST_INLINE __m512 pairs_hi(__m512 a, __m512 b) {
    return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
  }
};

}  // namespace
}  // namespace sparsetrain
