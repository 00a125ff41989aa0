// Products of small matrices of floats, of the sizes that stay in registers.
#pragma once

#include "vec.h"

namespace soda::SODA_ISA {

// Rows and vectors of a result that is summed in registers: 12 sums and what they are made of fit into 16 registers, 24
// into 32.
constexpr int product_rows = lanes == 16 ? 12 : 6;
constexpr int product_vectors = 2;

// Widths of a panel of columns, the last one being half as wide where they do not come out even.
SODA_INLINE int64_t panel_width(int64_t first, int64_t columns) {
  return columns - first >= product_vectors * lanes ? product_vectors * lanes : lanes;
}

// c[r, :] = sum over k of a[r, k] b[k, :], the rows of a and c `a_stride` and `c_stride` apart, those of b together.
template <int rows, int vectors>
SODA_INLINE void multiply_rows(const float* a, int64_t a_stride, const float* b, float* c, int64_t c_stride, int64_t depth) {
  Floats sums[rows][vectors] = {};
  for (int64_t k = 0; k < depth; ++k, b += vectors * lanes) {
    Floats columns[vectors];
    for (int v = 0; v < vectors; ++v) columns[v] = load(b + v * lanes);
    for (int r = 0; r < rows; ++r) {
      const Floats factor = broadcast(a[r * a_stride + k]);
      for (int v = 0; v < vectors; ++v) sums[r][v] += factor * columns[v];
    }
  }
  for (int r = 0; r < rows; ++r) {
    for (int v = 0; v < vectors; ++v) store(c + r * c_stride + v * lanes, sums[r][v]);
  }
}

// c[r, :] = or, if it adds, += sum over k of a[k, r] b[k, :]; as above, with the rows of a `a_stride` apart.
template <int rows, int vectors>
SODA_INLINE void multiply_columns(const float* a, int64_t a_stride, const float* b, float* c, int64_t c_stride,
                                  int64_t depth, bool adds) {
  Floats sums[rows][vectors] = {};
  for (int64_t k = 0; k < depth; ++k, a += a_stride, b += vectors * lanes) {
    Floats columns[vectors];
    for (int v = 0; v < vectors; ++v) columns[v] = load(b + v * lanes);
    for (int r = 0; r < rows; ++r) {
      const Floats factor = broadcast(a[r]);
      for (int v = 0; v < vectors; ++v) sums[r][v] += factor * columns[v];
    }
  }
  for (int r = 0; r < rows; ++r) {
    for (int v = 0; v < vectors; ++v) {
      float* const to = c + r * c_stride + v * lanes;
      store(to, adds ? load(to) + sums[r][v] : sums[r][v]);
    }
  }
}

// Call f(rows, first) for runs of rows, as many at a time as there are registers, then fewer.
template <class F>
SODA_INLINE void for_rows(int64_t count, F f) {
  int64_t first = 0;
  for (; first + product_rows <= count; first += product_rows) f(std::integral_constant<int, product_rows>{}, first);
  for (; first + 4 <= count; first += 4) f(std::integral_constant<int, 4>{}, first);
  for (; first + 2 <= count; first += 2) f(std::integral_constant<int, 2>{}, first);
  for (; first < count; ++first) f(std::integral_constant<int, 1>{}, first);
}

}  // namespace soda::SODA_ISA
