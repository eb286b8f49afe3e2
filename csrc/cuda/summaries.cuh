// What the kernels that score pages by their summaries share: which pages and queries a block has.
//
// A page has eight lanes, a warp four pages: few lanes share a dot product, so few shuffles add it
// up, and their loads still make whole sectors of memory.
#pragma once

#include "common.cuh"

namespace pikv_ds {

constexpr int kSummaryThreads = 4 * kWarpSize;
constexpr int kSummaryLanes = 8;  // per page
constexpr int kSummaryPages = kSummaryThreads / kSummaryLanes;

// Block (i, k, r) scores the i-th kSummaryPages pages of row r for the query heads of KV head k.
struct SummaryBlock {
  int64_t row, head;
  int64_t position;  // of this lane's page in the table
  int lane;          // of the page's
  int head_dim;
  int group;           // query heads per KV head
  const float* query;  // [group, D] in shared memory
  int slot;            // of this lane's page; 0: there is none

  // Whole block.
  template <typename Params>
  __device__ __forceinline__ explicit SummaryBlock(const Params& p)
      : row(blockIdx.z),
        head(blockIdx.y),
        position(int64_t{blockIdx.x} * kSummaryPages + threadIdx.x / kSummaryLanes),
        lane(threadIdx.x % kSummaryLanes),
        head_dim(static_cast<int>(p.head_dim)),
        group(static_cast<int>(p.num_heads / p.num_kv_heads)) {
    float* shared = reinterpret_cast<float*>(DynamicShared());
    const int64_t first = (row * p.num_heads + head * group) * head_dim;
    for (int i = threadIdx.x; i < group * head_dim; i += kSummaryThreads) {
      shared[i] = LoadFloat(p.query, first + i, p.dtype);
    }
    __syncthreads();
    query = shared;
    slot = position < p.counts[row] ? p.table[row * p.table_width + position] : 0;
  }

  template <typename Params>
  static dim3 Grid(const Params& p) {
    return dim3(CeilDiv(p.table_width, kSummaryPages), p.num_kv_heads, p.num_rows);
  }
  // Dynamic shared memory.
  template <typename Params>
  static int SharedBytes(const Params& p) {
    return static_cast<int>(p.num_heads / p.num_kv_heads * p.head_dim * sizeof(float));
  }
};

// Over the lanes of a page; each gets the result.
__device__ __forceinline__ float SumOverPage(float x) {
#pragma unroll
  for (int mask = kSummaryLanes / 2; mask > 0; mask /= 2) x += ShuffleXor(x, mask);
  return x;
}

}  // namespace pikv_ds
