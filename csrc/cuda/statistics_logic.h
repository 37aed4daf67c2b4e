// Class statistics on CUDA without their launches. The file compiles for host and device alike, as csrc/cuda/firing_logic.h does, and
// takes that file's walk to the end of every row; csrc/cuda/statistics_emulated.cpp runs it lane by lane on the host.
//
// Two steps. The first reads the activations and writes every sample's pooled row, the sign bit of each of its elements saying
// whether the neuron fires: a mean of magnitudes has no sign of its own. The second adds the rows of each class in the order of
// the batch, one thread for each class present and neuron, and adds the result to the class's counts and sums. No two threads
// write the same number, so that nothing is atomic, and every sum has an order that shapes, labels and alignment fix.
#pragma once

#include <cstring>

#include "cuda/firing_logic.h"

namespace moda {
namespace statistics {

using firing::Columns;
using firing::divide_up;
using firing::kUnroll;
using firing::kWarp;
using firing::kWarps;
using firing::Row;
using firing::Vector;
using firing::Walk;

constexpr int kMaxLayers = 50;         // of a launch: its parameters stay below the 4 KiB that every GPU takes
constexpr int64_t kThreads = int64_t(kWarp) * kWarps;
constexpr int64_t kPasses = 4;         // rows of a group of lanes, one after the other: blocks are not too short to start
constexpr int64_t kPartSteps = 16;     // steps are added up before their sum joins the row's: both sums stay short
constexpr int64_t kPositionsOfOrder = 8;  // sorted samples in which a block of the second step looks for beginnings of classes

// Element types: their accumulation dtype, and the magnitude of an element in it.
struct Float32 {
  using Acc = float;
  static constexpr int width = 4;
};
struct Float64 {
  using Acc = double;
  static constexpr int width = 8;
};
struct Float16 {
  using Acc = float;
  static constexpr int width = 2;
};
struct Bfloat16 {
  using Acc = float;
  static constexpr int width = 2;
};

// An integer as wide as a float or a double, and the bit of the sign in it.
template <class Acc> struct BitsOf;
template <> struct BitsOf<float> { using type = uint32_t; };
template <> struct BitsOf<double> { using type = uint64_t; };
template <class Acc> using Bits = typename BitsOf<Acc>::type;
template <class Acc> constexpr Bits<Acc> kSign = Bits<Acc>{1} << (8 * sizeof(Acc) - 1);

template <class To, class From>
MODA_HOST_DEVICE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

MODA_HOST_DEVICE float half_magnitude(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(static_cast<unsigned short>(bits)));
  return value;
#else
  if (bits >= 0x7c00u) return bits_as<float>(0x7f800000u | ((bits & 0x3ffu) << 13));
  return bits_as<float>(bits << 13) * 0x1p112f;  // the exponents' biases differ by 112; right for subnormals too
#endif
}

// The magnitude of 16 bits, without their sign.
MODA_HOST_DEVICE float magnitude16(Float16, uint32_t bits) { return half_magnitude(bits & 0x7fffu); }
MODA_HOST_DEVICE float magnitude16(Bfloat16, uint32_t bits) { return bits_as<float>((bits & 0x7fffu) << 16); }

// The magnitude of a vector's i-th element.
template <class E>
MODA_HOST_DEVICE float magnitude_in(E element, const Vector& v, int i) {
  return magnitude16(element, v.word[i / 2] >> (i % 2 * 16));
}
MODA_HOST_DEVICE float magnitude_in(Float32, const Vector& v, int i) { return bits_as<float>(v.word[i] & 0x7fffffffu); }
MODA_HOST_DEVICE double magnitude_in(Float64, const Vector& v, int i) {
  return bits_as<double>((uint64_t(v.word[2 * i + 1] & 0x7fffffffu) << 32) | v.word[2 * i]);
}

template <class E>
MODA_HOST_DEVICE float magnitude_at(E element, const char* from) {
  return magnitude16(element, *reinterpret_cast<const uint16_t*>(from));
}
MODA_HOST_DEVICE float magnitude_at(Float32, const char* from) {
  return bits_as<float>(*reinterpret_cast<const uint32_t*>(from) & 0x7fffffffu);
}
MODA_HOST_DEVICE double magnitude_at(Float64, const char* from) {
  return bits_as<double>(*reinterpret_cast<const uint64_t*>(from) & 0x7fffffffffffffffu);
}

// The pooled activation's magnitude with the firing as its sign, NaN included.
template <class Acc>
MODA_HOST_DEVICE Acc marked(Acc mean, bool fires) {
  const Bits<Acc> magnitude = bits_as<Bits<Acc>>(mean) & ~kSign<Acc>;
  return bits_as<Acc>(fires ? magnitude | kSign<Acc> : magnitude);
}

// What a lane has seen: sums of magnitudes and whether one of them exceeded the threshold, for each element of its vectors.
template <class E>
struct Seen {
  using Acc = typename E::Acc;
  static constexpr int kElements = 16 / E::width;

  Bits<Acc> threshold;
  uint32_t fired;
  Acc sum[kElements];
  Acc part[kElements];

  MODA_HOST_DEVICE explicit Seen(uint64_t limit) : threshold(static_cast<Bits<Acc>>(limit)), fired(0) {
    MODA_UNROLL
    for (int i = 0; i < kElements; ++i) sum[i] = part[i] = 0;
  }
  MODA_HOST_DEVICE void add(int i, Acc magnitude) {
    part[i] += magnitude;
    fired |= uint32_t(bits_as<Bits<Acc>>(magnitude) > threshold) << i;  // NaN is above all
  }
  MODA_HOST_DEVICE void element(const char* from) { add(0, magnitude_at(E{}, from)); }
  MODA_HOST_DEVICE void vector(const Vector& v) {
    MODA_UNROLL
    for (int i = 0; i < kElements; ++i) add(i, magnitude_in(E{}, v, i));
  }
  MODA_HOST_DEVICE void join_parts() {
    MODA_UNROLL
    for (int i = 0; i < kElements; ++i) {
      sum[i] += part[i];
      part[i] = 0;
    }
  }
  // The sum over all elements.
  MODA_HOST_DEVICE Acc total() const {
    Acc halves[kElements];
    MODA_UNROLL
    for (int i = 0; i < kElements; ++i) halves[i] = sum[i];
    MODA_UNROLL
    for (int apart = kElements / 2; apart > 0; apart /= 2) {
      MODA_UNROLL
      for (int i = 0; i < apart; ++i) halves[i] += halves[i + apart];
    }
    return halves[0];
  }
};

// Calls step(i) for all steps of a lane, and joins the parts of `seen` on the way.
template <class E, class Step>
MODA_HOST_DEVICE void over_steps(int64_t steps, Seen<E>& seen, Step step) {
  for (int64_t first = 0; first < steps; first += kPartSteps) {
    const int64_t end = first + kPartSteps < steps ? first + kPartSteps : steps;
    for (int64_t i = first; i < end; ++i) step(i);
    seen.join_parts();
  }
}

// The first step: a layer as a launch takes it.
struct PoolTask : Walk {
  void* rows;
  uint64_t threshold;
  int64_t first_block;
  int32_t dtype;  // Dtype
  int32_t warps;  // that share the positions of a sample: a power of two. Layout (N, S, C)
};

// The second step: a layer as a launch takes it.
struct AddTask {
  const void* rows;
  void* sums;
  int64_t* counts;
  int64_t neurons;
  uint64_t threshold;
  int64_t first_block;
  int32_t own_pool;  // 1: the rows are an (N, C) activation, signed and without marks
  int32_t wide;      // float64
};

template <class Task>
struct Launch {
  StatisticsBatch batch;
  int64_t layers;
  int64_t blocks;  // of the layers
  Task tasks[kMaxLayers];
};
static_assert(sizeof(Launch<PoolTask>) <= 4096 && sizeof(Launch<AddTask>) <= 4096, "kernel parameters");

// First step, layout (N, C, S). The rows of a block: those of its groups of lanes, in passes.
MODA_HOST_DEVICE int64_t rows_of_pass(const PoolTask& task) { return kThreads / task.lanes; }

// The row of a thread's group in a pass; a number of N C or more stands for no row.
MODA_HOST_DEVICE int64_t row_of_thread(const PoolTask& task, int64_t block, int64_t pass, int64_t thread) {
  return (block * kPasses + pass) * rows_of_pass(task) + thread / task.lanes;
}

template <class E>
MODA_HOST_DEVICE void see_row(const PoolTask& task, int64_t row_index, int lane, Seen<E>& seen) {
  const Row row = firing::row_of<E::width>(task, row_index);
  over_steps(firing::row_steps(row, task.lanes), seen,
             [&](int64_t step) { firing::see_row_step<E::width>(row, step, lane, task.lanes, seen); });
}

// First step, layout (N, S, C): a block takes a tile of neurons of as many samples as it has teams of `warps` warps.
MODA_HOST_DEVICE int team_lanes(const PoolTask& task) { return task.warps * kWarp; }
MODA_HOST_DEVICE int64_t teams(const PoolTask& task) { return kWarps / task.warps; }
MODA_HOST_DEVICE int64_t tile(const PoolTask& task) { return int64_t(task.lanes) * task.per_vector; }
MODA_HOST_DEVICE int64_t tiles(const PoolTask& task) { return divide_up(task.neurons, tile(task)); }

// The sample of a thread's team; a number of N or more stands for no sample.
MODA_HOST_DEVICE int64_t sample_of_thread(const PoolTask& task, int64_t block, int64_t thread) {
  return block / tiles(task) * teams(task) + thread / team_lanes(task);
}

// The neurons and positions that a thread holds; `data` is null if it has no sample or no neuron.
template <class E>
MODA_HOST_DEVICE Columns columns_of_thread(const PoolTask& task, int64_t samples, int64_t block, int64_t thread) {
  const int64_t sample = sample_of_thread(task, block, thread), first_neuron = block % tiles(task) * tile(task);
  const int team = team_lanes(task);
  Columns columns = firing::columns_of<E::width>(task, sample, first_neuron, static_cast<int>(thread % team), team);
  if (sample >= samples) columns.data = nullptr;
  return columns;
}

template <class E>
MODA_HOST_DEVICE void see_columns(const PoolTask& task, const Columns& columns, Seen<E>& seen) {
  over_steps(firing::column_steps(task, team_lanes(task)), seen,
             [&](int64_t step) { firing::see_column_step<E::width>(task, columns, step, seen); });
}

inline int64_t blocks_of(const PoolTask& task, int64_t samples) {
  if (task.across) return divide_up(samples, teams(task)) * tiles(task);
  return divide_up(samples * task.neurons, rows_of_pass(task) * kPasses);
}

// Second step: a block takes kThreads neurons, and the classes that begin at some of the sorted samples.
MODA_HOST_DEVICE int64_t add_tiles(const AddTask& task) { return divide_up(task.neurons, kThreads); }

inline int64_t blocks_of(const AddTask& task, int64_t samples) {
  return add_tiles(task) * divide_up(samples, kPositionsOfOrder);
}

// Where the samples of the label at position `begin` of the sorted ones end.
MODA_HOST_DEVICE int64_t end_of_class(const FiringBatch& sorted, int64_t begin) {
  const int64_t label = firing::label_of(sorted, begin);
  int64_t low = begin + 1, high = sorted.samples;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (firing::label_of(sorted, middle) == label) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// Adds the samples at [begin, end) of the order to one neuron's count and sum of their class. The batch's sum is taken first and
// then joins the running sum, which is thus rounded once a batch.
template <class Acc>
MODA_HOST_DEVICE void add_class(const AddTask& task, const int64_t* order, int64_t begin, int64_t end, int64_t label,
                                int64_t neuron) {
  const Acc* const rows = static_cast<const Acc*>(task.rows) + neuron;
  Acc part[kUnroll] = {};
  int64_t fired = 0;
  for (int64_t first = begin; first < end; first += kUnroll) {
    MODA_UNROLL
    for (int i = 0; i < kUnroll; ++i) {
      if (first + i >= end) continue;
      const Acc value = rows[order[first + i] * task.neurons];
      const Bits<Acc> bits = bits_as<Bits<Acc>>(value), magnitude = bits & ~kSign<Acc>;
      part[i] += task.own_pool ? value : bits_as<Acc>(magnitude);
      fired += task.own_pool ? magnitude > static_cast<Bits<Acc>>(task.threshold) : bits != magnitude;
    }
  }
  const int64_t at = label * task.neurons + neuron;
  static_cast<Acc*>(task.sums)[at] += (part[0] + part[1]) + (part[2] + part[3]);
  task.counts[at] += fired;
}
static_assert(kUnroll == 4, "the parts above are added by hand");

// One thread of the second step.
template <class Acc>
MODA_HOST_DEVICE void add_classes(const AddTask& task, const StatisticsBatch& batch, int64_t block, int64_t thread) {
  const int64_t neuron = block % add_tiles(task) * kThreads + thread;
  if (neuron >= task.neurons) return;
  const int64_t first = block / add_tiles(task) * kPositionsOfOrder, last = first + kPositionsOfOrder;
  for (int64_t begin = first; begin < last && begin < batch.sorted.samples; ++begin) {
    const bool begins = begin == 0 || firing::label_of(batch.sorted, begin - 1) != firing::label_of(batch.sorted, begin);
    const int64_t label = firing::class_of(batch.sorted, begin);
    if (begins && label >= 0) add_class<Acc>(task, batch.order, begin, end_of_class(batch.sorted, begin), label, neuron);
  }
}

inline bool is_own_pool(const Layer& layer) { return layer.layout == Layout::kNoPositions; }

inline PoolTask pool_task_of(const StatisticsLayer& of) {
  PoolTask task{firing::walk_of(of.layer), of.layer.rows, of.threshold, 0, static_cast<int32_t>(of.layer.dtype), 1};
  if (task.across) task.warps = firing::power_of_two_from(firing::column_steps(task), kWarps);
  return task;
}

inline AddTask add_task_of(const StatisticsLayer& of) {
  const Layer& layer = of.layer;
  return {layer.rows, layer.out, of.counts, layer.neurons, of.threshold, 0, is_own_pool(layer), layer.dtype == Dtype::kFloat64};
}

template <class Task>
inline void append(Launch<Task>& launch, Task task, int64_t samples) {
  task.first_block = launch.blocks;
  launch.blocks += blocks_of(task, samples);
  launch.tasks[launch.layers++] = task;
}

// The launches of up to kMaxLayers layers: of those that are not their own pool, and of all.
inline Launch<PoolTask> pool_launch_of(const StatisticsLayer* layers, int64_t count, const StatisticsBatch& batch) {
  Launch<PoolTask> launch{};
  launch.batch = batch;
  for (int64_t l = 0; l < count; ++l) {
    if (!is_own_pool(layers[l].layer)) append(launch, pool_task_of(layers[l]), batch.sorted.samples);
  }
  return launch;
}

inline Launch<AddTask> add_launch_of(const StatisticsLayer* layers, int64_t count, const StatisticsBatch& batch) {
  Launch<AddTask> launch{};
  launch.batch = batch;
  for (int64_t l = 0; l < count; ++l) append(launch, add_task_of(layers[l]), batch.sorted.samples);
  return launch;
}

// Calls function(E{}) with the element type of `dtype`.
template <class Function>
MODA_HOST_DEVICE void with_element(int32_t dtype, Function function) {
  switch (static_cast<Dtype>(dtype)) {
    case Dtype::kFloat32: return function(Float32{});
    case Dtype::kFloat64: return function(Float64{});
    case Dtype::kFloat16: return function(Float16{});
    case Dtype::kBfloat16: return function(Bfloat16{});
  }
}

}  // namespace statistics
}  // namespace moda
