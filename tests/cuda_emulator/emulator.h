// Runs the kernels of csrc/cuda on the CPU, so that they are tested where no GPU is: the names of
// csrc/cuda/device.cuh and sort.cuh, and CUDA's keywords, in plain C++.
//
// Each thread of a block is a fiber with its own stack; a barrier or a warp instruction switches to
// the next one. Hardware is played as nastily as its manual allows: shared memory starts as NaN,
// asynchronous copies arrive at the wait and no sooner, and PIKV_EMULATOR_ORDER (0 to 2) changes
// the order in which threads run, so that a missing barrier shows as another result. Layouts of
// tensor-core fragments are those of the PTX manual, written out elementwise.
//
// Not modelled: time, and rounding inside the tensor cores (here: float64 sums, rounded once).
// Writes beyond the shared memory asked for are found; alignment is checked by the compiler's
// sanitizer.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(int64_t x = 1, int64_t y = 1, int64_t z = 1)
      : x(static_cast<unsigned>(x)), y(static_cast<unsigned>(y)), z(static_cast<unsigned>(z)) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;
using std::max;
using std::min;

namespace pikv_ds {
namespace emulator {

constexpr int kLanes = 32;
constexpr size_t kStackBytes = 256 * 1024;
constexpr int kGuardBytes = 1024;  // behind dynamic shared memory

struct Barrier {
  int arrived = 0;
  int64_t generation = 0;
};

struct AsyncCopy {
  uint8_t* to;
  const uint8_t* from;
};

struct Fiber {
  ucontext_t context;
  jmp_buf jump;
  bool started = false, done = false;
  std::vector<uint8_t> stack;
  std::vector<std::vector<AsyncCopy>> copies;  // committed groups, oldest first, then the open one
};

struct Warp {
  Barrier barrier;
  alignas(16) uint8_t slots[kLanes][64];
};

struct Block {
  std::function<void()> body;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Warp> warps;
  std::vector<uint8_t> shared;
  Barrier barrier;
  int votes[3] = {0, 0, 0};
  int current = 0;
  int64_t progress = 0;
  jmp_buf scheduler;
  ucontext_t scheduler_context;
};
inline Block* block = nullptr;

inline uint8_t* Aligned(const uint8_t* pointer) {
  return reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(pointer) + 15) / 16 * 16);
}
inline Fiber& Self() { return *block->fibers[block->current]; }
inline int Lane() { return block->current % kLanes; }
inline Warp& MyWarp() { return block->warps[block->current / kLanes]; }

inline void Yield() {
  const int me = block->current;
  if (_setjmp(Self().jump) == 0) _longjmp(block->scheduler, 1);
  block->current = me;
}

inline void Wait(Barrier& barrier, int expected) {
  ++block->progress;
  if (++barrier.arrived == expected) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  const int64_t generation = barrier.generation;
  while (barrier.generation == generation) Yield();
}

inline void WaitWarp() { Wait(MyWarp().barrier, kLanes); }
inline void WaitBlock() { Wait(block->barrier, static_cast<int>(block->fibers.size())); }

inline void Entry() {
  block->body();
  Self().done = true;
  ++block->progress;
  _longjmp(block->scheduler, 1);
}

// Runs one block to its end.
inline void Run(Block& b, int threads) {
  static const int order =
      std::getenv("PIKV_EMULATOR_ORDER") ? std::atoi(std::getenv("PIKV_EMULATOR_ORDER")) : 0;
  block = &b;
  std::vector<int> sequence(threads);
  std::iota(sequence.begin(), sequence.end(), 0);
  if (order == 1) std::reverse(sequence.begin(), sequence.end());
  if (order == 2) {  // a multiplicative shuffle
    for (int i = 0; i < threads; ++i)
      sequence[i] = static_cast<int>((int64_t{i} * 7919 + 13) % threads);
  }
  for (int alive = threads; alive > 0;) {
    const int64_t before = b.progress;
    alive = 0;
    for (const int i : sequence) {
      Fiber& fiber = *b.fibers[i];
      if (fiber.done) continue;
      b.current = i;
      threadIdx = dim3(i);
      if (_setjmp(b.scheduler) == 0) {
        if (fiber.started) _longjmp(fiber.jump, 1);
        fiber.started = true;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = fiber.stack.size();
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, Entry, 0);
        swapcontext(&b.scheduler_context, &fiber.context);
      }
      alive += !b.fibers[b.current]->done;
    }
    if (alive > 0 && b.progress == before) {
      std::fprintf(stderr, "emulator: %d threads wait at a barrier that others never reach\n",
                   alive);
      std::abort();
    }
  }
  block = nullptr;
}

// Nothing may have been written behind the shared memory that the launch asked for.
inline void CheckGuard(const Block& b, int shared_bytes) {
  const uint8_t* end = Aligned(b.shared.data()) + shared_bytes;
  for (const uint8_t* at = end; at < b.shared.data() + b.shared.size(); ++at) {
    if (*at == 0xff) continue;
    std::fprintf(stderr, "emulator: shared memory was written %d bytes beyond its end\n",
                 static_cast<int>(at - end));
    std::abort();
  }
}

// Gives every lane's `in` to `out(lanes)`, in which lanes[i] is the value of lane i.
template <typename T, typename Out>
auto Exchange(const T& in, const Out& out) {
  static_assert(sizeof(T) <= 64);
  Warp& warp = MyWarp();
  std::memcpy(warp.slots[Lane()], &in, sizeof(T));
  WaitWarp();
  T lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) std::memcpy(&lanes[i], warp.slots[i], sizeof(T));
  WaitWarp();
  return out(lanes);
}

inline uint16_t Low(uint32_t x) { return static_cast<uint16_t>(x); }
inline uint16_t High(uint32_t x) { return static_cast<uint16_t>(x >> 16); }
inline uint32_t Pair(uint16_t low, uint16_t high) { return low | uint32_t{high} << 16; }

}  // namespace emulator

// ---- device.cuh ----

inline uint32_t FloatBits(float x) {
  uint32_t out;
  std::memcpy(&out, &x, 4);
  return out;
}
inline float BitsFloat(uint32_t x) {
  float out;
  std::memcpy(&out, &x, 4);
  return out;
}
inline _Float16 BitsHalf(uint16_t x) {
  _Float16 out;
  std::memcpy(&out, &x, 2);
  return out;
}
inline uint16_t HalfBits(_Float16 x) {
  uint16_t out;
  std::memcpy(&out, &x, 2);
  return out;
}

inline float HalfToFloat(uint16_t bits) { return static_cast<float>(BitsHalf(bits)); }
inline uint16_t FloatToHalf(float x) { return HalfBits(static_cast<_Float16>(x)); }
inline float BFloat16ToFloat(uint16_t bits) { return BitsFloat(uint32_t{bits} << 16); }
inline uint16_t FloatToBFloat16(float x) {
  const uint32_t bits = FloatBits(x);
  if (std::isnan(x)) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline uint32_t PackHalf2(float low, float high) {
  return emulator::Pair(FloatToHalf(low), FloatToHalf(high));
}
inline uint32_t PackBFloat162(float low, float high) {
  return emulator::Pair(FloatToBFloat16(low), FloatToBFloat16(high));
}
template <typename F>
uint32_t OnHalves(uint32_t a, uint32_t b, uint32_t c, const F& f) {
  const auto one = [&](int shift) {
    const auto half = [&](uint32_t x) {
      return static_cast<double>(BitsHalf(static_cast<uint16_t>(x >> shift)));
    };
    return HalfBits(
        static_cast<_Float16>(f(half(a), half(b), half(c))));  // exact in double, rounded once
  };
  return emulator::Pair(one(0), one(16));
}
inline uint32_t AddHalf2(uint32_t a, uint32_t b) {
  return OnHalves(a, b, 0, [](double x, double y, double) { return x + y; });
}
inline uint32_t MulHalf2(uint32_t a, uint32_t b) {
  return OnHalves(a, b, 0, [](double x, double y, double) { return x * y; });
}
inline uint32_t MaxHalf2(uint32_t a, uint32_t b) {
  return OnHalves(a, b, 0, [](double x, double y, double) { return std::max(x, y); });
}
inline uint32_t FmaHalf2(uint32_t a, uint32_t b, uint32_t c) {
  return OnHalves(a, b, c, [](double x, double y, double z) { return x * y + z; });
}

inline uint32_t BytePermute(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t both = low | uint64_t{high} << 32;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i)
    out |= static_cast<uint32_t>(both >> (8 * (selector >> 4 * i & 7)) & 0xff) << 8 * i;
  return out;
}
template <uint32_t kMask, uint32_t kBits>
uint32_t MaskOr(uint32_t x) {
  return (x & kMask) | kBits;
}
inline float Exp2(float x) { return std::exp2(x); }
inline float Add(float a, float b) { return a + b; }
inline float Subtract(float a, float b) { return a - b; }
inline float Multiply(float a, float b) { return a * b; }
inline float Divide(float a, float b) { return a / b; }

template <typename T>
T Shuffle(T x, int lane) {
  // Lanes may ask for different sources, as on the hardware.
  return emulator::Exchange(x, [&](const T* lanes) { return lanes[lane % emulator::kLanes]; });
}
template <typename T>
T ShuffleXor(T x, int lane_mask) {
  const int me = emulator::Lane();
  return emulator::Exchange(x, [&](const T* lanes) { return lanes[me ^ lane_mask]; });
}
inline uint32_t Ballot(bool x) {
  return emulator::Exchange(x, [](const bool* lanes) {
    uint32_t out = 0;
    for (int i = 0; i < emulator::kLanes; ++i) out |= uint32_t{lanes[i]} << i;
    return out;
  });
}
inline bool AnyLane(bool x) { return Ballot(x) != 0; }
inline int FirstBit(uint32_t mask) { return __builtin_ffs(static_cast<int>(mask)) - 1; }
inline int CountBits(uint32_t mask) { return __builtin_popcount(mask); }

inline uint8_t* DynamicShared() { return emulator::Aligned(emulator::block->shared.data()); }

inline void CopyAsync16(void* shared, const void* global) {
  auto& copies = emulator::Self().copies;
  if (copies.empty()) copies.emplace_back();
  copies.back().push_back({static_cast<uint8_t*>(shared), static_cast<const uint8_t*>(global)});
  if ((reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global)) % 16 != 0) {
    std::fprintf(stderr, "emulator: asynchronous copy %p <- %p is not aligned\n", shared, global);
    std::abort();
  }
}
inline void CopyAsyncCommit() {
  auto& copies = emulator::Self().copies;
  if (copies.empty()) copies.emplace_back();
  copies.emplace_back();
}
template <int kPending>
void CopyAsyncWait() {
  auto& copies = emulator::Self().copies;
  while (static_cast<int>(copies.size()) > kPending + 1) {
    for (const emulator::AsyncCopy& copy : copies.front()) std::memcpy(copy.to, copy.from, 16);
    copies.erase(copies.begin());
  }
}

inline void __syncwarp() { emulator::WaitWarp(); }
inline int __syncthreads_or(bool x) {
  // Three, by generation: one in use, one that slow threads may still read, one to clear. Every
  // barrier clears, whether votes were taken or not: the next ones find none of an earlier block.
  const int64_t generation = emulator::block->barrier.generation;
  int& votes = emulator::block->votes[generation % 3];
  emulator::block->votes[(generation + 1) % 3] = 0;
  votes |= x;
  emulator::WaitBlock();
  return votes;
}
inline void __syncthreads() { __syncthreads_or(false); }
template <typename T>
T atomicAdd(T* at, T x) {
  const T before = *at;
  *at += x;
  return before;
}
template <typename T>
T atomicOr(T* at, T x) {
  const T before = *at;
  *at |= x;
  return before;
}

// Row r of matrix i, as bits.
inline void Matrices(uint32_t (&out)[4], const void* row, bool transposed) {
  const int g = emulator::Lane() / 4, c = emulator::Lane() % 4;
  emulator::Exchange(row, [&](const void* const* rows) {
    const auto at = [&](int matrix, int r, int column) {
      const auto address = reinterpret_cast<uintptr_t>(rows[8 * matrix + r]);
      if (address % 16 != 0) std::abort();
      return reinterpret_cast<const uint16_t*>(address)[column];
    };
    for (int i = 0; i < 4; ++i) {
      out[i] = transposed ? emulator::Pair(at(i, 2 * c, g), at(i, 2 * c + 1, g))
                          : emulator::Pair(at(i, g, 2 * c), at(i, g, 2 * c + 1));
    }
    return 0;
  });
}
inline void LoadMatrices(uint32_t (&out)[4], const void* row) { Matrices(out, row, false); }
inline void LoadMatricesTransposed(uint32_t (&out)[4], const void* row) {
  Matrices(out, row, true);
}
inline uint32_t TransposeMatrix(uint32_t x) {
  const int g = emulator::Lane() / 4, c = emulator::Lane() % 4;
  return emulator::Exchange(x, [&](const uint32_t* lanes) {
    const auto at = [&](int r, int column) {
      return static_cast<uint16_t>(lanes[4 * r + column / 2] >> (16 * (column % 2)));
    };
    return emulator::Pair(at(2 * c, g), at(2 * c + 1, g));
  });
}

template <typename ToFloat>
void Mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const ToFloat& to_float) {
  struct Fragments {
    uint32_t a[4], b[2];
  } mine;
  std::memcpy(mine.a, a, sizeof(a));
  std::memcpy(mine.b, b, sizeof(b));
  const int g = emulator::Lane() / 4, column = emulator::Lane() % 4;
  emulator::Exchange(mine, [&](const Fragments* lanes) {
    const auto half = [&](uint32_t x, int k) {
      return to_float(static_cast<uint16_t>(x >> (16 * (k % 2))));
    };
    const auto at_a = [&](int row, int k) {
      return half(lanes[row % 8 * 4 + k % 8 / 2].a[row / 8 + 2 * (k / 8)], k);
    };
    const auto at_b = [&](int k, int n) { return half(lanes[n * 4 + k % 8 / 2].b[k / 8], k); };
    for (int i = 0; i < 4; ++i) {
      double sum = c[i];
      for (int k = 0; k < 16; ++k) {
        sum += double{at_a(g + 8 * (i / 2), k)} * double{at_b(k, 2 * column + i % 2)};
      }
      c[i] = static_cast<float>(sum);
    }
    return 0;
  });
}
inline void MmaHalf(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  Mma(c, a, b, HalfToFloat);
}
inline void MmaBFloat16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  Mma(c, a, b, BFloat16ToFloat);
}

template <typename... Params, typename... Args>
void Launch(const char*, void (*kernel)(Params...), dim3 grid, int threads, int shared_bytes,
            cudaStream_t, const Args&... args) {
  emulator::Block b;
  b.body = [&] { kernel(args...); };
  b.warps.resize((threads + emulator::kLanes - 1) / emulator::kLanes);
  for (int i = 0; i < threads; ++i) {
    b.fibers.push_back(std::make_unique<emulator::Fiber>());
    b.fibers.back()->stack.resize(emulator::kStackBytes);
  }
  blockDim = dim3(threads);
  gridDim = grid;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = dim3(x, y, z);
        b.shared.assign(15 + shared_bytes + emulator::kGuardBytes, 0xff);
        for (auto& fiber : b.fibers) {
          fiber->started = fiber->done = false;
          fiber->copies.clear();
        }
        emulator::Run(b, threads);
        emulator::CheckGuard(b, shared_bytes);
      }
    }
  }
}

// ---- sort.cuh ----

inline size_t SortPairsScratchBytes(int64_t) { return 1; }
inline void SortPairs(void*, size_t, const uint32_t* keys, uint32_t* sorted_keys,
                      const int32_t* values, int32_t* sorted_values, int64_t count, cudaStream_t) {
  std::vector<int64_t> order(count);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return keys[a] < keys[b]; });
  for (int64_t i = 0; i < count; ++i) {
    sorted_keys[i] = keys[order[i]];
    sorted_values[i] = values[order[i]];
  }
}

}  // namespace pikv_ds
