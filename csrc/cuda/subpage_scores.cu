// Estimates of pages' log-sum-exps from their sub-pages. A lane takes the codes of 16 channels at a
// time, so a page's lanes read whole sectors. (32 channels of 4 bits would not fit into the
// registers.)
#include "summaries.cuh"

namespace pikv_ds {
namespace {

constexpr int kBlocks = 4;   // per processor; without a word ptxas keeps to 64 registers and spills
constexpr int kQueries = 4;  // per load of the codes

// kWidth bytes at once: 16, 8 or one.
template <int kWidth>
__device__ __forceinline__ void LoadCodes(const uint8_t* from, uint8_t (&out)[kWidth]) {
  if constexpr (kWidth == 1) {
    out[0] = *from;
  } else {
    struct alignas(kWidth) Words {
      uint32_t words[kWidth / 4];
    };
    const Words x = *reinterpret_cast<const Words*>(from);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) out[i] = static_cast<uint8_t>(x.words[i / 4] >> (8 * (i % 4)));
  }
}

template <int kBits, int kWidth>
__global__ void __launch_bounds__(kSummaryThreads, kBlocks)
    SubpageScoresKernel(const SubpageScoresParams p) {
  constexpr int kParts = 8 / kBits;  // channels in a byte
  constexpr float kMiddle = ((1 << kBits) - 1) / 2;
  const SummaryBlock block(p);
  const int64_t row = block.row, head = block.head, position = block.position;
  const int lane = block.lane, head_dim = block.head_dim, group = block.group;
  const int bytes = head_dim / kParts, count = static_cast<int>(p.num_subpages);
  const bool there = block.slot > 0;
  const bool any = AnyLane(there);  // the warp stays together for the shuffles below
  const uint8_t* page = p.summaries.Row(there ? block.slot : 0);
  const int64_t vectors = p.num_kv_heads * count;
  const uint16_t* scales = reinterpret_cast<const uint16_t*>(page + 2 * vectors * bytes);
  for (int first_query = 0; first_query < group; first_query += kQueries) {
    const float* queries = block.query + first_query * head_dim;
    const int num_queries = min(group - first_query, kQueries);
    float highest[kQueries], sums[kQueries];
#pragma unroll
    for (int j = 0; j < kQueries; ++j) {
      highest[j] = NegativeInfinity();
      sums[j] = 0.0f;
    }
    for (int sub = 0; any && sub < count; ++sub) {
      const int64_t vector = head * count + sub;
      const float centre_scale = there ? HalfToFloat(scales[vector]) : 0.0f;
      const float spread_scale = there ? HalfToFloat(scales[vectors + vector]) : 0.0f;
      const uint8_t* centres = page + vector * bytes;
      const uint8_t* spreads = page + (vectors + vector) * bytes;
      float scores[kQueries] = {};
      for (int b = lane * kWidth; there && b < bytes; b += kSummaryLanes * kWidth) {
        uint8_t centre[kWidth], spread[kWidth];
        LoadCodes<kWidth>(centres + b, centre);
        LoadCodes<kWidth>(spreads + b, spread);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
#pragma unroll
          for (int part = 0; part < kParts; ++part) {
            const int mask = (1 << kBits) - 1;
            const float c =
                (static_cast<float>(centre[i] >> (kBits * part) & mask) - kMiddle) * centre_scale;
            const float s = static_cast<float>(spread[i] >> (kBits * part) & mask) * spread_scale;
#pragma unroll
            for (int j = 0; j < kQueries; ++j) {
              if (j >= num_queries) break;
              const float q = queries[j * head_dim + part * bytes + b + i];
              scores[j] += q * c + fabsf(q) * s;
            }
          }
        }
      }
#pragma unroll
      for (int j = 0; j < kQueries; ++j) {
        const float score = SumOverPage(scores[j]) * p.scale;
        const float above = fmaxf(highest[j], score);
        sums[j] = sums[j] * expf(highest[j] - above) + expf(score - above);
        highest[j] = above;
      }
    }
    if (lane == 0 && position < p.table_width) {
      for (int j = 0; j < num_queries; ++j) {
        const int64_t at = row * p.num_heads + head * group + first_query + j;
        p.out[at * p.table_width + position] =
            there ? highest[j] + logf(sums[j]) : NegativeInfinity();
      }
    }
  }
}

template <int kBits, int kWidth>
void LaunchSubpageScores(const SubpageScoresParams& p, cudaStream_t stream) {
  Launch("subpage_scores", SubpageScoresKernel<kBits, kWidth>, SummaryBlock::Grid(p),
         kSummaryThreads, SummaryBlock::SharedBytes(p), stream, p);
}

}  // namespace

void SubpageScoresCuda(const SubpageScoresParams& params, cudaStream_t stream) {
  if (params.num_rows == 0 || params.table_width == 0) return;
  // Slabs are allocated at multiples of 16 bytes, as torch does; the rest follows from sizes.
  const int64_t vector_bytes = params.head_dim * params.bits / 8, width = 2 * params.bits;
  const bool wide = vector_bytes % width == 0 && params.summaries.row_bytes % width == 0;
  if (params.bits == 4) {
    wide ? LaunchSubpageScores<4, 8>(params, stream) : LaunchSubpageScores<4, 1>(params, stream);
  } else {
    wide ? LaunchSubpageScores<8, 16>(params, stream) : LaunchSubpageScores<8, 1>(params, stream);
  }
}

}  // namespace pikv_ds
