// Vectors of PIKV_LANES 32-bit numbers on GCC's vector extension: arithmetic, comparisons and
// selection (`mask ? a : b`) are operators, and what those lack is here. A C-style cast between
// vectors reinterprets their bits. Included by foreach_isa.h once per instruction set, inside a
// namespace.

inline constexpr int kLanes = PIKV_LANES;

typedef float Floats __attribute__((vector_size(4 * PIKV_LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * PIKV_LANES)));
typedef uint16_t Shorts __attribute__((vector_size(2 * PIKV_LANES)));
typedef uint8_t Bytes __attribute__((vector_size(PIKV_LANES)));

// x86's name of an operation on such vectors. Intrinsics stand where GCC 12 makes several
// instructions of what is one.
#undef PIKV_MM
#if defined(PIKV_X86_KERNELS) && PIKV_LANES == 16
#define PIKV_MM(operation) _mm512_##operation
#elif defined(PIKV_X86_KERNELS) && PIKV_LANES == 8
#define PIKV_MM(operation) _mm256_##operation
#elif defined(PIKV_X86_KERNELS) && PIKV_LANES == 4
#define PIKV_MM(operation) _mm_##operation
#endif

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

PIKV_INLINE Floats Splat(float x) { return x - Floats{}; }  // minus, lest -0.0 become 0.0

PIKV_INLINE Floats Magnitude(Floats x) { return (Floats)((Ints)x & 0x7fffffff); }

template <typename V>
PIKV_INLINE V LoadBits(const void* from) {
  V v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

template <typename V>
PIKV_INLINE void StoreBits(void* to, V v) {
  __builtin_memcpy(to, &v, sizeof v);
}

// Operands in the order of MINPS: a NaN in `x` gives `y`.
PIKV_INLINE Floats Min(Floats x, Floats y) {
#ifdef PIKV_MM
  return PIKV_MM(min_ps)(x, y);
#else
  return x < y ? x : y;
#endif
}

PIKV_INLINE Floats Max(Floats x, Floats y) {
#ifdef PIKV_MM
  return PIKV_MM(max_ps)(x, y);
#else
  return x > y ? x : y;
#endif
}

// x * y + z, rounded once where kFused.
#if defined(PIKV_X86_KERNELS) && PIKV_LANES >= 8
inline constexpr bool kFused = true;
PIKV_INLINE Floats MultiplyAdd(Floats x, Floats y, Floats z) { return PIKV_MM(fmadd_ps)(x, y, z); }
#else
inline constexpr bool kFused = false;
PIKV_INLINE Floats MultiplyAdd(Floats x, Floats y, Floats z) { return x * y + z; }
#endif

// x * y, rounded: GCC would make it and an addition after it one operation, rounded once.
PIKV_INLINE Floats Product(Floats x, Floats y) {
  Floats product = x * y;
#ifdef PIKV_MM
  __asm__("" : "+v"(product));
#else
  __asm__("" : "+m"(product));
#endif
  return product;
}

PIKV_INLINE Ints Widen(Shorts x) {
#if defined(PIKV_X86_KERNELS) && PIKV_LANES == 16
  return (Ints)_mm512_cvtepu16_epi32((__m256i)x);
#elif defined(PIKV_X86_KERNELS) && PIKV_LANES == 8
  return (Ints)_mm256_cvtepu16_epi32((__m128i)x);
#else
  return __builtin_convertvector(x, Ints);
#endif
}

// The low half of each lane.
PIKV_INLINE Shorts Narrow(Ints x) {
#if defined(PIKV_X86_KERNELS) && PIKV_LANES == 16
  return (Shorts)_mm512_cvtepi32_epi16((__m512i)x);
#else
  return __builtin_convertvector(x, Shorts);
#endif
}

// float16 in the low bits of each lane to float32.
PIKV_INLINE Floats FromHalf(Ints half) {
  // Moved into place, the exponent is too small by 112; multiplying also makes subnormals right.
  const Floats magnitude = (Floats)((half & 0x7fff) << 13) * 0x1p112f;
  const Ints infinite = (magnitude >= 65536.0f) & 0x7f800000;
  return (Floats)((Ints)magnitude | infinite | (half & 0x8000) << 16);
}

// Rounds to the nearest float16, ties to even; NaN becomes infinity.
PIKV_INLINE Ints ToHalf(Floats x) {
  const Ints magnitude = (Ints)x & 0x7fffffff;
  const Ints odd = magnitude >> 13 & 1;
  Ints half = (magnitude + (0xfff - (112 << 23)) + odd) >> 13;
  // Below 2^-14 float16 counts in steps of 2^-24, which is what floats at 0.5 do.
  const Ints subnormal = (Ints)((Floats)magnitude + 0.5f) - (Ints)Splat(0.5f);
  half = magnitude < 113 << 23 ? subnormal : half;
  half = magnitude >= 143 << 23 ? Ints{} + 0x7c00 : half;
  return half | ((Ints)x >> 16 & 0x8000);
}

PIKV_INLINE Floats Load(const float* from) { return LoadBits<Floats>(from); }
PIKV_INLINE Floats Load(const BFloat16* from) {
  return (Floats)(Widen(LoadBits<Shorts>(from)) << 16);
}
PIKV_INLINE Floats Load(const Float16* from) {
  const Shorts half = LoadBits<Shorts>(from);
#if defined(PIKV_X86_KERNELS) && PIKV_LANES == 16
  return _mm512_cvtph_ps((__m256i)half);
#elif defined(PIKV_X86_KERNELS) && PIKV_LANES == 8
  return _mm256_cvtph_ps((__m128i)half);
#else
  return FromHalf(Widen(half));
#endif
}

// Values that came from the type they go to.
PIKV_INLINE void StoreExact(float* to, Floats x) { StoreBits(to, x); }
PIKV_INLINE void StoreExact(BFloat16* to, Floats x) { StoreBits(to, Narrow((Ints)x >> 16)); }
PIKV_INLINE void StoreExact(Float16* to, Floats x) { StoreBits(to, Narrow(ToHalf(x))); }

// The low byte of each lane.
PIKV_INLINE void StoreLowBytes(uint8_t* to, Ints x) {
#if defined(PIKV_X86_KERNELS) && PIKV_LANES == 16
  StoreBits(to, _mm512_cvtepi32_epi8((__m512i)x));
#elif defined(PIKV_MM)
  const __m128i* quads = reinterpret_cast<const __m128i*>(&(x &= 0xff));
  const __m128i words = _mm_packs_epi32(quads[0], quads[kLanes / 4 - 1]);
  const __m128i bytes = _mm_packus_epi16(words, words);
  __builtin_memcpy(to, &bytes, kLanes);
#else
  StoreBits(to, __builtin_convertvector(x, Bytes));
#endif
}

template <int kBy>
PIKV_INLINE Floats Rotated(Floats x) {
  Ints lanes = {};
  for (int i = 0; i < kLanes; ++i) lanes[i] = (i + kBy) % kLanes;
  return __builtin_shuffle(x, lanes);
}

// Combines all lanes of x into each lane.
template <int kBy = kLanes / 2, typename Combine>
PIKV_INLINE Floats Reduce(Floats x, Combine combine) {
  if constexpr (kBy > 0) return Reduce<kBy / 2>(combine(x, Rotated<kBy>(x)), combine);
  return x;
}

// Chunks of a row of `count` elements, and where each begins; the last one may overlap the one
// before it. At least kLanes elements.
inline int64_t NumChunks(int64_t count) { return (count + kLanes - 1) / kLanes; }
PIKV_INLINE int64_t ChunkBegin(int64_t chunk, int64_t count) {
  return std::min(chunk * kLanes, count - kLanes);
}

// body(i) at i = 0, kLanes, 2 * kLanes, ...; the last step begins at count - kLanes and may overlap
// the one before it. At least kLanes elements.
template <typename Body>
PIKV_INLINE void ForChunks(int64_t count, Body body) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) body(i);
  if (i < count) body(count - kLanes);
}
