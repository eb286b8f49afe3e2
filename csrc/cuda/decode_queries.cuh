// The queries of decode_tensor.cuh as fragments, and the powers of two that keep what scales are
// folded into within float16's range.
#pragma once

#include "decode.cuh"
#include "fragments.cuh"

namespace pikv_ds {

// The least e with |x| < 2^e, for x not subnormal, and 2^e; |e| < 127.
__device__ __forceinline__ int ExponentAbove(float x) {
  return static_cast<int>(FloatBits(x) >> 23 & 0xff) - 126;
}
__device__ __forceinline__ float PowerOfTwo(int e) {
  return BitsFloat(static_cast<uint32_t>(e + 127) << 23);
}

// The power of two, 0 to 15, that brings the largest of kCount float16 scales to about 1.
template <int kCount>
__device__ __forceinline__ int ScaleUp(const uint8_t* scales) {
  const int lane = threadIdx.x % kWarpSize;
  uint32_t words[4] = {};
  if (lane < kCount / 8) LoadWords<16>(scales + 16 * lane, words);
  uint32_t largest = MaxHalf2(MaxHalf2(words[0], words[1]), MaxHalf2(words[2], words[3]));
  largest = MaxHalf2(largest, largest >> 16);
#pragma unroll
  for (int mask = 1; mask < kCount / 8; mask *= 2) {
    largest = MaxHalf2(largest, ShuffleXor(largest, mask));
  }
  // float16's exponent is biased by 15. Lanes beyond kCount / 8 have not seen all scales.
  const int exponent = static_cast<int>(Shuffle(largest, 0) >> 10 & 0x1f);
  return min(max(14 - exponent, 0), 15);
}

// Puts the queries into shared memory in the order of fragments. Coded elements: as float16, times
// a power of two per column. Then the factors by which score fragments must be multiplied, which
// make them scores in units of log 2.
template <Element kElement, int kHeadDim, int kTiles, typename Shared>
__device__ __forceinline__ void StageQueries(const DecodeAttentionParams& p,
                                             const DecodeBlock& block, int columns,
                                             uint8_t* shared) {
  using F = Fragments<kElement, kHeadDim>;
  constexpr int kColumns = Shared::kColumns;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  float* query_factors = reinterpret_cast<float*>(shared + Shared::kFactorsAt);
  float* score_factors = query_factors + kColumns;
  const auto load = [&](int column, int d) {
    return LoadFloat(p.query, block.RowAndHead(p, column) * kHeadDim + d, p.dtype);
  };
  for (int column = warp; column < kColumns; column += kDecodeWarps) {
    int exponent = 0;
    if constexpr (F::kCoded) {
      float max = 0.0f;
      if (column < columns) {
        for (int d = lane; d < kHeadDim; d += kWarpSize) max = fmaxf(max, fabsf(load(column, d)));
      }
      max = WarpMax(max);
      if (max > 0.0f) exponent = min(ExponentAbove(max), 126);
    }
    if (lane == 0) {
      query_factors[column] = PowerOfTwo(-exponent);
      score_factors[column] = p.scale * kLog2e * kDecodeFactor<kElement> * PowerOfTwo(exponent);
    }
  }
  __syncthreads();

  uint32_t* fragments = reinterpret_cast<uint32_t*>(shared);
  for (int i = threadIdx.x; i < F::kSteps * kTiles * kWarpSize; i += kDecodeThreads) {
    const int at = i % kWarpSize, tile = i / kWarpSize % kTiles, step = i / (kWarpSize * kTiles);
    const int column = tile * 8 + at / 4;  // b fragments: lane (g, c) has column g
    float q[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    if (column < columns) {
#pragma unroll
      for (int j = 0; j < 4; ++j)
        q[j] = load(column, F::KeyChannel(step, at % 4, j)) * query_factors[column];
    }
    fragments[2 * i] = Pack<kElement>(q[0], q[1]);
    fragments[2 * i + 1] = Pack<kElement>(q[2], q[3]);
  }
}

}  // namespace pikv_ds
