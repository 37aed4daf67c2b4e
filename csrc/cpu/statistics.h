// Class statistics: firing counts, and sums of the pooled activations per class and neuron, from one read of every activation.
//
// Two steps. The first writes every sample's pooled row, the sign bit of each of its elements saying whether the neuron fires: a
// mean of magnitudes has no sign of its own. The second adds the rows of each class in the order of the batch.
#pragma once

#include "cpu/firing.h"
#include "cpu/pool.h"

namespace moda {
namespace MODA_ISA {

constexpr int64_t kAddColumns = 128;  // neurons of a task of the second step

template <class Acc>
MODA_INLINE Bits<Acc> magnitude_bits(Acc value) { return bit_cast<Bits<Acc>>(value) & kMagnitude<Bits<Acc>>; }

template <class Acc>
MODA_INLINE Acc marked(Acc mean, bool fires) {
  const Bits<Acc> magnitude = magnitude_bits(mean);
  return bit_cast<Acc>(fires ? Bits<Acc>(magnitude | ~kMagnitude<Bits<Acc>>) : magnitude);
}

template <class T>
MODA_INLINE AccOf<T> marked_row(const T* x, int64_t positions, Bits<AccOf<T>> threshold) {
  using Acc = AccOf<T>;
  Vector<Bits<Acc>> fired{};
  bool rest_fired = false;
  const Acc sum = sum_absolute(
      x, positions, [&](Vector<Acc> magnitude) { fired |= bit_cast<Vector<Bits<Acc>>>(magnitude) > threshold; },
      [&](Acc magnitude) { rest_fired |= magnitude_bits(magnitude) > threshold; });
  const Acc mean = is_infinite(sum) ? mean_of_shares(x, positions, 1) : sum / Acc(positions);
  return marked(mean, any<Bits<Acc>>(fired) || rest_fired);
}

// Takes many short rows at a time: first their means, then, from the cache, their largest magnitudes.
template <class T>
MODA_INLINE void mark_rows(const T* x, Range part, int64_t S, Bits<AccOf<T>> threshold, AccOf<T>* rows) {
  using Acc = AccOf<T>;
  using I = Bits<Acc>;
  pool_rows(x, part, S, rows);
  reduce_rows<I>(
      part.begin, part.end, S, [&](int64_t i) { return bit_cast<Vector<I>>(absolute<Acc>(Element<T>::load(x + i))); },
      [&](int64_t i) { return magnitude_bits(Element<T>::load1(x + i)); }, larger_of,
      [&](int64_t row, Vector<I> largest) {
        const Vector<I> magnitude = load_unaligned<Vector<I>>(rows + row) & kMagnitude<I>;
        store_unaligned(rows + row, magnitude | ((largest > threshold) & ~kMagnitude<I>));
      },
      [&](int64_t row, I largest) { rows[row] = marked(rows[row], largest > threshold); });
}

// Sets the bits of `fired` where x exceeds the threshold, element by element.
template <class T>
MODA_INLINE void mark_exceeding(const T* x, Bits<AccOf<T>> threshold, Bits<AccOf<T>>* fired, int64_t count) {
  using Acc = AccOf<T>;
  constexpr int64_t lanes = kLanes<Acc>;
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    const auto exceeds = bit_cast<Vector<Bits<Acc>>>(absolute<Acc>(Element<T>::load(x + i))) > threshold;
    store_unaligned(fired + i, load_unaligned<Vector<Bits<Acc>>>(fired + i) | exceeds);
  }
  for (; i < count; ++i) fired[i] |= Bits<Acc>(magnitude_bits(Element<T>::load1(x + i)) > threshold);
}

// First step, for a layer that is not its own pool; tasks are those of pooling.
template <class T>
MODA_INLINE void mark_task(const StatisticsLayer& of, int64_t task) {
  using Acc = AccOf<T>;
  const Layer& layer = of.layer;
  const int64_t C = layer.neurons, S = layer.positions;
  const auto threshold = static_cast<Bits<Acc>>(of.threshold);
  const T* x = static_cast<const T*>(layer.data);
  Acc* rows = static_cast<Acc*>(layer.rows);
  if (layer.layout == Layout::kPositionsLast) {
    const Range part = task_rows(layer, task);
    if (are_reduced_together<Acc>(S)) return mark_rows(x, part, S, threshold, rows);
    for (int64_t row = part.begin; row < part.end; ++row) rows[row] = marked_row(x + row * S, S, threshold);
    return;
  }
  const Columns part = task_columns(layer, task);
  const int64_t begin = part.neurons.begin, columns = part.neurons.end - begin;
  x += part.sample * S * C + begin;
  rows += part.sample * C + begin;
  Bits<Acc> fired[kColumns] = {};
  sum_columns<Acc>(S, columns, rows, [&](int64_t p, Acc* sums) {
    add_absolute(x + p * C, sums, columns);
    mark_exceeding(x + p * C, threshold, fired, columns);
  });
  bound_column_means(x, columns, S, C, rows);
  for (int64_t c = 0; c < columns; ++c) rows[c] = marked(rows[c], fired[c] != 0);
}

// Adds a sample's row to the sums and counts of its class. A layer that is its own pool is signed, and its sign bits are no marks.
template <class Acc, bool own_pool>
MODA_INLINE void add_marked(const Acc* row, Bits<Acc> threshold, Acc* sums, Bits<Acc>* counts, int64_t columns) {
  for (int64_t c = 0; c < columns; ++c) {
    const Bits<Acc> magnitude = magnitude_bits(row[c]);
    sums[c] += own_pool ? row[c] : bit_cast<Acc>(magnitude);
    counts[c] += own_pool ? magnitude > threshold : bit_cast<Bits<Acc>>(row[c]) != magnitude;
  }
}

// Calls body(class, its places among the sorted labels) for every class that the batch has samples of.
template <class Body>
MODA_INLINE void over_classes(const StatisticsBatch& batch, Body body) {
  const int64_t N = batch.sorted.samples;
  for (int64_t n = 0; n < N;) {
    const int64_t label = label_of(batch.sorted, n), begin = n;
    while (n < N && label_of(batch.sorted, n) == label) ++n;
    if (is_class(batch.sorted, label)) body(label, Range{begin, n});
  }
}

// Second step: some neurons of all samples, class after class. The batch's sum is taken first and then joins the running one,
// which is thus rounded once a batch.
template <class Acc, bool own_pool>
MODA_INLINE void add_rows(const StatisticsLayer& of, const StatisticsBatch& batch, int64_t task) {
  const int64_t C = of.layer.neurons, begin = task * kAddColumns;
  const int64_t columns = smaller(kAddColumns, C - begin);
  const Acc* rows = static_cast<const Acc*>(of.layer.rows) + begin;
  over_classes(batch, [&](int64_t label, Range samples) {
    Acc sums[kAddColumns] = {};
    Bits<Acc> counts[kAddColumns] = {};
    for (int64_t n = samples.begin; n < samples.end; ++n) {
      add_marked<Acc, own_pool>(rows + batch.order[n] * C, static_cast<Bits<Acc>>(of.threshold), sums, counts, columns);
    }
    const int64_t at = label * C + begin;
    for (int64_t c = 0; c < columns; ++c) {
      static_cast<Acc*>(of.layer.out)[at + c] += sums[c];
      of.counts[at + c] += counts[c];
    }
  });
}

MODA_INLINE bool is_signed_pool(const Layer& layer) { return layer.layout == Layout::kNoPositions; }

static void class_statistics(const StatisticsLayer* layers, int64_t count, const StatisticsBatch& batch, int threads) {
  over_layers(
      count, threads, [&](int64_t l) { return is_signed_pool(layers[l].layer) ? 0 : pooling_tasks(layers[l].layer); },
      [&](int64_t l, int64_t task) {
        with_element(layers[l].layer.dtype, [&](auto element) { mark_task<decltype(element)>(layers[l], task); });
      });
  over_layers(
      count, threads, [&](int64_t l) { return divide_up(layers[l].layer.neurons, kAddColumns); },
      [&](int64_t l, int64_t task) {
        with_element(layers[l].layer.dtype, [&](auto element) {
          using Acc = AccOf<decltype(element)>;
          if (is_signed_pool(layers[l].layer)) return add_rows<Acc, true>(layers[l], batch, task);
          add_rows<Acc, false>(layers[l], batch, task);
        });
      });
  count_labels(batch.sorted);
}

}  // namespace MODA_ISA
}  // namespace moda
