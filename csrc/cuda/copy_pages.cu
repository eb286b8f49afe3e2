// Pages out of their slots and into them: a plain copy of rows, 16 bytes per thread at a time.
#include "common.cuh"

namespace pikv_ds {
namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 4;  // loads in flight per thread
constexpr int kBlockBytes = kThreads * kUnroll * 16;

// Copies the block's share of a row: kBlockBytes from blockIdx.y * kBlockBytes on.
__device__ __forceinline__ void CopyRow(const uint8_t* from, uint8_t* to, int64_t row_bytes) {
  const int64_t begin = int64_t{blockIdx.y} * kBlockBytes;
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

// Block (n, i) copies the i-th kBlockBytes of page n.
__global__ void __launch_bounds__(kThreads) GatherPagesKernel(const GatherPagesParams p) {
  const int64_t row_bytes = p.slabs.row_bytes;
  CopyRow(p.slabs.Row(p.slots[blockIdx.x]), p.out + blockIdx.x * row_bytes, row_bytes);
}

__global__ void __launch_bounds__(kThreads) ScatterPagesKernel(const ScatterPagesParams p) {
  uint8_t* const to = p.slabs.MutableRow(p.slots[blockIdx.x]);
  CopyRow(p.pages + blockIdx.x * p.stride, to, p.slabs.row_bytes);
}

dim3 Grid(int64_t num_pages, int64_t row_bytes) {
  return dim3(num_pages, CeilDiv(row_bytes, kBlockBytes));
}

}  // namespace

void GatherPagesCuda(const GatherPagesParams& params, cudaStream_t stream) {
  if (params.num_pages == 0 || params.slabs.row_bytes == 0) return;
  const dim3 grid = Grid(params.num_pages, params.slabs.row_bytes);
  Launch("gather_pages", GatherPagesKernel, grid, kThreads, 0, stream, params);
}

void ScatterPagesCuda(const ScatterPagesParams& params, cudaStream_t stream) {
  if (params.num_pages == 0 || params.slabs.row_bytes == 0) return;
  const dim3 grid = Grid(params.num_pages, params.slabs.row_bytes);
  Launch("scatter_pages", ScatterPagesKernel, grid, kThreads, 0, stream, params);
}

}  // namespace pikv_ds
