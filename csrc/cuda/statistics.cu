// Class statistics on CUDA: two launches for all layers of a batch. csrc/cuda/statistics_logic.h has the work; here is what needs a GPU.
#include "cuda/device.cuh"
#include "cuda/statistics.h"
#include "cuda/statistics_logic.h"

namespace moda {
namespace statistics {
namespace {

using firing::kFull;

// The shared memory in which the lanes of a block's warps hand their sums to the first warp of their team.
struct Shared {
  alignas(16) unsigned char sums[kWarps * kWarp * 8 * sizeof(float)];  // up to 8 neurons a lane in float32, 2 in float64
  unsigned fired[kWarps * kWarp];
};

// Layout (N, C, S): each group of lanes a row.
template <class E>
__device__ __forceinline__ void pool_rows(const PoolTask& task, int64_t samples, int64_t block) {
  using Acc = typename E::Acc;
  const int lane = threadIdx.x % task.lanes;
  for (int64_t pass = 0; pass < kPasses; ++pass) {
    const int64_t row = row_of_thread(task, block, pass, threadIdx.x);
    const bool some = row < samples * task.neurons;
    Seen<E> seen(task.threshold);
    if (some) see_row(task, row, lane, seen);
    Acc sum = seen.total();
    unsigned fired = seen.fired;
    for (int apart = task.lanes / 2; apart > 0; apart /= 2) {
      sum += __shfl_xor_sync(kFull, sum, apart);
      fired |= __shfl_xor_sync(kFull, fired, apart);
    }
    if (some && lane == 0) static_cast<Acc*>(task.rows)[row] = marked(sum / Acc(task.positions), fired != 0);
  }
}

// Layout (N, S, C): each lane 16 bytes of neurons, each team of warps a sample.
template <class E>
__device__ __forceinline__ void pool_columns(const PoolTask& task, int64_t samples, int64_t block, Shared& shared) {
  using Acc = typename E::Acc;
  constexpr int per = Seen<E>::kElements;
  const Columns columns = columns_of_thread<E>(task, samples, block, threadIdx.x);
  Seen<E> seen(task.threshold);
  see_columns(task, columns, seen);
  for (int apart = kWarp / 2; apart >= task.lanes; apart /= 2) {
    seen.fired |= __shfl_xor_sync(kFull, seen.fired, apart);
    MODA_UNROLL
    for (int i = 0; i < per; ++i) seen.sum[i] += __shfl_xor_sync(kFull, seen.sum[i], apart);
  }
  Acc* const sums = reinterpret_cast<Acc*>(shared.sums);
  shared.fired[threadIdx.x] = seen.fired;
  MODA_UNROLL
  for (int i = 0; i < per; ++i) sums[i * kThreads + threadIdx.x] = seen.sum[i];
  __syncthreads();
  if (threadIdx.x % team_lanes(task) >= task.lanes || columns.data == nullptr) return;
  for (int warp = 1; warp < task.warps; ++warp) {
    seen.fired |= shared.fired[threadIdx.x + warp * kWarp];
    MODA_UNROLL
    for (int i = 0; i < per; ++i) seen.sum[i] += sums[i * kThreads + threadIdx.x + warp * kWarp];
  }
  const int64_t sample = sample_of_thread(task, block, threadIdx.x);
  Acc* const row = static_cast<Acc*>(task.rows) + sample * task.neurons + columns.first_neuron;
  MODA_UNROLL
  for (int i = 0; i < per; ++i) {
    if (i < task.per_vector) row[i] = marked(seen.sum[i] / Acc(task.positions), (seen.fired >> i & 1u) != 0);
  }
}

// Three blocks per multiprocessor, as in csrc/cuda/firing.cu: the eight sums of half precision and their parts leave registers for no more.
__global__ void __launch_bounds__(kThreads, 3) pool_kernel(const __grid_constant__ Launch<PoolTask> launch) {
  __shared__ Shared shared;
  const PoolTask& task = launch.tasks[firing::layer_of(launch, blockIdx.x)];
  const int64_t samples = launch.batch.sorted.samples, block = blockIdx.x - task.first_block;
  with_element(task.dtype, [&](auto element) {
    using E = decltype(element);
    if (task.across) {
      pool_columns<E>(task, samples, block, shared);
    } else {
      pool_rows<E>(task, samples, block);
    }
  });
}

// The block after the layers' counts the labels, if asked to.
__global__ void __launch_bounds__(kThreads) add_kernel(const __grid_constant__ Launch<AddTask> launch) {
  if (blockIdx.x >= launch.blocks) return firing::count_labels(launch.batch.sorted);
  const AddTask& task = launch.tasks[firing::layer_of(launch, blockIdx.x)];
  const int64_t block = blockIdx.x - task.first_block;
  if (task.wide) {
    add_classes<double>(task, launch.batch, block, threadIdx.x);
  } else {
    add_classes<float>(task, launch.batch, block, threadIdx.x);
  }
}

}  // namespace
}  // namespace statistics

CudaError class_statistics_cuda(const StatisticsLayer* layers, int64_t count, const StatisticsBatch& batch, int device,
                                void* stream) {
  using namespace statistics;
  // The caller restores its own device; this runtime is not PyTorch's and has to be told.
  cudaError_t error = cudaSetDevice(device);
  const auto on = static_cast<cudaStream_t>(stream);
  for (int64_t first = 0; first < count && error == cudaSuccess; first += kMaxLayers) {
    const bool last = first + kMaxLayers >= count;
    const int64_t some = last ? count - first : kMaxLayers;
    const Launch<PoolTask> pooling = pool_launch_of(layers + first, some, batch);
    if (pooling.blocks > 0) pool_kernel<<<static_cast<unsigned>(pooling.blocks), kThreads, 0, on>>>(pooling);
    error = cudaGetLastError();
    if (error != cudaSuccess) break;
    const Launch<AddTask> adding = add_launch_of(layers + first, some, batch);
    add_kernel<<<static_cast<unsigned>(adding.blocks + (last ? 1 : 0)), kThreads, 0, on>>>(adding);
    error = cudaGetLastError();
  }
  return firing::described(error);
}

}  // namespace moda
