// The product C = A B of attention_kernel.h with vectors, for operands that have a MulAdd. Included
// inside a target pragma.
#pragma once

#include "attention_vectors.h"

namespace pikv_ds {
namespace {

// c[rows, places] = a * b, where each word of A meets kLanes words of B. Works for all operands
// whose MulAdd takes vectors. The tile of kRows x kBlocks sums stays in registers for kRun words,
// then it is added to c: long sums of float32 lose less in two levels.
template <class Operand, int kRows, int kBlocks>
PIKV_INLINE void MultiplyTile(const uint32_t* a, int64_t a_stride, const uint32_t* b,
                              int num_groups, float* c, int64_t c_stride) {
  using Simd = typename Operand::Simd;
  using Sum = typename Operand::Sum;
  constexpr int kLanes = Simd::kLanes;
  constexpr int kRun = 32;
  for (int begin = 0; begin < num_groups; begin += kRun) {
    Sum sum[kRows][kBlocks] = {};
    for (int k = begin; k < Min(begin + kRun, num_groups); ++k) {
      typename Simd::U words[kBlocks];
#pragma GCC unroll 8
      for (int n = 0; n < kBlocks; ++n) {
        words[n] = Load<typename Simd::U>(b + (int64_t{n} * num_groups + k) * kLanes);
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
        for (int n = 0; n < kBlocks; ++n) {
          sum[r][n] = Operand::MulAdd(a[r * a_stride + k], words[n], sum[r][n]);
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int n = 0; n < kBlocks; ++n) {
        float* to = c + r * c_stride + n * kLanes;
        Store(to, begin == 0 ? sum[r][n] : Load<Sum>(to) + sum[r][n]);
      }
    }
  }
}

template <class Operand, int kRows>
void MultiplyRows(const uint32_t* a, int64_t a_stride, const uint32_t* b, int num_groups,
                  int num_blocks, float* c, int64_t c_stride) {
  constexpr int kLanes = Operand::Simd::kLanes;
  constexpr int kBlocks = Operand::kTileBlocks;
  int n = 0;
  const auto at = [&](int block) { return b + int64_t{block} * num_groups * kLanes; };
  for (; n + kBlocks <= num_blocks; n += kBlocks) {
    MultiplyTile<Operand, kRows, kBlocks>(a, a_stride, at(n), num_groups, c + n * kLanes, c_stride);
  }
  for (; n < num_blocks; ++n) {
    MultiplyTile<Operand, kRows, 1>(a, a_stride, at(n), num_groups, c + n * kLanes, c_stride);
  }
}

template <class Operand>
void MultiplyWithVectors(const uint32_t* a, int64_t a_stride, int num_rows, const uint32_t* b,
                         int num_groups, int num_blocks, float* c, int64_t c_stride) {
  int r = 0;
  const auto multiply = [&](auto rows) {
    MultiplyRows<Operand, decltype(rows)::value>(a + r * a_stride, a_stride, b, num_groups,
                                                 num_blocks, c + r * c_stride, c_stride);
    r += decltype(rows)::value;
  };
  while (r + 4 <= num_rows) multiply(Constant<4>{});
  while (r + 2 <= num_rows) multiply(Constant<2>{});
  if (r < num_rows) multiply(Constant<1>{});
}

}  // namespace
}  // namespace pikv_ds
