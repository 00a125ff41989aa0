// The factors by which dropout multiplies: 0 or 1 / (1 - p), from 16 random bits an element, eight elements a block.
#pragma once

#include "group_norm.h"
#include "philox.h"

namespace soda::SODA_ISA {

constexpr uint32_t dropout_stream = 2;

inline Philox dropout_numbers(const Dropout& dropout, int64_t sample) {
  const int64_t seed = dropout.seed[dropout.seed_per_sample ? sample * dropout.seed_stride : 0];
  const int64_t id = dropout.seed_per_sample ? 0 : sample;
  return Philox({static_cast<uint64_t>(seed), static_cast<uint64_t>(id), 0, dropout_stream});
}

// The factors of `count` elements from `first` on, in logical order.
inline void keep_run(const Dropout& dropout, const Philox& philox, int64_t first, int64_t count, float* keep) {
  const int64_t last = first + count;
  for (int64_t block = first / 8; block * 8 < last; block += lanes) {
    Words words[4];
    philox(lane_indices() + static_cast<uint32_t>(block), words);
    uint32_t word[4][lanes];
    std::memcpy(word, words, sizeof word);
    float factors[8 * lanes];
    for (int lane = 0; lane < lanes; ++lane) {
      for (int i = 0; i < 4; ++i) {
        factors[8 * lane + 2 * i] = (word[i][lane] & 0xffffu) >= dropout.threshold ? dropout.scale : 0.0f;
        factors[8 * lane + 2 * i + 1] = word[i][lane] >> 16 >= dropout.threshold ? dropout.scale : 0.0f;
      }
    }
    const int64_t from = block * 8 < first ? first : block * 8;
    const int64_t to = (block + lanes) * 8 < last ? (block + lanes) * 8 : last;
    std::memcpy(keep + (from - first), factors + (from - block * 8), static_cast<size_t>(to - from) * sizeof(float));
  }
}

// The factors of a tile of rows (places) and channels, for images whose channels lie together; `keep` has `stride`
// floats a row, with room for a whole vector after the last channel.
inline void keep_tile(const Dropout& dropout, const Philox& philox, int64_t space, int64_t first_row, int64_t rows,
                      int64_t first_channel, int64_t channels, float* keep, int64_t stride) {
  const Words scale = Words{} + bits_of(dropout.scale);
  for (int64_t c = 0; c < channels; c += lanes) {
    const Words channel = lane_indices() + static_cast<uint32_t>(first_channel + c);
    Words words[4];
    if (space % 8 == 0 && first_row % 8 == 0) {  // a block is eight rows of one channel
      for (int64_t row = 0; row < rows; row += 8) {
        philox(channel * static_cast<uint32_t>(space / 8) + static_cast<uint32_t>((first_row + row) / 8), words);
        for (int i = 0; i < 8 && row + i < rows; ++i) {
          const Words bits = i % 2 ? words[i / 2] >> 16 : words[i / 2] & 0xffffu;
          store(keep + (row + i) * stride + c, as_floats(scale & (bits >= dropout.threshold)));
        }
      }
      continue;
    }
    int64_t start[lanes];
    Words block;
    for (int lane = 0; lane < lanes; ++lane) {
      start[lane] = (first_channel + c + lane) * space + first_row;
      block[lane] = static_cast<uint32_t>(start[lane] / 8);
    }
    for (int64_t step = 0; 8 * step < rows + 7; ++step) {
      philox(block + static_cast<uint32_t>(step), words);
      for (int lane = 0; lane < lanes; ++lane) {
        for (int i = 0; i < 8; ++i) {
          const int64_t row = 8 * step + i - start[lane] % 8;
          const uint32_t bits = i % 2 ? words[i / 2][lane] >> 16 : words[i / 2][lane] & 0xffffu;
          if (row >= 0 && row < rows) keep[row * stride + c + lane] = bits >= dropout.threshold ? dropout.scale : 0.0f;
        }
      }
    }
  }
}

}  // namespace soda::SODA_ISA
