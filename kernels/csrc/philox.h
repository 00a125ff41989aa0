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

// The four words of each block.
inline void philox(Words block, const PhiloxKey& key, Words words[4]) {
  Words c0 = block, c1 = Words{} + static_cast<uint32_t>(key.sample_id),
        c2 = Words{} + ((static_cast<uint32_t>(key.sample_id >> 32) & 0x00ffffffu) | key.stream << 24),
        c3 = Words{} + key.step;
  uint32_t k0 = static_cast<uint32_t>(key.seed), k1 = static_cast<uint32_t>(key.seed >> 32);
  for (int round = 0; round < 10; ++round) {
    Words high_0, low_0, high_1, low_1;
    multiply(c0, 0xd2511f53u, &high_0, &low_0);
    multiply(c2, 0xcd9e8d57u, &high_1, &low_1);
    c0 = high_1 ^ c1 ^ k0;
    c2 = high_0 ^ c3 ^ k1;
    c1 = low_1;
    c3 = low_0;
    k0 += 0x9e3779b9u;
    k1 += 0xbb67ae85u;
  }
  words[0] = c0, words[1] = c1, words[2] = c2, words[3] = c3;
}

// 0, 1, 2, … in the lanes.
inline Words lane_indices() {
  Words index;
  for (int i = 0; i < lanes; ++i) index[i] = static_cast<uint32_t>(i);
  return index;
}

}  // namespace soda::SODA_ISA
