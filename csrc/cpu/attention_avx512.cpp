// Attention with AVX-512 and its dot products of bytes (VNNI).
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
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma,f16c")
#include "attention_avx512.h"
#include "attention_float.h"
#include "attention_multiply.h"

namespace pikv_ds {
namespace {

template <Element kElement>
struct VnniOperand : ByteOperand<kElement> {
  using Base = ByteOperand<kElement>;
  using typename Base::I;
  using typename Base::U;

  static void Begin(int) {}
  static void End() {}

  static PIKV_INLINE I MulAdd(uint32_t a, U b, I sum) {
    return (I)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)b, _mm512_set1_epi32(a));
  }
  static void Multiply(const uint32_t* a, int64_t a_stride, int num_rows, const uint32_t* b,
                       int num_groups, int num_blocks, float* c, int64_t c_stride) {
    MultiplyWithVectors<VnniOperand>(a, a_stride, num_rows, b, num_groups, num_blocks, c, c_stride);
  }
};

}  // namespace

const AttentionKernel& Avx512Attention(Element element, int head_dim) {
  if (element == Element::kInt8 && VnniOperand<Element::kInt8>::Supports(head_dim)) {
    return KernelOf<VnniOperand<Element::kInt8>>();
  }
  if (element == Element::kInt4 && VnniOperand<Element::kInt4>::Supports(head_dim)) {
    return KernelOf<VnniOperand<Element::kInt4>>();
  }
  if (element == Element::kInt2 && VnniOperand<Element::kInt2>::Supports(head_dim)) {
    return KernelOf<VnniOperand<Element::kInt2>>();
  }
  return FloatKernelOf<Avx512Simd>(element);
}

}  // namespace pikv_ds
#pragma GCC pop_options
#endif
