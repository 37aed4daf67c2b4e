// Pooled activations, and their gradient.
//
//     rows[n, c] = mean over positions of |x[n, c, :]|          out[n, c, :] = rows[n, c] / S * sign(x[n, c, :])
//
// Sums are taken in blocks of positions, so that rounding grows with the block and not with the image. A mean of finite values is
// finite: where their sum is not, it is taken again of their shares.
#pragma once

#include "cpu/rows.h"
#include "cpu/tasks.h"

namespace moda {
namespace MODA_ISA {

constexpr int64_t kBlock = 4096;        // positions of a block of the layout (N, C, S)
constexpr int64_t kColumnBlock = 64;    // positions of a block of the layout (N, S, C)

// The sum of |x| over `count` elements. see(vector) or see1(element) is called with each of them on the way.
template <class T, class See, class See1>
MODA_INLINE AccOf<T> sum_absolute(const T* x, int64_t count, See see, See1 see1) {
  using Acc = AccOf<T>;
  constexpr int64_t lanes = kLanes<Acc>;
  const auto magnitude = [&](int64_t i) {
    const Vector<Acc> of = absolute<Acc>(Element<T>::load(x + i));
    see(of);
    return of;
  };
  Acc total = 0;
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t end = smaller(begin + kBlock, count);
    Vector<Acc> sum0{}, sum1{}, sum2{}, sum3{};
    int64_t i = begin;
    for (; i + 4 * lanes <= end; i += 4 * lanes) {
      sum0 += magnitude(i);
      sum1 += magnitude(i + lanes);
      sum2 += magnitude(i + 2 * lanes);
      sum3 += magnitude(i + 3 * lanes);
    }
    for (; i + lanes <= end; i += lanes) sum0 += magnitude(i);
    Acc rest = 0;
    for (; i < end; ++i) {
      const Acc of = absolute(Element<T>::load1(x + i));
      see1(of);
      rest += of;
    }
    total += sum_lanes<Acc>((sum0 + sum1) + (sum2 + sum3)) + rest;
  }
  return total;
}

template <class T>
MODA_INLINE AccOf<T> sum_absolute(const T* x, int64_t count) {
  return sum_absolute(x, count, [](Vector<AccOf<T>>) {}, [](AccOf<T>) {});
}

template <class Acc>
MODA_INLINE bool is_infinite(Acc value) { return value > (sizeof(Acc) == 4 ? Acc(__FLT_MAX__) : Acc(__DBL_MAX__)); }

// The mean of |x| over `count` elements that are `step` apart, whatever finite values they hold: of shares instead of values,
// and never more than the largest of them.
template <class T>
MODA_INLINE AccOf<T> mean_of_shares(const T* x, int64_t count, int64_t step) {
  double total = 0, largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const double magnitude = absolute(double(Element<T>::load1(x + i * step)));
    if (magnitude > largest) largest = magnitude;
    total += magnitude / double(count);
  }
  return static_cast<AccOf<T>>(total > largest ? largest : total);
}

// Takes those of `count` means again whose sums left what Acc can hold. Mean i is that of S elements from x + i * apart on.
template <class T>
MODA_INLINE void bound_means(const T* x, int64_t count, int64_t apart, int64_t S, int64_t step, AccOf<T>* means) {
  bool bounded = true;
  for (int64_t i = 0; i < count; ++i) bounded &= !is_infinite(means[i]);
  if (bounded) return;
  for (int64_t i = 0; i < count; ++i) {
    if (is_infinite(means[i])) means[i] = mean_of_shares(x + i * apart, S, step);
  }
}

// Of some rows of the layout (N, C, S).
template <class T>
MODA_INLINE void bound_row_means(const T* x, Range part, int64_t S, AccOf<T>* means) {
  bound_means(x + part.begin * S, part.end - part.begin, S, S, 1, means + part.begin);
}

// Of some neurons of one sample of the layout (N, S, C).
template <class T>
MODA_INLINE void bound_column_means(const T* x, int64_t columns, int64_t S, int64_t C, AccOf<T>* means) {
  bound_means(x, columns, 1, S, C, means);
}

// Sums over positions, for up to kColumns neurons: `add(p, sums)` adds position p to `sums`.
template <class Acc, class Add>
MODA_INLINE void add_columns(int64_t positions, int64_t columns, Acc* totals, Add add) {
  Acc sums[kColumns];
  for (int64_t c = 0; c < columns; ++c) totals[c] = 0;
  for (int64_t begin = 0; begin < positions; begin += kColumnBlock) {
    for (int64_t c = 0; c < columns; ++c) sums[c] = 0;
    const int64_t end = smaller(begin + kColumnBlock, positions);
    for (int64_t p = begin; p < end; ++p) add(p, sums);
    for (int64_t c = 0; c < columns; ++c) totals[c] += sums[c];
  }
}

// Means over positions; the arguments are those of `add_columns`.
template <class Acc, class Add>
MODA_INLINE void sum_columns(int64_t positions, int64_t columns, Acc* means, Add add) {
  add_columns(positions, columns, means, add);
  for (int64_t c = 0; c < columns; ++c) means[c] /= Acc(positions);
}

// Adds |x| to sums, element by element.
template <class T>
MODA_INLINE void add_absolute(const T* x, AccOf<T>* sums, int64_t count) {
  using Acc = AccOf<T>;
  constexpr int64_t lanes = kLanes<Acc>;
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    store_unaligned(sums + i, load_unaligned<Vector<Acc>>(sums + i) + absolute<Acc>(Element<T>::load(x + i)));
  }
  for (; i < count; ++i) sums[i] += absolute(Element<T>::load1(x + i));
}

// Pooled activations of some rows of the layout (N, C, S).
template <class T>
MODA_INLINE void pool_rows(const T* x, Range part, int64_t S, AccOf<T>* means) {
  using Acc = AccOf<T>;
  if (are_reduced_together<Acc>(S)) {
    mean_of_rows<Acc>(
        part.begin, part.end, S, means, [&](int64_t i) { return absolute<Acc>(Element<T>::load(x + i)); },
        [&](int64_t i) { return absolute(Element<T>::load1(x + i)); });
  } else {
    for (int64_t row = part.begin; row < part.end; ++row) means[row] = sum_absolute(x + row * S, S) / Acc(S);
  }
  bound_row_means(x, part, S, means);
}

// Pooled activations of some neurons of one sample, whatever the layout. `means` is that sample's row.
template <class T>
MODA_INLINE void pool_neurons(const Layer& layer, int64_t sample, Range neurons, AccOf<T>* means) {
  using Acc = AccOf<T>;
  const int64_t S = layer.positions, C = layer.neurons;
  const T* x = static_cast<const T*>(layer.data) + sample * C * S;
  if (layer.layout == Layout::kPositionsLast) return pool_rows(x, neurons, S, means);
  for (int64_t c = neurons.begin; c < neurons.end; c += kColumns) {
    const int64_t columns = smaller(kColumns, neurons.end - c);
    sum_columns<Acc>(S, columns, means + c, [&](int64_t p, Acc* sums) { add_absolute(x + p * C + c, sums, columns); });
    bound_column_means(x + c, columns, S, C, means + c);
  }
}

template <class T>
MODA_INLINE void pool_task(const Layer& layer, int64_t task) {
  using Acc = AccOf<T>;
  Acc* rows = static_cast<Acc*>(layer.rows);
  if (layer.layout == Layout::kNeuronsLast) {
    const Columns part = task_columns(layer, task);
    return pool_neurons<T>(layer, part.sample, part.neurons, rows + part.sample * layer.neurons);
  }
  pool_rows(static_cast<const T*>(layer.data), task_rows(layer, task), layer.positions, rows);
}

// gradient * sign(x), element by element; the sign of 0 and of NaN is 0.
template <class Acc>
MODA_INLINE Vector<Acc> spread(Vector<Acc> x, Vector<Acc> gradient) {
  return keep_where<Acc>(x > Acc(0), gradient) + keep_where<Acc>(x < Acc(0), -gradient);
}

template <class T>
MODA_INLINE void spread1(const T* x, AccOf<T> gradient, T* out) {
  using Acc = AccOf<T>;
  const Acc v = Element<T>::load1(x);
  Element<T>::store1(out, v > 0 ? gradient : v < 0 ? -gradient : Acc(0));
}

template <class T>
MODA_INLINE void spread_columns(const T* x, const AccOf<T>* gradient, T* out, int64_t count) {
  using Acc = AccOf<T>;
  constexpr int64_t lanes = kLanes<Acc>;
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    store(out + i, spread<Acc>(Element<T>::load(x + i), load_unaligned<Vector<Acc>>(gradient + i)));
  }
  for (; i < count; ++i) spread1(x + i, gradient[i], out + i);
}

// Calls body(offset of the first element, share of each element, elements) for pieces of the rows, each element with its row's
// share of the gradient: rows[row] / positions.
template <class Acc, class Body>
MODA_INLINE void over_short_rows(const Acc* rows, Range part, int64_t positions, Body body) {
  Acc share[kColumns];
  const int64_t at_once = kColumns / positions;
  for (int64_t begin = part.begin; begin < part.end; begin += at_once) {
    const int64_t end = smaller(begin + at_once, part.end);
    Acc* next = share;
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t p = 0; p < positions; ++p) *next++ = rows[row] / Acc(positions);
    }
    body(begin * positions, share, (end - begin) * positions);
  }
}

// The gradient of some rows of the layout (N, C, S).
template <class T>
MODA_INLINE void spread_rows(const T* x, Range part, int64_t S, const AccOf<T>* gradient, T* out) {
  using Acc = AccOf<T>;
  if (!are_shared_together<Acc>(S)) {
    return over_short_rows(gradient, part, S, [&](int64_t offset, const Acc* share, int64_t count) {
      spread_columns(x + offset, share, out + offset, count);
    });
  }
  share_among_rows(
      part.begin, part.end, S, gradient,
      [&](int64_t i, Vector<Acc> g) { store(out + i, spread<Acc>(Element<T>::load(x + i), g)); },
      [&](int64_t i, Acc g) { spread1(x + i, g, out + i); });
}

// The gradient of some neurons of one sample. `gradient` is that sample's row, of the pooled activation.
template <class T>
MODA_INLINE void spread_neurons(const Layer& layer, int64_t sample, Range neurons, const AccOf<T>* gradient) {
  using Acc = AccOf<T>;
  const int64_t S = layer.positions, C = layer.neurons;
  const T* x = static_cast<const T*>(layer.data) + sample * C * S;
  T* out = static_cast<T*>(layer.out) + sample * C * S;
  if (layer.layout == Layout::kPositionsLast) return spread_rows(x, neurons, S, gradient, out);
  for (int64_t begin = neurons.begin; begin < neurons.end; begin += kColumns) {
    const int64_t columns = smaller(kColumns, neurons.end - begin);
    Acc share[kColumns];
    for (int64_t c = 0; c < columns; ++c) share[c] = gradient[begin + c] / Acc(S);
    for (int64_t p = 0; p < S; ++p) spread_columns(x + p * C + begin, share, out + p * C + begin, columns);
  }
}

template <class T>
MODA_INLINE void spread_task(const Layer& layer, int64_t task) {
  using Acc = AccOf<T>;
  const Acc* rows = static_cast<const Acc*>(layer.rows);
  if (layer.layout == Layout::kNeuronsLast) {
    const Columns part = task_columns(layer, task);
    return spread_neurons<T>(layer, part.sample, part.neurons, rows + part.sample * layer.neurons);
  }
  const T* x = static_cast<const T*>(layer.data);
  spread_rows(x, task_rows(layer, task), layer.positions, rows, static_cast<T*>(layer.out));
}

static inline void pool_forward(const Layer* layers, int64_t count, int threads) {
  over_layers(
      count, threads, [&](int64_t l) { return pooling_tasks(layers[l]); },
      [&](int64_t l, int64_t task) {
        with_element(layers[l].dtype, [&](auto element) { pool_task<decltype(element)>(layers[l], task); });
      });
}

static inline void pool_backward(const Layer* layers, int64_t count, int threads) {
  for (int64_t l = 0; l < count; ++l) prepare_output(layers[l]);
  over_layers(
      count, threads, [&](int64_t l) { return pooling_tasks(layers[l]); },
      [&](int64_t l, int64_t task) {
        with_element(layers[l].dtype, [&](auto element) { spread_task<decltype(element)>(layers[l], task); });
      });
}

}  // namespace MODA_ISA
}  // namespace moda
