// 3x3 convolutions on the CPU: what the kernels take, their outputs, and their registration with PyTorch's dispatcher.

#include "convolution.h"

#include <algorithm>
#include <memory>
#include <tuple>

#include "boxed.h"
#include "dispatch.h"
#include "tensors.h"

namespace soda {
namespace {

using MaybeTensor = std::optional<Tensor>;

// Bytes of a block's transformed tiles, for the second-level cache. On two cores of an EPYC of the Zen 3 generation half
// and twice as much were slower or the same within noise, for 2x2 to 32x32 pixels and 32 to 256 channels.
constexpr int64_t block_bytes = 1 << 18;
// Tiles of a block are a multiple of this, which suits the rows of a product in registers.
constexpr int64_t row_multiple = 12;
// Of the sums over tiles that are kept apart: tiles of each at the least, since each is written and read once more (half
// as many were slower there, twice as many no better), and their bytes and number at the most. And filters of a unit, each
// of which transforms the same tiles again. Other limits than these three were not tried.
constexpr int64_t chunk_tiles = 256, share_bytes = 1 << 24, most_chunks = 32, unit_filters = 64;
// What both numbers of channels are a multiple of, and columns that are transformed together.
constexpr int64_t channel_multiple = 8, columns_together = 32;
// Below this transforming the filters costs what the products save: one tile of 256 channels took longer than PyTorch's.
constexpr int64_t least_tiles = 8;
// Numbers of a transformed filter that are worth a thread; not tuned.
constexpr int64_t numbers_of_a_thread = 1 << 16;

float* data(const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

const float* read(const Tensor& tensor) { return static_cast<const float*>(tensor.const_data_ptr()); }

// Tiles of a block whose taps hold so many numbers for each.
int64_t fitting_tiles(int64_t width) {
  const int64_t tiles = block_bytes / (taps * 4 * width);
  return std::max<int64_t>(tiles / row_multiple * row_multiple, row_multiple);
}

// Filters [K, C, 3, 3] as the products want them; turned, for the gradient of x, those of K become the depth.
std::unique_ptr<float[]> transformed_filters(const Tensor& weight, bool turned, const ConvolutionKernels& kernels) {
  FilterTransform of;
  of.filters = weight.size(0), of.channels = weight.size(1), of.turned = turned;
  std::unique_ptr<float[]> transformed(new float[static_cast<size_t>(taps * tap_stride(of.channels, of.filters))]);
  of.weight = read(weight), of.transformed = transformed.get();
  const int64_t columns = turned ? of.channels : of.filters, depth = turned ? of.filters : of.channels;
  const int64_t runs = (columns + columns_together - 1) / columns_together;
  const int64_t grain = std::max<int64_t>(1, numbers_of_a_thread / (taps * depth * columns_together));
  torch::stable::parallel_for(0, runs, grain, [&](int64_t first, int64_t last) {
    kernels.transform_filters(of, first * columns_together, std::min(last * columns_together, columns));
  });
  return transformed;
}

Convolution convolution_of(const Tensor& x, int64_t channels, int64_t filters) {
  Convolution of;
  of.batch = x.size(0), of.height = x.size(2), of.width = x.size(3);
  of.channels = channels, of.filters = filters;
  return of;
}

void run_forward(ConvolutionForward& of, const Tensor& weight, bool turned) {
  const ConvolutionKernels& kernels = convolution_kernels(of.channels, of.filters);
  const auto filters = transformed_filters(weight, turned, kernels);
  of.transformed = filters.get();
  const int64_t tiles = of.tiles(), threads = torch::stable::get_num_threads();
  const int64_t of_thread = (tiles + threads - 1) / threads;
  of.block_tiles = std::min(fitting_tiles(of.channels + of.filters),
                            (of_thread + row_multiple - 1) / row_multiple * row_multiple);
  torch::stable::parallel_for(0, of.blocks(), 1, [&](int64_t first, int64_t last) {
    kernels.forward(of, first, last);
  });
}

void check_fits(const char* name, const Tensor& tensor, const std::vector<int64_t>& sizes) {
  const auto actual = tensor.sizes();
  STD_TORCH_CHECK(tensor.is_cpu() && dtype_of(tensor.get()) == Dtype::float32 && actual.size() == sizes.size() &&
                      std::equal(sizes.begin(), sizes.end(), actual.begin()),
                  name, " does not have the shape, dtype and device that x and weight ask for");
}

Tensor forward(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, const MaybeTensor& residual, bool relu) {
  ConvolutionForward of;
  static_cast<Convolution&>(of) = convolution_of(x, weight.size(1), weight.size(0));
  if (bias) check_fits("bias", *bias, {of.filters});
  if (residual) check_fits("residual", *residual, {of.batch, of.filters, of.height, of.width});
  const Tensor filters = in_layout(weight, true);
  const Tensor bias_ = bias ? in_layout(*bias, false) : x, residual_ = residual ? in_layout(*residual, true) : x;
  Tensor y = empty_image(x, of.filters, true);
  of.x = read(x), of.y = data(y), of.relu = relu;
  if (bias) of.bias = read(bias_);
  if (residual) of.residual = read(residual_);
  run_forward(of, filters, false);
  return y;
}

Tensor input_gradient(const Tensor& dy, const Tensor& weight) {
  ConvolutionForward of;
  static_cast<Convolution&>(of) = convolution_of(dy, weight.size(0), weight.size(1));
  Tensor dx = empty_image(dy, of.filters, true);
  of.x = read(dy), of.y = data(dx);
  run_forward(of, weight, true);
  return dx;
}

void filter_gradient(const Tensor& dy, const Tensor& x, Tensor* dweight, Tensor* dbias) {
  FilterGradient of;
  static_cast<Convolution&>(of) = convolution_of(x, x.size(1), dy.size(1));
  const ConvolutionKernels& kernels = convolution_kernels(of.channels, of.filters);
  of.x = read(x), of.dy = read(dy);
  if (dweight) of.dweight = data(*dweight);
  if (dbias) of.dbias = data(*dbias);
  // By the problem alone, never by the number of threads: sums are to be the same bits.
  of.unit_filters = std::min(unit_filters, of.filters);
  of.block_tiles = fitting_tiles(of.channels + of.unit_filters);
  const int64_t share = taps * tap_stride(of.channels, of.filters);
  const int64_t most = std::min({share_bytes / (4 * share), of.tiles() / chunk_tiles, most_chunks, of.blocks()});
  of.chunks = std::max<int64_t>(most, 1);
  const std::unique_ptr<float[]> shares(new float[static_cast<size_t>(of.chunks * share)]);
  const std::unique_ptr<float[]> bias_shares(new float[static_cast<size_t>(of.chunks * of.filters)]);
  of.shares = shares.get(), of.bias_shares = bias_shares.get();
  torch::stable::parallel_for(0, of.chunks * of.units_of_chunk(), 1, [&](int64_t first, int64_t last) {
    kernels.filter_shares(of, first, last);
  });
  torch::stable::parallel_for(0, of.filters, std::max<int64_t>(1, numbers_of_a_thread / (taps * of.channels)),
                              [&](int64_t first, int64_t last) { kernels.reduce_shares(of, first, last); });
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& dy, const Tensor& x, const Tensor& weight, bool for_x,
                                            bool for_weight, bool for_bias) {
  check_fits("dy", dy, {x.size(0), weight.size(0), x.size(2), x.size(3)});
  const Tensor gradient = in_layout(dy, true), filters = in_layout(weight, true);
  const int32_t dtype = torch_dtype(x);
  Tensor dx = for_x ? input_gradient(gradient, filters) : empty({0}, dtype);
  Tensor dweight = for_weight ? empty({weight.size(0), weight.size(1), 3, 3}, dtype, true) : empty({0}, dtype);
  Tensor dbias = for_bias ? empty({weight.size(0)}, dtype) : empty({0}, dtype);
  if (for_weight || for_bias) filter_gradient(gradient, x, for_weight ? &dweight : nullptr, for_bias ? &dbias : nullptr);
  return {dx, dweight, dbias};
}

bool is_float(const Tensor& tensor) { return tensor.is_cpu() && dtype_of(tensor.get()) == Dtype::float32; }

// The kernels take float images in channels_last whose channels fill whole vectors, and of which there are enough tiles.
bool is_native(const Tensor& x, const Tensor& weight) {
  if (!is_float(x) || !is_float(weight) || x.dim() != 4 || weight.dim() != 4 || !is_channels_last(x)) return false;
  const int64_t channels = x.size(1), filters = weight.size(0);
  const Convolution of = convolution_of(x, channels, filters);
  return weight.size(1) == channels && weight.size(2) == 3 && weight.size(3) == 3 && channels * filters > 0 &&
         channels % channel_multiple == 0 && filters % channel_multiple == 0 && of.height * of.width > 1 &&
         of.tiles() >= least_tiles;
}

void boxed_forward(Stack stack, uint64_t num_arguments, uint64_t num_outputs) {
  const bool is_taken = is_native(another_handle(stack, 0), another_handle(stack, 1));
  call_native("soda_kernels_native::conv3x3", is_taken, TORCH_BOX(&forward), stack, num_arguments, num_outputs);
}

void boxed_backward(Stack stack, uint64_t num_arguments, uint64_t num_outputs) {
  const bool is_taken = is_native(another_handle(stack, 1), another_handle(stack, 2));
  call_native("soda_kernels_native::conv3x3_backward", is_taken, TORCH_BOX(&backward), stack, num_arguments, num_outputs);
}

}  // namespace
}  // namespace soda

STABLE_TORCH_LIBRARY_IMPL(soda_kernels, CPU, m) {
  m.impl("conv3x3", soda::boxed_forward);
  m.impl("conv3x3_backward", soda::boxed_backward);
}
