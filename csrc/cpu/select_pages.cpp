#include <algorithm>
#include <functional>
#include <limits>
#include <vector>

#include "../launch.h"

namespace pikv_ds {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Fewer scores than this are selected from faster by one thread than others are woken.
constexpr int64_t kParallelScores = int64_t{1} << 14;

struct Scratch {
  std::vector<float> scores, ordered;
};

void SelectOne(const SelectPagesParams& p, int64_t row, int64_t head, Scratch& scratch) {
  const int64_t width = p.table_width;
  const int32_t* table = p.table + row * width;
  const bool* pinned = p.pinned + row * width;
  const float* given = p.scores + (row * p.num_kv_heads + head) * width;
  int32_t* out = p.out + (row * p.num_kv_heads + head) * width;

  const int64_t count = p.counts[row];
  std::fill(out + count, out + width, 0);
  const int64_t num_pinned = std::count(pinned, pinned + count, true);
  const int64_t keep = std::clamp<int64_t>(p.budget[row], num_pinned, count);
  if (keep == count) {
    std::copy_n(table, count, out);
    return;
  }
  if (keep == 0) {
    std::fill_n(out, count, 0);
    return;
  }

  std::vector<float>& scores = scratch.scores;
  scores.resize(count);
  for (int64_t i = 0; i < count; ++i) {
    // A NaN, which callers promise not to pass, must not reach nth_element: it could leave the
    // array.
    scores[i] = pinned[i] ? kInfinity : given[i] > -kInfinity ? given[i] : -kInfinity;
  }
  scratch.ordered = scores;
  const auto last = scratch.ordered.begin() + keep - 1;
  std::nth_element(scratch.ordered.begin(), last, scratch.ordered.end(), std::greater<>());

  // What beats the last score kept is kept; of those that equal it, the first ones.
  const float threshold = *last;
  const auto beats = [threshold](float score) { return score > threshold; };
  int64_t ties = keep - std::count_if(scores.begin(), scores.end(), beats);
  for (int64_t i = 0; i < count; ++i) {
    const bool kept = beats(scores[i]) || (scores[i] == threshold && ties-- > 0);
    out[i] = kept ? table[i] : 0;
  }
}

}  // namespace

void SelectPagesCpu(const SelectPagesParams& params) {
  const int64_t num_lists = params.num_rows * params.num_kv_heads;
#pragma omp parallel if (num_lists * params.table_width >= kParallelScores)
  {
    Scratch scratch;
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < num_lists; ++i) {
      SelectOne(params, i / params.num_kv_heads, i % params.num_kv_heads, scratch);
    }
  }
}

}  // namespace pikv_ds
