// A vector of floats, and one of 32-bit words, of the instruction set that the including file is compiled for.
//
// Arithmetic is the compiler's own on vector types (GCC and Clang); here is what it has no operator for. Everything
// lies in a namespace of the instruction set's name: the same functions compiled twice must not meet in the linker.
#pragma once

#include <cstdint>
#include <cstring>

#include "storage.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

// For what is called for every few vectors: a call would send them through memory.
#define SODA_INLINE [[gnu::always_inline]] inline

namespace soda::SODA_ISA {

#if defined(__AVX512F__)
constexpr int lanes = 16;
using Floats = __m512;
#elif defined(__AVX2__)
constexpr int lanes = 8;
using Floats = __m256;
#else
constexpr int lanes = 4;
typedef float Floats __attribute__((vector_size(16)));
#endif
typedef uint32_t Words __attribute__((vector_size(4 * lanes)));
typedef uint64_t Wide __attribute__((vector_size(4 * lanes)));
typedef double Doubles __attribute__((vector_size(4 * lanes)));

SODA_INLINE Floats broadcast(float value) {
#if defined(__AVX512F__)
  return _mm512_set1_ps(value);
#elif defined(__AVX2__)
  return _mm256_set1_ps(value);
#else
  return Floats{value, value, value, value};
#endif
}
inline Words as_words(Floats value) { return reinterpret_cast<Words>(value); }
inline Floats as_floats(Words bits) { return reinterpret_cast<Floats>(bits); }

// The lower and the upper half of a vector.
SODA_INLINE void widen_halves(Floats x, Doubles* low, Doubles* high) {
#if defined(__AVX512F__)
  *low = _mm512_cvtps_pd(_mm512_castps512_ps256(x)), *high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1));
#elif defined(__AVX2__)
  *low = _mm256_cvtps_pd(_mm256_castps256_ps128(x)), *high = _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1));
#else
  for (int i = 0; i < lanes / 2; ++i) (*low)[i] = x[i], (*high)[i] = x[lanes / 2 + i];
#endif
}

// The value of a product as it is rounded: the compiler may not make it part of a fused operation.
SODA_INLINE Floats rounded(Floats x) {
#if defined(__AVX512F__)
  asm("" : "+v"(x));
#elif defined(__SSE2__)
  asm("" : "+x"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#else
  asm("" : "+m"(x));
#endif
  return x;
}

// The greater, and the smaller, of x and a bound; a NaN stays one.
SODA_INLINE Floats at_least(float bound, Floats x) {
#if defined(__AVX512F__)
  return _mm512_max_ps(broadcast(bound), x);
#elif defined(__AVX2__)
  return _mm256_max_ps(broadcast(bound), x);
#else
  const Words below = reinterpret_cast<Words>(x < broadcast(bound));
  return as_floats((as_words(x) & ~below) | (as_words(broadcast(bound)) & below));
#endif
}

SODA_INLINE Floats at_most(float bound, Floats x) {
#if defined(__AVX512F__)
  return _mm512_min_ps(broadcast(bound), x);
#elif defined(__AVX2__)
  return _mm256_min_ps(broadcast(bound), x);
#else
  const Words above = reinterpret_cast<Words>(x > broadcast(bound));
  return as_floats((as_words(x) & ~above) | (as_words(broadcast(bound)) & above));
#endif
}

// Whether images of a dtype are so coarse that a relative error of 2^-13 before rounding cannot be seen after it.
template <class T>
constexpr bool is_coarse = false;
template <>
constexpr bool is_coarse<BFloat16> = true;

// Replace a by a / b to about an ulp, or if coarse to 2^-14, for b whose reciprocal is a normal number.
template <bool coarse, int count>
SODA_INLINE void divide(Floats (&a)[count], const Floats (&b)[count]) {
#if defined(__AVX512F__)
  // A division takes 10 cycles; the estimate has 14 bits, and one of Newton's steps doubles them.
  Floats estimate[count], error[count];
  for (int i = 0; i < count; ++i) estimate[i] = _mm512_rcp14_ps(b[i]);
  if constexpr (!coarse) {
    for (int i = 0; i < count; ++i) error[i] = 1.0f - b[i] * estimate[i];
    for (int i = 0; i < count; ++i) estimate[i] = estimate[i] * error[i] + estimate[i];
  }
  for (int i = 0; i < count; ++i) a[i] = a[i] * estimate[i];
#else
  for (int i = 0; i < count; ++i) a[i] = a[i] / b[i];
#endif
}

// The order of additions is the vector's own: a sum differs between instruction sets.
SODA_INLINE float sum_of_lanes(Floats value) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(value);
#else
  float lane[lanes];
  std::memcpy(lane, &value, sizeof lane);
  for (int width = lanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  }
  return lane[0];
#endif
}

// To nearest, ties to even; in the upper half of each word, the lower one being of no meaning.
SODA_INLINE Words rounded_to_bfloat16(Floats value) {
#if defined(__AVX512F__)
  // Any NaN becomes the one that rounding leaves a NaN; everything else stays. In one operation, not two.
  const Words bits = as_words(_mm512_fixupimm_ps(value, value, _mm512_set1_epi32(0x33), 0));
  return bits + 0x7fffu + (bits >> 16 & 1u);
#else
  const Words bits = as_words(value), sum = bits + 0x7fffu + (bits >> 16 & 1u);
  const Words is_nan = reinterpret_cast<Words>(value != value);
  return (sum & ~is_nan) | (is_nan & 0x7fc00000u);
#endif
}

// Loads and stores: whole vectors, and the first `count` lanes of one, the others being zero (of pixels -1) and
// untouched in memory.

SODA_INLINE Floats load(const float* from) {
  Floats value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

SODA_INLINE void store(float* to, Floats value) { std::memcpy(to, &value, sizeof value); }

#if defined(__AVX512F__)

SODA_INLINE Floats load(const BFloat16* from) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

SODA_INLINE Floats load(const Half* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}

SODA_INLINE __m256i to_bfloat16(Floats value) {
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(reinterpret_cast<__m512i>(rounded_to_bfloat16(value)), 16));
}

SODA_INLINE __m256i to_half(Floats value) { return _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT); }

SODA_INLINE void store(BFloat16* to, Floats value) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), to_bfloat16(value)); }
SODA_INLINE void store(Half* to, Floats value) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), to_half(value)); }

SODA_INLINE Floats load(const Pixel* from) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes)) / 127.5f - 1.0f;
}

inline __mmask16 first(int count) { return static_cast<__mmask16>((1u << count) - 1u); }

SODA_INLINE Floats load(const float* from, int count) { return _mm512_maskz_loadu_ps(first(count), from); }

SODA_INLINE Floats load(const BFloat16* from, int count) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(count), from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

SODA_INLINE Floats load(const Half* from, int count) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(count), from)); }

SODA_INLINE Floats load(const Pixel* from, int count) {
  const __m512i wide = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(first(count), from));
  return _mm512_cvtepi32_ps(wide) / 127.5f - 1.0f;
}

SODA_INLINE void store(float* to, Floats value, int count) { _mm512_mask_storeu_ps(to, first(count), value); }
SODA_INLINE void store(BFloat16* to, Floats value, int count) {
  _mm256_mask_storeu_epi16(to, first(count), to_bfloat16(value));
}
SODA_INLINE void store(Half* to, Floats value, int count) { _mm256_mask_storeu_epi16(to, first(count), to_half(value)); }

#else

#if defined(__AVX2__)

SODA_INLINE Floats load(const BFloat16* from) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}

SODA_INLINE Floats load(const Half* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}

SODA_INLINE Floats load(const Pixel* from) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes)) / 127.5f - 1.0f;
}

SODA_INLINE void store(BFloat16* to, Floats value) {
  const __m256i high = _mm256_srli_epi32(reinterpret_cast<__m256i>(rounded_to_bfloat16(value)), 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(packed));
}

SODA_INLINE void store(Half* to, Floats value) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
}

#else

template <class T>
SODA_INLINE Floats load(const T* from) {
  Floats value;
  for (int i = 0; i < lanes; ++i) value[i] = widen(from[i]);
  return value;
}

template <class T>
SODA_INLINE void store(T* to, Floats value) {
  for (int i = 0; i < lanes; ++i) narrow(value[i], to + i);
}

#endif

template <class T>
SODA_INLINE Floats load(const T* from, int count) {
  T padded[lanes] = {};
  for (int i = 0; i < count; ++i) padded[i] = from[i];
  return load(padded);
}

template <class T>
SODA_INLINE void store(T* to, Floats value, int count) {
  T padded[lanes];
  store(padded, value);
  for (int i = 0; i < count; ++i) to[i] = padded[i];
}

#endif

// Four vectors of one run of memory, for sums and for steps that treat all lanes alike: in which lane a number lies is
// the dtype's choice, the same in both. Of bf16, even and odd numbers go to vectors of their own, which takes no shuffles.
template <class T>
SODA_INLINE void load_run(const T* from, Floats (&x)[4]) {
  for (int k = 0; k < 4; ++k) x[k] = load(from + k * lanes);
}

template <class T>
SODA_INLINE void store_run(T* to, const Floats (&x)[4]) {
  for (int k = 0; k < 4; ++k) store(to + k * lanes, x[k]);
}

SODA_INLINE void load_run(const BFloat16* from, Floats (&x)[4]) {
  for (int k = 0; k < 2; ++k) {
    Words pairs;  // one vector at a time: two at once GCC moves through the stack
    std::memcpy(&pairs, from + 2 * k * lanes, sizeof pairs);
    x[2 * k] = as_floats(pairs << 16);
    x[2 * k + 1] = as_floats(pairs & 0xffff0000u);
  }
}

SODA_INLINE Words bfloat16_pairs(Floats even, Floats odd) {
  return (rounded_to_bfloat16(even) >> 16) | (rounded_to_bfloat16(odd) & 0xffff0000u);
}

SODA_INLINE void store_run(BFloat16* to, const Floats (&x)[4]) {
  for (int k = 0; k < 2; ++k) {
    const Words pairs = bfloat16_pairs(x[2 * k], x[2 * k + 1]);
    std::memcpy(to + 2 * k * lanes, &pairs, sizeof pairs);
  }
}

// Stores past the caches where the instruction set has them, to addresses on a whole line (of 16-bit numbers, in runs of
// four vectors); `end_stream` comes before another thread may look.
SODA_INLINE void stream(float* to, Floats value) {
#if defined(__AVX512F__)
  _mm512_stream_ps(to, value);
#elif defined(__AVX2__)
  _mm256_stream_ps(to, value);
#else
  store(to, value);
#endif
}

template <class T>
SODA_INLINE void stream_run(T* to, const Floats (&x)[4]) {
  store_run(to, x);
}

SODA_INLINE void stream_run(float* to, const Floats (&x)[4]) {
  for (int k = 0; k < 4; ++k) stream(to + k * lanes, x[k]);
}

SODA_INLINE void stream_run(BFloat16* to, const Floats (&x)[4]) {
  float* const pairs = reinterpret_cast<float*>(to);  // an address, for the store alone
  for (int k = 0; k < 2; ++k) stream(pairs + k * lanes, as_floats(bfloat16_pairs(x[2 * k], x[2 * k + 1])));
}

inline void end_stream() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// Zeros in all but the first `count` lanes.
inline Floats first_lanes(Floats value, int64_t count) {
  float lane[lanes];
  std::memcpy(lane, &value, sizeof lane);
  return load(lane, static_cast<int>(count));
}

// The 64-bit products of a factor with the lower halves of 64-bit words.
SODA_INLINE Wide multiply(Wide a, uint32_t b) {
#if defined(__AVX512F__)
  return reinterpret_cast<Wide>(_mm512_mul_epu32(reinterpret_cast<__m512i>(a), _mm512_set1_epi64(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<Wide>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a), _mm256_set1_epi64x(b)));
#elif defined(__SSE2__)
  return reinterpret_cast<Wide>(_mm_mul_epu32(reinterpret_cast<__m128i>(a), _mm_set1_epi64x(b)));
#else
  return (a & 0xffffffffu) * b;
#endif
}

// The lower halves of 64-bit words, side by side: lane 2 i is from even[i], lane 2 i + 1 from odd[i].
SODA_INLINE Words join(Wide even, Wide odd) {
  const Words high = reinterpret_cast<Words>(odd << 32);
#if defined(__AVX512F__)
  return reinterpret_cast<Words>(
      _mm512_mask_mov_epi32(reinterpret_cast<__m512i>(even), 0xaaaa, reinterpret_cast<__m512i>(high)));
#elif defined(__AVX2__)
  return reinterpret_cast<Words>(_mm256_blend_epi32(reinterpret_cast<__m256i>(even), reinterpret_cast<__m256i>(high), 0xaa));
#else
  return reinterpret_cast<Words>(even & 0xffffffffu) | high;
#endif
}

// Lane i of the result is lane from[i] of x.
SODA_INLINE Floats permuted(Floats x, Words from) {
#if defined(__AVX512F__)
  return _mm512_permutexvar_ps(reinterpret_cast<__m512i>(from), x);
#elif defined(__AVX2__)
  return _mm256_permutevar8x32_ps(x, reinterpret_cast<__m256i>(from));
#else
  Floats result;
  for (int i = 0; i < lanes; ++i) result[i] = x[from[i]];
  return result;
#endif
}

// Transpose the fours of lanes: in four lanes of 128 bits, number j of x[i] becomes number i of x[j].
SODA_INLINE void transpose_fours(Floats (&x)[4]) {
#if defined(__AVX512F__)
  const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(x[0], x[1])), b = _mm512_castps_pd(_mm512_unpackhi_ps(x[0], x[1]));
  const __m512d c = _mm512_castps_pd(_mm512_unpacklo_ps(x[2], x[3])), d = _mm512_castps_pd(_mm512_unpackhi_ps(x[2], x[3]));
  x[0] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c)), x[1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
  x[2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d)), x[3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
#elif defined(__AVX2__)
  const __m256d a = _mm256_castps_pd(_mm256_unpacklo_ps(x[0], x[1])), b = _mm256_castps_pd(_mm256_unpackhi_ps(x[0], x[1]));
  const __m256d c = _mm256_castps_pd(_mm256_unpacklo_ps(x[2], x[3])), d = _mm256_castps_pd(_mm256_unpackhi_ps(x[2], x[3]));
  x[0] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, c)), x[1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, c));
  x[2] = _mm256_castpd_ps(_mm256_unpacklo_pd(b, d)), x[3] = _mm256_castpd_ps(_mm256_unpackhi_pd(b, d));
#else
  const Floats rows[4] = {x[0], x[1], x[2], x[3]};
  for (int i = 0; i < 4; ++i) x[i] = Floats{rows[0][i], rows[1][i], rows[2][i], rows[3][i]};
#endif
}

}  // namespace soda::SODA_ISA
