// What the files for AVX-512 and for AMX share: vectors of 16, and bytes as operands. Included
// inside their target pragmas.
#pragma once

#include "attention_elements.h"

namespace pikv_ds {
namespace {

struct Avx512Simd {
  static constexpr int kLanes = 16;
  static constexpr int kTileBlocks = 4;  // with 4 rows: 16 accumulators of 32 registers
  typedef float F __attribute__((vector_size(64)));
  typedef int32_t I __attribute__((vector_size(64)));
  typedef uint32_t U __attribute__((vector_size(64)));

  // A mask of the first n of `lanes` lanes, for n >= 0.
  static PIKV_INLINE uint64_t FirstLanes(int n) { return n >= 64 ? ~0ull : (1ull << n) - 1; }

  static PIKV_INLINE F Max(F a, F b) { return _mm512_max_ps(a, b); }
  // Of the lanes' magnitudes.
  static PIKV_INLINE F MaxAbs(F a, F b) { return _mm512_range_ps(a, b, 0xb); }
  static PIKV_INLINE float ReduceAdd(F x) { return _mm512_reduce_add_ps(x); }
  static PIKV_INLINE float ReduceMax(F x) { return _mm512_reduce_max_ps(x); }
  // Lanes from n on become `other`.
  static PIKV_INLINE F Keep(F x, int n, float other) {
    return _mm512_mask_mov_ps(_mm512_set1_ps(other), FirstLanes(n), x);
  }
  // float16 in the low half of each word.
  static PIKV_INLINE F HalfToFloat(U half) {
    return _mm512_cvtph_ps(_mm512_cvtepi32_epi16((__m512i)half));
  }
  static PIKV_INLINE F LoadHalves(const uint16_t* from, int n) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(FirstLanes(n), from));
  }
  // The first n bytes, then zeros.
  static PIKV_INLINE U LoadBytes(const uint8_t* from, int n) {
    return n >= 64 ? Load<U>(from) : (U)_mm512_maskz_loadu_epi8(FirstLanes(n), from);
  }
  // Four words from each of kLanes rows, transposed.
  static PIKV_INLINE void TransposeWords(const uint8_t* const* rows, int at, U* words) {
    __m512i r[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      r[i] = _mm512_castsi128_si512(Load<__m128i>(rows[i] + at));
      r[i] = _mm512_inserti32x4(r[i], Load<__m128i>(rows[i + 4] + at), 1);
      r[i] = _mm512_inserti32x4(r[i], Load<__m128i>(rows[i + 8] + at), 2);
      r[i] = _mm512_inserti32x4(r[i], Load<__m128i>(rows[i + 12] + at), 3);
    }
    const __m512i low01 = _mm512_unpacklo_epi32(r[0], r[1]);
    const __m512i high01 = _mm512_unpackhi_epi32(r[0], r[1]);
    const __m512i low23 = _mm512_unpacklo_epi32(r[2], r[3]);
    const __m512i high23 = _mm512_unpackhi_epi32(r[2], r[3]);
    words[0] = (U)_mm512_unpacklo_epi64(low01, low23);
    words[1] = (U)_mm512_unpackhi_epi64(low01, low23);
    words[2] = (U)_mm512_unpacklo_epi64(high01, high23);
    words[3] = (U)_mm512_unpackhi_epi64(high01, high23);
  }
};

// A in signed, B in unsigned bytes, four k to a word: integer codes stay what they are. A row of A
// is fixed-point numbers relative to its largest, of 15 bits and sign for 16-bit queries and of 23
// and sign for float32, as two or three digits of base 256.
template <Element kElement>
struct ByteOperand {
  using Simd = Avx512Simd;
  using F = Simd::F;
  using I = Simd::I;
  using U = Simd::U;
  using Sum = I;
  using Code = Codec<kElement>;
  static constexpr int kLanes = Simd::kLanes;
  static constexpr int kGroup = 4;
  static constexpr int kGroupMultiple = 16;
  static constexpr int kTileBlocks = Simd::kTileBlocks;
  static constexpr float kUnit = 1.0f;
  static constexpr uint32_t kMask = ((1u << Code::kBits) - 1) * 0x01010101u;

  // Four successive channels of a word must be successive bytes of a row.
  static bool Supports(int head_dim) { return head_dim % (4 * Code::kPieces) == 0; }

  static int QueryDigits(Dtype dtype) { return dtype == Dtype::kFloat32 ? 3 : 2; }
  static int WeightDigits(Dtype dtype) { return QueryDigits(dtype); }

  // Per 64 bytes of a token row: its pieces, and of each the vectors that PackValues makes.
  static int NumPlaces(int head_dim) {
    return RoundUp(Code::RowBytes(head_dim), 64) * Code::kPieces;
  }
  static int Channel(int head_dim, int place) {
    const int block = place / kLanes, lane = place % kLanes;
    const int byte = block / (4 * Code::kPieces) * 64 + lane / 4 * 16 + block % 4 * 4 + lane % 4;
    const int piece = block / 4 % Code::kPieces;
    const int row_bytes = Code::RowBytes(head_dim);
    return byte < row_bytes ? piece * row_bytes + byte : -1;
  }

  static PIKV_INLINE U Piece(U words, int piece) {
    return Code::kPieces == 1 ? words : words >> (piece * Code::kBits) & kMask;
  }

  static void PackKeys(const TokenRows<Simd>& rows, int head_dim, int, uint32_t* b) {
    const int row_bytes = Code::RowBytes(head_dim);
    ForEachWordOfTokens<Simd>(rows, row_bytes, [&](int word, U words) {
#pragma GCC unroll 4
      for (int piece = 0; piece < Code::kPieces; ++piece) {
        Store(b + (piece * row_bytes / 4 + word) * kLanes, Piece(words, piece));
      }
    });
  }

  // Interleaves four tokens' rows byte by byte. What lies beyond the tokens meets zeros in A.
  static void PackValues(const uint8_t* values, int64_t stride, int num, int head_dim,
                         int num_groups, uint32_t* b) {
    const int row_bytes = Code::RowBytes(head_dim);
    for (int token = 0; token < num; token += 4) {
      const uint8_t* row[4];
      for (int i = 0; i < 4; ++i) row[i] = values + Min(token + i, num - 1) * stride;
      uint32_t* to = b + token / 4 * kLanes;
      for (int at = 0; at < row_bytes; at += 64) {
        __m512i r[4], pair[4], quad[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) r[i] = (__m512i)Simd::LoadBytes(row[i] + at, row_bytes - at);
        pair[0] = _mm512_unpacklo_epi8(r[0], r[1]);
        pair[1] = _mm512_unpackhi_epi8(r[0], r[1]);
        pair[2] = _mm512_unpacklo_epi8(r[2], r[3]);
        pair[3] = _mm512_unpackhi_epi8(r[2], r[3]);
        quad[0] = _mm512_unpacklo_epi16(pair[0], pair[2]);
        quad[1] = _mm512_unpackhi_epi16(pair[0], pair[2]);
        quad[2] = _mm512_unpacklo_epi16(pair[1], pair[3]);
        quad[3] = _mm512_unpackhi_epi16(pair[1], pair[3]);
#pragma GCC unroll 4
        for (int piece = 0; piece < Code::kPieces; ++piece) {
#pragma GCC unroll 4
          for (int i = 0; i < 4; ++i, to += num_groups * kLanes) {
            Store(to, Piece((U)quad[i], piece));
          }
        }
      }
    }
  }

  // 64 numbers in four vectors as bytes, of which the lowest is kept.
  static PIKV_INLINE __m512i LowBytes(const __m512i* x) {
    const __m512i mask = _mm512_set1_epi32(0xff);
    const auto words = [&](int i) {
      return _mm512_packus_epi32(_mm512_and_si512(x[i], mask), _mm512_and_si512(x[i + 1], mask));
    };
    // Packing goes lane by lane, so its 32-bit words end up transposed.
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return _mm512_permutexvar_epi32(order, _mm512_packus_epi16(words(0), words(2)));
  }

  static PIKV_INLINE float Split(const float* x, int n, float peak, int num_digits, uint32_t* a,
                                 int64_t a_stride) {
    const float limit = num_digits == 2 ? 127.0f * 256 : 127.0f * 256 * 256;
    const float inverse = peak > 0.0f ? limit / peak : 0.0f;
    // Packing goes lane by lane, so its 32-bit words end up transposed.
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    for (int i = 0; num_digits == 2 && i < n; i += 64) {  // in 16-bit words: half the instructions
      const auto words = [&](int at) {
        return _mm512_packs_epi32(_mm512_cvtps_epi32(Load<F>(x + i + at) * inverse),
                                  _mm512_cvtps_epi32(Load<F>(x + i + at + kLanes) * inverse));
      };
      const __m512i w[2] = {words(0), words(2 * kLanes)};
      const __m512i half = _mm512_set1_epi16(128), mask = _mm512_set1_epi16(0xff);
      const __m512i highs = _mm512_packs_epi16(_mm512_srai_epi16(_mm512_add_epi16(w[0], half), 8),
                                               _mm512_srai_epi16(_mm512_add_epi16(w[1], half), 8));
      const __m512i lows =
          _mm512_packus_epi16(_mm512_and_si512(w[0], mask), _mm512_and_si512(w[1], mask));
      Store(a + i / 4, _mm512_permutexvar_epi32(order, highs));
      Store(a + a_stride + i / 4, _mm512_permutexvar_epi32(order, lows));
    }
    for (int i = 0; num_digits > 2 && i < n; i += 64) {
      __m512i rest[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        rest[j] = _mm512_cvtps_epi32(Load<F>(x + i + j * kLanes) * inverse);
      }
      for (int digit = num_digits - 1; digit > 0; --digit) {
        Store(a + digit * a_stride + i / 4, LowBytes(rest));
        // Digits are signed: a negative one leaves more to the next.
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
          rest[j] = _mm512_srai_epi32(_mm512_add_epi32(rest[j], _mm512_set1_epi32(128)), 8);
        }
      }
      Store(a + i / 4, LowBytes(rest));
    }
    return peak / limit;
  }

  // The number whose digits stand in successive rows of C.
  static PIKV_INLINE F Combine(const float* c, int64_t c_stride, int num_digits) {
    const auto digit = [&](int i) { return __builtin_convertvector(Load<I>(c + i * c_stride), F); };
    const F value = digit(0) * 256.0f + digit(1);
    return num_digits == 2 ? value : value * 256.0f + digit(2);
  }
};

}  // namespace
}  // namespace pikv_ds
