// A 3x3 convolution's arguments as plain data, and the kernels that each instruction set has for it.
//
// Winograd's F(2x2, 3x3): 16 products in place of 36 for every 2x2 tile of an image, per pair of channels. With B, G and
// A of Lavin and Gray 2016 (equation 8), of a tile d of 4x4 pixels and a filter g
//
//     v = B' d B        u = G g G'        y = A' (sum over channels of u * v) A        dg = G' (sum over tiles of (A dy A') * v) G
//
// and the gradient of the image is the convolution of dy with the filters turned by 180 degrees. The 16 sums are products
// of matrices, [tiles, channels] with [channels, filters]. Tiles go in blocks that fit the second-level cache. What one
// tile becomes depends neither on its block nor on the number of threads, nor does the order in which tiles are summed.
#pragma once

#include <cstdint>

namespace soda {

constexpr int taps = 16;  // of a transformed tile or filter, in rows of four

// Distance of a tap's matrix from the next one's. Without the odd cache line all 16 would fall into the same sets of the
// first-level cache wherever a matrix has a multiple of 4 KiB.
constexpr int64_t tap_stride(int64_t rows, int64_t columns) { return rows * columns + 16; }

// Images are [N, C, H, W] in channels_last, filters [K, C, 3, 3] in channels_last, all of float. The padding is 1.
struct Convolution {
  int64_t batch = 0, height = 0, width = 0;
  int64_t channels = 0, filters = 0;
  int64_t block_tiles = 0;

  [[gnu::always_inline]] int64_t tile_rows() const { return (height + 1) / 2; }
  [[gnu::always_inline]] int64_t tile_columns() const { return (width + 1) / 2; }
  [[gnu::always_inline]] int64_t tiles() const { return batch * tile_rows() * tile_columns(); }
  [[gnu::always_inline]] int64_t blocks() const { return (tiles() + block_tiles - 1) / block_tiles; }
};

// y = activation(convolution(x) + bias + residual).
struct ConvolutionForward : Convolution {
  const float *x = nullptr, *bias = nullptr, *residual = nullptr;
  const float* transformed = nullptr;  // filters, as `transform_filters` leaves them
  float* y = nullptr;
  bool relu = false;
};

struct FilterTransform : Convolution {
  const float* weight = nullptr;
  float* transformed = nullptr;
  bool turned = false;  // of the gradient of x: filters and channels change places, and each filter is turned
};

// The tiles are cut into chunks, and each chunk's sums are kept apart until all are there.
struct FilterGradient : Convolution {
  const float *x = nullptr, *dy = nullptr;
  int64_t chunks = 0, unit_filters = 0;         // a unit is one chunk and a run of filters
  float *shares = nullptr, *bias_shares = nullptr;  // [chunks, taps, K, C] and [chunks, K]
  float *dweight = nullptr, *dbias = nullptr;       // either may be absent

  [[gnu::always_inline]] int64_t units_of_chunk() const { return (filters + unit_filters - 1) / unit_filters; }
};

struct ConvolutionKernels {
  int64_t lanes;  // must divide both numbers of channels
  void (*transform_filters)(const FilterTransform&, int64_t first_column, int64_t last_column);
  void (*forward)(const ConvolutionForward&, int64_t first_block, int64_t last_block);
  void (*filter_shares)(const FilterGradient&, int64_t first_unit, int64_t last_unit);
  // After all units.
  void (*reduce_shares)(const FilterGradient&, int64_t first_filter, int64_t last_filter);
};

namespace generic { extern const ConvolutionKernels convolution; }
namespace avx2 { extern const ConvolutionKernels convolution; }
namespace avx512 { extern const ConvolutionKernels convolution; }

}  // namespace soda
