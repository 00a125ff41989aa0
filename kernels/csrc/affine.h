// A unit's parameters: folded into one scale and shift a channel, and their gradients unfolded again.
#pragma once

#include <algorithm>

#include "group_norm.h"
#include "vec.h"

namespace soda::SODA_ISA {

// Arrays of a unit's channels. Stage 0 is the norm's own affine, stage i what it is after modulation i.
struct Affine {
  float *scale[3], *shift[3];
  float* factor[2];  // modulation scale + offset
};

template <class T>
inline void widen_all(const T* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) store(to + i, load(from + i));
  if (i < count) store(to + i, load(from + i, static_cast<int>(count - i)), static_cast<int>(count - i));
}

template <class T>
inline void narrow_all(const float* from, int64_t count, T* to) {
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) store(to + i, load(from + i));
  if (i < count) store(to + i, load(from + i, static_cast<int>(count - i)), static_cast<int>(count - i));
}

inline void read(const Parameter& parameter, int64_t sample, int64_t first, int64_t count, float* to) {
  const int64_t at = sample * parameter.row_stride + first;
  switch (parameter.dtype) {
    case Dtype::float32: return widen_all(static_cast<const float*>(parameter.data) + at, count, to);
    case Dtype::bfloat16: return widen_all(static_cast<const BFloat16*>(parameter.data) + at, count, to);
    case Dtype::float16: return widen_all(static_cast<const Half*>(parameter.data) + at, count, to);
  }
}

inline void write(const float* from, int64_t count, Dtype dtype, void* to, int64_t at) {
  switch (dtype) {
    case Dtype::float32: return narrow_all(from, count, static_cast<float*>(to) + at);
    case Dtype::bfloat16: return narrow_all(from, count, static_cast<BFloat16*>(to) + at);
    case Dtype::float16: return narrow_all(from, count, static_cast<Half*>(to) + at);
  }
}

inline void fold(const GroupNorm& norm, int64_t sample, int64_t first, int64_t count, const Affine& affine) {
  if (norm.weight.data) read(norm.weight, sample, first, count, affine.scale[0]);
  else std::fill_n(affine.scale[0], count, 1.0f);
  if (norm.bias.data) read(norm.bias, sample, first, count, affine.shift[0]);
  else std::fill_n(affine.shift[0], count, 0.0f);
  const Floats offset = broadcast(norm.scale_offset);
  for (int m = 0; m < norm.num_modulations; ++m) {
    float *scale = affine.scale[m + 1], *shift = affine.shift[m + 1], *factor = affine.factor[m];
    read(norm.modulations[2 * m], sample, first, count, factor);
    read(norm.modulations[2 * m + 1], sample, first, count, shift);
    // In whole vectors, which the arrays have room for: of plain loops the compiler makes scalar ones, for fear of aliasing.
    for (int64_t i = 0; i < count; i += lanes) {
      const Floats sum = load(factor + i) + offset;
      store(factor + i, sum);
      store(scale + i, load(affine.scale[m] + i) * sum);
      store(shift + i, load(affine.shift[m] + i) * sum + load(shift + i));
    }
  }
}

// From the gradients of the folded scale and shift, which are overwritten, those of every parameter.
inline void unfold(const Backward& norm, int64_t sample, int64_t first, int64_t count, const Affine& affine,
                   float* dscale, float* dshift, float* workspace) {
  const int64_t at = sample * norm.all_channels() + first;
  for (int m = norm.num_modulations - 1; m >= 0; --m) {
    const float *scale = affine.scale[m], *shift = affine.shift[m], *factor = affine.factor[m];
    for (int64_t i = 0; i < count; ++i) workspace[i] = scale[i] * dscale[i] + shift[i] * dshift[i];
    write(workspace, count, norm.modulations[2 * m].dtype, norm.dmodulations[2 * m], at);
    write(dshift, count, norm.modulations[2 * m + 1].dtype, norm.dmodulations[2 * m + 1], at);
    for (int64_t i = 0; i < count; ++i) dscale[i] *= factor[i], dshift[i] *= factor[i];
  }
  std::memcpy(norm.dscale + at, dscale, static_cast<size_t>(count) * sizeof(float));
  std::memcpy(norm.dshift + at, dshift, static_cast<size_t>(count) * sizeof(float));
}

}  // namespace soda::SODA_ISA
