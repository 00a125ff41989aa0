// The forward of images whose channels lie together.
#pragma once

#include "channels_last.h"

namespace soda::SODA_ISA::channels_last {

// Moments as in unit.h of every channel of the slab, in arrays.
struct ChannelMoments {
  double *origin, *first, *second, *within;

  ChannelMoments(int64_t width, Scratch& scratch)
      : origin(scratch.take<double>(width)), first(scratch.take<double>(width)), second(scratch.take<double>(width)),
        within(scratch.take<double>(width)) {}
};

// The moments of a block's rows into those of the channels; the three arrays are workspace, of which the first is handed
// from block to block. A column of rows is walked down with its sums in registers: twice in the first block, around its
// own mean, which the second look takes from the first-level cache; once in the others, around the mean of the block
// before. If means differ by d between the two, rows d^2 are added to the squares and subtracted again, and the channel's
// own squares are no less than half of that: rounding is seen at most threefold. Of an image of one block, `is_all`, there
// is nothing to merge.
template <class T>
inline void merge_block(const Part<const T>& part, int64_t first, int64_t last, bool is_all,
                        const Coefficients& workspace, const ChannelMoments& moments) {
  float *const shift = workspace.mean + part.offset, *const deviations = workspace.scale + part.offset;
  float* const squares = workspace.shift + part.offset;
  const float rows = static_cast<float>(last - first);
  for_vectors(part.width, [&](auto step, int64_t c, int64_t n) {
    Floats center[step.count] = {}, deviation[step.count] = {}, square[step.count] = {};
    if (first == 0) {
      for (int64_t row = first; row < last; ++row) {
        for (int v = 0; v < step.count; ++v) center[v] += load_lanes<step.whole>(part.row(row) + c + v * lanes, n);
      }
      for (int v = 0; v < step.count; ++v) {
        center[v] /= rows;
        store_lanes<step.whole>(shift + c + v * lanes, center[v], n);
      }
    } else {
      for (int v = 0; v < step.count; ++v) center[v] = load_lanes<step.whole>(shift + c + v * lanes, n);
    }
    for (int64_t row = first; row < last; ++row) {
      for (int v = 0; v < step.count; ++v) {
        const Floats centered = load_lanes<step.whole>(part.row(row) + c + v * lanes, n) - center[v];
        deviation[v] += centered;
        square[v] += centered * centered;
      }
    }
    for (int v = 0; v < step.count; ++v) {
      store_lanes<step.whole>(deviations + c + v * lanes, deviation[v], n);
      store_lanes<step.whole>(squares + c + v * lanes, square[v], n);
    }
  });
  double *const origin = moments.origin + part.offset, *const sum_first = moments.first + part.offset;
  double *const sum_second = moments.second + part.offset, *const within = moments.within + part.offset;
  const double count = rows, share = 1.0 / count;
  if (first == 0) {
    for (int64_t c = 0; c < part.width; ++c) {
      const double excess = deviations[c] * share;
      origin[c] = shift[c] + excess;
      within[c] = squares[c] - deviations[c] * excess;
    }
    if (!is_all) std::fill_n(sum_first, part.width, 0.0), std::fill_n(sum_second, part.width, 0.0);
    return;
  }
  for (int64_t c = 0; c < part.width; ++c) {
    const double excess = deviations[c] * share, mean = shift[c] + excess;
    const double delta = mean - origin[c];
    sum_first[c] += count * delta;
    sum_second[c] += count * delta * delta;
    within[c] += squares[c] - deviations[c] * excess;
    shift[c] = static_cast<float>(mean);
  }
}

// A slab on its way: its moments are summed block by block, become coefficients, and are applied block by block.
template <class T>
class ForwardSlab {
 public:
  // Arrays for any unit of a call.
  ForwardSlab(const Forward& norm, Scratch& scratch)
      : norm_(norm), affine_(take_affine(norm.unit_groups * norm.group_channels(), scratch)),
        coefficients_(norm.unit_groups * norm.group_channels(), scratch),
        moments_(norm.unit_groups * norm.group_channels(), scratch), mean_(scratch.take<double>(norm.unit_groups)),
        squares_(scratch.take<double>(norm.unit_groups)), mean_error_(scratch.take<float>(norm.unit_groups)) {}

  static int64_t scratch_bytes(const Forward& norm) {
    const int64_t groups = norm.unit_groups, width = groups * norm.group_channels();
    return 11 * Scratch::bytes<float>(width) + 4 * Scratch::bytes<double>(width) + Scratch::bytes<float>(groups) +
           2 * Scratch::bytes<double>(groups);
  }

  void start(int64_t unit) {
    const int64_t group = unit % norm_.units_of_sample() * norm_.unit_groups, channels = norm_.group_channels();
    sample_ = unit / norm_.units_of_sample(), first_group_ = group;
    groups_ = group + norm_.unit_groups < norm_.groups ? norm_.unit_groups : norm_.groups - group;
    first_ = group * channels, last_ = first_ + groups_ * channels;
    x_[0] = part(static_cast<const T*>(norm_.residual ? norm_.summed : norm_.x), 0);
    x_[1] = part(static_cast<const T*>(norm_.skip), 1);
    fold(norm_, sample_, first_, last_ - first_, affine_);
  }

  // The blocks one after the other.
  void look(int64_t from, int64_t to) {
    if (norm_.residual) {
      const Part<const T> plain = part(static_cast<const T*>(norm_.x), 0);
      const Part<const T> residual = part(static_cast<const T*>(norm_.residual), 0);
      const Part<T> summed = part(static_cast<T*>(norm_.summed), 0);
      for (int64_t r = from; r < to; ++r) {
        add_run(plain.row(r), residual.row(r), norm_.residual_scale, summed.row(r), plain.width);
      }
    }
    for (const auto& image : x_) merge_block(image, from, to, norm_.space <= block_rows, coefficients_, moments_);
  }

  // After the last block: from moments to coefficients.
  void finish() {
    const int64_t width = last_ - first_, channels = norm_.group_channels();
    const double space = static_cast<double>(norm_.space), share = 1.0 / space;
    for (int64_t c = 0; c < width && norm_.space > block_rows; ++c) {
      moments_.origin[c] += moments_.first[c] * share;  // now the channel's mean, and its squares around that
      moments_.within[c] += moments_.second[c] - moments_.first[c] * moments_.first[c] * share;
    }
    const double channel_share = 1.0 / static_cast<double>(channels);
    for (int64_t group = 0; group < groups_; ++group) {
      const int64_t begin = group * channels, end = begin + channels;
      const double mean = sum_over(begin, end, [&](int64_t c) { return moments_.origin[c]; }) * channel_share;
      squares_[group] = sum_over(begin, end, [&](int64_t c) {
        const double delta = moments_.origin[c] - mean;
        return moments_.within[c] + space * delta * delta;
      });
      mean_[group] = mean;
    }
    // All groups' at once: a root and a division wait for one another, and not for the next group's.
    float* const mean = norm_.mean + sample_ * norm_.groups + first_group_;
    float* const rstd = norm_.rstd + sample_ * norm_.groups + first_group_;
    for (int64_t group = 0; group < groups_; ++group) {
      const Normalization normal(mean_[group], squares_[group], space * static_cast<double>(channels), norm_.eps);
      mean[group] = normal.mean, rstd[group] = normal.rstd, mean_error_[group] = normal.mean_error;
    }
    const float *scale = affine_.scale[norm_.num_modulations], *shift = affine_.shift[norm_.num_modulations];
    for (int64_t group = 0; group < groups_; ++group) {
      const int64_t begin = group * channels, end = begin + channels;
      // Whole vectors: what they write of the next group is written again, and after the last one there is room.
      for (int64_t c = begin; c < end; c += lanes) {
        const Floats a = load(scale + c) * rstd[group];
        store(coefficients_.mean + c, broadcast(mean[group]));
        store(coefficients_.scale + c, a);
        store(coefficients_.shift + c, load(shift + c) - mean_error_[group] * a);
      }
    }
  }

  // Blocks in any order. Meanwhile a block of another slab, from row `soon` on, is asked for; where that one is smaller,
  // so is memory behind it, which costs little and faults nowhere.
  template <bool with_silu, bool with_dropout, bool past_caches>
  void apply(int64_t from, int64_t to, const ForwardSlab& other, int64_t soon, float* keep) const {
    const Part<T> y = part_of(static_cast<T*>(norm_.y), norm_.all_channels(), 0, sample_, norm_.space, first_, last_);
    for (int which = 0; which < 2; ++which) {
      const Part<const T>& image = x_[which];
      const T* const asked = other.x_[which].row(soon);
      for_tiles<with_dropout>(norm_, sample_, first_, image, from, to, keep, [&](const Tile& tile) {
        const int64_t at = image.offset + tile.channel;
        // Row by row. With four rows side by side, whose coefficients were then loaded once, it took up to 15% more.
        for (int64_t row = tile.first; row < tile.last; ++row) {
          const T *const from_row = image.row(row) + tile.channel,
                  *const asked_row = asked + (row - from) * image.stride + tile.channel;
          T* const to_row = y.row(row) + at;
          for_vectors(tile.width, [&](auto step, int64_t c, int64_t n) {
            Floats value[step.count];
            for (int v = 0; v < step.count; ++v) {
              const int64_t i = c + v * lanes;
              prefetch(asked_row + i);
              value[v] = load_lanes<step.whole>(from_row + i, n) - load(coefficients_.mean + at + i);
              value[v] = value[v] * load(coefficients_.scale + at + i) + load(coefficients_.shift + at + i);
            }
            if constexpr (with_silu) silu<is_coarse<T>>(value);
            for (int v = 0; v < step.count; ++v) {
              const int64_t i = c + v * lanes;
              if constexpr (with_dropout) value[v] *= load(tile.factors(row) + i);
              put<step.whole>(to_row + i, value[v], n, past_caches);
            }
          });
        }
      });
    }
  }

 private:
  template <class Image>
  Part<Image> part(Image* image, int which) const {
    return part_of(image, norm_.channels[which], which ? norm_.channels[0] : 0, sample_, norm_.space, first_, last_);
  }

  const Forward& norm_;
  const Affine affine_;
  const Coefficients coefficients_;  // workspace of the moments before
  const ChannelMoments moments_;
  double *const mean_, *const squares_;  // of the groups
  float* const mean_error_;
  int64_t sample_ = 0, first_group_ = 0, groups_ = 0, first_ = 0, last_ = 0;  // groups, and channels
  Part<const T> x_[2] = {};
};

// While one slab is applied, from its last block to its first, the next one's moments are summed from its first to its
// last: memory is read beside arithmetic, and what was read last is still near when it is read again. In geometric mean
// over channels_last shapes of 1.5 to 50 MB it took 96% of the time of one slab after the other (EPYC of the Zen 3
// generation).
template <class T, bool with_silu, bool with_dropout, bool past_caches>
inline void run_slabs(const Forward& norm, int64_t first_unit, int64_t last_unit, Scratch& scratch) {
  float* const keep = scratch.take<float>(with_dropout ? block_rows * tile_channels : 0);
  ForwardSlab<T> slab(norm, scratch), after(norm, scratch);
  ForwardSlab<T>* now = &slab;
  ForwardSlab<T>* next = &after;
  now->start(first_unit);
  for_blocks(norm.space, [&](int64_t from, int64_t to) { now->look(from, to); });
  now->finish();
  for (int64_t unit = first_unit + 1; unit < last_unit; ++unit) {
    next->start(unit);
    int64_t back = (norm.space + block_rows - 1) / block_rows * block_rows;
    for_blocks(norm.space, [&](int64_t from, int64_t to) {
      back -= block_rows;
      now->template apply<with_silu, with_dropout, past_caches>(
          back, back + block_rows < norm.space ? back + block_rows : norm.space, *next, from, keep);
      next->look(from, to);
    });
    next->finish();
    std::swap(now, next);
  }
  for (int64_t from = (norm.space - 1) / block_rows * block_rows; from >= 0; from -= block_rows) {
    const int64_t to = from + block_rows < norm.space ? from + block_rows : norm.space;
    now->template apply<with_silu, with_dropout, past_caches>(from, to, *now, from, keep);  // nothing is left to ask for
  }
  if constexpr (past_caches) end_stream();
}

template <class T, bool with_silu, bool with_dropout>
inline void forward_units(const Forward& norm, int64_t first_unit, int64_t last_unit, Scratch& scratch) {
  if (streams<T>(norm, std::gcd(norm.channels[0], norm.channels[1]), norm.y)) {
    return run_slabs<T, with_silu, with_dropout, true>(norm, first_unit, last_unit, scratch);
  }
  run_slabs<T, with_silu, with_dropout, false>(norm, first_unit, last_unit, scratch);
}

inline int64_t forward_scratch_bytes(const Forward& norm) {
  return 2 * ForwardSlab<float>::scratch_bytes(norm) +
         Scratch::bytes<float>(norm.dropout.threshold ? block_rows * tile_channels : 0);
}

}  // namespace soda::SODA_ISA::channels_last
