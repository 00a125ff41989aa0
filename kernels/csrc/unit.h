// What both layouts' kernels share: a thread's scratch memory, merged moments, the formulas of one vector.
#pragma once

#include <cmath>
#include <cstdlib>

#include "affine.h"
#include "dropout.h"
#include "silu.h"

namespace soda::SODA_ISA {

// Memory for a unit's arrays: the caller's where it is enough, else its own. Each array starts on a cache line and has
// room for a whole vector after its end.
class Scratch {
 public:
  template <int64_t size>
  Scratch(int64_t needed, char (&buffer)[size])
      : own_(needed + 64 > size ? static_cast<char*>(std::malloc(static_cast<size_t>(needed) + 64)) : nullptr),
        start_(own_ ? own_ : buffer) {
    if (needed + 64 > size && !own_) std::abort();
    rewind();
  }
  ~Scratch() { std::free(own_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  void rewind() { next_ = start_ + (64 - reinterpret_cast<uintptr_t>(start_) % 64); }

  template <class T>
  static int64_t bytes(int64_t count) {
    return (count + lanes) * static_cast<int64_t>(sizeof(T)) / 64 * 64 + 64;
  }
  template <class T>
  T* take(int64_t count) {
    T* array = reinterpret_cast<T*>(next_);
    next_ += bytes<T>(count);
    return array;
  }

 private:
  char *own_, *start_, *next_;
};

inline Affine take_affine(int64_t width, Scratch& scratch) {
  Affine affine;
  for (float*& scale : affine.scale) scale = scratch.take<float>(width);
  for (float*& shift : affine.shift) shift = scratch.take<float>(width);
  for (float*& factor : affine.factor) factor = scratch.take<float>(width);
  return affine;
}

// The mean and the sum of squared deviations of parts seen one after the other, from each part's own centred sums.
// Chan's formula around the first part's mean, in double: nothing cancels.
struct Moments {
  double count = 0, origin = 0, first = 0, second = 0, within = 0;

  // A part of n numbers, with the sums of their deviations from `shift`, and of the deviations' squares.
  void merge(double n, float shift, float deviations, float squares) {
    const double excess = deviations / n, mean = shift + excess;
    if (count == 0) origin = mean;
    const double delta = mean - origin;
    count += n;
    first += n * delta;
    second += n * delta * delta;
    within += squares - deviations * excess;
  }
  double mean() const { return origin + first / count; }
  double squares() const { return within + second - first * first / count; }
};

// y = activation((x - mean) * scale + shift), with the mean's rounding error moved into the shift.
struct Normalization {
  float mean, mean_error, rstd;

  Normalization() = default;
  Normalization(double exact_mean, double squares, double count, double eps)
      : mean(static_cast<float>(exact_mean)),
        mean_error(static_cast<float>(exact_mean - static_cast<double>(mean))),
        rstd(static_cast<float>(1.0 / std::sqrt((squares > 0 ? squares : squares < 0 ? 0.0 : squares) / count + eps))) {}
};

template <bool whole, class T>
SODA_INLINE Floats load_lanes(const T* from, int64_t count) {
  if constexpr (whole) return load(from);
  else return load(from, static_cast<int>(count));
}

template <bool whole, class T>
SODA_INLINE void store_lanes(T* to, Floats value, int64_t count) {
  if constexpr (whole) store(to, value);
  else store(to, value, static_cast<int>(count));
}

// How many vectors a kernel's innermost step takes at a time, and whether they are whole or the end of a row.
template <int count_, bool whole_>
struct Step {
  static constexpr int count = count_;
  static constexpr bool whole = whole_;
};

// In pairs, so that rounding errors add up over few additions.
SODA_INLINE Floats sum(const Floats (&x)[1]) { return x[0]; }
SODA_INLINE Floats sum(const Floats (&x)[4]) { return (x[0] + x[1]) + (x[2] + x[3]); }

// The vectors of a step along an array. Unless in order, four whole ones have their numbers in the dtype's own lanes.
template <bool in_order, class S, class T>
SODA_INLINE void load_step(S, const T* from, int64_t n, Floats (&x)[S::count]) {
  if constexpr (S::count == 4 && !in_order) {
    load_run(from, x);
  } else {
    for (int k = 0; k < S::count; ++k) x[k] = load_lanes<S::whole>(from + k * lanes, n);
  }
}

template <bool in_order, class S, class T>
SODA_INLINE void store_step(S, T* to, int64_t n, const Floats (&x)[S::count]) {
  if constexpr (S::count == 4 && !in_order) {
    store_run(to, x);
  } else {
    for (int k = 0; k < S::count; ++k) store_lanes<S::whole>(to + k * lanes, x[k], n);
  }
}

// Whether the results of a call are written past the caches, in runs of a multiple of `run` numbers to each target: no
// line is then read only to be overwritten. From 8 MiB on, the backward took 40 to 90% of the time so (one core of a Xeon
// of the Sapphire Rapids generation), and the channels_last forward 80 to 95% (two of an EPYC of the Zen 3 generation; with
// a pass over its results behind it 83 to 120%). The contiguous forward gained nothing, and does not ask.
template <class T>
inline bool streams(const GroupNorm& norm, int64_t run, const void* target, const void* second = nullptr) {
  constexpr int64_t least = 1 << 23, size = sizeof(T), line = 64;
  const auto is_aligned = [](const void* image) { return reinterpret_cast<uintptr_t>(image) % line == 0; };
  return norm.batch * norm.all_channels() * norm.space * size >= least && run * size % line == 0 &&
         is_aligned(target) && is_aligned(second);
}

template <bool in_order, class S, class T>
SODA_INLINE void stream_step(S step, T* to, int64_t n, const Floats (&x)[S::count]) {
  if constexpr (S::count == 4 && !in_order) {
    stream_run(to, x);
  } else {
    store_step<in_order>(step, to, n, x);
  }
}

SODA_INLINE void prefetch(const void* at) { __builtin_prefetch(at, 0, 2); }

// Ask for the cache lines of a step further on, into the second level: the memory's work is then done beside arithmetic.
template <class S, class T>
SODA_INLINE void prefetch_step(S, const T* from) {
  constexpr int64_t bytes = S::count * lanes * static_cast<int64_t>(sizeof(T));
  for (int64_t at = 0; at < bytes; at += 64) prefetch(reinterpret_cast<const char*>(from) + at);
}

// Call f(Step, index, lanes) along an array: four vectors at a time from `index` on, then one, then part of one.
template <class F>
inline void for_vectors(int64_t length, F f) {
  int64_t i = 0;
  for (; i + 4 * lanes <= length; i += 4 * lanes) f(Step<4, true>{}, i, static_cast<int64_t>(lanes));
  for (; i + lanes <= length; i += lanes) f(Step<1, true>{}, i, static_cast<int64_t>(lanes));
  if (i < length) f(Step<1, false>{}, i, length - i);
}

// summed = (x + residual) * scale, rounded to the dtype.
template <class T>
inline void add_run(const T* x, const T* residual, float scale, T* summed, int64_t length) {
  for_vectors(length, [&](auto step, int64_t i, int64_t n) {
    for (int k = 0; k < step.count; ++k, i += lanes) {
      const Floats sum = load_lanes<step.whole>(x + i, n) + load_lanes<step.whole>(residual + i, n);
      store_lanes<step.whole>(summed + i, sum * scale, n);
    }
  });
}

}  // namespace soda::SODA_ISA
