// Quest's bounds of one block of pages; included by foreach_isa.h once per instruction set.
//
// sum_d max(q_d low_d, q_d high_d) takes the low bound where q is negative and the high one where
// it is positive: with the query split by sign it is a sum of two dot products.

// Chunks of a row as ForChunks makes them.
inline int64_t NumChunks(int64_t head_dim) { return (head_dim + kLanes - 1) / kLanes; }
PIKV_INLINE int64_t ChunkBegin(int64_t chunk, int64_t head_dim) {
  return std::min(chunk * kLanes, head_dim - kLanes);
}

// Negative and positive part of each head's query, chunk by chunk. What the last chunk shares with
// the one before it is 0 there, so that nothing counts twice.
template <typename Q>
void SplitQuery(const Q* query, int64_t num_heads, int64_t head_dim, float* split) {
  for (int64_t head = 0; head < num_heads; ++head) {
    for (int64_t chunk = 0; chunk < NumChunks(head_dim); ++chunk, split += 2 * kLanes) {
      const int64_t begin = ChunkBegin(chunk, head_dim), shared = chunk * kLanes - begin;
      Floats q = Load(query + head * head_dim + begin);
      for (int64_t lane = 0; lane < shared; ++lane) q[lane] = 0.0f;
      StoreBits(split, Min(q, Floats{}));
      StoreBits(split + kLanes, Max(q, Floats{}));
    }
  }
}

inline void SplitQuery(const PageScoresParams& p, int64_t row, float* split) {
  const int64_t begin = row * p.num_heads * p.head_dim;
  const auto split_as = [&](auto* query) {
    SplitQuery(query + begin, p.num_heads, p.head_dim, split);
  };
  switch (p.dtype) {
    case Dtype::kFloat32:
      return split_as(static_cast<const float*>(p.query));
    case Dtype::kBFloat16:
      return split_as(static_cast<const BFloat16*>(p.query));
    case Dtype::kFloat16:
      return split_as(static_cast<const Float16*>(p.query));
  }
}

// The largest bound of kHeads query heads.
template <int kHeads, typename B>
PIKV_INLINE float Bound(const float* split, const B* low, const B* high, int64_t head_dim) {
  const int64_t num_chunks = NumChunks(head_dim);
  Floats sums[kHeads] = {};
  for (int64_t chunk = 0; chunk < num_chunks; ++chunk) {
    const int64_t begin = ChunkBegin(chunk, head_dim);
    const Floats l = Load(low + begin), h = Load(high + begin);
    for (int i = 0; i < kHeads; ++i) {
      const float* parts = split + (i * num_chunks + chunk) * 2 * kLanes;
      sums[i] = MultiplyAdd(LoadBits<Floats>(parts), l, sums[i]);
      sums[i] = MultiplyAdd(LoadBits<Floats>(parts + kLanes), h, sums[i]);
    }
  }
  const auto add = [](Floats a, Floats b) __attribute__((always_inline)) { return a + b; };
  float bound = Reduce(sums[0], add)[0];
  for (int i = 1; i < kHeads; ++i) bound = std::max(bound, Reduce(sums[i], add)[0]);
  return bound;
}

template <typename B>
float GroupBound(const float* split, int64_t group, const B* low, const B* high, int64_t head_dim) {
  const int64_t head_floats = NumChunks(head_dim) * 2 * kLanes;
  float bound = -std::numeric_limits<float>::infinity();
  for (; group >= 4; group -= 4, split += 4 * head_floats) {
    bound = std::max(bound, Bound<4>(split, low, high, head_dim));
  }
  for (; group > 0; --group, split += head_floats) {
    bound = std::max(bound, Bound<1>(split, low, high, head_dim));
  }
  return bound;
}

template <typename B>
void ScoreBlock(const PageScoresParams& p, int64_t row, int64_t first, int64_t last, float* split) {
  constexpr float kMissing = -std::numeric_limits<float>::infinity();
  const int64_t heads = p.num_kv_heads, group = p.num_heads / heads, d = p.head_dim;
  const int64_t group_floats = group * NumChunks(d) * 2 * kLanes;
  const int32_t* table = p.table + row * p.table_width;
  float* out = p.out + row * heads * p.table_width;
  const int64_t count = std::clamp<int64_t>(p.counts[row], first, last);

  if (first < count) SplitQuery(p, row, split);
  for (int64_t page = first; page < last; ++page) {
    if (page >= count || table[page] <= 0) {
      for (int64_t head = 0; head < heads; ++head) out[head * p.table_width + page] = kMissing;
      continue;
    }
    const B* low = reinterpret_cast<const B*>(p.summaries.Row(table[page]));
    // The next page lies anywhere: ask for a share of it with each head, early enough and not more
    // at once than the processor keeps track of.
    const bool more = page + 1 < count && table[page + 1] > 0;
    const uint8_t* next = more ? p.summaries.Row(table[page + 1]) : nullptr;
    const int64_t share = more ? 2 * d * int64_t{sizeof(B)} : 0;
    for (int64_t head = 0; head < heads; ++head, low += d, next += share) {
      for (int64_t i = 0; i < share; i += 64) __builtin_prefetch(next + i);
      out[head * p.table_width + page] =
          GroupBound(split + head * group_floats, group, low, low + heads * d, d);
    }
  }
}

inline ScoreBlockFunction* ScoreBlockOf(Dtype bounds_dtype) {
  switch (bounds_dtype) {
    case Dtype::kFloat32:
      return ScoreBlock<float>;
    case Dtype::kBFloat16:
      return ScoreBlock<BFloat16>;
    case Dtype::kFloat16:
      return ScoreBlock<Float16>;
  }
  return nullptr;
}
