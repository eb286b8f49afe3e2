// Attention for any machine: vectors of four floats as GCC and clang have them everywhere, which
// are SSE2 on x86-64 and NEON on aarch64.
#include "attention_float.h"

namespace pikv_ds {
namespace {

struct PlainSimd {
  static constexpr int kLanes = 4;
  static constexpr int kTileBlocks = 2;  // with 4 rows: 8 accumulators of 16 registers
  typedef float F __attribute__((vector_size(16)));
  typedef int32_t I __attribute__((vector_size(16)));
  typedef uint32_t U __attribute__((vector_size(16)));

  static PIKV_INLINE F Max(F a, F b) { return a > b ? a : b; }
  static PIKV_INLINE float ReduceAdd(F x) { return (x[0] + x[2]) + (x[1] + x[3]); }
  static PIKV_INLINE float ReduceMax(F x) {
    const float a = x[0] > x[2] ? x[0] : x[2];
    const float b = x[1] > x[3] ? x[1] : x[3];
    return a > b ? a : b;
  }
  // Lanes from n on become `other`.
  static PIKV_INLINE F Keep(F x, int n, float other) {
    const I lane = {0, 1, 2, 3};
    return lane < n ? x : F{} + other;
  }
  // float16 in the low half of each word. The product makes subnormals right, too.
  static PIKV_INLINE F HalfToFloat(U half) {
    const U magnitude = (half & 0x7fffu) << 13;
    const F finite = (F)magnitude * 0x1p112f;
    const U special = magnitude + (112u << 24);  // infinity and NaN keep the largest exponent
    const U bits = (half & 0x7c00u) == 0x7c00u ? special : (U)finite;
    return (F)(bits | (half & 0x8000u) << 16);
  }
  static PIKV_INLINE F LoadHalves(const uint16_t* from, int n) {
    U half{};
    for (int i = 0; i < kLanes && i < n; ++i) half[i] = from[i];
    return HalfToFloat(half);
  }
  // The first n bytes, then zeros.
  static PIKV_INLINE U LoadBytes(const uint8_t* from, int n) {
    if (n >= 16) return Load<U>(from);
    U words{};
    std::memcpy(&words, from, n);
    return words;
  }
  // Four words from each of kLanes rows, transposed.
  static PIKV_INLINE void TransposeWords(const uint8_t* const* rows, int at, U* words) {
    const U r0 = Load<U>(rows[0] + at), r1 = Load<U>(rows[1] + at);
    const U r2 = Load<U>(rows[2] + at), r3 = Load<U>(rows[3] + at);
    words[0] = U{r0[0], r1[0], r2[0], r3[0]};
    words[1] = U{r0[1], r1[1], r2[1], r3[1]};
    words[2] = U{r0[2], r1[2], r2[2], r3[2]};
    words[3] = U{r0[3], r1[3], r2[3], r3[3]};
  }
};

}  // namespace

const AttentionKernel& PlainAttention(Element element, int) {
  return FloatKernelOf<PlainSimd>(element);
}

}  // namespace pikv_ds
