// ReLU and pooled activation in one pass, and their gradient in one pass.
//
//     out  = relu(data), rows[n, c] = mean over positions of out[n, c, :]          NaN stays NaN, as in torch.relu
//     dx   = y <= 0 ? 0 : dy + rows[n, c] / S                                      data is y, rows the gradient of the mean
#pragma once

#include "cpu/pool.h"

namespace moda {
namespace MODA_ISA {

// Large outputs go past the caches: the next layer would not find them there.
MODA_INLINE bool goes_past_caches(const Layer& layer) {
  const int64_t row = (layer.layout == Layout::kPositionsLast ? layer.positions : layer.neurons) * width(layer.dtype);
  return layer.out != layer.data && aligned_to_line(layer.out) && row % kLine == 0 &&
         bytes_of(layer) >= kLargeBytes;
}

template <bool kPastCaches, class T>
MODA_INLINE void put(T* to, Vector<AccOf<T>> value) {
  if constexpr (kPastCaches) {
    store_past_caches(to, value);
  } else {
    store(to, value);
  }
}

template <class Acc>
MODA_INLINE Vector<Acc> relu(Vector<Acc> x) { return keep_where<Acc>(~(x <= Acc(0)), x); }

template <class Acc>
MODA_INLINE Acc relu1(Acc x) { return x <= 0 ? Acc(0) : x; }

// y = relu(x); returns the sum of y.
template <bool kPastCaches, class T>
MODA_INLINE AccOf<T> relu_row(const T* x, T* y, int64_t count) {
  using Acc = AccOf<T>;
  constexpr int64_t lanes = kLanes<Acc>;
  Acc total = 0;
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t end = smaller(begin + kBlock, count);
    Vector<Acc> sum0{}, sum1{};
    int64_t i = begin;
    for (; i + 2 * lanes <= end; i += 2 * lanes) {
      const Vector<Acc> y0 = relu<Acc>(Element<T>::load(x + i)), y1 = relu<Acc>(Element<T>::load(x + i + lanes));
      put<kPastCaches>(y + i, y0);
      put<kPastCaches>(y + i + lanes, y1);
      sum0 += y0;
      sum1 += y1;
    }
    for (; i + lanes <= end; i += lanes) {
      const Vector<Acc> y0 = relu<Acc>(Element<T>::load(x + i));
      put<kPastCaches>(y + i, y0);
      sum0 += y0;
    }
    Acc rest = 0;
    for (; i < end; ++i) {
      const Acc kept = relu1(Element<T>::load1(x + i));
      Element<T>::store1(y + i, kept);
      rest += kept;
    }
    total += sum_lanes<Acc>(sum0 + sum1) + rest;
  }
  return total;
}

// y = relu(x); adds y to sums, element by element.
template <bool kPastCaches, class T>
MODA_INLINE void relu_columns(const T* x, T* y, AccOf<T>* sums, int64_t count) {
  using Acc = AccOf<T>;
  constexpr int64_t lanes = kLanes<Acc>;
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    const Vector<Acc> kept = relu<Acc>(Element<T>::load(x + i));
    put<kPastCaches>(y + i, kept);
    store_unaligned(sums + i, load_unaligned<Vector<Acc>>(sums + i) + kept);
  }
  for (; i < count; ++i) {
    const Acc kept = relu1(Element<T>::load1(x + i));
    Element<T>::store1(y + i, kept);
    sums[i] += kept;
  }
}

// Rows that are too short for vectors of their own are taken as one long row; their sums are then read from the first cache.
template <class T>
MODA_INLINE void relu_short_rows(const T* x, T* y, AccOf<T>* rows, int64_t count, int64_t positions) {
  using Acc = AccOf<T>;
  relu_row<false>(x, y, count * positions);
  for (int64_t row = 0; row < count; ++row) {
    Acc sum = 0;
    for (int64_t p = 0; p < positions; ++p) sum += Element<T>::load1(y + row * positions + p);
    rows[row] = sum / Acc(positions);
  }
}

// y = relu(x) of some rows, and their means.
template <bool kPastCaches, class T>
MODA_INLINE void relu_pool_rows(const T* x, T* y, Range part, int64_t S, AccOf<T>* means) {
  using Acc = AccOf<T>;
  if (are_reduced_together<Acc>(S)) {
    const auto rectify = [&](int64_t i) {
      const Vector<Acc> kept = relu<Acc>(Element<T>::load(x + i));
      put<kPastCaches>(y + i, kept);
      return kept;
    };
    const auto rectify1 = [&](int64_t i) {
      const Acc kept = relu1(Element<T>::load1(x + i));
      Element<T>::store1(y + i, kept);
      return kept;
    };
    return mean_of_rows<Acc>(part.begin, part.end, S, means, rectify, rectify1);
  }
  if (S < kLanes<Acc>) return relu_short_rows(x + part.begin * S, y + part.begin * S, means + part.begin, part.end - part.begin, S);
  for (int64_t row = part.begin; row < part.end; ++row) {
    means[row] = relu_row<kPastCaches>(x + row * S, y + row * S, S) / Acc(S);
  }
}

template <bool kPastCaches, class T>
MODA_INLINE void relu_pool_task(const Layer& layer, int64_t task) {
  using Acc = AccOf<T>;
  const int64_t S = layer.positions, C = layer.neurons;
  const T* x = static_cast<const T*>(layer.data);
  T* y = static_cast<T*>(layer.out);
  Acc* rows = static_cast<Acc*>(layer.rows);
  if (layer.layout == Layout::kPositionsLast) {
    const Range part = task_rows(layer, task);
    relu_pool_rows<kPastCaches>(x, y, part, S, rows);
    bound_row_means(y, part, S, rows);
  } else {
    const Columns part = task_columns(layer, task);
    const int64_t offset = part.sample * S * C + part.neurons.begin, columns = part.neurons.end - part.neurons.begin;
    Acc* means = rows + part.sample * C + part.neurons.begin;
    sum_columns<Acc>(S, columns, means, [&](int64_t p, Acc* sums) {
      relu_columns<kPastCaches>(x + offset + p * C, y + offset + p * C, sums, columns);
    });
    bound_column_means(y + offset, columns, S, C, means);
  }
  if (kPastCaches) fence_stores();
}

template <class T>
MODA_INLINE void relu_gradient1(const T* y, const T* dy, AccOf<T> g, T* dx) {
  using Acc = AccOf<T>;
  const Acc v = Element<T>::load1(y), d = Element<T>::load1(dy);
  Element<T>::store1(dx, v <= 0 ? Acc(0) : d + g);
}

template <class Acc>
MODA_INLINE Vector<Acc> relu_gradient(Vector<Acc> y, Vector<Acc> dy, Vector<Acc> g) {
  return keep_where<Acc>(~(y <= Acc(0)), dy + g);
}

template <bool kPastCaches, class T>
MODA_INLINE void relu_gradient_columns(const T* y, const T* dy, const AccOf<T>* gradient, T* dx, int64_t count) {
  using Acc = AccOf<T>;
  constexpr int64_t lanes = kLanes<Acc>;
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    const Vector<Acc> g = load_unaligned<Vector<Acc>>(gradient + i);
    put<kPastCaches>(dx + i, relu_gradient<Acc>(Element<T>::load(y + i), Element<T>::load(dy + i), g));
  }
  for (; i < count; ++i) relu_gradient1(y + i, dy + i, gradient[i], dx + i);
}

template <bool kPastCaches, class T>
MODA_INLINE void relu_pool_gradient_task(const Layer& layer, const void* upstream, int64_t task) {
  using Acc = AccOf<T>;
  const int64_t S = layer.positions, C = layer.neurons;
  const T *y = static_cast<const T*>(layer.data), *dy = static_cast<const T*>(upstream);
  T* dx = static_cast<T*>(layer.out);
  const Acc* rows = static_cast<const Acc*>(layer.rows);
  if (layer.layout == Layout::kPositionsLast) {
    const Range part = task_rows(layer, task);
    if (!are_shared_together<Acc>(S)) {
      over_short_rows(rows, part, S, [&](int64_t offset, const Acc* share, int64_t count) {
        relu_gradient_columns<false>(y + offset, dy + offset, share, dx + offset, count);
      });
      return;
    }
    share_among_rows(
        part.begin, part.end, S, rows,
        [&](int64_t i, Vector<Acc> g) {
          put<kPastCaches>(dx + i, relu_gradient<Acc>(Element<T>::load(y + i), Element<T>::load(dy + i), g));
        },
        [&](int64_t i, Acc g) { relu_gradient1(y + i, dy + i, g, dx + i); });
  } else {
    const Columns part = task_columns(layer, task);
    const int64_t begin = part.neurons.begin, columns = part.neurons.end - begin;
    Acc share[kColumns];
    for (int64_t c = 0; c < columns; ++c) share[c] = rows[part.sample * C + begin + c] / Acc(S);
    for (int64_t p = 0; p < S; ++p) {
      const int64_t offset = (part.sample * S + p) * C + begin;
      relu_gradient_columns<kPastCaches>(y + offset, dy + offset, share, dx + offset, columns);
    }
  }
  if (kPastCaches) fence_stores();
}

static inline void relu_pool_forward(const Layer& layer, int threads) {
  const bool past_caches = goes_past_caches(layer);
  prepare_output(layer);
  with_element(layer.dtype, [&](auto element) {
    using T = decltype(element);
    parallel_for(pooling_tasks(layer), threads, [&](int64_t task) {
      past_caches ? relu_pool_task<true, T>(layer, task) : relu_pool_task<false, T>(layer, task);
    });
  });
}

// `upstream` is dy, like data.
static inline void relu_pool_backward(const Layer& layer, const void* upstream, int threads) {
  const bool past_caches = goes_past_caches(layer);
  prepare_output(layer);
  with_element(layer.dtype, [&](auto element) {
    using T = decltype(element);
    parallel_for(pooling_tasks(layer), threads, [&](int64_t task) {
      past_caches ? relu_pool_gradient_task<true, T>(layer, upstream, task)
                  : relu_pool_gradient_task<false, T>(layer, upstream, task);
    });
  });
}

}  // namespace MODA_ISA
}  // namespace moda
