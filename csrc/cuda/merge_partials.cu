// One warp per row: the weights are computed by all lanes alike, and the lanes share the channels.
#include "common.cuh"

namespace pikv_ds {
namespace {

constexpr int kWarps = 4;

// The largest lse of a row, the shift that keeps expf() in range. A NaN compares false and is left
// out here; it still reaches the result through its own weight.
__device__ float MaxLse(const MergePartialsParams& p, int64_t row, int lane) {
  float max_lse = NegativeInfinity();
  for (int64_t partial = lane; partial < p.num_partials; partial += kWarpSize) {
    const float lse = p.lses[partial * p.num_rows + row];
    if (lse > max_lse) max_lse = lse;
  }
  return WarpMax(max_lse);
}

__global__ void __launch_bounds__(kWarps* kWarpSize)
    MergePartialsKernel(const MergePartialsParams p, bool vectors) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarpSize;
  if (row >= p.num_rows) return;  // the whole warp

  const float max_lse = MaxLse(p, row, lane);
  // Always 0..P-1: a fixed order of summation makes the result the same bits on every run. Empty
  // partials are skipped, not given weight zero: their out may be uninitialised, 0 * NaN is NaN.
  float weight_sum = 0.0f;
  for (int64_t partial = 0; partial < p.num_partials; ++partial) {
    const float lse = p.lses[partial * p.num_rows + row];
    if (lse != NegativeInfinity()) weight_sum += expf(lse - max_lse);
  }
  // The partial that holds the maximum weighs exactly 1, so the sum is zero only without partials.
  // A NaN lse made the sum NaN, which is not equal to zero and so spreads to out and lse below.
  const bool empty = weight_sum == 0.0f;
  float* out = p.out + row * p.head_dim;

  const int width = vectors ? 4 : 1;  // channels at a time
  for (int64_t d = int64_t{lane} * width; d < p.head_dim; d += kWarpSize * width) {
    float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 4
    for (int64_t partial = 0; partial < p.num_partials; ++partial) {
      const float lse = p.lses[partial * p.num_rows + row];
      if (lse == NegativeInfinity()) continue;
      const float weight = expf(lse - max_lse);
      const float* partial_out = p.outs + (partial * p.num_rows + row) * p.head_dim + d;
      if (vectors) {
        const Vector16 x = *reinterpret_cast<const Vector16*>(partial_out);
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[i] += weight * BitsFloat(x.words[i]);
      } else {
        sum[0] += weight * *partial_out;
      }
    }
    if (vectors) {
      Vector16 x;
#pragma unroll
      for (int i = 0; i < 4; ++i) x.words[i] = FloatBits(empty ? 0.0f : sum[i] / weight_sum);
      *reinterpret_cast<Vector16*>(out + d) = x;
    } else {
      out[d] = empty ? 0.0f : sum[0] / weight_sum;
    }
  }
  if (lane == 0) p.lse[row] = empty ? NegativeInfinity() : max_lse + logf(weight_sum);
}

}  // namespace

void MergePartialsCuda(const MergePartialsParams& params, cudaStream_t stream) {
  if (params.num_rows == 0) return;
  const auto address =
      reinterpret_cast<uintptr_t>(params.outs) | reinterpret_cast<uintptr_t>(params.out);
  const bool vectors = params.head_dim % 4 == 0 && address % 16 == 0;
  Launch("merge_partials", MergePartialsKernel, dim3(CeilDiv(params.num_rows, kWarps)),
         kWarps * kWarpSize, 0, stream, params, vectors);
}

}  // namespace pikv_ds
