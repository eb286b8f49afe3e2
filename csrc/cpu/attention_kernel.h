// Online-softmax attention over blocks, written once for all instruction sets.
//
// Each instruction set's file includes this header inside its target pragma; everything is in an
// anonymous namespace, so that no two files share (and the linker mixes) a function's versions.
//
// Both products are brought to one form, C[row, place] = sum over k of A[row, k] * B[k, place]:
//
//            rows           k                      places
//   scores   query rows     channels               tokens of the block
//   output   query rows     tokens (weights in A)  channels
//
// A `Simd` has the vectors. An `Operand` decides what A and B are made of: float32, or bytes and
// bfloat16 for the dot-product instructions, which take 4 or 2 successive k from a 32-bit word.
// B is packed as [block of kLanes places][k / kGroup][kLanes] words. Scales never touch B: key
// scales go into the query and value scales into the weights, once per page and not per element;
// minima turn into one number per query row and page. Values that are the keys have scales per
// channel, which go into C. Where A is narrower than float32, a row of
// it is split into digits: several rows of A whose products are added up again in C.

#include <cstring>
#include <type_traits>
#include <utility>

#include "attention.h"

namespace pikv_ds {
namespace {

#define PIKV_INLINE inline __attribute__((always_inline))

constexpr float kMinusInfinity = -__builtin_inff();

// Not std::min and the like: their out-of-line copies would be shared with code for all machines.
template <typename T>
PIKV_INLINE T Min(T a, T b) {
  return a < b ? a : b;
}
template <typename T>
PIKV_INLINE T Max(T a, T b) {
  return a > b ? a : b;
}
template <typename T>
PIKV_INLINE T RoundUp(T x, T multiple) {
  return (x + multiple - 1) / multiple * multiple;
}

template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

template <typename To, typename From>
PIKV_INLINE To BitCast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

template <typename Vector>
PIKV_INLINE Vector Load(const void* from) {
  Vector vector;
  __builtin_memcpy(&vector, from, sizeof(vector));
  return vector;
}
template <typename Vector>
PIKV_INLINE void Store(void* to, const Vector& vector) {
  __builtin_memcpy(to, &vector, sizeof(vector));
}

// How an element is stored in 32-bit words.
template <Element kElement>
struct Codec {
  static constexpr int kBits = ElementBits(kElement);
  static constexpr int kPerWord = 32 / kBits;
  static constexpr int kPieces = kBits < 8 ? 8 / kBits : 1;  // channels that share a byte
  static constexpr bool kScales = ScaleRows(kElement) > 0;
  static constexpr bool kMinima = ScaleRows(kElement) > 1;

  static constexpr int RowBytes(int head_dim) { return head_dim * kBits / 8; }
  static constexpr int RowWords(int head_dim) { return (RowBytes(head_dim) + 3) / 4; }

  // The channel of a word's j-th element, -1 beyond the row's end. A word of nibbles holds its
  // four low ones first.
  static PIKV_INLINE int Channel(int head_dim, int word, int j) {
    if constexpr (kPieces == 1) {
      const int channel = word * kPerWord + j;
      return channel < head_dim ? channel : -1;
    } else {
      const int byte = 4 * word + j % 4;
      return byte < RowBytes(head_dim) ? byte + j / 4 * (head_dim / kPieces) : -1;
    }
  }
};

// The j-th elements of words as float; of fp8 the 256th part, which float16 can hold.
template <class Simd, Element kElement>
PIKV_INLINE typename Simd::F Expand(typename Simd::U words, int j) {
  using F = typename Simd::F;
  using I = typename Simd::I;
  if constexpr (kElement == Element::kFloat32) {
    return (F)words;
  } else if constexpr (kElement == Element::kBFloat16) {
    return (F)(j == 0 ? words << 16 : words & 0xffff0000u);
  } else if constexpr (kElement == Element::kFloat16) {
    return Simd::HalfToFloat(j == 0 ? words & 0xffffu : words >> 16);
  } else if constexpr (kElement == Element::kFp8) {
    const auto byte = words >> (8 * j);
    return Simd::HalfToFloat(((byte & 0x80u) << 8) | ((byte & 0x7fu) << 7));
  } else {
    constexpr int kBits = Codec<kElement>::kBits;
    const auto code = (words >> (j % 4 * 8 + j / 4 * kBits)) & ((1u << kBits) - 1);
    return __builtin_convertvector((I)code, F);
  }
}

// 2^x for x <= 0 to 2e-9 and rounding; 0 below 2^-125, NaN for NaN.
template <class Simd>
PIKV_INLINE typename Simd::F Exp2(typename Simd::F x) {
  using F = typename Simd::F;
  using I = typename Simd::I;
  const F rounder = F{} + 0x1.8p23f;  // pushes the fraction out and leaves the integer lowest
  const F shifted = x + rounder;
  const F f = x - (shifted - rounder);
  F power = f * 0x1.41d332p-13f + 0x1.5f456ap-10f;
  power = power * f + 0x1.3b2dbcp-7f;
  power = power * f + 0x1.c6aed4p-5f;
  power = power * f + 0x1.ebfbdap-3f;
  power = power * f + 0x1.62e430p-1f;
  power = power * f + 1.0f;
  const F result = (F)((I)power + ((I)shifted << 23));
  return x < F{} - 125.0f ? F{} : result;
}

// Pointers to kLanes successive tokens; beyond the last one it is repeated, as something readable.
template <class Simd>
struct TokenRows {
  PIKV_INLINE TokenRows(const uint8_t* first, int64_t stride, int num_tokens) {
    for (int i = 0; i < Simd::kLanes; ++i) row[i] = first + stride * Min(i, num_tokens - 1);
  }
  const uint8_t* row[Simd::kLanes];
};

// Reads kLanes token rows and hands them on as words, transposed: `use(word index, words)`.
template <class Simd, class Use>
PIKV_INLINE void ForEachWordOfTokens(const TokenRows<Simd>& tokens, int row_bytes, const Use& use) {
  typename Simd::U words[4];
  int at = 0;
  for (; at + 16 <= row_bytes; at += 16) {
    Simd::TransposeWords(tokens.row, at, words);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) use(at / 4 + i, words[i]);
  }
  if (at == row_bytes) return;
  alignas(16) uint8_t rest[Simd::kLanes][16] = {};  // a full read might leave the allocation
  const uint8_t* rest_rows[Simd::kLanes];
  for (int i = 0; i < Simd::kLanes; ++i) {
    std::memcpy(rest[i], tokens.row[i] + at, row_bytes - at);
    rest_rows[i] = rest[i];
  }
  Simd::TransposeWords(rest_rows, 0, words);
  for (int i = 0; at + 4 * i < row_bytes; ++i) use(at / 4 + i, words[i]);
}

// Asks for the next blocks' memory while these are attended. Pages are scattered, so the hardware
// cannot foresee where the next one lies; and a core can have only some 16 lines under way, so they
// are asked for a few at a time: a burst would stall it. Keys and values take turns, as two streams
// come in faster than one.
class Prefetcher {
 public:
  void Start() { num_parts_ = lines_ = part_ = asked_ = 0; }

  // Adds `bytes` of keys and as many of values.
  void Add(const uint8_t* keys, const uint8_t* values, int64_t bytes) {
    lines_ = (bytes + kLine - 1) / kLine;  // all parts are as long
    keys_[num_parts_] = keys - num_parts_ * lines_ * kLine;
    values_[num_parts_] = values - num_parts_ * lines_ * kLine;
    ++num_parts_;
  }

  // Asks until a share of the lines has been asked for.
  PIKV_INLINE void Until(float share) {
    const int64_t goal = static_cast<int>(static_cast<float>(num_parts_ * lines_) * share);
    while (asked_ < goal) {
      const int64_t end = Min(goal, (part_ + 1) * lines_);
      const uint8_t *keys = keys_[part_], *values = values_[part_];
      for (int64_t line = asked_; line < end; ++line) {
        __builtin_prefetch(keys + line * kLine, 0, 2);
        __builtin_prefetch(values + line * kLine, 0, 2);
      }
      asked_ = end;
      part_ += end == (part_ + 1) * lines_;
    }
  }

  // Asks for something small at once.
  static void Now(const void* begin, int64_t bytes) {
    const uint8_t* from = static_cast<const uint8_t*>(begin);
    for (int64_t at = 0; at < bytes; at += kLine) __builtin_prefetch(from + at, 0, 2);
  }

 private:
  static constexpr int64_t kLine = 64;
  const uint8_t *keys_[kMaxParts], *values_[kMaxParts];  // less the lines of the parts before
  int64_t num_parts_ = 0, lines_ = 0, part_ = 0, asked_ = 0;
};

// Shares of the next blocks that are asked for by the end of a phase; about the phases' times.
constexpr float kAfterPackKeys = 0.2f, kAfterScores = 0.45f, kAfterWeights = 0.75f;

// c[rows, places] = a * b, where each word of A meets kLanes words of B. Works for all operands
// whose MulAdd takes vectors. The tile of kRows x kBlocks sums stays in registers for kRun words,
// then it is added to c: long sums of float32 lose less in two levels.
template <class Operand, int kRows, int kBlocks>
PIKV_INLINE void MultiplyTile(const uint32_t* a, int64_t a_stride, const uint32_t* b,
                              int num_groups, float* c, int64_t c_stride) {
  using Simd = typename Operand::Simd;
  using Sum = typename Operand::Sum;
  constexpr int kLanes = Simd::kLanes;
  constexpr int kRun = 32;
  for (int begin = 0; begin < num_groups; begin += kRun) {
    Sum sum[kRows][kBlocks] = {};
    for (int k = begin; k < Min(begin + kRun, num_groups); ++k) {
      typename Simd::U words[kBlocks];
#pragma GCC unroll 8
      for (int n = 0; n < kBlocks; ++n) {
        words[n] = Load<typename Simd::U>(b + (int64_t{n} * num_groups + k) * kLanes);
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
        for (int n = 0; n < kBlocks; ++n) {
          sum[r][n] = Operand::MulAdd(a[r * a_stride + k], words[n], sum[r][n]);
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int n = 0; n < kBlocks; ++n) {
        float* to = c + r * c_stride + n * kLanes;
        Store(to, begin == 0 ? sum[r][n] : Load<Sum>(to) + sum[r][n]);
      }
    }
  }
}

template <class Operand, int kRows>
void MultiplyRows(const uint32_t* a, int64_t a_stride, const uint32_t* b, int num_groups,
                  int num_blocks, float* c, int64_t c_stride) {
  constexpr int kLanes = Operand::Simd::kLanes;
  constexpr int kBlocks = Operand::kTileBlocks;
  int n = 0;
  const auto at = [&](int block) { return b + int64_t{block} * num_groups * kLanes; };
  for (; n + kBlocks <= num_blocks; n += kBlocks) {
    MultiplyTile<Operand, kRows, kBlocks>(a, a_stride, at(n), num_groups, c + n * kLanes, c_stride);
  }
  for (; n < num_blocks; ++n) {
    MultiplyTile<Operand, kRows, 1>(a, a_stride, at(n), num_groups, c + n * kLanes, c_stride);
  }
}

template <class Operand>
void MultiplyWithVectors(const uint32_t* a, int64_t a_stride, int num_rows, const uint32_t* b,
                         int num_groups, int num_blocks, float* c, int64_t c_stride) {
  int r = 0;
  const auto multiply = [&](auto rows) {
    MultiplyRows<Operand, decltype(rows)::value>(a + r * a_stride, a_stride, b, num_groups,
                                                 num_blocks, c + r * c_stride, c_stride);
    r += decltype(rows)::value;
  };
  while (r + 4 <= num_rows) multiply(Constant<4>{});
  while (r + 2 <= num_rows) multiply(Constant<2>{});
  if (r < num_rows) multiply(Constant<1>{});
}

// A and B in float32, for any element and head size.
template <class SimdType, Element kElement>
struct FloatOperand {
  using Simd = SimdType;
  using F = typename Simd::F;
  using U = typename Simd::U;
  using Sum = F;
  using Code = Codec<kElement>;
  static constexpr int kLanes = Simd::kLanes;
  static constexpr int kGroup = 1;          // k per word
  static constexpr int kGroupMultiple = 1;  // the words of a row of A are a multiple of this
  static constexpr int kTileBlocks = Simd::kTileBlocks;
  static constexpr float kUnit = kElement == Element::kFp8 ? 256.0f : 1.0f;  // see Expand

  static int QueryDigits(Dtype) { return 1; }
  static int WeightDigits(Dtype) { return 1; }
  static void Begin(int) {}
  static void End() {}

  static int NumPlaces(int head_dim) {
    return RoundUp(Code::RowWords(head_dim), kLanes) * Code::kPerWord;
  }
  static int Channel(int head_dim, int place) {
    const int block = place / kLanes;
    const int word = block / Code::kPerWord * kLanes + place % kLanes;
    return Code::Channel(head_dim, word, block % Code::kPerWord);
  }

  // Packs a block of kLanes places.
  static void PackKeys(const TokenRows<Simd>& rows, int head_dim, int, uint32_t* b) {
    ForEachWordOfTokens<Simd>(rows, Code::RowBytes(head_dim), [&](int word, U words) {
#pragma GCC unroll 16
      for (int j = 0; j < Code::kPerWord; ++j) {
        const int channel = Code::Channel(head_dim, word, j);
        if (channel >= 0) Store(b + channel * kLanes, Expand<Simd, kElement>(words, j));
      }
    });
  }

  // Packs up to 16 tokens; `num_groups` is that of all of B. Words of a token row lie side by side,
  // so their j-th elements are channels kPerWord apart.
  static void PackValues(const uint8_t* values, int64_t stride, int num, int head_dim,
                         int num_groups, uint32_t* b) {
    const int row_bytes = Code::RowBytes(head_dim);
    for (int token = 0; token < num; ++token) {
      const uint8_t* row = values + token * stride;
      uint32_t* to = b + token * kLanes;
      for (int at = 0; at < row_bytes; at += 4 * kLanes) {
        const U words = Simd::LoadBytes(row + at, row_bytes - at);
#pragma GCC unroll 16
        for (int j = 0; j < Code::kPerWord; ++j, to += num_groups * kLanes) {
          Store(to, Expand<Simd, kElement>(words, j));
        }
      }
    }
  }

  static PIKV_INLINE F MulAdd(uint32_t a, U b, F sum) { return sum + BitCast<float>(a) * (F)b; }

  static void Multiply(const uint32_t* a, int64_t a_stride, int num_rows, const uint32_t* b,
                       int num_groups, int num_blocks, float* c, int64_t c_stride) {
    MultiplyWithVectors<FloatOperand>(a, a_stride, num_rows, b, num_groups, num_blocks, c,
                                      c_stride);
  }

  // Writes x[0, n) as A's digits, rows a_stride words apart; returns the value of one unit of C.
  static float Split(const float* x, int n, float, int, uint32_t* a, int64_t) {
    std::memcpy(a, x, n * sizeof(float));
    return 1.0f;
  }
  static PIKV_INLINE F Combine(const float* c, int64_t, int) { return Load<F>(c); }
};

// Attends one task. Memory for one thread is carved from its scratch at the start.
template <class Operand, bool kLatent>
class Attention {
  using Simd = typename Operand::Simd;
  using F = typename Simd::F;
  using I = typename Simd::I;
  using Code = typename Operand::Code;
  static constexpr int kLanes = Simd::kLanes;
  static constexpr int kRowStep =
      16;  // rows at a time: what they need in between fits the L1 cache
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
      F weight = Exp2<Simd>(Load<F>(weights + t) - peak);
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
      const float ratio = Exp2<Simd>(F{} + (grew ? old_peak - peak : peak - old_peak))[0];
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

// The kernel of an element for operands that take any: `Operand<Simd, element>`.
template <class Simd>
const AttentionKernel& FloatKernelOf(Element element) {
  switch (element) {
    case Element::kFloat32:
      return KernelOf<FloatOperand<Simd, Element::kFloat32>>();
    case Element::kBFloat16:
      return KernelOf<FloatOperand<Simd, Element::kBFloat16>>();
    case Element::kFloat16:
      return KernelOf<FloatOperand<Simd, Element::kFloat16>>();
    case Element::kFp8:
      return KernelOf<FloatOperand<Simd, Element::kFp8>>();
    case Element::kInt8:
      return KernelOf<FloatOperand<Simd, Element::kInt8>>();
    case Element::kInt4:
      return KernelOf<FloatOperand<Simd, Element::kInt4>>();
    case Element::kInt2:
      break;
  }
  return KernelOf<FloatOperand<Simd, Element::kInt2>>();
}

}  // namespace
}  // namespace pikv_ds
