// A plain copy of rows, 16 bytes per thread at a time.
#include "common.cuh"

namespace pikv_ds {
namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 4;  // loads in flight per thread
constexpr int kBlockBytes = kThreads * kUnroll * 16;

// Block (n, i) copies the i-th kBlockBytes of page n.
__global__ void __launch_bounds__(kThreads) GatherPagesKernel(const GatherPagesParams p) {
  const int64_t row_bytes = p.slabs.row_bytes;
  const int64_t begin = int64_t{blockIdx.y} * kBlockBytes;
  const uint8_t* from = p.slabs.Row(p.slots[blockIdx.x]);
  uint8_t* to = p.out + blockIdx.x * row_bytes;

  if (row_bytes % 16 == 0 && Aligned16(from) && Aligned16(to)) {
    Vector16 x[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const int64_t at = begin + (i * kThreads + threadIdx.x) * 16;
      if (at < row_bytes) x[i] = *reinterpret_cast<const Vector16*>(from + at);
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const int64_t at = begin + (i * kThreads + threadIdx.x) * 16;
      if (at < row_bytes) *reinterpret_cast<Vector16*>(to + at) = x[i];
    }
    return;
  }
  for (int64_t at = begin + threadIdx.x; at < row_bytes && at < begin + kBlockBytes;
       at += kThreads) {
    to[at] = from[at];
  }
}

}  // namespace

void GatherPagesCuda(const GatherPagesParams& params, cudaStream_t stream) {
  if (params.num_pages == 0 || params.slabs.row_bytes == 0) return;
  const dim3 grid(params.num_pages, CeilDiv(params.slabs.row_bytes, kBlockBytes));
  Launch("gather_pages", GatherPagesKernel, grid, kThreads, 0, stream, params);
}

}  // namespace pikv_ds
