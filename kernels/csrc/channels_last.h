// The units of images whose channels lie together (NHWC): a unit is a slab of channels, all of its places, and the
// vectors run along the channels, so that a sum over space is a sum over rows in each lane.
#pragma once

#include <numeric>
#include <type_traits>

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

// Call f(Tile) for the tiles of a part; without dropout there is one tile a block.
template <bool with_dropout, class T, class F>
inline void for_tiles(const GroupNorm& norm, int64_t sample, int64_t first_channel, const Part<T>& part, float* keep,
                      F f) {
  const int64_t most = with_dropout ? tile_channels : part.width;
  const Philox numbers = with_dropout ? dropout_numbers(norm.dropout, sample) : Philox();
  for_blocks(norm.space, [&](int64_t first, int64_t last) {
    for (int64_t c = 0; c < part.width; c += most) {
      const int64_t width = part.width - c < most ? part.width - c : most;
      if constexpr (with_dropout) {
        keep_tile(norm.dropout, numbers, norm.space, first, last - first, first_channel + part.offset + c, width, keep,
                  tile_channels);
      }
      f(Tile{first, last, c, width, keep});
    }
  });
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

// Moments as in unit.h of every channel of the slab, in arrays.
struct ChannelMoments {
  double *origin, *first, *second, *within;

  ChannelMoments(int64_t width, Scratch& scratch)
      : origin(scratch.take<double>(width)), first(scratch.take<double>(width)), second(scratch.take<double>(width)),
        within(scratch.take<double>(width)) {}
};

// The moments of a block's rows into those of the channels; the three arrays are workspace, of which the first is handed
// from block to block. A column of rows is walked down with its sums in registers: twice in the first block, around its
// own mean, which the second look takes from the first-level cache; once in the others, around the mean of the block
// before. If means differ by d between the two, rows d^2 are added to the squares and subtracted again, and the channel's
// own squares are no less than half of that: rounding is seen at most threefold.
template <class T>
inline void merge_block(const Part<const T>& part, int64_t first, int64_t last, const Coefficients& workspace,
                        const ChannelMoments& moments) {
  float *const shift = workspace.mean, *const deviations = workspace.scale, *const squares = workspace.shift;
  const float rows = static_cast<float>(last - first);
  for_vectors(part.width, [&](auto step, int64_t c, int64_t n) {
    Floats center[step.count] = {}, deviation[step.count] = {}, square[step.count] = {};
    if (first == 0) {
      for (int64_t row = first; row < last; ++row) {
        for (int v = 0; v < step.count; ++v) center[v] += load_lanes<step.whole>(part.row(row) + c + v * lanes, n);
      }
      for (int v = 0; v < step.count; ++v) {
        center[v] /= rows;
        store_lanes<step.whole>(shift + c + v * lanes, center[v], n);
      }
    } else {
      for (int v = 0; v < step.count; ++v) center[v] = load_lanes<step.whole>(shift + c + v * lanes, n);
    }
    for (int64_t row = first; row < last; ++row) {
      for (int v = 0; v < step.count; ++v) {
        const Floats centered = load_lanes<step.whole>(part.row(row) + c + v * lanes, n) - center[v];
        deviation[v] += centered;
        square[v] += centered * centered;
      }
    }
    for (int v = 0; v < step.count; ++v) {
      store_lanes<step.whole>(deviations + c + v * lanes, deviation[v], n);
      store_lanes<step.whole>(squares + c + v * lanes, square[v], n);
    }
  });
  double *const origin = moments.origin + part.offset, *const sum_first = moments.first + part.offset;
  double *const sum_second = moments.second + part.offset, *const within = moments.within + part.offset;
  const double count = rows, share = 1.0 / count;
  if (first == 0) {
    for (int64_t c = 0; c < part.width; ++c) {
      const double excess = deviations[c] * share;
      origin[c] = shift[c] + excess;
      sum_first[c] = sum_second[c] = 0.0;
      within[c] = squares[c] - deviations[c] * excess;
    }
    return;
  }
  for (int64_t c = 0; c < part.width; ++c) {
    const double excess = deviations[c] * share, mean = shift[c] + excess;
    const double delta = mean - origin[c];
    sum_first[c] += count * delta;
    sum_second[c] += count * delta * delta;
    within[c] += squares[c] - deviations[c] * excess;
    shift[c] = static_cast<float>(mean);
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
  const Coefficients coefficients(width, scratch);
  const ChannelMoments moments(width, scratch);
  float* const keep = scratch.take<float>(with_dropout ? block_rows * tile_channels : 0);

  for (const auto& image : x) {
    for_blocks(norm.space, [&](int64_t from, int64_t to) {
      if (adds && image.width) {
        const Part<const T> plain = part(static_cast<const T*>(norm.x), 0);
        const Part<const T> residual = part(static_cast<const T*>(norm.residual), 0);
        const Part<T> summed = part(static_cast<T*>(norm.summed), 0);
        for (int64_t r = from; r < to; ++r) {
          add_run(plain.row(r), residual.row(r), norm.residual_scale, summed.row(r), width);
        }
      }
      merge_block(image, from, to, coefficients, moments);
    });
  }

  const float *scale = affine.scale[norm.num_modulations], *shift = affine.shift[norm.num_modulations];
  const double share = 1.0 / static_cast<double>(norm.space);
  for (int64_t c = 0; c < width; ++c) {
    moments.origin[c] += moments.first[c] * share;  // now the channel's mean, and its squares around that
    moments.within[c] += moments.second[c] - moments.first[c] * moments.first[c] * share;
  }
  for (int64_t group = first_group; group < last_group; ++group) {
    const int64_t begin = group * channels - first, end = begin + channels;
    const double mean = sum_over(begin, end, [&](int64_t c) { return moments.origin[c]; }) / static_cast<double>(channels);
    const double squares = sum_over(begin, end, [&](int64_t c) {
      const double delta = moments.origin[c] - mean;
      return moments.within[c] + static_cast<double>(norm.space) * delta * delta;
    });
    const Normalization normal(mean, squares, static_cast<double>(channels * norm.space), norm.eps);
    norm.mean[sample * norm.groups + group] = normal.mean;
    norm.rstd[sample * norm.groups + group] = normal.rstd;
    for (int64_t c = begin; c < end; ++c) {
      coefficients.mean[c] = normal.mean;
      coefficients.scale[c] = scale[c] * normal.rstd;
      coefficients.shift[c] = shift[c] - normal.mean_error * coefficients.scale[c];
    }
  }

  const bool past_caches = streams<T>(norm, std::gcd(norm.channels[0], norm.channels[1]), norm.y);
  const auto apply = [&](const Part<const T>& image, auto past) {
    // To the next slab, which the moments are summed from next. On an EPYC of the Zen 3 generation, with its slabs larger
    // than the second-level cache, asking made no difference.
    const int64_t ahead = last < norm.all_channels() ? image.width : (norm.space - 1) * image.stride + image.width;
    for_tiles<with_dropout>(norm, sample, first, image, keep, [&](const Tile& tile) {
      const int64_t at = image.offset + tile.channel;
      for_rows(tile.first, tile.last, tile.width, [&](auto step, int64_t row, int64_t c, int64_t n) {
        const Floats mean = load(coefficients.mean + at + c), a = load(coefficients.scale + at + c),
                     b = load(coefficients.shift + at + c);
        Floats value[step.count];
        for (int r = 0; r < step.count; ++r) {
          prefetch(image.row(row + r) + tile.channel + c + ahead);
          value[r] = (load_lanes<step.whole>(image.row(row + r) + tile.channel + c, n) - mean) * a + b;
        }
        if constexpr (with_silu) silu<is_coarse<T>>(value);
        for (int r = 0; r < step.count; ++r) {
          if constexpr (with_dropout) value[r] *= load(tile.factors(row + r) + c);
          put<step.whole>(y.row(row + r) + at + c, value[r], n, past.value);
        }
      });
    });
  };
  for (const auto& image : x) {
    if (past_caches) apply(image, std::true_type{});
    else apply(image, std::false_type{});
  }
  if (past_caches) end_stream();
}

template <class T, bool with_silu, bool with_dropout>
inline void backward_unit(const Backward& norm, int64_t sample, int64_t first_group, int64_t last_group,
                          const Affine& affine, Scratch& scratch) {
  const int64_t channels = norm.group_channels(), first = first_group * channels, last = last_group * channels;
  const int64_t width = last - first;
  const bool adds = norm.dsummed != nullptr;
  const auto part = [&](auto* image, int which) {
    return part_of(image, norm.channels[which], which ? norm.channels[0] : 0, sample, norm.space, first, last);
  };
  const Part<const T> x[2] = {part(static_cast<const T*>(norm.x), 0), part(static_cast<const T*>(norm.skip), 1)};
  const Part<T> dx[2] = {part(static_cast<T*>(norm.dx), 0), part(static_cast<T*>(norm.dskip), 1)};
  const Part<const T> dy = part_of(static_cast<const T*>(norm.dy), norm.all_channels(), 0, sample, norm.space, first, last);
  const Part<const T> dsummed = part(static_cast<const T*>(norm.dsummed), 0);
  const Coefficients coefficients(width, scratch);
  float *const slope = scratch.take<float>(width), *const constant = scratch.take<float>(width);
  float *const plain = scratch.take<float>(width), *const weighted = scratch.take<float>(width);
  double *const plain_total = scratch.take<double>(width), *const weighted_total = scratch.take<double>(width);
  float* const keep = scratch.take<float>(with_dropout ? block_rows * tile_channels : 0);
  float* const dp = scratch.take<float>(width * norm.space);  // the gradient before the activation

  const float *scale = affine.scale[norm.num_modulations], *shift = affine.shift[norm.num_modulations];
  for (int64_t c = 0; c < width; ++c) {
    const int64_t group = sample * norm.groups + (first + c) / channels;
    coefficients.mean[c] = norm.mean[group];
    coefficients.scale[c] = scale[c] * norm.rstd[group];
    coefficients.shift[c] = shift[c];
    plain[c] = weighted[c] = 0.0f;
    plain_total[c] = weighted_total[c] = 0.0;
  }

  for (const auto& image : x) {
    for_tiles<with_dropout>(norm, sample, first, image, keep, [&](const Tile& tile) {
      const int64_t at = image.offset + tile.channel;
      for_rows(tile.first, tile.last, tile.width, [&](auto step, int64_t row, int64_t c, int64_t n) {
        const Floats mean = load(coefficients.mean + at + c), a = load(coefficients.scale + at + c),
                     b = load(coefficients.shift + at + c);
        Floats value[step.count], centered[step.count], derivative[step.count];
        for (int r = 0; r < step.count; ++r) {
          centered[r] = load_lanes<step.whole>(image.row(row + r) + tile.channel + c, n) - mean;
          derivative[r] = centered[r] * a + b;
        }
        if constexpr (with_silu) silu_derivative<is_coarse<T>>(derivative);
        for (int r = 0; r < step.count; ++r) {
          value[r] = load_lanes<step.whole>(dy.row(row + r) + at + c, n);
          if constexpr (with_dropout) value[r] *= load(tile.factors(row + r) + c);
          if constexpr (with_silu) value[r] *= derivative[r];
          store_lanes<step.whole>(dp + (row + r) * width + at + c, value[r], n);
          centered[r] *= value[r];
        }
        store_lanes<step.whole>(plain + at + c, load_lanes<step.whole>(plain + at + c, n) + sum(value), n);
        store_lanes<step.whole>(weighted + at + c, load_lanes<step.whole>(weighted + at + c, n) + sum(centered), n);
      });
      for (int64_t c = at; c < at + tile.width; ++c) {
        plain_total[c] += plain[c], weighted_total[c] += weighted[c];
        plain[c] = weighted[c] = 0.0f;
      }
    });
  }

  const double elements = static_cast<double>(channels * norm.space);
  const float outer = norm.residual_scale;
  for (int64_t group = first_group; group < last_group; ++group) {
    const double rstd = norm.rstd[sample * norm.groups + group];
    const int64_t begin = group * channels - first, end = begin + channels;
    const double dshift = sum_over(begin, end, [&](int64_t c) { return scale[c] * plain_total[c]; });
    const double dscale = sum_over(begin, end, [&](int64_t c) { return scale[c] * weighted_total[c]; }) * rstd;
    for (int64_t c = begin; c < end; ++c) {
      coefficients.scale[c] *= outer;
      constant[c] = static_cast<float>(-dshift / elements * rstd * outer);
      slope[c] = static_cast<float>(-dscale / elements * rstd * rstd * outer);
      plain[c] = static_cast<float>(plain_total[c]);
      weighted[c] = static_cast<float>(weighted_total[c] * rstd);
    }
  }

  const bool past_caches = streams<T>(norm, std::gcd(norm.channels[0], norm.channels[1]), norm.dx, norm.dskip);
  for (int which = 0; which < 2; ++which) {
    const Part<const T>& image = x[which];
    const int64_t at = image.offset;
    for_rows(0, norm.space, image.width, [&](auto step, int64_t row, int64_t c, int64_t n) {
      const Floats mean = load(coefficients.mean + at + c), a = load(coefficients.scale + at + c),
                   k = load(slope + at + c), offset = load(constant + at + c);
      for (int r = 0; r < step.count; ++r) {
        const Floats centered = load_lanes<step.whole>(image.row(row + r) + c, n) - mean;
        Floats value = load_lanes<step.whole>(dp + (row + r) * width + at + c, n) * a + (centered * k + offset);
        if (adds) value += load_lanes<step.whole>(dsummed.row(row + r) + c, n) * outer;
        put<step.whole>(dx[which].row(row + r) + c, value, n, past_caches);
      }
    });
  }
  if (past_caches) end_stream();
  unfold(norm, sample, first, width, affine, weighted, plain, scratch.take<float>(width));
}

}  // namespace soda::SODA_ISA::channels_last
