// One set of vector operations for every instruction set; all else is written with these, once.
//
// vint: LANES 32-bit integers. vreal: LANES doubles. Bytes are always unsigned here: stored codes plus 128.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define FQ_AVX512 1
#include <immintrin.h>
#elif defined(__AVX2__) && defined(__FMA__)
#define FQ_AVX2 1
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

#define FQ_ALWAYS __attribute__((always_inline))
#define FQ_INLINE static inline FQ_ALWAYS

namespace fq {

#if FQ_AVX512

constexpr int LANES = 16;
constexpr int MAX_VECTORS = 4;  // of columns in a tile of a product
using vint = __m512i;
struct vreal {
  __m512d low, high;
};

FQ_INLINE vint load(const int32_t* p) { return _mm512_loadu_si512(p); }
FQ_INLINE void store(int32_t* p, vint x) { _mm512_storeu_si512(p, x); }
FQ_INLINE vint spread(int32_t x) { return _mm512_set1_epi32(x); }
FQ_INLINE vint add(vint a, vint b) { return _mm512_add_epi32(a, b); }
FQ_INLINE vint sub(vint a, vint b) { return _mm512_sub_epi32(a, b); }
FQ_INLINE vint multiply(vint a, vint b) { return _mm512_mullo_epi32(a, b); }
FQ_INLINE vint clamp(vint x, vint low, vint high) { return _mm512_min_epi32(_mm512_max_epi32(x, low), high); }
FQ_INLINE __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1); }
FQ_INLINE vint load_bytes(const uint8_t* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)); }
FQ_INLINE vint load_bytes(const uint8_t* p, int n) { return _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(first(n), p)); }
FQ_INLINE void store_bytes(uint8_t* p, vint x) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(x)); }
FQ_INLINE void store_bytes(uint8_t* p, vint x, int n) { _mm512_mask_cvtepi32_storeu_epi8(p, first(n), x); }
// table[x], which is followed by three bytes that may be read
FQ_INLINE vint look_up(vint x, const uint8_t* table) { return _mm512_i32gather_epi32(x, table, 1); }
FQ_INLINE int64_t sum(vint x) {
  __m512i pairs = _mm512_add_epi64(_mm512_cvtepi32_epi64(_mm512_castsi512_si256(x)),
                                   _mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64(x, 1)));
  return _mm512_reduce_add_epi64(pairs);
}

FQ_INLINE vreal load(const double* p) { return {_mm512_loadu_pd(p), _mm512_loadu_pd(p + 8)}; }
FQ_INLINE double sum(vreal x) { return _mm512_reduce_add_pd(_mm512_add_pd(x.low, x.high)); }
FQ_INLINE vreal spread(double x) { return {_mm512_set1_pd(x), _mm512_set1_pd(x)}; }
FQ_INLINE vreal to_real(vint x) {
  return {_mm512_cvtepi32_pd(_mm512_castsi512_si256(x)), _mm512_cvtepi32_pd(_mm512_extracti64x4_epi64(x, 1))};
}
FQ_INLINE vreal multiply_add(vreal a, vreal b, vreal c) {
  return {_mm512_fmadd_pd(a.low, b.low, c.low), _mm512_fmadd_pd(a.high, b.high, c.high)};
}
FQ_INLINE vreal clamp(vreal x, double low, double high) {
  __m512d l = _mm512_set1_pd(low), h = _mm512_set1_pd(high);
  return {_mm512_min_pd(_mm512_max_pd(x.low, l), h), _mm512_min_pd(_mm512_max_pd(x.high, l), h)};
}
FQ_INLINE vreal floor(vreal x) {
  constexpr int down = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
  return {_mm512_roundscale_pd(x.low, down), _mm512_roundscale_pd(x.high, down)};
}
// of numbers that fit 32 bits
FQ_INLINE vint floor_to_int(vreal x) {
  constexpr int down = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
  __m256i low = _mm512_cvt_roundpd_epi32(x.low, down), high = _mm512_cvt_roundpd_epi32(x.high, down);
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

// Four products of bytes for each lane, added to it exactly: 32-bit sums, no saturation.
#if defined(__AVX512VNNI__)
#define FQ_ISA "avx512-vnni"
using vbytes = __m512i;
using vweights = __m512i;
FQ_INLINE vbytes spread_bytes(const uint8_t* p) {
  int32_t four;
  std::memcpy(&four, p, 4);
  return _mm512_set1_epi32(four);
}
FQ_INLINE vweights load_weights(const int8_t* p) { return _mm512_loadu_si512(p); }
FQ_INLINE vint dot(vint sums, const vbytes& a, const vweights& w) { return _mm512_dpbusd_epi32(sums, a, w); }
#else
#define FQ_ISA "avx512"
struct vbytes {
  __m512i even, odd;  // as 16 bits: products of two bytes added in 16 bits would saturate
};
using vweights = vbytes;
FQ_INLINE vbytes spread_bytes(const uint8_t* p) {
  int32_t four;
  std::memcpy(&four, p, 4);
  __m512i bytes = _mm512_set1_epi32(four);  // from memory: two vector operations are cheaper than another move
  return {_mm512_and_si512(bytes, _mm512_set1_epi16(255)), _mm512_srli_epi16(bytes, 8)};
}
FQ_INLINE vweights load_weights(const int8_t* p) {
  __m512i w = _mm512_loadu_si512(p);
  return {_mm512_srai_epi16(_mm512_slli_epi16(w, 8), 8), _mm512_srai_epi16(w, 8)};
}
FQ_INLINE vint dot(vint sums, const vbytes& a, const vweights& w) {
  return _mm512_add_epi32(_mm512_add_epi32(sums, _mm512_madd_epi16(a.even, w.even)), _mm512_madd_epi16(a.odd, w.odd));
}
#endif

#elif FQ_AVX2

constexpr int LANES = 8;
constexpr int MAX_VECTORS = 2;
using vint = __m256i;
struct vreal {
  __m256d low, high;
};

FQ_INLINE vint load(const int32_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
FQ_INLINE void store(int32_t* p, vint x) { _mm256_storeu_si256((__m256i*)p, x); }
FQ_INLINE vint spread(int32_t x) { return _mm256_set1_epi32(x); }
FQ_INLINE vint add(vint a, vint b) { return _mm256_add_epi32(a, b); }
FQ_INLINE vint sub(vint a, vint b) { return _mm256_sub_epi32(a, b); }
FQ_INLINE vint multiply(vint a, vint b) { return _mm256_mullo_epi32(a, b); }
FQ_INLINE vint clamp(vint x, vint low, vint high) { return _mm256_min_epi32(_mm256_max_epi32(x, low), high); }
FQ_INLINE vint load_bytes(const uint8_t* p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
FQ_INLINE vint load_bytes(const uint8_t* p, int n) {
  uint8_t eight[8] = {0};
  std::memcpy(eight, p, n);
  return load_bytes(eight);
}
FQ_INLINE void store_bytes(uint8_t* p, vint x) {
  const __m256i pick = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,  //
                                        0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
  x = _mm256_shuffle_epi8(x, pick);
  _mm_storel_epi64((__m128i*)p, _mm_unpacklo_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1)));
}
FQ_INLINE void store_bytes(uint8_t* p, vint x, int n) {
  uint8_t eight[8];
  store_bytes(eight, x);
  std::memcpy(p, eight, n);
}
FQ_INLINE vint look_up(vint x, const uint8_t* table) { return _mm256_i32gather_epi32((const int*)table, x, 1); }
FQ_INLINE int64_t sum(vint x) {
  int32_t lanes[8];
  store(lanes, x);
  int64_t total = 0;
  for (int32_t lane : lanes) total += lane;
  return total;
}

FQ_INLINE vreal load(const double* p) { return {_mm256_loadu_pd(p), _mm256_loadu_pd(p + 4)}; }
FQ_INLINE double sum(vreal x) {
  double lanes[4];
  _mm256_storeu_pd(lanes, _mm256_add_pd(x.low, x.high));
  return lanes[0] + lanes[1] + lanes[2] + lanes[3];
}
FQ_INLINE vreal spread(double x) { return {_mm256_set1_pd(x), _mm256_set1_pd(x)}; }
FQ_INLINE vreal to_real(vint x) {
  return {_mm256_cvtepi32_pd(_mm256_castsi256_si128(x)), _mm256_cvtepi32_pd(_mm256_extracti128_si256(x, 1))};
}
FQ_INLINE vreal multiply_add(vreal a, vreal b, vreal c) {
  return {_mm256_fmadd_pd(a.low, b.low, c.low), _mm256_fmadd_pd(a.high, b.high, c.high)};
}
FQ_INLINE vreal clamp(vreal x, double low, double high) {
  __m256d l = _mm256_set1_pd(low), h = _mm256_set1_pd(high);
  return {_mm256_min_pd(_mm256_max_pd(x.low, l), h), _mm256_min_pd(_mm256_max_pd(x.high, l), h)};
}
FQ_INLINE vreal floor(vreal x) { return {_mm256_floor_pd(x.low), _mm256_floor_pd(x.high)}; }
FQ_INLINE vint floor_to_int(vreal x) {
  __m128i low = _mm256_cvttpd_epi32(_mm256_floor_pd(x.low)), high = _mm256_cvttpd_epi32(_mm256_floor_pd(x.high));
  return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
}

#if defined(__AVXVNNI__)
#define FQ_ISA "avx-vnni"
using vbytes = __m256i;
using vweights = __m256i;
FQ_INLINE vbytes spread_bytes(const uint8_t* p) {
  int32_t four;
  std::memcpy(&four, p, 4);
  return _mm256_set1_epi32(four);
}
FQ_INLINE vweights load_weights(const int8_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
FQ_INLINE vint dot(vint sums, const vbytes& a, const vweights& w) { return _mm256_dpbusd_avx_epi32(sums, a, w); }
#else
#define FQ_ISA "avx2"
struct vbytes {
  __m256i even, odd;
};
using vweights = vbytes;
FQ_INLINE vbytes spread_bytes(const uint8_t* p) {
  int32_t four;
  std::memcpy(&four, p, 4);
  __m256i bytes = _mm256_set1_epi32(four);  // from memory: two vector operations are cheaper than another move
  return {_mm256_and_si256(bytes, _mm256_set1_epi16(255)), _mm256_srli_epi16(bytes, 8)};
}
FQ_INLINE vweights load_weights(const int8_t* p) {
  __m256i w = _mm256_loadu_si256((const __m256i*)p);
  return {_mm256_srai_epi16(_mm256_slli_epi16(w, 8), 8), _mm256_srai_epi16(w, 8)};
}
FQ_INLINE vint dot(vint sums, const vbytes& a, const vweights& w) {
  return _mm256_add_epi32(_mm256_add_epi32(sums, _mm256_madd_epi16(a.even, w.even)), _mm256_madd_epi16(a.odd, w.odd));
}
#endif

#endif

}  // namespace fq

#if !FQ_AVX512 && !FQ_AVX2
#include "scalar.h"
#endif
