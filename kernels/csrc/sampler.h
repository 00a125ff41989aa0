// A sampler step, tile by tile: guidance, x0, clipping, the step and its noise in one pass over the images.
#pragma once

#include <optional>
#include <type_traits>

#include "moments.h"
#include "noising.h"

namespace soda::SODA_ISA {

// uncond + scale (cond - uncond)
SODA_INLINE Floats guided(Floats cond, Floats uncond, float scale) { return uncond + (cond - uncond) * scale; }

template <class T>
inline void sampler_step_in(const SamplerStep& call, int64_t first_tile, int64_t last_tile) {
  char buffer[scratch_on_stack];
  Scratch scratch(call.draws ? Noise::scratch_bytes(call.images) : 0, buffer);
  std::optional<Noise> noise;
  if (call.draws) noise.emplace(call.images, scratch);
  const auto step_of_tile = [&](int64_t sample, int64_t places, int64_t element, const float* normal) {
    const auto at = [&](const void* image) { return static_cast<const T*>(image) + element; };
    const T *const x_t = at(call.x_t), *const cond = at(call.cond);
    T *const x_next = static_cast<T*>(call.x_next) + element, *const x0 = static_cast<T*>(call.x0) + element;
    const float rescale = call.rescale ? call.rescale[sample] : 1.0f;
    const auto pass = [&](auto in_order) {
      for_vectors(places * call.images.channels, [&](auto step, int64_t i, int64_t n) {
        constexpr int count = step.count;
        Floats noisy[count], clean[count], other[count];
        load_step<in_order>(step, x_t + i, n, noisy);
        load_step<in_order>(step, cond + i, n, clean);
        if (call.uncond) {
          load_step<in_order>(step, at(call.uncond) + i, n, other);
          for (int k = 0; k < count; ++k) clean[k] = guided(clean[k], other[k], call.cfg_scale) * rescale;
        }
        if (!call.x0_is_prediction) {
          for (int k = 0; k < count; ++k) clean[k] = (noisy[k] * call.signal - clean[k] * call.noise_of_x_t) * call.gain;
        }
        for (int k = 0; k < count; ++k) {
          clean[k] = at_most(call.clip, at_least(-call.clip, clean[k]));
          noisy[k] = noisy[k] * call.of_x_t + clean[k] * call.of_x0;
        }
        store_step<in_order>(step, x0 + i, n, clean);
        if (call.previous_x0) {
          load_step<in_order>(step, at(call.previous_x0) + i, n, other);
          for (int k = 0; k < count; ++k) noisy[k] += other[k] * call.of_previous;
        }
        if constexpr (in_order) {
          for (int k = 0; k < count; ++k) noisy[k] += load_lanes<step.whole>(normal + i + k * lanes, n) * call.of_noise;
        }
        store_step<in_order>(step, x_next + i, n, noisy);
      });
    };
    if (normal) pass(std::true_type{});
    else pass(std::false_type{});
  };
  if (!call.draws) {
    return for_tiles(call.images, first_tile, last_tile, [&](int64_t sample, int64_t, int64_t places, int64_t element) {
      step_of_tile(sample, places, element, nullptr);
    });
  }
  for_noisy_tiles(call.key, call.images, first_tile, last_tile,
                  [&](int64_t sample, const Philox& philox, int64_t place, int64_t places, int64_t element) {
    step_of_tile(sample, places, element, noise->draw(philox, place, places));
  });
}

// Add a run of floats, seen from `shift`, one of the sample's numbers; the array has room for pairs of whole vectors.
// In double squares neither overflow nor underflow, and a shift that lies far off costs no digits that a float has: its
// own squared deviation is one of the sum's.
inline void merge_run_in_double(float shift, float* x, int64_t length, Moments* moments) {
  for (int64_t i = length; i % (2 * lanes); ++i) x[i] = shift;
  const Doubles origin = Doubles{} + static_cast<double>(shift);
  Doubles deviations[4] = {}, squares[4] = {};
  for (int64_t i = 0; i < length; i += 2 * lanes) {
    Doubles half[4];
    widen_halves(load(x + i), &half[0], &half[1]);
    widen_halves(load(x + i + lanes), &half[2], &half[3]);
    for (int k = 0; k < 4; ++k) {
      half[k] -= origin;
      deviations[k] += half[k];
      squares[k] += half[k] * half[k];
    }
  }
  double sum_of_deviations = 0.0, sum_of_squares = 0.0;
  for (int k = 0; k < 4; ++k) {
    for (int i = 0; i < lanes / 2; ++i) sum_of_deviations += deviations[k][i], sum_of_squares += squares[k][i];
  }
  moments->merge(static_cast<double>(length), shift, sum_of_deviations, sum_of_squares);
}

// The squared deviations of samples, from their means, of cond and of the guided prediction.
template <class T>
inline void deviations_in(const SamplerStep& call, int64_t first_sample, int64_t last_sample) {
  constexpr int64_t run = 1024;
  float cond[run], both[run];
  const int64_t elements = call.images.elements();
  const auto at_least_zero = [](double x) { return x < 0.0 ? 0.0 : x; };  // a NaN stays one
  for (int64_t sample = first_sample; sample < last_sample; ++sample) {
    Moments of_cond, of_both;
    float cond_shift = 0.0f, both_shift = 0.0f;  // the first number: of a sample that does not vary nothing is left
    for (int64_t first = 0; first < elements; first += run) {
      const int64_t length = elements - first < run ? elements - first : run, at = sample * elements + first;
      for_vectors(length, [&](auto step, int64_t i, int64_t n) {
        for (int k = 0; k < step.count; ++k, i += lanes) {
          const Floats value = load_lanes<step.whole>(static_cast<const T*>(call.cond) + at + i, n);
          const Floats other = load_lanes<step.whole>(static_cast<const T*>(call.uncond) + at + i, n);
          store_lanes<step.whole>(cond + i, value, n);
          store_lanes<step.whole>(both + i, guided(value, other, call.cfg_scale), n);
        }
      });
      if (first == 0) cond_shift = cond[0], both_shift = both[0];
      merge_run_in_double(cond_shift, cond, length, &of_cond);
      merge_run_in_double(both_shift, both, length, &of_both);
    }
    call.deviations[2 * sample] = at_least_zero(of_cond.squares());
    call.deviations[2 * sample + 1] = at_least_zero(of_both.squares());
  }
}

}  // namespace soda::SODA_ISA
