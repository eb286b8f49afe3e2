// Attention with AMX: tiles of 16 x 16 sums, of bytes for integer codes and of bfloat16 for
// bfloat16 and fp8.
#include "isa.h"

#if defined(PIKV_X86_KERNELS)
#include <immintrin.h>

#include <cstring>
#include <type_traits>
#include <utility>

#include "attention.h"

// GCC 12 takes the undefined vectors inside its own intrinsics for mistakes (its bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC push_options
#pragma GCC target( \
    "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,fma,f16c,amx-tile,amx-int8,amx-bf16")
#include "attention_avx512.h"
#include "attention_kernel.h"

namespace pikv_ds {
namespace {

constexpr int kTileRows = 16;
constexpr int kTileWords = 16;  // of a row: a tile's row has 64 bytes

// Tiles 0-3 are of C, 4 of A, 5-7 of B. A and C have as many rows as a task needs, up to 16.
void ConfigureTiles(int num_rows) {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } config;
  for (int tile = 0; tile < 8; ++tile) {
    config.row_bytes[tile] = 4 * kTileWords;
    config.rows[tile] = tile < 5 ? Min(num_rows, kTileRows) : kTileRows;
  }
  // GCC's intrinsics for tiles don't say what memory they read; this does.
  __asm__ volatile("" ::"r"(&config) : "memory");
  _tile_loadconfig(&config);
}

// Which instruction multiplies tiles.
struct ByteTiles {
  static PIKV_INLINE void Dot0() { _tile_dpbsud(0, 4, 5); }
  static PIKV_INLINE void Dot1() { _tile_dpbsud(1, 4, 6); }
  static PIKV_INLINE void Dot2() { _tile_dpbsud(2, 4, 7); }
  static PIKV_INLINE void Dot3() { _tile_dpbsud(3, 4, 5); }
};
struct Bfloat16Tiles {
  static PIKV_INLINE void Dot0() { _tile_dpbf16ps(0, 4, 5); }
  static PIKV_INLINE void Dot1() { _tile_dpbf16ps(1, 4, 6); }
  static PIKV_INLINE void Dot2() { _tile_dpbf16ps(2, 4, 7); }
  static PIKV_INLINE void Dot3() { _tile_dpbf16ps(3, 4, 5); }
};

// Sums of kTileRows rows and up to four blocks of places. Tile numbers are part of instructions.
template <class Tiles, int kBlocks>
PIKV_INLINE void MultiplyTiles(const uint32_t* a, int64_t a_stride, const uint32_t* b,
                               int num_groups, float* c, int64_t c_stride) {
  const int64_t a_bytes = 4 * a_stride, c_bytes = 4 * c_stride, b_bytes = 4 * kTileWords;
  const int64_t block = int64_t{num_groups} * kTileWords;
  _tile_zero(0);
  if (kBlocks > 1) _tile_zero(1);
  if (kBlocks > 2) _tile_zero(2);
  if (kBlocks > 3) _tile_zero(3);
  for (int k = 0; k < num_groups; k += kTileWords) {
    const uint32_t* from = b + k * kTileWords;
    _tile_loadd(4, a + k, a_bytes);
    _tile_loadd(5, from, b_bytes);
    Tiles::Dot0();
    if (kBlocks > 1) {
      _tile_loadd(6, from + block, b_bytes);
      Tiles::Dot1();
    }
    if (kBlocks > 2) {
      _tile_loadd(7, from + 2 * block, b_bytes);
      Tiles::Dot2();
    }
    if (kBlocks > 3) {
      _tile_loadd(5, from + 3 * block, b_bytes);
      Tiles::Dot3();
    }
  }
  _tile_stored(0, c, c_bytes);
  if (kBlocks > 1) _tile_stored(1, c + 16, c_bytes);
  if (kBlocks > 2) _tile_stored(2, c + 32, c_bytes);
  if (kBlocks > 3) _tile_stored(3, c + 48, c_bytes);
}

template <class Tiles>
void MultiplyWithTiles(const uint32_t* a, int64_t a_stride, int num_rows, const uint32_t* b,
                       int num_groups, int num_blocks, float* c, int64_t c_stride) {
  __asm__ volatile("" ::: "memory");  // A and B are written by now; see ConfigureTiles
  for (int r = 0; r < num_rows; r += kTileRows) {
    const uint32_t* from = a + r * a_stride;
    float* to = c + r * c_stride;
    int n = 0;
    const auto multiply = [&](auto blocks) {
      constexpr int kBlocks = decltype(blocks)::value;
      MultiplyTiles<Tiles, kBlocks>(from, a_stride, b + int64_t{n} * num_groups * kTileWords,
                                    num_groups, to + n * kTileWords, c_stride);
      n += kBlocks;
    };
    while (n + 4 <= num_blocks) multiply(Constant<4>{});
    if (n + 2 <= num_blocks) multiply(Constant<2>{});
    if (n < num_blocks) multiply(Constant<1>{});
  }
}

template <Element kElement>
struct ByteTileOperand : ByteOperand<kElement> {
  static void Begin(int num_rows) { ConfigureTiles(num_rows); }
  static void End() { _tile_release(); }
  static constexpr auto& Multiply = MultiplyWithTiles<ByteTiles>;
};

// A and B in bfloat16, two k to a word. A row of A is the sum of its digits, each the rounding of
// what the ones before it left: 8 bits per digit.
template <Element kElement>
struct Bfloat16Operand {
  using Simd = Avx512Simd;
  using F = Simd::F;
  using U = Simd::U;
  using Code = Codec<kElement>;
  static constexpr int kLanes = Simd::kLanes;
  static constexpr int kGroup = 2;
  static constexpr int kGroupMultiple = 16;
  static constexpr float kUnit = 1.0f;
  // Bytes of a row that become 32 channels.
  static constexpr int kStep = 32 * Code::kBits / 8;
  static_assert(kElement == Element::kBFloat16 || kElement == Element::kFp8, "no other");

  // A query of bfloat16 is exact in one digit, unless scales go into it.
  static int QueryDigits(Dtype dtype) {
    return dtype == Dtype::kFloat32 ? 3 : dtype == Dtype::kBFloat16 && !Code::kScales ? 1 : 2;
  }
  static int WeightDigits(Dtype dtype) { return dtype == Dtype::kFloat32 ? 3 : 2; }
  static void Begin(int num_rows) { ConfigureTiles(num_rows); }
  static void End() { _tile_release(); }

  static int NumPlaces(int head_dim) { return RoundUp(head_dim, 32); }
  static int Channel(int head_dim, int place) {
    const int block = place / kLanes, lane = place % kLanes;
    const int channel = block / 2 * 32 + lane / 4 * 8 + block % 2 * 4 + lane % 4;
    return channel < head_dim ? channel : -1;
  }

  // fp8 in the low byte of each 16-bit lane as bfloat16, exactly. The exponent's bias is added,
  // but for subnormals, which are looked up.
  static PIKV_INLINE __m512i Fp8ToBfloat16(__m512i bytes) {
    const __m512i magnitude =
        _mm512_slli_epi16(_mm512_and_si512(bytes, _mm512_set1_epi16(0x7f)), 4);
    const __m512i subnormals = _mm512_setr_epi32(0x3b000000, 0x3bc03b80, 0x3c203c00, 0x3c603c40, 0,
                                                 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
    const __mmask32 subnormal = _mm512_cmplt_epu16_mask(magnitude, _mm512_set1_epi16(0x80));
    __m512i result = _mm512_add_epi16(magnitude, _mm512_set1_epi16(120 << 7));
    result = _mm512_mask_permutexvar_epi16(result, subnormal, bytes, subnormals);
    return _mm512_or_si512(result, _mm512_and_si512(_mm512_slli_epi16(bytes, 8),
                                                    _mm512_set1_epi16(static_cast<short>(0x8000))));
  }

  static void PackKeys(const TokenRows<Simd>& rows, int head_dim, int num_groups, uint32_t* b) {
    const int groups = (head_dim + 1) / 2;
    ForEachWordOfTokens<Simd>(rows, Code::RowBytes(head_dim), [&](int word, U words) {
      if constexpr (kElement == Element::kBFloat16) {
        Store(b + word * kLanes, words);
      } else {
        uint32_t* to = b + 2 * word * kLanes;
        const U low = (words & 0xffu) | (words << 8 & 0xff0000u);
        const U high = (words >> 16 & 0xffu) | (words >> 8 & 0xff0000u);
        Store(to, Fp8ToBfloat16((__m512i)low));
        if (2 * word + 1 < groups) Store(to + kLanes, Fp8ToBfloat16((__m512i)high));
      }
    });
    // Zeros in A don't help against a NaN in B.
    std::memset(b + groups * kLanes, 0, (num_groups - groups) * kLanes * sizeof(uint32_t));
  }

  // 32 channels from a byte of a row on; zeros beyond its end.
  static PIKV_INLINE __m512i LoadChannels(const uint8_t* row, int at, int row_bytes) {
    if constexpr (kElement == Element::kBFloat16) {
      return (__m512i)Simd::LoadBytes(row + at, row_bytes - at);
    } else {
      const __mmask32 there = Simd::FirstLanes(row_bytes - at);
      return Fp8ToBfloat16(_mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(there, row + at)));
    }
  }

  // Interleaves two tokens' rows, and zeros beyond the tokens.
  static void PackValues(const uint8_t* values, int64_t stride, int num, int head_dim,
                         int num_groups, uint32_t* b) {
    const int row_bytes = Code::RowBytes(head_dim);
    for (int token = 0; token < 16; token += 2) {
      const uint8_t* row = values + token * stride;
      uint32_t* to = b + token / 2 * kLanes;
      for (int at = 0; at < row_bytes; at += kStep, to += 2 * num_groups * kLanes) {
        __m512i even{}, odd{};
        if (token < num) even = LoadChannels(row, at, row_bytes);
        if (token + 1 < num) odd = LoadChannels(row + stride, at, row_bytes);
        Store(to, _mm512_unpacklo_epi16(even, odd));
        Store(to + num_groups * kLanes, _mm512_unpackhi_epi16(even, odd));
      }
    }
  }

  static float Split(const float* x, int n, float, int num_digits, uint32_t* a, int64_t a_stride) {
    for (int i = 0; i < n; i += kLanes) {
      F rest = Load<F>(x + i);
      for (int digit = 0; digit < num_digits; ++digit) {
        const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(rest);
        Store(a + digit * a_stride + i / 2, rounded);
        rest = rest - (F)_mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded), 16);
      }
    }
    return 1.0f;
  }
  static PIKV_INLINE F Combine(const float* c, int64_t c_stride, int num_digits) {
    F value = Load<F>(c);
    if (num_digits > 1) value = value + Load<F>(c + c_stride);
    if (num_digits > 2) value = value + Load<F>(c + 2 * c_stride);
    return value;
  }

  static constexpr auto& Multiply = MultiplyWithTiles<Bfloat16Tiles>;
};

}  // namespace

const AttentionKernel& AmxAttention(Element element, int head_dim) {
  switch (element) {
    case Element::kBFloat16:
      return KernelOf<Bfloat16Operand<Element::kBFloat16>>();
    case Element::kFp8:
      return KernelOf<Bfloat16Operand<Element::kFp8>>();
    case Element::kInt8:
      if (!ByteTileOperand<Element::kInt8>::Supports(head_dim)) break;
      return KernelOf<ByteTileOperand<Element::kInt8>>();
    case Element::kInt4:
      if (!ByteTileOperand<Element::kInt4>::Supports(head_dim)) break;
      return KernelOf<ByteTileOperand<Element::kInt4>>();
    case Element::kInt2:
      if (!ByteTileOperand<Element::kInt2>::Supports(head_dim)) break;
      return KernelOf<ByteTileOperand<Element::kInt2>>();
    default:
      break;
  }
  return Avx512Attention(element, head_dim);
}

}  // namespace pikv_ds
#pragma GCC pop_options
#endif
