// The instruction set that the kernels run with: the best that this processor has, or the one that was asked for.
#pragma once

#include "attention.h"
#include "convolution.h"
#include "diffusion.h"
#include "group_norm.h"

namespace soda {

// Of this set or a smaller one, whose vectors images of so many channels fill: both numbers must be multiples of 8.
const ConvolutionKernels& convolution_kernels(int64_t channels, int64_t filters);
const AttentionKernels& attention_kernels(int64_t head_dim);  // likewise
const GroupNormKernels& group_norm_kernels();
const DiffusionKernels& diffusion_kernels();

}  // namespace soda

// For Python's ctypes. The name in use; and a request for another, which is refused (0) if this processor or this build
// does not have it.
extern "C" __attribute__((visibility("default"))) const char* soda_kernels_isa();
extern "C" __attribute__((visibility("default"))) int soda_kernels_use_isa(const char* name);

// The normals that [blocks, 4] words become; for tests, which cannot choose the words of a key.
extern "C" __attribute__((visibility("default"))) void soda_kernels_normals(const uint32_t* words, int64_t blocks,
                                                                           float* normals);
