// The mean and the squared deviations of numbers that come in runs.
#pragma once

#include "steps.h"

namespace soda::SODA_ISA {

// The mean and the sum of squared deviations of parts seen one after the other, from each part's own centred sums.
// Chan's formula around the first part's mean, in double: nothing cancels.
struct Moments {
  double count = 0, origin = 0, first = 0, second = 0, within = 0;

  // A part of n numbers, with the sums of their deviations from `shift`, and of the deviations' squares.
  void merge(double n, double shift, double deviations, double squares) {
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

// Add a run, seen from `shift`, a number near its mean: where it is one of equal numbers, they have no deviation at all.
template <class T>
inline void merge_run_around(float shift, const T* x, int64_t length, Moments* moments) {
  Floats deviations[4] = {}, squares[4] = {};
  for_vectors(length, [&](auto step, int64_t i, int64_t n) {
    Floats value[step.count];
    load_step<false>(step, x + i, n, value);
    for (int k = 0; k < step.count; ++k) {
      Floats centered = value[k] - shift;
      if constexpr (!step.whole) centered = first_lanes(centered, n);
      deviations[k] += centered;
      squares[k] += centered * centered;
    }
  });
  moments->merge(static_cast<double>(length), shift, sum_of_lanes(sum(deviations)), sum_of_lanes(sum(squares)));
}

// Add a run, seen from its mean; it is short enough to be read again from the first-level cache.
template <class T>
inline void merge_run(const T* x, int64_t length, Moments* moments) {
  Floats total[4] = {};
  for_vectors(length, [&](auto step, int64_t i, int64_t n) {
    Floats value[step.count];
    load_step<false>(step, x + i, n, value);
    for (int k = 0; k < step.count; ++k) total[k] += value[k];
  });
  merge_run_around(sum_of_lanes(sum(total)) / static_cast<float>(length), x, length, moments);
}

}  // namespace soda::SODA_ISA
