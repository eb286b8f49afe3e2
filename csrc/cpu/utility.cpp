// What retention knows of each page, and which pages it gives up.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "../launch.h"

// Choices depend on the last bits, so each operation rounds as in the reference.
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#else
#pragma GCC optimize("fp-contract=off")
#endif

namespace pikv_ds {
namespace {

// Fewer slots than this are ranked faster by one thread than others are woken.
constexpr int64_t kParallelSlots = int64_t{1} << 13;

float Age(const UtilityParams& state, int64_t slot) {
  return static_cast<float>(state.step - state.last_step[slot]);
}

float Utility(const ChooseVictimsParams& p, int64_t slot) {
  const UtilityParams& state = p.state;
  const float age = Age(state, slot);
  const float mass = p.weights[0] * state.mass[slot] * std::pow(state.decay, age);
  const float recency = p.weights[1] / (1.0f + age);
  const float frequency = p.weights[2] * std::log1p(static_cast<float>(state.visits[slot]));
  return mass + recency + frequency;
}

// Integers that sort as utilities do, NaN last, and among equals as slots do.
uint64_t SortKey(float utility, int64_t slot) {
  utility += 0.0f;  // -0.0 equals 0.0
  uint32_t bits;
  std::memcpy(&bits, &utility, sizeof bits);
  bits = std::isnan(utility) ? UINT32_MAX : bits >> 31 ? ~bits : bits | uint32_t{1} << 31;
  return uint64_t{bits} << 32 | static_cast<uint64_t>(slot);
}

}  // namespace

void UpdateUtilityCpu(const UpdateUtilityParams& params) {
  const UtilityParams& state = params.state;
  for (int64_t i = 0; i < params.num_pages; ++i) {
    const int32_t slot = params.slots[i];
    if (slot <= 0) continue;
    state.mass[slot] = state.mass[slot] * std::pow(state.decay, Age(state, slot)) +
                       (1.0f - state.decay) * params.new_mass[i];
    state.last_step[slot] = state.step;
    ++state.visits[slot];
  }
}

void ChooseVictimsCpu(const ChooseVictimsParams& params) {
  const int64_t num_slots = params.state.num_slots;
  std::vector<uint64_t> keys(num_slots);
#pragma omp parallel for schedule(static) if (num_slots >= kParallelSlots)
  for (int64_t slot = 0; slot < num_slots; ++slot) {
    keys[slot] = params.evictable[slot] ? SortKey(Utility(params, slot), slot) : UINT64_MAX;
  }
  keys.erase(std::remove(keys.begin(), keys.end(), UINT64_MAX), keys.end());

  const int64_t chosen = std::min<int64_t>(params.num_victims, keys.size());
  std::partial_sort(keys.begin(), keys.begin() + chosen, keys.end());
  for (int64_t i = 0; i < chosen; ++i) params.out[i] = static_cast<int32_t>(keys[i] & INT32_MAX);
  std::fill(params.out + chosen, params.out + params.num_victims, 0);
}

}  // namespace pikv_ds
