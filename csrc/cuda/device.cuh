// What the kernels ask of the GPU beyond plain C++: conversions between bit patterns and floats,
// asynchronous copies, tensor-core instructions, and kernel launches.
//
// Everything with an intrinsic or inline PTX is here, on raw bits, for two reasons: torch's build
// defines __CUDA_NO_HALF_CONVERSIONS__ and the like, so the half types are awkward outside; and
// tests/cuda_emulator/emulator.h has the same names in plain C++, which runs the kernels where no
// GPU is.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace pikv_ds {

// ---- conversions, round to nearest even ----

__device__ __forceinline__ float HalfToFloat(uint16_t bits) {
  return __half2float(__ushort_as_half(bits));
}
__device__ __forceinline__ uint16_t FloatToHalf(float x) {
  return __half_as_ushort(__float2half_rn(x));
}
__device__ __forceinline__ float BFloat16ToFloat(uint16_t bits) {
  return __uint_as_float(uint32_t{bits} << 16);
}
__device__ __forceinline__ uint16_t FloatToBFloat16(float x) {
  return __bfloat16_as_ushort(__float2bfloat16_rn(x));
}

// ---- pairs of float16 or bfloat16 in a register, `low` in the low half ----

__device__ __forceinline__ uint32_t PackHalf2(float low, float high) {
  uint32_t out;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
}
__device__ __forceinline__ uint32_t PackBFloat162(float low, float high) {
  uint32_t out;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
}
__device__ __forceinline__ uint32_t AddHalf2(uint32_t a, uint32_t b) {
  uint32_t out;
  asm("add.rn.f16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
  return out;
}
__device__ __forceinline__ uint32_t MulHalf2(uint32_t a, uint32_t b) {
  uint32_t out;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
  return out;
}
__device__ __forceinline__ uint32_t MaxHalf2(uint32_t a, uint32_t b) {
  uint32_t out;
  asm("max.f16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
  return out;
}
__device__ __forceinline__ uint32_t FmaHalf2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t out;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(c));
  return out;
}

// ---- bits and arithmetic ----

// Byte i of the result is byte `selector >> 4i & 7` of {high, low}.
__device__ __forceinline__ uint32_t BytePermute(uint32_t low, uint32_t high, uint32_t selector) {
  return __byte_perm(low, high, selector);
}
// (x & kMask) | kBits in one instruction; written out, the compiler makes two of it, since only one
// of two constants can be an immediate.
template <uint32_t kMask, uint32_t kBits>
__device__ __forceinline__ uint32_t MaskOr(uint32_t x) {
  uint32_t out;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(out) : "r"(x), "n"(kMask), "n"(kBits));
  return out;
}
__device__ __forceinline__ uint32_t FloatBits(float x) { return __float_as_uint(x); }
__device__ __forceinline__ float BitsFloat(uint32_t x) { return __uint_as_float(x); }
// 2^x to about 2 units in the last place; 2^-inf = 0.
__device__ __forceinline__ float Exp2(float x) {
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}
// IEEE results whatever the compiler's flags: neither approximated nor contracted into an FMA.
__device__ __forceinline__ float Add(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ float Subtract(float a, float b) { return __fsub_rn(a, b); }
__device__ __forceinline__ float Multiply(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ float Divide(float a, float b) { return __fdiv_rn(a, b); }

// ---- warps ----

constexpr uint32_t kAllLanes = 0xffffffff;

template <typename T>
__device__ __forceinline__ T Shuffle(T x, int lane) {
  return __shfl_sync(kAllLanes, x, lane);
}
template <typename T>
__device__ __forceinline__ T ShuffleXor(T x, int lane_mask) {
  return __shfl_xor_sync(kAllLanes, x, lane_mask);
}
__device__ __forceinline__ uint32_t Ballot(bool x) { return __ballot_sync(kAllLanes, x); }
__device__ __forceinline__ bool AnyLane(bool x) { return __any_sync(kAllLanes, x); }
__device__ __forceinline__ int FirstBit(uint32_t mask) { return __ffs(static_cast<int>(mask)) - 1; }
__device__ __forceinline__ int CountBits(uint32_t mask) { return __popc(mask); }

// ---- shared memory ----

// The launch's dynamic shared memory, 16-byte aligned.
__device__ __forceinline__ uint8_t* DynamicShared() {
  extern __shared__ __align__(16) uint8_t dynamic_shared[];
  return dynamic_shared;
}
__device__ __forceinline__ uint32_t SharedAddress(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Copies 16 bytes to shared memory past the registers; there once CopyAsyncWait has returned.
__device__ __forceinline__ void CopyAsync16(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(SharedAddress(shared)),
               "l"(__cvta_generic_to_global(global))
               : "memory");
}
__device__ __forceinline__ void CopyAsyncCommit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits for all of this thread's committed groups but the latest kPending.
template <int kPending>
__device__ __forceinline__ void CopyAsyncWait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- tensor cores; g = lane / 4 and c = lane % 4 below ----

// Four 8 x 8 matrices of 16-bit elements. Lane 8 i + r gives the address of row r of matrix i, and
// receives elements (g, 2c) and (g, 2c + 1) of matrix i in out[i].
__device__ __forceinline__ void LoadMatrices(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(SharedAddress(row))
               : "memory");
}
// The same of the transposes: elements (2c, g) and (2c + 1, g).
__device__ __forceinline__ void LoadMatricesTransposed(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(SharedAddress(row))
               : "memory");
}
// Transposes an 8 x 8 matrix held as (g, 2c) and (g, 2c + 1) per lane.
__device__ __forceinline__ uint32_t TransposeMatrix(uint32_t x) {
  uint32_t out;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(x));
  return out;
}

// c[16, 8] += a[16, 16] b[16, 8], float32 sums of products of float16 (or bfloat16). Per lane:
//   a: (g, 2c..), (g + 8, 2c..), (g, 2c + 8..), (g + 8, 2c + 8..), each with its right neighbour
//   b: (2c.., g), (2c + 8.., g), each with the one below
//   c: (g, 2c), (g, 2c + 1), (g + 8, 2c), (g + 8, 2c + 1)
__device__ __forceinline__ void MmaHalf(float (&c)[4], const uint32_t (&a)[4],
                                        const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void MmaBFloat16(float (&c)[4], const uint32_t (&a)[4],
                                            const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// ---- launches ----

inline void Check(const char* op, cudaError_t error) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(op) + ": " + cudaGetErrorString(error));
}

template <typename... Params, typename... Args>
void Launch(const char* op, void (*kernel)(Params...), dim3 grid, int threads, int shared_bytes,
            cudaStream_t stream, const Args&... args) {
  // More than 48 KiB of dynamic shared memory must be asked for. It is no stream operation, so it
  // may be done while a graph is captured.
  if (shared_bytes > 48 * 1024) {
    Check(op,
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  }
  kernel<<<grid, threads, shared_bytes, stream>>>(args...);
  Check(op, cudaGetLastError());
}

}  // namespace pikv_ds
