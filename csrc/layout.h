// Where what lies within the bytes of one page: the same offsets as pikv_ds/layout.py, for kernels.
//
// Sections in order, each starting at a multiple of 16 bytes, so that kernels can use 128-bit loads
// (pages themselves start at multiples of 16, too: page_bytes is one):
//   keys          [K, S, D]           Element; int4 and int2 packed along D
//   key scales    [scale_rows, K, D]  float16, per channel of the page: scale, then minimum
//   values        [K, S, D]           as the keys
//   value scales  [scale_rows, K, S]  float16, per token: scale, then minimum
// int4: byte d of D/2 holds channel d (low nibble) and d + D/2. int2: byte d of D/4 holds channels
// d, d + D/4, d + D/2, d + 3D/4, lowest bits first. A decoded element is code * scale + minimum.
// Latent pages end after the key scales: their values are the first latent_dim channels of the
// keys.
// Packed pages have integers of any number of bits from 1 to 8, other ones for values than for keys
// perhaps, and scales of a byte: a scale is 2^(byte / 8 - 24), a minimum a signed byte of quarters
// of its scale. Three bits are the int2 of the lower two, then one bit per channel. Attention sees
// them unpacked, as int8. seal_pages takes others for packed ones, too, where it narrows ranges.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define PIKV_HOST_DEVICE __host__ __device__
#else
#define PIKV_HOST_DEVICE
#endif

namespace pikv_ds {

// Numbers as PageLayout.code in pikv_ds/layout.py has them.
enum class Element : int32_t {
  kFloat32 = 0,
  kBFloat16 = 1,
  kFloat16 = 2,
  kFp8 = 3,  // e4m3, scale only
  kInt8 = 4,
  kInt4 = 5,
  kInt2 = 6,
};

PIKV_HOST_DEVICE constexpr int ElementBits(Element element) {
  switch (element) {
    case Element::kFloat32:
      return 32;
    case Element::kBFloat16:
    case Element::kFloat16:
      return 16;
    case Element::kFp8:
    case Element::kInt8:
      return 8;
    case Element::kInt4:
      return 4;
    case Element::kInt2:
      return 2;
  }
  return 0;
}

// float16 rows beside the data: none, scale, or scale and minimum.
PIKV_HOST_DEVICE constexpr int ScaleRows(Element element) {
  return element < Element::kFp8 ? 0 : element == Element::kFp8 ? 1 : 2;
}

struct PageLayout {
  int32_t num_kv_heads;
  int32_t head_dim;
  int32_t page_size;
  Element element;
  int32_t latent_dim;  // 0: values have a section of their own
  int32_t key_bits;    // of packed pages; 0: those of the element
  int32_t value_bits;
  int32_t byte_scales;  // of packed pages: 1 where scales are bytes
  int32_t clip;         // of packed pages: 1 where sealing narrows ranges to lessen the error

  PIKV_HOST_DEVICE constexpr bool Packed() const { return key_bits > 0; }
  PIKV_HOST_DEVICE static constexpr int64_t Aligned(int64_t bytes) {
    return (bytes + 15) / 16 * 16;
  }
  // Bytes of one token of one KV head: its key, and its value where that is no other one.
  PIKV_HOST_DEVICE constexpr int64_t RowBytes() const {
    return int64_t{head_dim} * (Packed() ? key_bits : ElementBits(element)) / 8;
  }
  PIKV_HOST_DEVICE constexpr int64_t ValueRowBytes() const {
    return Packed() ? int64_t{head_dim} * value_bits / 8 : RowBytes();
  }
  PIKV_HOST_DEVICE constexpr int64_t DataBytes() const {
    return RowBytes() * num_kv_heads * page_size;
  }
  PIKV_HOST_DEVICE constexpr int64_t ScaleBytes() const { return byte_scales ? 1 : 2; }
  PIKV_HOST_DEVICE constexpr int64_t KeyScaleOffset() const { return Aligned(DataBytes()); }
  PIKV_HOST_DEVICE constexpr int64_t ValueOffset() const {
    return KeyScaleOffset() + Aligned(ScaleBytes() * ScaleRows(element) * num_kv_heads * head_dim);
  }
  PIKV_HOST_DEVICE constexpr int64_t ValueScaleOffset() const {
    return ValueOffset() + Aligned(ValueRowBytes() * num_kv_heads * page_size);
  }
  PIKV_HOST_DEVICE constexpr int32_t ValueDim() const {
    return latent_dim > 0 ? latent_dim : head_dim;
  }
  PIKV_HOST_DEVICE constexpr int64_t PageBytes() const {
    if (latent_dim > 0) return ValueOffset();
    return ValueScaleOffset() +
           Aligned(ScaleBytes() * ScaleRows(element) * num_kv_heads * page_size);
  }
};

// Rows of bytes in separately allocated slabs: slot s is row s % slab_rows of slab s / slab_rows.
struct Slabs {
  const int64_t* pointers;  // [number of slabs], addresses; 0 where a slab was given back
  int64_t slab_rows;
  int64_t row_bytes;

  PIKV_HOST_DEVICE const uint8_t* Row(int64_t slot) const { return MutableRow(slot); }
  PIKV_HOST_DEVICE uint8_t* MutableRow(int64_t slot) const {
    return reinterpret_cast<uint8_t*>(pointers[slot / slab_rows]) + slot % slab_rows * row_bytes;
  }
};

// One list of pages: slots side by side, or in segments that lie anywhere in an arena.
struct PageList {
  const int32_t* slots;
  const int32_t* segments;  // numbers of the list's segments in order; null: side by side
  int64_t count;

  PIKV_HOST_DEVICE int32_t operator[](int64_t i) const {
    return slots[segments == nullptr ? i
                                     : int64_t{segments[i / kSegment]} * kSegment + i % kSegment];
  }

  static constexpr int kSegment = 32;  // entries of a segment: pikv_ds/ops/lists.py's SEGMENT
};

// The lists that the B rows of a table stand for: a dense table, or places in a PageTable, which
// has several lists for each of its rows (see pikv_ds/ops/lists.py).
struct PageLists {
  const int32_t* slots;   // dense: [B, P], or [B, K, P] where per_head; else an arena of segments
  const int32_t* counts;  // dense: [B], null: P each; else [rows, num_lists]
  const int32_t* directory;    // numbers of segments; null: dense
  const int32_t* directories;  // [rows, 2]: where a row's directory begins, its segments per list
  const int32_t* rows;         // [B / heads]; -1: an empty list
  int64_t width;               // P; else at least the longest list
  int32_t num_lists;           // of a row
  int32_t first, step, heads;  // list b is list first + b % heads * step of row rows[b / heads]
  bool per_head;

  PIKV_HOST_DEVICE PageList List(int64_t b, int kv_head, int num_kv_heads) const {
    if (directory == nullptr) {
      const int64_t count = counts == nullptr ? width : counts[b];
      return {slots + (per_head ? b * num_kv_heads + kv_head : b) * width, nullptr, count};
    }
    const int64_t row = rows[b / heads], list = first + b % heads * step;
    if (row < 0) return {slots, directory, 0};
    const int32_t* const own = directories + 2 * row;
    return {slots, directory + own[0] + list * own[1], counts[row * num_lists + list]};
  }
};

}  // namespace pikv_ds
