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

// Call f(first, length) for the runs of a plane.
template <class F>
inline void for_runs(int64_t space, F f) {
  for (int64_t first = 0; first < space; first += run_length) {
    f(first, space - first < run_length ? space - first : run_length);
  }
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
  const Philox numbers = with_dropout ? dropout_numbers(norm.dropout, sample) : Philox();

  const auto normalize = [&](int64_t group) {
    Moments moments;
    const int64_t end = (group + 1) * channels;
    for (int64_t c = group * channels; c < end;) {  // the channels in each image, whose planes follow one another
      const int64_t stop = c < norm.channels[0] && norm.channels[0] < end ? norm.channels[0] : end;
      const T* const from = x.at(sample, c);
      for_runs((stop - c) * space, [&](int64_t first, int64_t length) {
        if (adds) {
          const int64_t at = (sample * all + c) * space + first;
          add_run(static_cast<const T*>(norm.x) + at, static_cast<const T*>(norm.residual) + at,
                  norm.residual_scale, static_cast<T*>(norm.summed) + at, length);
        }
        merge_run(from + first, length, &moments);
      });
      c = stop;
    }
    const Normalization normal(moments.mean(), moments.squares(), moments.count, norm.eps);
    norm.mean[sample * norm.groups + group] = normal.mean;
    norm.rstd[sample * norm.groups + group] = normal.rstd;
    return normal;
  };
  // A few small groups at a time: the divisions and roots of one then wait beside the sums of the next.
  constexpr int64_t most = 8;
  const int64_t fitting = 2 * run_length / (channels * space), batch = fitting < 1 ? 1 : fitting < most ? fitting : most;
  const int64_t ahead = batch * channels * space;
  const auto apply = [&](int64_t c, const Normalization& normal) {
    const float a = scale[c - first_group * channels] * normal.rstd;
    const float b = shift[c - first_group * channels] - normal.mean_error * a;
    for_runs(space, [&](int64_t first, int64_t length) {
      const T* const from = x.at(sample, c) + first;
      T* const to = y + c * space + first;
      if constexpr (with_dropout) keep_run(norm.dropout, numbers, c * space + first, length, keep);
      for_vectors(length, [&](auto step, int64_t i, int64_t n) {
        Floats value[step.count];
        prefetch_step(step, from + i + ahead);
        load_step<with_dropout>(step, from + i, n, value);
        for (int k = 0; k < step.count; ++k) value[k] = (value[k] - normal.mean) * a + b;
        if constexpr (with_silu) silu<is_coarse<T>>(value);
        if constexpr (with_dropout) {
          for (int k = 0; k < step.count; ++k) value[k] *= load_lanes<step.whole>(keep + i + k * lanes, n);
        }
        store_step<with_dropout>(step, to + i, n, value);
      });
    });
  };

  Normalization normal[most];
  for (int64_t group = first_group; group < last_group; group += batch) {
    const int64_t count = last_group - group < batch ? last_group - group : batch;
    for (int64_t g = 0; g < count; ++g) normal[g] = normalize(group + g);
    for (int64_t g = 0; g < count; ++g) {
      for (int64_t c = (group + g) * channels; c < (group + g + 1) * channels; ++c) apply(c, normal[g]);
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
  const T* const dsummed = norm.dsummed ? static_cast<const T*>(norm.dsummed) + sample * all * space : nullptr;
  const float *scale = affine.scale[norm.num_modulations], *shift = affine.shift[norm.num_modulations];
  float* const keep = scratch.take<float>(with_dropout ? run_length : 0);
  float *const dscale = scratch.take<float>(width), *const dshift = scratch.take<float>(width);
  float* const dp = scratch.take<float>(channels * space);  // of a group: the gradient before the activation
  const Philox numbers = with_dropout ? dropout_numbers(norm.dropout, sample) : Philox();

  const int64_t ahead = channels * space;
  const bool past_caches = streams<T>(norm, space, norm.dx, norm.dskip);
  for (int64_t group = first_group; group < last_group; ++group) {
    const int64_t begin = group * channels, end = begin + channels;
    const float mean = norm.mean[sample * norm.groups + group], rstd = norm.rstd[sample * norm.groups + group];
    double sum_dshift = 0, sum_dscale = 0;
    for (int64_t c = begin; c < end; ++c) {
      const float a = scale[c - first_channel] * rstd, b = shift[c - first_channel];
      double plain = 0, weighted = 0;
      for_runs(space, [&](int64_t first, int64_t length) {
        const T *const from = x.at(sample, c) + first, *const gradient = dy + c * space + first;
        float* const to = dp + (c - begin) * space + first;
        if constexpr (with_dropout) keep_run(norm.dropout, numbers, c * space + first, length, keep);
        Floats plain_lanes[4] = {}, weighted_lanes[4] = {};
        for_vectors(length, [&](auto step, int64_t i, int64_t n) {
          Floats value[step.count], centered[step.count], slope[step.count];
          prefetch_step(step, from + i + ahead);
          prefetch_step(step, gradient + i + ahead);
          load_step<with_dropout>(step, from + i, n, centered);
          load_step<with_dropout>(step, gradient + i, n, value);
          for (int k = 0; k < step.count; ++k) {
            centered[k] = centered[k] - mean;
            slope[k] = centered[k] * a + b;
          }
          if constexpr (with_silu) silu_derivative<is_coarse<T>>(slope);
          for (int k = 0; k < step.count; ++k) {
            if constexpr (with_dropout) value[k] *= load_lanes<step.whole>(keep + i + k * lanes, n);
            if constexpr (with_silu) value[k] *= slope[k];
            plain_lanes[k] += value[k];
            weighted_lanes[k] += value[k] * centered[k];
          }
          store_step<with_dropout>(step, to + i, n, value);
        });
        plain += sum_of_lanes(sum(plain_lanes));
        weighted += sum_of_lanes(sum(weighted_lanes));
      });
      dshift[c - first_channel] = static_cast<float>(plain);
      dscale[c - first_channel] = static_cast<float>(weighted * rstd);
      sum_dshift += scale[c - first_channel] * plain;
      sum_dscale += scale[c - first_channel] * weighted * rstd;
    }
    const double elements = static_cast<double>(channels * space);
    const float outer = norm.residual_scale;
    const float constant = static_cast<float>(-sum_dshift / elements * rstd * outer);
    const float slope = static_cast<float>(-sum_dscale / elements * rstd * rstd * outer);
    for (int64_t c = begin; c < end; ++c) {
      const float a = scale[c - first_channel] * rstd * outer;
      const T* const from = x.at(sample, c);
      const float* const gradient = dp + (c - begin) * space;
      T* const to = dx.at(sample, c);
      for_vectors(space, [&](auto step, int64_t i, int64_t n) {
        Floats value[step.count], centered[step.count], direct[step.count];
        load_step<with_dropout>(step, gradient + i, n, value);
        load_step<with_dropout>(step, from + i, n, centered);
        for (int k = 0; k < step.count; ++k) value[k] = value[k] * a + ((centered[k] - mean) * slope + constant);
        if (dsummed) {
          load_step<with_dropout>(step, dsummed + c * space + i, n, direct);
          for (int k = 0; k < step.count; ++k) value[k] += direct[k] * outer;
        }
        if (past_caches) stream_step<with_dropout>(step, to + i, n, value);
        else store_step<with_dropout>(step, to + i, n, value);
      });
    }
  }
  if (past_caches) end_stream();
  unfold(norm, sample, first_channel, width, affine, dscale, dshift, scratch.take<float>(width));
}

}  // namespace soda::SODA_ISA::contiguous
