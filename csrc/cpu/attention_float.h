// The operand that any machine, element and head size has: float32. Included inside a target
// pragma.
#pragma once

#include <cstring>

#include "attention_elements.h"
#include "attention_kernel.h"
#include "attention_multiply.h"

namespace pikv_ds {
namespace {

// A and B in float32, for any element and head size.
template <class SimdType, Element kElement>
struct FloatOperand {
  using Simd = SimdType;
  using F = typename Simd::F;
  using U = typename Simd::U;
  using Sum = F;
  using Code = Codec<kElement>;
  static constexpr int kLanes = Simd::kLanes;
  static constexpr int kGroup = 1;          // k per word
  static constexpr int kGroupMultiple = 1;  // the words of a row of A are a multiple of this
  static constexpr int kTileBlocks = Simd::kTileBlocks;
  static constexpr float kUnit = kElement == Element::kFp8 ? 256.0f : 1.0f;  // see Expand

  static int QueryDigits(Dtype) { return 1; }
  static int WeightDigits(Dtype) { return 1; }
  static void Begin(int) {}
  static void End() {}

  static int NumPlaces(int head_dim) {
    return RoundUp(Code::RowWords(head_dim), kLanes) * Code::kPerWord;
  }
  static int Channel(int head_dim, int place) {
    const int block = place / kLanes;
    const int word = block / Code::kPerWord * kLanes + place % kLanes;
    return Code::Channel(head_dim, word, block % Code::kPerWord);
  }

  // Packs a block of kLanes places.
  static void PackKeys(const TokenRows<Simd>& rows, int head_dim, int, uint32_t* b) {
    ForEachWordOfTokens<Simd>(rows, Code::RowBytes(head_dim), [&](int word, U words) {
#pragma GCC unroll 16
      for (int j = 0; j < Code::kPerWord; ++j) {
        const int channel = Code::Channel(head_dim, word, j);
        if (channel >= 0) Store(b + channel * kLanes, Expand<Simd, kElement>(words, j));
      }
    });
  }

  // Packs up to 16 tokens; `num_groups` is that of all of B. Words of a token row lie side by side,
  // so their j-th elements are channels kPerWord apart.
  static void PackValues(const uint8_t* values, int64_t stride, int num, int head_dim,
                         int num_groups, uint32_t* b) {
    const int row_bytes = Code::RowBytes(head_dim);
    for (int token = 0; token < num; ++token) {
      const uint8_t* row = values + token * stride;
      uint32_t* to = b + token * kLanes;
      for (int at = 0; at < row_bytes; at += 4 * kLanes) {
        const U words = Simd::LoadBytes(row + at, row_bytes - at);
#pragma GCC unroll 16
        for (int j = 0; j < Code::kPerWord; ++j, to += num_groups * kLanes) {
          Store(to, Expand<Simd, kElement>(words, j));
        }
      }
    }
  }

  static PIKV_INLINE F MulAdd(uint32_t a, U b, F sum) { return sum + BitCast<float>(a) * (F)b; }

  static void Multiply(const uint32_t* a, int64_t a_stride, int num_rows, const uint32_t* b,
                       int num_groups, int num_blocks, float* c, int64_t c_stride) {
    MultiplyWithVectors<FloatOperand>(a, a_stride, num_rows, b, num_groups, num_blocks, c,
                                      c_stride);
  }

  // Writes x[0, n) as A's digits, rows a_stride words apart; returns the value of one unit of C.
  static float Split(const float* x, int n, float, int, uint32_t* a, int64_t) {
    std::memcpy(a, x, n * sizeof(float));
    return 1.0f;
  }
  static PIKV_INLINE F Combine(const float* c, int64_t, int) { return Load<F>(c); }
};

// The kernel of an element for operands that take any: `Operand<Simd, element>`.
template <class Simd>
const AttentionKernel& FloatKernelOf(Element element) {
  switch (element) {
    case Element::kFloat32:
      return KernelOf<FloatOperand<Simd, Element::kFloat32>>();
    case Element::kBFloat16:
      return KernelOf<FloatOperand<Simd, Element::kBFloat16>>();
    case Element::kFloat16:
      return KernelOf<FloatOperand<Simd, Element::kFloat16>>();
    case Element::kFp8:
      return KernelOf<FloatOperand<Simd, Element::kFp8>>();
    case Element::kInt8:
      return KernelOf<FloatOperand<Simd, Element::kInt8>>();
    case Element::kInt4:
      return KernelOf<FloatOperand<Simd, Element::kInt4>>();
    case Element::kInt2:
      break;
  }
  return KernelOf<FloatOperand<Simd, Element::kInt2>>();
}

}  // namespace
}  // namespace pikv_ds
