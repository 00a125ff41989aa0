// Chooses among the instruction sets that the kernels were compiled for.

#include "dispatch.h"

#include <atomic>
#include <cstring>

namespace soda {
namespace {

struct InstructionSet {
  const char* name;
  const AttentionKernels* attention;
  const ConvolutionKernels* convolution;
  const GroupNormKernels* group_norm;
  const DiffusionKernels* diffusion;
  bool available;
};

#if defined(__x86_64__)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#endif

// Best first.
const InstructionSet instruction_sets[] = {
#if defined(__x86_64__)
    {"avx512", &avx512::attention, &avx512::convolution, &avx512::group_norm, &avx512::diffusion, has_avx512()},
    {"avx2", &avx2::attention, &avx2::convolution, &avx2::group_norm, &avx2::diffusion, has_avx2()},
#endif
    {"generic", &generic::attention, &generic::convolution, &generic::group_norm, &generic::diffusion, true},
};

const InstructionSet* best() {
  const InstructionSet* set = instruction_sets;
  while (!set->available) ++set;
  return set;
}

std::atomic<const InstructionSet*> current{best()};

}  // namespace

const AttentionKernels& attention_kernels(int64_t head_dim) {
  const InstructionSet* set = current.load(std::memory_order_relaxed);
  while (head_dim % set->attention->lanes) ++set;  // each has what is above it
  return *set->attention;
}

const ConvolutionKernels& convolution_kernels(int64_t channels, int64_t filters) {
  const InstructionSet* set = current.load(std::memory_order_relaxed);
  while (channels % set->convolution->lanes || filters % set->convolution->lanes) ++set;
  return *set->convolution;
}

const GroupNormKernels& group_norm_kernels() { return *current.load(std::memory_order_relaxed)->group_norm; }
const DiffusionKernels& diffusion_kernels() { return *current.load(std::memory_order_relaxed)->diffusion; }

}  // namespace soda

const char* soda_kernels_isa() { return soda::current.load()->name; }

int soda_kernels_use_isa(const char* name) {
  for (const auto& set : soda::instruction_sets) {
    if (set.available && std::strcmp(set.name, name) == 0) {
      soda::current.store(&set);
      return 1;
    }
  }
  return 0;
}

void soda_kernels_normals(const uint32_t* words, int64_t blocks, float* normals) {
  soda::diffusion_kernels().normals_of(words, blocks, normals);
}
