// Isa for AVX-512 with VBMI2, which compresses 16-bit integers.
#pragma once

#include "simd_avx512.h"

namespace sparsetrain {
namespace {

struct Avx512Vbmi2 : Avx512 {
  using U16 = __m256i;
  static ST_INLINE U16 load_u16(const uint16_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static ST_INLINE void compress_u16(uint16_t* p, uint32_t mask, U16 src) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_maskz_compress_epi16(static_cast<__mmask16>(mask), src));
  }
  static constexpr int kListLanes = 32;
  static ST_INLINE void compress_list(uint16_t* p, uint64_t mask, const uint16_t* from) {
    _mm512_storeu_si512(p, _mm512_maskz_compress_epi16(static_cast<__mmask32>(mask), _mm512_loadu_si512(from)));
  }
};

}  // namespace
}  // namespace sparsetrain
