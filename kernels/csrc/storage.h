// How numbers of 16 bits lie in memory, and what one of them is as a float.
//
// Static: copies compiled for different instruction sets must not meet in the linker, which would keep one of them.
#pragma once

#include <cstdint>
#include <cstring>

namespace soda {

enum class Dtype { float32, bfloat16, float16 };

struct BFloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

// Of an image of 8 bits: 0 to 255 stand for -1 to 1.
struct Pixel {
  uint8_t value;
};

static inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

static inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

static inline float widen(float value) { return value; }

static inline float widen(BFloat16 value) { return float_of(static_cast<uint32_t>(value.bits) << 16); }

static inline float widen(Half value) {
  const uint32_t sign = (value.bits & 0x8000u) << 16, exponent = (value.bits >> 10) & 31, mantissa = value.bits & 1023u;
  if (exponent == 0) return float_of(bits_of(static_cast<float>(mantissa) * 0x1p-24f) | sign);
  if (exponent == 31) return float_of(sign | 0x7f800000u | mantissa << 13);
  return float_of(sign | (exponent + 112) << 23 | mantissa << 13);
}

static inline float widen(Pixel pixel) { return static_cast<float>(pixel.value) / 127.5f - 1.0f; }

// All round to nearest, ties to even.
static inline void narrow(float value, float* to) { *to = value; }

static inline void narrow(float value, BFloat16* to) {
  const uint32_t bits = bits_of(value);
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  to->bits = static_cast<uint16_t>(is_nan ? 0x7fc0u : (bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

static inline void narrow(float value, Half* to) {
  const uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // 65520, half-way to the number after the largest
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // below 2^-14 the spacing is 2^-24, which is that of floats from 0.5 to 1
    half = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  } else {
    half = ((magnitude + 0xfffu + (magnitude >> 13 & 1)) >> 13) - (112u << 10);
  }
  to->bits = static_cast<uint16_t>(sign | half);
}

}  // namespace soda
