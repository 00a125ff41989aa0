// SiLU and its derivative over vectors, finite for every finite argument.
//
// Each function takes several vectors and goes through them step by step: the steps of one wait for one another, and a
// processor's scheduler holds too few of them to find the next vector's by itself.
#pragma once

#include "vec.h"

namespace soda::SODA_ISA {

// Replace x by e^-x for |x| <= 87.
//
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
  for (int i = 0; i < count; ++i) x[i] = as_floats(as_words(sum[i]) + (as_words(shifted[i]) << 23));
#endif
}

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
