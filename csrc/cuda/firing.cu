// Firing counts on CUDA: one launch for all layers of a batch. csrc/cuda/firing_logic.h has the walk; here is what needs a GPU.
#include "cuda/device.cuh"

namespace moda {
namespace firing {
namespace {

// Where a block's counts go: its table in shared memory, or the layer's counts. Integer additions have no order.
struct Counters {
  int* table;  // (classes, tile); nullptr without one
  const Task* task;
  int64_t first_neuron;

  __device__ __forceinline__ void count(int64_t label, int64_t neuron) const {
    if (table != nullptr) {
      atomicAdd(table + label * tile(*task) + (neuron - first_neuron), 1);
    } else {
      add(task->counts + label * task->neurons + neuron, 1);
    }
  }
};

// Layout (N, C, S): each group of lanes a row, each warp its own neurons, sample after sample.
template <int width>
__device__ __forceinline__ void count_rows(const Task& task, const FiringBatch& batch, const Work& work, const Counters& counters) {
  const int lane = threadIdx.x % kWarp, within = lane % task.lanes, group = lane / task.lanes;
  const int rows = kWarp / task.lanes;
  const unsigned group_mask = (task.lanes == kWarp ? kFull : (1u << task.lanes) - 1) << (group * task.lanes);
  const int64_t neuron = work.first_neuron + int64_t(threadIdx.x / kWarp) * rows + group;
  const bool some = neuron < task.neurons;
  for (int64_t sample = work.first_sample; sample < work.end_sample; ++sample) {
    const int64_t label = class_of(batch, sample);
    if (label < 0) continue;  // the same for all lanes
    const Row row = some ? row_of<width>(task, sample * task.neurons + neuron) : Row{nullptr, 0, 0, 0};
    const int64_t steps = row_steps(row, task.lanes);
    bool fired = false;
    // Rows of a layer may take one step more or less, because their alignments differ; a group that has finished waits for the others.
    for (int64_t step = 0; __any_sync(kFull, some && !fired && step < steps); ++step) {
      const bool fires = some && !fired && step < steps && row_step<width>(row, step, within, task.lanes, task.threshold);
      fired |= (__ballot_sync(kFull, fires) & group_mask) != 0;
    }
    if (fired && within == 0) counters.count(label, neuron);
  }
}

// Layout (N, S, C): each lane 16 bytes of neurons, each team of warps a sample. A warp stops where its own positions have fired.
template <int width>
__device__ __forceinline__ void count_columns(const Task& task, const FiringBatch& batch, const Work& work,
                                              const Counters& counters, unsigned* of_warps) {
  const int team = task.warps * kWarp, lane = threadIdx.x % team;
  for (int64_t first = work.first_sample; first < work.end_sample; first += kWarps / task.warps) {
    const int64_t sample = first + threadIdx.x / team;
    const int64_t label = sample < work.end_sample ? class_of(batch, sample) : -1;
    const Columns columns = columns_of<width>(task, sample, work.first_neuron, lane, team);
    const int64_t steps = label < 0 ? 0 : column_steps(task, team);  // the same for all lanes of a team
    unsigned fired = 0;
    for (int64_t step = 0; step < steps; ++step) {
      fired |= column_step<width>(task, columns, step);
      for (int apart = task.lanes; apart < kWarp; apart *= 2) fired |= __shfl_xor_sync(kFull, fired, apart);
      if (__all_sync(kFull, fired == columns.all)) break;
    }
    if (task.warps > 1) {
      of_warps[threadIdx.x] = fired;
      __syncthreads();
      for (int warp = 1; warp < task.warps && lane < kWarp; ++warp) fired |= of_warps[threadIdx.x + warp * kWarp];
      __syncthreads();
    }
    if (columns.offset != 0) continue;
    for (; fired != 0; fired &= fired - 1) counters.count(label, columns.first_neuron + __ffs(fired) - 1);
  }
}

template <int width>
__device__ __forceinline__ void count_layer(const Task& task, const FiringBatch& batch, const Work& work, const Counters& counters,
                                            unsigned* of_warps) {
  if (task.across) {
    count_columns<width>(task, batch, work, counters, of_warps);
  } else {
    count_rows<width>(task, batch, work, counters);
  }
}

// The block after the layers' counts the labels, if asked to. Three blocks per multiprocessor: with the default aim of four the
// compiler spills on sm_100 and sm_120, and 24 warps of four 16-byte loads a lane are enough to fill the memory's pipeline.
__global__ void __launch_bounds__(kWarp* kWarps, 3) count_kernel(const __grid_constant__ Launch launch) {
  extern __shared__ int table[];
  __shared__ unsigned of_warps[kWarps * kWarp];  // what the warps of a team have seen fire
  if (blockIdx.x >= launch.blocks) return count_labels(launch.batch);
  const Work work = work_of(launch, blockIdx.x);
  const Task& task = launch.tasks[work.layer];
  const int64_t width_of_tile = tile(task), length = width_of_tile * launch.batch.classes;
  const bool tabled = has_table(task, launch.batch.classes);
  if (tabled) {
    for (int64_t i = threadIdx.x; i < length; i += blockDim.x) table[i] = 0;
    __syncthreads();
  }
  const Counters counters{tabled ? table : nullptr, &task, work.first_neuron};
  switch (task.width) {
    case 2: count_layer<2>(task, launch.batch, work, counters, of_warps); break;
    case 4: count_layer<4>(task, launch.batch, work, counters, of_warps); break;
    default: count_layer<8>(task, launch.batch, work, counters, of_warps); break;
  }
  if (!tabled) return;
  __syncthreads();
  for (int64_t i = threadIdx.x; i < length; i += blockDim.x) {
    if (table[i] != 0) add(task.counts + i / width_of_tile * task.neurons + work.first_neuron + i % width_of_tile, table[i]);
  }
}

size_t table_bytes(const Launch& launch) {
  int64_t length = 0;
  for (int64_t l = 0; l < launch.layers; ++l) {
    const int64_t needed = tile(launch.tasks[l]) * launch.batch.classes;
    if (has_table(launch.tasks[l], launch.batch.classes) && needed > length) length = needed;
  }
  return static_cast<size_t>(length) * sizeof(int);
}

}  // namespace
}  // namespace firing

CudaError count_firings_cuda(const FiringLayer* layers, int64_t count, const FiringBatch& batch, int device, void* stream) {
  using namespace firing;
  // The caller restores its own device; this runtime is not PyTorch's and has to be told.
  cudaError_t error = cudaSetDevice(device);
  for (int64_t first = 0; first < count && error == cudaSuccess; first += kMaxLayers) {
    const bool last = first + kMaxLayers >= count;
    const Launch launch = launch_of(layers + first, last ? count - first : kMaxLayers, batch);
    const auto blocks = static_cast<unsigned>(launch.blocks + (last ? 1 : 0));
    count_kernel<<<blocks, kWarp * kWarps, table_bytes(launch), static_cast<cudaStream_t>(stream)>>>(launch);
    error = cudaGetLastError();
  }
  return described(error);
}

}  // namespace moda
