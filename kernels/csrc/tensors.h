// Tensors through LibTorch's stable C functions: their layouts, allocation, and copies into another layout.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "storage.h"

namespace soda {

using torch::stable::Tensor;

// torch's own numbers of the dtypes that the kernels compute in; nothing for any other.
std::optional<Dtype> dtype_of(AtenTensorHandle tensor);
int32_t torch_dtype(const Tensor& tensor);

// The layout that outputs for `tensor` get: channels_last where it is dense in it alone, else contiguous.
bool is_channels_last(const Tensor& tensor);

// An uninitialized CPU tensor, dense in the layout.
Tensor empty(const std::vector<int64_t>& sizes, int32_t dtype, bool channels_last = false);

// The same with strides of the caller's.
Tensor empty_strided(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, int32_t dtype);

// `like`'s shape with another number of channels.
Tensor empty_image(const Tensor& like, int64_t channels, bool channels_last);

// The tensor itself where it is dense in the layout, else a copy that is.
Tensor in_layout(const Tensor& tensor, bool channels_last);

}  // namespace soda

// For Python's ctypes: whether results hold NaN until they are written, so that a check sees what is not. Returns how many
// did since the last call.
extern "C" __attribute__((visibility("default"))) int soda_kernels_poison(int on);
