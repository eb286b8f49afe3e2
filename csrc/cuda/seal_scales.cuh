// What a codec makes of a range of elements, and of an element within it. Every operation that
// decides a bit is an IEEE one, in the order of reference.py.
#pragma once

#include "common.cuh"

namespace pikv_ds {
namespace {

// A float16 scale, rounded as the codec demands, and the minimum.
struct Scale {
  float scale;
  float minimum;
};

// The neighbours of a float16 that is not NaN, as nextafter() has them.
__device__ uint16_t HalfAbove(uint16_t x) { return x == 0x7c00 ? x : x + 1; }  // of x >= 0
__device__ uint16_t HalfBelow(uint16_t x) {
  if ((x & 0x7fff) == 0) return 0x8001;
  if (x == 0xfc00) return x;
  return x & 0x8000 ? x + 1 : x - 1;
}

// float16 scale and minimum of integers from 0 to `levels`.
__device__ Scale HalfScale(float low, float high, float levels) {
  const uint16_t half = FloatToHalf(low);
  // Rounded down: rounded up, it would cut off the elements below it.
  const float minimum = HalfToFloat(HalfToFloat(half) > low ? HalfBelow(half) : half);
  const float spread = fmaxf(Subtract(high, minimum), 0.0f);
  return {HalfToFloat(FloatToHalf(Divide(spread, levels))), minimum};
}

// Of the elements between low and high; see _to_fp8 and _quantize in reference.py.
template <Element kElement>
__device__ Scale MakeScale(float low, float high) {
  if constexpr (kElement == Element::kFp8) {
    const float peak = fmaxf(fabsf(low), fabsf(high));
    const uint16_t half = FloatToHalf(Divide(peak, 448.0f));
    // Rounded up, so that nothing exceeds e4m3's 448.
    const bool short_of_peak = Multiply(HalfToFloat(half), 448.0f) < peak;
    return {HalfToFloat(short_of_peak ? HalfAbove(half) : half), 0.0f};
  } else {
    return HalfScale(low, high, (1 << ElementBits(kElement)) - 1);
  }
}

// The integer that x becomes.
__device__ float Level(float x, const Scale& s, float levels) {
  if (!(s.scale > 0.0f)) return 0.0f;
  return fminf(fmaxf(rintf(Divide(Subtract(x, s.minimum), s.scale)), 0.0f), levels);
}

template <Element kElement>
__device__ uint32_t Encode(float x, const Scale& s) {
  if constexpr (kElement == Element::kFp8) {
    return s.scale > 0.0f ? FloatToE4M3(Divide(x, s.scale)) : 0;
  } else {
    return static_cast<uint32_t>(Level(x, s, (1 << ElementBits(kElement)) - 1));
  }
}

// ---- packed pages: integers of any bits, scales of a byte, narrowed ranges ----

// 2^(eighths / 8) for 0 to 7, as float32 rounds it.
__device__ float PowerOfEighths(int eighths) {
  switch (eighths) {
    case 0:
      return 1.0f;
    case 1:
      return 1.0905077326652577f;
    case 2:
      return 1.189207115002721f;
    case 3:
      return 1.2968395546510096f;
    case 4:
      return 1.4142135623730951f;
    case 5:
      return 1.5422108254079407f;
    case 6:
      return 1.681792830507429f;
    default:
      return 1.8340080864093424f;
  }
}

// What a scale's byte stands for: reference.py's BYTE_SCALES.
__device__ float ScaleOfByte(int byte) {
  const float power = PowerOfEighths(byte & 7);
  return BitsFloat(FloatBits(power) + (static_cast<uint32_t>((byte >> 3) - 24) << 23));
}

// The nearest to a step; see BYTE_LIMITS. More than 255 where that is none of a byte's.
__device__ int ByteOfScale(float step) {
  const uint32_t bits = FloatBits(fmaxf(step, 5.9604644775390625e-8f));  // 2^-24
  const float mantissa = BitsFloat((bits & 0x7fffff) | 0x3f800000);
  int byte = (static_cast<int>(bits >> 23) - (127 - 24)) * 8;
  byte += mantissa > 1.0442737824274138f;
  byte += mantissa > 1.1387886347566916f;
  byte += mantissa > 1.241857812073484f;
  byte += mantissa > 1.3542555469368927f;
  byte += mantissa > 1.4768261459394993f;
  byte += mantissa > 1.6104903319492543f;
  byte += mantissa > 1.7562521603732995f;
  byte += mantissa > 1.9152065613971474f;
  return byte;
}

struct PackedScale {
  Scale scale;
  int scale_byte, minimum_byte;  // where scales are bytes
  bool storable;
};

// Whether float16 holds both.
__device__ bool FitsHalf(const Scale& s) {
  return fabsf(s.scale) <= 65504.0f && fabsf(s.minimum) <= 65504.0f;
}

__device__ PackedScale MakePackedScale(const PageLayout& layout, float levels, float low,
                                       float high) {
  if (layout.byte_scales == 0) {
    const Scale scale = HalfScale(low, high, levels);
    return {scale, 0, 0, FitsHalf(scale)};
  }
  // The minimum must fit into a byte, too.
  const float least = Divide(fmaxf(fabsf(low), fabsf(high)), 24.0f);
  const int nearest = ByteOfScale(fmaxf(Divide(Subtract(high, low), levels), least));
  const int byte = min(nearest, 255);
  const float scale = ScaleOfByte(byte);
  const float quarters = rintf(fminf(fmaxf(Multiply(Divide(low, scale), 4.0f), -127.0f), 127.0f));
  return {{scale, Multiply(Divide(quarters, 4.0f), scale)},
          byte,
          static_cast<int>(quarters),
          nearest <= 255};
}

// How far the r-th range is narrowed: reference.py's CLIPS.
constexpr int kNarrowed = 6;
__device__ float Share(int r) {
  return r == 0 ? 0.9f : r == 1 ? 0.8f : r == 2 ? 0.7f : r == 3 ? 0.6f : r == 4 ? 0.5f : 0.4f;
}

// The scale of the range with the least error, where ranges are narrowed, storable where that of
// the whole range is; error(scale) is a sum in the order of reference.py's _sum_in_order.
template <typename Error>
__device__ PackedScale BestScale(const PageLayout& layout, float levels, float low, float high,
                                 const Error& error) {
  PackedScale best = MakePackedScale(layout, levels, low, high);
  if (layout.clip == 0) return best;
  const bool storable = best.storable;
  float least = error(best.scale);
  const float middle = Divide(Add(low, high), 2.0f), half = Divide(Subtract(high, low), 2.0f);
  for (int r = 0; r < kNarrowed; ++r) {
    const float share = Multiply(Share(r), half);
    const PackedScale tried =
        MakePackedScale(layout, levels, Subtract(middle, share), Add(middle, share));
    const float of_tried = error(tried.scale);
    if (of_tried < least) {
      best = tried;
      least = of_tried;
    }
  }
  best.storable = storable;
  return best;
}

__device__ float SquaredError(float x, const Scale& s, float levels) {
  const float error = Subtract(Add(Multiply(Level(x, s, levels), s.scale), s.minimum), x);
  return Multiply(error, error);
}

}  // namespace
}  // namespace pikv_ds
