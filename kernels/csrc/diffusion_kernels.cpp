// Noise-schedule sampling for one instruction set: compiled once for each, with its flags and -DSODA_ISA=its name.

#include "sampler.h"

namespace soda::SODA_ISA {
namespace {

Floats uniforms(Words words) { return to_floats(words >> 8) * 0x1p-24f; }

// A row of numbers of each sample, in runs.
void draw(const Draw& call, int64_t first_tile, int64_t last_tile) {
  const Images& images = call.images;
  char buffer[scratch_on_stack];
  Scratch scratch(Scratch::bytes<float>(run_room(images.tile)), buffer);
  float* const room = scratch.take<float>(run_room(images.tile));
  with_type(call.dtype, [&](auto type) {
    for_noisy_tiles(call.key, images, first_tile, last_tile,
                    [&](int64_t, const Philox& philox, int64_t place, int64_t places, int64_t element) {
      auto* const out = static_cast<decltype(type)*>(call.out) + element;
      const float* numbers = room;
      if (call.numbers == Numbers::normal) {
        numbers = draw_run(philox, place, places, room);
      } else {
        for (int64_t i = 0; i < places; i += 4 * lanes) {
          Words words[4];
          philox(block_order() + static_cast<uint32_t>((place + i) / 4), words);
          Floats value[4];
          for (int k = 0; k < 4; ++k) value[k] = uniforms(words[k]);
          transpose_fours(value);
          for (int k = 0; k < 4; ++k) store(room + i + k * lanes, value[k]);
        }
      }
      for_vectors(places, [&](auto step, int64_t i, int64_t n) {
        for (int k = 0; k < step.count; ++k, i += lanes) {
          store_lanes<step.whole>(out + i, load_lanes<step.whole>(numbers + i, n), n);
        }
      });
    });
  });
}

// The first number of each sample, for as many samples at a time as there are lanes.
void draw_first(const Draw& call, int64_t first_sample, int64_t last_sample) {
  for (int64_t sample = first_sample; sample < last_sample; sample += lanes) {
    const int64_t count = last_sample - sample < lanes ? last_sample - sample : lanes;
    Words low{}, high{}, step{}, words[4];
    for (int64_t i = 0; i < count; ++i) {
      const uint64_t id = call.key.sample_id(sample + i);
      low[i] = static_cast<uint32_t>(id), high[i] = static_cast<uint32_t>(id >> 32), step[i] = call.key.step_of(sample + i);
    }
    Philox(call.key.seed, low, high, step, call.key.stream)(Words{}, words);
    Floats value[4];
    if (call.numbers == Numbers::normal) normals(words, value);
    else value[0] = call.numbers == Numbers::word ? as_floats(words[0]) : uniforms(words[0]);
    std::memcpy(static_cast<float*>(call.out) + sample, &value[0], static_cast<size_t>(count) * sizeof(float));
  }
}

void normals_of(const uint32_t* from, int64_t blocks, float* to) {
  for (int64_t block = 0; block < blocks; block += lanes) {
    const int64_t count = blocks - block < lanes ? blocks - block : lanes;
    Words words[4] = {};
    Floats normal[4];
    for (int64_t i = 0; i < 4 * count; ++i) words[i % 4][i / 4] = from[4 * block + i];
    normals(words, normal);
    for (int64_t i = 0; i < 4 * count; ++i) to[4 * block + i] = normal[i % 4][i / 4];
  }
}

void add_noise(const AddNoise& call, int64_t first_tile, int64_t last_tile) {
  with_type(call.x0, [&](auto x0) {
    with_type(call.dtype, [&](auto x_t) {
      add_noise_in<decltype(x0), decltype(x_t)>(call, first_tile, last_tile);
    });
  });
}

void loss(const Loss& call, int64_t first_tile, int64_t last_tile) {
  with_type(call.x0, [&](auto x0) {
    with_type(call.prediction.dtype, [&](auto prediction) {
      loss_in<decltype(x0), decltype(prediction)>(call, first_tile, last_tile);
    });
  });
}

void scale(const Scale& call, int64_t first_tile, int64_t last_tile) {
  with_type(call.dtype, [&](auto type) { scale_in<decltype(type)>(call, first_tile, last_tile); });
}

void deviations(const SamplerStep& call, int64_t first_sample, int64_t last_sample) {
  with_type(call.dtype, [&](auto type) { deviations_in<decltype(type)>(call, first_sample, last_sample); });
}

void sampler_step(const SamplerStep& call, int64_t first_tile, int64_t last_tile) {
  with_type(call.dtype, [&](auto type) { sampler_step_in<decltype(type)>(call, first_tile, last_tile); });
}

}  // namespace

const DiffusionKernels diffusion = {draw, draw_first, normals_of, add_noise, loss, scale, deviations, sampler_step};

}  // namespace soda::SODA_ISA
