#include "isa.h"

#include <cstdlib>
#include <cstring>

#if defined(PIKV_X86_KERNELS) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace pikv_ds {
namespace {

constexpr const char* kNames[] = {"plain", "avx2", "avx512", "amx"};

#if defined(PIKV_X86_KERNELS)
// The tiles' 8 KiB of registers are part of a thread's saved state only for processes that ask.
bool HasAmx() {
#if defined(__linux__)
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25;
  if ((edx & (kBf16 | kTile | kInt8)) != (kBf16 | kTile | kInt8)) return false;
  constexpr long kArchReqXcompPerm = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kTileData) == 0;
#else
  return false;
#endif
}
#endif

CpuIsaLevel Best() {
#if defined(PIKV_X86_KERNELS)
  const auto has_avx512 = [] {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vnni");
  };
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") ||
      !__builtin_cpu_supports("f16c")) {
    return CpuIsaLevel::kPlain;
  }
  if (!has_avx512()) return CpuIsaLevel::kAvx2;
  return __builtin_cpu_supports("avx512bf16") && HasAmx() ? CpuIsaLevel::kAmx
                                                          : CpuIsaLevel::kAvx512;
#else
  return CpuIsaLevel::kPlain;
#endif
}

CpuIsaLevel Choose() {
  const CpuIsaLevel best = Best();
  const char* wanted = std::getenv("PIKV_CPU_ISA");
  for (int level = 0; wanted != nullptr && level < static_cast<int>(best); ++level) {
    if (std::strcmp(wanted, kNames[level]) == 0) return static_cast<CpuIsaLevel>(level);
  }
  return best;
}

}  // namespace

CpuIsaLevel CpuIsaInUse() {
  static const CpuIsaLevel level = Choose();
  return level;
}

const char* CpuIsa() { return kNames[static_cast<int>(CpuIsaInUse())]; }

}  // namespace pikv_ds
