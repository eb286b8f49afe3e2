// Scales of a byte (layout.h): powers of two in eighths, from 2^-24 on. The same float32 as
// reference.py's table.
#pragma once

#include <array>
#include <cmath>

namespace pikv_ds {

inline const std::array<float, 256>& ScaleOfByte() {
  static const std::array<float, 256> table = [] {
    std::array<float, 256> powers;
    for (int i = 0; i < 256; ++i) powers[i] = static_cast<float>(std::exp2(i / 8.0 - 24.0));
    return powers;
  }();
  return table;
}

// 2^((i + 1/2) / 8): what lies above is nearer to the next eighth.
inline constexpr float kEighthLimits[8] = {
    1.0442737824274138f, 1.1387886347566916f, 1.241857812073484f,  1.3542555469368927f,
    1.4768261459394993f, 1.6104903319492543f, 1.7562521603732995f, 1.9152065613971474f};

}  // namespace pikv_ds
