// One warp per head of a row: the weights are computed by all lanes alike, and the lanes share the
// channels.
#include "common.cuh"

namespace pikv_ds {
namespace {

constexpr int kWarps = 4;

// The largest lse, the shift that keeps expf() in range. A NaN compares false and is left out here;
// it still reaches the result through its own weight.
__device__ float MaxLse(const MergePartialsParams& p, const float* lses, int lane) {
  float max_lse = NegativeInfinity();
  for (int64_t partial = lane; partial < p.num_partials; partial += kWarpSize) {
    const float lse = lses[partial * p.lses_strides[0]];
    if (lse > max_lse) max_lse = lse;
  }
  return WarpMax(max_lse);
}

__device__ __forceinline__ void StoreFloat(void* base, int64_t index, Dtype dtype, float x) {
  if (dtype == Dtype::kFloat32) {
    static_cast<float*>(base)[index] = x;
  } else {
    static_cast<uint16_t*>(base)[index] =
        dtype == Dtype::kBFloat16 ? FloatToBFloat16(x) : FloatToHalf(x);
  }
}

__global__ void __launch_bounds__(kWarps* kWarpSize)
    MergePartialsKernel(const MergePartialsParams p, bool vectors) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t place = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarpSize;
  if (place >= p.num_rows * p.num_heads) return;  // the whole warp
  const int64_t row = place / p.num_heads, head = place % p.num_heads;
  const float* const outs = p.outs + row * p.outs_strides[1] + head * p.head_dim;
  const float* const lses = p.lses + row * p.lses_strides[1] + head;
  const int64_t out = row * p.out_stride + head * p.head_dim;

  const float max_lse = MaxLse(p, lses, lane);
  // Always 0..P-1: a fixed order of summation makes the result the same bits on every run. Empty
  // partials are skipped, not given weight zero: their out may be uninitialised, 0 * NaN is NaN.
  float weight_sum = 0.0f;
  for (int64_t partial = 0; partial < p.num_partials; ++partial) {
    const float lse = lses[partial * p.lses_strides[0]];
    if (lse != NegativeInfinity()) weight_sum += expf(lse - max_lse);
  }
  // The partial that holds the maximum weighs exactly 1, so the sum is zero only without partials.
  // A NaN lse made the sum NaN, which is not equal to zero and so spreads to out and lse below.
  const bool empty = weight_sum == 0.0f;

  const int width = vectors ? 4 : 1;  // channels at a time
  for (int64_t d = int64_t{lane} * width; d < p.head_dim; d += kWarpSize * width) {
    float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 4
    for (int64_t partial = 0; partial < p.num_partials; ++partial) {
      const float lse = lses[partial * p.lses_strides[0]];
      if (lse == NegativeInfinity()) continue;
      const float weight = expf(lse - max_lse);
      const float* partial_out = outs + partial * p.outs_strides[0] + d;
      if (vectors) {
        const Vector16 x = *reinterpret_cast<const Vector16*>(partial_out);
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[i] += weight * BitsFloat(x.words[i]);
      } else {
        sum[0] += weight * *partial_out;
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i < width) StoreFloat(p.out, out + d + i, p.dtype, empty ? 0.0f : sum[i] / weight_sum);
    }
  }
  if (lane == 0 && p.lse != nullptr) {
    p.lse[row * p.lse_stride + head] = empty ? NegativeInfinity() : max_lse + logf(weight_sum);
  }
}

}  // namespace

void MergePartialsCuda(const MergePartialsParams& params, cudaStream_t stream) {
  const int64_t num_places = params.num_rows * params.num_heads;
  if (num_places == 0) return;
  const int64_t strides =
      params.head_dim | params.outs_strides[0] | params.outs_strides[1];  // all multiples of 4?
  const bool vectors = strides % 4 == 0 && reinterpret_cast<uintptr_t>(params.outs) % 16 == 0;
  Launch("merge_partials", MergePartialsKernel, dim3(CeilDiv(num_places, kWarps)),
         kWarps * kWarpSize, 0, stream, params, vectors);
}

}  // namespace pikv_ds
