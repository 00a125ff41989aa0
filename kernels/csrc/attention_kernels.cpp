// Attention for one instruction set: compiled once for each, with its flags and -DSODA_ISA=its name.

#include "attention.h"

#include <cmath>
#include <cstring>
#include <limits>

#include "products.h"
#include "silu.h"
#include "steps.h"

namespace soda::SODA_ISA {
namespace {

// Keys of a block, and queries that look at one together: their scores take 24 KiB. In the backward, scores of a run of
// queries and a block, of which there are two matrices: the more queries, the fewer times sums over them are written and
// read. On two cores of an EPYC of the Zen 3 generation, for 64 to 4096 keys, 48 queries, blocks of 128 keys in the backward
// and half and twice as many scores there were the same within noise; with blocks of 512 keys a forward of 1024 took 10%
// longer. Other limits were not tried.
constexpr int64_t block_keys = 256, forward_queries = 24, backward_scores = 1 << 14;
constexpr int64_t row_multiple = 12;  // which suits the rows of a product in registers

int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }

int64_t whole_vectors(int64_t count) { return (count + lanes - 1) / lanes * lanes; }

// Calls f(first, count) for runs of at most `most`.
template <class F>
void for_runs(int64_t count, int64_t most, F f) {
  for (int64_t first = 0; first < count; first += most) f(first, lesser(most, count - first));
}

// [count, depth] rows times a factor as [panels of rows, depth, panel], with zeros after the last row.
void pack_transposed(const float* rows, int64_t stride, int64_t count, int64_t depth, float factor, float* packed) {
  const int64_t columns = whole_vectors(count);
  for (int64_t column = 0; column < columns; column += 4) {
    const Panel panel(column, columns);
    float* const to = packed + panel.first * depth + column - panel.first;
    for (int64_t d = 0; d < depth; d += lanes) {
      Floats x[4];
      for (int i = 0; i < 4; ++i) x[i] = column + i < count ? load(rows + (column + i) * stride + d) * factor : Floats{};
      transpose_fours(x);
      for (int i = 0; i < 4; ++i) {
        float numbers[lanes];
        store(numbers, x[i]);
        for (int l = 0; l < lanes; l += 4) std::memcpy(to + (d + l + i) * panel.width, numbers + l, 4 * sizeof(float));
      }
    }
  }
}

// c [rows, columns] = a times what `pack_transposed` left of `columns` rows, rounded up to whole vectors.
void multiply_packed(const float* a, int64_t a_stride, int64_t rows, const float* packed, float* c, int64_t columns,
                     int64_t depth) {
  for_panels(columns, [&](auto vectors, int64_t panel) {
    for_rows<vectors>(rows, [&](auto count, int64_t r) {
      multiply_rows<count, vectors>(a + r * a_stride, a_stride, packed + panel * depth, vectors * lanes,
                                    c + r * columns + panel, columns, depth, false);
    });
  });
}

// c [rows, columns] = or += a b, and = or += a' b, for b whose rows lie as they came.
void multiply(const float* a, int64_t a_stride, int64_t rows, const float* b, int64_t b_stride, int64_t depth, float* c,
              int64_t c_stride, int64_t columns, bool adds) {
  for_panels(columns, [&](auto vectors, int64_t panel) {
    for_rows<vectors>(rows, [&](auto count, int64_t r) {
      multiply_rows<count, vectors>(a + r * a_stride, a_stride, b + panel, b_stride, c + r * c_stride + panel, c_stride,
                                    depth, adds);
    });
  });
}

void multiply_transposed(const float* a, int64_t a_stride, int64_t rows, const float* b, int64_t b_stride, int64_t depth,
                         float* c, int64_t c_stride, int64_t columns, bool adds) {
  for_panels(columns, [&](auto vectors, int64_t panel) {
    for_rows<vectors>(rows, [&](auto count, int64_t r) {
      multiply_columns<count, vectors>(a + r, a_stride, b + panel, b_stride, c + r * c_stride + panel, c_stride, depth,
                                       adds);
    });
  });
}

// Replace x by e^-x for x of at least about 0, by 0 where that is below the normal numbers.
template <int count>
SODA_INLINE void probabilities(Floats (&x)[count]) {
  Words tiny[count];
  for (int i = 0; i < count; ++i) tiny[i] = reinterpret_cast<Words>(x[i] > broadcast(most));  // not of a NaN
  for (int i = 0; i < count; ++i) x[i] = at_most(most, x[i]);
  exponential_of_negative<false>(x);
  for (int i = 0; i < count; ++i) x[i] = as_floats(as_words(x[i]) & ~tiny[i]);
}

// Call f(vectors, first) for runs of four vectors, then for single ones.
template <class F>
SODA_INLINE void for_fours(int64_t columns, F f) {
  int64_t j = 0;
  for (; j + 4 * lanes <= columns; j += 4 * lanes) f(std::integral_constant<int, 4>{}, j);
  for (; j < columns; j += lanes) f(std::integral_constant<int, 1>{}, j);
}

void scale_row(float* row, int64_t columns, float factor) {
  for (int64_t j = 0; j < columns; j += lanes) store(row + j, load(row + j) * factor);
}

// What a query has seen of its scores in the blocks so far.
struct Seen {
  // Not infinite: a block whose scores are all -inf is to weigh nothing, where inf - inf would be a NaN.
  float greatest = -std::numeric_limits<float>::max(), sum = 0.0f;  // of exp(score - greatest)
};

// Replace the scores of a block by exp(score - greatest); returns what sums over earlier blocks have to be scaled by.
float take_scores(float* scores, int64_t columns, Seen* seen) {
  Floats greatest = broadcast(seen->greatest);
  for (int64_t j = 0; j < columns; j += lanes) {
    const Floats x = load(scores + j);
    greatest = greatest > x ? greatest : x;
  }
  float lane[lanes];
  store(lane, greatest);
  for (int i = 1; i < lanes; ++i) lane[0] = lane[0] > lane[i] ? lane[0] : lane[i];
  const Floats bound = broadcast(lane[0]);
  Floats sum = {};
  for_fours(columns, [&](auto vectors, int64_t j) {
    Floats x[vectors];
    for (int i = 0; i < vectors; ++i) x[i] = bound - load(scores + j + i * lanes);
    probabilities(x);
    for (int i = 0; i < vectors; ++i) store(scores + j + i * lanes, x[i]), sum += x[i];
  });
  const float before = std::exp(seen->greatest - lane[0]);
  seen->sum = seen->sum * before + sum_of_lanes(sum), seen->greatest = lane[0];
  return before;
}

void forward_unit(const AttentionForward& of, const float* q, const float* k, const float* v, float* o, float* lse,
                  int64_t queries, float* packed, float* scores, Seen* seen) {
  const int64_t depth = of.head_dim;
  for (int64_t i = 0; i < queries; ++i) seen[i] = Seen{};
  for_runs(of.keys, block_keys, [&](int64_t first_key, int64_t keys) {
    const int64_t columns = whole_vectors(keys);
    pack_transposed(k + first_key * of.k.row, of.k.row, keys, depth, of.scale, packed);
    for_runs(queries, forward_queries, [&](int64_t first, int64_t rows) {
      multiply_packed(q + first * of.q.row, of.q.row, rows, packed, scores, columns, depth);
      for (int64_t r = 0; r < rows; ++r) {
        float* const row = scores + r * columns;
        for (int64_t j = keys; j < columns; ++j) row[j] = -INFINITY;
        const float before = take_scores(row, columns, seen + first + r);
        if (first_key > 0) scale_row(o + (first + r) * of.o.row, depth, before);
      }
      multiply(scores, columns, rows, v + first_key * of.v.row, of.v.row, keys, o + first * of.o.row, of.o.row, depth,
               first_key > 0);
    });
  });
  for (int64_t i = 0; i < queries; ++i) {
    scale_row(o + i * of.o.row, depth, 1.0f / seen[i].sum);
    lse[i * of.lse.row] = seen[i].greatest + std::log(seen[i].sum);
  }
}

void forward(const AttentionForward& of, int64_t first_unit, int64_t last_unit) {
  const int64_t columns = whole_vectors(lesser(of.keys, block_keys));
  const int64_t packed_size = columns * of.head_dim, scores_size = forward_queries * columns;
  char none[1];
  Scratch scratch(Scratch::bytes<float>(packed_size) + Scratch::bytes<float>(scores_size) +
                      Scratch::bytes<Seen>(of.unit_queries), none);
  float* const packed = scratch.take<float>(packed_size);
  float* const scores = scratch.take<float>(scores_size);
  Seen* const seen = scratch.take<Seen>(of.unit_queries);
  for (int64_t unit = first_unit; unit < last_unit; ++unit) {
    const int64_t head = unit / of.units_of_head(), first = unit % of.units_of_head() * of.unit_queries;
    const int64_t b = head / of.heads, h = head % of.heads;
    forward_unit(of, of.q.of_head(b, h) + first * of.q.row, of.k.of_head(b, h), of.v.of_head(b, h),
                 of.o.of_head(b, h) + first * of.o.row, of.lse.of_head(b, h) + first * of.lse.row,
                 lesser(of.unit_queries, of.queries - first), packed, scores, seen);
  }
}

float product_of_rows(const float* a, const float* b, int64_t columns) {
  Floats sum = {};
  for (int64_t j = 0; j < columns; j += lanes) sum += load(a + j) * load(b + j);
  return sum_of_lanes(sum);
}

// Replace scores by P and products by dS.
void take_gradients(float* scores, float* products, int64_t columns, float lse, float delta, float scale) {
  for_fours(columns, [&](auto vectors, int64_t j) {
    Floats x[vectors];
    for (int i = 0; i < vectors; ++i) x[i] = lse - load(scores + j + i * lanes);
    probabilities(x);
    for (int i = 0; i < vectors; ++i) {
      float* const product = products + j + i * lanes;
      store(scores + j + i * lanes, x[i]);
      store(product, x[i] * scale * (load(product) - delta));
    }
  });
}

struct BackwardScratch {
  float *keys, *values, *scores, *products, *delta;
};

int64_t rows_of(int64_t columns) {
  const int64_t rows = backward_scores / columns / row_multiple * row_multiple;
  return rows > row_multiple ? rows : row_multiple;
}

void backward_head(const AttentionBackward& of, int64_t b, int64_t h, const BackwardScratch& scratch) {
  const int64_t depth = of.head_dim;
  const float *const q = of.q.of_head(b, h), *const gradient = of.gradient.of_head(b, h), *const o = of.o.of_head(b, h);
  const float* const lse = of.lse.of_head(b, h);
  float* const dq = of.dq.of_head(b, h);
  for (int64_t i = 0; i < of.queries; ++i) {
    scratch.delta[i] = product_of_rows(o + i * of.o.row, gradient + i * of.gradient.row, depth);
  }
  for_runs(of.keys, block_keys, [&](int64_t first_key, int64_t keys) {
    const int64_t columns = whole_vectors(keys);
    const float* const k = of.k.of_head(b, h) + first_key * of.k.row;
    float* const dk = of.dk.of_head(b, h) + first_key * of.dk.row;
    float* const dv = of.dv.of_head(b, h) + first_key * of.dv.row;
    pack_transposed(k, of.k.row, keys, depth, of.scale, scratch.keys);
    pack_transposed(of.v.of_head(b, h) + first_key * of.v.row, of.v.row, keys, depth, 1.0f, scratch.values);
    for_runs(of.queries, rows_of(columns), [&](int64_t first, int64_t rows) {
      const float *const its_q = q + first * of.q.row, *const its_gradient = gradient + first * of.gradient.row;
      multiply_packed(its_q, of.q.row, rows, scratch.keys, scratch.scores, columns, depth);
      multiply_packed(its_gradient, of.gradient.row, rows, scratch.values, scratch.products, columns, depth);
      for (int64_t r = 0; r < rows; ++r) {
        take_gradients(scratch.scores + r * columns, scratch.products + r * columns, columns,
                       lse[(first + r) * of.lse.row], scratch.delta[first + r], of.scale);
      }
      multiply_transposed(scratch.scores, columns, keys, its_gradient, of.gradient.row, rows, dv, of.dv.row, depth, first > 0);
      multiply_transposed(scratch.products, columns, keys, its_q, of.q.row, rows, dk, of.dk.row, depth, first > 0);
      multiply(scratch.products, columns, rows, k, of.k.row, keys, dq + first * of.dq.row, of.dq.row, depth, first_key > 0);
    });
  });
}

void backward(const AttentionBackward& of, int64_t first_head, int64_t last_head) {
  const int64_t columns = whole_vectors(lesser(of.keys, block_keys));
  const int64_t packed_size = columns * of.head_dim, scores_size = rows_of(columns) * columns;
  char none[1];
  Scratch memory(2 * Scratch::bytes<float>(packed_size) + 2 * Scratch::bytes<float>(scores_size) +
                     Scratch::bytes<float>(of.queries), none);
  BackwardScratch scratch;
  scratch.keys = memory.take<float>(packed_size), scratch.values = memory.take<float>(packed_size);
  scratch.scores = memory.take<float>(scores_size), scratch.products = memory.take<float>(scores_size);
  scratch.delta = memory.take<float>(of.queries);
  for (int64_t head = first_head; head < last_head; ++head) backward_head(of, head / of.heads, head % of.heads, scratch);
}

}  // namespace

const AttentionKernels attention = {lanes, forward, backward};

}  // namespace soda::SODA_ISA
