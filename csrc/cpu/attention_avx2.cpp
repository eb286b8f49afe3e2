// Attention with AVX2, FMA and F16C.
#include "isa.h"

#if defined(PIKV_X86_KERNELS)
#include <immintrin.h>

#include <cstring>
#include <type_traits>
#include <utility>

#include "attention.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#include "attention_float.h"

namespace pikv_ds {
namespace {

struct Avx2Simd {
  static constexpr int kLanes = 8;
  static constexpr int kTileBlocks = 2;  // with 4 rows: 8 accumulators of 16 registers
  typedef float F __attribute__((vector_size(32)));
  typedef int32_t I __attribute__((vector_size(32)));
  typedef uint32_t U __attribute__((vector_size(32)));

  static PIKV_INLINE F Max(F a, F b) { return _mm256_max_ps(a, b); }
  static PIKV_INLINE float ReduceAdd(F x) {
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
  }
  static PIKV_INLINE float ReduceMax(F x) {
    __m128 max = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    max = _mm_max_ps(max, _mm_movehl_ps(max, max));
    return _mm_cvtss_f32(_mm_max_ss(max, _mm_movehdup_ps(max)));
  }
  // Lanes from n on become `other`.
  static PIKV_INLINE F Keep(F x, int n, float other) {
    const I lane = {0, 1, 2, 3, 4, 5, 6, 7};
    return lane < n ? x : F{} + other;
  }
  // float16 in the low half of each word.
  static PIKV_INLINE F HalfToFloat(U half) {
    const __m256i packed = _mm256_packus_epi32((__m256i)half, (__m256i)half);
    const __m256i halves = _mm256_permute4x64_epi64(packed, 0x08);
    return _mm256_cvtph_ps(_mm256_castsi256_si128(halves));
  }
  static PIKV_INLINE F LoadHalves(const uint16_t* from, int n) {
    if (n >= kLanes) return _mm256_cvtph_ps(Load<__m128i>(from));
    __m128i halves{};
    std::memcpy(&halves, from, n * sizeof(uint16_t));
    return _mm256_cvtph_ps(halves);
  }
  // The first n bytes, then zeros.
  static PIKV_INLINE U LoadBytes(const uint8_t* from, int n) {
    if (n >= 32) return Load<U>(from);
    U words{};
    std::memcpy(&words, from, n);
    return words;
  }
  // Four words from each of kLanes rows, transposed.
  static PIKV_INLINE void TransposeWords(const uint8_t* const* rows, int at, U* words) {
    __m256i r[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      r[i] = _mm256_castsi128_si256(Load<__m128i>(rows[i] + at));
      r[i] = _mm256_inserti128_si256(r[i], Load<__m128i>(rows[i + 4] + at), 1);
    }
    const __m256i low01 = _mm256_unpacklo_epi32(r[0], r[1]);
    const __m256i high01 = _mm256_unpackhi_epi32(r[0], r[1]);
    const __m256i low23 = _mm256_unpacklo_epi32(r[2], r[3]);
    const __m256i high23 = _mm256_unpackhi_epi32(r[2], r[3]);
    words[0] = (U)_mm256_unpacklo_epi64(low01, low23);
    words[1] = (U)_mm256_unpackhi_epi64(low01, low23);
    words[2] = (U)_mm256_unpacklo_epi64(high01, high23);
    words[3] = (U)_mm256_unpackhi_epi64(high01, high23);
  }
};

}  // namespace

const AttentionKernel& Avx2Attention(Element element, int) {
  return FloatKernelOf<Avx2Simd>(element);
}

}  // namespace pikv_ds
#pragma GCC pop_options
#endif
