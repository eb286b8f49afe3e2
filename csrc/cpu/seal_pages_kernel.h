// Seals one KV head of one page; included by foreach_isa.h once per instruction set.
//
// Bytes are those of the reference on every instruction set: the same IEEE operations in float32
// lane by lane, rounded to nearest, and minima and maxima do not depend on an order.

// One KV head of one page: rows of head_dim elements, `stride` elements apart.
template <typename T>
struct Block {
  const T* rows;
  int64_t stride;
  int64_t num_rows;
  int64_t row_size;

  PIKV_INLINE const T* Row(int64_t row) const { return rows + row * stride; }
  PIKV_INLINE void PrefetchRow(int64_t row) const {
    const char* bytes = reinterpret_cast<const char*>(Row(row));
    for (int64_t i = 0; i < row_size * int64_t{sizeof(T)}; i += 64) __builtin_prefetch(bytes + i);
  }
};

// NaN in a lane once it has seen a NaN or an infinity.
struct FiniteCheck {
  Floats sum = {};

  PIKV_INLINE void See(Floats x) { sum = MultiplyAdd(x, Floats{}, sum); }
  PIKV_INLINE void See(const FiniteCheck& other) { sum += other.sum; }
  PIKV_INLINE bool AllFinite() const {
    const auto add = [](Floats a, Floats b) __attribute__((always_inline)) { return a + b; };
    return Reduce(sum, add)[0] == 0.0f;
  }
};

// What is noted of a head's keys or its values.
inline int32_t FlagsOf(bool finite, bool storable) {
  return !finite ? kNonFinite : storable ? 0 : kBeyondRange;
}

// Extremes of each channel over the rows. Rows come in fours to spare loads and stores of `low` and
// `high`; at the end the last row stands in for the missing ones, which changes no extreme.
template <typename T>
bool ChannelExtremes(const Block<T>& block, float* low, float* high) {
  FiniteCheck check;
  ForChunks(block.row_size, [&](int64_t d) __attribute__((always_inline)) {
    const Floats first = Load(block.Row(0) + d);
    StoreBits(low + d, first);
    StoreBits(high + d, first);
  });
  for (int64_t row = 0; row < block.num_rows; row += 4) {
    const T* rows[4];
    for (int64_t i = 0; i < 4; ++i) rows[i] = block.Row(std::min(row + i, block.num_rows - 1));
    ForChunks(block.row_size, [&](int64_t d) __attribute__((always_inline)) {
      Floats least = Load(low + d), most = Load(high + d);
      FiniteCheck here;  // a chain of additions of its own
      for (int i = 0; i < 4; ++i) {
        const Floats x = Load(rows[i] + d);
        here.See(x);
        least = Min(x, least);
        most = Max(x, most);
      }
      check.See(here);
      StoreBits(low + d, least);
      StoreBits(high + d, most);
    });
  }
  return check.AllFinite();
}

// Extremes of each row over the channels.
template <typename T>
bool RowExtremes(const Block<T>& block, float* low, float* high) {
  const auto min = [](Floats a, Floats b) __attribute__((always_inline)) { return Min(a, b); };
  const auto max = [](Floats a, Floats b) __attribute__((always_inline)) { return Max(a, b); };
  FiniteCheck check;
  for (int64_t row = 0; row < block.num_rows; ++row) {
    const T* x = block.Row(row);
    Floats least = Load(x), most = least;
    FiniteCheck here;
    ForChunks(block.row_size, [&](int64_t d) __attribute__((always_inline)) {
      const Floats v = Load(x + d);
      here.See(v);
      least = Min(v, least);
      most = Max(v, most);
    });
    check.See(here);
    low[row] = Reduce(least, min)[0];
    high[row] = Reduce(most, max)[0];
  }
  return check.AllFinite();
}

template <typename T>
bool AllFinite(const Block<T>& block) {
  FiniteCheck check;
  for (int64_t row = 0; row < block.num_rows; ++row) {
    const T* x = block.Row(row);
    ForChunks(block.row_size,
              [&](int64_t d) __attribute__((always_inline)) { check.See(Load(x + d)); });
  }
  return check.AllFinite();
}

// x as float16, rounded down.
PIKV_INLINE Ints HalfMinimum(Floats x) {
  const Ints half = ToHalf(x);
  // Down to the next one: that is one more where negative. (Never 0.0: it is above negative numbers
  // only, and those round to -0.0.)
  const Ints down = (half & 0x8000) != 0 ? Ints{} + 1 : Ints{} - 1;
  return half + ((FromHalf(half) > x) & down);
}

// What is stored of a scale and a minimum, and what decoding makes of it.
struct ScaleAndMinimum {
  Ints stored_scale, stored_minimum;
  Floats scale, minimum;
};

// Whether a lane is true nowhere.
PIKV_INLINE bool NoLane(Ints lanes) {
  bool none = true;
  for (int lane = 0; lane < kLanes; ++lane) none &= lanes[lane] == 0;
  return none;
}

// Those of integers from 0 to `levels`, in float16.
PIKV_INLINE ScaleAndMinimum HalfScaling(Floats low, Floats high, float levels) {
  ScaleAndMinimum s;
  s.stored_minimum = HalfMinimum(low);
  s.minimum = FromHalf(s.stored_minimum);
  s.stored_scale = ToHalf(Max(high - s.minimum, Floats{}) / levels);
  s.scale = FromHalf(s.stored_scale);
  return s;
}

// Scales, minima and their stored bits from the extremes; false where float16 cannot hold one.
template <Element kElement>
bool FindScaling(const Scaling& s, int64_t n) {
  Ints infinite = {};
  for (int64_t i = n; i % kLanes != 0; ++i) s.low[i] = s.high[i] = 0.0f;
  for (int64_t i = 0; i < n; i += kLanes) {
    // Of two zeros either may be the extreme; adding 0.0 leaves 0.0 of both.
    const Floats low = Load(s.low + i) + 0.0f, high = Load(s.high + i) + 0.0f;
    Ints half;
    if constexpr (kElement == Element::kFp8) {
      const Floats peak = Max(Magnitude(low), Magnitude(high));
      half = ToHalf(peak / 448.0f);
      half -= FromHalf(half) * 448.0f < peak;  // up to the next one: a true lane is -1
    } else {
      const ScaleAndMinimum found = HalfScaling(low, high, (1 << ElementBits(kElement)) - 1);
      half = found.stored_scale;
      infinite |= (found.stored_minimum & 0x7c00) == 0x7c00;
      StoreBits(s.minimum + i, found.minimum);
      StoreBits(s.stored[1] + i, Narrow(found.stored_minimum));
    }
    infinite |= (half & 0x7c00) == 0x7c00;
    const Floats scale = FromHalf(half);
    StoreBits(s.scale + i, scale);
    StoreBits(s.inverse + i, scale > 0.0f ? 1.0f / scale : Floats{});
    StoreBits(s.stored[0] + i, Narrow(half));
  }
  return NoLane(infinite);
}

// The scaling of a vector of elements: that of its channels, or that of its token.
struct PerChannel {
  Scaling s;
  PIKV_INLINE Floats Minimum(int64_t d) const { return Load(s.minimum + d); }
  PIKV_INLINE Floats Scale(int64_t d) const { return Load(s.scale + d); }
  PIKV_INLINE Floats Inverse(int64_t d) const { return Load(s.inverse + d); }
};
struct PerToken {
  Floats minimum, scale, inverse;
  PIKV_INLINE Floats Minimum(int64_t) const { return minimum; }
  PIKV_INLINE Floats Scale(int64_t) const { return scale; }
  PIKV_INLINE Floats Inverse(int64_t) const { return inverse; }
};

// x / scale as IEEE rounds it, 0 where the scale is 0.
//
// A division takes ten times as long as the rest of the encoding. With a fused multiply-add the
// product by the reciprocal, off by less than two units in the last place, is corrected by its own
// remainder, which is exact (Markstein 1990). The corrected quotient is then the exact one but for
// 2^-22 units before its rounding, and a quotient by a scale of float16's 11 bits lies at least
// 2^-12 units away from where roundings part.
PIKV_INLINE Floats Quotient(Floats x, Floats scale, Floats inverse) {
  if constexpr (!kFused) return inverse > 0.0f ? x / scale : Floats{};
  const Floats quotient = x * inverse;
  const Floats remainder = MultiplyAdd(-quotient, scale, x);
  return MultiplyAdd(remainder, inverse, quotient);
}

// Rounds a magnitude of at most 448 to e4m3, ties to even.
PIKV_INLINE Ints ToE4m3(Floats magnitude) {
  const Ints bits = (Ints)magnitude;
  const Ints odd = bits >> 20 & 1;
  const Ints normal = (bits + (0x7ffff - (120 << 23)) + odd) >> 20;
  // Below 2^-6 it counts in steps of 2^-9, which is what floats at 2^14 do.
  const Ints subnormal = (Ints)(magnitude + 0x1p14f) - (Ints)Splat(0x1p14f);
  return bits < 121 << 23 ? subnormal : normal;
}

// Codes in the low bits of each lane; above them are bits that do not count.
template <Element kElement, typename S>
PIKV_INLINE Ints Codes(Floats x, const S& s, int64_t d) {
  const Floats scale = s.Scale(d), inverse = s.Inverse(d);
  if constexpr (kElement == Element::kFp8) {
    const Ints sign = (Ints)x >> 24 & 0x80;
    const Floats magnitude = (Floats)((Ints)Quotient(x, scale, inverse) & 0x7fffffff);
    return (ToE4m3(magnitude) | sign) & (scale > 0.0f);
  }
  constexpr float kLevels = (1 << ElementBits(kElement)) - 1;
  const Floats code = Min(Quotient(x - s.Minimum(d), scale, inverse), Splat(kLevels));
  // Floats at 1.5 * 2^23 are integers: adding rounds, ties to even, and leaves the code as low
  // bits.
  return (Ints)(code + 0x1.8p23f);
}

// One row; elements share bytes as layout.h has it.
template <Element kElement, typename T, typename S>
PIKV_INLINE void EncodeRow(const T* x, int64_t row_size, const S& s, uint8_t* out) {
  constexpr int kBits = ElementBits(kElement);
  const int64_t width = row_size * kBits / 8;
  ForChunks(width, [&](int64_t d) __attribute__((always_inline)) {
    Ints packed = Codes<kElement>(Load(x + d), s, d);
    for (int i = 1; i < 8 / kBits; ++i) {
      const int64_t channel = d + i * width;
      packed |= Codes<kElement>(Load(x + channel), s, channel) << (kBits * i);
    }
    StoreLowBytes(out + d, packed);
  });
}

template <Element kElement, typename T>
void EncodePerChannel(const Block<T>& block, const Scaling& s, const Block<T>& next, uint8_t* out) {
  const int64_t row_bytes = block.row_size * ElementBits(kElement) / 8;
  for (int64_t row = 0; row < block.num_rows; ++row) {
    next.PrefetchRow(row);
    EncodeRow<kElement>(block.Row(row), block.row_size, PerChannel{s}, out + row * row_bytes);
  }
}

template <Element kElement, typename T>
void EncodePerToken(const Block<T>& block, const Scaling& s, const Block<T>& next, uint8_t* out) {
  const int64_t row_bytes = block.row_size * ElementBits(kElement) / 8;
  for (int64_t row = 0; row < block.num_rows; ++row) {
    const PerToken token{Splat(s.minimum[row]), Splat(s.scale[row]), Splat(s.inverse[row])};
    next.PrefetchRow(row);
    EncodeRow<kElement>(block.Row(row), block.row_size, token, out + row * row_bytes);
  }
}

template <typename T>
void Copy(const Block<T>& block, uint8_t* out) {
  const int64_t row_bytes = block.row_size * sizeof(T);
  for (int64_t row = 0; row < block.num_rows; ++row) {
    std::memcpy(out + row * row_bytes, block.Row(row), row_bytes);
  }
}

template <typename T>
void StoreBounds(const Scaling& s, int64_t n, T* low, T* high) {
  ForChunks(n, [&](int64_t d) __attribute__((always_inline)) {
    StoreExact(low + d, Load(s.low + d) + 0.0f);
    StoreExact(high + d, Load(s.high + d) + 0.0f);
  });
}

// The scales of one head, `size` of each kind; those of all heads follow each other.
inline void StoreScales(const Scaling& s, const PageLayout& layout, int64_t size, uint8_t* out) {
  for (int row = 0; row < ScaleRows(layout.element); ++row) {
    std::memcpy(out + row * layout.num_kv_heads * size * 2, s.stored[row], size * 2);
  }
}

template <Element kElement, typename T>
int32_t SealHead(const SealPagesParams& p, const Scaling& s, int64_t page, int64_t head) {
  const PageLayout& layout = p.layout;
  const int64_t d = layout.head_dim, page_size = layout.page_size;
  const auto block = [&](const void* data, const int64_t* strides, int64_t page, int64_t head) {
    const T* rows = static_cast<const T*>(data) + page * strides[0] + head * strides[1];
    return Block<T>{rows, strides[2], page_size, d};
  };
  const Block<T> keys = block(p.keys, p.key_strides, page, head);
  const bool latent = layout.latent_dim > 0;  // keys only
  // What comes next most likely, and nothing but an address to prefetch if it does not exist.
  const Block<T> next_keys = head + 1 < layout.num_kv_heads
                                 ? block(p.keys, p.key_strides, page, head + 1)
                                 : block(p.keys, p.key_strides, page + 1, 0);
  const Block<T> values = latent ? next_keys : block(p.values, p.value_strides, page, head);
  uint8_t* out = p.out + page * p.out_stride;
  uint8_t* key_out = out + head * page_size * layout.RowBytes();
  uint8_t* value_out = key_out + layout.ValueOffset();
  constexpr bool kPlain = ScaleRows(kElement) == 0;

  bool finite;
  if (!kPlain || p.bounds != nullptr) {
    finite = ChannelExtremes(keys, s.low, s.high);
    if (p.bounds != nullptr) {
      T* low = reinterpret_cast<T*>(p.bounds + page * p.bounds_stride) + head * d;
      StoreBounds(s, d, low, low + layout.num_kv_heads * d);
    }
  } else {
    finite = AllFinite(keys);
  }
  if constexpr (kPlain) {
    Copy(keys, key_out);
    if (latent) return FlagsOf(finite, true);
    finite &= AllFinite(values);
    Copy(values, value_out);
    return FlagsOf(finite, true);
  } else {
    int32_t flags = FlagsOf(finite, FindScaling<kElement>(s, d));
    StoreScales(s, layout, d, out + layout.KeyScaleOffset() + head * d * 2);
    EncodePerChannel<kElement>(keys, s, values, key_out);
    if (latent) return flags;

    finite = RowExtremes(values, s.low, s.high);
    flags |= FlagsOf(finite, FindScaling<kElement>(s, page_size));
    StoreScales(s, layout, page_size, out + layout.ValueScaleOffset() + head * page_size * 2);
    EncodePerToken<kElement>(values, s, next_keys, value_out);
    return flags;
  }
}

template <Element kElement>
SealHeadFunction* SealHeadOf(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat32:
      return SealHead<kElement, float>;
    case Dtype::kBFloat16:
      return SealHead<kElement, BFloat16>;
    case Dtype::kFloat16:
      return SealHead<kElement, Float16>;
  }
  return nullptr;
}

inline SealHeadFunction* SealHeadOf(Element element, Dtype dtype) {
  switch (element) {
    case Element::kFloat32:
      return SealHead<Element::kFloat32, float>;
    case Element::kBFloat16:
      return SealHead<Element::kBFloat16, BFloat16>;
    case Element::kFloat16:
      return SealHead<Element::kFloat16, Float16>;
    case Element::kFp8:
      return SealHeadOf<Element::kFp8>(dtype);
    case Element::kInt8:
      return SealHeadOf<Element::kInt8>(dtype);
    case Element::kInt4:
      return SealHeadOf<Element::kInt4>(dtype);
    case Element::kInt2:
      return SealHeadOf<Element::kInt2>(dtype);
  }
  return nullptr;
}

#include "seal_packed_kernel.h"
