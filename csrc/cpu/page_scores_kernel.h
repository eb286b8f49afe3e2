// Quest's bounds of one block of pages; included by foreach_isa.h once per instruction set.
//
// sum_d max(q_d low_d, q_d high_d) takes the low bound where q is negative and the high one where
// it is positive: with the query split by sign it is a sum of two dot products.

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

// Pages that are scored together, as many as there are registers for: they share what is loaded of
// the query, which for all heads is more than the L1 cache holds.
inline constexpr int kPages = kLanes == 16 ? 4 : 2;

// Raises each page's bound to the largest one of kHeads query heads.
template <int kHeads, typename B>
PIKV_INLINE void RaiseBounds(const float* split, const B* const (&lows)[kPages], int64_t high,
                             int64_t head_dim, float (&bounds)[kPages]) {
  const int64_t num_chunks = NumChunks(head_dim);
  Floats sums[kHeads][kPages] = {};
  for (int64_t chunk = 0; chunk < num_chunks; ++chunk) {
    const int64_t begin = ChunkBegin(chunk, head_dim);
    Floats low[kPages], upper[kPages];
    for (int page = 0; page < kPages; ++page) {
      low[page] = Load(lows[page] + begin);
      upper[page] = Load(lows[page] + high + begin);
    }
    for (int head = 0; head < kHeads; ++head) {
      const float* parts = split + (head * num_chunks + chunk) * 2 * kLanes;
      const Floats negative = LoadBits<Floats>(parts), positive = LoadBits<Floats>(parts + kLanes);
      for (int page = 0; page < kPages; ++page) {
        sums[head][page] = MultiplyAdd(negative, low[page], sums[head][page]);
        sums[head][page] = MultiplyAdd(positive, upper[page], sums[head][page]);
      }
    }
  }
  const auto add = [](Floats a, Floats b) __attribute__((always_inline)) { return a + b; };
  for (int page = 0; page < kPages; ++page) {
    for (int head = 0; head < kHeads; ++head) {
      bounds[page] = std::max(bounds[page], Reduce(sums[head][page], add)[0]);
    }
  }
}

// Bounds of a KV head's query heads; the high ends lie `high` elements after the low ones.
template <typename B>
void GroupBounds(const float* split, int64_t group, const B* const (&lows)[kPages], int64_t high,
                 int64_t head_dim, float (&bounds)[kPages]) {
  const int64_t head_floats = NumChunks(head_dim) * 2 * kLanes;
  std::fill_n(bounds, kPages, kMissing);
  for (; group >= 4; group -= 4, split += 4 * head_floats) {
    RaiseBounds<4>(split, lows, high, head_dim, bounds);
  }
  for (; group > 0; --group, split += head_floats) {
    RaiseBounds<1>(split, lows, high, head_dim, bounds);
  }
}

template <typename B>
void ScoreBlock(const PageScoresParams& p, int64_t row, int64_t first, int64_t last, float* split) {
  const int64_t heads = p.num_kv_heads, group = p.num_heads / heads, d = p.head_dim;
  const int64_t group_floats = group * NumChunks(d) * 2 * kLanes;
  const int32_t* table = p.table + row * p.table_width;
  float* out = p.out + row * heads * p.table_width;

  int64_t places[kBlock];
  int64_t num_pages = 0;
  for (int64_t place = first; place < last; ++place) {
    if (place < p.counts[row] && table[place] > 0) {
      places[num_pages++] = place;
    } else {
      for (int64_t head = 0; head < heads; ++head) out[head * p.table_width + place] = kMissing;
    }
  }
  if (num_pages > 0) SplitQuery(p, row, split);

  for (int64_t begin = 0; begin < num_pages; begin += kPages) {
    const B* lows[kPages];
    const uint8_t* next[kPages];
    for (int64_t i = 0; i < kPages; ++i) {
      // At the end the last page stands in for those that are missing.
      const auto slot = [&](int64_t page) { return table[places[std::min(page, num_pages - 1)]]; };
      lows[i] = reinterpret_cast<const B*>(p.summaries.Row(slot(begin + i)));
      next[i] = p.summaries.Row(slot(begin + kPages + i));
    }
    for (int64_t head = 0; head < heads; ++head) {
      // The next pages lie anywhere: ask for a share of them with each head, early enough and not
      // more at once than the processor keeps track of.
      const int64_t share = 2 * d * int64_t{sizeof(B)};
      for (const uint8_t* page : next) {
        for (int64_t i = 0; i < share; i += 64) __builtin_prefetch(page + head * share + i);
      }
      float bounds[kPages];
      GroupBounds(split + head * group_floats, group, lows, heads * d, d, bounds);
      for (int64_t i = 0; i < kPages; ++i) {
        if (begin + i < num_pages) out[head * p.table_width + places[begin + i]] = bounds[i];
        lows[i] += d;
      }
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
