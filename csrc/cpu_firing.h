// Firing counts: for how many samples of each class does each neuron have a position above the threshold in magnitude?
//
// Bits of floating-point magnitudes are ordered as the magnitudes are, with NaN above all: one integer comparison serves every
// dtype, and lets NaN fire. Reading stops at a neuron's first firing position.
#pragma once

#include "cpu_tasks.h"

namespace moda {
namespace MODA_ISA {

constexpr int64_t kFiringNeurons = 16;  // neurons of a task of the layout (N, C, S), at least
constexpr int64_t kStretch = 32 << 10;  // bytes of each sample that it reads, at least, so that the processor fetches ahead

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
  constexpr int64_t lanes = MODA_VECTOR_BYTES / sizeof(I);
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

// Whether a row's positions fit a cache line, and their bits a word that is read from any byte. Such a row is fetched whole
// whichever of its positions are looked at, and whether it fires at its first is a coin toss to the branch predictor.
MODA_INLINE bool has_short_rows(const FiringLayer& layer) {
  const int64_t bytes = width(layer.dtype);
  return MODA_X86 && layer.positions * bytes <= kLine && layer.positions * mask_bits_per_lane(bytes) <= 57;
}

// Neurons of a task of the layout (N, C, S).
MODA_INLINE int64_t neurons_per_task(const FiringLayer& layer) {
  return larger(kFiringNeurons, kStretch / (layer.positions * width(layer.dtype)));
}

// Layout (N, C, S): a few neurons of every sample; no other task has these neurons' counts.
template <class I>
MODA_INLINE void count_rows(const FiringLayer& layer, const FiringBatch& batch, int64_t task) {
  const int64_t C = layer.neurons, S = layer.positions, rows = neurons_per_task(layer);
  const Range neurons{task * rows, smaller((task + 1) * rows, C)};
  for (int64_t n = 0; n < batch.samples; ++n) {
    const int64_t label = label_of(batch, n);
    if (!is_class(batch, label)) continue;
    for (int64_t c = neurons.begin; c < neurons.end; ++c) {
      const I* x = static_cast<const I*>(layer.data) + (n * C + c) * S;
      __builtin_prefetch(x + C * S);  // the next sample's row: too far away for the processor to guess
      layer.counts[label * C + c] += row_fires<I>(x, S, static_cast<I>(layer.threshold));
    }
  }
}

// Layout (N, C, S), short rows: some neurons of every sample, without a branch on their values. One comparison for all positions
// of many rows gives their bits; a row fires if one of its bits is set.
template <class I>
MODA_INLINE void count_short_rows(const FiringLayer& layer, const FiringBatch& batch, int64_t task) {
  constexpr int64_t lanes = MODA_VECTOR_BYTES / sizeof(I), per_lane = mask_bits_per_lane(sizeof(I)), per_word = 64 / per_lane;
  const int64_t C = layer.neurons, S = layer.positions, rows = neurons_per_task(layer);
  const Range neurons{task * rows, smaller((task + 1) * rows, C)};
  const int64_t count = (neurons.end - neurons.begin) * S, bits = S * per_lane;
  const uint64_t row_mask = (uint64_t{1} << bits) - 1;
  const I threshold = static_cast<I>(layer.threshold);
  uint64_t words[kStretch / sizeof(I) / per_word + 2];  // and one that the last rows' words reach into
  for (int64_t n = 0; n < batch.samples; ++n) {
    const int64_t label = label_of(batch, n);
    if (!is_class(batch, label)) continue;
    const I* x = static_cast<const I*>(layer.data) + (n * C + neurons.begin) * S;
    int64_t i = 0, word = 0;
    for (; i + per_word <= count; i += per_word) {
      uint64_t fired = 0;
      for (int64_t at = 0; at < per_word; at += lanes) fired |= mask_bits<I>(exceeds(x + i + at, threshold)) << (at * per_lane);
      words[word++] = fired;
    }
    uint64_t fired = 0;
    int64_t at = 0;
    for (; i + lanes <= count; i += lanes, at += lanes) fired |= mask_bits<I>(exceeds(x + i, threshold)) << (at * per_lane);
    for (; i < count; ++i, ++at) fired |= uint64_t(exceeds1(x[i], threshold)) << (at * per_lane);
    words[word] = fired;

    const char* const bytes = reinterpret_cast<const char*>(words);
    int64_t* counts = layer.counts + label * C + neurons.begin;
    for (int64_t c = 0, bit = 0; c < neurons.end - neurons.begin; ++c, bit += bits) {
      counts[c] += (load_unaligned<uint64_t>(bytes + bit / 8) >> (bit % 8) & row_mask) != 0;
    }
  }
}

// (N, C): some neurons of every sample; no other task has these neurons' counts.
template <class I>
MODA_INLINE void count_elements(const FiringLayer& layer, const FiringBatch& batch, int64_t task) {
  const int64_t C = layer.neurons, begin = task * kColumns, end = smaller(begin + kColumns, C);
  const I threshold = static_cast<I>(layer.threshold);
  for (int64_t n = 0; n < batch.samples; ++n) {
    const int64_t label = label_of(batch, n);
    if (!is_class(batch, label)) continue;
    const I* x = static_cast<const I*>(layer.data) + n * C;
    int64_t* counts = layer.counts + label * C;
    for (int64_t c = begin; c < end; ++c) counts[c] += exceeds1(x[c], threshold);
  }
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
  if (layer.positions == 1) return divide_up(layer.neurons, kColumns);
  if (layer.layout == Layout::kPositionsLast) return divide_up(layer.neurons, neurons_per_task(layer));
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
          if (layers[l].positions == 1) return count_elements<I>(layers[l], batch, task);
          if (layers[l].layout == Layout::kPositionsLast) {
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
