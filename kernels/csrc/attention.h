// Attention's arguments as plain data, and the kernels that each instruction set has for it.
//
//     S = scale Q K'      lse = log sum exp S      P = exp(S - lse)      O = P V
//     dV = P' dO      dS = scale P (dO V' - sum_d O dO)      dQ = dS K      dK = dS' Q
//
// Of [B, T, H, D], in float. What lies transposed in a product, keys and in the backward values, is packed for it, once for
// each unit of work; all else is read where it lies. Keys go in blocks, whose scores stay in the second-level cache; from one block to the next a row keeps its greatest score and its
// sum (the online softmax of Milakov and Gimelshein 2018). No result depends on the number of threads.
#pragma once

#include <cstdint>

namespace soda {

// The rows of all heads: numbers of a row lie together (of lse, one number).
template <class T>
struct Rows {
  T* data = nullptr;
  int64_t batch = 0, row = 0, head = 0;  // strides

  [[gnu::always_inline]] T* of_head(int64_t b, int64_t h) const { return data + b * batch + h * head; }
};

struct Attention {
  int64_t batch = 0, heads = 0, queries = 0, keys = 0, head_dim = 0;
  float scale = 1.0f;
  Rows<const float> q, k, v;
};

struct AttentionForward : Attention {
  Rows<float> o, lse;
  int64_t unit_queries = 0;  // a unit is a run of a head's queries

  [[gnu::always_inline]] int64_t units_of_head() const { return (queries + unit_queries - 1) / unit_queries; }
};

// A unit is a head.
struct AttentionBackward : Attention {
  Rows<const float> gradient, o, lse;  // gradient is dO
  Rows<float> dq, dk, dv;
};

struct AttentionKernels {
  int64_t lanes;  // must divide the head dim
  void (*forward)(const AttentionForward&, int64_t first_unit, int64_t last_unit);
  void (*backward)(const AttentionBackward&, int64_t first_head, int64_t last_head);
};

namespace generic { extern const AttentionKernels attention; }
namespace avx2 { extern const AttentionKernels attention; }
namespace avx512 { extern const AttentionKernels attention; }

}  // namespace soda
