// Sampler steps on the CPU: the coefficients of each method, the outputs, and the registration with PyTorch.

#include <cmath>
#include <limits>
#include <tuple>

#include "diffusion_calls.h"
#include "dispatch.h"

namespace soda {
namespace {

// Elements of a tile where no noise is drawn.
constexpr int64_t plain_tile = 1 << 13;

// The step's two noise levels, in double from the fp32 tables; next_index -1 is the clean end.
struct Levels {
  Levels(const Tensor& alpha, const Tensor& sigma, int64_t index, int64_t next)
      : is_clean(next < 0),
        alpha_t(number_at(alpha, index)),
        sigma_t(number_at(sigma, index)),
        alpha_s(is_clean ? 1.0 : number_at(alpha, next)),
        sigma_s(is_clean ? 0.0 : number_at(sigma, next)) {}

  bool is_clean;
  double alpha_t, sigma_t, alpha_s, sigma_s;
};

void predict(SamplerStep& call, const Levels& levels, const std::string& target) {
  call.x0_is_prediction = target == "x0";
  call.signal = static_cast<float>(target == "v" ? levels.alpha_t : 1.0);
  call.noise_of_x_t = static_cast<float>(levels.sigma_t);
  call.gain = static_cast<float>(target == "eps" ? 1.0 / levels.alpha_t : 1.0);
}

// Formulas and their sources stand in soda_kernels/diffusion/reference.py; here what multiplies each image is gathered.
void ddim_or_ddpm(SamplerStep& call, const Levels& levels, bool is_ddim, double eta) {
  const double rate = levels.alpha_t / levels.alpha_s, ratio = levels.sigma_s / levels.sigma_t;
  const double through = rate * levels.sigma_s;
  const double beta = std::max(levels.sigma_t * levels.sigma_t - through * through, 0.0);
  double of_x_t, of_x0;
  if (is_ddim) {
    of_x_t = ratio * std::sqrt((1.0 - eta * eta) + (eta * rate * ratio) * (eta * rate * ratio));
    of_x0 = levels.alpha_s - of_x_t * levels.alpha_t;
  } else {
    of_x_t = rate * ratio * ratio;
    of_x0 = levels.alpha_s * beta / (levels.sigma_t * levels.sigma_t);
  }
  call.of_x_t = static_cast<float>(of_x_t), call.of_x0 = static_cast<float>(of_x0);
  call.of_noise = static_cast<float>((is_ddim ? eta : 1.0) * ratio * std::sqrt(beta));
}

void dpmpp_2m(SamplerStep& call, const Levels& levels, const Tensor& logsnr, int64_t index, int64_t next,
              const int64_t* previous) {
  const auto half = [&](int64_t at) { return number_at(logsnr, at) / 2.0; };
  const double h = half(std::max<int64_t>(next, 0)) - half(index);
  double weight = 0.0;
  if (previous && !levels.is_clean) {
    const double h_previous = half(index) - half(*previous);
    if (h_previous != 0.0) weight = h / (2.0 * h_previous);
  }
  const double gain = -levels.alpha_s * (levels.is_clean ? -1.0 : std::expm1(-h));
  call.of_x_t = static_cast<float>(levels.sigma_s / levels.sigma_t);
  call.of_x0 = static_cast<float>(gain * (1.0 + weight));
  call.of_previous = static_cast<float>(-gain * weight);
}

// Lin et al. 2024, equations 15 and 16; a sample that does not vary is left as it is.
std::vector<float> rescaled(SamplerStep& call, double guidance_rescale) {
  const int64_t batch = call.images.batch;
  std::vector<double> deviations(static_cast<size_t>(2 * batch));
  call.deviations = deviations.data();
  run(diffusion_kernels().deviations, call, batch, call.images.elements(), plain_grain);
  std::vector<float> factors(static_cast<size_t>(batch));
  for (size_t n = 0; n < factors.size(); ++n) {
    const double of_cond = deviations[2 * n], of_both = deviations[2 * n + 1];
    const double ratio = of_both == 0.0 ? 1.0 : std::sqrt(of_cond / of_both);
    factors[n] = static_cast<float>(guidance_rescale * ratio + (1.0 - guidance_rescale));
  }
  return factors;
}

std::tuple<Tensor, Tensor> sampler_step(
    const Tensor& x_t, const Tensor& cond, const MaybeTensor& uncond, const Tensor& alpha, const Tensor& sigma,
    const Tensor& logsnr, const Tensor& step_index, const Tensor& next_index, StringHandle method, StringHandle target,
    double cfg_scale, double eta, std::optional<double> clip_x0, double guidance_rescale, const MaybeTensor& previous_x0,
    const MaybeTensor& previous_index, const MaybeTensor& seed, const MaybeTensor& sample_ids) {
  const std::string how = text_of(method), what = text_of(target);
  STD_TORCH_CHECK(how == "ddim" || how == "ddpm" || how == "dpmpp_2m", "method is ", how,
                  "; it must be ddpm, ddim or dpmpp_2m");
  STD_TORCH_CHECK(what == "eps" || what == "v" || what == "x0", "target is ", what, "; it must be eps, v or x0");
  STD_TORCH_CHECK(previous_x0.has_value() == previous_index.has_value(), "previous_x0 and previous_index go together");
  const bool draws = how == "ddpm" || (how == "ddim" && eta > 0.0), extrapolates = how == "dpmpp_2m" && previous_x0;
  Arguments arguments(x_t, draws ? noisy_tile : plain_tile);
  SamplerStep call;
  call.images = arguments.images();
  call.dtype = *dtype_of(x_t.get());
  const auto image = [&](const char* name, const Tensor& tensor) {
    STD_TORCH_CHECK(torch_dtype(tensor) == torch_dtype(x_t), name, " does not have the dtype of x_t");
    return arguments.image(name, tensor, x_t);
  };
  call.x_t = image("x_t", x_t), call.cond = image("cond", cond);
  if (uncond) call.uncond = image("uncond", *uncond);
  if (extrapolates) call.previous_x0 = image("previous_x0", *previous_x0);
  if (draws) {
    STD_TORCH_CHECK(seed && sample_ids, "method ", how, " draws noise; it needs seed and sample_ids");
    call.key = arguments.key(*seed, *sample_ids, step_index, sampler_stream);
  }
  const int64_t index = integer_at(step_index, 0), next = integer_at(next_index, 0);
  const int64_t previous = extrapolates ? integer_at(*previous_index, 0) : 0;
  const Levels levels(alpha, sigma, index, next);
  predict(call, levels, what);
  if (how == "dpmpp_2m") dpmpp_2m(call, levels, logsnr, index, next, extrapolates ? &previous : nullptr);
  else ddim_or_ddpm(call, levels, how == "ddim", eta);
  call.draws = draws, call.cfg_scale = static_cast<float>(cfg_scale);
  call.clip = clip_x0 ? static_cast<float>(*clip_x0) : std::numeric_limits<float>::infinity();
  std::vector<float> factors;
  if (uncond && guidance_rescale != 0.0) factors = rescaled(call, guidance_rescale), call.rescale = factors.data();

  Tensor x_next = arguments.empty_like(x_t, torch_dtype(x_t)), x0 = arguments.empty_like(x_t, torch_dtype(x_t));
  call.x_next = x_next.mutable_data_ptr(), call.x0 = x0.mutable_data_ptr();
  run_tiles(diffusion_kernels().sampler_step, call, draws ? noisy_grain : plain_grain);
  return {x_next, x0};
}

// Which calls the kernel takes. An index out of range is the reference's too, which says so.
bool takes_sampler_step(Stack stack) {
  const AtenTensorHandle alpha = tensor_at(stack, 3), previous_index = maybe_tensor_at(stack, 15);
  const int64_t steps = length_of(alpha);
  return has_values(tensor_at(stack, 0)) && is_table(alpha) && is_table(tensor_at(stack, 4)) &&
         is_table(tensor_at(stack, 5)) && length_of(tensor_at(stack, 4)) == steps &&
         length_of(tensor_at(stack, 5)) == steps && is_index(tensor_at(stack, 6), 0, steps) &&
         is_index(tensor_at(stack, 7), -1, steps) &&
         (!previous_index || is_index(previous_index, 0, steps));
}

}  // namespace
}  // namespace soda

STABLE_TORCH_LIBRARY_IMPL(soda_kernels, CPU, m) {
  using namespace soda;
  m.impl("sampler_step", [](Stack stack, uint64_t arguments, uint64_t outputs) {
    call_native("soda_kernels_native::sampler_step", takes_sampler_step(stack), TORCH_BOX(&sampler_step), stack,
                arguments, outputs);
  });
}
