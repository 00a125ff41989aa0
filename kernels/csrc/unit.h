// What both layouts' kernels share: a thread's scratch memory, merged moments, the formulas of one vector.
#pragma once

#include <cmath>
#include <cstdlib>

#include "affine.h"
#include "dropout.h"
#include "silu.h"

namespace soda::SODA_ISA {

// Memory for arrays, freed with it. Each array starts on a cache line and has room for a whole vector after its end.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) : start_(static_cast<char*>(std::malloc(static_cast<size_t>(bytes) + 64))) {
    if (!start_) std::abort();
    next_ = start_ + (64 - reinterpret_cast<uintptr_t>(start_) % 64);
  }
  ~Scratch() { std::free(start_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

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
  char *start_, *next_;
};

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

  Normalization(double exact_mean, double squares, double count, double eps)
      : mean(static_cast<float>(exact_mean)),
        mean_error(static_cast<float>(exact_mean - static_cast<double>(mean))),
        rstd(static_cast<float>(1.0 / std::sqrt((squares > 0 ? squares : squares < 0 ? 0.0 : squares) / count + eps))) {}
};

template <bool whole, class T>
inline Floats load_lanes(const T* from, int64_t count) {
  if constexpr (whole) return load(from);
  else return load(from, static_cast<int>(count));
}

template <bool whole, class T>
inline void store_lanes(T* to, Floats value, int64_t count) {
  if constexpr (whole) store(to, value);
  else store(to, value, static_cast<int>(count));
}

template <bool value_>
struct Whole {
  static constexpr bool value = value_;
};

// Call f(Whole, index, lanes) for the vectors of an array, the last of which may be part of one.
template <class F>
inline void for_vectors(int64_t count, F f) {
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) f(Whole<true>{}, i, static_cast<int64_t>(lanes));
  if (i < count) f(Whole<false>{}, i, count - i);
}

// summed = x + residual, rounded to the dtype.
template <class T>
inline void add_run(const T* x, const T* residual, T* summed, int64_t count) {
  for_vectors(count, [&](auto whole, int64_t i, int64_t n) {
    constexpr bool w = decltype(whole)::value;
    store_lanes<w>(summed + i, load_lanes<w>(x + i, n) + load_lanes<w>(residual + i, n), n);
  });
}

}  // namespace soda::SODA_ISA
