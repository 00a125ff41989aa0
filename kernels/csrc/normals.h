// Standard normals from pairs of random words, by Box and Muller as in soda_kernels/_philox.py.
//
// The logarithm's argument and the angle are rounded to fp32 as they are there, and what follows is good to an ulp or two:
// beside a zero of the sine or the cosine an exact angle would give numbers many ulps away from the reference's.
//
// Reference: Box and Muller, "A note on the generation of random normal deviates", 1958. The polynomials are those of
// S. Moshier's Cephes library (logf.c, sinf.c).
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

// Replace normal numbers x > 0 by -2 ln(x). Here and below several vectors go side by side: one alone would wait for itself.
template <int count>
SODA_INLINE void minus_two_log(Floats (&x)[count]) {
  constexpr float coefficients[] = {-1.1514610310e-1f, 1.1676998740e-1f,  -1.2420140846e-1f, 1.4249322787e-1f,
                                    -1.6668057665e-1f, 2.0000714765e-1f, -2.4999993993e-1f, 3.3333331174e-1f};
  Floats f[count], e[count], p[count];
  for (int i = 0; i < count; ++i) {
    const Words shifted = as_words(x[i]) - 0x3f3504f3u;  // the root of 1/2: x = 2^e (1 + f), with f in [-0.3, 0.42)
    e[i] = __builtin_convertvector(reinterpret_cast<Ints>(shifted) >> 23, Floats);
    f[i] = as_floats((shifted & 0x007fffffu) + 0x3f3504f3u) - 1.0f;
    p[i] = broadcast(7.0376836292e-2f);
  }
  for (const float coefficient : coefficients) {
    for (int i = 0; i < count; ++i) p[i] = p[i] * f[i] + coefficient;
  }
  for (int i = 0; i < count; ++i) {
    const Floats half = rounded(f[i] * f[i] * 0.5f), start = f[i] - half, rest = (f[i] - start) - half;
    p[i] = p[i] * (half * (f[i] + f[i])) + (e[i] * -2.12194440e-4f + rest);  // ln 2 in two parts, one of few bits
    x[i] = (start + p[i]) * -2.0f + e[i] * (-2.0f * 0.693359375f);
  }
}

// The cosine and the sine of 2 pi turn / 2^24, the angle rounded to fp32.
template <int count>
SODA_INLINE void cosine_and_sine(const Words (&turn)[count], Floats (&cosine)[count], Floats (&sine)[count]) {
  Floats r[count], rest[count];
  for (int i = 0; i < count; ++i) {
    const Floats quarters = to_floats((turn[i] + (1u << 21)) >> 22);
    const Floats angle = rounded(to_floats(turn[i]) * (0x1p-24f * 6.283185307179586f));
    // Pi / 2 in three parts, of which two have 21 bits: their products with 0 to 4 are exact.
    const Floats most = angle - quarters * 0x1.921fbp0f, little = quarters * 0x1.5110bp-22f;
    r[i] = most - little;
    rest[i] = ((most - r[i]) - little) - quarters * 0x1.18469ap-44f;
  }
  for (int i = 0; i < count; ++i) {
    const Floats square = r[i] * r[i], half = rounded(square * 0.5f), start = 1.0f - half;
    Floats s = square * -1.9515295891e-4f + 8.3321608736e-3f, c = square * 2.443315711809948e-5f - 1.388731625493765e-3f;
    s = s * square - 1.6666654611e-1f;
    c = c * square + 4.166664568298827e-2f;
    sine[i] = r[i] + (s * (square * r[i]) + rest[i]);
    cosine[i] = start + (c * (square * square) + (((1.0f - start) - half) - r[i] * rest[i]));
  }
  for (int i = 0; i < count; ++i) {
    const Words quarter = (turn[i] + (1u << 21)) >> 22, half = quarter << 30, sign = Words{} + 0x80000000u;
    const Words s = as_words(sine[i]), c = as_words(cosine[i]), swaps = (s ^ c) & -(quarter & 1u);
    sine[i] = as_floats(s ^ swaps ^ (half & sign));
    cosine[i] = as_floats(c ^ swaps ^ ((half + 0x40000000u) & sign));
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
