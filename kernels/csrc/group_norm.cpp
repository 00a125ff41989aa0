// Modulated group norm on the CPU: what it accepts, its outputs, and its registration with PyTorch's dispatcher.

#include "group_norm.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <numeric>
#include <tuple>

#include "boxed.h"
#include "dispatch.h"
#include "tensors.h"

namespace soda {
namespace {

using MaybeTensor = std::optional<Tensor>;

// Most bytes of a unit's image. It is read twice, the second time from the second or third level: of 1, 2 and 4 MiB none
// was better than noise, in geometric mean over channels_last shapes 6% (EPYC of the Zen 3 generation).
constexpr int64_t unit_bytes = 1 << 21;
// Channels in a piece of a row, where rows are cut: a multiple of every vector's width, and of a cache line.
constexpr int64_t row_piece = 32;
// Below this a second thread costs more than it brings.
constexpr int64_t elements_of_a_thread = 1 << 14;

// The tensors behind a GroupNorm's pointers: copies live as long as the call.
class Arguments {
 public:
  template <class Pass>
  void parameters(Pass& norm, const MaybeTensor& weight, const MaybeTensor& bias, const std::vector<Tensor>& modulations,
                  double scale_offset) {
    STD_TORCH_CHECK(modulations.size() == 0 || modulations.size() == 2 || modulations.size() == 4,
                    "modulations has ", modulations.size(), " tensors; it must have 0, 2 or 4");
    const int64_t channels = norm.all_channels();
    if (weight) norm.weight = parameter("weight", *weight, 0, channels);
    if (bias) norm.bias = parameter("bias", *bias, 0, channels);
    norm.num_modulations = static_cast<int>(modulations.size() / 2);
    for (size_t i = 0; i < modulations.size(); ++i) {
      norm.modulations[i] = parameter("modulations", modulations[i], norm.batch, channels);
    }
    norm.scale_offset = static_cast<float>(scale_offset);
  }

  template <class Pass>
  void images(Pass& norm, const Tensor& x, const MaybeTensor& skip, int64_t groups) {
    const auto sizes = x.sizes();
    norm.dtype = *dtype_of(x.get());
    norm.batch = sizes[0], norm.groups = groups, norm.space = 1;
    for (size_t d = 2; d < sizes.size(); ++d) norm.space *= sizes[d];
    norm.channels[0] = sizes[1];
    norm.channels[1] = skip ? skip->size(1) : 0;
    STD_TORCH_CHECK(groups > 0 && norm.all_channels() % groups == 0, "num_groups is ", groups, "; it must divide the ",
                    norm.all_channels(), " channels of x");
    channels_last_ = is_channels_last(x);
    // One place a channel: both layouts are the same memory, and vectors run along the channels.
    norm.channels_last = channels_last_ || norm.space == 1;
    norm.x = image("x", x, x, norm.channels[0]);
    if (skip) norm.skip = image("skip", *skip, x, norm.channels[1]);
  }

  const void* image(const char* name, const Tensor& tensor, const Tensor& like, int64_t channels) {
    const auto sizes = tensor.sizes(), expected = like.sizes();
    bool fits = sizes.size() == expected.size() && torch_dtype(tensor) == torch_dtype(like) && tensor.is_cpu();
    for (size_t d = 0; fits && d < sizes.size(); ++d) fits = sizes[d] == (d == 1 ? channels : expected[d]);
    STD_TORCH_CHECK(fits, name, " does not have the shape, dtype and device that x asks for");
    return hold(in_layout(tensor, channels_last_)).const_data_ptr();
  }

  template <class Pass>
  void dropout(Pass& norm, double probability, const MaybeTensor& seed) {
    if (!(probability > 0.0)) return;
    STD_TORCH_CHECK(seed.has_value(), "seed is None; dropout_p > 0 needs a seed");
    STD_TORCH_CHECK(torch_dtype(*seed) == aoti_torch_dtype_int64() && seed->is_cpu() &&
                        (seed->dim() == 0 || (seed->dim() == 1 && seed->size(0) == norm.batch)),
                    "seed must be an int64 tensor of shape [] or [N]");
    const double threshold = std::min(std::nearbyint(probability * 65536.0), 65535.0);
    norm.dropout.threshold = static_cast<uint32_t>(threshold);
    norm.dropout.scale = static_cast<float>(65536.0 / (65536.0 - threshold));
    norm.dropout.seed = static_cast<const int64_t*>(hold(*seed).const_data_ptr());
    norm.dropout.seed_per_sample = seed->dim() == 1;
    norm.dropout.seed_stride = seed->dim() == 1 ? seed->stride(0) : 0;
  }

  const float* statistics(const char* name, const Tensor& tensor, const GroupNorm& norm) {
    STD_TORCH_CHECK(dtype_of(tensor.get()) == Dtype::float32 && tensor.dim() == 2 && tensor.size(0) == norm.batch &&
                        tensor.size(1) == norm.groups && tensor.is_cpu(),
                    name, " must be a float32 tensor of shape [N, num_groups]");
    return static_cast<const float*>(hold(in_layout(tensor, false)).const_data_ptr());
  }

  bool channels_last() const { return channels_last_; }

 private:
  // A [C] tensor, or with rows an [N, C] one. Rows may lie anywhere, their numbers must lie together.
  Parameter parameter(const char* name, const Tensor& tensor, int64_t rows, int64_t channels) {
    const int64_t last = rows ? 1 : 0;
    STD_TORCH_CHECK(tensor.dim() == last + 1 && tensor.size(last) == channels && (!rows || tensor.size(0) == rows) &&
                        tensor.is_cpu(),
                    name, " does not have the shape and device that x asks for");
    const Tensor& used = hold(channels > 1 && tensor.stride(last) != 1 ? in_layout(tensor, false) : tensor);
    return {used.const_data_ptr(), *dtype_of(used.get()), rows ? used.stride(0) : 0};
  }

  const Tensor& hold(Tensor tensor) {
    held_.push_back(std::move(tensor));
    return held_.back();
  }

  bool channels_last_ = false;
  std::vector<Tensor> held_;
};

// Cut the work into units, small enough for the caches and for every thread to get some.
void cut(GroupNorm& norm) {
  const int64_t channels = norm.group_channels(), elements = channels * norm.space;
  const int64_t all_elements = norm.batch * norm.groups * elements;
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), all_elements / elements_of_a_thread + 1);
  const int64_t bytes = elements * (norm.dtype == Dtype::float32 ? 4 : 2);
  const int64_t groups = std::min(std::max<int64_t>(1, unit_bytes / bytes), norm.batch * norm.groups / threads + 1);
  // Whole vectors, and whole cache lines where a row of channels is cut.
  const int64_t least = norm.channels_last ? std::lcm<int64_t>(channels, row_piece) / channels : 1;
  norm.unit_groups = std::min(std::max(groups / least * least, least), norm.groups);
}

template <class Pass>
void run(void (*units)(const Pass&, int64_t, int64_t), const Pass& norm) {
  const int64_t count = norm.batch * norm.units_of_sample();
  const int64_t unit_elements = norm.unit_groups * norm.group_channels() * norm.space;
  torch::stable::parallel_for(0, count, std::max<int64_t>(1, elements_of_a_thread / unit_elements),
                              [&](int64_t first, int64_t last) { units(norm, first, last); });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(
    const Tensor& x, const MaybeTensor& skip, const MaybeTensor& residual, const MaybeTensor& weight,
    const MaybeTensor& bias, const std::vector<Tensor>& modulations, int64_t num_groups, double scale_offset, double eps,
    bool silu, double dropout_p, const MaybeTensor& seed, double residual_scale) {
  STD_TORCH_CHECK(!(skip && residual), "residual came with skip; give one or the other");
  STD_TORCH_CHECK(residual || residual_scale == 1.0, "residual_scale is ", residual_scale, " without a residual");
  Forward norm;
  Arguments arguments;
  arguments.images(norm, x, skip, num_groups);
  arguments.parameters(norm, weight, bias, modulations, scale_offset);
  arguments.dropout(norm, dropout_p, seed);
  norm.silu = silu, norm.eps = eps, norm.residual_scale = static_cast<float>(residual_scale);

  Tensor y = empty_image(x, norm.all_channels(), arguments.channels_last());
  Tensor summed = residual ? empty_image(x, norm.channels[0], arguments.channels_last()) : empty({0}, torch_dtype(x));
  Tensor mean = empty({norm.batch, norm.groups}, aoti_torch_dtype_float32());
  Tensor rstd = empty({norm.batch, norm.groups}, aoti_torch_dtype_float32());
  norm.y = y.mutable_data_ptr();
  norm.mean = static_cast<float*>(mean.mutable_data_ptr());
  norm.rstd = static_cast<float*>(rstd.mutable_data_ptr());
  if (residual) {
    norm.residual = arguments.image("residual", *residual, x, norm.channels[0]);
    norm.summed = summed.mutable_data_ptr();
  }
  cut(norm);
  run(group_norm_kernels().forward, norm);
  return {y, summed, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, std::vector<Tensor>> backward(
    const Tensor& dy, const MaybeTensor& dsummed, const Tensor& x, const MaybeTensor& skip, const MaybeTensor& weight,
    const MaybeTensor& bias, const std::vector<Tensor>& modulations, const Tensor& mean, const Tensor& rstd,
    double scale_offset, bool silu, double dropout_p, const MaybeTensor& seed, double residual_scale) {
  STD_TORCH_CHECK(!(skip && dsummed), "dsummed came with skip; give one or the other");
  STD_TORCH_CHECK(!skip || residual_scale == 1.0, "residual_scale is ", residual_scale, " with skip, which has no sum");
  Backward norm;
  Arguments arguments;
  arguments.images(norm, x, skip, rstd.dim() == 2 ? rstd.size(1) : 0);
  arguments.parameters(norm, weight, bias, modulations, scale_offset);
  arguments.dropout(norm, dropout_p, seed);
  norm.silu = silu, norm.residual_scale = static_cast<float>(residual_scale);
  norm.dy = arguments.image("dy", dy, x, norm.all_channels());
  if (dsummed) norm.dsummed = arguments.image("dsummed", *dsummed, x, norm.channels[0]);
  norm.mean = arguments.statistics("mean", mean, norm);
  norm.rstd = arguments.statistics("rstd", rstd, norm);

  const auto gradient_of = [&](const MaybeTensor& parameter, void** data) {
    if (!parameter) return empty({0}, torch_dtype(x));
    Tensor gradient = empty({norm.all_channels()}, torch_dtype(*parameter));
    *data = gradient.mutable_data_ptr();
    return gradient;
  };
  Tensor dx = empty_image(x, norm.channels[0], arguments.channels_last());
  Tensor dskip = skip ? empty_image(x, norm.channels[1], arguments.channels_last()) : empty({0}, torch_dtype(x));
  Tensor dweight = gradient_of(weight, &norm.dweight), dbias = gradient_of(bias, &norm.dbias);
  std::vector<Tensor> dmodulations;
  for (const Tensor& modulation : modulations) {
    Tensor gradient = empty({norm.batch, norm.all_channels()}, torch_dtype(modulation));
    norm.dmodulations[dmodulations.size()] = gradient.mutable_data_ptr();
    dmodulations.push_back(std::move(gradient));
  }
  norm.dx = dx.mutable_data_ptr();
  if (skip) norm.dskip = dskip.mutable_data_ptr();
  const int64_t shares = norm.batch * norm.all_channels();
  const std::unique_ptr<float[]> workspace(new float[static_cast<size_t>(2 * shares)]);
  norm.dscale = workspace.get(), norm.dshift = workspace.get() + shares;

  cut(norm);
  run(group_norm_kernels().backward, norm);
  if (norm.dweight || norm.dbias) {
    torch::stable::parallel_for(0, norm.all_channels(), std::max<int64_t>(64, elements_of_a_thread / norm.batch),
                                [&](int64_t first, int64_t last) { group_norm_kernels().reduce(norm, first, last); });
  }
  return {dx, dskip, dweight, dbias, dmodulations};
}

// Whether an argument of type Tensor? is absent or of a dtype that the kernels know.
bool is_known(StableIValue argument) {
  const auto* value = torch::stable::detail::to<StableIValue*>(argument);
  return value == nullptr || dtype_of(torch::stable::detail::to<AtenTensorHandle>(*value)).has_value();
}

// The kernels take images that have values, all of the arguments in dtypes of at most 32 bits.
bool is_native(AtenTensorHandle x, StableIValue weight, StableIValue bias, StableIValue modulations) {
  int64_t numel, dims;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_numel(x, &numel));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(x, &dims));
  if (!dtype_of(x) || numel == 0 || dims < 2 || !is_known(weight) || !is_known(bias)) return false;
  const auto list = torch::stable::detail::to<StableListHandle>(modulations);
  size_t size;
  STABLE_TORCH_ERROR_CODE_CHECK(torch_list_size(list, &size));
  for (size_t i = 0; i < size; ++i) {
    StableIValue item;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_list_get_item(list, i, &item));
    if (!dtype_of(torch::stable::detail::to<AtenTensorHandle>(item))) return false;  // the list keeps the tensor
  }
  return true;
}

void boxed_forward(Stack stack, uint64_t num_arguments, uint64_t num_outputs) {
  const bool is_taken = is_native(tensor_at(stack, 0), stack[3], stack[4], stack[5]);
  call_native("soda_kernels_native::modulated_group_norm", is_taken, TORCH_BOX(&forward), stack, num_arguments, num_outputs);
}

void boxed_backward(Stack stack, uint64_t num_arguments, uint64_t num_outputs) {
  if (is_native(tensor_at(stack, 2), stack[4], stack[5], stack[6])) {
    return TORCH_BOX(&backward)(stack, num_arguments, num_outputs);
  }
  // One list, made in soda_kernels/_native.py: torch_call_dispatcher of PyTorch 2.10 to 2.13 reads the results' types
  // in the wrong order, so that it cannot return tensors and then a list.
  using torch::stable::detail::from, torch::stable::detail::to;
  call_reference("soda_kernels_native::modulated_group_norm_backward", stack);
  std::vector<Tensor> gradients = to<std::vector<Tensor>>(stack[0]);
  for (int i = 0; i < 4; ++i) stack[i] = from(gradients[i]);
  stack[4] = from(std::vector<Tensor>(gradients.begin() + 4, gradients.end()));
}

}  // namespace
}  // namespace soda

STABLE_TORCH_LIBRARY_IMPL(soda_kernels, CPU, m) {
  m.impl("modulated_group_norm", soda::boxed_forward);
  m.impl("modulated_group_norm_backward", soda::boxed_backward);
}
