// One block per page, KV head and kind (keys or values): the head's elements are staged in shared
// memory, so the input is read once; then statistics, then codes, from there.
//
// The bytes are those of the reference: every operation that decides a bit is an IEEE one in the
// reference's order (Divide, Subtract, Multiply of device.cuh), which the compiler may not
// contract.
#include "seal_scales.cuh"

namespace pikv_ds {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarpSize;
// Largest head that is staged. Only float32 pages of 256 tokens x 256 channels are larger; they are
// read twice, the second time mostly from L2.
constexpr int kMaxStagedBytes = 128 * 1024;

// Writes to addresses that may not be aligned for the type.
template <typename T>
__device__ void Store(uint8_t* to, T x, bool aligned) {
  if (aligned) {
    *reinterpret_cast<T*>(to) = x;
    return;
  }
  const uint8_t* bytes = reinterpret_cast<const uint8_t*>(&x);
  for (int i = 0; i < static_cast<int>(sizeof(T)); ++i) to[i] = bytes[i];
}

// Copies S rows of row_bytes, rows `stride` bytes apart, to contiguous ones. Whole block.
template <typename T>
__device__ void CopyRows(uint8_t* to, const uint8_t* from, int64_t stride, int num_rows,
                         int row_bytes, bool aligned) {
  if (row_bytes % 16 == 0 && stride % 16 == 0 && Aligned16(from) && Aligned16(to)) {
    const int width = row_bytes / 16;
    for (int i = threadIdx.x; i < num_rows * width; i += kThreads) {
      const int row = i / width;
      reinterpret_cast<Vector16*>(to)[i] =
          *reinterpret_cast<const Vector16*>(from + row * stride + (i - row * width) * 16);
    }
    return;
  }
  const int width = row_bytes / static_cast<int>(sizeof(T));
  for (int i = threadIdx.x; i < num_rows * width; i += kThreads) {
    const int row = i / width;
    Store(to + i * sizeof(T),
          *reinterpret_cast<const T*>(from + row * stride + (i - row * width) * sizeof(T)),
          aligned);
  }
}

struct SealLaunch {
  bool staged;   // the head's elements fit into shared memory
  bool aligned;  // out and bounds may be written in words
};

// Dynamic shared memory: one Scale per channel (keys) or token (values), then the staged elements.
__host__ __device__ constexpr int NumScales(const PageLayout& layout) {
  return layout.head_dim > layout.page_size ? layout.head_dim : layout.page_size;
}
__host__ __device__ constexpr int ScaleBytes(const PageLayout& layout) {
  return static_cast<int>(PageLayout::Aligned(NumScales(layout) * int64_t{sizeof(Scale)}));
}

// kElement is an element with codes, or kFloat32 for any that is stored as it comes.
template <Dtype kDtype, Element kElement, bool kPacked>
__global__ void __launch_bounds__(kThreads, 8)
    SealPagesKernel(const SealPagesParams p, const SealLaunch launch) {
  using T = typename Stored<kDtype>::Type;
  constexpr bool kCoded = ScaleRows(kElement) > 0;
  const int64_t page = blockIdx.x;
  const int head = blockIdx.y;
  const bool is_keys = blockIdx.z == 0;
  PageLayout layout = p.layout;
  if (kCoded) layout.element = kElement;  // a constant, for the compiler
  if (!kPacked) layout.key_bits = 0;
  const int num_tokens = layout.page_size, num_channels = layout.head_dim;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;

  const int64_t* strides = is_keys ? p.key_strides : p.value_strides;
  const T* input =
      static_cast<const T*>(is_keys ? p.keys : p.values) + page * strides[0] + head * strides[1];
  int64_t stride = strides[2];
  uint8_t* out = p.out + page * p.out_stride;

  Scale* scales = reinterpret_cast<Scale*>(DynamicShared());
  if (launch.staged) {
    uint8_t* staged = DynamicShared() + ScaleBytes(layout);
    CopyRows<T>(staged, reinterpret_cast<const uint8_t*>(input), stride * sizeof(T), num_tokens,
                num_channels * sizeof(T), true);
    input = reinterpret_cast<const T*>(staged);
    stride = num_channels;
    __syncthreads();
  }

  // Statistics: keys per channel over the page's tokens, values per token over the channels. Of 0.0
  // and -0.0 either may be found as an extreme; its sum with 0.0 is 0.0.
  bool bad = false, beyond = false;
  const auto take = [&](float x, float* low, float* high) {
    *low = fminf(*low, x);
    *high = fmaxf(*high, x);
    bad |= !(fabsf(x) <= std::numeric_limits<float>::max());
  };
  const auto put_scale = [&](int i, int count, const PackedScale& s) {
    uint8_t* section = out + (is_keys ? layout.KeyScaleOffset() : layout.ValueScaleOffset());
    const int64_t at = int64_t{head} * count + i;
    const int64_t minimum_at = at + int64_t{layout.num_kv_heads} * count;
    scales[i] = s.scale;
    beyond |= !s.storable;
    if (kPacked && layout.byte_scales != 0) {
      section[at] = static_cast<uint8_t>(s.scale_byte);
      section[minimum_at] = static_cast<uint8_t>(s.minimum_byte);
      return;
    }
    Store(section + 2 * at, FloatToHalf(s.scale.scale), launch.aligned);
    if (ScaleRows(kElement) == 2) {
      Store(section + 2 * minimum_at, FloatToHalf(s.scale.minimum), launch.aligned);
    }
  };
  const int bits = is_keys ? layout.key_bits : layout.value_bits;  // of packed pages
  const float levels = static_cast<float>((1 << bits) - 1);
  const auto scale_of = [&](float low, float high, const auto& error) -> PackedScale {
    if constexpr (kPacked) {
      return BestScale(layout, levels, low, high, error);
    } else {
      const Scale scale = MakeScale<kElement>(low, high);
      return {scale, 0, 0, FitsHalf(scale)};
    }
  };
  if (is_keys) {
    for (int d = threadIdx.x; d < num_channels; d += kThreads) {
      float low = -NegativeInfinity(), high = NegativeInfinity();
      for (int s = 0; s < num_tokens; ++s)
        take(ToFloat<kDtype>(input[s * stride + d]), &low, &high);
      low = Add(low, 0.0f);
      high = Add(high, 0.0f);
      if constexpr (kCoded) {
        put_scale(d, num_channels, scale_of(low, high, [&](const Scale& s) {
                    float sum = 0.0f;
                    for (int token = 0; token < num_tokens; ++token) {
                      const float x = ToFloat<kDtype>(input[token * stride + d]);
                      sum = Add(sum, SquaredError(x, s, levels));
                    }
                    return sum;
                  }));
      }
      if (p.bounds != nullptr) {
        // Minima and maxima are elements of the input: converting them back loses nothing.
        const auto put_bound = [&](int which, float x) {
          T bits;
          if constexpr (kDtype == Dtype::kFloat32) {
            bits = x;
          } else {
            bits = kDtype == Dtype::kBFloat16 ? FloatToBFloat16(x) : FloatToHalf(x);
          }
          const int64_t i = (int64_t{which} * layout.num_kv_heads + head) * num_channels + d;
          Store(p.bounds + page * p.bounds_stride + i * sizeof(T), bits, launch.aligned);
        };
        put_bound(0, low);
        put_bound(1, high);
      }
    }
  } else {
    for (int s = warp; s < num_tokens; s += kWarps) {
      float low = -NegativeInfinity(), high = NegativeInfinity();
      for (int d = lane; d < num_channels; d += kWarpSize)
        take(ToFloat<kDtype>(input[s * stride + d]), &low, &high);
      low = Add(WarpMin(low), 0.0f);
      high = Add(WarpMax(high), 0.0f);
      if constexpr (kCoded) {
        // Both halves of the warp do the same.
        const PackedScale scale = scale_of(low, high, [&](const Scale& scale) {
          float sum = 0.0f;
          for (int d = lane % 16; d < num_channels; d += 16) {
            const float x = ToFloat<kDtype>(input[s * stride + d]);
            sum = Add(sum, SquaredError(x, scale, levels));
          }
#pragma unroll
          for (int mask = 8; mask > 0; mask /= 2) sum = Add(sum, ShuffleXor(sum, mask));
          return sum;
        });
        if (lane == 0) put_scale(s, num_tokens, scale);
      }
    }
  }
  bad = __syncthreads_or(bad);
  beyond = __syncthreads_or(beyond);
  if (threadIdx.x == 0 && (bad || beyond)) {
    atomicOr(p.flags + page / p.pages_per_flag, bad ? kNonFinite : kBeyondRange);
  }

  // Data. Also a barrier above: all scales are there.
  const int64_t head_bytes = (is_keys ? layout.RowBytes() : layout.ValueRowBytes()) * num_tokens;
  uint8_t* data = out + (is_keys ? 0 : layout.ValueOffset()) + head * head_bytes;
  if constexpr (!kCoded) {
    CopyRows<T>(data, reinterpret_cast<const uint8_t*>(input), stride * sizeof(T), num_tokens,
                num_channels * sizeof(T), launch.aligned);
  } else if constexpr (kPacked) {
    const int row_bytes = num_channels * bits / 8;
    for (int i = threadIdx.x; i < head_bytes; i += kThreads) {
      const int token = i / row_bytes;
      int at = i - token * row_bytes, plane_bits = bits, shift = 0;
      if (bits == 3) {  // the plane of the lower two, then that of the third
        plane_bits = at < num_channels / 4 ? 2 : 1;
        shift = plane_bits == 2 ? 0 : 2;
        at -= plane_bits == 2 ? 0 : num_channels / 4;
      }
      const int width = num_channels * plane_bits / 8;
      uint32_t byte = 0;
      for (int j = 0; j < 8 / plane_bits; ++j) {
        const int channel = at + j * width;
        const float x = ToFloat<kDtype>(input[token * stride + channel]);
        const auto code =
            static_cast<uint32_t>(Level(x, scales[is_keys ? channel : token], levels));
        byte |= (code >> shift & ((1u << plane_bits) - 1)) << (plane_bits * j);
      }
      data[i] = static_cast<uint8_t>(byte);
    }
  } else {
    // Four bytes per thread. Pages have a multiple of 8 tokens, so head_bytes is one of 4; but a
    // word may begin in one row and end in the next.
    constexpr int kBits = ElementBits(kElement);
    constexpr int kCodes = 8 / kBits;  // per byte
    const int row_bytes = static_cast<int>(layout.RowBytes());
    for (int i = threadIdx.x * 4; i < head_bytes; i += kThreads * 4) {
      int token = i / row_bytes;
      int d = i - token * row_bytes;
      uint32_t word = 0;
#pragma unroll
      for (int byte = 0; byte < 4; ++byte) {
#pragma unroll
        for (int code = 0; code < kCodes; ++code) {
          const int channel = d + code * row_bytes;  // a byte's channels are D / kCodes apart
          const float x = ToFloat<kDtype>(input[token * stride + channel]);
          word |= Encode<kElement>(x, scales[is_keys ? channel : token])
                  << (8 * byte + kBits * code);
        }
        if (++d == row_bytes) {
          d = 0;
          ++token;
        }
      }
      Store(data + i, word, launch.aligned);
    }
  }

  // Zeros between the sections: pages are compared and logged byte by byte.
  if (head == 0) {
    const auto pad = [&](int64_t begin, int64_t end) {
      if (begin + threadIdx.x < end) out[begin + threadIdx.x] = 0;
    };
    const int64_t scale_bytes = layout.ScaleBytes() * ScaleRows(kElement) * layout.num_kv_heads *
                                (is_keys ? num_channels : num_tokens);
    if (is_keys) {
      pad(layout.DataBytes(), layout.KeyScaleOffset());
      pad(layout.KeyScaleOffset() + scale_bytes, layout.ValueOffset());
    } else {
      pad(layout.ValueOffset() + head_bytes * layout.num_kv_heads, layout.ValueScaleOffset());
      pad(layout.ValueScaleOffset() + scale_bytes, layout.PageBytes());
    }
  }
}

template <Dtype kDtype, Element kElement, bool kPacked = false>
void LaunchSealPages(const SealPagesParams& p, cudaStream_t stream) {
  const int64_t elements = int64_t{p.layout.page_size} * p.layout.head_dim;
  const int64_t staged_bytes = elements * DtypeBytes(kDtype);
  SealLaunch launch;
  launch.staged = staged_bytes <= kMaxStagedBytes;
  launch.aligned = (reinterpret_cast<uintptr_t>(p.out) | p.out_stride |
                    reinterpret_cast<uintptr_t>(p.bounds) | p.bounds_stride) %
                       4 ==
                   0;
  const dim3 grid(p.num_pages, p.layout.num_kv_heads, p.layout.latent_dim > 0 ? 1 : 2);
  const int shared_bytes =
      ScaleBytes(p.layout) + static_cast<int>(launch.staged ? staged_bytes : 0);
  Launch("seal_pages", SealPagesKernel<kDtype, kElement, kPacked>, grid, kThreads, shared_bytes,
         stream, p, launch);
}

}  // namespace

void SealPagesCuda(const SealPagesParams& params, cudaStream_t stream) {
  if (params.num_pages == 0) return;
  WithDtype(params.dtype, [&](auto dtype) {
    constexpr Dtype kDtype = decltype(dtype)::value;
    if (params.layout.Packed())
      return LaunchSealPages<kDtype, Element::kInt8, true>(params, stream);
    switch (params.layout.element) {
      case Element::kFp8:
        return LaunchSealPages<kDtype, Element::kFp8>(params, stream);
      case Element::kInt8:
        return LaunchSealPages<kDtype, Element::kInt8>(params, stream);
      case Element::kInt4:
        return LaunchSealPages<kDtype, Element::kInt4>(params, stream);
      case Element::kInt2:
        return LaunchSealPages<kDtype, Element::kInt2>(params, stream);
      default:
        return LaunchSealPages<kDtype, Element::kFloat32>(params, stream);
    }
  });
}

}  // namespace pikv_ds
