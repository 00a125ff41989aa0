// 3x3 convolutions for one instruction set: compiled once for each, with its flags and -DSODA_ISA=its name.

#include <cstring>
#include <type_traits>

#include "products.h"
#include "winograd.h"

namespace soda::SODA_ISA {
namespace {

// Transformed filters are [16, columns / panel, depth, panel]: columns are filters and the depth channels, or where they
// are turned the other way round.
void transform_filters(const FilterTransform& of, int64_t first_column, int64_t last_column) {
  const int64_t depth = of.turned ? of.filters : of.channels, columns = of.turned ? of.channels : of.filters;
  const int64_t stride = of.channels;
  for (int64_t column = first_column; column < last_column; column += lanes) {
    const Panel panel(column, columns);
    const int64_t width = panel.width;
    float* const to = of.transformed + panel.first * depth + column - panel.first;
    if (of.turned) {
      for (int64_t k = 0; k < depth; ++k) {
        Floats u[4][4];
        transform_filter(of.weight + k * 9 * stride + column, stride, true, u);
        for (int t = 0; t < taps; ++t) store(to + t * tap_stride(depth, columns) + k * width, u[t / 4][t % 4]);
      }
      continue;
    }
    for (int64_t c = 0; c < depth; c += lanes) {
      for (int64_t k = 0; k < lanes; k += 4) {
        Floats u[4][4][4];
        for (int i = 0; i < 4; ++i) transform_filter(of.weight + (column + k + i) * 9 * stride + c, stride, false, u[i]);
        for (int t = 0; t < taps; ++t) {
          Floats fours[4];
          for (int i = 0; i < 4; ++i) fours[i] = u[i][t / 4][t % 4];
          transpose_fours(fours);
          float* const tap = to + t * tap_stride(depth, columns) + c * width + k;
          for (int i = 0; i < 4; ++i) {
            float channels[lanes];
            store(channels, fours[i]);
            for (int four = 0; four < lanes / 4; ++four) {
              std::memcpy(tap + (4 * four + i) * width, channels + 4 * four, 4 * sizeof(float));
            }
          }
        }
      }
    }
  }
}

void write_tile(const ConvolutionForward& of, int64_t number, const float* products, int64_t stride) {
  const Tile tile(of, number);
  const int64_t rows = of.height - tile.row < 2 ? 1 : 2, columns = of.width - tile.column < 2 ? 1 : 2;
  for (int64_t k = 0; k < of.filters; k += lanes) {
    Floats y[2][2];
    transform_output(products + k, stride, y);
    const Floats bias = of.bias ? load(of.bias + k) : Floats{};
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; ++j) {
        const int64_t at = ((tile.image * of.height + tile.row + i) * of.width + tile.column + j) * of.filters + k;
        Floats value = y[i][j] + bias;
        if (of.residual) value += load(of.residual + at);
        store(of.y + at, of.relu ? at_least(0.0f, value) : value);
      }
    }
  }
}

void forward(const ConvolutionForward& of, int64_t first_block, int64_t last_block) {
  const int64_t depth = of.channels, columns = of.filters;
  const int64_t input_stride = tap_stride(of.block_tiles, depth), product_stride = tap_stride(of.block_tiles, columns);
  char none[1];
  Scratch scratch(Scratch::bytes<float>(taps * input_stride) + Scratch::bytes<float>(taps * product_stride) +
                      Scratch::bytes<float>(depth), none);
  float* const inputs = scratch.take<float>(taps * input_stride);
  float* const products = scratch.take<float>(taps * product_stride);
  float* const zeros = scratch.take<float>(depth);
  std::memset(zeros, 0, static_cast<size_t>(depth) * sizeof(float));

  for (int64_t block = first_block; block < last_block; ++block) {
    const int64_t first = block * of.block_tiles;
    const int64_t count = of.tiles() - first < of.block_tiles ? of.tiles() - first : of.block_tiles;
    for (int64_t t = 0; t < count; ++t) {
      const Tile tile(of, first + t);
      const float* from[4][4];
      find_pixels(of, of.x, depth, tile, -1, zeros, from);
      for (int64_t c = 0; c < depth; c += lanes) transform_input(from, c, inputs + t * depth + c, input_stride);
    }
    for (int tap = 0; tap < taps; ++tap) {
      const float* const a = inputs + tap * input_stride;
      float* const c = products + tap * product_stride;
      for_panels(columns, [&](auto vectors, int64_t column) {
        const float* const b = of.transformed + tap * tap_stride(depth, columns) + column * depth;
        for_rows<vectors>(count, [&](auto rows, int64_t t) {
          multiply_rows<rows, vectors>(a + t * depth, depth, b, vectors * lanes, c + t * columns + column, columns, depth,
                                       false);
        });
      });
    }
    for (int64_t t = 0; t < count; ++t) write_tile(of, first + t, products + t * columns, product_stride);
  }
}

// One chunk's sums over tiles, for a run of filters.
void share_of(const FilterGradient& of, int64_t chunk, int64_t first_filter, int64_t num_filters, float* inputs,
              float* gradients, const float* zeros) {
  const int64_t depth = of.channels;
  // At least one, since there are no more chunks than blocks.
  const int64_t first_block = of.blocks() * chunk / of.chunks, last_block = of.blocks() * (chunk + 1) / of.chunks;
  const int64_t input_stride = tap_stride(of.block_tiles, depth);
  const int64_t gradient_stride = tap_stride(of.block_tiles, num_filters);
  float* const share = of.shares + chunk * taps * tap_stride(of.filters, depth) + first_filter * depth;
  float* const bias_share = of.bias_shares + chunk * of.filters + first_filter;
  std::memset(bias_share, 0, static_cast<size_t>(num_filters) * sizeof(float));
  for (int64_t block = first_block; block < last_block; ++block) {
    const int64_t first = block * of.block_tiles;
    const int64_t count = of.tiles() - first < of.block_tiles ? of.tiles() - first : of.block_tiles;
    for (int64_t t = 0; t < count; ++t) {
      const Tile tile(of, first + t);
      const float *from[4][4], *gradient[2][2];
      find_pixels(of, of.x, depth, tile, -1, zeros, from);
      find_pixels(of, of.dy + first_filter, of.filters, tile, 0, zeros, gradient);
      // In panels of columns, each with its tiles one after the other.
      for_panels(depth, [&](auto vectors, int64_t panel) {
        for (int v = 0; v < vectors; ++v) {
          float* const to = inputs + panel * of.block_tiles + (t * vectors + v) * lanes;
          transform_input(from, panel + v * lanes, to, input_stride);
        }
      });
      for (int64_t k = 0; k < num_filters; k += lanes) {
        const Floats sum = transform_gradient(gradient, k, gradients + t * num_filters + k, gradient_stride);
        store(bias_share + k, load(bias_share + k) + sum);
      }
    }
    for (int tap = 0; tap < taps; ++tap) {
      const float* const a = gradients + tap * gradient_stride;
      float* const c = share + tap * tap_stride(of.filters, depth);
      for_panels(depth, [&](auto vectors, int64_t panel) {
        const float* const b = inputs + tap * input_stride + panel * of.block_tiles;
        for_rows<vectors>(num_filters, [&](auto rows, int64_t k) {
          multiply_columns<rows, vectors>(a + k, num_filters, b, vectors * lanes, c + k * depth + panel, depth, count,
                                          block > first_block);
        });
      });
    }
  }
}

void filter_shares(const FilterGradient& of, int64_t first_unit, int64_t last_unit) {
  const int64_t input_size = taps * tap_stride(of.block_tiles, of.channels);
  const int64_t gradient_size = taps * tap_stride(of.block_tiles, of.unit_filters);
  const int64_t widest = of.channels > of.filters ? of.channels : of.filters;
  char none[1];
  Scratch scratch(Scratch::bytes<float>(input_size) + Scratch::bytes<float>(gradient_size) + Scratch::bytes<float>(widest),
                  none);
  float* const inputs = scratch.take<float>(input_size);
  float* const gradients = scratch.take<float>(gradient_size);
  float* const zeros = scratch.take<float>(widest);
  std::memset(zeros, 0, static_cast<size_t>(widest) * sizeof(float));
  for (int64_t unit = first_unit; unit < last_unit; ++unit) {
    const int64_t first = unit % of.units_of_chunk() * of.unit_filters;
    const int64_t count = of.filters - first < of.unit_filters ? of.filters - first : of.unit_filters;
    share_of(of, unit / of.units_of_chunk(), first, count, inputs, gradients, zeros);
  }
}

void reduce_shares(const FilterGradient& of, int64_t first_filter, int64_t last_filter) {
  const int64_t depth = of.channels;
  for (int64_t k = first_filter; k < last_filter; ++k) {
    for (int64_t c = 0; of.dweight && c < depth; c += lanes) {
      Floats u[4][4];
      for (int tap = 0; tap < taps; ++tap) {
        Floats sum = {};
        for (int64_t chunk = 0; chunk < of.chunks; ++chunk) {
          sum += load(of.shares + (chunk * taps + tap) * tap_stride(of.filters, depth) + k * depth + c);
        }
        u[tap / 4][tap % 4] = sum;
      }
      transform_filter_gradient(u, of.dweight + k * 9 * depth + c, depth);
    }
    if (of.dbias) {
      double sum = 0.0;
      for (int64_t chunk = 0; chunk < of.chunks; ++chunk) sum += of.bias_shares[chunk * of.filters + k];
      of.dbias[k] = static_cast<float>(sum);
    }
  }
}

}  // namespace

const ConvolutionKernels convolution = {lanes, transform_filters, forward, filter_shares, reduce_shares};

}  // namespace soda::SODA_ISA
