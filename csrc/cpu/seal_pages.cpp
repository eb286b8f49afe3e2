#include <algorithm>
#include <cstring>

#include "../launch.h"
#include "aligned_floats.h"
#include "byte_scale.h"

namespace pikv_ds {
namespace {

// Scaling of the channels (keys) or the tokens (values) of a block. Whole vectors may be read and
// written at any channel or token.
struct Scaling {
  float* low;
  float* high;
  float* minimum;
  float* scale;
  float* inverse;       // 1 / scale, 0 where the scale is 0
  uint16_t* stored[2];  // scale and minimum as they are stored: float16, or bytes
};

// What is tried of packed pages: one scaling for each range, and its error.
constexpr int kMaxRanges = 7;
struct Ranges {
  Scaling of[kMaxRanges];  // without extremes
  float* error[kMaxRanges];
};

class Scratch {
 public:
  // A vector may begin at the last element.
  explicit Scratch(const PageLayout& layout)
      : stride_(AlignedFloats::Padded(std::max(layout.head_dim, layout.page_size) + kMaxLanes)),
        floats_((layout.Packed() ? 1 + kMaxRanges : 1) * kArrays * stride_) {}

  Scaling scaling() { return ScalingAt(0); }
  // Of packed pages.
  Ranges ranges() {
    Ranges ranges;
    for (int r = 0; r < kMaxRanges; ++r) {
      ranges.of[r] = ScalingAt(1 + r);
      ranges.error[r] = ranges.of[r].low;
    }
    return ranges;
  }

 private:
  static constexpr int kArrays = 7;

  Scaling ScalingAt(int index) {
    const auto array = [&](int i) { return floats_.data() + (index * kArrays + i) * stride_; };
    const auto bits = [&](int i) { return reinterpret_cast<uint16_t*>(array(i)); };
    return {array(0), array(1), array(2), array(3), array(4), {bits(5), bits(6)}};
  }

  int64_t stride_;
  AlignedFloats floats_;
};

// Seals one KV head of one page; returns what is noted of it.
using SealHeadFunction = int32_t(const SealPagesParams&, const Scaling&, int64_t page,
                                 int64_t head);
using SealPackedHeadFunction = int32_t(const SealPagesParams&, const Scaling&, const Ranges&,
                                       int64_t page, int64_t head);

}  // namespace
}  // namespace pikv_ds

#define PIKV_KERNEL "seal_pages_kernel.h"
#include "foreach_isa.h"

namespace pikv_ds {
namespace {

// Fewer elements than this are sealed faster by one thread than others are woken.
constexpr int64_t kParallelElements = int64_t{1} << 16;

void ZeroPadding(const PageLayout& layout, uint8_t* page) {
  const int64_t scale_bytes = layout.ScaleBytes() * ScaleRows(layout.element) * layout.num_kv_heads;
  const int64_t value_bytes = layout.ValueRowBytes() * layout.num_kv_heads * layout.page_size;
  const auto zero = [page](int64_t begin, int64_t end) {
    std::memset(page + begin, 0, end - begin);
  };
  zero(layout.DataBytes(), layout.KeyScaleOffset());
  zero(layout.KeyScaleOffset() + scale_bytes * layout.head_dim, layout.ValueOffset());
  if (layout.latent_dim > 0) return;
  zero(layout.ValueOffset() + value_bytes, layout.ValueScaleOffset());
  zero(layout.ValueScaleOffset() + scale_bytes * layout.page_size, layout.PageBytes());
}

}  // namespace

void SealPagesCpu(const SealPagesParams& params) {
  const PageLayout& layout = params.layout;
  // A vector must fit into each of the parts of a row that share bytes.
  const auto parts = [](int bits) { return bits == 3 ? 8 : std::max(1, 8 / bits); };
  const int lanes =
      BestLanes(layout.head_dim / (layout.Packed()
                                       ? std::max(parts(layout.key_bits), parts(layout.value_bits))
                                       : parts(ElementBits(layout.element))));
  SealHeadFunction* const seal_head = PIKV_BEST(lanes, SealHeadOf(layout.element, params.dtype));
  SealPackedHeadFunction* const seal_packed = PIKV_BEST(lanes, SealPackedHeadOf(params.dtype));

  const int64_t heads = layout.num_kv_heads, num_blocks = params.num_pages * heads;
  const int64_t num_elements = num_blocks * layout.page_size * layout.head_dim;
#pragma omp parallel if (num_elements >= kParallelElements)
  {
    Scratch scratch(layout);
#pragma omp for schedule(static)
    for (int64_t block = 0; block < num_blocks; ++block) {
      const int64_t page = block / heads, head = block % heads;
      if (head == 0) ZeroPadding(layout, params.out + page * params.out_stride);
      const int32_t noted =
          layout.Packed() ? seal_packed(params, scratch.scaling(), scratch.ranges(), page, head)
                          : seal_head(params, scratch.scaling(), page, head);
      if (noted == 0) continue;
#pragma omp atomic
      params.flags[page / params.pages_per_flag] |= noted;
    }
  }
}

}  // namespace pikv_ds
