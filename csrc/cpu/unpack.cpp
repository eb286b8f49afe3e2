#include "unpack.h"

#include "byte_scale.h"

#define PIKV_KERNEL "unpack_kernel.h"
#include "foreach_isa.h"

namespace pikv_ds {

void UnpackRows(const uint8_t* from, int bits, int64_t num_rows, int64_t dim, uint8_t* to) {
  PIKV_BEST(WidestLanes(), UnpackRows)(from, bits, num_rows, dim, to);
}

void UnpackScales(const uint8_t* scales, const uint8_t* minima, int64_t count, float* scales_out,
                  float* minima_out) {
  PIKV_BEST(WidestLanes(), UnpackScales)(scales, minima, count, scales_out, minima_out);
}

}  // namespace pikv_ds
