// Attributions of neurons: how much of a sample's target goes through a neuron, to first order, added up per class.
//
//     rows[n, c] = |sum over positions of x[n, c, :] * g[n, c, :]|          out[k, c] += sum over the samples of class k of rows[n, c]
//
// Two steps from one read of the activation and its gradient, as in statistics.h: every sample's row, then the rows of each class in
// the order of the batch. Products are taken, and sums over positions blocked, in the accumulation dtype.
#pragma once

#include "cpu/pool.h"
#include "cpu/statistics.h"

namespace moda {
namespace MODA_ISA {

// Sum of x * g over `count` elements.
template <class T>
MODA_INLINE AccOf<T> sum_products(const T* x, const T* g, int64_t count) {
  using Acc = AccOf<T>;
  constexpr int64_t lanes = kLanes<Acc>;
  const auto product = [&](int64_t i) { return Element<T>::load(x + i) * Element<T>::load(g + i); };
  Acc total = 0;
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t end = smaller(begin + kBlock, count);
    Vector<Acc> sum0{}, sum1{}, sum2{}, sum3{};
    int64_t i = begin;
    for (; i + 4 * lanes <= end; i += 4 * lanes) {
      sum0 += product(i);
      sum1 += product(i + lanes);
      sum2 += product(i + 2 * lanes);
      sum3 += product(i + 3 * lanes);
    }
    for (; i + lanes <= end; i += lanes) sum0 += product(i);
    Acc rest = 0;
    for (; i < end; ++i) rest += Element<T>::load1(x + i) * Element<T>::load1(g + i);
    total += sum_lanes<Acc>((sum0 + sum1) + (sum2 + sum3)) + rest;
  }
  return total;
}

// Adds x * g to sums, element by element.
template <class T>
MODA_INLINE void add_products(const T* x, const T* g, AccOf<T>* sums, int64_t count) {
  using Acc = AccOf<T>;
  constexpr int64_t lanes = kLanes<Acc>;
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    const Vector<Acc> product = Element<T>::load(x + i) * Element<T>::load(g + i);
    store_unaligned(sums + i, load_unaligned<Vector<Acc>>(sums + i) + product);
  }
  for (; i < count; ++i) sums[i] += Element<T>::load1(x + i) * Element<T>::load1(g + i);
}

// Some rows of the layout (N, C, S); those of (N, C) are of one position.
template <class T>
MODA_INLINE void attribute_rows(const T* x, const T* g, Range part, int64_t S, AccOf<T>* rows) {
  using Acc = AccOf<T>;
  if (are_reduced_together<Acc>(S)) {
    return reduce_rows<Acc>(
        part.begin, part.end, S, [&](int64_t i) { return Element<T>::load(x + i) * Element<T>::load(g + i); },
        [&](int64_t i) { return Element<T>::load1(x + i) * Element<T>::load1(g + i); },
        [](auto a, auto b) { return a + b; },
        [&](int64_t row, Vector<Acc> sums) { store_unaligned(rows + row, absolute<Acc>(sums)); },
        [&](int64_t row, Acc sum) { rows[row] = absolute(sum); });
  }
  for (int64_t row = part.begin; row < part.end; ++row) rows[row] = absolute(sum_products(x + row * S, g + row * S, S));
}

// First step; tasks are those of pooling.
template <class T>
MODA_INLINE void attribute_task(const AttributionLayer& of, int64_t task) {
  using Acc = AccOf<T>;
  const Layer& layer = of.layer;
  const int64_t C = layer.neurons, S = layer.positions;
  const T* x = static_cast<const T*>(layer.data);
  const T* g = static_cast<const T*>(of.gradient);
  Acc* rows = static_cast<Acc*>(layer.rows);
  if (layer.layout != Layout::kNeuronsLast) return attribute_rows(x, g, task_rows(layer, task), S, rows);
  const Columns part = task_columns(layer, task);
  const int64_t begin = part.neurons.begin, columns = part.neurons.end - begin, offset = part.sample * S * C + begin;
  rows += part.sample * C + begin;
  add_columns<Acc>(S, columns, rows, [&](int64_t p, Acc* sums) {
    add_products(x + offset + p * C, g + offset + p * C, sums, columns);
  });
  for (int64_t c = 0; c < columns; ++c) rows[c] = absolute(rows[c]);
}

// Second step: some neurons of all samples, class after class.
template <class Acc>
MODA_INLINE void add_attributions(const Layer& layer, const StatisticsBatch& batch, int64_t task) {
  const int64_t C = layer.neurons, begin = task * kAddColumns, columns = smaller(kAddColumns, C - begin);
  const Acc* rows = static_cast<const Acc*>(layer.rows) + begin;
  over_classes(batch, [&](int64_t label, Range samples) {
    Acc sums[kAddColumns] = {};
    for (int64_t n = samples.begin; n < samples.end; ++n) {
      const Acc* row = rows + batch.order[n] * C;
      for (int64_t c = 0; c < columns; ++c) sums[c] += row[c];
    }
    Acc* out = static_cast<Acc*>(layer.out) + label * C + begin;
    for (int64_t c = 0; c < columns; ++c) out[c] += sums[c];
  });
}

static void class_attributions(const AttributionLayer* layers, int64_t count, const StatisticsBatch& batch, int threads) {
  over_layers(
      count, threads, [&](int64_t l) { return pooling_tasks(layers[l].layer); },
      [&](int64_t l, int64_t task) {
        with_element(layers[l].layer.dtype, [&](auto element) { attribute_task<decltype(element)>(layers[l], task); });
      });
  over_layers(
      count, threads, [&](int64_t l) { return divide_up(layers[l].layer.neurons, kAddColumns); },
      [&](int64_t l, int64_t task) {
        with_element(layers[l].layer.dtype, [&](auto element) {
          add_attributions<AccOf<decltype(element)>>(layers[l].layer, batch, task);
        });
      });
  count_labels(batch.sorted);
}

}  // namespace MODA_ISA
}  // namespace moda
