// Attention of a few query rows over tokens in float32, one warp at a time: for queries and pages
// in float32, for layouts that the tensor cores' path does not take, and for open tails.
//
// A step takes 32 tokens. To score them, each lane takes one token and forms whole dot products, so
// nothing is reduced across lanes; then each lane owns channels lane, lane + 32, ... of the output.
//
// `Tokens` is a type with
//   void Keys(int token, int d, float (&out)[kKeyWidth])   kKeyWidth channels from d on
//   float Value(int token, int d)
#pragma once

#include "common.cuh"

namespace pikv_ds {

constexpr int kMaxHeadDim = 256;
constexpr int kMaxLatentDim = 512;
constexpr int kKeyWidth = 8;  // channels of a key at a time; d beyond the head's are ignored

// What kRows query rows have seen, of values with up to kMaxDim channels; the same in all lanes but
// `sum` and `out`.
template <int kRows, int kMaxDim = kMaxHeadDim>
struct AttentionState {
  static constexpr int kChannels = kMaxDim / kWarpSize;  // of a lane
  float max[kRows];                                      // of the scores, natural units
  float sum[kRows];  // this lane's part of the sum of exp(score - max)
  float out[kRows][kChannels];

  __device__ void Clear() {
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      max[j] = NegativeInfinity();
      sum[j] = 0.0f;
#pragma unroll
      for (int i = 0; i < kChannels; ++i) out[j][i] = 0.0f;
    }
  }
};

// Scores of token `lane` of up to 32, -inf where there is none. query: [kRows, D] in shared memory,
// D padded to a multiple of kKeyWidth with zeros.
template <int kRows, typename Tokens>
__device__ __forceinline__ void ScoreTokens(const Tokens& tokens, int first, int count,
                                            const float* query, int padded_dim, float scale,
                                            float (&scores)[kRows]) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int j = 0; j < kRows; ++j) scores[j] = 0.0f;
  if (lane < count) {
    for (int d = 0; d < padded_dim; d += kKeyWidth) {
      float key[kKeyWidth];
      tokens.Keys(first + lane, d, key);
#pragma unroll
      for (int j = 0; j < kRows; ++j) {
#pragma unroll
        for (int i = 0; i < kKeyWidth; ++i) scores[j] += query[j * padded_dim + d + i] * key[i];
      }
    }
  }
#pragma unroll
  for (int j = 0; j < kRows; ++j) scores[j] = lane < count ? scores[j] * scale : NegativeInfinity();
}

// Attends to `count` tokens, 1 to 32, whose scores the lanes hold.
template <int kRows, int kMaxDim, typename Tokens>
__device__ __forceinline__ void AttendTokens(const Tokens& tokens, int first, int count,
                                             int value_dim, const float (&scores)[kRows],
                                             AttentionState<kRows, kMaxDim>* state) {
  const int lane = threadIdx.x % kWarpSize;
  float weights[kRows];
#pragma unroll
  for (int j = 0; j < kRows; ++j) {
    const float max = fmaxf(state->max[j], WarpMax(scores[j]));
    const float decay = expf(state->max[j] - max);  // exp(-inf) = 0 at first
    weights[j] = expf(scores[j] - max);
    state->max[j] = max;
    state->sum[j] = state->sum[j] * decay + weights[j];
#pragma unroll
    for (int i = 0; i < state->kChannels; ++i) state->out[j][i] *= decay;
  }
  for (int token = 0; token < count; ++token) {
    float weight[kRows];
#pragma unroll
    for (int j = 0; j < kRows; ++j) weight[j] = Shuffle(weights[j], token);
#pragma unroll
    for (int i = 0; i < state->kChannels; ++i) {
      const int d = lane + i * kWarpSize;
      if (d >= value_dim) break;
      const float value = tokens.Value(first + token, d);
#pragma unroll
      for (int j = 0; j < kRows; ++j) state->out[j][i] += weight[j] * value;
    }
  }
}

// The partial results of a block's warps in shared memory, which MergeWarps makes one.
struct WarpPartials {
  float* out;  // [kWarps, num_rows, head_dim], to be divided by sum
  float* max;  // [kWarps, num_rows], natural units
  float* sum;  // [kWarps, num_rows]; 0: empty, out is not read
  int num_rows;
  int head_dim;

  __device__ WarpPartials(uint8_t* shared, int num_warps, int num_rows, int head_dim)
      : out(reinterpret_cast<float*>(shared)),
        max(out + num_warps * num_rows * head_dim),
        sum(max + num_warps * num_rows),
        num_rows(num_rows),
        head_dim(head_dim) {}
  __host__ __device__ static constexpr int Bytes(int num_warps, int num_rows, int head_dim) {
    return num_warps * num_rows * (head_dim + 2) * static_cast<int>(sizeof(float));
  }
};

// Whole warp: leaves its state where MergeWarps finds it, behind a barrier.
template <int kRows, int kMaxDim>
__device__ __forceinline__ void StoreWarp(const AttentionState<kRows, kMaxDim>& state, int warp,
                                          const WarpPartials& partials) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int j = 0; j < kRows; ++j) {
    const int at = warp * kRows + j;
#pragma unroll
    for (int i = 0; i < state.kChannels; ++i) {
      const int d = lane + i * kWarpSize;
      if (d < partials.head_dim) partials.out[at * partials.head_dim + d] = state.out[j][i];
    }
    const float sum = WarpSum(state.sum[j]);
    if (lane == 0) {
      partials.max[at] = state.max[j];
      partials.sum[at] = sum;
    }
  }
}

// Whole block, after a barrier. Calls write(row, d, value) and write_lse(row, lse) for the first
// `count` rows.
template <int kWarps, typename Write, typename WriteLse>
__device__ __forceinline__ void MergeWarps(const WarpPartials& partials, int count,
                                           const Write& write, const WriteLse& write_lse) {
  for (int i = threadIdx.x; i < count * partials.head_dim; i += kWarps * kWarpSize) {
    const int row = i / partials.head_dim, d = i - row * partials.head_dim;
    float max = NegativeInfinity();
#pragma unroll
    for (int w = 0; w < kWarps; ++w) max = fmaxf(max, partials.max[w * partials.num_rows + row]);
    float out = 0.0f, sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const int at = w * partials.num_rows + row;
      if (partials.sum[at] == 0.0f) continue;  // empty; a NaN is not, and spreads
      const float weight = expf(partials.max[at] - max);
      out += weight * partials.out[at * partials.head_dim + d];
      sum += weight * partials.sum[at];
    }
    const bool empty = sum == 0.0f;
    write(row, d, empty ? 0.0f : out / sum);
    if (d == 0) write_lse(row, empty ? NegativeInfinity() : max + logf(sum));
  }
}

}  // namespace pikv_ds
