// What both layouts' kernels of a group norm share.
#pragma once

#include <cmath>

#include "affine.h"
#include "dropout.h"
#include "moments.h"
#include "silu.h"
#include "steps.h"

namespace soda::SODA_ISA {

// y = activation((x - mean) * scale + shift), with the mean's rounding error moved into the shift.
struct Normalization {
  float mean, mean_error, rstd;

  Normalization() = default;
  Normalization(double exact_mean, double squares, double count, double eps)
      : mean(static_cast<float>(exact_mean)),
        mean_error(static_cast<float>(exact_mean - static_cast<double>(mean))),
        rstd(static_cast<float>(1.0 / std::sqrt((squares > 0 ? squares : squares < 0 ? 0.0 : squares) / count + eps))) {}
};

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
