// Attention on the CPU: what the kernels take, their outputs, and their registration with PyTorch's dispatcher.

#include "attention.h"

#include <algorithm>
#include <tuple>

#include "boxed.h"
#include "dispatch.h"
#include "tensors.h"

namespace soda {
namespace {

// Of GPUs: on a CPU there is nothing to choose.
using Backend = std::optional<StringHandle>;

void drop(const Backend& backend) {
  if (backend) STABLE_TORCH_ERROR_CODE_CHECK(torch_delete_string(*backend));
}

// What the head dim is a multiple of.
constexpr int64_t channel_multiple = 8;
// Multiplications of a product that are worth a thread, and queries of a unit where a head is cut: as many as the kernel
// takes together.
constexpr int64_t products_of_a_thread = 1 << 17, least_queries = 24;

float* data(const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

const float* read(const Tensor& tensor) { return static_cast<const float*>(tensor.const_data_ptr()); }

// Of [B, T, H, D].
template <class T>
Rows<T> rows_of(T* data, const Tensor& tensor) {
  const auto strides = tensor.strides();
  return {data, strides[0], strides[1], strides[2]};
}

// Of q, k or v in [B, T, 3, H, D].
template <class T>
Rows<T> packed_rows(T* data, const Tensor& packed, int64_t part) {
  const auto strides = packed.strides();
  return {data + part * strides[2], strides[0], strides[1], strides[3]};
}

// Of [B, H, T].
template <class T>
Rows<T> lse_rows(T* data, const Tensor& lse) {
  const auto strides = lse.strides();
  return {data, strides[0], strides[2], strides[1]};
}

template <class Call>
Call call_of(const Tensor& q, const Tensor& k, const Tensor& v, double scale) {
  Call of;
  of.batch = q.size(0), of.queries = q.size(1), of.heads = q.size(2), of.head_dim = q.size(3), of.keys = k.size(1);
  of.scale = static_cast<float>(scale);
  of.q = rows_of(read(q), q), of.k = rows_of(read(k), k), of.v = rows_of(read(v), v);
  return of;
}

int64_t grain(const Attention& of, int64_t queries) {
  return std::max<int64_t>(1, products_of_a_thread / (queries * of.keys * of.head_dim));
}

std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v, double scale, const Backend& backend) {
  drop(backend);
  auto of = call_of<AttentionForward>(q, k, v, scale);
  const int32_t dtype = torch_dtype(q);
  Tensor o = empty({of.batch, of.queries, of.heads, of.head_dim}, dtype);
  // Heads innermost, as PyTorch's own kernel has it.
  Tensor lse = empty_strided({of.batch, of.heads, of.queries}, {of.heads * of.queries, 1, of.heads}, dtype);
  of.o = rows_of(data(o), o), of.lse = lse_rows(data(lse), lse);
  // Where there are fewer heads than threads, parts of a head; a query's results are the same in any part.
  const int64_t heads = of.batch * of.heads, threads = torch::stable::get_num_threads();
  const int64_t parts = (threads + heads - 1) / heads;
  of.unit_queries = std::max((of.queries + parts - 1) / parts, std::min(least_queries, of.queries));
  torch::stable::parallel_for(0, heads * of.units_of_head(), grain(of, of.unit_queries), [&](int64_t first, int64_t last) {
    attention_kernels(of.head_dim).forward(of, first, last);
  });
  return {o, lse};
}

bool has_whole_rows(const Tensor& tensor) { return tensor.stride(tensor.dim() - 1) == 1; }

void run_backward(AttentionBackward& of, const Tensor& gradient_, const Tensor& o, const Tensor& lse) {
  const Tensor gradient = has_whole_rows(gradient_) ? gradient_ : in_layout(gradient_, false);  // a sum's is one number
  of.gradient = rows_of(read(gradient), gradient), of.o = rows_of(read(o), o), of.lse = lse_rows(read(lse), lse);
  torch::stable::parallel_for(0, of.batch * of.heads, grain(of, of.queries), [&](int64_t first, int64_t last) {
    attention_kernels(of.head_dim).backward(of, first, last);
  });
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& gradient, const Tensor& q, const Tensor& k, const Tensor& v,
                                            const Tensor& o, const Tensor& lse, double scale, const Backend& backend) {
  drop(backend);
  auto of = call_of<AttentionBackward>(q, k, v, scale);
  const int32_t dtype = torch_dtype(q);
  Tensor dq = empty({of.batch, of.queries, of.heads, of.head_dim}, dtype);
  Tensor dk = empty({of.batch, of.keys, of.heads, of.head_dim}, dtype);
  Tensor dv = empty({of.batch, of.keys, of.heads, of.head_dim}, dtype);
  of.dq = rows_of(data(dq), dq), of.dk = rows_of(data(dk), dk), of.dv = rows_of(data(dv), dv);
  run_backward(of, gradient, o, lse);
  return {dq, dk, dv};
}

Tensor backward_qkvpacked(const Tensor& gradient, const Tensor& qkv, const Tensor& o, const Tensor& lse, double scale,
                          const Backend& backend) {
  drop(backend);
  AttentionBackward of;
  of.batch = qkv.size(0), of.queries = of.keys = qkv.size(1), of.heads = qkv.size(3), of.head_dim = qkv.size(4);
  of.scale = static_cast<float>(scale);
  Tensor dqkv = empty({of.batch, of.queries, 3, of.heads, of.head_dim}, torch_dtype(qkv));
  Rows<const float>* const parts[] = {&of.q, &of.k, &of.v};
  Rows<float>* const gradients[] = {&of.dq, &of.dk, &of.dv};
  for (int64_t i = 0; i < 3; ++i) {
    *parts[i] = packed_rows(read(qkv), qkv, i), *gradients[i] = packed_rows(data(dqkv), dqkv, i);
  }
  run_backward(of, gradient, o, lse);
  return dqkv;
}

bool is_float(const Tensor& tensor, int64_t dims) {
  return tensor.is_cpu() && dtype_of(tensor.get()) == Dtype::float32 && tensor.dim() == dims && tensor.numel() > 0;
}

// Rows whose numbers lie together and fill whole vectors.
bool has_rows(const Tensor& tensor, int64_t dims) {
  return is_float(tensor, dims) && has_whole_rows(tensor) && tensor.size(dims - 1) % channel_multiple == 0;
}

bool has_sizes(const Tensor& tensor, const std::vector<int64_t>& sizes) {
  const auto actual = tensor.sizes();
  return actual.size() == sizes.size() && std::equal(sizes.begin(), sizes.end(), actual.begin());
}

bool is_native(const Tensor& q, const Tensor& k, const Tensor& v) {
  if (!has_rows(q, 4) || !has_rows(k, 4) || !has_rows(v, 4)) return false;
  const std::vector<int64_t> of_keys = {q.size(0), k.size(1), q.size(2), q.size(3)};
  return has_sizes(k, of_keys) && has_sizes(v, of_keys);
}

bool is_native_backward(Stack stack, int o_index, int64_t batch, int64_t queries, int64_t heads, int64_t head_dim) {
  const Tensor gradient = another_handle(stack, 0);
  const Tensor o = another_handle(stack, o_index), lse = another_handle(stack, o_index + 1);
  const std::vector<int64_t> sizes = {batch, queries, heads, head_dim};
  return is_float(gradient, 4) && has_sizes(gradient, sizes) && has_rows(o, 4) && has_sizes(o, sizes) && is_float(lse, 3) &&
         has_sizes(lse, {batch, heads, queries});
}

void boxed_forward(Stack stack, uint64_t num_arguments, uint64_t num_outputs) {
  const bool is_taken = is_native(another_handle(stack, 0), another_handle(stack, 1), another_handle(stack, 2));
  call_native("soda_kernels_native::attention", is_taken, TORCH_BOX(&forward), stack, num_arguments, num_outputs);
}

void boxed_backward(Stack stack, uint64_t num_arguments, uint64_t num_outputs) {
  const Tensor q = another_handle(stack, 1);
  const bool is_taken = is_native(q, another_handle(stack, 2), another_handle(stack, 3)) &&
                        is_native_backward(stack, 4, q.size(0), q.size(1), q.size(2), q.size(3));
  call_native("soda_kernels_native::attention_backward", is_taken, TORCH_BOX(&backward), stack, num_arguments, num_outputs);
}

void boxed_backward_qkvpacked(Stack stack, uint64_t num_arguments, uint64_t num_outputs) {
  const Tensor qkv = another_handle(stack, 1);
  const bool is_taken = has_rows(qkv, 5) && qkv.size(2) == 3 &&
                        is_native_backward(stack, 2, qkv.size(0), qkv.size(1), qkv.size(3), qkv.size(4));
  call_native("soda_kernels_native::attention_qkvpacked_backward", is_taken, TORCH_BOX(&backward_qkvpacked), stack,
              num_arguments, num_outputs);
}

}  // namespace
}  // namespace soda

STABLE_TORCH_LIBRARY_IMPL(soda_kernels, CPU, m) {
  m.impl("attention", soda::boxed_forward);
  m.impl("attention_backward", soda::boxed_backward);
  m.impl("attention_qkvpacked_backward", soda::boxed_backward_qkvpacked);
}
