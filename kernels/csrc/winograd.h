// Winograd's transforms of tiles and filters. See convolution.h for what they are.
#pragma once

#include "convolution.h"
#include "steps.h"

namespace soda::SODA_ISA {

struct Tile {
  int64_t image, row, column;  // of its first pixel of y

  Tile(const Convolution& of, int64_t number) {
    const int64_t of_image = of.tile_rows() * of.tile_columns(), in_image = number % of_image;
    image = number / of_image;
    row = in_image / of.tile_columns() * 2, column = in_image % of.tile_columns() * 2;
  }
};

// Where the channels of a tile's pixels lie, from `start` rows and columns after its first one on; zeros beyond the border.
template <int side>
SODA_INLINE void find_pixels(const Convolution& of, const float* images, int64_t channels, const Tile& tile, int64_t start,
                             const float* zeros, const float* (&at)[side][side]) {
  const int64_t row = tile.row + start, column = tile.column + start;
  const float* const first = images + ((tile.image * of.height + row) * of.width + column) * channels;
  const bool inside = row >= 0 && column >= 0 && row + side <= of.height && column + side <= of.width;
  for (int i = 0; i < side; ++i) {
    for (int j = 0; j < side; ++j) {
      const bool exists = inside || (row + i >= 0 && row + i < of.height && column + j >= 0 && column + j < of.width);
      at[i][j] = exists ? first + (i * of.width + j) * channels : zeros;
    }
  }
}

// v = B' d B for a run of channels of one tile: tap t goes to to[t * stride].
SODA_INLINE void transform_input(const float* const (&from)[4][4], int64_t channel, float* to, int64_t stride) {
  Floats rows[4][4];
  for (int j = 0; j < 4; ++j) {
    const Floats d0 = load(from[0][j] + channel), d1 = load(from[1][j] + channel);
    const Floats d2 = load(from[2][j] + channel), d3 = load(from[3][j] + channel);
    rows[0][j] = d0 - d2, rows[1][j] = d1 + d2, rows[2][j] = d2 - d1, rows[3][j] = d1 - d3;
  }
  for (int i = 0; i < 4; ++i, to += 4 * stride) {
    store(to, rows[i][0] - rows[i][2]);
    store(to + stride, rows[i][1] + rows[i][2]);
    store(to + 2 * stride, rows[i][2] - rows[i][1]);
    store(to + 3 * stride, rows[i][1] - rows[i][3]);
  }
}

// y = A' m A for a run of channels of one tile.
SODA_INLINE void transform_output(const float* from, int64_t stride, Floats (&y)[2][2]) {
  Floats rows[2][4];
  for (int j = 0; j < 4; ++j) {
    const Floats m0 = load(from + j * stride), m1 = load(from + (4 + j) * stride);
    const Floats m2 = load(from + (8 + j) * stride), m3 = load(from + (12 + j) * stride);
    rows[0][j] = m0 + m1 + m2, rows[1][j] = m1 - m2 - m3;
  }
  for (int i = 0; i < 2; ++i) {
    y[i][0] = rows[i][0] + rows[i][1] + rows[i][2];
    y[i][1] = rows[i][1] - rows[i][2] - rows[i][3];
  }
}

// A dy A' for a run of channels of one tile; returns the sum of its four pixels.
SODA_INLINE Floats transform_gradient(const float* const (&from)[2][2], int64_t channel, float* to, int64_t stride) {
  Floats rows[4][2];
  for (int j = 0; j < 2; ++j) {
    const Floats d0 = load(from[0][j] + channel), d1 = load(from[1][j] + channel);
    rows[0][j] = d0, rows[1][j] = d0 + d1, rows[2][j] = d0 - d1, rows[3][j] = -d1;
  }
  for (int i = 0; i < 4; ++i, to += 4 * stride) {
    store(to, rows[i][0]);
    store(to + stride, rows[i][0] + rows[i][1]);
    store(to + 2 * stride, rows[i][0] - rows[i][1]);
    store(to + 3 * stride, -rows[i][1]);
  }
  return rows[1][0] + rows[1][1];
}

// u = G g G' for a run of channels of one filter, whose taps lie `stride` apart.
SODA_INLINE void transform_filter(const float* from, int64_t stride, bool turned, Floats (&u)[4][4]) {
  Floats rows[4][3];
  for (int j = 0; j < 3; ++j) {
    const auto tap = [&](int i) { return load(from + (turned ? 8 - 3 * i - j : 3 * i + j) * stride); };
    const Floats g0 = tap(0), g1 = tap(1), g2 = tap(2), ends = (g0 + g2) * 0.5f, middle = g1 * 0.5f;
    rows[0][j] = g0, rows[1][j] = ends + middle, rows[2][j] = ends - middle, rows[3][j] = g2;
  }
  for (int i = 0; i < 4; ++i) {
    const Floats ends = (rows[i][0] + rows[i][2]) * 0.5f, middle = rows[i][1] * 0.5f;
    u[i][0] = rows[i][0], u[i][1] = ends + middle, u[i][2] = ends - middle, u[i][3] = rows[i][2];
  }
}

// dg = G' u G for a run of channels of one filter.
SODA_INLINE void transform_filter_gradient(const Floats (&u)[4][4], float* to, int64_t stride) {
  Floats rows[3][4];
  for (int j = 0; j < 4; ++j) {
    const Floats sum = (u[1][j] + u[2][j]) * 0.5f;
    rows[0][j] = u[0][j] + sum, rows[1][j] = (u[1][j] - u[2][j]) * 0.5f, rows[2][j] = sum + u[3][j];
  }
  for (int i = 0; i < 3; ++i, to += 3 * stride) {
    const Floats sum = (rows[i][1] + rows[i][2]) * 0.5f;
    store(to, rows[i][0] + sum);
    store(to + stride, (rows[i][1] - rows[i][2]) * 0.5f);
    store(to + 2 * stride, sum + rows[i][3]);
  }
}

}  // namespace soda::SODA_ISA
