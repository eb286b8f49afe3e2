// Seals packed pages (layout.h) and those whose ranges are narrowed; included by
// seal_pages_kernel.h. Keys and values are integers of kBits bits, each of its own number.
//
// Several ranges are tried per channel or token, from the smallest to the largest element and ever
// narrower ones about the same middle, and the one with the least squared error is taken. Errors
// are added up in the order that reference.py prescribes, so that a choice never depends on it.

// Ranges that are tried: reference.py's CLIPS after 1.
inline constexpr float kShares[kMaxRanges] = {1.0f, 0.9f, 0.8f, 0.7f, 0.6f, 0.5f, 0.4f};
inline constexpr int kErrorLanes = 16;  // in which a token's errors are added up

// Rounds to an integer, ties to even; |x| < 2^22.
PIKV_INLINE Floats Round(Floats x) { return x + 0x1.8p23f - 0x1.8p23f; }

// The power of two, in eighths and from 2^-24 on, that is nearest to a step; see ScaleOfByte. More
// than 255 where that is none of a byte's.
PIKV_INLINE Ints ByteOfScale(Floats step) {
  const Ints bits = (Ints)Max(step, Splat(0x1p-24f));
  const Floats mantissa = (Floats)((bits & 0x7fffff) | 0x3f800000);
  Ints byte = ((bits >> 23) - (127 - 24)) * 8;
  for (const float limit : kEighthLimits) byte -= mantissa > limit;  // a true lane is -1
  return byte;
}

inline ScaleAndMinimum ByteScaling(Floats low, Floats high, float levels, Ints* beyond) {
  ScaleAndMinimum s;
  // The minimum must fit into a byte, too.
  const Floats most = Max(Magnitude(low), Magnitude(high));
  const Ints byte = ByteOfScale(Max((high - low) / levels, most / 24.0f));
  *beyond = byte > 255;
  s.stored_scale = *beyond ? Ints{} + 255 : byte;
  for (int lane = 0; lane < kLanes; ++lane) s.scale[lane] = ScaleOfByte()[s.stored_scale[lane]];
  const Floats quarters = Round(Max(Min(low / s.scale * 4.0f, Splat(127.0f)), Splat(-127.0f)));
  s.stored_minimum = __builtin_convertvector(quarters, Ints);
  s.minimum = quarters / 4.0f * s.scale;
  return s;
}

// The code of x as a float.
PIKV_INLINE Floats CodeOf(Floats x, Floats minimum, Floats scale, Floats inverse, float levels) {
  const Floats code = Quotient(x - minimum, scale, inverse);
  return Round(Min(Max(code, Floats{}), Splat(levels)));
}

PIKV_INLINE Floats SquaredError(Floats x, Floats minimum, Floats scale, Floats inverse,
                                float levels) {
  const Floats code = CodeOf(x, minimum, scale, inverse, levels);
  const Floats error = Product(code, scale) + minimum - x;
  return Product(error, error);
}

// The scalings of each range for n channels or tokens, from the extremes in s; false where the
// scale or the minimum of a whole range cannot be stored.
inline bool FindRanges(const Scaling& s, const Ranges& ranges, int num_ranges, bool byte_scales,
                       float levels, int64_t n) {
  Ints beyond_any{};
  for (int64_t i = n; i % kLanes != 0; ++i) s.low[i] = s.high[i] = 0.0f;
  for (int64_t i = 0; i < n; i += kLanes) {
    const Floats low = Load(s.low + i) + 0.0f, high = Load(s.high + i) + 0.0f;
    const Floats middle = (low + high) / 2.0f, half = (high - low) / 2.0f;
    for (int r = 0; r < num_ranges; ++r) {
      const Floats share = Product(half, Splat(kShares[r]));
      const Floats from = r == 0 ? low : middle - share;
      const Floats to = r == 0 ? high : middle + share;
      Ints beyond;
      const ScaleAndMinimum range =
          byte_scales ? ByteScaling(from, to, levels, &beyond) : HalfScaling(from, to, levels);
      if (!byte_scales) {
        beyond =
            ((range.stored_scale & 0x7c00) == 0x7c00) | ((range.stored_minimum & 0x7c00) == 0x7c00);
      }
      if (r == 0) beyond_any |= beyond;
      const Scaling& tried = ranges.of[r];
      StoreBits(tried.scale + i, range.scale);
      StoreBits(tried.minimum + i, range.minimum);
      StoreBits(tried.inverse + i, range.scale > 0.0f ? 1.0f / range.scale : Floats{});
      StoreBits(tried.stored[0] + i, Narrow(range.stored_scale));
      StoreBits(tried.stored[1] + i, Narrow(range.stored_minimum));
    }
  }
  return NoLane(beyond_any);
}

// Takes for each of n channels or tokens the first range with the least error into s.
inline void TakeBest(const Ranges& ranges, int num_ranges, int64_t n, const Scaling& s) {
  for (int64_t i = 0; i < n; ++i) {
    int best = 0;
    for (int r = 1; r < num_ranges; ++r) {
      if (ranges.error[r][i] < ranges.error[best][i]) best = r;
    }
    const Scaling& from = ranges.of[best];
    s.scale[i] = from.scale[i];
    s.minimum[i] = from.minimum[i];
    s.inverse[i] = from.inverse[i];
    for (int row = 0; row < 2; ++row) s.stored[row][i] = from.stored[row][i];
  }
}

// Each range's error per channel, added up token by token.
template <typename T>
void ChannelErrors(const Block<T>& block, const Ranges& ranges, float levels) {
  ForChunks(block.row_size, [&](int64_t d) __attribute__((always_inline)) {
    for (int r = 0; r < kMaxRanges; ++r) {
      const PerChannel s{ranges.of[r]};
      const Floats minimum = s.Minimum(d), scale = s.Scale(d), inverse = s.Inverse(d);
      Floats sum{};
      for (int64_t row = 0; row < block.num_rows; ++row) {
        sum += SquaredError(Load(block.Row(row) + d), minimum, scale, inverse, levels);
      }
      StoreBits(ranges.error[r] + d, sum);
    }
  });
}

// Each range's error per token: channels d, d + 16, ... in 16 sums, then these by halves.
template <typename T>
void TokenErrors(const Block<T>& block, const Ranges& ranges, float levels) {
  constexpr int kSums = kErrorLanes / kLanes;
  const int64_t whole = block.row_size / kErrorLanes * kErrorLanes;
  T rest[kErrorLanes] = {};  // what is left at a row's end
  alignas(64) float sums[kErrorLanes];
  for (int64_t row = 0; row < block.num_rows; ++row) {
    const T* x = block.Row(row);
    std::memcpy(rest, x + whole, (block.row_size - whole) * sizeof(T));
    for (int r = 0; r < kMaxRanges; ++r) {
      const Scaling& s = ranges.of[r];
      const Floats minimum = Splat(s.minimum[row]), scale = Splat(s.scale[row]);
      const Floats inverse = Splat(s.inverse[row]);
      Floats sum[kSums] = {};
      for (int64_t d = 0; d < whole; d += kErrorLanes) {
        for (int i = 0; i < kSums; ++i) {
          sum[i] += SquaredError(Load(x + d + i * kLanes), minimum, scale, inverse, levels);
        }
      }
      for (int i = 0; i < kSums; ++i) {
        Floats error = SquaredError(Load(rest + i * kLanes), minimum, scale, inverse, levels);
        for (int lane = 0; lane < kLanes; ++lane) {
          if (whole + i * kLanes + lane >= block.row_size) error[lane] = 0.0f;
        }
        StoreBits(sums + i * kLanes, sum[i] + error);
      }
      for (int width = kErrorLanes / 2; width > 0; width /= 2) {
        for (int i = 0; i < width; ++i) sums[i] += sums[i + width];
      }
      ranges.error[r][row] = sums[0];
    }
  }
}

// One row in planes of kWidthBits of each code: those from bit kShift on.
template <int kBits, int kWidthBits, int kShift, typename T, typename S>
PIKV_INLINE void EncodePlane(const T* x, int64_t row_size, const S& s, uint8_t* out) {
  constexpr float kLevels = (1 << kBits) - 1;
  const int64_t width = row_size * kWidthBits / 8;
  ForChunks(width, [&](int64_t d) __attribute__((always_inline)) {
    Ints packed{};
    for (int i = 0; i < 8 / kWidthBits; ++i) {
      const int64_t c = d + i * width;
      const Floats code = CodeOf(Load(x + c), s.Minimum(c), s.Scale(c), s.Inverse(c), kLevels);
      const Ints bits = __builtin_convertvector(code, Ints) >> kShift & ((1 << kWidthBits) - 1);
      packed |= bits << (kWidthBits * i);
    }
    StoreLowBytes(out + d, packed);
  });
}

template <int kBits, typename T, typename S>
PIKV_INLINE void EncodePackedRow(const T* x, int64_t row_size, const S& s, uint8_t* out) {
  if constexpr (kBits == 3) {
    EncodePlane<3, 2, 0>(x, row_size, s, out);
    EncodePlane<3, 1, 2>(x, row_size, s, out + row_size / 4);
  } else {
    EncodePlane<kBits, kBits, 0>(x, row_size, s, out);
  }
}

// Scales and minima of one head, `size` of each; those of all heads follow each other.
inline void StorePackedScales(const Scaling& s, const PageLayout& layout, int64_t head,
                              int64_t size, uint8_t* section) {
  for (int row = 0; row < 2; ++row) {
    uint8_t* to = section + (row * layout.num_kv_heads + head) * size * layout.ScaleBytes();
    if (layout.byte_scales == 0) {
      std::memcpy(to, s.stored[row], size * 2);
    } else {
      for (int64_t i = 0; i < size; ++i) to[i] = static_cast<uint8_t>(s.stored[row][i]);
    }
  }
}

// Keys (per channel) or values (per token) of one head, whose extremes are in s; false where a
// scale or a minimum cannot be stored.
template <int kBits, bool kKeys, typename T>
bool SealPackedBlock(const Block<T>& block, const PageLayout& layout, const Scaling& s,
                     const Ranges& ranges, uint8_t* out) {
  constexpr float kLevels = (1 << kBits) - 1;
  const int num_ranges = layout.clip ? kMaxRanges : 1;
  const bool byte_scales = layout.byte_scales != 0;
  const int64_t n = kKeys ? block.row_size : block.num_rows;
  const bool storable = FindRanges(s, ranges, num_ranges, byte_scales, kLevels, n);
  if (num_ranges > 1) {
    if constexpr (kKeys) {
      ChannelErrors(block, ranges, kLevels);
    } else {
      TokenErrors(block, ranges, kLevels);
    }
  }
  TakeBest(ranges, num_ranges, n, s);
  const int64_t row_bytes = block.row_size * kBits / 8;
  for (int64_t row = 0; row < block.num_rows; ++row) {
    const T* x = block.Row(row);
    if constexpr (kKeys) {
      EncodePackedRow<kBits>(x, block.row_size, PerChannel{s}, out + row * row_bytes);
    } else {
      const PerToken token{Splat(s.minimum[row]), Splat(s.scale[row]), Splat(s.inverse[row])};
      EncodePackedRow<kBits>(x, block.row_size, token, out + row * row_bytes);
    }
  }
  return storable;
}

template <bool kKeys, typename T>
bool SealPackedBlock(const Block<T>& block, const PageLayout& layout, const Scaling& s,
                     const Ranges& ranges, uint8_t* out) {
  switch (kKeys ? layout.key_bits : layout.value_bits) {
    case 1:
      return SealPackedBlock<1, kKeys>(block, layout, s, ranges, out);
    case 2:
      return SealPackedBlock<2, kKeys>(block, layout, s, ranges, out);
    case 3:
      return SealPackedBlock<3, kKeys>(block, layout, s, ranges, out);
    case 4:
      return SealPackedBlock<4, kKeys>(block, layout, s, ranges, out);
    default:
      return SealPackedBlock<8, kKeys>(block, layout, s, ranges, out);
  }
}

template <typename T>
int32_t SealPackedHead(const SealPagesParams& p, const Scaling& s, const Ranges& ranges,
                       int64_t page, int64_t head) {
  const PageLayout& layout = p.layout;
  const int64_t d = layout.head_dim, page_size = layout.page_size;
  const auto block = [&](const void* data, const int64_t* strides) {
    const T* rows = static_cast<const T*>(data) + page * strides[0] + head * strides[1];
    return Block<T>{rows, strides[2], page_size, d};
  };
  uint8_t* out = p.out + page * p.out_stride;
  const Block<T> keys = block(p.keys, p.key_strides);
  bool finite = ChannelExtremes(keys, s.low, s.high);
  if (p.bounds != nullptr) {
    T* low = reinterpret_cast<T*>(p.bounds + page * p.bounds_stride) + head * d;
    StoreBounds(s, d, low, low + layout.num_kv_heads * d);
  }
  bool storable =
      SealPackedBlock<true>(keys, layout, s, ranges, out + head * page_size * layout.RowBytes());
  int32_t flags = FlagsOf(finite, storable);
  StorePackedScales(s, layout, head, d, out + layout.KeyScaleOffset());
  if (layout.latent_dim > 0) return flags;

  const Block<T> values = block(p.values, p.value_strides);
  finite = RowExtremes(values, s.low, s.high);
  storable = SealPackedBlock<false>(
      values, layout, s, ranges,
      out + layout.ValueOffset() + head * page_size * layout.ValueRowBytes());
  StorePackedScales(s, layout, head, page_size, out + layout.ValueScaleOffset());
  return flags | FlagsOf(finite, storable);
}

inline SealPackedHeadFunction* SealPackedHeadOf(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat32:
      return SealPackedHead<float>;
    case Dtype::kBFloat16:
      return SealPackedHead<BFloat16>;
    case Dtype::kFloat16:
      return SealPackedHead<Float16>;
  }
  return nullptr;
}
