// Modulated group norm for one instruction set: compiled once for each, with its flags and -DSODA_ISA=its name.

#include "channels_last_backward.h"
#include "channels_last_forward.h"
#include "contiguous.h"

namespace soda::SODA_ISA {
namespace {

// Upper bounds of what a unit takes.
int64_t scratch_bytes(const GroupNorm& norm) {
  const int64_t width = norm.unit_groups * norm.group_channels();
  const int64_t factors = norm.channels_last ? channels_last::block_rows * channels_last::tile_channels
                                             : contiguous::run_length;
  return 16 * Scratch::bytes<float>(width) + 4 * Scratch::bytes<double>(width) +
         Scratch::bytes<float>(norm.dropout.threshold ? factors : 0);
}

int64_t scratch_bytes(const Forward& norm) {
  return norm.channels_last ? channels_last::forward_scratch_bytes(norm)
                            : scratch_bytes(static_cast<const GroupNorm&>(norm));
}

int64_t scratch_bytes(const Backward& norm) {
  const int64_t groups = norm.channels_last ? norm.unit_groups : 1;
  return scratch_bytes(static_cast<const GroupNorm&>(norm)) +
         Scratch::bytes<float>(groups * norm.group_channels() * norm.space);
}

template <class T, bool with_silu, bool with_dropout>
void run_unit(const Forward& norm, int64_t sample, int64_t first, int64_t last, const Affine& affine, Scratch& scratch) {
  contiguous::forward_unit<T, with_silu, with_dropout>(norm, sample, first, last, affine, scratch);
}

template <class T, bool with_silu, bool with_dropout>
void run_unit(const Backward& norm, int64_t sample, int64_t first, int64_t last, const Affine& affine, Scratch& scratch) {
  if (norm.channels_last) {
    channels_last::backward_unit<T, with_silu, with_dropout>(norm, sample, first, last, affine, scratch);
  } else {
    contiguous::backward_unit<T, with_silu, with_dropout>(norm, sample, first, last, affine, scratch);
  }
}

template <class T, bool with_silu, bool with_dropout, class Pass>
void run_units_of(const Pass& norm, int64_t first_unit, int64_t last_unit) {
  const int64_t channels = norm.group_channels(), width = norm.unit_groups * channels;
  char buffer[16384];  // enough for small images, where an allocation would show
  Scratch scratch(scratch_bytes(norm), buffer);
  if constexpr (std::is_same_v<Pass, Forward>) {
    if (norm.channels_last) {
      return channels_last::forward_units<T, with_silu, with_dropout>(norm, first_unit, last_unit, scratch);
    }
  }
  for (int64_t unit = first_unit; unit < last_unit; ++unit) {
    scratch.rewind();
    const Affine affine = take_affine(width, scratch);
    const int64_t sample = unit / norm.units_of_sample(), first = unit % norm.units_of_sample() * norm.unit_groups;
    const int64_t last = first + norm.unit_groups < norm.groups ? first + norm.unit_groups : norm.groups;
    fold(norm, sample, first * channels, (last - first) * channels, affine);
    run_unit<T, with_silu, with_dropout>(norm, sample, first, last, affine, scratch);
  }
}

template <class T, class Pass>
void run_units_in(const Pass& norm, int64_t first_unit, int64_t last_unit) {
  if (norm.dropout.threshold) {
    if (norm.silu) return run_units_of<T, true, true>(norm, first_unit, last_unit);
    return run_units_of<T, false, true>(norm, first_unit, last_unit);
  }
  if (norm.silu) return run_units_of<T, true, false>(norm, first_unit, last_unit);
  return run_units_of<T, false, false>(norm, first_unit, last_unit);
}

template <class Pass>
void run_units(const Pass& norm, int64_t first_unit, int64_t last_unit) {
  switch (norm.dtype) {
    case Dtype::float32: return run_units_in<float>(norm, first_unit, last_unit);
    case Dtype::bfloat16: return run_units_in<BFloat16>(norm, first_unit, last_unit);
    case Dtype::float16: return run_units_in<Half>(norm, first_unit, last_unit);
  }
}

void reduce(const Backward& norm, int64_t first_channel, int64_t last_channel) {
  constexpr int64_t chunk = 64;
  const auto sum = [&](const float* shares, Dtype dtype, void* gradient) {
    for (int64_t first = first_channel; first < last_channel; first += chunk) {
      const int64_t width = last_channel - first < chunk ? last_channel - first : chunk;
      double total[chunk] = {};
      for (int64_t sample = 0; sample < norm.batch; ++sample) {
        for (int64_t c = 0; c < width; ++c) total[c] += shares[sample * norm.all_channels() + first + c];
      }
      float rounded[chunk];
      for (int64_t c = 0; c < width; ++c) rounded[c] = static_cast<float>(total[c]);
      write(rounded, width, dtype, gradient, first);
    }
  };
  if (norm.dweight) sum(norm.dscale, norm.weight.dtype, norm.dweight);
  if (norm.dbias) sum(norm.dshift, norm.bias.dtype, norm.dbias);
}

}  // namespace

const GroupNormKernels group_norm = {run_units<Forward>, run_units<Backward>, reduce};

}  // namespace soda::SODA_ISA
