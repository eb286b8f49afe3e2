// What several kernels share, in plain C++ on top of device.cuh.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "../launch.h"

#if defined(PIKV_EMULATOR)
#include "emulator.h"  // tests/cuda_emulator: device.cuh's names in plain C++
#else
#include "device.cuh"
#endif

namespace pikv_ds {

constexpr int kWarpSize = 32;
constexpr float kLog2e = 1.44269504088896340736f;
constexpr float kLn2 = 0.69314718055994530942f;

PIKV_HOST_DEVICE constexpr int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

PIKV_HOST_DEVICE constexpr int DtypeBytes(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

__device__ __forceinline__ float NegativeInfinity() { return BitsFloat(0xff800000u); }

// ---- several bytes at a time ----

struct alignas(16) Vector16 {
  uint32_t words[4];
};

__device__ __forceinline__ bool Aligned16(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

// kBytes (2, 4, 8 or 16) from an aligned address, in words.
template <int kBytes>
__device__ __forceinline__ void LoadWords(const uint8_t* from, uint32_t* out) {
  if constexpr (kBytes == 16) {
    const Vector16 x = *reinterpret_cast<const Vector16*>(from);
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i] = x.words[i];
  } else if constexpr (kBytes == 8) {
    const uint64_t x = *reinterpret_cast<const uint64_t*>(from);
    out[0] = static_cast<uint32_t>(x);
    out[1] = static_cast<uint32_t>(x >> 32);
  } else if constexpr (kBytes == 4) {
    out[0] = *reinterpret_cast<const uint32_t*>(from);
  } else {
    out[0] = *reinterpret_cast<const uint16_t*>(from);
  }
}

// ---- elements of the caller's tensors, as float ----

template <Dtype kDtype>
struct Stored {
  using Type = uint16_t;
};
template <>
struct Stored<Dtype::kFloat32> {
  using Type = float;
};

template <Dtype kDtype>
__device__ __forceinline__ float ToFloat(typename Stored<kDtype>::Type x) {
  if constexpr (kDtype == Dtype::kFloat32) {
    return x;
  } else if constexpr (kDtype == Dtype::kBFloat16) {
    return BFloat16ToFloat(x);
  } else {
    return HalfToFloat(x);
  }
}

// For prologues, where a switch per element costs nothing.
__device__ __forceinline__ float LoadFloat(const void* base, int64_t index, Dtype dtype) {
  if (dtype == Dtype::kFloat32) return static_cast<const float*>(base)[index];
  const uint16_t bits = static_cast<const uint16_t*>(base)[index];
  return dtype == Dtype::kBFloat16 ? BFloat16ToFloat(bits) : HalfToFloat(bits);
}

// ---- fp8: e4m3, in bits because sm_80 has no instructions for it ----

// seee emmm as float16 is s0ee eemm m000 0000, whose exponent is biased by 8 more: 1/256 of it.
__device__ __forceinline__ float E4M3ToFloat(uint8_t bits) {
  return HalfToFloat(static_cast<uint16_t>((bits & 0x80) << 8 | (bits & 0x7f) << 7)) * 256.0f;
}

// Rounds to nearest even and saturates at 448, the largest. x is finite.
__device__ __forceinline__ uint8_t FloatToE4M3(float x) {
  const uint32_t sign = FloatBits(x) >> 24 & 0x80;
  const float magnitude = fminf(fabsf(x), 448.0f);
  // Below 2^-6 codes are multiples of 2^-9; the eighth is 2^-6 itself.
  if (magnitude < 0.015625f) return sign | static_cast<uint32_t>(rintf(magnitude * 512.0f));
  // Round to 3 bits of mantissa (carrying into the exponent), then rebias it from 127 to 7.
  const uint32_t bits = FloatBits(magnitude);
  const uint32_t rounded = (bits + 0x7ffff + (bits >> 20 & 1)) >> 20;
  return sign | (rounded - ((127 - 7) << 3));
}

// ---- reductions; every lane gets the result ----

__device__ __forceinline__ float WarpSum(float x) {
#pragma unroll
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) x += ShuffleXor(x, mask);
  return x;
}

__device__ __forceinline__ float WarpMax(float x) {
#pragma unroll
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) x = fmaxf(x, ShuffleXor(x, mask));
  return x;
}

__device__ __forceinline__ float WarpMin(float x) {
#pragma unroll
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) x = fminf(x, ShuffleXor(x, mask));
  return x;
}

// An unsigned integer that orders as x does, without NaN; both zeros give the same.
__device__ __forceinline__ uint32_t OrderedBits(float x) {
  const uint32_t bits = FloatBits(x == 0.0f ? 0.0f : x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Calls visit(constant) with the integral constant of a dtype.
template <Dtype kDtype>
struct DtypeConstant {
  static constexpr Dtype value = kDtype;
};
template <typename Visit>
void WithDtype(Dtype dtype, const Visit& visit) {
  switch (dtype) {
    case Dtype::kFloat32:
      return visit(DtypeConstant<Dtype::kFloat32>{});
    case Dtype::kBFloat16:
      return visit(DtypeConstant<Dtype::kBFloat16>{});
    case Dtype::kFloat16:
      return visit(DtypeConstant<Dtype::kFloat16>{});
  }
}

}  // namespace pikv_ds
