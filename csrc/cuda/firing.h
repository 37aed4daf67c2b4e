// Firing counts on CUDA, and the same walk on the host for its tests.
#pragma once

#include "types.h"

namespace moda {

// The message is a null pointer where there is no error.
struct CudaError {
  const char* name;
  const char* meaning;
};

// Enqueues the count on `stream` of device `device`, and does not wait for it. All pointers are to that device's memory.
CudaError count_firings_cuda(const FiringLayer* layers, int64_t count, const FiringBatch& batch, int device, void* stream);

// What the kernel does, one lane after the other, on host memory.
void count_firings_emulated(const FiringLayer* layers, int64_t count, const FiringBatch& batch);

}  // namespace moda
