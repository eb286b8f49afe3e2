// One block per sequence and KV head; its warps take 32 tokens at a time in turn.
#include "attend.cuh"

namespace pikv_ds {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarpSize;

// Query heads of the KV head at a time, and the most channels of a value: of latent attention there
// are more.
template <bool kWide>
constexpr int kRowsOf = kWide ? 4 : 8;
template <bool kWide>
constexpr int kMaxDimOf = kWide ? kMaxLatentDim : kMaxHeadDim;

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

template <Dtype kDtype, bool kWide>
__global__ void __launch_bounds__(kThreads, 2) TailAttentionKernel(const TailAttentionParams p) {
  constexpr int kRows = kRowsOf<kWide>;
  using T = typename Stored<kDtype>::Type;
  const int warp = threadIdx.x / kWarpSize;
  const int64_t n = blockIdx.x, kv_head = blockIdx.y;
  const int head_dim = static_cast<int>(p.head_dim), padded_dim = PaddedDim(p.head_dim);
  const int value_dim = static_cast<int>(p.value_dim);
  const int group = static_cast<int>(p.num_heads / p.num_kv_heads);
  const int first_row = blockIdx.z * kRows;  // within the group
  const int num_rows = min(kRows, group - first_row);
  const int64_t first_head = kv_head * group + first_row;
  const int64_t tail = p.indices == nullptr ? n : p.indices[n];
  const int length = p.lengths[n];

  float* query = reinterpret_cast<float*>(DynamicShared());  // [kRows, padded_dim]
  for (int i = threadIdx.x; i < kRows * padded_dim; i += kThreads) {
    const int row = i / padded_dim, d = i - row * padded_dim;
    const bool there = row < num_rows && d < head_dim;
    query[i] = there
                   ? LoadFloat(p.query, (n * p.num_heads + first_head + row) * head_dim + d, kDtype)
                   : 0.0f;
  }
  __syncthreads();

  const int64_t offset = (tail * p.num_kv_heads + kv_head) * p.page_size * head_dim;
  TailTokens<kDtype> tokens;
  tokens.keys = static_cast<const T*>(p.keys) + offset;
  tokens.values = static_cast<const T*>(p.values) + offset;
  tokens.head_dim = head_dim;
  tokens.vectors = head_dim % kKeyWidth == 0 && Aligned16(tokens.keys);

  AttentionState<kRows, kMaxDimOf<kWide>> state;
  state.Clear();
  for (int first = warp * kWarpSize; first < length; first += kThreads) {
    const int count = min(kWarpSize, length - first);
    float scores[kRows];
    ScoreTokens<kRows>(tokens, first, count, query, padded_dim, p.scale, scores);
    AttendTokens(tokens, first, count, value_dim, scores, &state);
  }

  const WarpPartials partials(DynamicShared() + kRows * padded_dim * sizeof(float), kWarps, kRows,
                              value_dim);
  StoreWarp(state, warp, partials);
  __syncthreads();
  MergeWarps<kWarps>(
      partials, num_rows,
      [&](int row, int d, float x) {
        p.out[n * p.out_stride + (first_head + row) * value_dim + d] = x;
      },
      [&](int row, float lse) { p.lse[n * p.lse_stride + first_head + row] = lse; });
}

}  // namespace

void TailAttentionCuda(const TailAttentionParams& params, cudaStream_t stream) {
  if (params.num_rows == 0) return;
  const auto launch = [&](auto kernel, int rows, int most) {
    if (params.value_dim > most) {
      throw std::runtime_error("tail_attention: values of " + std::to_string(params.value_dim) +
                               " channels have no CUDA kernel; the most are " +
                               std::to_string(most));
    }
    const int shared_bytes = rows * PaddedDim(params.head_dim) * static_cast<int>(sizeof(float)) +
                             WarpPartials::Bytes(kWarps, rows, static_cast<int>(params.value_dim));
    const dim3 grid(params.num_rows, params.num_kv_heads,
                    CeilDiv(params.num_heads / params.num_kv_heads, rows));
    Launch("tail_attention", kernel, grid, kThreads, shared_bytes, stream, params);
  };
  WithDtype(params.dtype, [&](auto dtype) {
    constexpr Dtype kDtype = decltype(dtype)::value;
    if (params.value_dim > kMaxHeadDim) {
      launch(TailAttentionKernel<kDtype, true>, kRowsOf<true>, kMaxDimOf<true>);
    } else {
      launch(TailAttentionKernel<kDtype, false>, kRowsOf<false>, kMaxDimOf<false>);
    }
  });
}

}  // namespace pikv_ds
