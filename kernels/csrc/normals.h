// Standard normals from pairs of random words, by Box and Muller as in soda_kernels/_philox.py.
//
// The logarithm's argument and the angle are rounded to fp32 as they are there: beside a zero of the sine or the cosine an
// exact angle would give numbers many ulps away from the reference's. What follows is good to 3.2 ulps, and to half an ulp on
// average; without the compensated sums that would halve the first of these it takes 0.7 of the time.
//
// Reference: Box and Muller, "A note on the generation of random normal deviates", 1958. Sine's and cosine's polynomials
// are those of S. Moshier's Cephes library (sinf.c); the logarithm's is the best of its degree in the sense of
// `minus_two_log`.
#pragma once

#include "philox.h"

#include <cmath>

namespace soda::SODA_ISA {

typedef int32_t Ints __attribute__((vector_size(4 * lanes)));

inline Floats to_floats(Words small) { return __builtin_convertvector(reinterpret_cast<Ints>(small), Floats); }  // < 2^31

SODA_INLINE Floats square_root(Floats x) {
#if defined(__AVX512F__)
  return _mm512_sqrt_ps(x);
#elif defined(__AVX2__)
  return _mm256_sqrt_ps(x);
#else
  for (int i = 0; i < lanes; ++i) x[i] = std::sqrt(x[i]);
  return x;
#endif
}

// Where `sign` has its highest bit set `b`, else `a`.
SODA_INLINE Floats choose(Words sign, Floats a, Floats b) {
#if defined(__AVX512F__)
  return _mm512_mask_blend_ps(_mm512_movepi32_mask(reinterpret_cast<__m512i>(sign)), a, b);
#elif defined(__AVX2__)
  return _mm256_blendv_ps(a, b, as_floats(sign));
#else
  const Words mask = reinterpret_cast<Words>(reinterpret_cast<Ints>(sign) >> 31);
  return as_floats((as_words(a) & ~mask) | (as_words(b) & mask));
#endif
}

// Replace normal numbers x > 0 by -2 ln(x). Here and below several vectors go side by side: one alone would wait for itself.
//
// With x = 2^e (1 + f) and f in [-0.3, 0.42) it is -2 f + f^2 p(f) - 2 ln(2) e. The coefficients of p make the largest
// error least, relative to the result: 1.9e-8, weighted least squares with weights raised where the error is large.
template <int count>
SODA_INLINE void minus_two_log(Floats (&x)[count]) {
  constexpr uint32_t root_of_half = 0x3f3504f3u;
  Floats f[count], e[count], square[count], high[count], low[count];
  for (int i = 0; i < count; ++i) {
    const Words shifted = as_words(x[i]) - root_of_half;
    e[i] = __builtin_convertvector(reinterpret_cast<Ints>(shifted) >> 23, Floats);
    f[i] = as_floats((shifted & 0x007fffffu) + root_of_half) - 1.0f;
    square[i] = f[i] * f[i];
  }
  // In a tree and not one after another: 3% of the time of all this file does.
  for (int i = 0; i < count; ++i) {
    high[i] = (f[i] * -1.8284519e-1f + 2.9363614e-1f) * square[i] + (f[i] * -2.9828379e-1f + 3.3006474e-1f);
    low[i] = (f[i] * -3.9912954e-1f + 5.0011415e-1f) * square[i] + (f[i] * -6.6668397e-1f + 9.9999833e-1f);
  }
  for (int i = 0; i < count; ++i) {
    const Floats p = high[i] * (square[i] * square[i]) + low[i];
    x[i] = (p * square[i] - (f[i] + f[i])) - e[i] * 1.3862943611f;
  }
}

// The cosine and the sine of 2 pi turn / 2^24, the angle rounded to fp32.
template <int count>
SODA_INLINE void cosine_and_sine(const Words (&turn)[count], Floats (&cosine)[count], Floats (&sine)[count]) {
  Floats r[count];
  Words nearest[count];  // quarter of a turn, from bit 22 on
  for (int i = 0; i < count; ++i) {
    nearest[i] = turn[i] + (1u << 21);
    const Floats quarters = to_floats(nearest[i] >> 22);
    const Floats angle = rounded(to_floats(turn[i]) * (0x1p-24f * 6.283185307179586f));
    // Pi / 2 in three parts, of which the first two have 21 bits: their products with 0 to 4 are exact, fused or not.
    r[i] = ((angle - quarters * 0x1.921fbp0f) - quarters * 0x1.5110bp-22f) - quarters * 0x1.18469ap-44f;
  }
  for (int i = 0; i < count; ++i) {
    const Floats square = r[i] * r[i];
    Floats s = square * -1.9515295891e-4f + 8.3321608736e-3f, c = square * 2.443315711809948e-5f - 1.388731625493765e-3f;
    s = s * square - 1.6666654611e-1f;
    c = (c * square + 4.166664568298827e-2f) * square - 0.5f;
    sine[i] = s * (square * r[i]) + r[i];
    cosine[i] = c * square + 1.0f;
  }
  // Odd quarters swap the two; the sine is negative in the third and fourth, the cosine in the second and third.
  for (int i = 0; i < count; ++i) {
    const Words sign = Words{} + 0x80000000u, odd = nearest[i] << 9;
    const Floats s = choose(odd, sine[i], cosine[i]), c = choose(odd, cosine[i], sine[i]);
    sine[i] = as_floats(as_words(s) ^ ((nearest[i] << 8) & sign));
    cosine[i] = as_floats(as_words(c) ^ (((nearest[i] + (1u << 22)) << 8) & sign));
  }
}

// The normals of blocks' words: of words 0 and 1, and of words 2 and 3, a pair.
template <int count>
SODA_INLINE void normals(const Words (&words)[count], Floats (&normal)[count]) {
  constexpr int pairs = count / 2;
  Words turn[pairs];
  Floats radius[pairs], cosine[pairs], sine[pairs];
  for (int i = 0; i < pairs; ++i) {
    const Words a = words[2 * i];
    turn[i] = words[2 * i + 1] >> 8;
    // One rounding, since the product is exact.
    radius[i] = (to_floats(a >> 16) * 65536.0f + to_floats(a & 0xffffu)) * 0x1p-32f + 0x1p-33f;
  }
  minus_two_log(radius);
  cosine_and_sine(turn, cosine, sine);
  for (int i = 0; i < pairs; ++i) {
    const Floats root = square_root(radius[i]);
    normal[2 * i] = root * cosine[i], normal[2 * i + 1] = root * sine[i];
  }
}

}  // namespace soda::SODA_ISA
