// Pages out of their slots and into them.
#include <cstring>

#include "../launch.h"

namespace pikv_ds {
namespace {

// Less is copied faster by one thread than others are woken.
constexpr int64_t kParallelBytes = int64_t{1} << 20;

}  // namespace

void GatherPagesCpu(const GatherPagesParams& params) {
  const int64_t row_bytes = params.slabs.row_bytes;
#pragma omp parallel for schedule(static) if (params.num_pages * row_bytes >= kParallelBytes)
  for (int64_t i = 0; i < params.num_pages; ++i) {
    std::memcpy(params.out + i * row_bytes, params.slabs.Row(params.slots[i]), row_bytes);
  }
}

void ScatterPagesCpu(const ScatterPagesParams& params) {
  const int64_t row_bytes = params.slabs.row_bytes;
#pragma omp parallel for schedule(static) if (params.num_pages * row_bytes >= kParallelBytes)
  for (int64_t i = 0; i < params.num_pages; ++i) {
    std::memcpy(params.slabs.MutableRow(params.slots[i]), params.pages + i * params.stride,
                row_bytes);
  }
}

}  // namespace pikv_ds
