// Compiles the file that PIKV_KERNEL names once per instruction set, each time into a namespace of
// its own, on top of the vectors of vec.h. Which copy runs is decided at run time by PIKV_BEST, so
// that one binary serves every machine of an architecture.
//
// A pragma rather than target attributes: GCC lowers wide vectors in each function before it
// inlines, so that every helper needs the target, too. (Clang knows the pragma by another name and
// would take the plain copy.)
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#define PIKV_INLINE inline __attribute__((always_inline))
// Vectors never cross a function that is not inlined, so how they would be passed does not matter.
#pragma GCC diagnostic ignored "-Wpsabi"

#if defined(__x86_64__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12's own AVX-512 headers
#include <immintrin.h>
#pragma GCC diagnostic pop
#define PIKV_X86 1
#endif

namespace pikv_ds {
namespace {

#define PIKV_LANES 1
namespace scalar {
#include "vec.h"
#include PIKV_KERNEL
}  // namespace scalar
#undef PIKV_LANES

// What every machine of the architecture has: SSE2 or NEON.
#define PIKV_LANES 4
namespace plain {
#include "vec.h"
#include PIKV_KERNEL
}  // namespace plain
#undef PIKV_LANES

#if PIKV_X86
#define PIKV_LANES 8
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
namespace avx2 {
#include "vec.h"
#include PIKV_KERNEL
}  // namespace avx2
#pragma GCC pop_options
#undef PIKV_LANES

#define PIKV_LANES 16
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
namespace avx512 {
#include "vec.h"
#include PIKV_KERNEL
}  // namespace avx512
#pragma GCC pop_options
#undef PIKV_LANES
#endif

}  // namespace

// PIKV_CPU_LANES=1, 4, 8 or 16 forbids wider vectors, so that one machine can test every copy.
inline int WidestLanes() {
  int lanes = 4;
#if PIKV_X86
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
    lanes = 8;
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
      lanes = 16;
    }
  }
#endif
  const char* limit = std::getenv("PIKV_CPU_LANES");
  return limit == nullptr ? lanes : std::min(lanes, std::atoi(limit));
}

// Lanes of the widest copy that the machine runs and that a row of `width` elements fills.
inline int BestLanes(int64_t width) {
  static const int widest = WidestLanes();
  for (const int lanes : {16, 8, 4}) {
    if (lanes <= widest && lanes <= width) return lanes;
  }
  return 1;
}

#if PIKV_X86
#define PIKV_BEST(lanes, function)   \
  ((lanes) == 16  ? avx512::function \
   : (lanes) == 8 ? avx2::function   \
   : (lanes) == 4 ? plain::function  \
                  : scalar::function)
#else
#define PIKV_BEST(lanes, function) ((lanes) == 4 ? plain::function : scalar::function)
#endif

}  // namespace pikv_ds
