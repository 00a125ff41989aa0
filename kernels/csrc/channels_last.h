// The units of images whose channels lie together (NHWC): a unit is a slab of channels, all of its places, and the
// vectors run along the channels, so that a sum over space is a sum over rows in each lane.
#pragma once

#include <algorithm>
#include <numeric>
#include <type_traits>
#include <utility>

#include "unit.h"

namespace soda::SODA_ISA::channels_last {

// Rows summed at a time in fp32 before double takes over: short sums, and the second look finds them in cache. Sums of
// sums, of 16 rows each, would be off by less where many squares are equal, and take 4% more of the whole forward.
constexpr int64_t block_rows = 64;
// Channels of a dropout tile: 64 rows of its factors take 16 KiB.
constexpr int64_t tile_channels = 64;

// A slab's part in one of the images: `data` is its first channel at the sample's first place.
template <class T>
struct Part {
  T* data;
  int64_t stride, offset, width;  // between places; of its first channel in the slab; channels

  T* row(int64_t index) const { return data + index * stride; }
};

template <class T>
inline Part<T> part_of(T* image, int64_t channels, int64_t before, int64_t sample, int64_t space, int64_t first,
                       int64_t last) {
  const int64_t begin = first > before ? first : before, end = last < before + channels ? last : before + channels;
  return {image + sample * space * channels + (begin - before), channels, begin - first, end > begin ? end - begin : 0};
}

template <int rows, class F>
inline void for_row_vectors(int64_t row, int64_t width, F& f) {
  int64_t c = 0;
  for (; c + lanes <= width; c += lanes) f(Step<rows, true>{}, row, c, static_cast<int64_t>(lanes));
  if (c < width) f(Step<rows, false>{}, row, c, width - c);
}

// Call f(Step, row, channel, lanes) for every vector of a block, four rows of it at a time: what belongs to the
// channels is loaded once for the four.
template <class F>
inline void for_rows(int64_t first, int64_t last, int64_t width, F f) {
  int64_t row = first;
  for (; row + 4 <= last; row += 4) for_row_vectors<4>(row, width, f);
  for (; row < last; ++row) for_row_vectors<1>(row, width, f);
}

template <class F>
inline void for_blocks(int64_t space, F f) {
  for (int64_t first = 0; first < space; first += block_rows) {
    f(first, space - first < block_rows ? space : first + block_rows);
  }
}

// Some rows of a block and some channels of a part, with dropout's factors for them.
struct Tile {
  int64_t first, last, channel, width;
  const float* keep;

  const float* factors(int64_t row) const { return keep + (row - first) * tile_channels; }
};

// Call f(Tile) for the tiles of a block of a part; without dropout there is one.
template <bool with_dropout, class T, class F>
inline void for_tiles(const GroupNorm& norm, int64_t sample, int64_t first_channel, const Part<T>& part, int64_t first,
                      int64_t last, float* keep, F f) {
  const int64_t most = with_dropout ? tile_channels : part.width;
  const Philox numbers = with_dropout ? dropout_numbers(norm.dropout, sample) : Philox();
  for (int64_t c = 0; c < part.width; c += most) {
    const int64_t width = part.width - c < most ? part.width - c : most;
    if constexpr (with_dropout) {
      keep_tile(norm.dropout, numbers, norm.space, first, last - first, first_channel + part.offset + c, width, keep,
                tile_channels);
    }
    f(Tile{first, last, c, width, keep});
  }
}

// Store a vector, or where asked for and possible write it past the caches.
template <bool whole, class T>
SODA_INLINE void put(T* to, Floats value, int64_t n, bool past_caches) {
  if constexpr (whole && std::is_same_v<T, float>) {
    if (past_caches) return stream(to, value);
  }
  store_lanes<whole>(to, value, n);
}

// The sum of f(i), as four sums side by side that do not wait for one another.
template <class F>
inline double sum_over(int64_t begin, int64_t end, F f) {
  double part[4] = {};
  int64_t i = begin;
  for (; i + 4 <= end; i += 4) {
    for (int k = 0; k < 4; ++k) part[k] += f(i + k);
  }
  for (; i < end; ++i) part[0] += f(i);
  return (part[0] + part[1]) + (part[2] + part[3]);
}

// Coefficients of the slab's channels.
struct Coefficients {
  float *mean, *scale, *shift;

  Coefficients(int64_t width, Scratch& scratch)
      : mean(scratch.take<float>(width)), scale(scratch.take<float>(width)), shift(scratch.take<float>(width)) {}
};

}  // namespace soda::SODA_ISA::channels_last
