// The backward of images whose channels lie together.
#pragma once

#include "channels_last.h"

namespace soda::SODA_ISA::channels_last {

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
  const Part<const T> dsummed = adds ? part(static_cast<const T*>(norm.dsummed), 0) : Part<const T>{};
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
    for_blocks(norm.space, [&](int64_t from, int64_t to) {
      for_tiles<with_dropout>(norm, sample, first, image, from, to, keep, [&](const Tile& tile) {
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
            // Which of the products below a compiler fuses with their sum may differ between whole vectors and parts of
            // them, and with it the bits between one cut into units and another.
            centered[r] = rounded(centered[r] * value[r]);
          }
          store_lanes<step.whole>(plain + at + c, load_lanes<step.whole>(plain + at + c, n) + sum(value), n);
          store_lanes<step.whole>(weighted + at + c, load_lanes<step.whole>(weighted + at + c, n) + sum(centered), n);
        });
        for (int64_t c = at; c < at + tile.width; ++c) {
          plain_total[c] += plain[c], weighted_total[c] += weighted[c];
          plain[c] = weighted[c] = 0.0f;
        }
      });
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
