// The units of images whose channels lie together (NHWC): a unit is a slab of channels, all of its places, and the
// vectors run along the channels, so that a sum over space is a sum over rows in each lane.
#pragma once

#include "unit.h"

namespace soda::SODA_ISA::channels_last {

// Rows summed at a time in fp32 before double takes over: short sums, and the second look finds them in cache.
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

template <int rows_, bool whole_>
struct Step {
  static constexpr int rows = rows_;
  static constexpr bool whole = whole_;
};

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

// Call f(first row, last row, first channel, channels, factors) for the tiles of a part; without dropout there is one
// tile a block and no factors.
template <bool with_dropout, class T, class F>
inline void for_tiles(const GroupNorm& norm, int64_t sample, int64_t first_channel, const Part<T>& part, float* keep,
                      F f) {
  const int64_t tile = with_dropout ? tile_channels : part.width;
  const PhiloxKey key = with_dropout ? dropout_key(norm.dropout, sample) : PhiloxKey{};
  for_blocks(norm.space, [&](int64_t first, int64_t last) {
    for (int64_t c = 0; c < part.width; c += tile) {
      const int64_t width = part.width - c < tile ? part.width - c : tile;
      if constexpr (with_dropout) {
        keep_tile(norm.dropout, key, norm.space, first, last - first, first_channel + part.offset + c, width, keep,
                  tile_channels);
      }
      f(first, last, c, width, keep);
    }
  });
}

// Coefficients of the slab's channels.
struct Coefficients {
  float *mean, *scale, *shift;
};

template <class T>
inline void merge_part(const Part<const T>& part, int64_t first, int64_t last, float* shift, float* deviations,
                       float* squares, Moments* moments) {
  const size_t bytes = static_cast<size_t>(part.width) * sizeof(float);
  std::memset(shift, 0, bytes), std::memset(deviations, 0, bytes), std::memset(squares, 0, bytes);
  for_rows(first, last, part.width, [&](auto step, int64_t row, int64_t c, int64_t n) {
    constexpr bool w = decltype(step)::whole;
    Floats total = load_lanes<w>(shift + c, n);
    for (int r = 0; r < decltype(step)::rows; ++r) total += load_lanes<w>(part.row(row + r) + c, n);
    store_lanes<w>(shift + c, total, n);
  });
  const float rows = static_cast<float>(last - first);
  for (int64_t c = 0; c < part.width; ++c) shift[c] /= rows;
  for_rows(first, last, part.width, [&](auto step, int64_t row, int64_t c, int64_t n) {
    constexpr bool w = decltype(step)::whole;
    const Floats center = load_lanes<w>(shift + c, n);
    Floats sum = load_lanes<w>(deviations + c, n), square = load_lanes<w>(squares + c, n);
    for (int r = 0; r < decltype(step)::rows; ++r) {
      const Floats centered = load_lanes<w>(part.row(row + r) + c, n) - center;
      sum += centered;
      square += centered * centered;
    }
    store_lanes<w>(deviations + c, sum, n);
    store_lanes<w>(squares + c, square, n);
  });
  for (int64_t c = 0; c < part.width; ++c) {
    moments[part.offset + c].merge(rows, shift[c], deviations[c], squares[c]);
  }
}

template <class T, bool with_silu, bool with_dropout>
inline void forward_unit(const Forward& norm, int64_t sample, int64_t first_group, int64_t last_group,
                         const Affine& affine, Scratch& scratch) {
  const int64_t channels = norm.group_channels(), first = first_group * channels, last = last_group * channels;
  const int64_t width = last - first;
  const bool adds = norm.residual != nullptr;
  const auto part = [&](auto* image, int which) {
    return part_of(image, norm.channels[which], which ? norm.channels[0] : 0, sample, norm.space, first, last);
  };
  const Part<const T> x[2] = {part(static_cast<const T*>(adds ? norm.summed : norm.x), 0),
                              part(static_cast<const T*>(norm.skip), 1)};
  const Part<T> y = part_of(static_cast<T*>(norm.y), norm.all_channels(), 0, sample, norm.space, first, last);
  const Coefficients coefficients{scratch.take<float>(width), scratch.take<float>(width), scratch.take<float>(width)};
  Moments* const moments = scratch.take<Moments>(width);
  float* const keep = scratch.take<float>(with_dropout ? block_rows * tile_channels : 0);

  for (int64_t c = 0; c < width; ++c) moments[c] = Moments();
  if (adds) {
    const Part<const T> plain = part(static_cast<const T*>(norm.x), 0);
    const Part<const T> residual = part(static_cast<const T*>(norm.residual), 0);
    const Part<T> summed = part(static_cast<T*>(norm.summed), 0);
    for_blocks(norm.space, [&](int64_t from, int64_t to) {
      for (int64_t r = from; r < to; ++r) add_run(plain.row(r), residual.row(r), summed.row(r), width);
      merge_part(x[0], from, to, coefficients.mean, coefficients.scale, coefficients.shift, moments);
    });
  } else {
    for (const auto& image : x) {
      for_blocks(norm.space, [&](int64_t from, int64_t to) {
        merge_part(image, from, to, coefficients.mean, coefficients.scale, coefficients.shift, moments);
      });
    }
  }

  const float *scale = affine.scale[norm.num_modulations], *shift = affine.shift[norm.num_modulations];
  for (int64_t group = first_group; group < last_group; ++group) {
    const int64_t begin = group * channels - first;
    double mean = 0, squares = 0;
    for (int64_t c = begin; c < begin + channels; ++c) mean += moments[c].mean() / static_cast<double>(channels);
    for (int64_t c = begin; c < begin + channels; ++c) {
      const double delta = moments[c].mean() - mean;
      squares += moments[c].squares() + moments[c].count * delta * delta;
    }
    const Normalization normal(mean, squares, static_cast<double>(channels * norm.space), norm.eps);
    norm.mean[sample * norm.groups + group] = normal.mean;
    norm.rstd[sample * norm.groups + group] = normal.rstd;
    for (int64_t c = begin; c < begin + channels; ++c) {
      coefficients.mean[c] = normal.mean;
      coefficients.scale[c] = scale[c] * normal.rstd;
      coefficients.shift[c] = shift[c] - normal.mean_error * coefficients.scale[c];
    }
  }

  for (const auto& image : x) {
    for_tiles<with_dropout>(norm, sample, first, image, keep, [&](int64_t from, int64_t to, int64_t tile, int64_t tile_width,
                                                                  const float* kept) {
      const int64_t at = image.offset + tile;
      for_rows(from, to, tile_width, [&](auto step, int64_t row, int64_t c, int64_t n) {
        constexpr bool w = decltype(step)::whole;
        const Floats mean = load(coefficients.mean + at + c), a = load(coefficients.scale + at + c),
                     b = load(coefficients.shift + at + c);
        for (int r = 0; r < decltype(step)::rows; ++r) {
          Floats value = (load_lanes<w>(image.row(row + r) + tile + c, n) - mean) * a + b;
          if constexpr (with_silu) value = silu(value);
          if constexpr (with_dropout) value *= load(kept + (row + r - from) * tile_channels + c);
          store_lanes<w>(y.row(row + r) + at + c, value, n);
        }
      });
    });
  }
}

template <class T, bool with_silu, bool with_dropout>
inline void backward_unit(const Backward& norm, int64_t sample, int64_t first_group, int64_t last_group,
                          const Affine& affine, Scratch& scratch) {
  const int64_t channels = norm.group_channels(), first = first_group * channels, last = last_group * channels;
  const int64_t width = last - first;
  const auto part = [&](auto* image, int which) {
    return part_of(image, norm.channels[which], which ? norm.channels[0] : 0, sample, norm.space, first, last);
  };
  const Part<const T> x[2] = {part(static_cast<const T*>(norm.x), 0), part(static_cast<const T*>(norm.skip), 1)};
  const Part<T> dx[2] = {part(static_cast<T*>(norm.dx), 0), part(static_cast<T*>(norm.dskip), 1)};
  const Part<const T> dy = part_of(static_cast<const T*>(norm.dy), norm.all_channels(), 0, sample, norm.space, first, last);
  const Part<const T> dsummed = part(static_cast<const T*>(norm.dsummed), 0);
  const bool adds = norm.dsummed != nullptr;
  const Coefficients coefficients{scratch.take<float>(width), scratch.take<float>(width), scratch.take<float>(width)};
  float *const slope = scratch.take<float>(width), *const constant = scratch.take<float>(width);
  float *const plain = scratch.take<float>(width), *const weighted = scratch.take<float>(width);
  double *const dshift_sum = scratch.take<double>(width), *const dscale_sum = scratch.take<double>(width);
  float* const keep = scratch.take<float>(with_dropout ? block_rows * tile_channels : 0);

  const float *scale = affine.scale[norm.num_modulations], *shift = affine.shift[norm.num_modulations];
  for (int64_t c = 0; c < width; ++c) {
    const int64_t group = sample * norm.groups + (first + c) / channels;
    coefficients.mean[c] = norm.mean[group];
    coefficients.scale[c] = scale[c] * norm.rstd[group];
    coefficients.shift[c] = shift[c];
    plain[c] = weighted[c] = 0.0f;
    dshift_sum[c] = dscale_sum[c] = 0.0;
  }

  // The gradient before the activation, from x - mean.
  const auto before_activation = [&](auto whole, const T* gradient, const float* kept, Floats centered, Floats a, Floats b,
                                     int64_t n) {
    Floats value = load_lanes<decltype(whole)::value>(gradient, n);
    if constexpr (with_dropout) value *= load(kept);
    if constexpr (with_silu) value *= silu_derivative(centered * a + b);
    return value;
  };

  for (const auto& image : x) {
    for_tiles<with_dropout>(norm, sample, first, image, keep, [&](int64_t from, int64_t to, int64_t tile, int64_t tile_width,
                                                                  const float* kept) {
      const int64_t at = image.offset + tile;
      for_rows(from, to, tile_width, [&](auto step, int64_t row, int64_t c, int64_t n) {
        constexpr bool w = decltype(step)::whole;
        const Floats mean = load(coefficients.mean + at + c), a = load(coefficients.scale + at + c),
                     b = load(coefficients.shift + at + c);
        Floats plain_lanes = load_lanes<w>(plain + at + c, n), weighted_lanes = load_lanes<w>(weighted + at + c, n);
        for (int r = 0; r < decltype(step)::rows; ++r) {
          const Floats centered = load_lanes<w>(image.row(row + r) + tile + c, n) - mean;
          const Floats dp = before_activation(Whole<w>{}, dy.row(row + r) + at + c,
                                              kept + (row + r - from) * tile_channels + c, centered, a, b, n);
          plain_lanes += dp;
          weighted_lanes += dp * centered;
        }
        store_lanes<w>(plain + at + c, plain_lanes, n);
        store_lanes<w>(weighted + at + c, weighted_lanes, n);
      });
      for (int64_t c = at; c < at + tile_width; ++c) {
        dshift_sum[c] += plain[c], dscale_sum[c] += weighted[c];
        plain[c] = weighted[c] = 0.0f;
      }
    });
  }

  const double elements = static_cast<double>(channels * norm.space);
  for (int64_t group = first_group; group < last_group; ++group) {
    const double rstd = norm.rstd[sample * norm.groups + group];
    const int64_t begin = group * channels - first;
    double sum_dshift = 0, sum_dscale = 0;
    for (int64_t c = begin; c < begin + channels; ++c) {
      sum_dshift += scale[c] * dshift_sum[c];
      sum_dscale += scale[c] * dscale_sum[c] * rstd;
    }
    for (int64_t c = begin; c < begin + channels; ++c) {
      constant[c] = static_cast<float>(-sum_dshift / elements * rstd);
      slope[c] = static_cast<float>(-sum_dscale / elements * rstd * rstd);
      plain[c] = static_cast<float>(dshift_sum[c]);
      weighted[c] = static_cast<float>(dscale_sum[c] * rstd);
    }
  }

  for (int which = 0; which < 2; ++which) {
    const Part<const T>& image = x[which];
    for_tiles<with_dropout>(norm, sample, first, image, keep, [&](int64_t from, int64_t to, int64_t tile, int64_t tile_width,
                                                                  const float* kept) {
      const int64_t at = image.offset + tile;
      for_rows(from, to, tile_width, [&](auto step, int64_t row, int64_t c, int64_t n) {
        constexpr bool w = decltype(step)::whole;
        const Floats mean = load(coefficients.mean + at + c), a = load(coefficients.scale + at + c),
                     b = load(coefficients.shift + at + c), k = load(slope + at + c), offset = load(constant + at + c);
        for (int r = 0; r < decltype(step)::rows; ++r) {
          const Floats centered = load_lanes<w>(image.row(row + r) + tile + c, n) - mean;
          const Floats dp = before_activation(Whole<w>{}, dy.row(row + r) + at + c,
                                              kept + (row + r - from) * tile_channels + c, centered, a, b, n);
          Floats value = dp * a + (centered * k + offset);
          if (adds) value += load_lanes<w>(dsummed.row(row + r) + tile + c, n);
          store_lanes<w>(dx[which].row(row + r) + tile + c, value, n);
        }
      });
    });
  }
  unfold(norm, sample, first, width, affine, weighted, plain, scratch.take<float>(width));
}

}  // namespace soda::SODA_ISA::channels_last
