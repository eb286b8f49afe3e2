#include "decode_tensor.cuh"

namespace pikv_ds {

void LaunchDecodeInt2(const DecodeLaunch& launch, cudaStream_t stream) {
  LaunchDecodeTensor<Element::kInt2>(launch, stream);
}

}  // namespace pikv_ds
