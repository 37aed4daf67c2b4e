// Class statistics (firing counts, and sums of the pooled activations) on CUDA, and the same work on the host for its tests.
#pragma once

#include "cuda/firing.h"
#include "types.h"

namespace moda {

// Enqueues the statistics on `stream` of device `device`, and does not wait for them. All pointers are to that device's memory.
CudaError class_statistics_cuda(const StatisticsLayer* layers, int64_t count, const StatisticsBatch& batch, int device,
                                void* stream);

// What the kernels do, one lane after the other, on host memory.
void class_statistics_emulated(const StatisticsLayer* layers, int64_t count, const StatisticsBatch& batch);

}  // namespace moda
