#include <algorithm>
#include <limits>

#include "../launch.h"
#include "aligned_floats.h"

namespace pikv_ds {
namespace {

// Pages that are scored with one spread of the query; a multiple of all lanes.
constexpr int64_t kBlock = 64;
// Score of what is not there.
constexpr float kMissing = -std::numeric_limits<float>::infinity();

}  // namespace
}  // namespace pikv_ds

#define PIKV_KERNEL "subpage_scores_kernel.h"
#include "foreach_isa.h"

namespace pikv_ds {
namespace {

// Fewer than this are scored faster by one thread than others are woken.
constexpr int64_t kParallelElements = int64_t{1} << 17;

template <int kBits>
void Score(const SubpageScoresParams& params) {
  const int64_t width = params.table_width, bytes = params.head_dim * kBits / 8;
  const int64_t blocks = (width + kBlock - 1) / kBlock, num_units = params.num_rows * blocks;
  const int lanes = BestLanes(bytes);
  auto* const score = PIKV_BEST(lanes, ScoreBlock<kBits>);
  const int64_t group = params.num_heads / params.num_kv_heads;
  const int64_t vectors = params.num_rows * width * params.num_heads * params.num_subpages;
  const int64_t query_floats = 2 * (8 / kBits) * (bytes + kMaxLanes);
#pragma omp parallel if (vectors * params.head_dim >= kParallelElements)
  {
    AlignedFloats scratch(AlignedFloats::Padded(params.num_heads) +
                          params.num_heads * query_floats + group * params.num_subpages * kBlock);
#pragma omp for schedule(dynamic)
    for (int64_t unit = 0; unit < num_units; ++unit) {
      const int64_t row = unit / blocks, first = unit % blocks * kBlock;
      score(params, row, first, std::min(first + kBlock, width), scratch.data());
    }
  }
}

}  // namespace

void SubpageScoresCpu(const SubpageScoresParams& params) {
  params.bits == 4 ? Score<4>(params) : Score<8>(params);
}

}  // namespace pikv_ds
