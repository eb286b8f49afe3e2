// decode_attention without tensor cores, in float32 throughout, for every layout: what float32
// queries and pages, odd shapes, packed and latent pages need. Not the path that is fast.
#include "decode.cuh"

namespace pikv_ds {
namespace {

__host__ __device__ constexpr int PaddedDim(int head_dim) {
  return static_cast<int>(CeilDiv(head_dim, kKeyWidth)) * kKeyWidth;
}

// One KV head of a page, decoded element by element. Of latent pages values are the keys' first
// channels.
template <Element kElement, bool kLatent>
struct PageTokens {
  static constexpr int kRows = kLatent ? 4 : 8;  // columns per tile
  static constexpr int kMaxDim = kLatent ? kMaxLatentDim : kMaxHeadDim;

  const uint8_t* keys;
  const uint8_t* values;
  const uint16_t* key_scales;    // [scale_rows, K, D], at this head
  const uint16_t* value_scales;  // [scale_rows, K, S], at this head
  PageLayout layout;

  __device__ PageTokens(const uint8_t* page, int head, const PageLayout& layout) : layout(layout) {
    const int64_t head_bytes = layout.RowBytes() * layout.page_size;
    keys = page + head * head_bytes;
    values = page + layout.ValueOffset() + head * head_bytes;
    key_scales =
        reinterpret_cast<const uint16_t*>(page + layout.KeyScaleOffset()) + head * layout.head_dim;
    value_scales = reinterpret_cast<const uint16_t*>(page + layout.ValueScaleOffset()) +
                   head * layout.page_size;
  }

  // Element before its scale.
  __device__ float Raw(const uint8_t* data, int token, int d) const {
    const uint8_t* row = data + token * layout.RowBytes();
    if constexpr (kElement == Element::kFloat32) {
      return reinterpret_cast<const float*>(row)[d];
    } else if constexpr (kElement == Element::kBFloat16) {
      return BFloat16ToFloat(reinterpret_cast<const uint16_t*>(row)[d]);
    } else if constexpr (kElement == Element::kFloat16) {
      return HalfToFloat(reinterpret_cast<const uint16_t*>(row)[d]);
    } else if constexpr (kElement == Element::kFp8) {
      return E4M3ToFloat(row[d]);
    } else {
      constexpr int kBits = ElementBits(kElement);
      const int row_bytes = static_cast<int>(layout.RowBytes());
      const int code = d / row_bytes;  // a byte's channels are row_bytes apart
      return static_cast<float>(row[d - code * row_bytes] >> (kBits * code) & ((1 << kBits) - 1));
    }
  }
  // minimum_at: from the scale to the minimum.
  __device__ static float Decode(float stored, const uint16_t* scale, int64_t minimum_at) {
    if constexpr (ScaleRows(kElement) > 0) stored *= HalfToFloat(scale[0]);
    if constexpr (ScaleRows(kElement) > 1) stored += HalfToFloat(scale[minimum_at]);
    return stored;
  }

  __device__ void Keys(int token, int d, float (&out)[kKeyWidth]) const {
#pragma unroll
    for (int i = 0; i < kKeyWidth; ++i) {
      out[i] = d + i < layout.head_dim ? Key(token, d + i) : 0.0f;
    }
  }
  __device__ float Key(int token, int d) const {
    return Decode(Raw(keys, token, d), key_scales + d,
                  int64_t{layout.num_kv_heads} * layout.head_dim);
  }
  __device__ float Value(int token, int d) const {
    if constexpr (kLatent) return Key(token, d);
    return Decode(Raw(values, token, d), value_scales + token,
                  int64_t{layout.num_kv_heads} * layout.page_size);
  }
};

// The codes of one row of packed pages, in the planes of a byte's channels that layout.h has.
class PackedRow {
 public:
  __device__ PackedRow(const uint8_t* row, int bits, int dim) : row_(row), bits_(bits), dim_(dim) {}

  // kCount codes from channel d on, as far as there are channels.
  template <int kCount>
  __device__ void Codes(int d, int (&out)[kCount]) const {
    const int low_bits = bits_ == 3 ? 2 : bits_;
    Plane<kCount>(row_, low_bits, d, out);
    if (bits_ != 3) return;
    int high[kCount];
    Plane<kCount>(row_ + dim_ / 4, 1, d, high);
#pragma unroll
    for (int i = 0; i < kCount; ++i) out[i] |= high[i] << 2;
  }

 private:
  template <int kCount>
  __device__ void Plane(const uint8_t* plane, int bits, int d, int (&out)[kCount]) const {
    const int width = dim_ * bits / 8;  // a byte's channels are so far apart
    int piece = d / width, at = d - piece * width;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      out[i] = d + i < dim_ ? plane[at] >> (bits * piece) & ((1 << bits) - 1) : 0;
      if (++at == width) {
        at = 0;
        ++piece;
      }
    }
  }

  const uint8_t* row_;
  int bits_, dim_;
};

// One KV head of a packed page.
struct PackedTokens {
  static constexpr int kRows = 8;
  static constexpr int kMaxDim = kMaxHeadDim;
  const uint8_t* keys;
  const uint8_t* values;
  const uint8_t* key_scales;    // [2, K, D] of ScaleBytes, at this head
  const uint8_t* value_scales;  // [2, K, S], at this head
  PageLayout layout;

  __device__ PackedTokens(const uint8_t* page, int head, const PageLayout& layout)
      : layout(layout) {
    const int64_t row = int64_t{head} * layout.page_size, scale = layout.ScaleBytes();
    keys = page + row * layout.RowBytes();
    values = page + layout.ValueOffset() + row * layout.ValueRowBytes();
    key_scales = page + layout.KeyScaleOffset() + scale * head * layout.head_dim;
    value_scales = page + layout.ValueScaleOffset() + scale * row;
  }

  // The i-th of a head's `size` scales, applied; the minima of all heads follow the scales.
  __device__ float Decode(int code, const uint8_t* scales, int size, int i) const {
    const int minimum_at = layout.num_kv_heads * size + i;
    const float x = static_cast<float>(code);
    if (layout.byte_scales != 0) {
      const float minimum = static_cast<float>(static_cast<int8_t>(scales[minimum_at])) * 0.25f;
      return (x + minimum) * Exp2(scales[i] * 0.125f - 24.0f);
    }
    const uint16_t* halves = reinterpret_cast<const uint16_t*>(scales);
    return x * HalfToFloat(halves[i]) + HalfToFloat(halves[minimum_at]);
  }

  __device__ void Keys(int token, int d, float (&out)[kKeyWidth]) const {
    const PackedRow row(keys + token * layout.RowBytes(), layout.key_bits, layout.head_dim);
    int codes[kKeyWidth];
    row.Codes(d, codes);
#pragma unroll
    for (int i = 0; i < kKeyWidth; ++i) {
      out[i] =
          d + i < layout.head_dim ? Decode(codes[i], key_scales, layout.head_dim, d + i) : 0.0f;
    }
  }
  __device__ float Value(int token, int d) const {
    const PackedRow row(values + token * layout.ValueRowBytes(), layout.value_bits,
                        layout.head_dim);
    int code[1];
    row.Codes(d, code);
    return Decode(code[0], value_scales, layout.page_size, token);
  }
};

template <typename Tokens>
__global__ void __launch_bounds__(kDecodeThreads, 2)
    DecodeGenericKernel(const DecodeLaunch launch) {
  constexpr int kRows = Tokens::kRows;
  const DecodeAttentionParams& p = launch.params;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int head_dim = p.layout.head_dim, padded_dim = PaddedDim(head_dim),
            value_dim = p.layout.ValueDim(), page_size = p.layout.page_size;
  const DecodeBlock block(p, kRows);
  const int columns = block.Columns(kRows);

  block.ClearPageLse(p, columns);
  float* query = reinterpret_cast<float*>(DynamicShared());  // [kRows, padded_dim]
  for (int i = threadIdx.x; i < kRows * padded_dim; i += kDecodeThreads) {
    const int column = i / padded_dim, d = i - column * padded_dim;
    const bool there = column < columns && d < head_dim;
    query[i] =
        there ? LoadFloat(p.query, block.RowAndHead(p, column) * head_dim + d, p.dtype) : 0.0f;
  }
  __syncthreads();

  AttentionState<kRows, Tokens::kMaxDim> state;
  state.Clear();
  PageQueue queue(block, warp);
  const uint8_t* page;
  int position;
  while (queue.Next(block, p.slabs, &page, &position)) {
    const Tokens tokens(page, block.kv_head, p.layout);
    float page_max[kRows], page_sum[kRows];
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      page_max[j] = NegativeInfinity();
      page_sum[j] = 0.0f;
    }
    for (int first = 0; first < page_size; first += kWarpSize) {
      const int count = min(kWarpSize, page_size - first);
      float scores[kRows];
      ScoreTokens<kRows>(tokens, first, count, query, padded_dim, p.scale, scores);
      if (p.page_lse != nullptr) {
#pragma unroll
        for (int j = 0; j < kRows; ++j) {
          const float max = fmaxf(page_max[j], WarpMax(scores[j]));
          page_sum[j] = page_sum[j] * expf(page_max[j] - max) + expf(scores[j] - max);
          page_max[j] = max;
        }
      }
      if (p.out != nullptr) AttendTokens(tokens, first, count, value_dim, scores, &state);
    }
    if (p.page_lse != nullptr) {
#pragma unroll
      for (int j = 0; j < kRows; ++j) {
        const float lse = page_max[j] + logf(WarpSum(page_sum[j]));
        if (lane == 0 && j < columns)
          p.page_lse[block.RowAndHead(p, j) * p.lists.width + position] = lse;
      }
    }
  }
  if (p.out == nullptr) return;

  const WarpPartials partials(DynamicShared() + kRows * padded_dim * sizeof(float), kDecodeWarps,
                              kRows, value_dim);
  StoreWarp(state, warp, partials);
  __syncthreads();
  MergeWarps<kDecodeWarps>(
      partials, columns, [&](int j, int d, float x) { block.Out(launch, j, value_dim)[d] = x; },
      [&](int j, float lse) { *block.Lse(launch, j) = lse; });
}

template <typename Tokens>
void LaunchTokens(const DecodeLaunch& launch, cudaStream_t stream) {
  constexpr int kRows = Tokens::kRows;
  const PageLayout& layout = launch.params.layout;
  const int shared_bytes = kRows * PaddedDim(layout.head_dim) * static_cast<int>(sizeof(float)) +
                           WarpPartials::Bytes(kDecodeWarps, kRows, layout.ValueDim());
  Launch("decode_attention", DecodeGenericKernel<Tokens>, DecodeBlock::Grid(launch.params, kRows),
         kDecodeThreads, shared_bytes, stream, launch);
}

template <Element kElement>
void LaunchElement(const DecodeLaunch& launch, cudaStream_t stream) {
  if (launch.params.layout.latent_dim > 0) {
    LaunchTokens<PageTokens<kElement, true>>(launch, stream);
  } else {
    LaunchTokens<PageTokens<kElement, false>>(launch, stream);
  }
}

}  // namespace

void LaunchDecodeGeneric(const DecodeLaunch& launch, cudaStream_t stream) {
  if (launch.params.layout.Packed()) return LaunchTokens<PackedTokens>(launch, stream);
  switch (launch.params.layout.element) {
    case Element::kFloat32:
      return LaunchElement<Element::kFloat32>(launch, stream);
    case Element::kBFloat16:
      return LaunchElement<Element::kBFloat16>(launch, stream);
    case Element::kFloat16:
      return LaunchElement<Element::kFloat16>(launch, stream);
    case Element::kFp8:
      return LaunchElement<Element::kFp8>(launch, stream);
    case Element::kInt8:
      return LaunchElement<Element::kInt8>(launch, stream);
    case Element::kInt4:
      return LaunchElement<Element::kInt4>(launch, stream);
    case Element::kInt2:
      return LaunchElement<Element::kInt2>(launch, stream);
  }
}

}  // namespace pikv_ds
