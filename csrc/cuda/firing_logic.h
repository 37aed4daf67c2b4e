// The firing counter on CUDA without its launch: which block counts what, how a warp's lanes walk an activation, and when they
// may stop. It compiles for host and device alike; csrc/cuda/firing_emulated.cpp runs it lane by lane on the host, where it is tested.
//
// A block counts a tile of neurons over a chunk of samples of one layer. In the layout (N, C, S) a group of `lanes` lanes reads
// one row (one sample's one neuron), 16 bytes each, and stops at the first step in which one of them fires. In the layout
// (N, S, C) each lane holds 16 bytes of neurons and walks the positions until all of them have fired; where a row of neurons
// does not fill a warp, its lanes share the positions out, and where there are many positions, up to eight warps do. Only an
// element's width matters, not its type: the bits of magnitudes are ordered as the magnitudes are, with NaN above all.
#pragma once

#include "types.h"

#if defined(__CUDACC__)
#define MODA_HOST_DEVICE __host__ __device__ __forceinline__
#define MODA_UNROLL _Pragma("unroll")
#else
#define MODA_HOST_DEVICE inline
#define MODA_UNROLL
#endif

namespace moda {
namespace firing {

constexpr int kWarp = 32;
constexpr int kWarps = 8;              // of a block
constexpr int64_t kMostSamples = 32;    // of a block
constexpr int64_t kBlockBytes = 256 << 10;  // that a block reads if nothing fires: few enough that large layers fill a GPU
constexpr int64_t kLeastSteps = 4;     // of a warp, before it shares a sample: with fewer, stopping early would gain nothing
constexpr int kUnroll = 4;             // loads of a lane that are under way at once
constexpr int64_t kTableLength = 6144;  // counters of a block, 24 KiB: two blocks and more fit a multiprocessor everywhere
constexpr int kMaxLayers = 55;         // of a launch: its parameters stay below the 4 KiB that every GPU takes

// How lanes walk an activation.
struct Walk {
  const void* data;
  int64_t neurons;
  int64_t positions;
  int32_t width;       // bytes of an element
  int32_t across;      // 1: layout (N, S, C) or (N, C); 0: layout (N, C, S)
  int32_t lanes;       // that share a row, or a row of neurons: a power of two
  int32_t per_vector;  // elements of a lane's load: of 16 bytes, or 1 where those would not be aligned
};

// A layer as a launch takes it.
struct Task : Walk {
  int64_t* counts;
  uint64_t threshold;
  int64_t first_block;
  int32_t warps;    // that share a sample, across: a team
  int32_t samples;  // of a block
};

struct Launch {
  FiringBatch batch;
  int64_t layers;
  int64_t blocks;  // of the layers
  Task tasks[kMaxLayers];
};
static_assert(sizeof(Launch) <= 4096, "kernel parameters");

struct alignas(16) Vector {
  uint32_t word[4];
};

MODA_HOST_DEVICE int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Neurons of a block.
MODA_HOST_DEVICE int64_t tile(const Task& task) {
  return task.across ? int64_t(task.lanes) * task.per_vector : int64_t(kWarps) * (kWarp / task.lanes);
}

MODA_HOST_DEVICE int64_t blocks_of(const Task& task, int64_t samples) {
  return divide_up(task.neurons, tile(task)) * divide_up(samples, task.samples);
}

// Whether the block's counts are first added up in shared memory, or go straight to the layer's: one sample repeats no class.
MODA_HOST_DEVICE bool has_table(const Task& task, int64_t classes) {
  return task.samples > 1 && tile(task) * classes <= kTableLength;
}

// What a block works on.
struct Work {
  int64_t layer;
  int64_t first_neuron;
  int64_t first_sample;
  int64_t end_sample;
};

// The layer that a block belongs to.
template <class Launched>
MODA_HOST_DEVICE int64_t layer_of(const Launched& launch, int64_t block) {
  int64_t low = 0, high = launch.layers - 1;
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (launch.tasks[middle].first_block <= block) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

MODA_HOST_DEVICE Work work_of(const Launch& launch, int64_t block) {
  const int64_t layer = layer_of(launch, block);
  const Task& task = launch.tasks[layer];
  const int64_t within = block - task.first_block, tiles = divide_up(task.neurons, tile(task));
  const int64_t first_sample = within / tiles * task.samples, end = first_sample + task.samples;
  return {layer, within % tiles * tile(task), first_sample, end < launch.batch.samples ? end : launch.batch.samples};
}

MODA_HOST_DEVICE int64_t label_of(const FiringBatch& batch, int64_t sample) {
  return batch.wide_labels ? static_cast<const int64_t*>(batch.labels)[sample]
                           : static_cast<const int32_t*>(batch.labels)[sample];
}

// The class of a sample, or -1 if its label is outside of [0, classes).
MODA_HOST_DEVICE int64_t class_of(const FiringBatch& batch, int64_t sample) {
  const int64_t label = label_of(batch, sample);
  return label >= 0 && label < batch.classes ? label : -1;
}

MODA_HOST_DEVICE Vector load_vector(const char* from) {
#if defined(__CUDA_ARCH__)
  const uint4 v = __ldcs(reinterpret_cast<const uint4*>(from));  // read once: do not keep it in the caches
  return {{v.x, v.y, v.z, v.w}};
#else
  return *reinterpret_cast<const Vector*>(from);
#endif
}

template <int width>
MODA_HOST_DEVICE bool element_exceeds(const char* from, uint64_t threshold) {
  if (width == 2) return (*reinterpret_cast<const uint16_t*>(from) & 0x7fffu) > threshold;
  if (width == 4) return (*reinterpret_cast<const uint32_t*>(from) & 0x7fffffffu) > threshold;
  return (*reinterpret_cast<const uint64_t*>(from) & 0x7fffffffffffffffu) > threshold;
}

// One bit for each of a vector's elements that exceeds the threshold.
template <int width>
MODA_HOST_DEVICE uint32_t exceeding(const Vector& v, uint64_t threshold) {
  uint32_t bits = 0;
  if (width == 8) {
    for (int i = 0; i < 2; ++i) {
      const uint64_t magnitude = (uint64_t(v.word[2 * i + 1] & 0x7fffffffu) << 32) | v.word[2 * i];
      bits |= uint32_t(magnitude > threshold) << i;
    }
    return bits;
  }
  const uint32_t limit = uint32_t(threshold);
  for (int i = 0; i < 4; ++i) {
    if (width == 4) {
      bits |= uint32_t((v.word[i] & 0x7fffffffu) > limit) << i;
    } else {
      bits |= uint32_t((v.word[i] & 0x7fffu) > limit) << (2 * i);
      bits |= uint32_t(((v.word[i] >> 16) & 0x7fffu) > limit) << (2 * i + 1);
    }
  }
  return bits;
}

// A row of the layout (N, C, S): elements before the first whole vector, vectors, elements after the last.
struct Row {
  const char* data;
  int64_t head;
  int64_t vectors;
  int64_t tail;
};

// Row n C + c is that of sample n and neuron c.
template <int width>
MODA_HOST_DEVICE Row row_of(const Walk& walk, int64_t row) {
  constexpr int64_t per_vector = 16 / width;
  const char* data = static_cast<const char*>(walk.data) + row * walk.positions * width;
  const int64_t to_aligned = int64_t((16 - reinterpret_cast<uintptr_t>(data) % 16) % 16) / width;
  const int64_t head = to_aligned < walk.positions ? to_aligned : walk.positions;
  const int64_t vectors = (walk.positions - head) / per_vector;
  return {data, head, vectors, walk.positions - head - vectors * per_vector};
}

// Steps until a group of lanes has read the whole row: one vector each, then kUnroll at a time.
MODA_HOST_DEVICE int64_t row_steps(const Row& row, int lanes) {
  const int64_t after_first = row.vectors - lanes;
  return 1 + (after_first > 0 ? divide_up(after_first, int64_t(lanes) * kUnroll) : 0);
}

// Gives what one lane of a group reads in one step to see.element(address) and see.vector(vector); vectors beyond the row are 0.
template <int width, class See>
MODA_HOST_DEVICE void see_row_step(const Row& row, int64_t step, int lane, int lanes, See& see) {
  constexpr int64_t per_vector = 16 / width;
  const char* const vectors = row.data + row.head * width;
  if (step == 0) {
    for (int64_t i = lane; i < row.head + row.tail; i += lanes) {
      const int64_t at = i < row.head ? i : i + row.vectors * per_vector;
      see.element(row.data + at * width);
    }
    if (lane < row.vectors) see.vector(load_vector(vectors + int64_t(lane) * 16));
    return;
  }
  const int64_t first = lanes + (step - 1) * lanes * kUnroll + lane;
  Vector loaded[kUnroll];
  MODA_UNROLL
  for (int i = 0; i < kUnroll; ++i) {
    const int64_t at = first + int64_t(i) * lanes;
    loaded[i] = at < row.vectors ? load_vector(vectors + at * 16) : Vector{{0, 0, 0, 0}};
  }
  MODA_UNROLL
  for (int i = 0; i < kUnroll; ++i) see.vector(loaded[i]);
}

// Which of a vector's elements have exceeded the threshold.
template <int width>
struct Exceeding {
  uint64_t threshold;
  uint32_t bits;
  MODA_HOST_DEVICE void element(const char* from) { bits |= uint32_t(element_exceeds<width>(from, threshold)); }
  MODA_HOST_DEVICE void vector(const Vector& v) { bits |= exceeding<width>(v, threshold); }
};

// Whether what one lane of a group reads in one step fires.
template <int width>
MODA_HOST_DEVICE bool row_step(const Row& row, int64_t step, int lane, int lanes, uint64_t threshold) {
  Exceeding<width> seen{threshold, 0};
  see_row_step<width>(row, step, lane, lanes, seen);
  return seen.bits != 0;
}

// What one lane holds in the layout (N, S, C): `per_vector` neurons, every `stride`-th position from `offset` on.
struct Columns {
  const char* data;  // of the neurons at position 0; nullptr for a lane beyond the last neuron
  int64_t first_neuron;
  int offset;
  int stride;
  uint32_t all;  // the mask of all its neurons
};

// One of `team` lanes that share a row of neurons, and the positions of a sample.
template <int width>
MODA_HOST_DEVICE Columns columns_of(const Walk& walk, int64_t sample, int64_t first_neuron, int lane, int team = kWarp) {
  const int64_t neuron = first_neuron + int64_t(lane % walk.lanes) * walk.per_vector;
  const char* data = static_cast<const char*>(walk.data) + (sample * walk.positions * walk.neurons + neuron) * width;
  const bool some = neuron < walk.neurons;
  return {some ? data : nullptr, neuron, lane / walk.lanes, team / walk.lanes, some ? (1u << walk.per_vector) - 1 : 0};
}

MODA_HOST_DEVICE int64_t column_steps(const Walk& walk, int team = kWarp) {
  return divide_up(walk.positions, int64_t(team / walk.lanes) * kUnroll);
}

// Gives what one lane reads in one step to see.element(address) or see.vector(vector); vectors beyond the last position are 0.
template <int width, class See>
MODA_HOST_DEVICE void see_column_step(const Walk& walk, const Columns& columns, int64_t step, See& see) {
  if (columns.data == nullptr) return;
  const int64_t first = step * columns.stride * kUnroll + columns.offset, row = walk.neurons * width;
  if (walk.per_vector == 1) {
    MODA_UNROLL
    for (int i = 0; i < kUnroll; ++i) {
      const int64_t at = first + int64_t(i) * columns.stride;
      if (at < walk.positions) see.element(columns.data + at * row);
    }
    return;
  }
  Vector loaded[kUnroll];
  MODA_UNROLL
  for (int i = 0; i < kUnroll; ++i) {
    const int64_t at = first + int64_t(i) * columns.stride;
    loaded[i] = at < walk.positions ? load_vector(columns.data + at * row) : Vector{{0, 0, 0, 0}};
  }
  MODA_UNROLL
  for (int i = 0; i < kUnroll; ++i) see.vector(loaded[i]);
}

// Which of a lane's neurons fire in one step.
template <int width>
MODA_HOST_DEVICE uint32_t column_step(const Task& task, const Columns& columns, int64_t step) {
  Exceeding<width> seen{task.threshold, 0};
  see_column_step<width>(task, columns, step, seen);
  return seen.bits;
}

MODA_HOST_DEVICE int32_t power_of_two_from(int64_t number, int32_t at_most) {
  int32_t power = 1;
  while (power < number && power < at_most) power *= 2;
  return power;
}

// The walk of a layer, or of any other struct that has the same fields.
template <class Of>
inline Walk walk_of(const Of& layer) {
  const auto bytes = static_cast<int32_t>(width(layer.dtype));
  const bool across = layer.layout == Layout::kNeuronsLast || layer.positions == 1;
  const int32_t per_vector = 16 / bytes;
  Walk walk{layer.data, layer.neurons, layer.positions, bytes, across, 1, per_vector};
  if (across) {
    const bool aligned = reinterpret_cast<uintptr_t>(layer.data) % 16 == 0 && layer.neurons % per_vector == 0;
    walk.per_vector = aligned ? per_vector : 1;
    walk.lanes = power_of_two_from(divide_up(layer.neurons, walk.per_vector), kWarp);
  } else {
    walk.lanes = power_of_two_from(divide_up(layer.positions, per_vector), kWarp);
  }
  return walk;
}

// A layer as a launch takes it; `first_block` is left to the launch.
inline Task task_of(const FiringLayer& layer) {
  Task task{walk_of(layer), layer.counts, layer.threshold, 0, 1, 1};
  if (task.across) task.warps = power_of_two_from(divide_up(column_steps(task), kLeastSteps), kWarps);
  const int64_t least = task.across ? kWarps / task.warps : 1;  // every team has at least one sample
  const int64_t wanted = kBlockBytes / (tile(task) * task.positions * task.width);
  task.samples = static_cast<int32_t>(wanted < least ? least : wanted < kMostSamples ? wanted : kMostSamples);
  return task;
}

// The launch of up to kMaxLayers layers.
inline Launch launch_of(const FiringLayer* layers, int64_t count, const FiringBatch& batch) {
  Launch launch{};
  launch.batch = batch;
  launch.layers = count;
  for (int64_t l = 0; l < count; ++l) {
    launch.tasks[l] = task_of(layers[l]);
    launch.tasks[l].first_block = launch.blocks;
    launch.blocks += blocks_of(launch.tasks[l], batch.samples);
  }
  return launch;
}

}  // namespace firing
}  // namespace moda
