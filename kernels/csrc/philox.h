// Philox4x32-10 over a vector of counters: the package's only source of random bits, as in soda_kernels/_philox.py.
//
// Reference: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
#pragma once

#include "vec.h"

namespace soda::SODA_ISA {

// What is the same for all elements of a sample. 56 bits of the sample id are used.
struct PhiloxKey {
  uint64_t seed;
  uint64_t sample_id;
  uint32_t step;
  uint32_t stream;
};

// The words of blocks. The rounds' keys are laid out once, so that a round spreads no scalar; a vector of words is two of
// 64-bit ones, which a product's halves need not be sorted for: what stands above the lower 32 bits has no meaning.
class Philox {
 public:
  Philox() = default;  // to be assigned to
  explicit Philox(const PhiloxKey& key)
      : Philox(key.seed, Words{} + static_cast<uint32_t>(key.sample_id),
               Words{} + static_cast<uint32_t>(key.sample_id >> 32), Words{} + key.step, key.stream) {}

  // With a sample id (in two halves) and a step for each lane.
  Philox(uint64_t seed, Words id_low, Words id_high, Words step, uint32_t stream)
      : counter_{id_low, (id_high & 0x00ffffffu) | stream << 24, step} {
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < rounds; ++round) {
      keys_[round][0] = reinterpret_cast<Wide>(Words{} + k0), keys_[round][1] = reinterpret_cast<Wide>(Words{} + k1);
      k0 += 0x9e3779b9u;
      k1 += 0xbb67ae85u;
    }
  }

  // The four words of each lane's block.
  SODA_INLINE void operator()(Words block, Words (&words)[4]) const {
    const Words blocks[1] = {block};
    (*this)(blocks, words);
  }

  // The same of a few vectors of blocks side by side, of each vector four of words. A round waits for the one before it:
  // two vectors at a time take 0.87 of the time that one after another does (AVX2, a core of the Zen 3 generation).
  template <int count>
  SODA_INLINE void operator()(const Words (&blocks)[count], Words (&words)[4 * count]) const {
    constexpr int halves = 2 * count;
    Wide c[4][halves];
    for (int v = 0; v < count; ++v) {
      const Words counter[4] = {blocks[v], counter_[0], counter_[1], counter_[2]};
      for (int i = 0; i < 4; ++i) {
        c[i][2 * v] = reinterpret_cast<Wide>(counter[i]), c[i][2 * v + 1] = c[i][2 * v] >> 32;
      }
    }
#pragma GCC unroll 10
    for (int round = 0; round < rounds; ++round) {
      for (int half = 0; half < halves; ++half) {
        const Wide first = multiply(c[0][half], 0xd2511f53u), second = multiply(c[2][half], 0xcd9e8d57u);
        c[0][half] = (second >> 32) ^ (c[1][half] ^ keys_[round][0]);
        c[2][half] = (first >> 32) ^ (c[3][half] ^ keys_[round][1]);
        c[1][half] = second;
        c[3][half] = first;
      }
    }
    for (int i = 0; i < 4 * count; ++i) words[i] = join(c[i % 4][i / 4 * 2], c[i % 4][i / 4 * 2 + 1]);
  }

 private:
  static constexpr int rounds = 10;
  Words counter_[3];
  Wide keys_[rounds][2];
};

// 0, 1, 2, … in the lanes.
inline Words lane_indices() {
  Words index;
  for (int i = 0; i < lanes; ++i) index[i] = static_cast<uint32_t>(i);
  return index;
}

}  // namespace soda::SODA_ISA
