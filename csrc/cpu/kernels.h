// The CPU kernels of one instruction set, and the choice among them.
#pragma once

#include "types.h"

namespace moda {

struct CpuKernels {
  void (*pool_forward)(const Layer* layers, int64_t count, int threads);
  void (*pool_backward)(const Layer* layers, int64_t count, int threads);
  void (*relu_pool_forward)(const Layer& layer, int threads);
  void (*relu_pool_backward)(const Layer& layer, const void* upstream, int threads);
  Terms (*losses_forward)(const Layer* layers, int64_t count, const SegmentsView& segments, void* workspace, int threads);
  void (*losses_backward)(const Layer* layers, int64_t count, const SegmentsView& segments, const Terms& upstream,
                          void* workspace, int threads);
  void (*class_sums)(const Layer* layers, int64_t count, const int64_t* labels, int64_t classes, int threads);
  void (*count_firings)(const FiringLayer* layers, int64_t count, const FiringBatch& batch, int threads);
  void (*class_statistics)(const StatisticsLayer* layers, int64_t count, const StatisticsBatch& batch, int threads);
  void (*class_attributions)(const AttributionLayer* layers, int64_t count, const StatisticsBatch& batch, int threads);
  void (*norm_relu_pool_forward)(const NormForward& norm, int threads);
  void (*norm_relu_pool_backward)(const NormBackward& norm, int threads);
};

// "portable", "avx2" or "avx512": the widest that this processor runs.
const char* best_isa();

// The kernels of an instruction set; nullptr if there is no such one here or the processor does not run it.
const CpuKernels* cpu_kernels(const char* isa);

}  // namespace moda
