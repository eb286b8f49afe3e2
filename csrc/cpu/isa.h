// Which instruction set the CPU kernels use.
#pragma once

// GCC only: clang knows neither its target pragmas nor its tile intrinsics, and gets plain C++.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define PIKV_X86_KERNELS
#endif

namespace pikv_ds {

enum class CpuIsaLevel { kPlain, kAvx2, kAvx512, kAmx };

// The best that both the machine and this build have, or what PIKV_CPU_ISA names (plain, avx2,
// avx512 or amx) if that is no better. Read once.
CpuIsaLevel CpuIsaInUse();

// The same for people: "plain", "avx2", "avx512" or "amx".
const char* CpuIsa();

}  // namespace pikv_ds
