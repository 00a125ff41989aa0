// How a kernel goes along an array: a few whole vectors at a time, then the rest; and a thread's scratch memory.
#pragma once

#include <cstdlib>

#include "vec.h"

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

// Call f(Step, index, lanes) along an array: four vectors at a time from `index` on, then one, then part of one.
template <class F>
inline void for_vectors(int64_t length, F f) {
  int64_t i = 0;
  for (; i + 4 * lanes <= length; i += 4 * lanes) f(Step<4, true>{}, i, static_cast<int64_t>(lanes));
  for (; i + lanes <= length; i += lanes) f(Step<1, true>{}, i, static_cast<int64_t>(lanes));
  if (i < length) f(Step<1, false>{}, i, length - i);
}

}  // namespace soda::SODA_ISA
