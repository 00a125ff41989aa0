// Modulated group norm's arguments as plain data, and the kernels that each instruction set has for them.
//
// The work is cut into units: one sample and a run of whole groups of its channels. A unit's results depend on nothing
// outside it, and on no other cut, so that they are the same bits for every number of threads and every batch.
#pragma once

#include <cstdint>

#include "storage.h"

namespace soda {

// A [C] or [N, C] tensor whose channels lie one after the other; [C] has row_stride 0, an absent one no data.
struct Parameter {
  const void* data = nullptr;
  Dtype dtype = Dtype::float32;
  int64_t row_stride = 0;
};

struct Dropout {
  uint32_t threshold = 0;  // elements whose 16 random bits are below it are dropped; 0 is no dropout
  float scale = 1.0f;      // of those that are kept
  const int64_t* seed = nullptr;
  int64_t seed_stride = 0;
  bool seed_per_sample = false;  // sample n then takes seed[n] and sample id 0, else the one seed and sample id n
};

struct GroupNorm {
  Dtype dtype = Dtype::float32;
  bool channels_last = false, silu = false;
  int64_t batch = 0, groups = 0, space = 0;
  int64_t channels[2] = {0, 0};  // of x and of skip, whose concatenation is normalized
  int64_t unit_groups = 0;
  Parameter weight, bias, modulations[4];  // scale, shift, scale, shift
  int num_modulations = 0;                 // pairs
  float scale_offset = 0.0f, residual_scale = 1.0f;
  Dropout dropout;

  [[gnu::always_inline]] int64_t all_channels() const { return channels[0] + channels[1]; }
  [[gnu::always_inline]] int64_t group_channels() const { return all_channels() / groups; }
  [[gnu::always_inline]] int64_t units_of_sample() const { return (groups + unit_groups - 1) / unit_groups; }
};

// Images are of `dtype` and all in one layout, contiguous or channels_last; statistics are [N, groups]. With a residual
// y is that of summed = (x + residual) * residual_scale.
struct Forward : GroupNorm {
  const void *x = nullptr, *skip = nullptr, *residual = nullptr;
  void *y = nullptr, *summed = nullptr;
  float *mean = nullptr, *rstd = nullptr;
  double eps = 0.0;
};

// x is what was normalized, and dx residual_scale times the gradient that reaches it: from dy, and dsummed.
struct Backward : GroupNorm {
  const void *dy = nullptr, *dsummed = nullptr, *x = nullptr, *skip = nullptr;
  const float *mean = nullptr, *rstd = nullptr;
  void *dx = nullptr, *dskip = nullptr;
  void* dmodulations[4] = {};                   // contiguous [N, C], in the modulations' own dtypes
  float *dscale = nullptr, *dshift = nullptr;   // [N, C]: each sample's share of the gradients of weight and bias
  void *dweight = nullptr, *dbias = nullptr;    // [C], in their own dtypes; null where absent
};

struct GroupNormKernels {
  // Of one unit at least.
  void (*forward)(const Forward&, int64_t first_unit, int64_t last_unit);
  void (*backward)(const Backward&, int64_t first_unit, int64_t last_unit);
  // After all units: sums the samples' shares in their order.
  void (*reduce)(const Backward&, int64_t first_channel, int64_t last_channel);
};

namespace generic { extern const GroupNormKernels group_norm; }
namespace avx2 { extern const GroupNormKernels group_norm; }
namespace avx512 { extern const GroupNormKernels group_norm; }

}  // namespace soda
