// The noise of a tile of one sample: a run of its places, all channels, in the order in which they lie in memory.
//
// Noise is keyed on the logical element, channel * space + place, whatever the layout: where channels lie together, runs of
// each channel are drawn and then interleaved.
#pragma once

#include "diffusion.h"
#include "normals.h"
#include "steps.h"

namespace soda::SODA_ISA {

// The lanes' blocks in the order in which transposed fours are runs of memory.
inline Words block_order() {
  Words order;
  for (int i = 0; i < lanes; ++i) order[i] = static_cast<uint32_t>(i % 4 * (lanes / 4) + i / 4);
  return order;
}

// Numbers that a run of `count` needs room for: whole vectors of blocks, from the block that its first number is in.
inline int64_t run_room(int64_t count) { return count + 8 * lanes; }

// Replace the words of a few vectors of blocks by their normals, in the order of memory.
template <int vectors>
SODA_INLINE void to_normals(float* room) {
  Words words[4 * vectors];
  Floats normal[4 * vectors];
  for (int k = 0; k < 4 * vectors; ++k) words[k] = as_words(load(room + k * lanes));
  normals(words, normal);
  for (int v = 0; v < vectors; ++v) {
    Floats fours[4] = {normal[4 * v], normal[4 * v + 1], normal[4 * v + 2], normal[4 * v + 3]};
    transpose_fours(fours);
    for (int k = 0; k < 4; ++k) store(room + (4 * v + k) * lanes, fours[k]);
  }
}

// The normals of the logical elements from `first` on; returns where in `room` the first lies.
inline const float* draw_run(const Philox& philox, int64_t first, int64_t count, float* room) {
  const Words order = block_order();
  const int64_t vectors = (first % 4 + count + 4 * lanes - 1) / (4 * lanes);
  uint32_t block = static_cast<uint32_t>(first / 4);
  const int64_t pairs_end = vectors / 2 * 2;
  // Words first, then their normals: each of the two has work enough for the processor to do side by side.
  for (int64_t i = 0; i < pairs_end; i += 2, block += 2 * lanes) {
    const Words blocks[2] = {order + block, order + block + lanes};
    Words words[8];
    philox(blocks, words);
    for (int k = 0; k < 8; ++k) store(room + (4 * i + k) * lanes, as_floats(words[k]));
  }
  if (pairs_end < vectors) {
    Words words[4];
    philox(order + block, words);
    for (int k = 0; k < 4; ++k) store(room + (4 * pairs_end + k) * lanes, as_floats(words[k]));
  }
  for (int64_t i = 0; i < pairs_end; i += 2) to_normals<2>(room + 4 * i * lanes);
  if (pairs_end < vectors) to_normals<1>(room + 4 * pairs_end * lanes);
  return room + first % 4;
}

// Three rows of numbers in turns.
template <class Row>
inline void interleave_threes(Row row, int64_t count, float* out) {
  Words from[3], is_of[3][3];  // a vector's numbers, so permuted, are in the lanes where they belong in one of three
  for (uint32_t i = 0; i < lanes; ++i) {
    for (uint32_t k = 0; k < 3; ++k) {
      const uint32_t number = k * lanes + i;
      from[number % 3][i] = number / 3;
      for (uint32_t c = 0; c < 3; ++c) is_of[k][c][i] = number % 3 == c ? ~0u : 0u;
    }
  }
  for (int64_t p = 0; p < count; p += lanes) {
    Words part[3];
    for (int c = 0; c < 3; ++c) part[c] = as_words(permuted(load(row(c) + p), from[c]));
    for (int k = 0; k < 3; ++k) {
      const Words mixed = (part[0] & is_of[k][0]) | (part[1] & is_of[k][1]) | (part[2] & is_of[k][2]);
      store(out + 3 * p + k * lanes, as_floats(mixed));
    }
  }
}

// Four rows of numbers in turns, each four of them `stride` after the one before.
template <class Row>
inline void interleave_fours(Row row, int64_t count, int64_t stride, float* out) {
  for (int64_t p = 0; p < count; p += lanes) {
    Floats part[4];
    for (int c = 0; c < 4; ++c) part[c] = load(row(c) + p);
    transpose_fours(part);
    for (int i = 0; i < 4; ++i) {
      float four[lanes];
      store(four, part[i]);
      for (int l = 0; l < lanes / 4; ++l) std::memcpy(out + (p + 4 * l + i) * stride, four + 4 * l, 4 * sizeof(float));
    }
  }
}

// Draws tiles, in memory that it takes from the scratch.
class Noise {
 public:
  Noise(const Images& images, Scratch& scratch)
      : images_(images),
        rows_(scratch.take<float>(rows_room(images))),
        tile_(scratch.take<float>(tile_room(images))) {}

  static int64_t scratch_bytes(const Images& images) {
    return Scratch::bytes<float>(rows_room(images)) + Scratch::bytes<float>(tile_room(images));
  }

  // The normals of `count` places from `first` on.
  const float* draw(const Philox& philox, int64_t first, int64_t count) {
    const int64_t channels = images_.channels, space = images_.space;
    if (channels == 1) return draw_run(philox, first, count, rows_);
    int64_t stride = space;
    if (count == space) {
      draw_run(philox, 0, channels * space, rows_);
    } else {
      stride = run_room(images_.tile);
      for (int64_t c = 0; c < channels; ++c) draw_run(philox, c * space + first, count, rows_ + c * stride);
    }
    const auto row = [&](int64_t c) { return rows_ + c * stride + (count == space ? 0 : (c * space + first) % 4); };
    if (channels == 3) {
      interleave_threes(row, count, tile_);
    } else if (channels % 4 == 0) {
      for (int64_t c = 0; c < channels; c += 4) {
        interleave_fours([&](int64_t i) { return row(c + i); }, count, channels, tile_ + c);
      }
    } else {
      for (int64_t c = 0; c < channels; ++c) {
        for (int64_t p = 0; p < count; ++p) tile_[p * channels + c] = row(c)[p];
      }
    }
    return tile_;
  }

 private:
  static int64_t rows_room(const Images& images) {
    if (images.channels > 1 && images.tile < images.space) return images.channels * run_room(images.tile);
    return run_room(images.channels * images.tile);
  }
  // With room for whole vectors of places.
  static int64_t tile_room(const Images& images) {
    return images.channels == 1 ? 0 : (images.tile + lanes) * images.channels;
  }

  const Images& images_;
  float *const rows_, *const tile_;
};

}  // namespace soda::SODA_ISA
