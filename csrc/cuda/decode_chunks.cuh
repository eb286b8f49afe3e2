// The chunks of pages that decode_tensor.cuh works on: what a warp's ring in shared memory holds of
// them, and the asynchronous copies that fill it.
#pragma once

#include "decode.cuh"
#include "fragments.cuh"

namespace pikv_ds {

template <Element kElement, int kHeadDim>
struct TensorShape : Fragments<kElement, kHeadDim> {
  using F = Fragments<kElement, kHeadDim>;
  static constexpr int kChunkTokens = F::kCoded ? 32 : 16;
  static constexpr int kChunkTiles = kChunkTokens / 16;

  // One stage of the ring: keys, values, key scales [scale_rows, D], value scales [scale_rows, C].
  static constexpr int kScaleRows = ScaleRows(kElement);
  static constexpr int kValuesAt = kChunkTokens * F::kKeyPitch;
  static constexpr int kKeyScalesAt = kValuesAt + kChunkTokens * F::kValuePitch;
  static constexpr int kValueScalesAt = kKeyScalesAt + kScaleRows * kHeadDim * 2;
  static constexpr int kStageBytes = kValueScalesAt + kScaleRows * kChunkTokens * 2;
  static_assert(kValuesAt % 16 == 0 && kKeyScalesAt % 16 == 0 && kValueScalesAt % 16 == 0 &&
                kStageBytes % 16 == 0);
  // Three stages where that leaves room for two blocks per multiprocessor, else two.
  static constexpr int kStages = kStageBytes <= 9 * 1024 ? 3 : 2;
};

// What a stage holds; position < 0: nothing, the warp's pages are finished.
struct Chunk {
  int position;  // of the page in the table
  int index;     // of the chunk in the page
};

// A warp's side of the ring that fills it.
template <Element kElement, int kHeadDim>
class ChunkSource {
 public:
  using Shape = TensorShape<kElement, kHeadDim>;

  __device__ ChunkSource(const DecodeAttentionParams& p, const DecodeBlock& block, int warp)
      : queue_(block, warp), page_(nullptr), index_(0), page_size_(p.layout.page_size) {
    // Constants for the compiler, which then folds the layout's arithmetic.
    PageLayout layout = p.layout;
    layout.element = kElement;
    layout.head_dim = kHeadDim;
    const int head_bytes = page_size_ * Shape::kRowBytes;
    keys_at_ = block.kv_head * head_bytes;
    values_at_ = static_cast<int>(layout.ValueOffset()) + block.kv_head * head_bytes;
    key_scales_at_ = static_cast<int>(layout.KeyScaleOffset()) + 2 * block.kv_head * kHeadDim;
    key_scale_stride_ = 2 * layout.num_kv_heads * kHeadDim;
    value_scales_at_ = static_cast<int>(layout.ValueScaleOffset()) + 2 * block.kv_head * page_size_;
    value_scale_stride_ = 2 * layout.num_kv_heads * page_size_;
  }

  // Starts copying the next chunk into a stage, and notes in *chunk which it is.
  __device__ __forceinline__ void Issue(const DecodeAttentionParams& p, const DecodeBlock& block,
                                        uint8_t* stage, Chunk* chunk) {
    const int lane = threadIdx.x % kWarpSize;
    if (page_ == nullptr && !queue_.Next(block, p.slabs, &page_, &position_)) {
      page_ = nullptr;
      if (lane == 0) chunk->position = -1;
      CopyAsyncCommit();
      return;
    }
    if (lane == 0) *chunk = {position_, index_};

    const int first = index_ * Shape::kChunkTokens;
    const int count = min(Shape::kChunkTokens, page_size_ - first);
    CopyRows<Shape::kKeyPitch>(stage, page_ + keys_at_ + first * Shape::kRowBytes, count);
    if (Shape::kScaleRows > 0 && index_ == 0) {
      CopyScales(stage + Shape::kKeyScalesAt, 2 * kHeadDim, page_ + key_scales_at_,
                 key_scale_stride_, 2 * kHeadDim);
    }
    if (p.out != nullptr) {
      CopyRows<Shape::kValuePitch>(stage + Shape::kValuesAt,
                                   page_ + values_at_ + first * Shape::kRowBytes, count);
      if (Shape::kScaleRows > 0) {
        CopyScales(stage + Shape::kValueScalesAt, 2 * Shape::kChunkTokens,
                   page_ + value_scales_at_ + 2 * first, value_scale_stride_, 2 * count);
      }
    }
    CopyAsyncCommit();

    ++index_;
    if (index_ * Shape::kChunkTokens >= page_size_) {
      index_ = 0;
      page_ = nullptr;
    }
  }

 private:
  // `count` rows of a head, contiguous in the page, to rows kPitch apart.
  template <int kPitch>
  __device__ static __forceinline__ void CopyRows(uint8_t* to, const uint8_t* from, int count) {
    constexpr int kVectors = Shape::kRowBytes / 16;  // per row
    constexpr int kCopies = (Shape::kChunkTokens * kVectors + kWarpSize - 1) / kWarpSize;
    const int lane = threadIdx.x % kWarpSize;
    if constexpr (kWarpSize % kVectors == 0) {
      // A lane stays in its column: both addresses advance by constants.
      constexpr int kRows = kWarpSize / kVectors;
      const int row = lane / kVectors;
      to += row * kPitch + lane % kVectors * 16;
      from += lane * 16;
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        if (row + i * kRows < count)
          CopyAsync16(to + i * kRows * kPitch, from + i * kWarpSize * 16);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        const int at = i * kWarpSize + lane;
        const int row = at / kVectors;
        if (row < count)
          CopyAsync16(to + row * kPitch + (at - row * kVectors) * 16, from + at * 16);
      }
    }
  }
  // kScaleRows rows of `bytes` bytes, a multiple of 16.
  __device__ static __forceinline__ void CopyScales(uint8_t* to, int to_stride, const uint8_t* from,
                                                    int from_stride, int bytes) {
    const int lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (int row = 0; row < Shape::kScaleRows; ++row) {
      if (lane * 16 < bytes)
        CopyAsync16(to + row * to_stride + lane * 16, from + row * from_stride + lane * 16);
    }
  }

  PageQueue queue_;
  const uint8_t* page_;  // null: the queue's next
  int position_;         // of the page in the table
  int index_;            // of the next chunk in its page
  int page_size_;
  // Bytes from a page's beginning to this KV head's sections, and between scales and minima.
  int keys_at_, values_at_, key_scales_at_, value_scales_at_;
  int key_scale_stride_, value_scale_stride_;
};

}  // namespace pikv_ds
