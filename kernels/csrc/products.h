// Products of small matrices of floats, of the sizes that stay in registers.
#pragma once

#include <type_traits>

#include "vec.h"

namespace soda::SODA_ISA {

// Sums that are kept in registers, 12 of 16 or 24 of 32, beside what they are made of.
constexpr int product_sums = lanes == 16 ? 24 : 12;

// Columns go in panels of two vectors. An odd vector makes the last one a panel of three, or of one if it is alone.
struct Panel {
  int64_t first, width;

  Panel(int64_t column, int64_t columns) {
    constexpr int64_t pair = 2 * lanes;
    const int64_t pairs = columns / pair, number = column / pair;
    const bool odd = columns % pair != 0, last = odd && number + 1 >= pairs;
    first = pairs == 0 ? 0 : last ? (pairs - 1) * pair : number * pair;
    width = last ? columns - first : pair;
  }
};

// Call f(vectors, first) for each panel.
template <class F>
SODA_INLINE void for_panels(int64_t columns, F f) {
  for (int64_t column = 0; column < columns;) {
    const Panel panel(column, columns);
    if (panel.width == lanes) f(std::integral_constant<int, 1>{}, column);
    else if (panel.width == 2 * lanes) f(std::integral_constant<int, 2>{}, column);
    else f(std::integral_constant<int, 3>{}, column);
    column += panel.width;
  }
}

template <int rows, int vectors>
SODA_INLINE void store_sums(const Floats (&sums)[rows][vectors], float* c, int64_t stride, bool adds) {
  for (int r = 0; r < rows; ++r) {
    for (int v = 0; v < vectors; ++v) {
      float* const to = c + r * stride + v * lanes;
      store(to, adds ? load(to) + sums[r][v] : sums[r][v]);
    }
  }
}

// c[r, :] = or, if it adds, += sum over k of a[r, k] b[k, :]; rows of each matrix are its stride apart.
template <int rows, int vectors>
SODA_INLINE void multiply_rows(const float* a, int64_t a_stride, const float* b, int64_t b_stride, float* c,
                               int64_t c_stride, int64_t depth, bool adds) {
  Floats sums[rows][vectors] = {};
  for (int64_t k = 0; k < depth; ++k, b += b_stride) {
    Floats columns[vectors];
    for (int v = 0; v < vectors; ++v) columns[v] = load(b + v * lanes);
    for (int r = 0; r < rows; ++r) {
      const Floats factor = broadcast(a[r * a_stride + k]);
      for (int v = 0; v < vectors; ++v) sums[r][v] += factor * columns[v];
    }
  }
  store_sums<rows, vectors>(sums, c, c_stride, adds);
}

// c[r, :] = or, if it adds, += sum over k of a[k, r] b[k, :]; as above.
template <int rows, int vectors>
SODA_INLINE void multiply_columns(const float* a, int64_t a_stride, const float* b, int64_t b_stride, float* c,
                                  int64_t c_stride, int64_t depth, bool adds) {
  Floats sums[rows][vectors] = {};
  for (int64_t k = 0; k < depth; ++k, a += a_stride, b += b_stride) {
    Floats columns[vectors];
    for (int v = 0; v < vectors; ++v) columns[v] = load(b + v * lanes);
    for (int r = 0; r < rows; ++r) {
      const Floats factor = broadcast(a[r]);
      for (int v = 0; v < vectors; ++v) sums[r][v] += factor * columns[v];
    }
  }
  store_sums<rows, vectors>(sums, c, c_stride, adds);
}

// Call f(rows, first) for runs of rows, as many at a time as there are registers, then fewer.
template <int vectors, class F>
SODA_INLINE void for_rows(int64_t count, F f) {
  constexpr int most = product_sums / vectors;
  int64_t first = 0;
  for (; first + most <= count; first += most) f(std::integral_constant<int, most>{}, first);
  for (; first + 4 <= count; first += 4) f(std::integral_constant<int, 4>{}, first);
  for (; first + 2 <= count; first += 2) f(std::integral_constant<int, 2>{}, first);
  for (; first < count; ++first) f(std::integral_constant<int, 1>{}, first);
}

}  // namespace soda::SODA_ISA
