// The bindings hand these structs of plain pointers and sizes to the kernels. They are the same for every instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

namespace moda {

using std::int16_t;
using std::int32_t;
using std::int64_t;
using std::uint16_t;
using std::uint32_t;
using std::uint64_t;

enum class Dtype : int64_t { kFloat32 = 0, kFloat64 = 1, kFloat16 = 2, kBfloat16 = 3 };

// Bytes of one element.
constexpr int64_t width(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2;
}

// How an activation of N samples, C neurons and S positions lies in memory. It is dense in every layout.
enum class Layout : int64_t {
  kPositionsLast = 0,  // (N, C, S): contiguous
  kNeuronsLast = 1,    // (N, S, C): channels_last, tokens
  kNoPositions = 2,    // (N, C): its own pooled activation, signed
};

// One layer's activation and the tensors that go with it; what `rows` and `out` are depends on the operation.
struct Layer {
  const void* data;
  Dtype dtype;
  Layout layout;
  int64_t samples;
  int64_t neurons;
  int64_t positions;
  void* rows;  // (N, C), in the accumulation dtype: float64 for float64, else float32
  void* out;   // like data
};

// Samples sorted by class; see moda_kernels/segments.py.
struct SegmentsView {
  const int64_t* order;
  const int64_t* offsets;
  const int64_t* segment;
  int64_t same_pairs;
  int64_t diff_pairs;
  int64_t room;  // number of segments that the workspace has room for class sums of; at least the number of segments
};

// Gradients that flow into the three terms, or the terms themselves.
struct Terms {
  double affinity;
  double dispersion;
  double compactness;
};

enum class Activation : int64_t { kRelu = 0, kRelu6 = 1, kHardswish = 2, kSilu = 3, kGelu = 4 };

// Batch norm, a residual added to it, an activation and pooling as one operation. A pointer to what is absent is null; numbers per neuron
// are in the accumulation dtype. The layer is (N, C) if `layout` is kNoPositions, and has no rows then.
struct NormForward {
  Layer layer;           // data: x; rows: pooled activation; out: y, another tensor than x
  const void* residual;  // like data
  const void* weight;    // (C,)
  const void* bias;      // (C,)
  void* running_mean;    // (C,): updated with statistics of the batch, read without
  void* running_var;     // (C,)
  void* saved;           // (4, C), for backward: mean, 1 / standard deviation, that times weight, bias
  double momentum;
  double eps;
  bool of_batch;  // normalise with the batch's statistics
  Activation activation;
};

struct NormBackward {
  Layer layer;        // data: x; rows: gradient of the pooled activation, or null; out: gradient of x, another tensor than x
  const void* dy;     // like data
  const void* kept;   // like data, where there was a residual: y for kRelu and kRelu6, else the residual
  void* dresidual;    // like data, where there was a residual
  const void* saved;  // what forward wrote
  void* parameters;   // (2, C): gradients of weight and bias
  bool of_batch;
  Activation activation;
};

// One layer of a firing count.
struct FiringLayer {
  const void* data;
  Dtype dtype;
  Layout layout;
  int64_t neurons;
  int64_t positions;
  uint64_t threshold;  // bits of the threshold in the layer's dtype
  int64_t* counts;     // (K, C)
};

// The batch that firing counts are taken over.
struct FiringBatch {
  const void* labels;  // (N,) int32 or int64
  bool wide_labels;    // int64
  int64_t samples;
  int64_t classes;
  int64_t* class_sizes;  // (K,)
  int64_t* invalid;      // samples with a label outside of [0, K)
};

// One layer of class statistics: firing counts, and sums of the pooled activations.
struct StatisticsLayer {
  Layer layer;         // rows: (N, C) to work in, the activation itself if it is its own pool; out: (K, C) sums, typed as rows
  uint64_t threshold;  // bits of the threshold in the accumulation dtype
  int64_t* counts;     // (K, C)
};

// One layer of attributions.
struct AttributionLayer {
  Layer layer;           // rows: (N, C) to work in; out: (K, C) sums, typed as rows
  const void* gradient;  // of the target with respect to the activation; like data
};

// The batch that class statistics and attributions are taken over. Its labels are sorted.
struct StatisticsBatch {
  FiringBatch sorted;
  const int64_t* order;  // (N,) the sample of each sorted label; equal labels in the order of the batch
};

}  // namespace moda
