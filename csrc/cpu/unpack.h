// Packed pages' codes as bytes, and their scales as float32.
#pragma once

#include <cstdint>

namespace pikv_ds {

// Rows of `dim` codes of `bits` bits each (layout.h), contiguous, as a byte each.
void UnpackRows(const uint8_t* from, int bits, int64_t num_rows, int64_t dim, uint8_t* to);

// Scales and minima of a byte each (layout.h); both outputs have room up to the next multiple
// of 16.
void UnpackScales(const uint8_t* scales, const uint8_t* minima, int64_t count, float* scales_out,
                  float* minima_out);

}  // namespace pikv_ds
