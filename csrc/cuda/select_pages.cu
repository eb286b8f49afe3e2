// One block per row and KV head. A radix select finds the score that the last page kept has, a byte
// of it per pass; a last pass keeps what is above and, in order, as many of its equals as fit.
#include "common.cuh"

namespace pikv_ds {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kDigits = 256;

struct Shared {
  int histogram[kDigits];
  int warp_totals[kWarps];
  uint32_t digit;  // chosen in the pass
  int remaining;   // pages to keep among those that share the digits chosen so far
};

// Sum over the block's threads before this one, and over all in *total.
__device__ int ExclusiveCount(bool flag, int* warp_totals, int* total) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const uint32_t flags = Ballot(flag);
  __syncthreads();  // the totals of the previous call have been read
  if (lane == 0) warp_totals[warp] = CountBits(flags);
  __syncthreads();
  int before = CountBits(flags & ((1u << lane) - 1));
  *total = 0;
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) before += warp_totals[w];
    *total += warp_totals[w];
  }
  return before;
}

__global__ void __launch_bounds__(kThreads) SelectPagesKernel(const SelectPagesParams p) {
  __shared__ Shared shared;
  const int64_t row = blockIdx.y, head = blockIdx.x;
  const int width = static_cast<int>(p.table_width);
  const int count = p.counts[row];
  const bool* pinned = p.pinned + row * width;
  const float* scores = p.scores + (row * p.num_kv_heads + head) * width;
  int32_t* out = p.out + (row * p.num_kv_heads + head) * width;

  int num_pinned = 0;
  for (int i = threadIdx.x; i < count; i += kThreads) num_pinned += pinned[i];
  if (threadIdx.x == 0) shared.remaining = 0;
  __syncthreads();
  if (num_pinned > 0) atomicAdd(&shared.remaining, num_pinned);
  __syncthreads();
  const int keep = min(max(p.budget[row], shared.remaining), count);
  __syncthreads();
  if (threadIdx.x == 0) shared.remaining = keep;
  __syncthreads();

  const auto key = [&](int i) { return OrderedBits(pinned[i] ? -NegativeInfinity() : scores[i]); };

  uint32_t threshold = 0;  // the digits chosen so far, from the highest
  if (keep > 0) {          // the same for the whole block, as the barriers below demand
    for (int shift = 24; shift >= 0; shift -= 8) {
      for (int i = threadIdx.x; i < kDigits; i += kThreads) shared.histogram[i] = 0;
      __syncthreads();
      const uint32_t chosen_bits = shift == 24 ? 0 : ~0u << (shift + 8);
      for (int i = threadIdx.x; i < count; i += kThreads) {
        const uint32_t k = key(i);
        if (((k ^ threshold) & chosen_bits) == 0)
          atomicAdd(&shared.histogram[k >> shift & 0xff], 1);
      }
      __syncthreads();
      if (threadIdx.x == 0) {  // 256 steps of one thread, next to count / 512 loads of each
        int digit = kDigits - 1;
        while (shared.histogram[digit] < shared.remaining)
          shared.remaining -= shared.histogram[digit--];
        shared.digit = digit;
      }
      __syncthreads();
      threshold |= shared.digit << shift;
    }
  }

  // shared.remaining is now the number of pages to keep whose key equals the threshold.
  const int ties_kept = shared.remaining;
  int ties_before = 0;
  for (int begin = 0; begin < width; begin += kThreads) {
    const int i = begin + threadIdx.x;
    const uint32_t k = i < count && keep > 0 ? key(i) : 0;
    const bool tie = i < count && keep > 0 && k == threshold;
    int ties;
    const int place = ties_before + ExclusiveCount(tie, shared.warp_totals, &ties);
    ties_before += ties;
    const bool kept = i < count && keep > 0 && (k > threshold || (tie && place < ties_kept));
    if (i < width) out[i] = kept ? p.table[row * width + i] : 0;
  }
}

}  // namespace

void SelectPagesCuda(const SelectPagesParams& params, cudaStream_t stream) {
  if (params.num_rows == 0 || params.table_width == 0) return;
  Launch("select_pages", SelectPagesKernel, dim3(params.num_kv_heads, params.num_rows), kThreads, 0,
         stream, params);
}

}  // namespace pikv_ds
