// The arguments of noise-schedule sampling as plain data, and the kernels that each instruction set has for them.
//
// The work is cut into tiles: a run of the places of one sample, with all their channels. A tile's results depend on
// nothing outside it, and sums over a sample add up its tiles in their order: the bits are the same for every number of
// threads and every batch.
#pragma once

#include <cstdint>

#include "storage.h"

namespace soda {

// An image of floats, or of 8 bits.
struct Image {
  const void* data = nullptr;
  Dtype dtype = Dtype::float32;
  bool is_pixels = false;
};

// How all images of a call lie. A sample whose layout is that of its logical order is one channel.
struct Images {
  int64_t batch = 0, channels = 1, space = 0;
  int64_t tile = 0;  // places

  [[gnu::always_inline]] int64_t tiles_of_sample() const { return (space + tile - 1) / tile; }
  [[gnu::always_inline]] int64_t elements() const { return channels * space; }  // of a sample
};

// What noise is keyed on; `step` has stride 0 where it is one for all samples.
struct NoiseKey {
  uint64_t seed = 0;
  const int64_t *sample_ids = nullptr, *step = nullptr;
  int64_t sample_ids_stride = 0, step_stride = 0;
  uint32_t stream = 0;

  [[gnu::always_inline]] uint64_t sample_id(int64_t sample) const {
    return static_cast<uint64_t>(sample_ids[sample * sample_ids_stride]);
  }
  [[gnu::always_inline]] uint32_t step_of(int64_t sample) const {
    return static_cast<uint32_t>(step[sample * step_stride]);
  }
};

// What is drawn: 24-bit uniforms, normals, or the words themselves (into 32 bits).
enum class Numbers { uniform, normal, word };

struct Draw {
  NoiseKey key;
  Images images;
  Numbers numbers = Numbers::normal;
  Dtype dtype = Dtype::float32;
  void* out = nullptr;
};

// x_t = alpha x0 + sigma noise, the factors given for each sample.
struct AddNoise {
  NoiseKey key;
  Images images;
  Image x0;
  const float *alpha = nullptr, *sigma = nullptr;
  Dtype dtype = Dtype::float32;
  void* x_t = nullptr;
};

enum class Target { eps, v, x0 };

// Of error = prediction - target: the sums of squares of tiles, and gradient = factor error.
struct Loss {
  NoiseKey key;
  Images images;
  Image prediction, x0;
  Target target = Target::eps;
  const float *alpha = nullptr, *sigma = nullptr, *factor = nullptr;
  double* squares = nullptr;  // [N, tiles of a sample]; null where only the gradient is asked for
  void* gradient = nullptr;   // null where only the sums are
};

// y = factor x, of one dtype.
struct Scale {
  Images images;
  Dtype dtype = Dtype::float32;
  const void* x = nullptr;
  const float* factor = nullptr;
  void* y = nullptr;
};

// prediction = rescale[n] (uncond + cfg_scale (cond - uncond)), or cond where there is no uncond
// x0 = clip((signal x_t - noise_of_x_t prediction) gain), or clip(prediction)
// x_next = of_x_t x_t + of_x0 x0 + of_previous previous_x0 + of_noise noise
struct SamplerStep {
  NoiseKey key;
  Images images;
  Dtype dtype = Dtype::float32;
  const void *x_t = nullptr, *cond = nullptr, *uncond = nullptr, *previous_x0 = nullptr;
  void *x_next = nullptr, *x0 = nullptr;
  bool x0_is_prediction = false, draws = false;
  float cfg_scale = 1.0f, signal = 1.0f, noise_of_x_t = 0.0f, gain = 1.0f, clip = 0.0f;  // clip may be infinite
  float of_x_t = 0.0f, of_x0 = 0.0f, of_previous = 0.0f, of_noise = 0.0f;
  const float* rescale = nullptr;  // [N], or null for 1
  double* deviations = nullptr;    // [N, 2]: sums of squared deviations of cond, and of the guided prediction
};

struct DiffusionKernels {
  void (*draw)(const Draw&, int64_t first_tile, int64_t last_tile);
  void (*draw_first)(const Draw&, int64_t first_sample, int64_t last_sample);  // one number a sample
  // Of [blocks, 4] words as many normals; for tests.
  void (*normals_of)(const uint32_t* words, int64_t blocks, float* normal);
  void (*add_noise)(const AddNoise&, int64_t first_tile, int64_t last_tile);
  void (*loss)(const Loss&, int64_t first_tile, int64_t last_tile);
  void (*scale)(const Scale&, int64_t first_tile, int64_t last_tile);
  void (*deviations)(const SamplerStep&, int64_t first_sample, int64_t last_sample);
  void (*sampler_step)(const SamplerStep&, int64_t first_tile, int64_t last_tile);
};

namespace generic { extern const DiffusionKernels diffusion; }
namespace avx2 { extern const DiffusionKernels diffusion; }
namespace avx512 { extern const DiffusionKernels diffusion; }

}  // namespace soda
