// How an op launches its kernel, on the CPU or on a CUDA stream: told by the kernel's type.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#include "../launch.h"
#include "checks.h"

#if defined(PIKV_WITH_CUDA)
#include <torch/csrc/stable/accelerator.h>
// Declared by torch's headers only where USE_CUDA is set, which is not for extensions.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                             void** ret_stream);
#endif

namespace pikv_ds {

// What a kernel's type tells: its params, its device and how it is launched.
template <typename Function>
struct KernelTraits;

template <typename P>
struct KernelTraits<void (*)(const P&)> {
  using Params = P;
  static constexpr Device kDevice = Device::kCpu;
  static void Launch(void (*kernel)(const P&), const P& params, const Args&) { kernel(params); }
};

#if defined(PIKV_WITH_CUDA)
template <typename P>
struct KernelTraits<void (*)(const P&, cudaStream_t)> {
  using Params = P;
  static constexpr Device kDevice = Device::kCuda;
  static void Launch(void (*kernel)(const P&, cudaStream_t), const P& params, const Args& args) {
    const torch::stable::accelerator::DeviceGuard guard(args.device_index());
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(args.device_index(), &stream));
    kernel(params, static_cast<cudaStream_t>(stream));
  }
};
#endif

template <auto kKernel>
using Traits = KernelTraits<decltype(kKernel)>;

template <auto kKernel>
void Launch(const typename Traits<kKernel>::Params& params, const Args& args) {
  Traits<kKernel>::Launch(kKernel, params, args);
}

}  // namespace pikv_ds
