// Stands for CUDA's header of this name where the kernels run on the emulator (see emulator.h).
#pragma once

using cudaStream_t = struct CUstream_st*;
