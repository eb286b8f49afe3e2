// update_utility and choose_victims: one thread per page; the order of victims is a radix sort's.
#include "common.cuh"

#if !defined(PIKV_EMULATOR)
#include "sort.cuh"
#endif

namespace pikv_ds {
namespace {

constexpr int kThreads = 256;
constexpr uint32_t kNotEvictable = 0xffffffff;  // after every utility

__global__ void __launch_bounds__(kThreads) UpdateUtilityKernel(const UpdateUtilityParams p) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= p.num_pages) return;
  const int32_t slot = p.slots[i];
  if (slot <= 0) return;
  const UtilityParams& state = p.state;
  const float age = static_cast<float>(state.step - state.last_step[slot]);
  const float kept = Multiply(state.mass[slot], powf(state.decay, age));
  state.mass[slot] = Add(kept, Multiply(1.0f - state.decay, p.new_mass[i]));
  state.last_step[slot] = state.step;
  state.visits[slot] += 1;
}

// In the reference's order of operations: equal states must give equal bits, and so a tie.
__device__ float Utility(const ChooseVictimsParams& p, int64_t slot) {
  const UtilityParams& state = p.state;
  const float age = static_cast<float>(state.step - state.last_step[slot]);
  const float mass = Multiply(Multiply(p.weights[0], state.mass[slot]), powf(state.decay, age));
  const float recency = Divide(p.weights[1], 1.0f + age);
  const float frequency = Multiply(p.weights[2], log1pf(static_cast<float>(state.visits[slot])));
  return Add(Add(mass, recency), frequency);
}

__global__ void __launch_bounds__(kThreads)
    RankKernel(const ChooseVictimsParams p, uint32_t* keys, int32_t* slots) {
  const int64_t slot = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (slot >= p.state.num_slots) return;
  const float utility = Utility(p, slot);
  // A broken utility comes last of the evictable ones, as torch sorts NaN.
  const uint32_t key = utility == utility ? OrderedBits(utility) : kNotEvictable - 1;
  keys[slot] = p.evictable[slot] ? key : kNotEvictable;
  slots[slot] = static_cast<int32_t>(slot);
}

__global__ void __launch_bounds__(kThreads)
    TakeVictimsKernel(const ChooseVictimsParams p, const uint32_t* sorted_keys,
                      const int32_t* sorted_slots) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= p.num_victims) return;
  const bool there = i < p.state.num_slots && sorted_keys[i] != kNotEvictable;
  p.out[i] = there ? sorted_slots[i] : 0;
}

int64_t ArrayBytes(int64_t num_slots) { return (num_slots * 4 + 255) / 256 * 256; }

}  // namespace

int64_t ChooseVictimsScratchBytes(const ChooseVictimsParams& params) {
  const int64_t n = params.state.num_slots;
  return 4 * ArrayBytes(n) + static_cast<int64_t>(SortPairsScratchBytes(n));
}

void UpdateUtilityCuda(const UpdateUtilityParams& params, cudaStream_t stream) {
  if (params.num_pages == 0) return;
  Launch("update_utility", UpdateUtilityKernel, dim3(CeilDiv(params.num_pages, kThreads)), kThreads,
         0, stream, params);
}

void ChooseVictimsCuda(const ChooseVictimsParams& params, cudaStream_t stream) {
  if (params.num_victims == 0) return;
  const int64_t n = params.state.num_slots;
  // Scratch: keys, slots, both sorted, then the sort's own.
  uint8_t* scratch = static_cast<uint8_t*>(params.scratch);
  uint32_t* keys = reinterpret_cast<uint32_t*>(scratch);
  int32_t* slots = reinterpret_cast<int32_t*>(scratch + ArrayBytes(n));
  uint32_t* sorted_keys = reinterpret_cast<uint32_t*>(scratch + 2 * ArrayBytes(n));
  int32_t* sorted_slots = reinterpret_cast<int32_t*>(scratch + 3 * ArrayBytes(n));
  if (n > 0) {
    Launch("choose_victims", RankKernel, dim3(CeilDiv(n, kThreads)), kThreads, 0, stream, params,
           keys, slots);
    // Stable, and slots go in ascending: ties to the lower slot.
    SortPairs(scratch + 4 * ArrayBytes(n), SortPairsScratchBytes(n), keys, sorted_keys, slots,
              sorted_slots, n, stream);
  }
  Launch("choose_victims", TakeVictimsKernel, dim3(CeilDiv(params.num_victims, kThreads)), kThreads,
         0, stream, params, sorted_keys, sorted_slots);
}

}  // namespace pikv_ds
