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
#include "decode_chunks.cuh"
#include "decode_products.cuh"
#include "decode_queries.cuh"
#include "fragments.cuh"

namespace pikv_ds {

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
            p.page_lse[block.RowAndHead(p, column) * p.lists.width + chunk.position] =
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
  MergeWarps<kDecodeWarps>(
      partials, columns, [&](int j, int d, float x) { block.Out(launch, j, kHeadDim)[d] = x; },
      [&](int j, float lse) { *block.Lse(launch, j) = lse; });
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
