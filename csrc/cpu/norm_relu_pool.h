// Batch norm, a residual added to it, an activation f and pooling as one operation, and its gradient. What includes this is compiled
// once for each instruction set, apart from the other kernels, because all of it takes long to compile.
//
//     z = (x - mean) * scale + bias [+ residual]          scale = weight / sqrt(var + eps)
//     y = f(z)          rows[n, c] = mean over positions of |y[n, c, :]|
//
//     g  = f'(z) * (dy + sign(y) * rows[n, c] / S)        the gradient of z, and of the residual
//     dx = scale * (g - mean of g - (x - mean) / (var + eps) * mean of g * (x - mean))          means over N and S
//
// With running statistics, dx = scale * g. Nothing of the size of x is kept for backward but x: z is computed again, from the same
// numbers in the same order. With a residual, y tells f'(z) of ReLU and ReLU6; for other activations it takes the residual.
#pragma once

#include <type_traits>

#include "cpu/activation.h"

#include "cpu/kernels.h"
#include "cpu/norm_parts.h"
#include "cpu/relu_pool.h"

namespace moda {
namespace MODA_ISA {

// The numbers per neuron that forward keeps for backward: views of NormForward::saved.
template <class Acc>
struct Saved {
  Saved(void* from, int64_t neurons)
      : mean(static_cast<Acc*>(from)), inverse(mean + neurons), scale(inverse + neurons), bias(scale + neurons) {}
  Acc* mean;
  Acc* inverse;
  Acc* scale;
  Acc* bias;
};

template <class Value, class Each>
MODA_INLINE Value normalized(Value x, Each mean, Each scale, Each bias) { return (x - mean) * scale + bias; }

// Statistics: sums of x - shift and of its square. Without a shift near the mean, the variance would be the difference of two numbers
// as large as the mean's square.

constexpr int64_t kProbes = 8;  // elements that a first shift is the mean of; they lie far apart, for neighbours resemble each other

template <class T>
MODA_INLINE AccOf<T> first_shift(const Layer& layer, int64_t neuron) {
  const int64_t C = layer.neurons, S = layer.positions, values = layer.samples * S;
  double sum = 0;
  for (int64_t probe = 0; probe < kProbes; ++probe) {
    const int64_t at = probe * values / kProbes, n = at / S, p = at % S;
    sum += double(Element<T>::load1(static_cast<const T*>(layer.data) + (has_columns(layer) ? at * C + neuron : (n * C + neuron) * S + p)));
  }
  return AccOf<T>(sum / kProbes);
}

// sums[c] and squares[c], for the neurons of the part from its first on; shifts are those of all neurons.
template <class T>
MODA_INLINE void shifted_sums(const Layer& layer, const Part& part, const AccOf<T>* shifts, double* sums, double* squares) {
  using Acc = AccOf<T>;
  const T* x = static_cast<const T*>(layer.data);
  const int64_t C = layer.neurons, S = layer.positions, neurons = part.neurons.end - part.neurons.begin;
  for (int64_t c = 0; c < neurons; ++c) sums[c] = squares[c] = 0;
  if (has_columns(layer) || S < kFlatBelow) {
    Acc shift[kSegment];
    expand(layer, part.neurons, shift, [&](int64_t c) { return shifts[c]; });
    const int64_t elements = has_columns(layer) ? neurons : neurons * S, ahead = has_columns(layer) ? 0 : C * S;
    add_segments<Acc>(layer, part, sums, squares, [&](int64_t n, int64_t offset, Acc* sum, Acc* square) {
      const T* from = x + offset;
      const T* next = n + 1 < part.samples.end ? from + ahead : from;
      over_elements<Acc>(elements, [&](int64_t i, auto as) {
        __builtin_prefetch(next + i);
        const auto d = as.load(from + i) - as.load(shift + i);
        as.save(sum + i, as.load(sum + i) + d);
        as.save(square + i, as.load(square + i) + d * d);
      });
    });
    return;
  }
  for (int64_t n = part.samples.begin; n < part.samples.end; ++n) {
    for (int64_t c = 0; c < neurons; ++c) {
      const T* row = x + (n * C + part.neurons.begin + c) * S;
      const T* next = n + 1 < part.samples.end ? row + C * S : row;
      const Acc shift = shifts[part.neurons.begin + c];
      add_row<Acc>(S, sums[c], squares[c], [&](int64_t i, auto keep, Vector<Acc>& sum, Vector<Acc>& square) {
        __builtin_prefetch(next + i);
        const Vector<Acc> d = keep(Element<T>::load(row + i) - shift);
        sum += d;
        square += d * d;
      });
    }
  }
}

struct Moments {
  double mean;
  double variance;  // biased
};

MODA_INLINE bool is_finite(double value) { return value - value == 0; }

// Takes the mean first and then the squares of deviations from it, in double: right for every number that float holds, and slow.
template <class T>
MODA_INLINE Moments exact_moments(const Layer& layer, int64_t neuron) {
  const int64_t N = layer.samples, C = layer.neurons, S = layer.positions;
  const T* x = static_cast<const T*>(layer.data);
  const auto sum_of = [&](auto function) {
    double sum = 0;
    for (int64_t n = 0; n < N; ++n) {
      for (int64_t p = 0; p < S; ++p) {
        sum += function(double(Element<T>::load1(x + (has_columns(layer) ? (n * S + p) * C + neuron : (n * C + neuron) * S + p))));
      }
    }
    return sum / double(N * S);
  };
  const double mean = sum_of([](double value) { return value; });
  return {mean, sum_of([&](double value) { return (value - mean) * (value - mean); })};
}

// The moments of x - shift by its sums.
MODA_INLINE Moments shifted_moments(const Layer& layer, double sum, double square) {
  const double count = double(layer.samples * layer.positions), offset = sum / count;
  return {offset, square / count - offset * offset};
}

// Whether the variance, a difference of two sums, lost more than a bit or two, or is NaN.
MODA_INLINE bool is_far(const Moments& shifted) { return !(shifted.mean * shifted.mean <= 2 * shifted.variance); }

template <class Acc>
MODA_INLINE Acc number_or(const void* numbers, int64_t neuron, Acc otherwise) {
  return numbers == nullptr ? otherwise : static_cast<const Acc*>(numbers)[neuron];
}

template <class Acc>
MODA_INLINE void move_towards(void* running, int64_t neuron, double value, double momentum) {
  Acc& kept = static_cast<Acc*>(running)[neuron];
  kept = Acc((1 - momentum) * double(kept) + momentum * value);
}

template <class Acc>
MODA_INLINE void save_neuron(const NormForward& norm, int64_t neuron, const Moments& moments) {
  const Saved<Acc> saved(norm.saved, norm.layer.neurons);
  const double inverse = 1 / __builtin_sqrt(moments.variance + norm.eps);
  saved.mean[neuron] = Acc(moments.mean);
  saved.inverse[neuron] = Acc(inverse);
  saved.scale[neuron] = Acc(inverse * double(number_or<Acc>(norm.weight, neuron, 1)));
  saved.bias[neuron] = number_or<Acc>(norm.bias, neuron, 0);
}

// A neuron's sum of what the chunks hold: `sums` is one chunk of all neurons after the other, sums first, then squares or products.
MODA_INLINE void join_chunks(const Layer& layer, const Blocks& cut, int64_t neuron, const double* sums, double& first, double& second) {
  first = second = 0;
  for (int64_t chunk = 0; chunk < cut.chunks; ++chunk) {
    first += sums[2 * chunk * layer.neurons + neuron];
    second += sums[(2 * chunk + 1) * layer.neurons + neuron];
  }
}

template <class T>
MODA_INLINE void sum_chunk(const Layer& layer, const Blocks& cut, int64_t block, int64_t chunk, const AccOf<T>* shifts, double* sums) {
  const Part part = part_of(layer, cut, block, chunk);
  double* of_chunk = sums + 2 * chunk * layer.neurons + part.neurons.begin;
  shifted_sums<T>(layer, part, shifts, of_chunk, of_chunk + layer.neurons);
}

// Moves the shifts of a block's neurons that turned out to be far from the mean onto it, and sums the block again if there were any.
template <class T>
MODA_INLINE void mend_shifts(const Layer& layer, const Blocks& cut, int64_t block, AccOf<T>* shifts, double* sums) {
  const Range neurons = block_neurons(layer, cut, block);
  bool moved = false;
  for (int64_t c = neurons.begin; c < neurons.end; ++c) {
    double sum, square;
    join_chunks(layer, cut, c, sums, sum, square);
    const Moments shifted = shifted_moments(layer, sum, square);
    if (!is_finite(square) || !is_far(shifted)) continue;
    shifts[c] = AccOf<T>(double(shifts[c]) + shifted.mean);
    moved = true;
  }
  for (int64_t chunk = 0; moved && chunk < cut.chunks; ++chunk) sum_chunk<T>(layer, cut, block, chunk, shifts, sums);
}

// Takes the statistics of the batch and moves the running ones towards them.
template <class T>
MODA_INLINE void finish_statistics(const NormForward& norm, const Blocks& cut, int64_t block, AccOf<T>* shifts, double* sums) {
  using Acc = AccOf<T>;
  const Layer& layer = norm.layer;
  const Range neurons = block_neurons(layer, cut, block);
  const double count = double(layer.samples * layer.positions);
  mend_shifts<T>(layer, cut, block, shifts, sums);
  for (int64_t c = neurons.begin; c < neurons.end; ++c) {
    double sum, square;
    join_chunks(layer, cut, c, sums, sum, square);
    Moments moments = shifted_moments(layer, sum, square);
    if (is_finite(square) && !is_far(moments)) {
      moments.mean += double(shifts[c]);
    } else {
      moments = exact_moments<T>(layer, c);
    }
    save_neuron<Acc>(norm, c, moments);
    if (norm.running_mean == nullptr) continue;
    move_towards<Acc>(norm.running_mean, c, moments.mean, norm.momentum);
    move_towards<Acc>(norm.running_var, c, moments.variance * (count / (count - 1)), norm.momentum);
  }
}

template <class Acc>
static inline void use_running_statistics(const NormForward& norm) {
  for (int64_t c = 0; c < norm.layer.neurons; ++c) {
    const double mean = static_cast<const Acc*>(norm.running_mean)[c], variance = static_cast<const Acc*>(norm.running_var)[c];
    save_neuron<Acc>(norm, c, {mean, variance});
  }
}

// The activation: a ReLU, which is part of the loops, or another one, which they call.
struct Relu {};
struct Other {
  Activation kind;
};

// Whether a pointer that goes with a residual is there: known beforehand for ReLU. Others' kernels, which take as long to compile, ask it.
template <bool kResidual, class F>
MODA_INLINE bool is_there(const void* pointer) { return std::is_same<F, Relu>::value ? kResidual : pointer != nullptr; }

template <class As>
MODA_INLINE typename As::Value value_of(Relu, As as, typename As::Value z) { return as.where_fires(z, z); }
template <class As>
MODA_INLINE typename As::Value value_of(Other f, As as, typename As::Value z) { return as.of_lanes(activated(f.kind, as.in_lanes(z))); }

template <class As>
MODA_INLINE typename As::Value magnitude_of(Relu, As, typename As::Value y) { return y; }
template <class As>
MODA_INLINE typename As::Value magnitude_of(Other, As, typename As::Value y) { return absolute(y); }

// f'(z) * (dy + sign(y) * share), where y is rounded to T.
template <class T>
[[gnu::noinline]] static Vector<AccOf<T>> gradient_of(Activation activation, Vector<AccOf<T>> z, Vector<AccOf<T>> dy,
                                                      Vector<AccOf<T>> share) {
  using Acc = AccOf<T>;
  if (activation == Activation::kRelu6) {
    const Vector<Acc> rounded = Element<T>::widen(Element<T>::narrow(z));
    return keep_where<Acc>(~((rounded <= Acc(0)) | (rounded >= Acc(6))), dy + share);
  }
  constexpr Bits<Acc> sign = Bits<Acc>(1) << (8 * sizeof(Acc) - 1);
  const auto sign_of_z = bit_cast<Vector<Bits<Acc>>>(z) & sign;
  const Vector<Acc> signed_share = bit_cast<Vector<Acc>>(bit_cast<Vector<Bits<Acc>>>(share) ^ sign_of_z);
  // Around 0 y is half of z.
  return slope_of<Acc>(activation, z) * (dy + keep_where<Acc>(~(absolute<Acc>(z) <= 2 * kRoundsToZero<T>), signed_share));
}

// Forward, second reading.

template <bool kPastCaches, bool kResidual, class T, class F>
MODA_INLINE void normalize_segments(const NormForward& norm, const Part& part, F activation) {
  using Acc = AccOf<T>;
  const Layer& layer = norm.layer;
  const int64_t C = layer.neurons, S = layer.positions, neurons = part.neurons.end - part.neurons.begin;
  const Saved<Acc> saved(norm.saved, C);
  const bool columns = has_columns(layer);
  const T *x = static_cast<const T*>(layer.data), *residual = static_cast<const T*>(norm.residual);
  T* y = static_cast<T*>(layer.out);
  Acc* rows = static_cast<Acc*>(layer.rows);
  Acc mean[kSegment], scale[kSegment], bias[kSegment];
  expand(layer, part.neurons, mean, [&](int64_t c) { return saved.mean[c]; });
  expand(layer, part.neurons, scale, [&](int64_t c) { return saved.scale[c]; });
  expand(layer, part.neurons, bias, [&](int64_t c) { return saved.bias[c]; });
  // Writes element i of the segment at `offset`; gives its magnitude.
  const auto activate = [&](int64_t offset, int64_t i, auto as) {
    auto z = normalized(as.load(x + offset + i), as.load(mean + i), as.load(scale + i), as.load(bias + i));
    if (is_there<kResidual, F>(residual)) z += as.load(residual + offset + i);
    const auto value = value_of(activation, as, z);
    as.template put<kPastCaches>(y + offset + i, value);
    return magnitude_of(activation, as, value);
  };
  for (int64_t n = part.samples.begin; n < part.samples.end; ++n) {
    Acc* means = rows + n * C + part.neurons.begin;
    if (rows == nullptr) {
      over_elements<Acc>(neurons, [&](int64_t i, auto as) { activate(n * C + part.neurons.begin, i, as); });
    } else if (columns) {
      sum_columns<Acc>(S, neurons, means, [&](int64_t p, Acc* sums) {
        over_elements<Acc>(neurons, [&](int64_t i, auto as) {
          as.save(sums + i, as.load(sums + i) + activate((n * S + p) * C + part.neurons.begin, i, as));
        });
      });
    } else if (are_reduced_together<Acc>(S)) {
      const int64_t offset = (n * C + part.neurons.begin) * S;
      mean_of_rows<Acc>(
          0, neurons, S, means, [&](int64_t i) { return activate(offset, i, Vectors<Acc>{}); },
          [&](int64_t i) { return activate(offset, i, Singles<Acc>{}); });
    } else {
      Acc kept[kSegment];
      const int64_t offset = (n * C + part.neurons.begin) * S;
      over_elements<Acc>(neurons * S, [&](int64_t i, auto as) { as.save(kept + i, activate(offset, i, as)); });
      for (int64_t c = 0; c < neurons; ++c) {
        Acc sum = 0;
        for (int64_t i = c * S; i < (c + 1) * S; ++i) sum += kept[i];
        means[c] = sum / Acc(S);
      }
    }
  }
}

template <bool kPastCaches, bool kResidual, class T, class F>
MODA_INLINE void normalize_rows(const NormForward& norm, const Part& part, F activation) {
  using Acc = AccOf<T>;
  const Layer& layer = norm.layer;
  const int64_t C = layer.neurons, S = layer.positions;
  const Saved<Acc> saved(norm.saved, C);
  for (int64_t n = part.samples.begin; n < part.samples.end; ++n) {
    for (int64_t c = part.neurons.begin; c < part.neurons.end; ++c) {
      const int64_t offset = (n * C + c) * S, ahead = n + 1 < part.samples.end ? C * S : 0;
      const bool added = is_there<kResidual, F>(norm.residual);
      const T *x = static_cast<const T*>(layer.data) + offset, *residual = static_cast<const T*>(norm.residual) + (added ? offset : 0);
      T* y = static_cast<T*>(layer.out) + offset;
      const Acc mean = saved.mean[c], scale = saved.scale[c], bias = saved.bias[c];
      double sum = 0, unused = 0;
      add_row<Acc>(S, sum, unused, [&](int64_t i, auto keep, Vector<Acc>& total, Vector<Acc>&) {
        __builtin_prefetch(x + ahead + i);
        Vector<Acc> z = normalized(Element<T>::load(x + i), mean, scale, bias);
        if (added) z += Element<T>::load(residual + i);
        const Vectors<Acc> as;
        const Vector<Acc> value = value_of(activation, as, z);
        put<kPastCaches>(y + i, value);
        total += keep(magnitude_of(activation, as, value));
      });
      static_cast<Acc*>(layer.rows)[n * C + c] = Acc(sum / double(S));
    }
  }
}

template <bool kPastCaches, bool kResidual, class T, class F>
MODA_INLINE void normalize_task(const NormForward& norm, const Part& part, F activation) {
  if (has_columns(norm.layer) || norm.layer.positions < kFlatBelow) {
    normalize_segments<kPastCaches, kResidual, T>(norm, part, activation);
  } else {
    normalize_rows<kPastCaches, kResidual, T>(norm, part, activation);
  }
  if (kPastCaches) fence_stores();
}

// Backward.

template <class T>
struct GradientTensors {
  explicit GradientTensors(const NormBackward& norm)
      : x(static_cast<const T*>(norm.layer.data)), dy(static_cast<const T*>(norm.dy)), kept(static_cast<const T*>(norm.kept)),
        dresidual(static_cast<T*>(norm.dresidual)), dx(static_cast<T*>(norm.layer.out)) {}
  const T *x, *dy, *kept;
  T *dresidual, *dx;
};

// g of the element at `at`, with its neuron's numbers; `centred` is x - mean.
template <bool kResidual, class T, class As, class Each, class Share>
MODA_INLINE typename As::Value gradient_at(Relu, const GradientTensors<T>& tensors, int64_t at, As as, typename As::Value centred,
                                           Each scale, Each bias, Share share) {
  const typename As::Value upstream = as.load(tensors.dy + at) + share;
  if constexpr (kResidual) return as.where_fires(as.load(tensors.kept + at), upstream);
  return as.where_fires(typename As::Value(centred * scale + bias), upstream, kRoundsToZero<T>);
}

template <bool kResidual, class T, class As, class Each, class Share>
MODA_INLINE typename As::Value gradient_at(Other f, const GradientTensors<T>& tensors, int64_t at, As as, typename As::Value centred,
                                           Each scale, Each bias, Share share) {
  typename As::Value z = centred * scale + bias;
  if (tensors.kept != nullptr) {
    const typename As::Value kept = as.load(tensors.kept + at);
    z = f.kind == Activation::kRelu6 ? kept : typename As::Value(z + kept);
  }
  return as.of_lanes(gradient_of<T>(f.kind, as.in_lanes(z), as.in_lanes(as.load(tensors.dy + at)), as.in_lanes(share)));
}

// Whether the second reading finds g in dx, where the first one left it: f'(z) costs more than the traffic. Half precision would round it.
template <class T, class F>
constexpr bool kLeavesGradient = std::is_same<F, Other>::value && std::is_same<T, AccOf<T>>::value;

// Writes what the first reading knows already: the residual's gradient, and with running statistics the gradient of x.
template <bool kResidual, bool kFrozen, class F, class T, class As, class Each>
MODA_INLINE void write_gradient(const GradientTensors<T>& tensors, int64_t at, As as, typename As::Value g, Each scale) {
  if (is_there<kResidual, F>(tensors.dresidual)) as.save(tensors.dresidual + at, g);
  if constexpr (kFrozen) {
    as.save(tensors.dx + at, typename As::Value(g * scale));
  } else if constexpr (kLeavesGradient<T, F>) {
    as.save(tensors.dx + at, g);
  }
}

// share[e] = what the pooled activation's gradient gives to element e of a segment of sample n.
template <class Acc>
MODA_INLINE void expand_share(const Layer& layer, Range neurons, int64_t n, Acc* share) {
  if (layer.rows == nullptr) return;  // stays 0
  const Acc* rows = static_cast<const Acc*>(layer.rows) + n * layer.neurons + neurons.begin;
  const int64_t S = layer.positions, count = neurons.end - neurons.begin;
  if (!has_columns(layer) && are_shared_together<Acc>(S)) {
    return share_among_rows(
        0, count, S, rows, [&](int64_t i, Vector<Acc> value) { store_unaligned(share + i, value); },
        [&](int64_t i, Acc value) { share[i] = value; });
  }
  expand(layer, neurons, share, [&](int64_t c) { return rows[c - neurons.begin] / Acc(S); });
}

template <class Acc>
MODA_INLINE Acc share_of(const Layer& layer, int64_t row) {
  return layer.rows == nullptr ? Acc(0) : static_cast<const Acc*>(layer.rows)[row] / Acc(layer.positions);
}

// First reading: sums[c] of g and products[c] of g * (x - mean), for the neurons of the part from its first on.
template <bool kResidual, bool kFrozen, class T, class F>
MODA_INLINE void gradient_sums(const NormBackward& norm, const Part& part, F activation, double* sums, double* products) {
  using Acc = AccOf<T>;
  const Layer& layer = norm.layer;
  const int64_t C = layer.neurons, S = layer.positions, neurons = part.neurons.end - part.neurons.begin;
  const Saved<Acc> saved(const_cast<void*>(norm.saved), C);
  const GradientTensors<T> tensors(norm);
  for (int64_t c = 0; c < neurons; ++c) sums[c] = products[c] = 0;
  if (has_columns(layer) || S < kFlatBelow) {
    const int64_t elements = has_columns(layer) ? neurons : neurons * S, ahead = has_columns(layer) ? 0 : C * S;
    Acc mean[kSegment], scale[kSegment], bias[kSegment], share[kSegment] = {};
    expand(layer, part.neurons, mean, [&](int64_t c) { return saved.mean[c]; });
    expand(layer, part.neurons, scale, [&](int64_t c) { return saved.scale[c]; });
    expand(layer, part.neurons, bias, [&](int64_t c) { return saved.bias[c]; });
    int64_t shared = -1;
    add_segments<Acc>(layer, part, sums, products, [&](int64_t n, int64_t offset, Acc* sum, Acc* product) {
      if (n != shared) expand_share(layer, part.neurons, shared = n, share);
      const int64_t next = n + 1 < part.samples.end ? offset + ahead : offset;
      over_elements<Acc>(elements, [&](int64_t i, auto as) {
        __builtin_prefetch(tensors.x + next + i);
        __builtin_prefetch(tensors.dy + next + i);
        const auto centred = as.load(tensors.x + offset + i) - as.load(mean + i);
        const auto scaled = as.load(scale + i);
        const auto g = gradient_at<kResidual>(activation, tensors, offset + i, as, centred, scaled, as.load(bias + i), as.load(share + i));
        write_gradient<kResidual, kFrozen, F>(tensors, offset + i, as, g, scaled);
        as.save(sum + i, as.load(sum + i) + g);
        as.save(product + i, as.load(product + i) + g * centred);
      });
    });
    return;
  }
  for (int64_t n = part.samples.begin; n < part.samples.end; ++n) {
    for (int64_t c = part.neurons.begin; c < part.neurons.end; ++c) {
      const int64_t offset = (n * C + c) * S, next = n + 1 < part.samples.end ? offset + C * S : offset;
      const Acc mean = saved.mean[c], scale = saved.scale[c], bias = saved.bias[c], share = share_of<Acc>(layer, n * C + c);
      const int64_t at = c - part.neurons.begin;
      add_row<Acc>(S, sums[at], products[at], [&](int64_t i, auto keep, Vector<Acc>& sum, Vector<Acc>& product) {
        __builtin_prefetch(tensors.x + next + i);
        __builtin_prefetch(tensors.dy + next + i);
        const Vectors<Acc> as;
        const Vector<Acc> centred = Element<T>::load(tensors.x + offset + i) - mean;
        const Vector<Acc> g = gradient_at<kResidual>(activation, tensors, offset + i, as, centred, scale, bias, share);
        write_gradient<kResidual, kFrozen, F>(tensors, offset + i, as, g, scale);
        sum += keep(g);
        product += keep(g * centred);
      });
    }
  }
}

// Gradients of weight and bias, and what the second reading subtracts: (x - mean) * slope[c] + level[c].
template <class Acc>
MODA_INLINE void finish_gradient(const NormBackward& norm, const Blocks& cut, int64_t block, const double* sums, Acc* slope, Acc* level) {
  const Layer& layer = norm.layer;
  const int64_t C = layer.neurons;
  const Saved<Acc> saved(const_cast<void*>(norm.saved), C);
  const Range neurons = block_neurons(layer, cut, block);
  const double count = double(layer.samples * layer.positions);
  for (int64_t c = neurons.begin; c < neurons.end; ++c) {
    double sum, product;
    join_chunks(layer, cut, c, sums, sum, product);
    const double inverse = saved.inverse[c], scale = saved.scale[c];
    static_cast<Acc*>(norm.parameters)[c] = Acc(product * inverse);
    static_cast<Acc*>(norm.parameters)[C + c] = Acc(sum);
    slope[c] = Acc(scale * inverse * (inverse * (product / count)));
    level[c] = Acc(scale * (sum / count));
  }
}

template <bool kPastCaches, bool kResidual, class T, class F>
MODA_INLINE void differentiate_task(const NormBackward& norm, const Part& part, F activation, const AccOf<T>* slopes,
                                    const AccOf<T>* levels) {
  using Acc = AccOf<T>;
  const Layer& layer = norm.layer;
  const int64_t C = layer.neurons, S = layer.positions, neurons = part.neurons.end - part.neurons.begin;
  const Saved<Acc> saved(const_cast<void*>(norm.saved), C);
  const GradientTensors<T> tensors(norm);
  // dx of the element at `at`.
  const auto differentiate = [&](int64_t at, auto as, auto mean, auto scale, auto bias, auto share, auto slope, auto level) {
    using Value = typename decltype(as)::Value;
    const Value centred = as.load(tensors.x + at) - mean;
    Value g;
    if constexpr (kLeavesGradient<T, F>) {
      g = as.load(tensors.dx + at);
    } else if (is_there<kResidual, F>(tensors.dresidual)) {
      g = as.load(tensors.dresidual + at);
    } else {
      g = gradient_at<kResidual>(activation, tensors, at, as, centred, scale, bias, share);
    }
    // Lines that the first reading wrote are in a cache.
    as.template put<kPastCaches && !kLeavesGradient<T, F>>(tensors.dx + at, Value(g * scale - (centred * slope + level)));
  };
  if (has_columns(layer) || S < kFlatBelow) {
    Acc mean[kSegment], scale[kSegment], bias[kSegment], slope[kSegment], level[kSegment], share[kSegment] = {};
    expand(layer, part.neurons, mean, [&](int64_t c) { return saved.mean[c]; });
    expand(layer, part.neurons, scale, [&](int64_t c) { return saved.scale[c]; });
    expand(layer, part.neurons, bias, [&](int64_t c) { return saved.bias[c]; });
    expand(layer, part.neurons, slope, [&](int64_t c) { return slopes[c]; });
    expand(layer, part.neurons, level, [&](int64_t c) { return levels[c]; });
    const int64_t segments = has_columns(layer) ? S : 1, elements = has_columns(layer) ? neurons : neurons * S;
    for (int64_t n = part.samples.begin; n < part.samples.end; ++n) {
      if (!kResidual && !kLeavesGradient<T, F>) expand_share(layer, part.neurons, n, share);
      for (int64_t p = 0; p < segments; ++p) {
        const int64_t offset = has_columns(layer) ? (n * S + p) * C + part.neurons.begin : (n * C + part.neurons.begin) * S;
        over_elements<Acc>(elements, [&](int64_t i, auto as) {
          differentiate(offset + i, as, as.load(mean + i), as.load(scale + i), as.load(bias + i), as.load(share + i),
                        as.load(slope + i), as.load(level + i));
        });
      }
    }
  } else {
    for (int64_t n = part.samples.begin; n < part.samples.end; ++n) {
      for (int64_t c = part.neurons.begin; c < part.neurons.end; ++c) {
        const int64_t offset = (n * C + c) * S;
        const Acc mean = saved.mean[c], scale = saved.scale[c], bias = saved.bias[c], share = share_of<Acc>(layer, n * C + c);
        const auto value_at = [&](int64_t i, auto as) {
          differentiate(offset + i, as, mean, scale, bias, share, slopes[c], levels[c]);
        };
        if constexpr (kLeavesGradient<T, F>) {  // no element may be read again that has been written
          over_elements<Acc>(S, value_at);
        } else {
          int64_t i = 0;
          for (; i + kLanes<Acc> <= S; i += kLanes<Acc>) value_at(i, Vectors<Acc>{});
          if (i < S) value_at(S - kLanes<Acc>, Vectors<Acc>{});
        }
      }
    }
  }
  if (kPastCaches) fence_stores();
}

// Calls function(std::true_type or std::false_type) by the value of a condition.
template <class Function>
MODA_INLINE void with_flag(bool condition, Function function) {
  condition ? function(std::true_type{}) : function(std::false_type{});
}

// Calls function(std::true_type or std::false_type) by whether there is a residual; for other activations than ReLU see `is_there`.
template <class F, class Function>
MODA_INLINE void with_residual(const void* pointer, Function function) {
  if constexpr (std::is_same<F, Relu>::value) {
    with_flag(pointer != nullptr, function);
  } else {
    function(std::false_type{});
  }
}

template <class F>
static inline void norm_pool_forward(const NormForward& norm, F activation, int threads) {
  const Layer& layer = norm.layer;
  const Blocks cut = blocks_of(layer);
  const int64_t C = layer.neurons;
  const Scratch scratch((2 * cut.chunks + 1) * C * int64_t(sizeof(double)));
  double* sums = static_cast<double*>(scratch.data());
  const bool past_caches = goes_past_caches(layer);
  prepare_output(layer);
  with_element(layer.dtype, [&](auto element) {
    using T = decltype(element);
    AccOf<T>* shifts = reinterpret_cast<AccOf<T>*>(sums + 2 * cut.chunks * C);
    if (!norm.of_batch) use_running_statistics<AccOf<T>>(norm);
    in_two_readings(
        layer, cut, threads,
        [&](int64_t block) {
          const Range neurons = block_neurons(layer, cut, block);
          for (int64_t c = neurons.begin; norm.of_batch && c < neurons.end; ++c) shifts[c] = first_shift<T>(layer, c);
        },
        [&](int64_t block, int64_t chunk) {
          if (norm.of_batch) sum_chunk<T>(layer, cut, block, chunk, shifts, sums);
        },
        [&](int64_t block) {
          if (norm.of_batch) finish_statistics<T>(norm, cut, block, shifts, sums);
        },
        [&](int64_t block, int64_t chunk) {
          const Part part = part_of(layer, cut, block, chunk);
          with_flag(past_caches, [&](auto past) {
            with_residual<F>(norm.residual, [&](auto residual) { normalize_task<past.value, residual.value, T>(norm, part, activation); });
          });
        });
  });
}

template <class F>
static inline void norm_pool_backward(const NormBackward& norm, F activation, int threads) {
  const Layer& layer = norm.layer;
  const Blocks cut = blocks_of(layer);
  const int64_t C = layer.neurons;
  const Scratch scratch((2 * cut.chunks + 2) * C * int64_t(sizeof(double)));
  double* sums = static_cast<double*>(scratch.data());
  const bool past_caches = goes_past_caches(layer);
  prepare_output(layer);
  if (norm.dresidual != nullptr) prefer_huge_pages(norm.dresidual, bytes_of(layer));
  with_element(layer.dtype, [&](auto element) {
    using T = decltype(element);
    using Acc = AccOf<T>;
    Acc* slopes = reinterpret_cast<Acc*>(sums + 2 * cut.chunks * C);
    Acc* levels = slopes + C;
    with_residual<F>(norm.dresidual, [&](auto residual) {
      in_two_readings(
          layer, cut, threads, [](int64_t) {},
          [&](int64_t block, int64_t chunk) {
            const Part part = part_of(layer, cut, block, chunk);
            double* of_chunk = sums + 2 * chunk * C + part.neurons.begin;
            with_flag(!norm.of_batch, [&](auto frozen) {
              gradient_sums<residual.value, frozen.value, T>(norm, part, activation, of_chunk, of_chunk + C);
            });
          },
          [&](int64_t block) { finish_gradient(norm, cut, block, sums, slopes, levels); },
          [&](int64_t block, int64_t chunk) {
            if (!norm.of_batch) return;
            const Part part = part_of(layer, cut, block, chunk);
            with_flag(past_caches, [&](auto past) {
              differentiate_task<past.value, residual.value, T>(norm, part, activation, slopes, levels);
            });
          });
    });
  });
}

}  // namespace MODA_ISA
}  // namespace moda
