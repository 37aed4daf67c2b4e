// Helpers that the CUDA files of the firing counter share.
#pragma once

#include <cuda_runtime.h>

#include "cuda/firing.h"
#include "cuda/firing_logic.h"

namespace moda {
namespace firing {

constexpr unsigned kFull = 0xffffffffu;

__device__ __forceinline__ void add(int64_t* counter, int64_t amount) {
  atomicAdd(reinterpret_cast<unsigned long long*>(counter), static_cast<unsigned long long>(amount));
}

// Adds the batch's labels to its class sizes; the work of one block.
__device__ __forceinline__ void count_labels(const FiringBatch& batch) {
  for (int64_t sample = threadIdx.x; sample < batch.samples; sample += blockDim.x) {
    const int64_t label = class_of(batch, sample);
    add(label < 0 ? batch.invalid : batch.class_sizes + label, 1);
  }
}

inline CudaError described(cudaError_t error) {
  if (error == cudaSuccess) return {nullptr, nullptr};
  return {cudaGetErrorName(error), cudaGetErrorString(error)};
}

}  // namespace firing
}  // namespace moda
