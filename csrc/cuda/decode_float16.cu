#include "decode_tensor.cuh"

namespace pikv_ds {

void LaunchDecodeFloat16(const DecodeLaunch& launch, cudaStream_t stream) {
  LaunchDecodeTensor<Element::kFloat16>(launch, stream);
}

}  // namespace pikv_ds
