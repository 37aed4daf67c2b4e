// Firing counts: for how many samples of each class does each neuron have a position above the threshold in magnitude?
//
// Bits of floating-point magnitudes are ordered as the magnitudes are, with NaN above all: one integer comparison serves every
// dtype, and lets NaN fire. Reading stops at a neuron's first firing position.
#pragma once

#include "cpu/rows.h"
#include "cpu/tasks.h"

namespace moda {
namespace MODA_ISA {

constexpr int64_t kFiringNeurons = 16;  // neurons of a task of the layout (N, C, S), at least
constexpr int64_t kStretch = 32 << 10;  // bytes of each sample that it reads, at least, so that the processor fetches ahead
constexpr int64_t kPage = 4096;         // bytes of a page of memory

// An integer as wide as an element.
template <class T> struct IntegerOf;
template <> struct IntegerOf<float> { using type = int32_t; };
template <> struct IntegerOf<double> { using type = int64_t; };
template <> struct IntegerOf<Half> { using type = int16_t; };
template <> struct IntegerOf<Bfloat> { using type = int16_t; };

template <class I> constexpr I kMagnitude = static_cast<I>(~(uint64_t{1} << (8 * sizeof(I) - 1)));

template <class I>
MODA_INLINE bool exceeds1(I bits, I threshold) { return I(bits & kMagnitude<I>) > threshold; }

template <class I>
MODA_INLINE Vector<I> exceeds(const I* from, I threshold) {
  return (load_unaligned<Vector<I>>(from) & kMagnitude<I>) > threshold;
}

MODA_INLINE int64_t label_of(const FiringBatch& batch, int64_t sample) {
  return batch.wide_labels ? static_cast<const int64_t*>(batch.labels)[sample]
                           : static_cast<const int32_t*>(batch.labels)[sample];
}

MODA_INLINE bool is_class(const FiringBatch& batch, int64_t label) { return label >= 0 && label < batch.classes; }

// Whether one of `count` elements in a row fires.
template <class I>
MODA_INLINE bool row_fires(const I* x, int64_t count, I threshold) {
  constexpr int64_t lanes = kLanes<I>;
  int64_t i = 0;
  // After a ReLU the first few positions decide most rows; the others are read four vectors at a time.
  for (; i + lanes <= smaller(count, 2 * lanes); i += lanes) {
    if (any<I>(exceeds(x + i, threshold))) return true;
  }
  for (; i + 4 * lanes <= count; i += 4 * lanes) {
    const Vector<I> first = exceeds(x + i, threshold) | exceeds(x + i + lanes, threshold);
    const Vector<I> second = exceeds(x + i + 2 * lanes, threshold) | exceeds(x + i + 3 * lanes, threshold);
    if (any<I>(first | second)) return true;
  }
  for (; i + lanes <= count; i += lanes) {
    if (any<I>(exceeds(x + i, threshold))) return true;
  }
  for (; i < count; ++i) {
    if (exceeds1(x[i], threshold)) return true;
  }
  return false;
}

// Whether a row's positions fit a cache line. Such a row is fetched whole whichever of its positions are looked at, and whether it
// fires at its first is a coin toss to the branch predictor.
MODA_INLINE bool has_short_rows(const FiringLayer& layer) { return layer.positions * width(layer.dtype) <= kLine; }

// Neurons of a task of the layout (N, C, S).
MODA_INLINE int64_t neurons_per_task(const FiringLayer& layer) {
  return larger(kFiringNeurons, kStretch / (layer.positions * width(layer.dtype)));
}

// Fetches a line of each page of some rows, ahead of their reading: finding a page that was not used lately takes the processor
// longer than reading it.
template <class I>
MODA_INLINE void fetch_pages(const I* x, int64_t elements) {
  for (int64_t at = 0; at < elements; at += kPage / int64_t(sizeof(I))) __builtin_prefetch(x + at);
}

// Layout (N, C, S): a few neurons of every sample; no other task has these neurons' counts.
template <class I>
MODA_INLINE void count_rows(const FiringLayer& layer, const FiringBatch& batch, int64_t task) {
  const int64_t C = layer.neurons, S = layer.positions, rows = neurons_per_task(layer);
  const Range neurons{task * rows, smaller((task + 1) * rows, C)};
  const bool share_pages = S * int64_t(sizeof(I)) <= kPage / 8;
  for (int64_t n = 0; n < batch.samples; ++n) {
    const int64_t label = label_of(batch, n);
    if (!is_class(batch, label)) continue;
    const I* data = static_cast<const I*>(layer.data) + n * C * S;
    if (share_pages) fetch_pages(data + (C + neurons.begin) * S, (neurons.end - neurons.begin) * S);
    for (int64_t c = neurons.begin; c < neurons.end; ++c) {
      const I* x = data + c * S;
      __builtin_prefetch(x + C * S);  // the next sample's row: too far away for the processor to guess
      layer.counts[label * C + c] += row_fires<I>(x, S, static_cast<I>(layer.threshold));
    }
  }
}

constexpr auto larger_of = [](auto a, auto b) { return a > b ? a : b; };  // of numbers, or lane by lane

template <class I>
MODA_INLINE Vector<I> magnitudes(const I* from) { return load_unaligned<Vector<I>>(from) & kMagnitude<I>; }

// The largest magnitudes of as many rows as a vector has lanes. Rows of `length` positions, or, if that is as many as a vector has
// lanes, of any `S`; of rows shorter than a vector a whole vector is read.
template <class I, int64_t length>
MODA_INLINE Vector<I> largest_of_rows(const I* x, int64_t S) {
  constexpr int64_t lanes = kLanes<I>;
  return join_rows<I, length>([&](int64_t i) {
    if (length < lanes) return magnitudes(x + i * lanes);
    const I* row = x + i * S;
    if (S < lanes) return keep_where<I>(first_lanes<I>(S), magnitudes(row));
    Vector<I> largest = magnitudes(row + S - lanes);
    for (int64_t at = 0; at < S - lanes; at += lanes) largest = larger_of(largest, magnitudes(row + at));
    return largest;
  }, larger_of);
}

// Adds one to the count of every lane that is set.
template <class I>
MODA_INLINE void add_where(Vector<I> mask, int64_t* counts) {
  constexpr int64_t wide = kLanes<int64_t>;
  struct Parts {
    Vector<I, wide> part[kLanes<I> / wide];
  };
  const Parts parts = bit_cast<Parts>(mask);
  for (int64_t i = 0; i < kLanes<I> / wide; ++i) {
    const auto minus_one = __builtin_convertvector(parts.part[i], Vector<int64_t>);
    store_unaligned(counts + i * wide, load_unaligned<Vector<int64_t>>(counts + i * wide) - minus_one);
  }
}

// Layout (N, C, S), short rows: some neurons of every sample, as many at a time as a vector has lanes and without a branch on
// their values.
template <class I, int64_t length>
MODA_INLINE void count_short_rows(const FiringLayer& layer, const FiringBatch& batch, int64_t task) {
  constexpr int64_t lanes = kLanes<I>;
  const int64_t C = layer.neurons, S = layer.positions, rows = neurons_per_task(layer);
  const Range neurons{task * rows, smaller((task + 1) * rows, C)};
  const I threshold = static_cast<I>(layer.threshold);
  const I* data = static_cast<const I*>(layer.data);
  const int64_t readable = batch.samples * C * S - larger(lanes * S, (lanes - 1) * S + lanes);
  for (int64_t n = 0; n < batch.samples; ++n) {
    const int64_t label = label_of(batch, n);
    if (!is_class(batch, label)) continue;
    fetch_pages(data + ((n + 1) * C + neurons.begin) * S, (neurons.end - neurons.begin) * S);
    int64_t* counts = layer.counts + label * C;
    int64_t c = neurons.begin;
    for (; c + lanes <= neurons.end && (n * C + c) * S <= readable; c += lanes) {
      add_where<I>(largest_of_rows<I, length>(data + (n * C + c) * S, S) > threshold, counts + c);
    }
    for (; c < neurons.end; ++c) counts[c] += row_fires<I>(data + (n * C + c) * S, S, threshold);
  }
}

template <class I>
MODA_INLINE void count_short_rows(const FiringLayer& layer, const FiringBatch& batch, int64_t task) {
  if (layer.positions < kLanes<I>) {
    switch (layer.positions) {
      case 1: return count_short_rows<I, 1>(layer, batch, task);
      case 2: return count_short_rows<I, 2>(layer, batch, task);
      case 4: return count_short_rows<I, 4>(layer, batch, task);
      case 8: return count_short_rows<I, smaller(8, kLanes<I>)>(layer, batch, task);
      case 16: return count_short_rows<I, smaller(16, kLanes<I>)>(layer, batch, task);
    }
  }
  count_short_rows<I, kLanes<I>>(layer, batch, task);
}

// Layout (N, S, C): up to kColumns neurons of one sample. Position after position, of those cache lines only in which a neuron
// has not fired yet. Other samples' tasks add to the same counts, hence the atomic additions; integers have no order.
template <class I>
MODA_INLINE void count_columns(const FiringLayer& layer, const FiringBatch& batch, int64_t task) {
  constexpr int64_t lanes = MODA_VECTOR_BYTES / sizeof(I), line = kLine / sizeof(I), per_line = line / lanes;
  constexpr int64_t look = 4;  // positions between two looks for finished lines
  const int64_t C = layer.neurons, S = layer.positions, blocks = divide_up(C, kColumns), n = task / blocks;
  const int64_t label = label_of(batch, n);
  if (!is_class(batch, label)) return;
  const int64_t begin = task % blocks * kColumns, columns = smaller(kColumns, C - begin), lines = columns / line;
  const I threshold = static_cast<I>(layer.threshold);
  const I* x = static_cast<const I*>(layer.data) + n * S * C + begin;
  int64_t* counts = layer.counts + label * C + begin;

  Vector<I> fired[kColumns / lanes];
  int64_t open[kColumns / line];
  int64_t still_open = lines;
  for (int64_t i = 0; i < lines * per_line; ++i) fired[i] = Vector<I>{};
  for (int64_t i = 0; i < lines; ++i) open[i] = i;
  for (int64_t p = 0; p < S && still_open > 0; ++p) {
    for (int64_t i = 0; i < still_open; ++i) {
      for (int64_t v = open[i] * per_line; v < (open[i] + 1) * per_line; ++v) {
        fired[v] |= exceeds(x + p * C + v * lanes, threshold);
      }
    }
    if (p % look != 0) continue;
    int64_t kept = 0;
    for (int64_t i = 0; i < still_open; ++i) {
      bool finished = true;
      for (int64_t v = open[i] * per_line; v < (open[i] + 1) * per_line; ++v) finished &= all<I>(fired[v]);
      if (!finished) open[kept++] = open[i];
    }
    still_open = kept;
  }
  for (int64_t c = 0; c < lines * line; ++c) {
    if (fired[c / lanes][c % lanes]) __atomic_fetch_add(counts + c, 1, __ATOMIC_RELAXED);
  }
  for (int64_t c = lines * line; c < columns; ++c) {
    int64_t p = 0;
    while (p < S && !exceeds1(x[p * C + c], threshold)) ++p;
    if (p < S) __atomic_fetch_add(counts + c, 1, __ATOMIC_RELAXED);
  }
}

MODA_INLINE int64_t firing_tasks(const FiringLayer& layer, const FiringBatch& batch) {
  if (layer.positions == 1 || layer.layout == Layout::kPositionsLast) return divide_up(layer.neurons, neurons_per_task(layer));
  return batch.samples * divide_up(layer.neurons, kColumns);
}

MODA_INLINE void count_labels(const FiringBatch& batch) {
  for (int64_t n = 0; n < batch.samples; ++n) {
    const int64_t label = label_of(batch, n);
    ++(is_class(batch, label) ? batch.class_sizes[label] : *batch.invalid);
  }
}

static void count_firings(const FiringLayer* layers, int64_t count, const FiringBatch& batch, int threads) {
  over_layers(
      count, threads, [&](int64_t l) { return firing_tasks(layers[l], batch); },
      [&](int64_t l, int64_t task) {
        with_element(layers[l].dtype, [&](auto element) {
          using I = typename IntegerOf<decltype(element)>::type;
          if (layers[l].positions == 1 || layers[l].layout == Layout::kPositionsLast) {
            if (has_short_rows(layers[l])) return count_short_rows<I>(layers[l], batch, task);
            return count_rows<I>(layers[l], batch, task);
          }
          count_columns<I>(layers[l], batch, task);
        });
      });
  count_labels(batch);
}

}  // namespace MODA_ISA
}  // namespace moda
