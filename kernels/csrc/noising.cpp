// Random numbers, noising and the denoising loss on the CPU: their outputs, and their registration with PyTorch.

#include <cmath>
#include <memory>
#include <tuple>

#include "diffusion_calls.h"
#include "dispatch.h"

namespace soda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::detail::to;

// The kernels' dtype of an argument of type ScalarType, and torch's number of that dtype.
std::optional<Dtype> kernel_dtype(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return Dtype::float32;
    case ScalarType::BFloat16: return Dtype::bfloat16;
    case ScalarType::Half: return Dtype::float16;
    default: return std::nullopt;
  }
}

int32_t torch_number(ScalarType type) {
  switch (type) {
    case ScalarType::BFloat16: return aoti_torch_dtype_bfloat16();
    case ScalarType::Half: return aoti_torch_dtype_float16();
    default: return aoti_torch_dtype_float32();
  }
}

Image image_of(const Tensor& tensor, const void* data) {
  const auto dtype = dtype_of(tensor.get());
  return {data, dtype.value_or(Dtype::float32), !dtype};
}

template <Numbers numbers>
Tensor philox(const Tensor& seed, const Tensor& sample_ids, const Tensor& step, int64_t num, int64_t stream,
              ScalarType dtype) {
  const int64_t batch = sample_ids.size(0);
  Tensor out = empty({batch, num}, torch_number(dtype));
  Draw call;
  call.key = noise_key(seed, sample_ids, step, static_cast<uint32_t>(stream), batch);
  call.images.batch = batch, call.images.space = num, call.images.tile = std::min(noisy_tile, num);
  call.numbers = numbers, call.dtype = *kernel_dtype(dtype);
  call.out = out.mutable_data_ptr();
  run_tiles(diffusion_kernels().draw, call, noisy_grain);
  return out;
}

// The first number of each sample.
void draw_first(const NoiseKey& key, Numbers numbers, int64_t count, void* out) {
  Draw call;
  call.key = key, call.numbers = numbers, call.out = out;
  run(diffusion_kernels().draw_first, call, count, 16, noisy_grain);
}

// As `draw_step_index` of reference.py, number for number.
void draw_indices(const NoiseKey& key, int64_t batch, int64_t num_steps, const std::string& sampling, int64_t first,
                  int64_t total, int64_t* indices) {
  STD_TORCH_CHECK(num_steps > 0 && total > 0, "num_steps is ", num_steps, " and num_strata ", total,
                  "; they must be positive");
  STD_TORCH_CHECK(sampling == "uniform" || sampling == "stratified" || sampling == "logit_normal", "sampling is ",
                  sampling, "; it must be uniform, stratified or logit_normal");
  std::vector<float> numbers(static_cast<size_t>(batch));
  if (sampling == "stratified") {
    constexpr int64_t shared_id = (int64_t{1} << 56) - 1;
    NoiseKey shared = key;
    shared.sample_ids = &shared_id;
    uint32_t rotation;
    draw_first(shared, Numbers::word, 1, &rotation);
    draw_first(key, Numbers::word, batch, numbers.data());
    for (int64_t n = 0; n < batch; ++n) {
      const int64_t turned = static_cast<int64_t>((static_cast<uint64_t>(rotation) * static_cast<uint64_t>(total)) >> 32);
      const int64_t stratum = (first + n + turned) % total;
      indices[n] = ((stratum << 24) + (bits_of(numbers[static_cast<size_t>(n)]) >> 8)) * num_steps / (total << 24);
    }
    return;
  }
  const bool is_normal = sampling == "logit_normal";
  draw_first(key, is_normal ? Numbers::normal : Numbers::uniform, batch, numbers.data());
  for (int64_t n = 0; n < batch; ++n) {
    float share = numbers[static_cast<size_t>(n)];
    if (is_normal) share = 1.0f / (1.0f + std::exp(-share));
    indices[n] = std::min(static_cast<int64_t>(share * static_cast<float>(num_steps)), num_steps - 1);
  }
}

Tensor draw_step_index(const Tensor& seed, const Tensor& sample_ids, const Tensor& step, int64_t num_steps,
                       StringHandle sampling, int64_t first_stratum, int64_t num_strata) {
  const int64_t batch = sample_ids.size(0);
  Tensor indices = empty({batch}, aoti_torch_dtype_int64());
  draw_indices(noise_key(seed, sample_ids, step, timestep_stream, batch), batch, num_steps, text_of(sampling),
               first_stratum, num_strata, static_cast<int64_t*>(indices.mutable_data_ptr()));
  return indices;
}

// table[step_index] for each sample.
std::vector<float> look_up(const Tensor& table, const Tensor& step_index) {
  std::vector<float> values(static_cast<size_t>(step_index.size(0)));
  for (size_t n = 0; n < values.size(); ++n) {
    values[n] = static_cast<float>(number_at(table, integer_at(step_index, static_cast<int64_t>(n))));
  }
  return values;
}

void check_indices(const Tensor& step_index, const Images& images) {
  STD_TORCH_CHECK(step_index.dim() == 1 && step_index.size(0) == images.batch, "step_index must have shape [N]");
}

std::tuple<Tensor, Tensor> add_noise(const Tensor& x0, const MaybeTensor& step_index, const Tensor& alpha,
                                     const Tensor& sigma, const Tensor& seed, const Tensor& sample_ids,
                                     const Tensor& step, StringHandle sampling, int64_t first_stratum,
                                     int64_t num_strata, ScalarType dtype) {
  const std::string how = text_of(sampling);
  Arguments arguments(x0, noisy_tile);
  AddNoise call;
  call.images = arguments.images();
  call.key = arguments.key(seed, sample_ids, step, noise_stream);
  Tensor drawn = empty({step_index ? 0 : call.images.batch}, aoti_torch_dtype_int64());
  if (!step_index) {
    NoiseKey key = call.key;
    key.stream = timestep_stream;
    draw_indices(key, call.images.batch, alpha.size(0), how, first_stratum, num_strata,
                 static_cast<int64_t*>(drawn.mutable_data_ptr()));
  }
  const Tensor& indices = step_index ? *step_index : drawn;
  check_indices(indices, call.images);
  const std::vector<float> alphas = look_up(alpha, indices), sigmas = look_up(sigma, indices);
  call.alpha = alphas.data(), call.sigma = sigmas.data();
  call.x0 = image_of(x0, arguments.image("x0", x0, x0));
  Tensor x_t = arguments.empty_like(x0, torch_number(dtype));
  call.dtype = kernel_dtype(dtype).value_or(Dtype::float32), call.x_t = x_t.mutable_data_ptr();
  run_tiles(diffusion_kernels().add_noise, call, noisy_grain);
  if (dtype != ScalarType::Double) return {x_t, drawn};
  Tensor wide = arguments.empty_like(x0, aoti_torch_dtype_float64());
  torch::stable::copy_(wide, x_t);
  return {wide, drawn};
}

Tensor scaled(const Tensor& x, const std::vector<float>& factors) {
  Arguments arguments(x, noisy_tile);
  Tensor y = arguments.empty_like(x, torch_dtype(x));
  Scale call;
  call.images = arguments.images(), call.dtype = *dtype_of(x.get());
  call.x = arguments.image("x", x, x), call.y = y.mutable_data_ptr(), call.factor = factors.data();
  run_tiles(diffusion_kernels().scale, call, plain_grain);
  return y;
}

Tensor add_noise_backward(const Tensor& dx_t, const Tensor& step_index, const Tensor& alpha) {
  STD_TORCH_CHECK(step_index.dim() == 1 && step_index.size(0) == dx_t.size(0), "step_index must have shape [N]");
  return scaled(dx_t, look_up(alpha, step_index));
}

Tensor scale_samples(const Tensor& gradient, const Tensor& dloss) {
  STD_TORCH_CHECK(dloss.dim() == 1 && dloss.size(0) == gradient.size(0), "dloss must have shape [N]");
  std::vector<float> factors(static_cast<size_t>(dloss.size(0)));
  for (size_t n = 0; n < factors.size(); ++n) factors[n] = static_cast<float>(number_at(dloss, static_cast<int64_t>(n)));
  return scaled(gradient, factors);
}

// What the loss and its gradient have in common.
struct Comparison {
  Comparison(const Tensor& prediction, const Tensor& x0, const Tensor& step_index, const Tensor& alpha,
             const Tensor& sigma, const MaybeTensor& weights, const Tensor& seed, const Tensor& sample_ids,
             const Tensor& step, StringHandle target)
      : arguments(prediction, noisy_tile) {
    const std::string what = text_of(target);
    STD_TORCH_CHECK(what == "eps" || what == "v" || what == "x0", "target is ", what, "; it must be eps, v or x0");
    call.target = what == "eps" ? Target::eps : what == "v" ? Target::v : Target::x0;
    call.images = arguments.images();
    call.key = arguments.key(seed, sample_ids, step, noise_stream);
    check_indices(step_index, call.images);
    alphas = look_up(alpha, step_index), sigmas = look_up(sigma, step_index);
    call.alpha = alphas.data(), call.sigma = sigmas.data();
    call.prediction = image_of(prediction, arguments.image("prediction", prediction, prediction));
    if (call.target != Target::eps) call.x0 = image_of(x0, arguments.image("x0", x0, prediction));
    share.assign(static_cast<size_t>(call.images.batch), 1.0 / static_cast<double>(call.images.elements()));
    for (size_t n = 0; weights && n < share.size(); ++n) {
      share[n] *= number_at(*weights, integer_at(step_index, static_cast<int64_t>(n)));
    }
  }

  // Let the kernel write the gradient, dloss being 1 unless it is given.
  Tensor write_gradient(const Tensor& prediction, const Tensor* dloss) {
    Tensor gradient = arguments.empty_like(prediction, torch_dtype(prediction));
    factors.resize(share.size());
    for (size_t n = 0; n < share.size(); ++n) {
      factors[n] = static_cast<float>(2.0 * share[n] * (dloss ? number_at(*dloss, static_cast<int64_t>(n)) : 1.0));
    }
    call.factor = factors.data(), call.gradient = gradient.mutable_data_ptr();
    return gradient;
  }

  Arguments arguments;
  Loss call;
  std::vector<float> alphas, sigmas, factors;
  std::vector<double> share;  // weight / M
};

std::tuple<Tensor, Tensor> denoising_loss(const Tensor& prediction, const Tensor& x0, const Tensor& step_index,
                                          const Tensor& alpha, const Tensor& sigma, const MaybeTensor& weights,
                                          const Tensor& seed, const Tensor& sample_ids, const Tensor& step,
                                          StringHandle target, bool save_gradient) {
  Comparison comparison(prediction, x0, step_index, alpha, sigma, weights, seed, sample_ids, step, target);
  Loss& call = comparison.call;
  const int64_t batch = call.images.batch, tiles = call.images.tiles_of_sample();
  Tensor gradient = save_gradient ? comparison.write_gradient(prediction, nullptr)
                                  : empty({0}, torch_dtype(prediction));
  Tensor loss = empty({batch}, aoti_torch_dtype_float32());
  const std::unique_ptr<double[]> squares(new double[static_cast<size_t>(batch * tiles)]);
  call.squares = squares.get();
  run_tiles(diffusion_kernels().loss, call, noisy_grain);
  for (int64_t n = 0; n < batch; ++n) {
    double total = 0.0;
    for (int64_t tile = 0; tile < tiles; ++tile) total += squares[static_cast<size_t>(n * tiles + tile)];
    static_cast<float*>(loss.mutable_data_ptr())[n] = static_cast<float>(total * comparison.share[static_cast<size_t>(n)]);
  }
  return {loss, gradient};
}

Tensor denoising_loss_backward(const Tensor& dloss, const Tensor& prediction, const Tensor& x0, const Tensor& step_index,
                               const Tensor& alpha, const Tensor& sigma, const MaybeTensor& weights, const Tensor& seed,
                               const Tensor& sample_ids, const Tensor& step, StringHandle target) {
  Comparison comparison(prediction, x0, step_index, alpha, sigma, weights, seed, sample_ids, step, target);
  STD_TORCH_CHECK(dloss.dim() == 1 && dloss.size(0) == prediction.size(0), "dloss must have shape [N]");
  Tensor gradient = comparison.write_gradient(prediction, &dloss);
  run_tiles(diffusion_kernels().loss, comparison.call, noisy_grain);
  return gradient;
}

// Which calls the kernels take. An index out of range is the reference's too, which says so.

bool takes_philox(Stack stack) {
  const int64_t stream = to<int64_t>(stack[4]);  // of 8 bits
  return kernel_dtype(to<ScalarType>(stack[5])) && to<int64_t>(stack[3]) > 0 && stream >= 0 && stream < 256 &&
         length_of(tensor_at(stack, 1)) > 0;
}

// Strata whose products with a word stay inside 63 bits.
bool takes_strata(int64_t first, int64_t total) {
  constexpr int64_t end = int64_t{1} << 31;
  return first >= 0 && first < end && total < end;
}

bool takes_draw(Stack stack) {
  return length_of(tensor_at(stack, 1)) > 0 && takes_strata(to<int64_t>(stack[5]), to<int64_t>(stack[6]));
}

bool takes_add_noise(Stack stack) {
  const AtenTensorHandle alpha = tensor_at(stack, 2), indices = maybe_tensor_at(stack, 1);
  const auto dtype = to<ScalarType>(stack[10]);
  return has_values(tensor_at(stack, 0), true) && (kernel_dtype(dtype) || dtype == ScalarType::Double) && is_table(alpha) &&
         is_table(tensor_at(stack, 3)) && length_of(tensor_at(stack, 3)) == length_of(alpha) &&
         (indices ? is_within(indices, 0, length_of(alpha))
                  : takes_strata(to<int64_t>(stack[8]), to<int64_t>(stack[9])));
}

bool takes_add_noise_backward(Stack stack) {
  const AtenTensorHandle alpha = tensor_at(stack, 2);
  return has_values(tensor_at(stack, 0)) && is_table(alpha) && is_within(tensor_at(stack, 1), 0, length_of(alpha));
}

bool takes_scale(Stack stack) { return has_values(tensor_at(stack, 0)) && is_number(tensor_at(stack, 1)); }

template <int first>
bool takes_loss(Stack stack) {
  const AtenTensorHandle alpha = tensor_at(stack, first + 3), weights = maybe_tensor_at(stack, first + 5);
  return has_values(tensor_at(stack, first)) && has_values(tensor_at(stack, first + 1), true) && is_table(alpha) &&
         is_table(tensor_at(stack, first + 4)) && length_of(tensor_at(stack, first + 4)) == length_of(alpha) &&
         (!weights || (is_table(weights) && length_of(weights) == length_of(alpha))) &&
         is_within(tensor_at(stack, first + 2), 0, length_of(alpha)) && (first == 0 || is_number(tensor_at(stack, 0)));
}

}  // namespace
}  // namespace soda

STABLE_TORCH_LIBRARY_IMPL(soda_kernels, CPU, m) {
  using namespace soda;
  m.impl("philox_normal", [](Stack stack, uint64_t arguments, uint64_t outputs) {
    call_native("soda_kernels_native::philox_normal", takes_philox(stack), TORCH_BOX(&philox<Numbers::normal>), stack,
                arguments, outputs);
  });
  m.impl("philox_uniform", [](Stack stack, uint64_t arguments, uint64_t outputs) {
    call_native("soda_kernels_native::philox_uniform", takes_philox(stack), TORCH_BOX(&philox<Numbers::uniform>), stack,
                arguments, outputs);
  });
  m.impl("draw_step_index", [](Stack stack, uint64_t arguments, uint64_t outputs) {
    call_native("soda_kernels_native::draw_step_index", takes_draw(stack), TORCH_BOX(&draw_step_index),
                stack, arguments, outputs);
  });
  m.impl("add_noise", [](Stack stack, uint64_t arguments, uint64_t outputs) {
    call_native("soda_kernels_native::add_noise", takes_add_noise(stack), TORCH_BOX(&add_noise),
                stack, arguments, outputs);
  });
  m.impl("add_noise_backward", [](Stack stack, uint64_t arguments, uint64_t outputs) {
    call_native("soda_kernels_native::add_noise_backward", takes_add_noise_backward(stack),
                TORCH_BOX(&add_noise_backward), stack, arguments, outputs);
  });
  m.impl("denoising_loss", [](Stack stack, uint64_t arguments, uint64_t outputs) {
    call_native("soda_kernels_native::denoising_loss", takes_loss<0>(stack), TORCH_BOX(&denoising_loss),
                stack, arguments, outputs);
  });
  m.impl("denoising_loss_backward", [](Stack stack, uint64_t arguments, uint64_t outputs) {
    call_native("soda_kernels_native::denoising_loss_backward", takes_loss<1>(stack),
                TORCH_BOX(&denoising_loss_backward), stack, arguments, outputs);
  });
  m.impl("scale_samples", [](Stack stack, uint64_t arguments, uint64_t outputs) {
    call_native("soda_kernels_native::scale_samples", takes_scale(stack), TORCH_BOX(&scale_samples),
                stack, arguments, outputs);
  });
}
