// Online-softmax attention over blocks, written once for all instruction sets.
//
// Each instruction set's file includes this header and those it needs (attention_*.h) inside its
// target pragma, after the standard library's; everything is in an anonymous namespace, so that no
// two files share (and the linker mixes) a function's versions.
//
// Both products are brought to one form, C[row, place] = sum over k of A[row, k] * B[k, place]:
//
//            rows           k                      places
//   scores   query rows     channels               tokens of the block
//   output   query rows     tokens (weights in A)  channels
//
// A `Simd` has the vectors; it stands in the instruction set's file. An `Operand` decides what A
// and B are made of: float32 (attention_float.h), or bytes (attention_avx512.h) and bfloat16
// (attention_amx.cpp) for the dot-product instructions, which take 4 or 2 successive k from a
// 32-bit word. B is packed as [block of kLanes places][k / kGroup][kLanes] words. Scales never
// touch B: key scales go into the query and value scales into the weights, once per page and not
// per element; minima turn into one number per query row and page. Values that are the keys have
// scales per channel, which go into C. Where A is narrower than float32, a row of it is split into
// digits: several rows of A whose products are added up again in C.
#pragma once

#include <cstring>
#include <type_traits>
#include <utility>

#include "attention.h"
#include "attention_vectors.h"
#include "prefetcher.h"

namespace pikv_ds {
namespace {

#include "exp2.h"

// Shares of the next blocks that are asked for by the end of a phase; about the phases' times.
constexpr float kAfterPackKeys = 0.2f, kAfterScores = 0.45f, kAfterWeights = 0.75f;

// Attends one task. Memory for one thread is carved from its scratch at the start.
template <class Operand, bool kLatent>
class Attention {
  using Simd = typename Operand::Simd;
  using F = typename Simd::F;
  using I = typename Simd::I;
  using Code = typename Operand::Code;
  static constexpr int kLanes = Simd::kLanes;
  // Rows at a time: what they need in between fits the L1 cache.
  static constexpr int kRowStep = 16;
  static constexpr float kLog2E = 1.44269504088896340736f;
  static constexpr bool kValueScales = Code::kScales && !kLatent;  // per token
  static constexpr bool kValueMinima = Code::kMinima && !kLatent;
  static constexpr bool kPlaceScales = Code::kScales && kLatent;  // per channel
  // Of a row of a step; see Scores, RowWeights and FinishWeights.
  enum Factor { kUnitOfC, kOffset, kPeakScore, kSumWeights, kSumMinima, kLargest, kKeep, kTake };
  static constexpr int kFactors = 8;

 public:
  static void Attend(const AttendTask& task) { Attention(task).Run(); }

 private:
  explicit Attention(const AttendTask& task)
      : task_(task),
        head_dim_(task.head_dim),
        num_rows_(task.num_rows),
        num_heads_(task.end_head - task.first_head),
        query_digits_(Operand::QueryDigits(task.dtype)),
        weight_digits_(Operand::WeightDigits(task.dtype)),
        key_groups_(
            RoundUp((head_dim_ + Operand::kGroup - 1) / Operand::kGroup, Operand::kGroupMultiple)),
        places_(Operand::NumPlaces(head_dim_)),
        padded_dim_(key_groups_ * Operand::kGroup > RoundUp(head_dim_, kLanes)
                        ? key_groups_ * Operand::kGroup
                        : RoundUp(head_dim_, kLanes)),
        max_parts_(MaxParts(task)),
        padded_tokens_(RoundUp(max_parts_ * task.max_tokens, 64)),
        weight_groups_(padded_tokens_ / Operand::kGroup) {
    int64_t bytes = 0;
    Carve(nullptr, &bytes);
    uint8_t* memory = ThreadScratch(bytes);
    bytes = 0;
    Carve(memory, &bytes);
    if (Code::kScales) {  // A's padding must be zero
      std::memset(folded_, 0, Min(num_rows_, kRowStep) * padded_dim_ * sizeof(float));
    }
    if (kPlaceScales) {
      for (int n = 0; n < places_; ++n) place_channels_[n] = Operand::Channel(head_dim_, n);
    }
  }

  // Blocks of a stretch. One, where B would not fit the L1 cache, where something is asked for by
  // block, and where scales go into a block's sums.
  static int MaxParts(const AttendTask& task) {
    const bool apart =
        Operand::kGroup < 4 || task.page_lse != nullptr || task.first_limit >= 0 || kPlaceScales;
    return apart ? 1 : PartsOf(task.max_tokens);
  }

  // Sets the pointers into `memory` and counts what they need.
  void Carve(uint8_t* memory, int64_t* bytes) {
    const auto take = [&](auto*& pointer, int64_t count) {
      pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(memory + *bytes);
      *bytes += RoundUp<int64_t>(count * sizeof(*pointer), 64);
    };
    const int64_t step_rows = Min(num_rows_, kRowStep);
    take(query_, int64_t{num_heads_} * num_rows_ * padded_dim_);
    take(query_steps_, int64_t{num_heads_} * num_rows_);
    take(folded_, Code::kScales ? step_rows * padded_dim_ : 0);
    take(key_scales_, max_parts_ * padded_dim_);
    take(key_minima_, max_parts_ * padded_dim_);
    take(value_scales_, padded_tokens_);
    take(value_minima_, padded_tokens_);
    take(place_channels_, kPlaceScales ? places_ : 0);
    take(place_scales_, kPlaceScales ? places_ : 0);
    take(place_minima_, kPlaceScales ? places_ : 0);
    take(row_factors_, kFactors * step_rows);
    take(scores_, step_rows * padded_tokens_);
    take(query_a_, (Code::kScales ? ARows(kRowStep) : num_heads_ * ARows(num_rows_)) * key_groups_);
    take(weights_a_, ARows(kRowStep) * weight_groups_);
    take(c_, ARows(kRowStep) * Max(padded_tokens_, places_));
    take(keys_b_, Max(padded_tokens_ * key_groups_, places_ * weight_groups_));
    values_b_ = keys_b_;  // in one step of rows the keys have been used by then
    if (num_rows_ > kRowStep) take(values_b_, int64_t{places_} * weight_groups_);
  }

  // Rows of A and of C for so many query rows; a tile of 16 may reach beyond the last.
  int64_t ARows(int rows) const {
    return int64_t{Min(rows, num_rows_)} * Max(query_digits_, weight_digits_) + 15;
  }

  void Run() {
    Operand::Begin(Min(num_rows_, kRowStep) * Max(query_digits_, weight_digits_));
    for (int head = 0; head < num_heads_; ++head) StartHead(head);
    int64_t index = task_.first_block - max_parts_;
    int head = num_heads_ - 1;
    Stretch stretches[2], *stretch = &stretches[0], *next = &stretches[1];
    // The stretch after (index, head) that is not all holes; all heads of its pages, then the next.
    const auto advance = [&] {
      do {
        if (++head == num_heads_) {
          head = 0;
          index += max_parts_;
          if (index >= task_.end_block) return false;
        }
      } while (!Get(index, head, next));
      return true;
    };
    for (bool more = advance(); more;) {
      std::swap(stretch, next);
      more = advance();
      prefetcher_.Start();
      if (more) {
        for (int part = 0; part < next->num_parts; ++part) Prefetch(next->parts[part]);
      }
      AttendStretch(*stretch);
    }
    Operand::End();
  }

  // The blocks from an index on that are attended together, holes left out.
  struct Stretch {
    KvBlock parts[kMaxParts];
    int num_parts;
    int head;
    int64_t index;
  };

  bool Get(int64_t index, int head, Stretch* to) const {
    to->num_parts = 0;
    to->head = head;
    to->index = index;
    for (int64_t i = index; i < Min(index + max_parts_, task_.end_block); ++i) {
      to->num_parts += task_.blocks->Get(i, task_.first_head + head, &to->parts[to->num_parts]);
    }
    return to->num_parts > 0;
  }

  void Prefetch(const KvBlock& kv) {
    if (Code::kScales) Prefetcher::Now(kv.key_scales, 2 * head_dim_);
    if (Code::kMinima) Prefetcher::Now(kv.key_minima, 2 * head_dim_);
    if (kValueScales && !task_.keys_only) Prefetcher::Now(kv.value_scales, 2 * kv.num_tokens);
    if (kValueMinima && !task_.keys_only) Prefetcher::Now(kv.value_minima, 2 * kv.num_tokens);
    const int row_bytes = Code::RowBytes(head_dim_);
    if (kv.key_stride != row_bytes || kv.value_stride != row_bytes) return;
    prefetcher_.Add(kv.keys, task_.keys_only ? kv.keys : kv.values,
                    int64_t{kv.num_tokens} * row_bytes);
  }

  float* State(int head, int row) {
    return task_.state + (int64_t{head} * num_rows_ + row) * StateStride(places_);
  }

  void StartHead(int head) {
    for (int m = 0; m < num_rows_; ++m) {
      float* state = State(head, m);
      std::memset(state, 0, StateStride(places_) * sizeof(float));
      state[places_ + kPeak] = kMinusInfinity;
      float* query = query_ + (int64_t{head} * num_rows_ + m) * padded_dim_;
      LoadQuery(head, m, query);
      if constexpr (!Code::kScales) {
        query_steps_[head * num_rows_ + m] = SplitQuery(query, 0.0f, QueryA(head, m));
      }
    }
  }

  void LoadQuery(int head, int row, float* to) {
    const int64_t at = row / task_.group * task_.query_stride +
                       ((task_.first_head + head) * int64_t{task_.group} + row % task_.group) *
                           task_.query_head_stride;
    if (task_.dtype == Dtype::kFloat32) {
      std::memcpy(to, static_cast<const float*>(task_.query) + at, head_dim_ * sizeof(float));
    } else {
      const uint16_t* from = static_cast<const uint16_t*>(task_.query) + at;
      if (task_.dtype == Dtype::kFloat16) {
        LoadHalves(from, head_dim_, to);
      } else {
        for (int d = 0; d < head_dim_; ++d) to[d] = BitCast<float>(uint32_t{from[d]} << 16);
      }
    }
    for (int d = head_dim_; d < padded_dim_; ++d) to[d] = 0.0f;
  }

  // n float16 as float; fills up to a multiple of kLanes with zeros.
  static void LoadHalves(const uint16_t* from, int n, float* to) {
    for (int i = 0; i < n; i += kLanes) Store(to + i, Simd::LoadHalves(from + i, n - i));
  }

  // n scales or minima; fills up likewise.
  static void LoadScales(const KvBlock& kv, const void* from, int n, float* to) {
    if (!kv.float_scales) return LoadHalves(static_cast<const uint16_t*>(from), n, to);
    std::memcpy(to, from, n * sizeof(float));
    for (int i = n; i < RoundUp(n, kLanes); ++i) to[i] = 0.0f;
  }

  // Where A begins for a row: of all rows, or of those of a step if it changes from page to page.
  uint32_t* QueryA(int head, int row) {
    const int64_t a_row = Code::kScales ? row % kRowStep * query_digits_
                                        : head * ARows(num_rows_) + row * query_digits_;
    return query_a_ + a_row * key_groups_;
  }

  float SplitQuery(const float* query, float peak, uint32_t* a) {
    return Operand::Split(query, key_groups_ * Operand::kGroup, peak, query_digits_, a,
                          key_groups_);
  }

  void AttendStretch(const Stretch& kv) {
    const int part_tokens = Min(kv.parts[0].num_tokens, Visible(kv.index, num_rows_ - 1));
    const int num_tokens = kv.num_parts * part_tokens;
    if (num_tokens == 0) return;
    for (int part = 0; part < kv.num_parts; ++part) LoadPart(kv.parts[part], part, part_tokens);
    prefetcher_.Until(kAfterPackKeys);
    for (int first = 0; first < num_rows_; first += kRowStep) {
      const int num = Min(kRowStep, num_rows_ - first);
      Scores(first, num, part_tokens, kv);
      for (int m = 0; m < num; ++m) {
        RowWeights(first, m, num_tokens, kv);
        if (!task_.keys_only) FinishWeights(first, m, num_tokens, kv.head);
        prefetcher_.Until(Between(kAfterScores, kAfterWeights, first + m + 1, num_rows_));
      }
      if (task_.keys_only) continue;
      if (first == 0) PackValues(kv, part_tokens);
      Accumulate(first, num, num_tokens, kv.head);
    }
    prefetcher_.Until(1.0f);
  }

  // Keys of a part as B, and its scales.
  void LoadPart(const KvBlock& kv, int part, int num_tokens) {
    if (Code::kScales) {
      float *scales = key_scales_ + part * padded_dim_, *minima = key_minima_ + part * padded_dim_;
      LoadScales(kv, kv.key_scales, head_dim_, scales);
      if (Code::kMinima) LoadScales(kv, kv.key_minima, head_dim_, minima);
      if (kPlaceScales && !task_.keys_only) PlaceScales();
    }
    if (!task_.keys_only && kValueScales) {
      const int at = part * num_tokens;
      LoadScales(kv, kv.value_scales, num_tokens, value_scales_ + at);
      if (kValueMinima) LoadScales(kv, kv.value_minima, num_tokens, value_minima_ + at);
    }
    uint32_t* b = keys_b_ + int64_t{part} * num_tokens * key_groups_;
    for (int token = 0; token < num_tokens; token += kLanes) {
      Operand::PackKeys(
          TokenRows<Simd>(kv.keys + token * kv.key_stride, kv.key_stride, num_tokens - token),
          head_dim_, key_groups_, b + token * key_groups_);
      prefetcher_.Until(Between(0.0f, kAfterPackKeys, part * num_tokens + token + kLanes,
                                max_parts_ * num_tokens));
    }
  }

  // Scales and minima of the keys' channels in the accumulators' order; 0 in gaps.
  void PlaceScales() {
    for (int n = 0; n < places_; ++n) {
      const int channel = place_channels_[n];
      place_scales_[n] = channel < 0 ? 0.0f : key_scales_[channel];
      place_minima_[n] = channel < 0 || !Code::kMinima ? 0.0f : key_minima_[channel];
    }
  }

  static PIKV_INLINE float Between(float begin, float end, int done, int all) {
    return begin + (end - begin) * static_cast<float>(done) / static_cast<float>(all);
  }

  // How many of a block's tokens a row sees, at least 0 and possibly more than there are.
  int Visible(int64_t index, int row) const {
    if (task_.first_limit < 0) return task_.max_tokens;
    const int64_t limit = task_.first_limit + row / task_.group - index * task_.max_tokens;
    return static_cast<int>(Min<int64_t>(Max<int64_t>(limit, 0), task_.max_tokens));
  }

  // Words per place in B for the values of so many tokens.
  static int ValueGroups(int num_tokens) {
    return RoundUp((num_tokens + Operand::kGroup - 1) / Operand::kGroup, Operand::kGroupMultiple);
  }

  void PackValues(const Stretch& kv, int part_tokens) {
    const int num_tokens = kv.num_parts * part_tokens, groups = ValueGroups(num_tokens);
    for (int token = 0; token < groups * Operand::kGroup; token += 16) {
      const int part = Min(token / part_tokens, kv.num_parts - 1);
      const KvBlock& from = kv.parts[part];
      Operand::PackValues(from.values + (token - part * part_tokens) * from.value_stride,
                          from.value_stride, Min(16, num_tokens - token), head_dim_, groups,
                          values_b_ + token / Operand::kGroup * kLanes);
      prefetcher_.Until(Between(kAfterWeights, 1.0f, token, num_tokens));
    }
  }

  // The scores (log2) of some rows from `first` on, and the largest of each in row_factors.
  void Scores(int first, int num, int part_tokens, const Stretch& kv) {
    const float scale = task_.scale * kLog2E;
    for (int m = 0; m < num; ++m) {
      float* factors = row_factors_ + kFactors * m;
      factors[kPeakScore] = kMinusInfinity;
      factors[kUnitOfC] =
          Code::kScales ? 0.0f : query_steps_[kv.head * num_rows_ + first + m] * scale;
      factors[kOffset] = 0.0f;
    }
    // Without scales there is one A for all parts.
    const int num_products = Code::kScales ? kv.num_parts : 1;
    const int num_tokens = Code::kScales ? part_tokens : kv.num_parts * part_tokens;
    for (int part = 0; part < num_products; ++part) {
      if (Code::kScales) FoldQueries(kv.head, first, num, part, scale);
      prefetcher_.Until(Between(kAfterPackKeys, kAfterScores, first + num, num_rows_));
      Operand::Multiply(QueryA(kv.head, first), key_groups_, num * query_digits_,
                        keys_b_ + int64_t{part} * num_tokens * key_groups_, key_groups_,
                        (num_tokens + kLanes - 1) / kLanes, c_, padded_tokens_);
      for (int m = 0; m < num; ++m) {
        const int visible = Min(num_tokens, Visible(kv.index, first + m) * kv.num_parts);
        float* scores = scores_ + int64_t{m} * padded_tokens_ + part * num_tokens;
        const float* c = c_ + int64_t{m} * query_digits_ * padded_tokens_;
        float* factors = row_factors_ + kFactors * m;
        F peaks = F{} + kMinusInfinity;
        for (int t = 0; t < visible; t += kLanes) {
          F score = Operand::Combine(c + t, padded_tokens_, query_digits_) * factors[kUnitOfC] +
                    factors[kOffset];
          if (t + kLanes > visible) score = Simd::Keep(score, visible - t, kMinusInfinity);
          Store(scores + t, score);
          peaks = Simd::Max(peaks, score);
        }
        factors[kPeakScore] = Max(factors[kPeakScore], Simd::ReduceMax(peaks));
      }
    }
  }

  // A = query * key scales of a part for the rows of a step; in row_factors the value of a unit of
  // C and query . key minima, both times `scale`. In two passes, so that no row waits for the
  // horizontal sums of the one before it.
  void FoldQueries(int head, int first, int num, int part, float scale) {
    const float* scales = key_scales_ + part * padded_dim_;
    const float* minima = key_minima_ + part * padded_dim_;
    for (int m = 0; m < num; ++m) {
      const float* query = query_ + (int64_t{head} * num_rows_ + first + m) * padded_dim_;
      float* folded = folded_ + int64_t{m} * padded_dim_;
      float* factors = row_factors_ + kFactors * m;
      F sum{}, peak{};
      for (int d = 0; d < head_dim_; d += kLanes) {
        const F q = Load<F>(query + d);
        const F product = q * Load<F>(scales + d);
        Store(folded + d, product);
        if constexpr (Operand::kGroup > 1) peak = Simd::MaxAbs(peak, product);
        if (Code::kMinima) sum = sum + q * Load<F>(minima + d);
      }
      factors[kLargest] = Operand::kGroup > 1 ? Simd::ReduceMax(peak) : 0.0f;
      factors[kOffset] = Code::kMinima ? Simd::ReduceAdd(sum) * scale : 0.0f;
    }
    for (int m = 0; m < num; ++m) {
      float* factors = row_factors_ + kFactors * m;
      const float* folded = folded_ + int64_t{m} * padded_dim_;
      const float step = SplitQuery(folded, factors[kLargest], QueryA(head, first + m));
      factors[kUnitOfC] = step * Operand::kUnit * scale;
    }
  }

  // Turns a row of scores into weights relative to the largest one, times their values' scales. In
  // row_factors: the weights' sum, that of weights times values' minima, and the largest weight.
  void RowWeights(int first, int step_row, int num_tokens, const Stretch& kv) {
    const int row = first + step_row;
    const int visible = Min(num_tokens, Visible(kv.index, row) * kv.num_parts);
    float* weights = scores_ + int64_t{step_row} * padded_tokens_;
    float* factors = row_factors_ + kFactors * step_row;
    const float peak = factors[kPeakScore];
    F sums{}, minima{}, largest{};
    int t = 0;
    for (; t < visible; t += kLanes) {
      F weight = Exp2(Load<F>(weights + t) - peak);
      sums = sums + weight;
      if (task_.keys_only) continue;  // nothing of the values has been read
      if (kValueMinima) minima = minima + weight * Load<F>(value_minima_ + t);
      if (kValueScales) weight = weight * Load<F>(value_scales_ + t);
      if (kValueScales && Operand::kGroup > 1) largest = Simd::Max(largest, weight);
      Store(weights + t, weight);
    }
    for (; t < RoundUp(num_tokens, 64); t += kLanes) Store(weights + t, F{});
    factors[kSumWeights] = Simd::ReduceAdd(sums);
    if (kValueMinima) factors[kSumMinima] = Simd::ReduceAdd(minima);
    factors[kLargest] = kValueScales ? Simd::ReduceMax(largest) : 1.0f;
    if (task_.page_lse != nullptr && visible > 0) {
      const int64_t query_head = (task_.first_head + kv.head) * task_.group + row % task_.group;
      task_.page_lse[row / task_.group * task_.page_lse_stride +
                     query_head * task_.page_lse_head_stride + kv.index] =
          (peak + __builtin_log2f(factors[kSumWeights])) * (1.0f / kLog2E);
    }
  }

  // The weights of a row as A of the output, and what the accumulators (kKeep) and the stretch's
  // sums (kTake) must be scaled by; takes their sums into the row's state.
  void FinishWeights(int first, int step_row, int num_tokens, int head) {
    float* factors = row_factors_ + kFactors * step_row;
    uint32_t* a = weights_a_ + int64_t{step_row} * weight_digits_ * weight_groups_;
    const float step =
        Operand::Split(scores_ + int64_t{step_row} * padded_tokens_, RoundUp(num_tokens, 64),
                       factors[kLargest], weight_digits_, a, weight_groups_);
    const float peak = factors[kPeakScore];
    float* state = State(head, first + step_row) + places_;
    const float old_peak = state[kPeak];
    const bool grew = peak > old_peak;
    float keep = 1.0f, take = 1.0f;
    if (peak == kMinusInfinity) {  // it sees none of them
      take = 0.0f;
    } else {
      const float ratio = Exp2(F{} + (grew ? old_peak - peak : peak - old_peak))[0];
      (grew ? keep : take) = ratio;
    }
    if (grew) state[kPeak] = peak;
    state[kSum] = state[kSum] * keep + factors[kSumWeights] * take;
    if (kValueMinima) state[kMinima] = state[kMinima] * keep + factors[kSumMinima] * take;
    factors[kKeep] = keep;
    factors[kTake] = take * step * (Code::kScales ? Operand::kUnit : 1.0f);
    factors[kSumWeights] *= take;
  }

  void Accumulate(int first, int num, int num_tokens, int head) {
    Operand::Multiply(weights_a_, weight_groups_, num * weight_digits_, values_b_,
                      ValueGroups(num_tokens), places_ / kLanes, c_, places_);
    for (int m = 0; m < num; ++m) {
      float* state = State(head, first + m);
      const float* c = c_ + int64_t{m} * weight_digits_ * places_;
      const float* factors = row_factors_ + kFactors * m;
      const float keep = factors[kKeep], take = factors[kTake], sum = factors[kSumWeights];
      for (int n = 0; n < places_; n += kLanes) {
        F taken = Operand::Combine(c + n, places_, weight_digits_) * take;
        if (kPlaceScales) {
          taken = taken * Load<F>(place_scales_ + n) + Load<F>(place_minima_ + n) * sum;
        }
        Store(state + n, Load<F>(state + n) * keep + taken);
      }
    }
  }

  const AttendTask& task_;
  const int head_dim_, num_rows_, num_heads_, query_digits_, weight_digits_;
  const int key_groups_;  // words of a row of A, for the scores
  const int places_, padded_dim_, max_parts_, padded_tokens_;
  const int weight_groups_;  // words of a row of A, for the output

  Prefetcher prefetcher_;
  float* query_;                         // [heads, rows, padded_dim]
  float* query_steps_;                   // [heads, rows], of elements without scales
  float* folded_;                        // [rows of a step, padded_dim]
  float *key_scales_, *key_minima_;      // [parts, padded_dim]
  float *value_scales_, *value_minima_;  // [padded_tokens]
  int* place_channels_;                  // [places], of values that are keys with scales
  float *place_scales_, *place_minima_;  // [places]
  // Of the rows of a step:
  float* row_factors_;   // [rows, kFactors]
  float* scores_;        // [rows, padded_tokens]
  uint32_t* query_a_;    // A: [rows * digits, key_groups]; without scales of all heads and rows
  uint32_t* weights_a_;  // A: [rows * digits, weight_groups]
  float* c_;             // C: [rows * digits, padded_tokens or places], floats or integers
  uint32_t* keys_b_;     // B: [tokens / kLanes, key_groups, kLanes]
  uint32_t* values_b_;   // B: [places / kLanes, ValueGroups(), kLanes]
};

template <class Operand>
void AttendWith(const AttendTask& task) {
  // Without scales it makes no difference where values lie.
  if (task.latent && Operand::Code::kScales) {
    Attention<Operand, Operand::Code::kScales>::Attend(task);
  } else {
    Attention<Operand, false>::Attend(task);
  }
}

template <class Operand>
const AttentionKernel& KernelOf() {
  static constexpr AttentionKernel kernel = {&AttendWith<Operand>, &Operand::NumPlaces,
                                             &Operand::Channel};
  return kernel;
}

}  // namespace
}  // namespace pikv_ds
