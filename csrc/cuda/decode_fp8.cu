#include "decode_tensor.cuh"

namespace pikv_ds {

void LaunchDecodeFp8(const DecodeLaunch& launch, cudaStream_t stream) {
  LaunchDecodeTensor<Element::kFp8>(launch, stream);
}

}  // namespace pikv_ds
