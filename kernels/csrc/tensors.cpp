// Layouts, allocation and copies of tensors.

#include "tensors.h"

#include <atomic>
#include <cstring>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace soda {
namespace {

// Blocks beyond 32 MiB glibc maps anew from the system, however often they came before, and each of their pages of 4 KiB
// faults at its first write: 24 of the 27 ms in which 48 MiB were normalized on one core of a virtual machine (Xeon of the
// Sapphire Rapids generation); with pages of 2 MiB it took 11 to 15 ms.
constexpr int64_t always_mapped_bytes = 1 << 25;

// Ask the system for pages of 2 MiB, where it gives them to who asks.
void advise_huge_pages([[maybe_unused]] AtenTensorHandle tensor) {
#if defined(__linux__)
  constexpr uintptr_t page = 4096;
  int64_t bytes;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(tensor, &bytes));
  if (bytes < always_mapped_bytes) return;
  void* data;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(tensor, &data));
  const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  madvise(reinterpret_cast<void*>(first), static_cast<size_t>(bytes) - page, MADV_HUGEPAGE);  // or not: no error
#endif
}

// Whether allocations hold bytes of ones, which are NaN, until they are written.
std::atomic<bool> poisoned{false};
std::atomic<int> num_poisoned{0};

void poison(AtenTensorHandle tensor) {
  int64_t bytes;
  void* data;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(tensor, &bytes));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(tensor, &data));
  if (bytes == 0) return;
  std::memset(data, 0xFF, static_cast<size_t>(bytes));
  ++num_poisoned;
}

// Whether the sizes are dense in the order of dimensions given, the innermost first; size 1 has any stride.
template <class Order>
bool is_dense(const Tensor& tensor, Order order) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  int64_t expected = 1;
  for (size_t i = 0; i < sizes.size(); ++i) {
    const size_t d = order(i, sizes.size());
    if (sizes[d] != 1 && strides[d] != expected) return false;
    expected *= sizes[d];
  }
  return true;
}

size_t contiguous_order(size_t i, size_t dims) { return dims - 1 - i; }

// Channels, then space from the last dimension on, then the batch.
size_t channels_last_order(size_t i, size_t dims) { return i == 0 ? 1 : i == dims - 1 ? 0 : dims - i; }

bool is_dense_in(const Tensor& tensor, bool channels_last) {
  return channels_last ? is_dense(tensor, channels_last_order) : is_dense(tensor, contiguous_order);
}

}  // namespace

std::optional<Dtype> dtype_of(AtenTensorHandle tensor) {
  static const int32_t float32 = aoti_torch_dtype_float32(), bfloat16 = aoti_torch_dtype_bfloat16(),
                       float16 = aoti_torch_dtype_float16();
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor, &dtype));
  if (dtype == float32) return Dtype::float32;
  if (dtype == bfloat16) return Dtype::bfloat16;
  if (dtype == float16) return Dtype::float16;
  return std::nullopt;
}

int32_t torch_dtype(const Tensor& tensor) {
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  return dtype;
}

bool is_channels_last(const Tensor& tensor) {
  const int64_t dims = tensor.dim();
  return (dims == 4 || dims == 5) && is_dense_in(tensor, true) && !is_dense_in(tensor, false);
}

Tensor empty(const std::vector<int64_t>& sizes, int32_t dtype, bool channels_last) {
  std::vector<int64_t> strides(sizes.size());
  int64_t next = 1;
  for (size_t i = 0; i < sizes.size(); ++i) {
    const size_t d = channels_last ? channels_last_order(i, sizes.size()) : contiguous_order(i, sizes.size());
    strides[d] = next;
    next *= sizes[d] > 0 ? sizes[d] : 1;
  }
  return empty_strided(sizes, strides, dtype);
}

Tensor empty_strided(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, int32_t dtype) {
  static const int32_t cpu = aoti_torch_device_type_cpu();
  // Called directly: through the dispatcher by name, an allocation takes over a microsecond.
  AtenTensorHandle tensor;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                                         dtype, cpu, 0, &tensor));
  advise_huge_pages(tensor);
  if (poisoned.load(std::memory_order_relaxed)) poison(tensor);
  return Tensor(tensor);
}

Tensor empty_image(const Tensor& like, int64_t channels, bool channels_last) {
  const auto sizes = like.sizes();
  std::vector<int64_t> shape(sizes.begin(), sizes.end());
  shape[1] = channels;
  return empty(shape, torch_dtype(like), channels_last);
}

Tensor in_layout(const Tensor& tensor, bool channels_last) {
  if (is_dense_in(tensor, channels_last)) return tensor;
  const auto sizes = tensor.sizes();
  Tensor copy = empty({sizes.begin(), sizes.end()}, torch_dtype(tensor), channels_last);
  torch::stable::copy_(copy, tensor);
  return copy;
}

}  // namespace soda

int soda_kernels_poison(int on) {
  soda::poisoned.store(on != 0);
  return soda::num_poisoned.exchange(0);
}
