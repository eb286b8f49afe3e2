// Log-sum-exps over the sub-pages of one block of pages; included by foreach_isa.h once per
// instruction set.
//
// A sub-page's score is q . centre + |q| . spread. Its codes c of centres are offset by kMiddle, so
// q . centre = scale * (q . c - kMiddle * sum(q)): two dot products of bytes, added with their
// scales before the lanes are.

#include "exp2.h"

// The low end of a row of bytes as integers.
PIKV_INLINE Ints WidenBytes(const uint8_t* from) {
#if defined(PIKV_X86_KERNELS) && PIKV_LANES == 16
  return (Ints)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#elif defined(PIKV_X86_KERNELS) && PIKV_LANES == 8
  return (Ints)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
#else
  return __builtin_convertvector(LoadBits<Bytes>(from), Ints);
#endif
}

// log2 of normal x to 2e-8 and rounding; NaN for NaN.
PIKV_INLINE Floats Log2(Floats x) {
  // x = 2^e m with m from sqrt(1/2) to sqrt(2), and log m = 2 atanh((m - 1) / (m + 1)).
  constexpr int kSqrtHalf = 0x3f3504f3;
  const Ints above = (Ints)x - kSqrtHalf;
  const Floats m = (Floats)((above & 0x7fffff) + kSqrtHalf);
  const Floats s = (m - 1.0f) / (m + 1.0f), square = s * s;
  Floats series = square * 0.320598898f + 0.412198583f;
  series = series * square + 0.577078016f;
  series = series * square + 0.961796694f;
  series = series * square + 2.885390082f;
  return __builtin_convertvector(above >> 23, Floats) + series * s + (x - x);
}

// A row's query as the bytes of summaries meet it: for each head, chunk and channel in a byte its
// lanes and their magnitudes; then the heads' sums. What the last chunk shares with the one before
// it is 0 there, so that nothing counts twice.
template <int kBits, typename Q>
void SpreadQuery(const SubpageScoresParams& p, const Q* query, float* spread, float* sums) {
  const int64_t bytes = p.head_dim * kBits / 8;
  for (int64_t head = 0; head < p.num_heads; ++head) {
    const Q* from = query + head * p.head_dim;
    Floats sum = {};
    for (int64_t chunk = 0; chunk < NumChunks(bytes); ++chunk) {
      const int64_t begin = ChunkBegin(chunk, bytes), shared = chunk * kLanes - begin;
      for (int part = 0; part < 8 / kBits; ++part, spread += 2 * kLanes) {
        Floats q = Load(from + part * bytes + begin);
        for (int64_t lane = 0; lane < shared; ++lane) q[lane] = 0.0f;
        StoreBits(spread, q);
        StoreBits(spread + kLanes, Magnitude(q));
        sum += q;
      }
    }
    const auto add = [](Floats a, Floats b) __attribute__((always_inline)) { return a + b; };
    sums[head] = Reduce(sum, add)[0];
  }
}

template <int kBits>
void SpreadQuery(const SubpageScoresParams& p, int64_t row, float* spread, float* sums) {
  const int64_t begin = row * p.num_heads * p.head_dim;
  switch (p.dtype) {
    case Dtype::kFloat32:
      return SpreadQuery<kBits>(p, static_cast<const float*>(p.query) + begin, spread, sums);
    case Dtype::kBFloat16:
      return SpreadQuery<kBits>(p, static_cast<const BFloat16*>(p.query) + begin, spread, sums);
    case Dtype::kFloat16:
      return SpreadQuery<kBits>(p, static_cast<const Float16*>(p.query) + begin, spread, sums);
  }
}

// Sub-pages that share what is loaded of the query, as many as there are registers for.
inline constexpr int kTogether = kLanes == 16 ? 2 : 1;

// Scores of kTogether sub-pages for kHeads query heads, of which those that are `missing` at the
// end are read again and not written. Scores of a head lie `head_stride`, those of a sub-page
// kBlock floats apart.
template <int kHeads, int kBits>
PIKV_INLINE void ScoreSubpages(const float* spread, const float* sums, int64_t bytes,
                               const uint8_t* const (&codes)[kTogether][2],
                               const float (&scales)[kTogether][2], int count, float* out,
                               int64_t head_stride) {
  constexpr int kParts = 8 / kBits;
  constexpr float kMiddle = ((1 << kBits) - 1) / 2;
  const int64_t num_chunks = NumChunks(bytes);
  Floats dots[kHeads][kTogether][2] = {};
  for (int64_t chunk = 0; chunk < num_chunks; ++chunk) {
    const int64_t begin = ChunkBegin(chunk, bytes);
    for (int part = 0; part < kParts; ++part) {
      Floats code[kTogether][2];
      for (int i = 0; i < kTogether; ++i) {
        for (int kind = 0; kind < 2; ++kind) {
          Ints x = WidenBytes(codes[i][kind] + begin);
          if (kBits == 4) x = part == 0 ? x & 15 : x >> 4;
          code[i][kind] = __builtin_convertvector(x, Floats);
        }
      }
      for (int head = 0; head < kHeads; ++head) {
        const float* q = spread + ((head * num_chunks + chunk) * kParts + part) * 2 * kLanes;
        const Floats plain = LoadBits<Floats>(q), magnitude = LoadBits<Floats>(q + kLanes);
        for (int i = 0; i < kTogether; ++i) {
          dots[head][i][0] = MultiplyAdd(plain, code[i][0], dots[head][i][0]);
          dots[head][i][1] = MultiplyAdd(magnitude, code[i][1], dots[head][i][1]);
        }
      }
    }
  }
  const auto add = [](Floats a, Floats b) __attribute__((always_inline)) { return a + b; };
  for (int head = 0; head < kHeads; ++head) {
    for (int i = 0; i < count; ++i) {
      const Floats both = dots[head][i][0] * scales[i][0] + dots[head][i][1] * scales[i][1];
      out[head * head_stride + i * kBlock] =
          Reduce(both, add)[0] - scales[i][0] * kMiddle * sums[head];
    }
  }
}

inline float HalfAt(const uint8_t* from) {
  uint16_t bits;
  __builtin_memcpy(&bits, from, sizeof bits);
  return FromHalf(Ints{} + bits)[0];
}

// All scores of one page for one KV head's queries: [group, sub-pages, kBlock] at `out`.
template <int kBits>
void ScorePage(const SubpageScoresParams& p, const uint8_t* page, int64_t kv_head, int64_t group,
               const float* spread, const float* sums, float* out) {
  const int64_t bytes = p.head_dim * kBits / 8, count = p.num_subpages, heads = p.num_kv_heads;
  const int64_t vectors = heads * count;
  const uint8_t* scales_at = page + 2 * vectors * bytes;
  const int64_t head_floats = NumChunks(bytes) * (8 / kBits) * 2 * kLanes;
  for (int64_t first = 0; first < count; first += kTogether) {
    const uint8_t* codes[kTogether][2];
    float scales[kTogether][2];
    for (int i = 0; i < kTogether; ++i) {
      // At the end the last sub-page stands in for those that are missing.
      const int64_t vector = kv_head * count + std::min(first + i, count - 1);
      for (int kind = 0; kind < 2; ++kind) {
        codes[i][kind] = page + (kind * vectors + vector) * bytes;
        scales[i][kind] = HalfAt(scales_at + (kind * vectors + vector) * 2);
      }
    }
    const int there = static_cast<int>(std::min<int64_t>(kTogether, count - first));
    float* to = out + first * kBlock;
    int64_t head = 0;
    for (; head + 4 <= group; head += 4) {
      ScoreSubpages<4, kBits>(spread + head * head_floats, sums + head, bytes, codes, scales, there,
                              to + head * count * kBlock, count * kBlock);
    }
    for (; head < group; ++head) {
      ScoreSubpages<1, kBits>(spread + head * head_floats, sums + head, bytes, codes, scales, there,
                              to + head * count * kBlock, count * kBlock);
    }
  }
}

// scratch: see SubpageScoresCpu.
template <int kBits>
void ScoreBlock(const SubpageScoresParams& p, int64_t row, int64_t first, int64_t last,
                float* scratch) {
  const int64_t heads = p.num_kv_heads, group = p.num_heads / heads, count = p.num_subpages;
  const int64_t bytes = p.head_dim * kBits / 8;
  const int64_t head_floats = NumChunks(bytes) * (8 / kBits) * 2 * kLanes;
  const int32_t* table = p.table + row * p.table_width;
  float* sums = scratch;
  float* spread = sums + AlignedFloats::Padded(p.num_heads);
  float* scores = spread + p.num_heads * head_floats;  // [group, sub-pages, kBlock]

  int64_t places[kBlock];
  int64_t num_pages = 0;
  for (int64_t place = first; place < last; ++place) {
    if (place < p.counts[row] && table[place] > 0) {
      places[num_pages++] = place;
    } else {
      for (int64_t head = 0; head < p.num_heads; ++head) {
        p.out[(row * p.num_heads + head) * p.table_width + place] = kMissing;
      }
    }
  }
  if (num_pages == 0) return;
  SpreadQuery<kBits>(p, row, spread, sums);
  std::fill_n(scores, group * count * kBlock, 0.0f);  // what lies beyond the pages is computed, too

  const Floats to_base_2 = Splat(p.scale * 1.44269504088896340736f);
  for (int64_t head = 0; head < heads; ++head) {
    for (int64_t page = 0; page < num_pages; ++page) {
      // The next page lies anywhere: ask for its codes while this one's are at work.
      const uint8_t* next = p.summaries.Row(table[places[std::min(page + 1, num_pages - 1)]]);
      for (int kind = 0; kind < 2; ++kind) {
        const uint8_t* codes = next + (kind * heads + head) * count * bytes;
        for (int64_t i = 0; i < count * bytes; i += 64) __builtin_prefetch(codes + i);
      }
      ScorePage<kBits>(p, p.summaries.Row(table[places[page]]), head, group,
                       spread + head * group * head_floats, sums + head * group, scores + page);
    }
    for (int64_t query = 0; query < group; ++query) {
      const float* of_head = scores + query * count * kBlock;
      float* out = p.out + (row * p.num_heads + head * group + query) * p.table_width;
      for (int64_t page = 0; page < num_pages; page += kLanes) {
        Floats highest = LoadBits<Floats>(of_head + page) * to_base_2;
        for (int64_t i = 1; i < count; ++i) {
          highest = Max(LoadBits<Floats>(of_head + i * kBlock + page) * to_base_2, highest);
        }
        Floats sum = {};
        for (int64_t i = 0; i < count; ++i) {
          sum += Exp2(LoadBits<Floats>(of_head + i * kBlock + page) * to_base_2 - highest);
        }
        const Floats lse = (highest + Log2(sum)) * 0.69314718055994530942f;
        const int64_t there = std::min<int64_t>(kLanes, num_pages - page);
        for (int64_t lane = 0; lane < there; ++lane) out[places[page + lane]] = lse[lane];
      }
    }
  }
}
