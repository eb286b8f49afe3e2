// How the elements of pages are read: as words of 32 bits, turned so that a vector has the same
// word of several tokens, and expanded to float. Included inside a target pragma.
#pragma once

#include <cstring>

#include "../layout.h"
#include "attention_vectors.h"

namespace pikv_ds {
namespace {

// How an element is stored in 32-bit words.
template <Element kElement>
struct Codec {
  static constexpr int kBits = ElementBits(kElement);
  static constexpr int kPerWord = 32 / kBits;
  static constexpr int kPieces = kBits < 8 ? 8 / kBits : 1;  // channels that share a byte
  static constexpr bool kScales = ScaleRows(kElement) > 0;
  static constexpr bool kMinima = ScaleRows(kElement) > 1;

  static constexpr int RowBytes(int head_dim) { return head_dim * kBits / 8; }
  static constexpr int RowWords(int head_dim) { return (RowBytes(head_dim) + 3) / 4; }

  // The channel of a word's j-th element, -1 beyond the row's end. A word of nibbles holds its
  // four low ones first.
  static PIKV_INLINE int Channel(int head_dim, int word, int j) {
    if constexpr (kPieces == 1) {
      const int channel = word * kPerWord + j;
      return channel < head_dim ? channel : -1;
    } else {
      const int byte = 4 * word + j % 4;
      return byte < RowBytes(head_dim) ? byte + j / 4 * (head_dim / kPieces) : -1;
    }
  }
};

// The j-th elements of words as float; of fp8 the 256th part, which float16 can hold.
template <class Simd, Element kElement>
PIKV_INLINE typename Simd::F Expand(typename Simd::U words, int j) {
  using F = typename Simd::F;
  using I = typename Simd::I;
  if constexpr (kElement == Element::kFloat32) {
    return (F)words;
  } else if constexpr (kElement == Element::kBFloat16) {
    return (F)(j == 0 ? words << 16 : words & 0xffff0000u);
  } else if constexpr (kElement == Element::kFloat16) {
    return Simd::HalfToFloat(j == 0 ? words & 0xffffu : words >> 16);
  } else if constexpr (kElement == Element::kFp8) {
    const auto byte = words >> (8 * j);
    return Simd::HalfToFloat(((byte & 0x80u) << 8) | ((byte & 0x7fu) << 7));
  } else {
    constexpr int kBits = Codec<kElement>::kBits;
    const auto code = (words >> (j % 4 * 8 + j / 4 * kBits)) & ((1u << kBits) - 1);
    return __builtin_convertvector((I)code, F);
  }
}

// Pointers to kLanes successive tokens; beyond the last one it is repeated, as something readable.
template <class Simd>
struct TokenRows {
  PIKV_INLINE TokenRows(const uint8_t* first, int64_t stride, int num_tokens) {
    for (int i = 0; i < Simd::kLanes; ++i) row[i] = first + stride * Min(i, num_tokens - 1);
  }
  const uint8_t* row[Simd::kLanes];
};

// Reads kLanes token rows and hands them on as words, transposed: `use(word index, words)`.
template <class Simd, class Use>
PIKV_INLINE void ForEachWordOfTokens(const TokenRows<Simd>& tokens, int row_bytes, const Use& use) {
  typename Simd::U words[4];
  int at = 0;
  for (; at + 16 <= row_bytes; at += 16) {
    Simd::TransposeWords(tokens.row, at, words);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) use(at / 4 + i, words[i]);
  }
  if (at == row_bytes) return;
  alignas(16) uint8_t rest[Simd::kLanes][16] = {};  // a full read might leave the allocation
  const uint8_t* rest_rows[Simd::kLanes];
  for (int i = 0; i < Simd::kLanes; ++i) {
    std::memcpy(rest[i], tokens.row[i] + at, row_bytes - at);
    rest_rows[i] = rest[i];
  }
  Simd::TransposeWords(rest_rows, 0, words);
  for (int i = 0; at + 4 * i < row_bytes; ++i) use(at / 4 + i, words[i]);
}

}  // namespace
}  // namespace pikv_ds
