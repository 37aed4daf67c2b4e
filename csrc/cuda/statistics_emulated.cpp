// csrc/cuda/statistics.cu on the host: the same work, its threads one after the other.
#include <vector>

#include "cuda/statistics.h"
#include "cuda/statistics_logic.h"

namespace moda {
namespace statistics {
namespace {

// The sums that lanes `apart`, `apart` / 2, ... down to `last` exchange, as __shfl_xor_sync does: all lanes at once.
template <class Value>
void exchange(std::vector<Value>& lanes, int apart, int last) {
  for (; apart >= last && apart > 0; apart /= 2) {
    const std::vector<Value> before = lanes;
    for (size_t lane = 0; lane < lanes.size(); ++lane) lanes[lane] = before[lane] + before[lane ^ static_cast<size_t>(apart)];
  }
}

template <class E>
void emulate_rows(const PoolTask& task, int64_t samples, int64_t block) {
  using Acc = typename E::Acc;
  for (int64_t pass = 0; pass < kPasses; ++pass) {
    for (int64_t thread = 0; thread < kThreads; thread += task.lanes) {
      const int64_t row = row_of_thread(task, block, pass, thread);
      if (row >= samples * task.neurons) continue;
      std::vector<Acc> sums;
      uint32_t fired = 0;
      for (int lane = 0; lane < task.lanes; ++lane) {
        Seen<E> seen(task.threshold);
        see_row(task, row, lane, seen);
        sums.push_back(seen.total());
        fired |= seen.fired;
      }
      exchange(sums, task.lanes / 2, 1);
      static_cast<Acc*>(task.rows)[row] = marked(sums[0] / Acc(task.positions), fired != 0);
    }
  }
}

template <class E>
void emulate_columns(const PoolTask& task, int64_t samples, int64_t block) {
  using Acc = typename E::Acc;
  constexpr int per = Seen<E>::kElements;
  std::vector<std::vector<Acc>> sums(static_cast<size_t>(kWarps * per));  // of each warp and element, its lanes'
  std::vector<uint32_t> fired(static_cast<size_t>(kThreads));
  for (int64_t thread = 0; thread < kThreads; ++thread) {
    Seen<E> seen(task.threshold);
    see_columns(task, columns_of_thread<E>(task, samples, block, thread), seen);
    fired[static_cast<size_t>(thread)] = seen.fired;
    for (int i = 0; i < per; ++i) sums[static_cast<size_t>(thread / kWarp * per + i)].push_back(seen.sum[i]);
  }
  for (auto& lanes : sums) exchange(lanes, kWarp / 2, task.lanes);
  for (int64_t thread = 0; thread < kThreads; ++thread) {
    const Columns columns = columns_of_thread<E>(task, samples, block, thread);
    if (thread % team_lanes(task) >= task.lanes || columns.data == nullptr) continue;
    Acc* const row = static_cast<Acc*>(task.rows) + sample_of_thread(task, block, thread) * task.neurons + columns.first_neuron;
    const auto lane = static_cast<size_t>(thread % kWarp);
    uint32_t fires = 0;
    for (int64_t other = thread; other / team_lanes(task) == thread / team_lanes(task); other += task.lanes) {
      fires |= fired[static_cast<size_t>(other)];
    }
    for (int i = 0; i < task.per_vector; ++i) {
      Acc sum = 0;
      for (int warp = 0; warp < task.warps; ++warp) sum += sums[static_cast<size_t>((thread / kWarp + warp) * per + i)][lane];
      row[i] = marked(sum / Acc(task.positions), (fires >> i & 1u) != 0);
    }
  }
}

void emulate_pooling(const Launch<PoolTask>& launch) {
  const int64_t samples = launch.batch.sorted.samples;
  for (int64_t at = 0; at < launch.blocks; ++at) {
    const PoolTask& task = launch.tasks[firing::layer_of(launch, at)];
    with_element(task.dtype, [&](auto element) {
      using E = decltype(element);
      if (task.across) {
        emulate_columns<E>(task, samples, at - task.first_block);
      } else {
        emulate_rows<E>(task, samples, at - task.first_block);
      }
    });
  }
}

void emulate_adding(const Launch<AddTask>& launch) {
  for (int64_t at = 0; at < launch.blocks; ++at) {
    const AddTask& task = launch.tasks[firing::layer_of(launch, at)];
    for (int64_t thread = 0; thread < kThreads; ++thread) {
      if (task.wide) {
        add_classes<double>(task, launch.batch, at - task.first_block, thread);
      } else {
        add_classes<float>(task, launch.batch, at - task.first_block, thread);
      }
    }
  }
}

}  // namespace
}  // namespace statistics

void class_statistics_emulated(const StatisticsLayer* layers, int64_t count, const StatisticsBatch& batch) {
  using namespace statistics;
  for (int64_t first = 0; first < count; first += kMaxLayers) {
    const int64_t some = count - first < kMaxLayers ? count - first : kMaxLayers;
    emulate_pooling(pool_launch_of(layers + first, some, batch));
    emulate_adding(add_launch_of(layers + first, some, batch));
  }
  for (int64_t sample = 0; sample < batch.sorted.samples; ++sample) {
    const int64_t label = firing::class_of(batch.sorted, sample);
    ++(label < 0 ? *batch.sorted.invalid : batch.sorted.class_sizes[label]);
  }
}

}  // namespace moda
