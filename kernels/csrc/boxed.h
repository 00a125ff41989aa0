// Calls as PyTorch's dispatcher makes them: a stack of arguments, which the results replace.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

namespace soda {

using Stack = StableIValue*;

// A tensor among the arguments, which the stack goes on holding.
static inline AtenTensorHandle tensor_at(Stack stack, int index) {
  return torch::stable::detail::to<AtenTensorHandle>(stack[index]);
}

// The same tensor, held by who asks.
static inline torch::stable::Tensor another_handle(Stack stack, int index) {
  AtenTensorHandle own;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(tensor_at(stack, index), &own));
  return torch::stable::Tensor(own);
}

// Call what takes an op's arguments where the library does not, under the name that soda_kernels/_native.py gave it.
static inline void call_reference(const char* name, Stack stack) {
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack, TORCH_ABI_VERSION));
}

// Call a kernel where it takes the arguments, else the reference.
static inline void call_native(const char* reference, bool is_taken, void (*kernel)(Stack, uint64_t, uint64_t),
                               Stack stack, uint64_t num_arguments, uint64_t num_outputs) {
  if (is_taken) return kernel(stack, num_arguments, num_outputs);
  call_reference(reference, stack);
}

}  // namespace soda
