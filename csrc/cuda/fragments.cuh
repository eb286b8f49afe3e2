// Which channel and token a lane holds where: the arithmetic between a page's bytes and the
// fragments of mma.m16n8k16 (device.cuh). Everything is constexpr; tests/cuda_emulator/banks.cpp
// checks it while compiling.
//
// Scores are computed transposed, S^T[token, query] = K[token, channel] Q^T[channel, query], and so
// is the output, O^T[channel, query] = V^T[channel, token] P^T[token, query]. So the decoded
// elements are always the 16 x 16 operand, and queries, of which there are few, come 8 at a time:
// an instruction decodes no element twice and wastes little on queries that are not there. In both
// products a lane then owns the same two queries (columns 2c and 2c + 1), so the softmax needs no
// exchange but a reduction over tokens.
//
// An mma sums over k in any order, so channels may stand in any order in S^T's k, and in O^T's
// rows. That freedom lets each lane load contiguous bytes and unpack them without any exchange:
//
//   keys    A lane loads words of 4 bytes of its two tokens. The m-th code of the four bytes makes
//           a k-step; (b0, b2) and (b1, b3) are the pairs, because masking a word leaves those in
//           the two halves of a register.
//   values  A lane loads units of 2 bytes of its four tokens. Two tokens' units are put into one
//           word, t0 | t1 << 16, whose masked halves are a pair of tokens of one channel. The m-th
//           codes of both bytes make the two rows of an m-tile.
#pragma once

#include "common.cuh"

namespace pikv_ds {

// Tensor cores take rows of keys and values that are whole 16-byte vectors.
PIKV_HOST_DEVICE constexpr bool TensorLayoutSupported(Element element, int head_dim) {
  const bool known = head_dim == 64 || head_dim == 80 || head_dim == 96 || head_dim == 128 ||
                     head_dim == 192 || head_dim == 256;
  return known && element != Element::kFloat32 && head_dim * ElementBits(element) / 8 % 16 == 0;
}

PIKV_HOST_DEVICE constexpr int LargestPowerOfTwoDividing(int x, int limit) {
  int power = 1;
  while (power < limit && x % (2 * power) == 0) power *= 2;
  return power;
}

template <Element kElement, int kHeadDim>
struct Fragments {
  static constexpr int kBits = ElementBits(kElement);
  static constexpr bool kCoded = kBits <= 8;
  static constexpr int kCodes = kCoded ? 8 / kBits : 1;  // per byte
  static constexpr int kRowBytes = kHeadDim * kBits / 8;
  static constexpr int kSteps = kHeadDim / 16;  // k-steps of S^T, m-tiles of O^T

  // ---- coded elements: fp8 and the integers ----

  // Contiguous bytes of a row that belong to a lane. Keys: four lanes c share a row; 32 bytes are
  // two loads of 16. Values: eight lanes g share a row.
  static constexpr int kKeyRun = LargestPowerOfTwoDividing(kRowBytes / 4, 32);
  static constexpr int kValueRun = LargestPowerOfTwoDividing(kRowBytes / 8, 16);
  static constexpr int kKeyWords = kRowBytes / 16;    // words per lane and token
  static constexpr int kValueUnits = kRowBytes / 16;  // units per lane and token

  // Byte of the row at which a lane's word (unit) begins.
  PIKV_HOST_DEVICE static constexpr int KeyByte(int word, int c) {
    return word * 4 / kKeyRun * (4 * kKeyRun) + c * kKeyRun + word * 4 % kKeyRun;
  }
  PIKV_HOST_DEVICE static constexpr int ValueByte(int unit, int g) {
    return unit * 2 / kValueRun * (8 * kValueRun) + g * kValueRun + unit * 2 % kValueRun;
  }

  // ---- all elements ----

  // Channel of k-step `step` of S^T that lane c holds as its i-th of four (k = 2c, 2c + 1, 2c + 8,
  // 2c + 9).
  PIKV_HOST_DEVICE static constexpr int KeyChannel(int step, int c, int i) {
    if (!kCoded) return step * 16 + 2 * c + i % 2 + 8 * (i / 2);
    const int byte = i % 2 * 2 + i / 2;  // 0, 2, 1, 3
    return KeyByte(step / kCodes, c) + byte + step % kCodes * kRowBytes;
  }
  // Channel of m-tile `tile` of O^T that lanes g hold as row g (upper = 0) or g + 8 (upper = 1).
  PIKV_HOST_DEVICE static constexpr int ValueChannel(int tile, int g, int upper) {
    if (!kCoded) return tile * 16 + g + 8 * upper;
    return ValueByte(tile / kCodes, g) + upper + tile % kCodes * kRowBytes;
  }

  // Bytes between rows in shared memory, chosen so that a warp's loads hit each bank once. ldmatrix
  // and the values' loads want an odd multiple of 16; the keys' loads are contiguous already unless
  // a lane's run is 32 bytes. tests/cuda_emulator/banks.cpp counts the conflicts.
  static constexpr int kKeyPitch = kRowBytes + (!kCoded || kKeyRun == 32 ? 16 : 0);
  static constexpr int kValuePitch = kRowBytes + (kRowBytes % 32 == 0 ? 16 : 0);
};

// Code `code` of byte 0 and 2 (byte = 0) or 1 and 3 (byte = 1) of a word, as two float16: the code
// itself for integers, the value / 256 for fp8 (whose exponent is biased by 7, float16's by 15).
//
// Integers: 0x6400 is 1024, whose last mantissa bit is worth 1, so putting a code there makes 1024
// + code. Codes higher in the byte need no shift: they make 1024 + 2^k code, and an FMA scales
// that. Both are exact.
template <Element kElement, int kByte, int kCode>
__device__ __forceinline__ uint32_t DecodePair(uint32_t word) {
  constexpr uint32_t k1024 = 0x64006400;
  constexpr uint32_t kMinus1024 = 0xe400e400;
  if constexpr (kElement == Element::kFp8) {
    // seee emmm -> s0ee eemm m000 0000
    const uint32_t sign = kByte == 0 ? word << 8 : word;
    const uint32_t magnitude = kByte == 0 ? word << 7 : word >> 1;
    return (sign & 0x80008000) | (magnitude & 0x3f803f80);
  } else if constexpr (kElement == Element::kInt8) {
    return AddHalf2(BytePermute(word, k1024, kByte == 0 ? 0x7250 : 0x7351), kMinus1024);
  } else {
    constexpr int kBits = ElementBits(kElement), kShift = kBits * kCode;
    constexpr uint32_t kMask = ((1u << kBits) - 1) * 0x00010001u << kShift;
    const uint32_t biased = MaskOr<kMask, k1024>(kByte == 0 ? word : word >> 8);
    if constexpr (kCode == 0) {
      return AddHalf2(biased, kMinus1024);
    } else {
      // 2^-kShift and -1024 * 2^-kShift: float16 exponents 15 - kShift and 25 - kShift.
      constexpr uint32_t kFactor = static_cast<uint32_t>(15 - kShift) << 10;
      constexpr uint32_t kOffset = static_cast<uint32_t>(25 - kShift) << 10 | 0x8000;
      return FmaHalf2(biased, kFactor * 0x00010001u, kOffset * 0x00010001u);
    }
  }
}

// Calls visit(constant) for each code of a byte, as an integral constant.
template <int kCode>
struct CodeConstant {
  static constexpr int value = kCode;
};
template <int kCodes, int kCode = 0, typename Visit>
__device__ __forceinline__ void ForEachCode(const Visit& visit) {
  visit(CodeConstant<kCode>{});
  if constexpr (kCode + 1 < kCodes) ForEachCode<kCodes, kCode + 1>(visit);
}

// What DecodePair's result must be multiplied by.
template <Element kElement>
constexpr float kDecodeFactor = kElement == Element::kFp8 ? 256.0f : 1.0f;

// S^T or O^T += elements times queries or weights, in the elements' type.
template <Element kElement>
__device__ __forceinline__ void Mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (kElement == Element::kBFloat16) {
    MmaBFloat16(c, a, b);
  } else {
    MmaHalf(c, a, b);
  }
}
template <Element kElement>
__device__ __forceinline__ uint32_t Pack(float low, float high) {
  return kElement == Element::kBFloat16 ? PackBFloat162(low, high) : PackHalf2(low, high);
}

}  // namespace pikv_ds
