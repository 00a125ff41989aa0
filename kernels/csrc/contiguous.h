// The units of images whose places lie together (NCHW): a group is one run of memory, or two where a pair meets in it.
#pragma once

#include "unit.h"

namespace soda::SODA_ISA::contiguous {

// Numbers summed at a time in fp32 before double takes over: 8 KiB of floats stay in the first-level cache for the
// second look at them, and sums stay short.
constexpr int64_t run_length = 2048;

// The plane of one channel of one sample in a pair of images, of which the second may have no channels.
template <class T>
struct Planes {
  T* image[2];
  int64_t channels[2], space;

  T* at(int64_t sample, int64_t channel) const {
    const int which = channel >= channels[0];
    return image[which] + (sample * channels[which] + channel - (which ? channels[0] : 0)) * space;
  }
};

template <class T>
inline void merge_run(const T* x, int64_t count, Moments* moments) {
  Floats total[4] = {};
  int64_t i = 0;
  for (; i + 4 * lanes <= count; i += 4 * lanes) {
    for (int k = 0; k < 4; ++k) total[k] += load(x + i + k * lanes);
  }
  for_vectors(count - i, [&](auto whole, int64_t j, int64_t n) {
    total[0] += load_lanes<decltype(whole)::value>(x + i + j, n);
  });
  const float shift = sum_of_lanes((total[0] + total[1]) + (total[2] + total[3])) / static_cast<float>(count);
  Floats deviations[4] = {}, squares[4] = {};
  i = 0;
  for (; i + 4 * lanes <= count; i += 4 * lanes) {
    for (int k = 0; k < 4; ++k) {
      const Floats centered = load(x + i + k * lanes) - shift;
      deviations[k] += centered;
      squares[k] += centered * centered;
    }
  }
  for (; i < count; ++i) {
    const float centered = widen(x[i]) - shift;
    deviations[0][0] += centered;
    squares[0][0] += centered * centered;
  }
  moments->merge(static_cast<double>(count), shift,
                 sum_of_lanes((deviations[0] + deviations[1]) + (deviations[2] + deviations[3])),
                 sum_of_lanes((squares[0] + squares[1]) + (squares[2] + squares[3])));
}

template <class T, bool with_silu, bool with_dropout>
inline void forward_unit(const Forward& norm, int64_t sample, int64_t first_group, int64_t last_group,
                         const Affine& affine, Scratch& scratch) {
  const int64_t space = norm.space, channels = norm.group_channels(), all = norm.all_channels();
  const bool adds = norm.residual != nullptr;
  const Planes<const T> x{{static_cast<const T*>(adds ? norm.summed : norm.x), static_cast<const T*>(norm.skip)},
                          {norm.channels[0], norm.channels[1]}, space};
  T* const y = static_cast<T*>(norm.y) + sample * all * space;
  const float *scale = affine.scale[norm.num_modulations], *shift = affine.shift[norm.num_modulations];
  float* const keep = scratch.take<float>(with_dropout ? run_length : 0);
  const PhiloxKey key = with_dropout ? dropout_key(norm.dropout, sample) : PhiloxKey{};

  for (int64_t group = first_group; group < last_group; ++group) {
    const int64_t begin = group * channels, end = begin + channels;
    Moments moments;
    for (int64_t c = begin; c < end;) {
      const int64_t stop = c < norm.channels[0] && norm.channels[0] < end ? norm.channels[0] : end;
      const T* const from = x.at(sample, c);
      const int64_t offset = (sample * norm.channels[0] + c) * space, count = (stop - c) * space;
      for (int64_t i = 0; i < count; i += run_length) {
        const int64_t length = count - i < run_length ? count - i : run_length;
        if (adds) {
          add_run(static_cast<const T*>(norm.x) + offset + i, static_cast<const T*>(norm.residual) + offset + i,
                  static_cast<T*>(norm.summed) + offset + i, length);
        }
        merge_run(from + i, length, &moments);
      }
      c = stop;
    }
    const Normalization normal(moments.mean(), moments.squares(), moments.count, norm.eps);
    norm.mean[sample * norm.groups + group] = normal.mean;
    norm.rstd[sample * norm.groups + group] = normal.rstd;

    for (int64_t c = begin; c < end; ++c) {
      const float a = scale[c - first_group * channels] * normal.rstd;
      const float b = shift[c - first_group * channels] - normal.mean_error * a;
      const T* const from = x.at(sample, c);
      for (int64_t start = 0; start < space; start += run_length) {
        const int64_t length = space - start < run_length ? space - start : run_length;
        if constexpr (with_dropout) keep_run(norm.dropout, key, c * space + start, length, keep);
        for_vectors(length, [&](auto whole, int64_t i, int64_t n) {
          constexpr bool w = decltype(whole)::value;
          Floats value = (load_lanes<w>(from + start + i, n) - normal.mean) * a + b;
          if constexpr (with_silu) value = silu(value);
          if constexpr (with_dropout) value *= load_lanes<w>(keep + i, n);
          store_lanes<w>(y + c * space + start + i, value, n);
        });
      }
    }
  }
}

template <class T, bool with_silu, bool with_dropout>
inline void backward_unit(const Backward& norm, int64_t sample, int64_t first_group, int64_t last_group,
                          const Affine& affine, Scratch& scratch) {
  const int64_t space = norm.space, channels = norm.group_channels(), all = norm.all_channels();
  const int64_t first_channel = first_group * channels, width = (last_group - first_group) * channels;
  const Planes<const T> x{{static_cast<const T*>(norm.x), static_cast<const T*>(norm.skip)},
                          {norm.channels[0], norm.channels[1]}, space};
  const Planes<T> dx{{static_cast<T*>(norm.dx), static_cast<T*>(norm.dskip)}, {norm.channels[0], norm.channels[1]}, space};
  const T* const dy = static_cast<const T*>(norm.dy) + sample * all * space;
  const T* const dsummed = static_cast<const T*>(norm.dsummed);
  const float *scale = affine.scale[norm.num_modulations], *shift = affine.shift[norm.num_modulations];
  float* const keep = scratch.take<float>(with_dropout ? run_length : 0);
  float *const dscale = scratch.take<float>(width), *const dshift = scratch.take<float>(width);
  const PhiloxKey key = with_dropout ? dropout_key(norm.dropout, sample) : PhiloxKey{};

  // The gradient before the activation, from x - mean.
  const auto before_activation = [&](auto whole, const T* gradient, const float* kept, Floats centered, float a, float b,
                                     int64_t n) {
    constexpr bool w = decltype(whole)::value;
    Floats value = load_lanes<w>(gradient, n);
    if constexpr (with_dropout) value *= load_lanes<w>(kept, n);
    if constexpr (with_silu) value *= silu_derivative(centered * a + b);
    return value;
  };

  for (int64_t group = first_group; group < last_group; ++group) {
    const int64_t begin = group * channels, end = begin + channels;
    const float mean = norm.mean[sample * norm.groups + group], rstd = norm.rstd[sample * norm.groups + group];
    double sum_dshift = 0, sum_dscale = 0;
    for (int64_t c = begin; c < end; ++c) {
      const float a = scale[c - first_channel] * rstd, b = shift[c - first_channel];
      const T* const from = x.at(sample, c);
      double plain = 0, weighted = 0;
      for (int64_t start = 0; start < space; start += run_length) {
        const int64_t length = space - start < run_length ? space - start : run_length;
        if constexpr (with_dropout) keep_run(norm.dropout, key, c * space + start, length, keep);
        Floats plain_lanes{}, weighted_lanes{};
        for_vectors(length, [&](auto whole, int64_t i, int64_t n) {
          const Floats centered = load_lanes<decltype(whole)::value>(from + start + i, n) - mean;
          const Floats dp = before_activation(whole, dy + c * space + start + i, keep + i, centered, a, b, n);
          plain_lanes += dp;
          weighted_lanes += dp * centered;
        });
        plain += sum_of_lanes(plain_lanes);
        weighted += sum_of_lanes(weighted_lanes);
      }
      dshift[c - first_channel] = static_cast<float>(plain);
      dscale[c - first_channel] = static_cast<float>(weighted * rstd);
      sum_dshift += scale[c - first_channel] * plain;
      sum_dscale += scale[c - first_channel] * weighted * rstd;
    }
    const double elements = static_cast<double>(channels * space);
    const float constant = static_cast<float>(-sum_dshift / elements * rstd);
    const float slope = static_cast<float>(-sum_dscale / elements * rstd * rstd);
    for (int64_t c = begin; c < end; ++c) {
      const float a = scale[c - first_channel] * rstd, b = shift[c - first_channel];
      const T* const from = x.at(sample, c);
      T* const to = dx.at(sample, c);
      for (int64_t start = 0; start < space; start += run_length) {
        const int64_t length = space - start < run_length ? space - start : run_length;
        if constexpr (with_dropout) keep_run(norm.dropout, key, c * space + start, length, keep);
        for_vectors(length, [&](auto whole, int64_t i, int64_t n) {
          constexpr bool w = decltype(whole)::value;
          const Floats centered = load_lanes<w>(from + start + i, n) - mean;
          const Floats dp = before_activation(whole, dy + c * space + start + i, keep + i, centered, a, b, n);
          Floats value = dp * a + (centered * slope + constant);
          if (dsummed) value += load_lanes<w>(dsummed + (sample * all + c) * space + start + i, n);
          store_lanes<w>(to + start + i, value, n);
        });
      }
    }
  }
  unfold(norm, sample, first_channel, width, affine, dscale, dshift, scratch.take<float>(width));
}

}  // namespace soda::SODA_ISA::contiguous
