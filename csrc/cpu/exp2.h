// 2^x on vectors of floats of any width. Included once per instruction set, inside its target
// pragma and a namespace: as vec.h, it has no include guard.

// For x <= 0, to 2e-9 and rounding; 0 below 2^-125, NaN for NaN.
template <typename F>
PIKV_INLINE F Exp2(F x) {
  using I = decltype(x < x);          // integers of the same width
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
