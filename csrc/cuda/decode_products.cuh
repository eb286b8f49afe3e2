// The two products of decode_tensor.cuh for a tile of 16 tokens, which lies in shared memory: keys
// with queries, and values with weights.
#pragma once

#include "fragments.cuh"

namespace pikv_ds {

// Scores of 16 tokens, keys in shared memory.
template <Element kElement, int kHeadDim, int kTiles>
__device__ __forceinline__ void ScoreTile(const uint8_t* keys,
                                          const uint32_t (&query)[kHeadDim / 16][kTiles][2],
                                          float (&scores)[kTiles][4]) {
  using F = Fragments<kElement, kHeadDim>;
  const int lane = threadIdx.x % kWarpSize;
  if constexpr (F::kCoded) {
    constexpr int kLoad = F::kKeyRun < 16 ? F::kKeyRun : 16;
    constexpr int kWords = kLoad / 4;
    const int g = lane / 4, c = lane % 4;
#pragma unroll
    for (int first = 0; first < F::kKeyWords; first += kWords) {
      uint32_t lower[kWords], upper[kWords];  // of tokens g and g + 8
      const uint8_t* from = keys + g * F::kKeyPitch + F::KeyByte(first, c);
      LoadWords<kLoad>(from, lower);
      LoadWords<kLoad>(from + 8 * F::kKeyPitch, upper);
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        ForEachCode<F::kCodes>([&](auto constant) {
          constexpr int kCode = decltype(constant)::value;
          const uint32_t a[4] = {
              DecodePair<kElement, 0, kCode>(lower[i]), DecodePair<kElement, 0, kCode>(upper[i]),
              DecodePair<kElement, 1, kCode>(lower[i]), DecodePair<kElement, 1, kCode>(upper[i])};
          const int step = (first + i) * F::kCodes + kCode;
#pragma unroll
          for (int tile = 0; tile < kTiles; ++tile)
            Mma<kElement>(scores[tile], a, query[step][tile]);
        });
      }
    }
  } else {
    // Matrix i of ldmatrix: tokens 8 (i % 2).., channels 8 (i / 2)...
    const uint8_t* from = keys + lane % 16 * F::kKeyPitch + lane / 16 * 16;
#pragma unroll
    for (int step = 0; step < F::kSteps; ++step) {
      uint32_t a[4];
      LoadMatrices(a, from + step * 32);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) Mma<kElement>(scores[tile], a, query[step][tile]);
    }
  }
}

// Adds 16 tokens' weighted values to the output.
template <Element kElement, int kHeadDim, int kTiles>
__device__ __forceinline__ void AttendTile(const uint8_t* values,
                                           const uint32_t (&weights)[kTiles][2],
                                           float (&out)[kHeadDim / 16][kTiles][4]) {
  using F = Fragments<kElement, kHeadDim>;
  const int lane = threadIdx.x % kWarpSize;
  if constexpr (F::kCoded) {
    constexpr int kLoad = F::kValueRun;
    constexpr int kWords = kLoad < 4 ? 1 : kLoad / 4;
    const int g = lane / 4, c = lane % 4;
#pragma unroll
    for (int first = 0; first < F::kValueUnits; first += kLoad / 2) {
      uint32_t loaded[4][kWords];  // of tokens 2c, 2c + 1, 2c + 8 and 2c + 9
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = 2 * c + i % 2 + 8 * (i / 2);
        LoadWords<kLoad>(values + token * F::kValuePitch + F::ValueByte(first, g), loaded[i]);
      }
#pragma unroll
      for (int unit = 0; unit < kLoad / 2; ++unit) {
        const uint32_t selector = unit % 2 == 0 ? 0x5410 : 0x7632;  // low or high halves of both
        const uint32_t early = BytePermute(loaded[0][unit / 2], loaded[1][unit / 2], selector);
        const uint32_t late = BytePermute(loaded[2][unit / 2], loaded[3][unit / 2], selector);
        ForEachCode<F::kCodes>([&](auto constant) {
          constexpr int kCode = decltype(constant)::value;
          const uint32_t a[4] = {
              DecodePair<kElement, 0, kCode>(early), DecodePair<kElement, 1, kCode>(early),
              DecodePair<kElement, 0, kCode>(late), DecodePair<kElement, 1, kCode>(late)};
          const int m_tile = (first + unit) * F::kCodes + kCode;
#pragma unroll
          for (int tile = 0; tile < kTiles; ++tile)
            Mma<kElement>(out[m_tile][tile], a, weights[tile]);
        });
      }
    }
  } else {
    // Matrix i of ldmatrix, transposed: channels 8 (i % 2).., tokens 8 (i / 2)...
    const uint8_t* from = values + (lane % 8 + lane / 16 * 8) * F::kValuePitch + lane / 8 % 2 * 16;
#pragma unroll
    for (int m_tile = 0; m_tile < F::kSteps; ++m_tile) {
      uint32_t a[4];
      LoadMatricesTransposed(a, from + m_tile * 32);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) Mma<kElement>(out[m_tile][tile], a, weights[tile]);
    }
  }
}

}  // namespace pikv_ds
