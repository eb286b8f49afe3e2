// decode_attention on tensor cores (mma.m16n8k16, sm_80 and later).
//
// Each warp works by itself: it owns whole pages (decode.cuh), copies them asynchronously into a
// ring of its own in shared memory, a chunk of 16 or 32 tokens at a time, and keeps its own online
// softmax. There is no block-wide barrier until the warps' results are merged at the end.
//
// Scales are folded, never applied per element (KIVI's layout allows it: keys have one scale per
// channel and page, values one per token):
//   scores   q . (code * scale + minimum) = (q * scale) . code + q . minimum
//            q' = q * scale is formed once per page in float16; q . minimum is one more mma, with
//            the minima as each of 16 tokens, and starts the accumulators.
//   output   sum of p (code * scale + minimum) = sum of (p * scale) code + sum of p * minimum,
//            the last a number per query.
// Powers of two keep both within float16's range and precision, exactly: q is scaled to less than
// 1, so q' cannot exceed 65504, and the scores' factor takes it back; values' scales are divided by
// the power above the largest so far, so p * scale <= 1, and the output is rescaled where that
// grows, as it is where the softmax's maximum does.
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

// Dynamic shared memory of a block.
template <typename Shape, int kHeadDim, int kTiles>
struct TensorShared {
  static constexpr int kColumns = 8 * kTiles;
  // Queries in the order of fragments, [step][tile][lane], two registers each.
  static constexpr int kQueryBytes = Shape::kSteps * kTiles * kWarpSize * 8;
  static constexpr int kFactorsAt = kQueryBytes;  // [2, kColumns] floats: of q, of the scores
  static constexpr int kChunksAt = kFactorsAt + 2 * kColumns * 4;
  static constexpr int kRingAt =
      (kChunksAt + kDecodeWarps * Shape::kStages * static_cast<int>(sizeof(Chunk)) + 15) / 16 * 16;
  static constexpr int kRingBytes = kDecodeWarps * Shape::kStages * Shape::kStageBytes;
  // The merge of the warps reuses the ring.
  static constexpr int kMergeBytes = WarpPartials::Bytes(kDecodeWarps, kColumns, kHeadDim);
  static constexpr int kBytes = kRingAt + (kRingBytes > kMergeBytes ? kRingBytes : kMergeBytes);
};

// kBytes (2, 4, 8 or 16) from an aligned address, in words.
template <int kBytes>
__device__ __forceinline__ void LoadWords(const uint8_t* from, uint32_t* out) {
  if constexpr (kBytes == 16) {
    const Vector16 x = *reinterpret_cast<const Vector16*>(from);
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i] = x.words[i];
  } else if constexpr (kBytes == 8) {
    const uint64_t x = *reinterpret_cast<const uint64_t*>(from);
    out[0] = static_cast<uint32_t>(x);
    out[1] = static_cast<uint32_t>(x >> 32);
  } else if constexpr (kBytes == 4) {
    out[0] = *reinterpret_cast<const uint32_t*>(from);
  } else {
    out[0] = *reinterpret_cast<const uint16_t*>(from);
  }
}

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

// Scores of 16 tokens, keys in shared memory.
template <Element kElement, int kHeadDim, int kTiles>
__device__ __forceinline__ void ScoreTile(const uint8_t* keys,
                                          const uint32_t (&query)[kHeadDim / 16][kTiles][2],
                                          float (&scores)[kTiles][4]) {
  using F = Fragments<kElement, kHeadDim>;
  const int lane = threadIdx.x % kWarpSize;
  if constexpr (F::kCoded) {
    constexpr int kLoad = F::kKeyRun < 16 ? F::kKeyRun : 16;
    constexpr int kWords = kLoad / 4;
    const int g = lane / 4, c = lane % 4;
#pragma unroll
    for (int first = 0; first < F::kKeyWords; first += kWords) {
      uint32_t lower[kWords], upper[kWords];  // of tokens g and g + 8
      const uint8_t* from = keys + g * F::kKeyPitch + F::KeyByte(first, c);
      LoadWords<kLoad>(from, lower);
      LoadWords<kLoad>(from + 8 * F::kKeyPitch, upper);
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        ForEachCode<F::kCodes>([&](auto constant) {
          constexpr int kCode = decltype(constant)::value;
          const uint32_t a[4] = {
              DecodePair<kElement, 0, kCode>(lower[i]), DecodePair<kElement, 0, kCode>(upper[i]),
              DecodePair<kElement, 1, kCode>(lower[i]), DecodePair<kElement, 1, kCode>(upper[i])};
          const int step = (first + i) * F::kCodes + kCode;
#pragma unroll
          for (int tile = 0; tile < kTiles; ++tile)
            Mma<kElement>(scores[tile], a, query[step][tile]);
        });
      }
    }
  } else {
    // Matrix i of ldmatrix: tokens 8 (i % 2).., channels 8 (i / 2)...
    const uint8_t* from = keys + lane % 16 * F::kKeyPitch + lane / 16 * 16;
#pragma unroll
    for (int step = 0; step < F::kSteps; ++step) {
      uint32_t a[4];
      LoadMatrices(a, from + step * 32);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) Mma<kElement>(scores[tile], a, query[step][tile]);
    }
  }
}

// Adds 16 tokens' weighted values to the output.
template <Element kElement, int kHeadDim, int kTiles>
__device__ __forceinline__ void AttendTile(const uint8_t* values,
                                           const uint32_t (&weights)[kTiles][2],
                                           float (&out)[kHeadDim / 16][kTiles][4]) {
  using F = Fragments<kElement, kHeadDim>;
  const int lane = threadIdx.x % kWarpSize;
  if constexpr (F::kCoded) {
    constexpr int kLoad = F::kValueRun;
    constexpr int kWords = kLoad < 4 ? 1 : kLoad / 4;
    const int g = lane / 4, c = lane % 4;
#pragma unroll
    for (int first = 0; first < F::kValueUnits; first += kLoad / 2) {
      uint32_t loaded[4][kWords];  // of tokens 2c, 2c + 1, 2c + 8 and 2c + 9
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = 2 * c + i % 2 + 8 * (i / 2);
        LoadWords<kLoad>(values + token * F::kValuePitch + F::ValueByte(first, g), loaded[i]);
      }
#pragma unroll
      for (int unit = 0; unit < kLoad / 2; ++unit) {
        const uint32_t selector = unit % 2 == 0 ? 0x5410 : 0x7632;  // low or high halves of both
        const uint32_t early = BytePermute(loaded[0][unit / 2], loaded[1][unit / 2], selector);
        const uint32_t late = BytePermute(loaded[2][unit / 2], loaded[3][unit / 2], selector);
        ForEachCode<F::kCodes>([&](auto constant) {
          constexpr int kCode = decltype(constant)::value;
          const uint32_t a[4] = {
              DecodePair<kElement, 0, kCode>(early), DecodePair<kElement, 1, kCode>(early),
              DecodePair<kElement, 0, kCode>(late), DecodePair<kElement, 1, kCode>(late)};
          const int m_tile = (first + unit) * F::kCodes + kCode;
#pragma unroll
          for (int tile = 0; tile < kTiles; ++tile)
            Mma<kElement>(out[m_tile][tile], a, weights[tile]);
        });
      }
    }
  } else {
    // Matrix i of ldmatrix, transposed: channels 8 (i % 2).., tokens 8 (i / 2)...
    const uint8_t* from = values + (lane % 8 + lane / 16 * 8) * F::kValuePitch + lane / 8 % 2 * 16;
#pragma unroll
    for (int m_tile = 0; m_tile < F::kSteps; ++m_tile) {
      uint32_t a[4];
      LoadMatricesTransposed(a, from + m_tile * 32);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) Mma<kElement>(out[m_tile][tile], a, weights[tile]);
    }
  }
}

// Reductions over the tokens of a score fragment: over lanes with the same c.
__device__ __forceinline__ float MaxOverTokens(float x) {
#pragma unroll
  for (int mask = 4; mask < kWarpSize; mask *= 2) x = fmaxf(x, ShuffleXor(x, mask));
  return x;
}
__device__ __forceinline__ float SumOverTokens(float x) {
#pragma unroll
  for (int mask = 4; mask < kWarpSize; mask *= 2) x += ShuffleXor(x, mask);
  return x;
}

// The least e with |x| < 2^e, for x not subnormal, and 2^e; |e| < 127.
__device__ __forceinline__ int ExponentAbove(float x) {
  return static_cast<int>(FloatBits(x) >> 23 & 0xff) - 126;
}
__device__ __forceinline__ float PowerOfTwo(int e) {
  return BitsFloat(static_cast<uint32_t>(e + 127) << 23);
}

// The power of two, 0 to 15, that brings the largest of kCount float16 scales to about 1.
template <int kCount>
__device__ __forceinline__ int ScaleUp(const uint8_t* scales) {
  const int lane = threadIdx.x % kWarpSize;
  uint32_t words[4] = {};
  if (lane < kCount / 8) LoadWords<16>(scales + 16 * lane, words);
  uint32_t largest = MaxHalf2(MaxHalf2(words[0], words[1]), MaxHalf2(words[2], words[3]));
  largest = MaxHalf2(largest, largest >> 16);
#pragma unroll
  for (int mask = 1; mask < kCount / 8; mask *= 2) {
    largest = MaxHalf2(largest, ShuffleXor(largest, mask));
  }
  // float16's exponent is biased by 15. Lanes beyond kCount / 8 have not seen all scales.
  const int exponent = static_cast<int>(Shuffle(largest, 0) >> 10 & 0x1f);
  return min(max(14 - exponent, 0), 15);
}

// Puts the queries into shared memory in the order of fragments. Coded elements: as float16, times
// a power of two per column. Then the factors by which score fragments must be multiplied, which
// make them scores in units of log 2.
template <Element kElement, int kHeadDim, int kTiles, typename Shared>
__device__ __forceinline__ void StageQueries(const DecodeAttentionParams& p,
                                             const DecodeBlock& block, int columns,
                                             uint8_t* shared) {
  using F = Fragments<kElement, kHeadDim>;
  constexpr int kColumns = Shared::kColumns;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  float* query_factors = reinterpret_cast<float*>(shared + Shared::kFactorsAt);
  float* score_factors = query_factors + kColumns;
  const auto load = [&](int column, int d) {
    return LoadFloat(p.query, block.RowAndHead(p, column) * kHeadDim + d, p.dtype);
  };
  for (int column = warp; column < kColumns; column += kDecodeWarps) {
    int exponent = 0;
    if constexpr (F::kCoded) {
      float max = 0.0f;
      if (column < columns) {
        for (int d = lane; d < kHeadDim; d += kWarpSize) max = fmaxf(max, fabsf(load(column, d)));
      }
      max = WarpMax(max);
      if (max > 0.0f) exponent = min(ExponentAbove(max), 126);
    }
    if (lane == 0) {
      query_factors[column] = PowerOfTwo(-exponent);
      score_factors[column] = p.scale * kLog2e * kDecodeFactor<kElement> * PowerOfTwo(exponent);
    }
  }
  __syncthreads();

  uint32_t* fragments = reinterpret_cast<uint32_t*>(shared);
  for (int i = threadIdx.x; i < F::kSteps * kTiles * kWarpSize; i += kDecodeThreads) {
    const int at = i % kWarpSize, tile = i / kWarpSize % kTiles, step = i / (kWarpSize * kTiles);
    const int column = tile * 8 + at / 4;  // b fragments: lane (g, c) has column g
    float q[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    if (column < columns) {
#pragma unroll
      for (int j = 0; j < 4; ++j)
        q[j] = load(column, F::KeyChannel(step, at % 4, j)) * query_factors[column];
    }
    fragments[2 * i] = Pack<kElement>(q[0], q[1]);
    fragments[2 * i + 1] = Pack<kElement>(q[2], q[3]);
  }
}

template <Element kElement, int kHeadDim, int kTiles>
__global__ void __launch_bounds__(kDecodeThreads, 1) DecodeTensorKernel(const DecodeLaunch launch) {
  using Shape = TensorShape<kElement, kHeadDim>;
  using Shared = TensorShared<Shape, kHeadDim, kTiles>;
  constexpr int kColumns = Shared::kColumns, kSteps = Shape::kSteps;
  const DecodeAttentionParams& p = launch.params;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int g = lane / 4, c = lane % 4;
  const int page_size = p.layout.page_size;
  const DecodeBlock block(p, kColumns);
  const int columns = block.Columns(kColumns);

  uint8_t* shared = DynamicShared();
  uint8_t* ring = shared + Shared::kRingAt + warp * (Shape::kStages * Shape::kStageBytes);
  Chunk* chunks = reinterpret_cast<Chunk*>(shared + Shared::kChunksAt) + warp * Shape::kStages;
  block.ClearPageLse(p, columns);
  StageQueries<kElement, kHeadDim, kTiles, Shared>(p, block, columns, shared);
  if (page_size % 16 != 0) {
    // Pages of 8 tokens fill half of a tile. The other half must hold numbers: it gets weight 0.
    for (int i = threadIdx.x * 4; i < Shared::kRingBytes; i += kDecodeThreads * 4) {
      *reinterpret_cast<uint32_t*>(shared + Shared::kRingAt + i) = 0;
    }
  }
  __syncthreads();

  // This lane's columns are 8 * tile + 2c and + 1, index [tile][0 and 1].
  float factor[kTiles][2], running_max[kTiles][2], sum[kTiles][2], minimum_sum[kTiles][2];
  float page_max[kTiles][2], page_sum[kTiles][2];
  float page_factor[kTiles][2];  // of the page's scores
  float base[kTiles][2];         // q . minimum of the page, or 0, in units of 1 / page_factor
  float out[kSteps][kTiles][4];  // in units of 2^value_exponent
  int value_exponent = -24;      // 2^-24 is the smallest float16
  uint32_t query[kSteps][kTiles][2];
  const uint64_t* query_fragments = reinterpret_cast<const uint64_t*>(shared);
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      factor[tile][j] = reinterpret_cast<const float*>(
          shared + Shared::kFactorsAt)[kColumns + tile * 8 + 2 * c + j];
      page_factor[tile][j] = factor[tile][j];
      running_max[tile][j] = page_max[tile][j] = NegativeInfinity();
      sum[tile][j] = minimum_sum[tile][j] = page_sum[tile][j] = base[tile][j] = 0.0f;
    }
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const uint64_t q = query_fragments[(step * kTiles + tile) * kWarpSize + lane];
      query[step][tile][0] = static_cast<uint32_t>(q);
      query[step][tile][1] = static_cast<uint32_t>(q >> 32);
#pragma unroll
      for (int i = 0; i < 4; ++i) out[step][tile][i] = 0.0f;
    }
  }

  ChunkSource<kElement, kHeadDim> source(p, block, warp);
#pragma unroll 1
  for (int i = 0; i < Shape::kStages - 1; ++i) {
    source.Issue(p, block, ring + i * Shape::kStageBytes, chunks + i);
  }

  for (int current = 0;; current = current + 1 == Shape::kStages ? 0 : current + 1) {
    CopyAsyncWait<Shape::kStages - 2>();
    __syncwarp();  // all lanes' copies are there, and all have read the stage that is filled next
    const Chunk chunk = chunks[current];
    if (chunk.position < 0) break;
    const int next = current == 0 ? Shape::kStages - 1 : current - 1;
    source.Issue(p, block, ring + next * Shape::kStageBytes, chunks + next);
    const uint8_t* stage = ring + current * Shape::kStageBytes;
    const int tokens = min(Shape::kChunkTokens, page_size - chunk.index * Shape::kChunkTokens);

    if (chunk.index == 0) {
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          page_max[tile][j] = NegativeInfinity();
          page_sum[tile][j] = 0.0f;
        }
      }
      if constexpr (Shape::kScaleRows > 0) {
        // q' = q * scale, and q . minimum with the minima as every row of `a`.
        const uint8_t* scales = stage + Shape::kKeyScalesAt;
        const int scale_up = ScaleUp<kHeadDim>(scales);
        const uint32_t scale_factor =
            static_cast<uint32_t>(15 + scale_up) << 10 | static_cast<uint32_t>(15 + scale_up) << 26;
        float dot[kTiles][4] = {};
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          // A lane's four channels are contiguous, in the order 0, 2, 1, 3 of KeyChannel.
          const int channel = Shape::KeyChannel(step, c, 0);
          const auto load = [&](const uint8_t* row, uint32_t* even, uint32_t* odd) {
            uint32_t words[2];
            LoadWords<8>(row + 2 * channel, words);
            *even = BytePermute(words[0], words[1], 0x5410);
            *odd = BytePermute(words[0], words[1], 0x7632);
          };
          uint32_t even, odd;
          load(scales, &even, &odd);
          even = MulHalf2(even, scale_factor);
          odd = MulHalf2(odd, scale_factor);
          uint32_t minima[4] = {};
          if constexpr (Shape::kScaleRows > 1) {
            load(scales + 2 * kHeadDim, &minima[0], &minima[2]);
            minima[1] = minima[0];
            minima[3] = minima[2];
          }
#pragma unroll
          for (int tile = 0; tile < kTiles; ++tile) {
            const uint64_t bits = query_fragments[(step * kTiles + tile) * kWarpSize + lane];
            const uint32_t q[2] = {static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32)};
            if constexpr (Shape::kScaleRows > 1) Mma<kElement>(dot[tile], minima, q);
            query[step][tile][0] = MulHalf2(q[0], even);
            query[step][tile][1] = MulHalf2(q[1], odd);
          }
        }
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            base[tile][j] = dot[tile][j] * PowerOfTwo(scale_up);
            page_factor[tile][j] = factor[tile][j] * PowerOfTwo(-scale_up);
          }
        }
      }
    }

    // Scores, in units of log 2; tokens that are not there get -inf.
    float scores[Shape::kChunkTiles][kTiles][4];
    float chunk_max[kTiles][2];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
      chunk_max[tile][0] = chunk_max[tile][1] = NegativeInfinity();
#pragma unroll
    for (int t = 0; t < Shape::kChunkTiles; ++t) {
      const bool there = t * 16 < tokens;  // the same for the whole warp
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int i = 0; i < 4; ++i) scores[t][tile][i] = base[tile][i % 2];
      }
      if (there)
        ScoreTile<kElement, kHeadDim, kTiles>(stage + t * 16 * Shape::kKeyPitch, query, scores[t]);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int token = t * 16 + g + 8 * (i / 2);
          scores[t][tile][i] =
              token < tokens ? scores[t][tile][i] * page_factor[tile][i % 2] : NegativeInfinity();
          chunk_max[tile][i % 2] = fmaxf(chunk_max[tile][i % 2], scores[t][tile][i]);
        }
      }
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int j = 0; j < 2; ++j) chunk_max[tile][j] = MaxOverTokens(chunk_max[tile][j]);
    }

    if (p.page_lse != nullptr) {
      // The page's own maximum: with the running one, a page far below it would come out as -inf.
      const bool last = (chunk.index + 1) * Shape::kChunkTokens >= page_size;
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const float new_max = fmaxf(page_max[tile][j], chunk_max[tile][j]);
          page_sum[tile][j] *= Exp2(page_max[tile][j] - new_max);
          page_max[tile][j] = new_max;
#pragma unroll
          for (int t = 0; t < Shape::kChunkTiles; ++t) {
            page_sum[tile][j] +=
                Exp2(scores[t][tile][j] - new_max) + Exp2(scores[t][tile][j + 2] - new_max);
          }
          if (!last) continue;
          const float total = SumOverTokens(page_sum[tile][j]);
          const int column = tile * 8 + 2 * c + j;
          if (g == 0 && column < columns) {
            p.page_lse[block.RowAndHead(p, column) * p.table_width + chunk.position] =
                (page_max[tile][j] + log2f(total)) * kLn2;
          }
        }
      }
    }
    if (p.out == nullptr) continue;

    // Scales and minima of tokens g and g + 8 of each tile.
    float scale[Shape::kChunkTiles][2], minimum[Shape::kChunkTiles][2];
    int exponent = value_exponent;
    if constexpr (Shape::kScaleRows > 0) {
      const auto* scales = reinterpret_cast<const uint16_t*>(stage + Shape::kValueScalesAt);
      float largest = 0.0f;
#pragma unroll
      for (int t = 0; t < Shape::kChunkTiles; ++t) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int token = t * 16 + g + 8 * i;
          const bool there = token < tokens;
          scale[t][i] = there ? HalfToFloat(scales[token]) : 0.0f;
          minimum[t][i] = Shape::kScaleRows > 1 && there
                              ? HalfToFloat(scales[Shape::kChunkTokens + token])
                              : 0.0f;
          largest = fmaxf(largest, scale[t][i]);
        }
      }
      exponent = max(exponent, ExponentAbove(MaxOverTokens(largest)));
    }

    // Online softmax. After the first pages the maximum rarely moves, and nothing is rescaled.
    bool moved = exponent > value_exponent;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int j = 0; j < 2; ++j) moved |= chunk_max[tile][j] > running_max[tile][j];
    }
    if (AnyLane(moved)) {
      const float unit = PowerOfTwo(value_exponent - exponent);
      value_exponent = exponent;
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const float new_max = fmaxf(running_max[tile][j], chunk_max[tile][j]);
          const float decay = Exp2(running_max[tile][j] - new_max);  // 2^-inf = 0 at first
          running_max[tile][j] = new_max;
          sum[tile][j] *= decay;
          minimum_sum[tile][j] *= decay;
#pragma unroll
          for (int m_tile = 0; m_tile < kSteps; ++m_tile) {
            out[m_tile][tile][j] *= decay * unit;
            out[m_tile][tile][j + 2] *= decay * unit;
          }
        }
      }
    }

#pragma unroll
    for (int t = 0; t < Shape::kChunkTiles; ++t) {
      if (t * 16 >= tokens) break;
      float factors[2];  // of the weights of tokens g and g + 8
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        factors[i] = Shape::kScaleRows > 0 ? scale[t][i] * PowerOfTwo(-value_exponent) : 1.0f;
      }
      uint32_t weights[kTiles][2];
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        float weight[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          weight[i] = Exp2(scores[t][tile][i] - running_max[tile][i % 2]);
          sum[tile][i % 2] += weight[i];
          if (Shape::kScaleRows > 1) minimum_sum[tile][i % 2] += weight[i] * minimum[t][i / 2];
        }
        // From tokens in rows to tokens in k.
        weights[tile][0] =
            TransposeMatrix(Pack<kElement>(weight[0] * factors[0], weight[1] * factors[0]));
        weights[tile][1] =
            TransposeMatrix(Pack<kElement>(weight[2] * factors[1], weight[3] * factors[1]));
      }
      AttendTile<kElement, kHeadDim, kTiles>(stage + Shape::kValuesAt + t * 16 * Shape::kValuePitch,
                                             weights, out);
    }
  }
  if (p.out == nullptr) return;

  __syncthreads();  // all warps are done with their rings
  const float unit =
      kDecodeFactor<kElement> * (Shape::kScaleRows > 0 ? PowerOfTwo(value_exponent) : 1.0f);
  const WarpPartials partials(shared + Shared::kRingAt, kDecodeWarps, kColumns, kHeadDim);
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int at = warp * kColumns + tile * 8 + 2 * c + j;
      const float total = SumOverTokens(sum[tile][j]), shift = SumOverTokens(minimum_sum[tile][j]);
#pragma unroll
      for (int m_tile = 0; m_tile < kSteps; ++m_tile) {
#pragma unroll
        for (int upper = 0; upper < 2; ++upper) {
          partials.out[at * kHeadDim + Shape::ValueChannel(m_tile, g, upper)] =
              out[m_tile][tile][j + 2 * upper] * unit + shift;
        }
      }
      if (g == 0) {
        partials.max[at] = running_max[tile][j] * kLn2;
        partials.sum[at] = total;
      }
    }
  }
  __syncthreads();
  const int64_t split_row = block.split * p.num_rows * p.num_heads;
  MergeWarps<kDecodeWarps>(
      partials, columns,
      [&](int j, int d, float x) {
        launch.outs[(split_row + block.RowAndHead(p, j)) * kHeadDim + d] = x;
      },
      [&](int j, float lse) { launch.lses[split_row + block.RowAndHead(p, j)] = lse; });
}

template <Element kElement, int kHeadDim, int kTiles>
void LaunchTiles(const DecodeLaunch& launch, cudaStream_t stream) {
  using Shared = TensorShared<TensorShape<kElement, kHeadDim>, kHeadDim, kTiles>;
  Launch("decode_attention", DecodeTensorKernel<kElement, kHeadDim, kTiles>,
         DecodeBlock::Grid(launch.params, Shared::kColumns), kDecodeThreads, Shared::kBytes, stream,
         launch);
}

// 16 columns per tile where there are more than 8 and the accumulators have room, else 8.
template <Element kElement, int kHeadDim>
void LaunchHeadDim(const DecodeLaunch& launch, cudaStream_t stream) {
  if constexpr (TensorLayoutSupported(kElement, kHeadDim)) {
    const DecodeAttentionParams& p = launch.params;
    const int64_t columns = p.num_heads / p.layout.num_kv_heads * (p.num_rows / p.num_table_rows);
    if constexpr (kHeadDim <= 128) {
      if (columns > 8) return LaunchTiles<kElement, kHeadDim, 2>(launch, stream);
    }
    LaunchTiles<kElement, kHeadDim, 1>(launch, stream);
  }
}

template <Element kElement>
void LaunchDecodeTensor(const DecodeLaunch& launch, cudaStream_t stream) {
  switch (launch.params.layout.head_dim) {
    case 64:
      return LaunchHeadDim<kElement, 64>(launch, stream);
    case 80:
      return LaunchHeadDim<kElement, 80>(launch, stream);
    case 96:
      return LaunchHeadDim<kElement, 96>(launch, stream);
    case 128:
      return LaunchHeadDim<kElement, 128>(launch, stream);
    case 192:
      return LaunchHeadDim<kElement, 192>(launch, stream);
    case 256:
      return LaunchHeadDim<kElement, 256>(launch, stream);
  }
}

}  // namespace pikv_ds
