// A stable device-wide sort of pairs, by CUB; tests/cuda_emulator/emulator.h has it in plain C++.
#pragma once

#include <cub/device/device_radix_sort.cuh>

#include "device.cuh"

namespace pikv_ds {

// Bytes of scratch for `count` pairs.
inline size_t SortPairsScratchBytes(int64_t count) {
  size_t bytes = 0;
  Check("choose_victims", cub::DeviceRadixSort::SortPairs<uint32_t, int32_t>(
                              nullptr, bytes, nullptr, nullptr, nullptr, nullptr, count));
  return bytes;
}

inline void SortPairs(void* scratch, size_t scratch_bytes, const uint32_t* keys,
                      uint32_t* sorted_keys, const int32_t* values, int32_t* sorted_values,
                      int64_t count, cudaStream_t stream) {
  Check("choose_victims",
        cub::DeviceRadixSort::SortPairs(scratch, scratch_bytes, keys, sorted_keys, values,
                                        sorted_values, count, 0, 32, stream));
}

}  // namespace pikv_ds
