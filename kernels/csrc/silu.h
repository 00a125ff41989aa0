// SiLU and its derivative over vectors, finite for every finite argument.
#pragma once

#include "vec.h"

namespace soda::SODA_ISA {

// e^x for |x| <= 88: x = n ln 2 + r with |r| <= ln(2) / 2, a minimax polynomial of degree 6 for e^r (relative error
// 3.6e-9, so rounding dominates: at most 1.0 ulp over [-87, 87]), and n added to the exponent's bits.
inline Floats exponential(Floats x) {
  const float magic = 0x1.8p23f;  // adding it rounds to an integer, which stays in the low bits
  const Floats shifted = x * 0x1.715476p0f + magic, n = shifted - magic;
  const Floats r = (x - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;  // the first product is exact
  Floats polynomial = r * 0x1.6a23dp-10f + 0x1.123a2p-7f;
  polynomial = polynomial * r + 0x1.5558f2p-5f;
  polynomial = polynomial * r + 0x1.555492p-3f;
  polynomial = polynomial * r + 0x1.fffffcp-2f;
  polynomial = polynomial * (r * r) + (r + 1.0f);
  return as_floats(as_words(polynomial) + (as_words(shifted) << 23));
}

// x sigmoid(x). Below -87, where the result is under 1e-36, it stays what it is at -87.
inline Floats silu(Floats x) {
  const Floats low = maximum(broadcast(-87.0f), x);
  return low * reciprocal(exponential(-minimum(broadcast(87.0f), low)) + 1.0f);
}

// sigmoid(x) (1 + x (1 - sigmoid(x))), constant outside [-87, 87], where it is 0 or 1 to rounding.
inline Floats silu_derivative(Floats x) {
  const Floats bounded = minimum(broadcast(87.0f), maximum(broadcast(-87.0f), x));
  const Floats e = exponential(-bounded), sigmoid = reciprocal(e + 1.0f);
  return sigmoid * (bounded * (e * sigmoid) + 1.0f);
}

}  // namespace soda::SODA_ISA
