// One block per sequence and KV head; its warps take 32 tokens at a time in turn.
#include "attend.cuh"

namespace pikv_ds {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kRows = 8;  // query heads of the KV head at a time

template <Dtype kDtype>
struct TailTokens {
  using T = typename Stored<kDtype>::Type;
  const T* keys;
  const T* values;
  int head_dim;
  bool vectors;  // rows are whole 16-byte vectors

  __device__ void Keys(int token, int d, float (&out)[kKeyWidth]) const {
    const T* from = keys + int64_t{token} * head_dim + d;
    if (vectors) {
      constexpr int kPerVector = 16 / sizeof(T);
#pragma unroll
      for (int v = 0; v < kKeyWidth / kPerVector; ++v) {
        const Vector16 x = reinterpret_cast<const Vector16*>(from)[v];
#pragma unroll
        for (int i = 0; i < kPerVector; ++i) {
          if constexpr (sizeof(T) == 4) {
            out[v * kPerVector + i] = BitsFloat(x.words[i]);
          } else {
            const uint16_t bits = static_cast<uint16_t>(x.words[i / 2] >> (16 * (i % 2)));
            out[v * kPerVector + i] = ToFloat<kDtype>(bits);
          }
        }
      }
    } else {
#pragma unroll
      for (int i = 0; i < kKeyWidth; ++i)
        out[i] = d + i < head_dim ? ToFloat<kDtype>(from[i]) : 0.0f;
    }
  }
  __device__ float Value(int token, int d) const {
    return ToFloat<kDtype>(values[int64_t{token} * head_dim + d]);
  }
};

__host__ __device__ constexpr int PaddedDim(int64_t head_dim) {
  return static_cast<int>(CeilDiv(head_dim, kKeyWidth)) * kKeyWidth;
}

template <Dtype kDtype>
__global__ void __launch_bounds__(kThreads, 2) TailAttentionKernel(const TailAttentionParams p) {
  using T = typename Stored<kDtype>::Type;
  const int warp = threadIdx.x / kWarpSize;
  const int64_t n = blockIdx.x, kv_head = blockIdx.y;
  const int head_dim = static_cast<int>(p.head_dim), padded_dim = PaddedDim(p.head_dim);
  const int group = static_cast<int>(p.num_heads / p.num_kv_heads);
  const int first_row = blockIdx.z * kRows;  // within the group
  const int num_rows = min(kRows, group - first_row);
  const int64_t first_head = n * p.num_heads + kv_head * group + first_row;  // of [N, H]
  const int length = p.lengths[n];

  float* query = reinterpret_cast<float*>(DynamicShared());  // [kRows, padded_dim]
  for (int i = threadIdx.x; i < kRows * padded_dim; i += kThreads) {
    const int row = i / padded_dim, d = i - row * padded_dim;
    const bool there = row < num_rows && d < head_dim;
    query[i] = there ? LoadFloat(p.query, (first_head + row) * head_dim + d, kDtype) : 0.0f;
  }
  __syncthreads();

  const int64_t offset = (n * p.num_kv_heads + kv_head) * p.page_size * head_dim;
  TailTokens<kDtype> tokens;
  tokens.keys = static_cast<const T*>(p.keys) + offset;
  tokens.values = static_cast<const T*>(p.values) + offset;
  tokens.head_dim = head_dim;
  tokens.vectors = head_dim % kKeyWidth == 0 && Aligned16(tokens.keys);

  AttentionState<kRows> state;
  state.Clear();
  for (int first = warp * kWarpSize; first < length; first += kThreads) {
    const int count = min(kWarpSize, length - first);
    float scores[kRows];
    ScoreTokens<kRows>(tokens, first, count, query, padded_dim, p.scale, scores);
    AttendTokens<kRows>(tokens, first, count, head_dim, scores, &state);
  }

  const WarpPartials partials(DynamicShared() + kRows * padded_dim * sizeof(float), kWarps, kRows,
                              head_dim);
  StoreWarp(state, warp, partials);
  __syncthreads();
  MergeWarps<kWarps>(
      partials, num_rows,
      [&](int row, int d, float x) { p.out[(first_head + row) * head_dim + d] = x; },
      [&](int row, float lse) { p.lse[first_head + row] = lse; });
}

}  // namespace

void TailAttentionCuda(const TailAttentionParams& params, cudaStream_t stream) {
  if (params.num_rows == 0) return;
  if (params.head_dim > kMaxHeadDim) {
    throw std::runtime_error("tail_attention: head_dim " + std::to_string(params.head_dim) +
                             " has no CUDA kernel; the largest is " + std::to_string(kMaxHeadDim));
  }
  const int head_dim = static_cast<int>(params.head_dim);
  const int shared_bytes = kRows * PaddedDim(head_dim) * static_cast<int>(sizeof(float)) +
                           WarpPartials::Bytes(kWarps, kRows, head_dim);
  const dim3 grid(params.num_rows, params.num_kv_heads,
                  CeilDiv(params.num_heads / params.num_kv_heads, kRows));
  WithDtype(params.dtype, [&](auto dtype) {
    Launch("tail_attention", TailAttentionKernel<decltype(dtype)::value>, grid, kThreads,
           shared_bytes, stream, params);
  });
}

}  // namespace pikv_ds
