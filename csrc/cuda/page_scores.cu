// Upper bounds of pages' scores from their key bounds. A lane loads 16 bytes at a time, so a page's
// lanes read whole 128-byte lines.
#include "summaries.cuh"

namespace pikv_ds {
namespace {

constexpr int kQueries = 8;  // per load of the bounds

// kWidth channels of a bounds row as floats: 16 bytes at a time, or one element.
template <Dtype kDtype, int kWidth>
__device__ __forceinline__ void LoadBounds(const typename Stored<kDtype>::Type* from,
                                           float (&out)[kWidth]) {
  using T = typename Stored<kDtype>::Type;
  if constexpr (kWidth == 1) {
    out[0] = ToFloat<kDtype>(*from);
  } else {
    const Vector16 x = *reinterpret_cast<const Vector16*>(from);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      if constexpr (sizeof(T) == 4) {
        out[i] = BitsFloat(x.words[i]);
      } else {
        out[i] = ToFloat<kDtype>(static_cast<uint16_t>(x.words[i / 2] >> (16 * (i % 2))));
      }
    }
  }
}

template <Dtype kDtype, int kWidth>
__global__ void __launch_bounds__(kSummaryThreads) PageScoresKernel(const PageScoresParams p) {
  using T = typename Stored<kDtype>::Type;
  const SummaryBlock block(p);
  const int64_t row = block.row, head = block.head, position = block.position;
  const int lane = block.lane, head_dim = block.head_dim, group = block.group;
  const bool there = block.slot > 0;
  float best = NegativeInfinity();
  if (AnyLane(there)) {  // the warp stays together for the shuffles below
    const T* low =
        reinterpret_cast<const T*>(p.summaries.Row(there ? block.slot : 0)) + head * head_dim;
    const T* high = low + p.num_kv_heads * head_dim;
    for (int first_query = 0; first_query < group; first_query += kQueries) {
      const float* queries = block.query + first_query * head_dim;
      const int num_queries = min(group - first_query, kQueries);
      float scores[kQueries] = {};
      for (int d = lane * kWidth; there && d < head_dim; d += kSummaryLanes * kWidth) {
        float lows[kWidth], highs[kWidth];
        LoadBounds<kDtype, kWidth>(low + d, lows);
        LoadBounds<kDtype, kWidth>(high + d, highs);
#pragma unroll
        for (int j = 0; j < kQueries; ++j) {
          if (j >= num_queries) break;
#pragma unroll
          for (int i = 0; i < kWidth; ++i) {
            const float q = queries[j * head_dim + d + i];
            scores[j] += fmaxf(q, 0.0f) * highs[i] + fminf(q, 0.0f) * lows[i];
          }
        }
      }
#pragma unroll
      for (int j = 0; j < kQueries; ++j) {
        const float score = SumOverPage(scores[j]);
        if (j < num_queries) best = fmaxf(best, score);
      }
    }
  }
  if (lane == 0 && position < p.table_width) {
    p.out[(row * p.num_kv_heads + head) * p.table_width + position] =
        there ? best : NegativeInfinity();
  }
}

template <Dtype kDtype, int kWidth>
void LaunchPageScores(const PageScoresParams& p, cudaStream_t stream) {
  Launch("page_scores", PageScoresKernel<kDtype, kWidth>, SummaryBlock::Grid(p), kSummaryThreads,
         SummaryBlock::SharedBytes(p), stream, p);
}

}  // namespace

void PageScoresCuda(const PageScoresParams& params, cudaStream_t stream) {
  if (params.num_rows == 0 || params.table_width == 0) return;
  WithDtype(params.bounds_dtype, [&](auto dtype) {
    constexpr Dtype kDtype = decltype(dtype)::value;
    constexpr int kWidth = 16 / DtypeBytes(kDtype);
    // Slabs are allocated at multiples of 16 bytes, as torch does; the rest follows from sizes.
    if (params.head_dim % kWidth == 0 && params.summaries.row_bytes % 16 == 0) {
      LaunchPageScores<kDtype, kWidth>(params, stream);
    } else {
      LaunchPageScores<kDtype, 1>(params, stream);
    }
  });
}

}  // namespace pikv_ds
