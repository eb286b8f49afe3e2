// What all of the CPU's attention stands on: small functions on numbers and vectors, made for the
// instruction set of the file that includes them. Included inside its target pragma.
#pragma once

#include <cstdint>

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

}  // namespace
}  // namespace pikv_ds
