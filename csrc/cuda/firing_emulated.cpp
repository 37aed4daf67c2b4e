// csrc/cuda/firing.cu on the host: the same walk, its warps one after the other and their lanes one after the other.
#include <vector>

#include "cuda/firing.h"
#include "cuda/firing_logic.h"

namespace moda {
namespace firing {
namespace {

template <int width, class Count>
void emulate_rows(const Task& task, int64_t label, int64_t sample, int warp, const Work& work, Count count) {
  const int rows = kWarp / task.lanes;
  for (int group = 0; group < rows; ++group) {
    const int64_t neuron = work.first_neuron + int64_t(warp) * rows + group;
    if (neuron >= task.neurons) continue;
    const Row row = row_of<width>(task, sample * task.neurons + neuron);
    bool fired = false;
    for (int64_t step = 0; step < row_steps(row, task.lanes) && !fired; ++step) {
      for (int lane = 0; lane < task.lanes; ++lane) fired |= row_step<width>(row, step, lane, task.lanes, task.threshold);
    }
    if (fired) count(label, neuron);
  }
}

template <int width, class Count>
void emulate_columns(const Task& task, int64_t label, int64_t sample, const Work& work, Count count) {
  const int team = task.warps * kWarp;
  uint32_t of_team[kWarp] = {};
  for (int warp = 0; warp < task.warps; ++warp) {
    Columns columns[kWarp];
    uint32_t fired[kWarp] = {};
    for (int lane = 0; lane < kWarp; ++lane) {
      columns[lane] = columns_of<width>(task, sample, work.first_neuron, warp * kWarp + lane, team);
    }
    bool finished = false;
    for (int64_t step = 0; step < column_steps(task, team) && !finished; ++step) {
      for (int lane = 0; lane < kWarp; ++lane) fired[lane] |= column_step<width>(task, columns[lane], step);
      for (int lane = task.lanes; lane < kWarp; ++lane) fired[lane % task.lanes] |= fired[lane];
      finished = true;
      for (int lane = 0; lane < task.lanes; ++lane) finished &= fired[lane] == columns[lane].all;
    }
    for (int lane = 0; lane < task.lanes; ++lane) of_team[lane] |= fired[lane];
  }
  for (int lane = 0; lane < task.lanes; ++lane) {
    const Columns columns = columns_of<width>(task, sample, work.first_neuron, lane, team);
    for (int i = 0; i < task.per_vector; ++i) {
      if ((of_team[lane] >> i) & 1u) count(label, columns.first_neuron + i);
    }
  }
}

template <int width>
void emulate_block(const Launch& launch, const Work& work) {
  const Task& task = launch.tasks[work.layer];
  const bool tabled = has_table(task, launch.batch.classes);
  std::vector<int> table(tabled ? static_cast<size_t>(tile(task) * launch.batch.classes) : 0);
  const auto count = [&](int64_t label, int64_t neuron) {
    if (tabled) {
      ++table.at(static_cast<size_t>(label * tile(task) + neuron - work.first_neuron));
    } else {
      ++task.counts[label * task.neurons + neuron];
    }
  };
  for (int64_t sample = work.first_sample; sample < work.end_sample; ++sample) {
    const int64_t label = class_of(launch.batch, sample);
    if (label < 0) continue;
    if (task.across) {
      emulate_columns<width>(task, label, sample, work, count);
    } else {
      for (int warp = 0; warp < kWarps; ++warp) emulate_rows<width>(task, label, sample, warp, work, count);
    }
  }
  for (size_t i = 0; i < table.size(); ++i) {
    const auto label = static_cast<int64_t>(i) / tile(task), neuron = work.first_neuron + static_cast<int64_t>(i) % tile(task);
    if (table[i] != 0) task.counts[label * task.neurons + neuron] += table[i];
  }
}

}  // namespace
}  // namespace firing

void count_firings_emulated(const FiringLayer* layers, int64_t count, const FiringBatch& batch) {
  using namespace firing;
  for (int64_t first = 0; first < count; first += kMaxLayers) {
    const Launch launch = launch_of(layers + first, count - first < kMaxLayers ? count - first : kMaxLayers, batch);
    for (int64_t block = 0; block < launch.blocks; ++block) {
      const Work work = work_of(launch, block);
      switch (launch.tasks[work.layer].width) {
        case 2: emulate_block<2>(launch, work); break;
        case 4: emulate_block<4>(launch, work); break;
        default: emulate_block<8>(launch, work); break;
      }
    }
  }
  for (int64_t sample = 0; sample < batch.samples; ++sample) {
    const int64_t label = class_of(batch, sample);
    ++(label < 0 ? *batch.invalid : batch.class_sizes[label]);
  }
}

}  // namespace moda
