// Noising, the denoising loss and its gradient, tile by tile. Noise is drawn into the first-level cache and used there.
#pragma once

#include "noise.h"

namespace soda::SODA_ISA {

// Call f with a number of an image's type.
template <class F>
inline void with_type(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::float32: return f(float{});
    case Dtype::bfloat16: return f(BFloat16{});
    case Dtype::float16: return f(Half{});
  }
}

template <class F>
inline void with_type(const Image& image, F f) {
  if (image.is_pixels) return f(Pixel{});
  with_type(image.dtype, f);
}

inline Philox numbers_of(const NoiseKey& key, int64_t sample) {
  return Philox({key.seed, key.sample_id(sample), key.step_of(sample), key.stream});
}

// Call f(sample, place, places, element) for the tiles from first to last; `element` is the first one's index in an image.
template <class F>
inline void for_tiles(const Images& images, int64_t first_tile, int64_t last_tile, F f) {
  for (int64_t tile = first_tile; tile < last_tile; ++tile) {
    const int64_t sample = tile / images.tiles_of_sample(), place = tile % images.tiles_of_sample() * images.tile;
    const int64_t places = images.space - place < images.tile ? images.space - place : images.tile;
    f(sample, place, places, (sample * images.space + place) * images.channels);
  }
}

// As for_tiles, with the sample's random numbers before the place.
template <class F>
inline void for_noisy_tiles(const NoiseKey& key, const Images& images, int64_t first_tile, int64_t last_tile, F f) {
  Philox philox;
  int64_t last_sample = -1;
  for_tiles(images, first_tile, last_tile, [&](int64_t sample, int64_t place, int64_t places, int64_t element) {
    if (sample != last_sample) philox = numbers_of(key, sample), last_sample = sample;
    f(sample, philox, place, places, element);
  });
}

constexpr int64_t scratch_on_stack = 1 << 15;

template <class X0, class T>
inline void add_noise_in(const AddNoise& call, int64_t first_tile, int64_t last_tile) {
  char buffer[scratch_on_stack];
  Scratch scratch(Noise::scratch_bytes(call.images), buffer);
  Noise noise(call.images, scratch);
  for_noisy_tiles(call.key, call.images, first_tile, last_tile,
                  [&](int64_t sample, const Philox& philox, int64_t place, int64_t places, int64_t element) {
    const X0* const x0 = static_cast<const X0*>(call.x0.data) + element;
    T* const x_t = static_cast<T*>(call.x_t) + element;
    const float* const normal = noise.draw(philox, place, places);
    const Floats alpha = broadcast(call.alpha[sample]), sigma = broadcast(call.sigma[sample]);
    for_vectors(places * call.images.channels, [&](auto step, int64_t i, int64_t n) {
      for (int k = 0; k < step.count; ++k, i += lanes) {
        const Floats clean = load_lanes<step.whole>(x0 + i, n);
        store_lanes<step.whole>(x_t + i, load_lanes<step.whole>(normal + i, n) * sigma + clean * alpha, n);
      }
    });
  });
}

// The target of a tile in fp32: x0 itself, or what the noise and x0 make of v, in `out`.
template <class X0>
inline const float* target_of(Target target, const X0* x0, const float* normal, float alpha, float sigma, int64_t length,
                              float* out) {
  if (target == Target::eps) return normal;
  for_vectors(length, [&](auto step, int64_t i, int64_t n) {
    for (int k = 0; k < step.count; ++k, i += lanes) {
      Floats value = load_lanes<step.whole>(x0 + i, n);
      if (target == Target::v) value = load_lanes<step.whole>(normal + i, n) * alpha - value * sigma;
      store_lanes<step.whole>(out + i, value, n);
    }
  });
  return out;
}

// The error's squares and the gradient of a tile, each where it is asked for. Squares are summed in fp32 for short runs.
template <bool with_squares, bool with_gradient, class T>
inline double compare(const T* prediction, const float* target, float factor, T* gradient, int64_t length) {
  constexpr int64_t run = 512;
  double total = 0.0;
  for (int64_t first = 0; first < length; first += run) {
    Floats squares[4] = {};
    for_vectors(length - first < run ? length - first : run, [&](auto step, int64_t i, int64_t n) {
      i += first;
      for (int k = 0; k < step.count; ++k, i += lanes) {
        const Floats error = load_lanes<step.whole>(prediction + i, n) - load_lanes<step.whole>(target + i, n);
        if constexpr (with_squares) squares[k] += error * error;
        if constexpr (with_gradient) store_lanes<step.whole>(gradient + i, error * factor, n);
      }
    });
    if constexpr (with_squares) total += static_cast<double>(sum_of_lanes(sum(squares)));
  }
  return total;
}

template <class X0, class T>
inline void loss_in(const Loss& call, int64_t first_tile, int64_t last_tile) {
  const Images& images = call.images;
  const int64_t most = images.tile * images.channels;
  char buffer[scratch_on_stack];
  Scratch scratch(Noise::scratch_bytes(images) + Scratch::bytes<float>(most), buffer);
  Noise noise(images, scratch);
  float* const room = scratch.take<float>(most);
  for_noisy_tiles(call.key, images, first_tile, last_tile,
                  [&](int64_t sample, const Philox& philox, int64_t place, int64_t places, int64_t element) {
    const int64_t length = places * images.channels;
    const float* const normal = call.target == Target::x0 ? nullptr : noise.draw(philox, place, places);
    const X0* const x0 = call.target == Target::eps ? nullptr : static_cast<const X0*>(call.x0.data) + element;
    const float* const target = target_of(call.target, x0, normal, call.alpha[sample], call.sigma[sample], length, room);
    const T* const prediction = static_cast<const T*>(call.prediction.data) + element;
    T* const gradient = call.gradient ? static_cast<T*>(call.gradient) + element : nullptr;
    const float factor = call.gradient ? call.factor[sample] : 0.0f;
    const int64_t tile = sample * images.tiles_of_sample() + place / images.tile;
    if (!call.squares) compare<false, true>(prediction, target, factor, gradient, length);
    else if (gradient) call.squares[tile] = compare<true, true>(prediction, target, factor, gradient, length);
    else call.squares[tile] = compare<true, false>(prediction, target, factor, gradient, length);
  });
}

template <class T>
inline void scale_in(const Scale& call, int64_t first_tile, int64_t last_tile) {
  for_tiles(call.images, first_tile, last_tile, [&](int64_t sample, int64_t, int64_t places, int64_t element) {
    const T* const x = static_cast<const T*>(call.x) + element;
    T* const y = static_cast<T*>(call.y) + element;
    for_vectors(places * call.images.channels, [&](auto step, int64_t i, int64_t n) {
      Floats value[step.count];
      load_step<false>(step, x + i, n, value);
      for (int k = 0; k < step.count; ++k) value[k] = value[k] * call.factor[sample];
      store_step<false>(step, y + i, n, value);
    });
  });
}

}  // namespace soda::SODA_ISA
