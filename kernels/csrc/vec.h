// A vector of floats, and one of 32-bit words, of the instruction set that the including file is compiled for.
//
// Arithmetic is the compiler's own on vector types (GCC and Clang); here is what it has no operator for. Everything
// lies in a namespace of the instruction set's name: the same functions compiled twice must not meet in the linker.
#pragma once

#include <cstdint>
#include <cstring>

#include "storage.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

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

inline Floats broadcast(float value) { return Floats{} + value; }
inline Words as_words(Floats value) { return reinterpret_cast<Words>(value); }
inline Floats as_floats(Words bits) { return reinterpret_cast<Floats>(bits); }

// Both return the second argument where either is a NaN, so that a NaN given second propagates.
#if defined(__AVX512F__)
inline Floats minimum(Floats a, Floats b) { return _mm512_min_ps(a, b); }
inline Floats maximum(Floats a, Floats b) { return _mm512_max_ps(a, b); }
#elif defined(__AVX2__)
inline Floats minimum(Floats a, Floats b) { return _mm256_min_ps(a, b); }
inline Floats maximum(Floats a, Floats b) { return _mm256_max_ps(a, b); }
#else
inline Floats minimum(Floats a, Floats b) { return as_floats((as_words(a) & (a < b)) | (as_words(b) & ~(a < b))); }
inline Floats maximum(Floats a, Floats b) { return as_floats((as_words(a) & (a > b)) | (as_words(b) & ~(a > b))); }
#endif

// 1 / a to about an ulp, for normal numbers whose reciprocal is one.
inline Floats reciprocal(Floats a) {
#if defined(__AVX512F__)
  // A division takes 16 cycles; this estimate has 14 bits, and Newton's step doubles them.
  const Floats estimate = _mm512_rcp14_ps(a);
  return estimate + estimate * (1.0f - a * estimate);
#else
  return 1.0f / a;
#endif
}

// The same order of additions whatever the vector's width holds no promise: a sum differs between instruction sets.
inline float sum_of_lanes(Floats value) {
  float lane[lanes];
  std::memcpy(lane, &value, sizeof lane);
  for (int width = lanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  }
  return lane[0];
}

// Loads and stores: whole vectors, and the first `count` lanes of one, the others being zero and untouched in memory.

inline Floats load(const float* from) {
  Floats value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

inline void store(float* to, Floats value) { std::memcpy(to, &value, sizeof value); }

#if defined(__AVX512F__)

inline Floats load(const BFloat16* from) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

inline Floats load(const Half* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}

inline __m256i to_bfloat16(Floats value) {
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd), 16);
  const __mmask16 is_nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, is_nan, _mm512_set1_epi32(0x7fc0)));
}

inline __m256i to_half(Floats value) { return _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT); }

inline void store(BFloat16* to, Floats value) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), to_bfloat16(value)); }
inline void store(Half* to, Floats value) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), to_half(value)); }

inline __mmask16 first(int count) { return static_cast<__mmask16>((1u << count) - 1u); }

inline Floats load(const float* from, int count) { return _mm512_maskz_loadu_ps(first(count), from); }

inline Floats load(const BFloat16* from, int count) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(count), from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

inline Floats load(const Half* from, int count) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(count), from)); }

inline void store(float* to, Floats value, int count) { _mm512_mask_storeu_ps(to, first(count), value); }
inline void store(BFloat16* to, Floats value, int count) {
  _mm256_mask_storeu_epi16(to, first(count), to_bfloat16(value));
}
inline void store(Half* to, Floats value, int count) { _mm256_mask_storeu_epi16(to, first(count), to_half(value)); }

#else

#if defined(__AVX2__)

inline Floats load(const BFloat16* from) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}

inline Floats load(const Half* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}

inline void store(BFloat16* to, Floats value) {
  const __m256i bits = _mm256_castps_si256(value);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
  const __m256i rounded = _mm256_blendv_epi8(_mm256_srli_epi32(sum, 16), _mm256_set1_epi32(0x7fc0), is_nan);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(packed));
}

inline void store(Half* to, Floats value) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
}

#else

template <class T>
inline Floats load(const T* from) {
  Floats value;
  for (int i = 0; i < lanes; ++i) value[i] = widen(from[i]);
  return value;
}

template <class T>
inline void store(T* to, Floats value) {
  for (int i = 0; i < lanes; ++i) narrow(value[i], to + i);
}

#endif

template <class T>
inline Floats load(const T* from, int count) {
  T padded[lanes] = {};
  for (int i = 0; i < count; ++i) padded[i] = from[i];
  return load(padded);
}

template <class T>
inline void store(T* to, Floats value, int count) {
  T padded[lanes];
  store(padded, value);
  for (int i = 0; i < count; ++i) to[i] = padded[i];
}

#endif

// Both halves of the 64-bit products of 32-bit words.
inline void multiply(Words a, uint32_t b, Words* high, Words* low) {
#if defined(__AVX512F__)
  const __m512i factor = _mm512_set1_epi32(static_cast<int>(b)), words = reinterpret_cast<__m512i>(a);
  const __m512i even = _mm512_mul_epu32(words, factor), odd = _mm512_mul_epu32(_mm512_srli_epi64(words, 32), factor);
  *high = reinterpret_cast<Words>(_mm512_mask_mov_epi32(_mm512_srli_epi64(even, 32), 0xaaaa, odd));
  *low = reinterpret_cast<Words>(_mm512_mask_mov_epi32(even, 0xaaaa, _mm512_slli_epi64(odd, 32)));
#elif defined(__AVX2__)
  const __m256i factor = _mm256_set1_epi32(static_cast<int>(b)), words = reinterpret_cast<__m256i>(a);
  const __m256i even = _mm256_mul_epu32(words, factor), odd = _mm256_mul_epu32(_mm256_srli_epi64(words, 32), factor);
  *high = reinterpret_cast<Words>(_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa));
  *low = reinterpret_cast<Words>(_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa));
#else
  for (int i = 0; i < lanes; ++i) (*high)[i] = static_cast<uint32_t>((static_cast<uint64_t>(a[i]) * b) >> 32);
  *low = a * b;
#endif
}

}  // namespace soda::SODA_ISA
