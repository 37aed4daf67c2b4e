// How the work of a kernel is split into tasks for threads. Tasks depend on shapes alone, never on the number of threads, and no
// two of them write the same number: results are bitwise equal from run to run and for any number of threads.
#pragma once

#include "cpu/memory.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace moda {
namespace MODA_ISA {

constexpr int64_t kTaskBytes = 64 << 10;  // about what a task reads: long beside the cost of fetching a task, short beside a layer
constexpr int64_t kColumns = 512;         // neurons of a task of the layout (N, S, C): their sums stay in the first cache

// Calls body(layer, task) for task in [0, count(layer)) of every layer.
template <class Count, class Body>
MODA_INLINE void over_layers(int64_t layers, int threads, Count count, Body body) {
  int64_t tasks = 0;
  for (int64_t layer = 0; layer < layers; ++layer) tasks += count(layer);
  parallel_for(tasks, threads, [&](int64_t task) {
    int64_t layer = 0;
    for (int64_t of_layer; task >= (of_layer = count(layer)); ++layer) task -= of_layer;
    body(layer, task);
  });
}

// Rows (one sample's one neuron) of a task of the layout (N, C, S).
MODA_INLINE int64_t rows_per_task(const Layer& layer) {
  return larger(1, kTaskBytes / (layer.positions * width(layer.dtype)));
}

MODA_INLINE int64_t pooling_tasks(const Layer& layer) {
  if (layer.layout == Layout::kNeuronsLast) return layer.samples * divide_up(layer.neurons, kColumns);
  return divide_up(layer.samples * layer.neurons, rows_per_task(layer));
}

MODA_INLINE int64_t bytes_of(const Layer& layer) {
  return layer.samples * layer.neurons * layer.positions * width(layer.dtype);
}

// Before the first task that writes `out`.
MODA_INLINE void prepare_output(const Layer& layer) {
  if (layer.out != nullptr && layer.out != layer.data) prefer_huge_pages(layer.out, bytes_of(layer));
}

struct Range {
  int64_t begin;
  int64_t end;
};

// Rows of a task of the layout (N, C, S).
MODA_INLINE Range task_rows(const Layer& layer, int64_t task) {
  const int64_t rows = rows_per_task(layer);
  return {task * rows, smaller((task + 1) * rows, layer.samples * layer.neurons)};
}

// Sample and neurons of a task of the layout (N, S, C).
struct Columns {
  int64_t sample;
  Range neurons;
};

MODA_INLINE Columns task_columns(const Layer& layer, int64_t task) {
  const int64_t blocks = divide_up(layer.neurons, kColumns), begin = task % blocks * kColumns;
  return {task / blocks, {begin, smaller(begin + kColumns, layer.neurons)}};
}

}  // namespace MODA_ISA
}  // namespace moda
