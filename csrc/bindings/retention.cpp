// The ops of retention: what is known of each page, and which ones are given up.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

#include "../launch.h"
#include "checks.h"
#include "launch_kernel.h"

namespace pikv_ds {
namespace {

UtilityParams UtilityState(Args& args, const Tensor& mass, const Tensor& last_step,
                           const Tensor& visits, int64_t step, double decay) {
  args.CheckDim("mass", mass, 1, "[slots]");
  UtilityParams p{};
  p.num_slots = mass.size(0);
  p.mass = args.Out<float>("mass", mass, {p.num_slots}, "[slots]");
  p.last_step = args.Out<int32_t>("last_step", last_step, {p.num_slots}, "[slots]");
  p.visits = args.Out<int32_t>("visits", visits, {p.num_slots}, "[slots]");
  p.step = args.Int32("step", step, 0);
  p.decay = static_cast<float>(decay);
  return p;
}

template <auto kKernel>
void UpdateUtility(const Tensor& slots, const Tensor& new_mass, int64_t step, double decay,
                   Tensor mass, Tensor last_step, Tensor visits) {
  Args args("update_utility", Traits<kKernel>::kDevice, mass);
  args.CheckDim("slots", slots, 1, "[N]");
  const int64_t n = slots.size(0);

  UpdateUtilityParams p{};
  p.state = UtilityState(args, mass, last_step, visits, step, decay);
  p.slots = args.In<int32_t>("slots", slots, {n}, "[N]");
  p.new_mass = args.In<float>("new_mass", new_mass, {n}, "[N]");
  p.num_pages = n;
  Launch<kKernel>(p, args);
}

// The state is only read here, but the params have one type for both ops.
template <auto kKernel>
void ChooseVictims(const Tensor& mass, const Tensor& last_step, const Tensor& visits,
                   const Tensor& evictable, int64_t step, double decay, double mass_weight,
                   double recency_weight, double frequency_weight, Tensor out,
                   std::optional<Tensor> scratch) {
  Args args("choose_victims", Traits<kKernel>::kDevice, mass);
  args.CheckDim("out", out, 1, "[V]");
  const int64_t num_victims = out.size(0);

  ChooseVictimsParams p{};
  p.state = UtilityState(args, mass, last_step, visits, step, decay);
  p.evictable = args.In<bool>("evictable", evictable, {p.state.num_slots}, "[slots]");
  p.weights[0] = static_cast<float>(mass_weight);
  p.weights[1] = static_cast<float>(recency_weight);
  p.weights[2] = static_cast<float>(frequency_weight);
  p.out = args.Out<int32_t>("out", out, {num_victims}, "[V]");
  p.num_victims = num_victims;
#if defined(PIKV_WITH_CUDA)
  if constexpr (Traits<kKernel>::kDevice == Device::kCuda) {
    if (const int64_t bytes = ChooseVictimsScratchBytes(p); bytes > 0) {
      if (!scratch) args.Fail("scratch must have shape [bytes] = [", bytes, "], got None");
      p.scratch = args.Out<uint8_t>("scratch", *scratch, {bytes}, "[bytes]");
    }
  }
#endif
  Launch<kKernel>(p, args);
}

#if defined(PIKV_WITH_CUDA)
// Bytes that choose_victims' scratch must have.
int64_t ChooseVictimsScratch(int64_t num_slots, int64_t num_victims) {
  ChooseVictimsParams p{};
  p.state.num_slots = num_slots;
  p.num_victims = num_victims;
  return ChooseVictimsScratchBytes(p);
}
#endif

STABLE_TORCH_LIBRARY_IMPL(pikv_ds, CPU, m) {
  m.impl("update_utility", TORCH_BOX(&UpdateUtility<&UpdateUtilityCpu>));
  m.impl("choose_victims", TORCH_BOX(&ChooseVictims<&ChooseVictimsCpu>));
}

#if defined(PIKV_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(pikv_ds, CUDA, m) {
  m.impl("update_utility", TORCH_BOX(&UpdateUtility<&UpdateUtilityCuda>));
  m.impl("choose_victims", TORCH_BOX(&ChooseVictims<&ChooseVictimsCuda>));
}

// Without tensors there is no device to choose a kernel by.
STABLE_TORCH_LIBRARY_IMPL(pikv_ds, CompositeExplicitAutograd, m) {
  m.impl("choose_victims_scratch_bytes", TORCH_BOX(&ChooseVictimsScratch));
}
#endif

}  // namespace
}  // namespace pikv_ds
