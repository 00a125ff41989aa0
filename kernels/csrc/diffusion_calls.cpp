// The arguments of noise-schedule sampling.

#include "diffusion_calls.h"

#include <cstring>

namespace soda {
namespace {

bool has_dtype(AtenTensorHandle tensor, int32_t wanted) {
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor, &dtype));
  return dtype == wanted;
}

int64_t dims_of(AtenTensorHandle tensor) {
  int64_t dims;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(tensor, &dims));
  return dims;
}

bool is_on_cpu(AtenTensorHandle tensor) {
  static const int32_t cpu = aoti_torch_device_type_cpu();
  int32_t device;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor, &device));
  return device == cpu;
}

int64_t stride_of(const Tensor& vector) { return vector.dim() ? vector.stride(0) : 0; }

}  // namespace

std::string text_of(StringHandle handle) {
  size_t length;
  const char* data;
  STABLE_TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
  STABLE_TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
  std::string text(data, length);
  STABLE_TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
  return text;
}

AtenTensorHandle maybe_tensor_at(Stack stack, int index) {
  const auto* value = torch::stable::detail::to<StableIValue*>(stack[index]);
  return value ? torch::stable::detail::to<AtenTensorHandle>(*value) : nullptr;
}

int64_t length_of(AtenTensorHandle tensor) {
  int64_t numel;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_numel(tensor, &numel));
  return numel;
}

bool has_values(AtenTensorHandle image, bool or_pixels) {
  return (dtype_of(image) || (or_pixels && has_dtype(image, aoti_torch_dtype_uint8()))) && dims_of(image) >= 2 &&
         length_of(image) > 0;
}

bool is_number(AtenTensorHandle tensor) {
  return is_on_cpu(tensor) && (dtype_of(tensor) || has_dtype(tensor, aoti_torch_dtype_float64()));
}

bool is_table(AtenTensorHandle table) { return is_number(table) && dims_of(table) == 1; }

bool is_within(AtenTensorHandle indices, int64_t low, int64_t end) {
  if (!is_on_cpu(indices) || !has_dtype(indices, aoti_torch_dtype_int64()) || dims_of(indices) > 1) return false;
  void* data;
  int64_t* strides;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(indices, &data));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(indices, &strides));
  const int64_t count = length_of(indices), stride = dims_of(indices) ? strides[0] : 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t index = static_cast<const int64_t*>(data)[i * stride];
    if (index < low || index >= end) return false;
  }
  return true;
}

bool is_index(AtenTensorHandle index, int64_t low, int64_t end) {
  return length_of(index) == 1 && is_within(index, low, end);
}

double number_at(const Tensor& tensor, int64_t index) {
  const void* const data = tensor.const_data_ptr();
  const int64_t at = index * stride_of(tensor);
  switch (const auto dtype = dtype_of(tensor.get()); dtype.value_or(Dtype::float32)) {
    case Dtype::bfloat16: return widen(static_cast<const BFloat16*>(data)[at]);
    case Dtype::float16: return widen(static_cast<const Half*>(data)[at]);
    default: return dtype ? static_cast<const float*>(data)[at] : static_cast<const double*>(data)[at];
  }
}

int64_t integer_at(const Tensor& tensor, int64_t index) {
  return static_cast<const int64_t*>(tensor.const_data_ptr())[index * stride_of(tensor)];
}

Arguments::Arguments(const Tensor& like, int64_t tile) : channels_last_(is_channels_last(like)) {
  const auto sizes = like.sizes();
  images_.batch = sizes[0], images_.channels = sizes[1], images_.space = 1;
  for (size_t d = 2; d < sizes.size(); ++d) images_.space *= sizes[d];
  if (!channels_last_) images_.space *= images_.channels, images_.channels = 1;
  constexpr int64_t run = 32;  // places, of which every vector takes whole ones
  images_.tile = std::min(std::max(tile / images_.channels / run * run, run), images_.space);
  held_.reserve(8);
}

const void* Arguments::image(const char* name, const Tensor& tensor, const Tensor& like) {
  const auto sizes = tensor.sizes(), expected = like.sizes();
  STD_TORCH_CHECK(tensor.is_cpu() && std::equal(sizes.begin(), sizes.end(), expected.begin(), expected.end()), name,
                  " does not have the shape and device that the images have");
  held_.push_back(in_layout(tensor, channels_last_));
  return held_.back().const_data_ptr();
}

NoiseKey Arguments::key(const Tensor& seed, const Tensor& sample_ids, const Tensor& step, uint32_t stream) {
  return noise_key(seed, sample_ids, step, stream, images_.batch);
}

Tensor Arguments::empty_like(const Tensor& tensor, int32_t dtype) const {
  const auto sizes = tensor.sizes();
  return empty({sizes.begin(), sizes.end()}, dtype, channels_last_);
}

NoiseKey noise_key(const Tensor& seed, const Tensor& sample_ids, const Tensor& step, uint32_t stream, int64_t batch) {
  const int32_t int64 = aoti_torch_dtype_int64();
  STD_TORCH_CHECK(torch_dtype(seed) == int64 && seed.numel() == 1 && seed.is_cpu(), "seed must be one int64 number");
  STD_TORCH_CHECK(torch_dtype(sample_ids) == int64 && sample_ids.dim() == 1 && sample_ids.size(0) == batch &&
                      sample_ids.is_cpu(),
                  "sample_ids must be an int64 tensor of shape [N]");
  STD_TORCH_CHECK(torch_dtype(step) == int64 && step.is_cpu() &&
                      (step.numel() == 1 || (step.dim() == 1 && step.size(0) == batch)),
                  "step must be an int64 tensor of shape [] or [N]");
  NoiseKey key;
  key.seed = static_cast<uint64_t>(integer_at(seed, 0));
  key.sample_ids = static_cast<const int64_t*>(sample_ids.const_data_ptr());
  key.sample_ids_stride = sample_ids.stride(0);
  key.step = static_cast<const int64_t*>(step.const_data_ptr());
  key.step_stride = step.numel() == 1 ? 0 : step.stride(0);
  key.stream = stream;
  return key;
}

}  // namespace soda
