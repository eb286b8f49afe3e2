#include "decode_tensor.cuh"

namespace pikv_ds {

void LaunchDecodeInt8(const DecodeLaunch& launch, cudaStream_t stream) {
  LaunchDecodeTensor<Element::kInt8>(launch, stream);
}

}  // namespace pikv_ds
