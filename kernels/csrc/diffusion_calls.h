// What the ops of noise-schedule sampling share: their arguments, which of them the kernels take, and running tiles.
#pragma once

#include <algorithm>
#include <string>

#include "boxed.h"
#include "diffusion.h"
#include "tensors.h"

namespace soda {

using MaybeTensor = std::optional<Tensor>;

// As in soda_kernels/_philox.py.
constexpr uint32_t timestep_stream = 0, noise_stream = 1, sampler_stream = 4;

// The text of an argument of type str, whose handle is used up.
std::string text_of(StringHandle handle);

// Which of a boxed call's arguments the kernels take; the others are the reference's, and so are all errors in them.
AtenTensorHandle maybe_tensor_at(Stack stack, int index);  // null for an absent one
bool has_values(AtenTensorHandle image, bool or_pixels = false);  // an image that the kernels take, and not an empty one
bool is_table(AtenTensorHandle table);
// Whether all are whole numbers from `low` to below `end`; there may be none.
bool is_within(AtenTensorHandle indices, int64_t low, int64_t end);
bool is_index(AtenTensorHandle index, int64_t low, int64_t end);  // one such number
bool is_number(AtenTensorHandle tensor);
int64_t length_of(AtenTensorHandle tensor);

// The number at an index of a tensor of one dimension, or of none.
double number_at(const Tensor& tensor, int64_t index);
int64_t integer_at(const Tensor& tensor, int64_t index);

// The images of a call, all in the layout of one of them. Copies live as long as this does.
class Arguments {
 public:
  // Tiles of about `tile` elements.
  Arguments(const Tensor& like, int64_t tile);

  const Images& images() const { return images_; }
  bool channels_last() const { return channels_last_; }
  const void* image(const char* name, const Tensor& tensor, const Tensor& like);
  NoiseKey key(const Tensor& seed, const Tensor& sample_ids, const Tensor& step, uint32_t stream);
  Tensor empty_like(const Tensor& tensor, int32_t dtype) const;

 private:
  bool channels_last_;
  Images images_;
  std::vector<Tensor> held_;
};

NoiseKey noise_key(const Tensor& seed, const Tensor& sample_ids, const Tensor& step, uint32_t stream, int64_t batch);

// Elements for which a second thread is called: with noise, and without. It took 40 us to come where Python had run
// meanwhile, in which one draws 25,000 normals or does 90,000 plain steps (two cores of an EPYC of the Zen 3 generation).
constexpr int64_t noisy_grain = 1 << 14, plain_grain = 1 << 15;

// Elements of a tile: with its noise it stays in the first-level cache.
constexpr int64_t noisy_tile = 2048;

// Run the kernel over all tiles, or over count units of so many elements each.
template <class Call>
void run(void (*kernel)(const Call&, int64_t, int64_t), const Call& call, int64_t count, int64_t elements, int64_t grain) {
  torch::stable::parallel_for(0, count, std::max<int64_t>(1, grain / std::max<int64_t>(1, elements)),
                              [&](int64_t first, int64_t last) { kernel(call, first, last); });
}

template <class Call>
void run_tiles(void (*kernel)(const Call&, int64_t, int64_t), const Call& call, int64_t grain) {
  run(kernel, call, call.images.batch * call.images.tiles_of_sample(), call.images.tile * call.images.channels, grain);
}

}  // namespace soda
