// SiLU and its derivative over vectors, finite for every finite argument.
//
// Each function takes several vectors and goes through them step by step: the steps of one wait for one another, and a
// processor's scheduler holds too few of them to find the next vector's by itself.
#pragma once

#include "vec.h"

namespace soda::SODA_ISA {

// Replace x by e^-x for |x| <= 87, to about an ulp, or if coarse to 2^-16.
#if defined(__AVX2__) && !defined(__AVX512F__)

// -x = (n / 8) ln 2 + r with |r| <= ln(2) / 16: 2^(n mod 8 / 8) from a table that fits a register, a minimax polynomial
// for e^r (of degree 3 with relative error 2.6e-8, or if coarse of degree 2 with 1.4e-5), and 2^(n / 8) by adding to the
// exponent. Three multiplications and additions fewer than below: SiLU of numbers in the first-level cache takes 93% of
// the time (one core of an EPYC of the Zen 3 generation).
template <bool coarse, int count>
SODA_INLINE void exponential_of_negative(Floats (&x)[count]) {
  constexpr float magic = 0x1.8p23f;  // adding it rounds to an integer, which stays in the low bits
  // The bits of 2^(j / 8) less j's own, which come back when n's are added to the exponent.
  alignas(32) static constexpr uint32_t powers[8] = {
      0x3f800000u - (0u << 20), 0x3f8b95c2u - (1u << 20), 0x3f9837f0u - (2u << 20), 0x3fa5fed7u - (3u << 20),
      0x3fb504f3u - (4u << 20), 0x3fc5672au - (5u << 20), 0x3fd744fdu - (6u << 20), 0x3feac0c7u - (7u << 20)};
  const __m256i table = _mm256_load_si256(reinterpret_cast<const __m256i*>(powers));
  Floats shifted[count], n[count], sum[count];
  for (int i = 0; i < count; ++i) shifted[i] = magic - x[i] * 0x1.715476p3f;
  for (int i = 0; i < count; ++i) n[i] = shifted[i] - magic;
  for (int i = 0; i < count; ++i) x[i] = n[i] * 0x1.62e43p-4f + x[i];  // -r: its sign goes into what multiplies it
  if constexpr (coarse) {
    for (int i = 0; i < count; ++i) sum[i] = 1.0f - x[i] * 0x1.ffc288p-2f;
  } else {
    for (int i = 0; i < count; ++i) sum[i] = 0x1.000874p-1f - x[i] * 0x1.555656p-3f;
    for (int i = 0; i < count; ++i) sum[i] = 1.0f - sum[i] * x[i];
  }
  for (int i = 0; i < count; ++i) sum[i] = sum[i] * x[i];
  for (int i = 0; i < count; ++i) {
    const __m256i bits = reinterpret_cast<__m256i>(shifted[i]);
    n[i] = as_floats(reinterpret_cast<Words>(_mm256_permutevar8x32_epi32(table, bits)) + (as_words(shifted[i]) << 20));
  }
  for (int i = 0; i < count; ++i) x[i] = n[i] - sum[i] * n[i];
}

#else

// -x = n ln 2 + r with |r| <= ln(2) / 2, a minimax polynomial for e^r (of degree 6 with relative error 3.6e-9, so that
// rounding dominates, or if coarse of degree 4 with 2.8e-6), and a multiplication by 2^n.
template <bool coarse, int count>
SODA_INLINE void exponential_of_negative(Floats (&x)[count]) {
  constexpr float magic = 0x1.8p23f;  // adding it rounds to an integer, which stays in the low bits
  Floats shifted[count], n[count], sum[count];
  for (int i = 0; i < count; ++i) shifted[i] = magic - x[i] * 0x1.715476p0f;
  for (int i = 0; i < count; ++i) n[i] = shifted[i] - magic;
#if defined(__FMA__) || defined(__aarch64__)
  for (int i = 0; i < count; ++i) x[i] = -(n[i] * 0x1.62e43p-1f + x[i]);
#else
  for (int i = 0; i < count; ++i) x[i] = -(n[i] * 0x1.62e4p-1f + x[i]) - n[i] * 0x1.7f7d1cp-20f;  // the first is exact
#endif
  if constexpr (coarse) {
    for (int i = 0; i < count; ++i) sum[i] = x[i] * 0x1.54148p-5f + 0x1.57cf54p-3f;
    for (int i = 0; i < count; ++i) sum[i] = sum[i] * x[i] + 0x1.0003f6p-1f;
    for (int i = 0; i < count; ++i) sum[i] = sum[i] * x[i] + 0x1.fffba6p-1f;
  } else {
    for (int i = 0; i < count; ++i) sum[i] = x[i] * 0x1.6a23dp-10f + 0x1.123a2p-7f;
    for (int i = 0; i < count; ++i) sum[i] = sum[i] * x[i] + 0x1.5558f2p-5f;
    for (int i = 0; i < count; ++i) sum[i] = sum[i] * x[i] + 0x1.555492p-3f;
    for (int i = 0; i < count; ++i) sum[i] = sum[i] * x[i] + 0x1.fffffcp-2f;
    for (int i = 0; i < count; ++i) sum[i] = sum[i] * x[i] + 1.0f;
  }
  for (int i = 0; i < count; ++i) sum[i] = sum[i] * x[i] + 1.0f;
#if defined(__AVX512F__)
  for (int i = 0; i < count; ++i) x[i] = _mm512_scalef_ps(sum[i], n[i]);
#else
  // A product with 2^n, not a sum of exponents, which would make a number of a NaN.
  for (int i = 0; i < count; ++i) x[i] = sum[i] * as_floats((as_words(shifted[i]) + 127u) << 23);
#endif
}

#endif

// e^-x of these bounds is a normal number. Beyond the lower one silu and its derivative are zero to within 2e-36; beyond
// the upper one the sigmoid is 1.
constexpr float least = -87.0f, most = 87.0f;

// Replace x by x sigmoid(x).
template <bool coarse, int count>
SODA_INLINE void silu(Floats (&x)[count]) {
  Floats e[count];
  for (int i = 0; i < count; ++i) x[i] = at_least(least, x[i]);
  for (int i = 0; i < count; ++i) e[i] = at_most(most, x[i]);
  exponential_of_negative<coarse>(e);
  for (int i = 0; i < count; ++i) e[i] = e[i] + 1.0f;
  divide<coarse>(x, e);
}

// Replace x by sigmoid(x) (1 + x (1 - sigmoid(x))).
template <bool coarse, int count>
SODA_INLINE void silu_derivative(Floats (&x)[count]) {
  Floats e[count], sigmoid[count], one_more[count];
  for (int i = 0; i < count; ++i) e[i] = x[i] = at_most(most, at_least(least, x[i])), sigmoid[i] = broadcast(1.0f);
  exponential_of_negative<coarse>(e);
  for (int i = 0; i < count; ++i) one_more[i] = e[i] + 1.0f;
  divide<coarse>(sigmoid, one_more);
  for (int i = 0; i < count; ++i) e[i] = e[i] * sigmoid[i];  // 1 - sigmoid, without cancelling
  for (int i = 0; i < count; ++i) e[i] = e[i] * x[i] + 1.0f;
  for (int i = 0; i < count; ++i) x[i] = e[i] * sigmoid[i];
}

}  // namespace soda::SODA_ISA
