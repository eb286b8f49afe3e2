// Unpacks rows of codes; included by foreach_isa.h once per instruction set.

typedef uint32_t UnsignedInts __attribute__((vector_size(4 * PIKV_LANES)));
typedef uint32_t Words16 __attribute__((vector_size(16)));

// `width` bytes, a multiple of Words, hold 8 / kBits pieces of codes (layout.h): each piece as
// bytes of its own, shifted up by kShift, and added to what is there where that is not 0.
template <int kBits, int kShift, typename Words>
PIKV_INLINE void UnpackPlane(const uint8_t* from, int64_t width, uint8_t* to) {
  // Shifting words brings bits of the next byte into a byte; the mask drops them.
  constexpr uint32_t kMask = ((1u << kBits) - 1) * 0x01010101u;
  for (int64_t d = 0; d < width; d += sizeof(Words)) {
    const Words packed = LoadBits<Words>(from + d);
#pragma GCC unroll 8
    for (int piece = 0; piece < 8 / kBits; ++piece) {
      Words codes = (packed >> (kBits * piece) & kMask) << kShift;
      if (kShift > 0) codes |= LoadBits<Words>(to + piece * width + d);
      StoreBits(to + piece * width + d, codes);
    }
  }
}

template <int kBits, int kShift = 0>
PIKV_INLINE void UnpackPlane(const uint8_t* from, int64_t width, uint8_t* to) {
  if (width % sizeof(UnsignedInts) == 0) {
    UnpackPlane<kBits, kShift, UnsignedInts>(from, width, to);
  } else if (width % 16 == 0) {
    UnpackPlane<kBits, kShift, Words16>(from, width, to);
  } else if (width % 4 == 0) {
    UnpackPlane<kBits, kShift, uint32_t>(from, width, to);
  } else {
    for (int64_t d = 0; d < width; ++d) {
      for (int piece = 0; piece < 8 / kBits; ++piece) {
        const int code = (from[d] >> (kBits * piece) & ((1 << kBits) - 1)) << kShift;
        to[piece * width + d] =
            static_cast<uint8_t>(kShift > 0 ? to[piece * width + d] | code : code);
      }
    }
  }
}

inline void UnpackRows(const uint8_t* from, int bits, int64_t num_rows, int64_t dim, uint8_t* to) {
  const int64_t row_bytes = dim * bits / 8;
  for (int64_t row = 0; row < num_rows; ++row, from += row_bytes, to += dim) {
    switch (bits) {
      case 1:
        UnpackPlane<1>(from, dim / 8, to);
        break;
      case 2:
        UnpackPlane<2>(from, dim / 4, to);
        break;
      case 3:
        UnpackPlane<2>(from, dim / 4, to);
        UnpackPlane<1, 2>(from + dim / 4, dim / 8, to);
        break;
      case 4:
        UnpackPlane<4>(from, dim / 2, to);
        break;
      default:
        std::memcpy(to, from, dim);
    }
  }
}

// 2^(i / 8) for the lowest three bits of each lane; `powers` holds them for lanes 0 to 7.
PIKV_INLINE Floats PowersOfEighths(Floats powers, Ints i) {
#if PIKV_LANES >= 8
  return __builtin_shuffle(powers, i & 7);
#else
  Floats result{};
  for (int lane = 0; lane < kLanes; ++lane) result[lane] = ScaleOfByte()[24 * 8 + (i[lane] & 7)];
  return result;
#endif
}

inline void UnpackScales(const uint8_t* scales, const uint8_t* minima, int64_t count,
                         float* scales_out, float* minima_out) {
  Floats powers{};
  for (int lane = 0; lane < kLanes; ++lane) powers[lane] = ScaleOfByte()[24 * 8 + lane % 8];
  const auto unpack = [&](const uint8_t* scale_bytes, const uint8_t* minimum_bytes,
                          int64_t to) __attribute__((always_inline)) {
    const Ints byte = __builtin_convertvector(LoadBits<Bytes>(scale_bytes), Ints);
    const Ints low = __builtin_convertvector(LoadBits<Bytes>(minimum_bytes), Ints);
    const Ints exponent = ((byte >> 3) - 24) << 23;
    const Floats scale = (Floats)((Ints)PowersOfEighths(powers, byte) + exponent);
    const Floats quarters = __builtin_convertvector(low << 24 >> 24, Floats);  // with its sign
    StoreBits(scales_out + to, scale);
    StoreBits(minima_out + to, quarters * 0.25f * scale);
  };
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) unpack(scales + i, minima + i, i);
  if (i >= count) return;
  uint8_t rest[2][kLanes] = {};
  std::memcpy(rest[0], scales + i, count - i);
  std::memcpy(rest[1], minima + i, count - i);
  unpack(rest[0], rest[1], i);
}
