// The modular losses of all layers from class sums, and their gradient (moda_kernels/closed_form.py has the algebra).
//
// Forward, per layer, with rows a_i, n_i = a_i / max(|a_i|, 1e-12) and class sums s_k, s = sum_k s_k:
//     1. rows: pooled activation, 1 / max(|a_i|, 1e-12) (0 for a row of zeros), |n_i|^2 and the sum of |a_i|;
//     2. columns, in fixed blocks: s_k and s, and the block's share of sum_k |s_k|^2 and of sum_k s_k . (s - s_k);
//     3. all layers' shares added up in their order.
// Backward, per sample of segment k, from what the forward left in the workspace:
//     g = -d_affinity / (L P_same) (s_k - n) + d_dispersion / (L P_diff) (s - s_k)
//     da = (g - (g . n) n) / |a| + d_compactness / (L N C) sign(a)               without the projection where |a| < 1e-12
#pragma once

#include "cpu/pool.h"
#include "cpu/memory.h"

namespace moda {
namespace MODA_ISA {

constexpr int64_t kSumColumns = 128;  // columns of a block of class sums
constexpr double kFloor = 1e-12;      // of a row's norm

// The numbers of one layer in the workspace, which the forward pass fills and the backward pass reads.
template <class Acc>
struct LayerSums {
  Acc* rows;          // (N, C)
  double* inverse;    // (N,): 1 / max(|a|, 1e-12), 0 for a row of zeros; Acc would have few bits for the largest rows
  Acc* class_sums;    // (room, C)
  Acc* total;         // (C,)
};

// What a row and a block of columns add to the terms.
struct RowShare {
  double square;    // |n|^2
  double absolute;  // mean of |a|
};
struct BlockShare {
  double same;       // sum_k |s_k|^2 over segments of two samples and more
  double different;  // sum_k s_k . (s - s_k)
};

MODA_INLINE int64_t up_to_line(int64_t bytes) { return divide_up(bytes, kLine) * kLine; }

// Whether `rows` is the activation itself, and not in the workspace.
MODA_INLINE bool is_own_pool(const Layer& layer) {
  return layer.layout == Layout::kNoPositions && layer.rows == layer.data;
}

// Bytes of one layer's LayerSums; moda_kernels/_native_calls.py allocates them.
MODA_INLINE int64_t sums_bytes(const Layer& layer, int64_t room) {
  const int64_t N = layer.samples, C = layer.neurons, acc = layer.dtype == Dtype::kFloat64 ? 8 : 4;
  return (is_own_pool(layer) ? 0 : up_to_line(N * C * acc)) + up_to_line(N * sizeof(double)) + up_to_line(room * C * acc) +
         up_to_line(C * acc);
}

template <class Acc>
MODA_INLINE LayerSums<Acc> sums_of(const Layer* layers, int64_t l, int64_t room, char* workspace) {
  for (int64_t before = 0; before < l; ++before) workspace += sums_bytes(layers[before], room);
  const Layer& layer = layers[l];
  const int64_t N = layer.samples, C = layer.neurons, acc = sizeof(Acc);
  LayerSums<Acc> sums;
  if (is_own_pool(layer)) {
    sums.rows = static_cast<Acc*>(layer.rows);
  } else {
    sums.rows = reinterpret_cast<Acc*>(workspace);
    workspace += up_to_line(N * C * acc);
  }
  sums.inverse = reinterpret_cast<double*>(workspace);
  workspace += up_to_line(N * sizeof(double));
  sums.class_sums = reinterpret_cast<Acc*>(workspace);
  sums.total = reinterpret_cast<Acc*>(workspace + up_to_line(room * C * acc));
  return sums;
}

// Sum over i of f(i-th vector) and f of the rest, one element at a time.
template <class Acc, class OfVector, class OfElement>
MODA_INLINE double sum_over(int64_t count, OfVector of_vector, OfElement of_element) {
  constexpr int64_t lanes = kLanes<Acc>;
  double total = 0;
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t end = smaller(begin + kBlock, count);
    Vector<Acc> sum{};
    int64_t i = begin;
    for (; i + lanes <= end; i += lanes) sum += of_vector(i);
    Acc rest = 0;
    for (; i < end; ++i) rest += of_element(i);
    total += double(sum_lanes<Acc>(sum)) + double(rest);
  }
  return total;
}

template <class Acc>
MODA_INLINE double dot(const Acc* a, const Acc* b, int64_t count) {
  return sum_over<Acc>(
      count, [&](int64_t i) { return load_unaligned<Vector<Acc>>(a + i) * load_unaligned<Vector<Acc>>(b + i); },
      [&](int64_t i) { return a[i] * b[i]; });
}

// The mean of |a|, whatever finite values there are.
template <class Acc>
MODA_INLINE double mean_of_absolute(const Acc* a, int64_t count) {
  const double sum = sum_over<Acc>(
      count, [&](int64_t i) { return absolute<Acc>(load_unaligned<Vector<Acc>>(a + i)); },
      [&](int64_t i) { return absolute(a[i]); });
  return is_infinite(sum) ? double(mean_of_shares(a, count, 1)) : sum / double(count);
}

// What a row a is normalised by.
struct RowNorm {
  double inverse;  // 1 / max(|a|, 1e-12), 0 for a row of zeros
  double square;   // |n|^2
};

MODA_INLINE RowNorm norm_of_square(double square) {
  const double norm = __builtin_sqrt(square), inverse = 1 / (norm < kFloor ? kFloor : norm);
  return {inverse, square * inverse * inverse};
}

// Whatever finite values the row holds: they are divided by the largest before they are squared.
template <class Acc>
MODA_INLINE RowNorm norm_of_scaled(const Acc* a, int64_t count) {
  double largest = 0, square = 0;
  for (int64_t i = 0; i < count; ++i) {
    const double magnitude = absolute(double(a[i]));
    if (magnitude > largest || magnitude != magnitude) largest = magnitude;
  }
  if (largest == 0) return {0, 0};
  for (int64_t i = 0; i < count; ++i) square += (a[i] / largest) * (a[i] / largest);
  const double root = __builtin_sqrt(square), floored = root * largest / kFloor;
  return floored < 1 ? RowNorm{1 / kFloor, floored * floored} : RowNorm{1 / root / largest, 1};
}

template <class Acc>
MODA_INLINE RowNorm norm_of(const Acc* a, int64_t count) {
  const double square = dot(a, a, count);
  return square > 1e-30 && square < 1e30 ? norm_of_square(square) : norm_of_scaled(a, count);
}

// Step 1 for one sample of one layer.
template <class T>
MODA_INLINE RowShare row_share(const Layer& layer, const LayerSums<AccOf<T>>& sums, int64_t sample) {
  const int64_t C = layer.neurons;
  AccOf<T>* row = sums.rows + sample * C;
  if (layer.layout != Layout::kNoPositions) {
    pool_neurons<T>(layer, sample, {0, C}, row);
  } else if (!is_own_pool(layer)) {
    for (int64_t c = 0; c < C; ++c) row[c] = Element<T>::load1(static_cast<const T*>(layer.data) + sample * C + c);
  }
  const RowNorm norm = norm_of(row, C);
  sums.inverse[sample] = norm.inverse;
  return {norm.square, mean_of_absolute(row, C)};
}

// sums += scale * row
template <class Acc>
MODA_INLINE void add_scaled(const Acc* row, Acc scale, Acc* sums, int64_t count) {
  constexpr int64_t lanes = kLanes<Acc>;
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    store_unaligned(sums + i, load_unaligned<Vector<Acc>>(sums + i) + scale * load_unaligned<Vector<Acc>>(row + i));
  }
  for (; i < count; ++i) sums[i] += scale * row[i];
}

// Of rows with a smaller inverse neither its square nor the row's product with a gradient need fit Acc, nor itself with all its
// bits: they are normalised in double.
template <class Acc> constexpr double kSmallInverse = sizeof(Acc) == 4 ? 1e-18 : 1e-150;

template <class Acc>
MODA_INLINE void normalize(const Acc* row, double inverse, Acc* n, int64_t count) {
  for (int64_t c = 0; c < count; ++c) n[c] = static_cast<Acc>(inverse * double(row[c]));
}

// sums += n of up to kSumColumns neurons of a row
template <class Acc>
MODA_INLINE void add_normalized(const Acc* row, double inverse, Acc* sums, int64_t count) {
  if (inverse > 0 && inverse < kSmallInverse<Acc>) {
    Acc n[kSumColumns];
    normalize(row, inverse, n, count);
    return add_scaled(n, Acc(1), sums, count);
  }
  add_scaled(row, static_cast<Acc>(inverse), sums, count);
}

// Step 2 for one block of columns of one layer.
template <class Acc>
MODA_INLINE BlockShare block_share(const LayerSums<Acc>& sums, const SegmentsView& segments, int64_t N, int64_t C, int64_t block) {
  const int64_t begin = block * kSumColumns, columns = smaller(kSumColumns, C - begin);
  Acc* total = sums.total + begin;
  for (int64_t c = 0; c < columns; ++c) total[c] = 0;
  for (int64_t g = 0; segments.offsets[g] < N; ++g) {
    Acc* own = sums.class_sums + g * C + begin;
    for (int64_t c = 0; c < columns; ++c) own[c] = 0;
    for (int64_t at = segments.offsets[g]; at < segments.offsets[g + 1]; ++at) {
      const int64_t sample = segments.order[at];
      add_normalized(sums.rows + sample * C + begin, sums.inverse[sample], own, columns);
    }
    add_scaled(own, Acc(1), total, columns);
  }
  BlockShare share{0, 0};
  for (int64_t g = 0; segments.offsets[g] < N; ++g) {
    const Acc* own = sums.class_sums + g * C + begin;
    // A segment of one sample has no pair: leaving it out is exact, |s|^2 - |n|^2 would leave its rounding.
    if (segments.offsets[g + 1] - segments.offsets[g] > 1) share.same += dot(own, own, columns);
    share.different += sum_over<Acc>(
        columns,
        [&](int64_t i) {
          const Vector<Acc> s = load_unaligned<Vector<Acc>>(own + i);
          return s * (load_unaligned<Vector<Acc>>(total + i) - s);
        },
        [&](int64_t i) { return own[i] * (total[i] - own[i]); });
  }
  return share;
}

MODA_INLINE int64_t sum_blocks(const Layer& layer) { return divide_up(layer.neurons, kSumColumns); }

MODA_INLINE double per(double value, double count) { return count > 0 ? value / count : 0; }

// `workspace` has room for every layer's sums; all layers have the same samples.
static Terms losses_forward(const Layer* layers, int64_t count, const SegmentsView& segments, void* workspace, int threads) {
  char* const base = static_cast<char*>(workspace);
  const int64_t N = layers[0].samples;
  int64_t blocks = 0;
  for (int64_t l = 0; l < count; ++l) blocks += sum_blocks(layers[l]);
  Scratch scratch(count * N * sizeof(RowShare) + blocks * sizeof(BlockShare));
  RowShare* const row_shares = static_cast<RowShare*>(scratch.data());
  BlockShare* const block_shares = reinterpret_cast<BlockShare*>(row_shares + count * N);

  over_layers(
      count, threads, [&](int64_t) { return N; },
      [&](int64_t l, int64_t sample) {
        with_element(layers[l].dtype, [&](auto element) {
          using T = decltype(element);
          row_shares[l * N + sample] = row_share<T>(layers[l], sums_of<AccOf<T>>(layers, l, segments.room, base), sample);
        });
      });
  over_layers(
      count, threads, [&](int64_t l) { return sum_blocks(layers[l]); },
      [&](int64_t l, int64_t block) {
        int64_t before = block;
        for (int64_t i = 0; i < l; ++i) before += sum_blocks(layers[i]);
        with_element(layers[l].dtype, [&](auto element) {
          using Acc = AccOf<decltype(element)>;
          const LayerSums<Acc> sums = sums_of<Acc>(layers, l, segments.room, base);
          block_shares[before] = block_share(sums, segments, N, layers[l].neurons, block);
        });
      });

  Terms terms{0, 0, 0};
  const BlockShare* block_share = block_shares;
  for (int64_t l = 0; l < count; ++l) {
    double same = 0, different = 0, absolutes = 0, largest = 0;
    for (int64_t block = 0; block < sum_blocks(layers[l]); ++block, ++block_share) {
      same += block_share->same;
      different += block_share->different;
    }
    for (int64_t g = 0; segments.offsets[g] < N; ++g) {
      if (segments.offsets[g + 1] - segments.offsets[g] == 1) continue;
      for (int64_t at = segments.offsets[g]; at < segments.offsets[g + 1]; ++at) {
        same -= row_shares[l * N + segments.order[at]].square;
      }
    }
    for (int64_t sample = 0; sample < N; ++sample) {
      const double absolute = row_shares[l * N + sample].absolute;
      if (absolute > largest) largest = absolute;
      absolutes += absolute / double(N);
    }
    if (absolutes > largest) absolutes = largest;  // by rounding: of the largest numbers there are, it would be infinite
    terms.affinity += per(same / 2, double(segments.same_pairs));
    terms.dispersion += per(different / 2, double(segments.diff_pairs));
    terms.compactness += absolutes / double(count);
  }
  terms.affinity = segments.same_pairs > 0 ? 1 - terms.affinity / double(count) : 0;
  terms.dispersion /= double(count);
  return terms;
}

// The factors of the gradient, the same for all samples of a layer.
struct GradientFactors {
  double same;        // of s_k - n
  double different;   // of s - s_k
  double compactness;  // of sign(a)
  bool has_same, has_different;  // whether that loss counts: what does not is left out, as 0 times NaN or infinity is NaN
};

// sign(a) * compactness
template <class Acc>
MODA_INLINE Acc signed1(Acc a, Acc compactness) { return a > 0 ? compactness : a < 0 ? -compactness : Acc(0); }

// gradient = same (s_k - n) + different (s - s_k)
template <class Acc>
MODA_INLINE void pulls(const Acc* row, Acc inverse, const Acc* own, const Acc* total, const GradientFactors& factors,
                       int64_t C, Acc* gradient) {
  constexpr int64_t lanes = kLanes<Acc>;
  const Acc same = Acc(factors.same), different = Acc(factors.different);
  int64_t i = 0;
  if (!factors.has_different) {
    for (; i + lanes <= C; i += lanes) {
      const Vector<Acc> s = load_unaligned<Vector<Acc>>(own + i), n = inverse * load_unaligned<Vector<Acc>>(row + i);
      store_unaligned(gradient + i, same * (s - n));
    }
    for (; i < C; ++i) gradient[i] = same * (own[i] - inverse * row[i]);
  } else if (!factors.has_same) {
    for (; i + lanes <= C; i += lanes) {
      const Vector<Acc> s = load_unaligned<Vector<Acc>>(own + i);
      store_unaligned(gradient + i, different * (load_unaligned<Vector<Acc>>(total + i) - s));
    }
    for (; i < C; ++i) gradient[i] = different * (total[i] - own[i]);
  } else {
    for (; i + lanes <= C; i += lanes) {
      const Vector<Acc> s = load_unaligned<Vector<Acc>>(own + i), n = inverse * load_unaligned<Vector<Acc>>(row + i);
      store_unaligned(gradient + i, same * (s - n) + different * (load_unaligned<Vector<Acc>>(total + i) - s));
    }
    for (; i < C; ++i) gradient[i] = same * (own[i] - inverse * row[i]) + different * (total[i] - own[i]);
  }
}

// da of one sample: of its row, its inverse norm, the sum of its class and that of all.
template <class Acc>
MODA_INLINE void row_gradient(const Acc* row, Acc inverse, const Acc* own, const Acc* total, const GradientFactors& factors,
                              int64_t C, Acc* gradient) {
  constexpr int64_t lanes = kLanes<Acc>;
  const Acc compactness = Acc(factors.compactness);
  if (inverse == 0 || !(factors.has_same || factors.has_different)) {  // a row of zeros has no direction
    for (int64_t c = 0; c < C; ++c) gradient[c] = signed1(row[c], compactness);
    return;
  }
  int64_t i = 0;
  pulls(row, inverse, own, total, factors, C, gradient);
  const Acc projection = inverse < Acc(1 / kFloor) ? Acc(dot(gradient, row, C)) * inverse * inverse : Acc(0);
  for (; i + lanes <= C; i += lanes) {
    const Vector<Acc> a = load_unaligned<Vector<Acc>>(row + i), g = load_unaligned<Vector<Acc>>(gradient + i);
    const Vector<Acc> one = compactness - Vector<Acc>{};
    const Vector<Acc> sign = keep_where<Acc>(a > Acc(0), one) - keep_where<Acc>(a < Acc(0), one);
    store_unaligned(gradient + i, (g - projection * a) * inverse + sign);
  }
  for (; i < C; ++i) gradient[i] = (gradient[i] - projection * row[i]) * inverse + signed1(row[i], compactness);
}

// The same of a row with a small inverse: that of the normalised row, scaled afterwards. `n` has room for it.
template <class Acc>
MODA_INLINE void large_row_gradient(const Acc* row, double inverse, const Acc* own, const Acc* total, GradientFactors factors,
                                    int64_t C, Acc* n, Acc* gradient) {
  const Acc compactness = Acc(factors.compactness);
  factors.compactness = 0;
  normalize(row, inverse, n, C);
  row_gradient(n, Acc(1), own, total, factors, C, gradient);
  for (int64_t c = 0; c < C; ++c) {
    gradient[c] = static_cast<Acc>(inverse * double(gradient[c])) + signed1(row[c], compactness);
  }
}

// The gradient of one sample of one layer, down to the activation.
template <class T>
MODA_INLINE void sample_gradient(const Layer& layer, const LayerSums<AccOf<T>>& sums, const GradientFactors& factors,
                                 const int64_t* segment, int64_t sample) {
  using Acc = AccOf<T>;
  const int64_t C = layer.neurons;
  const Acc *row = sums.rows + sample * C, *own = sums.class_sums + segment[sample] * C;
  const double inverse = sums.inverse[sample];
  T* out = static_cast<T*>(layer.out) + sample * C * layer.positions;
  Acc* gradient = static_cast<Acc*>(thread_scratch(2 * C * sizeof(Acc)));
  if (inverse > 0 && inverse < kSmallInverse<Acc>) {
    large_row_gradient(row, inverse, own, sums.total, factors, C, gradient + C, gradient);
  } else {
    row_gradient(row, static_cast<Acc>(inverse), own, sums.total, factors, C, gradient);
  }
  if (layer.layout != Layout::kNoPositions) return spread_neurons<T>(layer, sample, {0, C}, gradient);
  for (int64_t c = 0; c < C; ++c) Element<T>::store1(out + c, gradient[c]);
}

// Writes `out` of every layer that has one. `workspace` is as the forward pass left it.
static void losses_backward(const Layer* layers, int64_t count, const SegmentsView& segments, const Terms& upstream,
                            void* workspace, int threads) {
  const int64_t N = layers[0].samples;
  const double L = double(count);
  for (int64_t l = 0; l < count; ++l) prepare_output(layers[l]);
  over_layers(
      count, threads, [&](int64_t l) { return layers[l].out == nullptr ? 0 : N; },
      [&](int64_t l, int64_t sample) {
        const GradientFactors factors{-per(upstream.affinity / L, double(segments.same_pairs)),
                                      per(upstream.dispersion / L, double(segments.diff_pairs)),
                                      upstream.compactness / (L * double(N) * double(layers[l].neurons)),
                                      upstream.affinity != 0, upstream.dispersion != 0};
        with_element(layers[l].dtype, [&](auto element) {
          using T = decltype(element);
          const LayerSums<AccOf<T>> sums = sums_of<AccOf<T>>(layers, l, segments.room, static_cast<char*>(workspace));
          sample_gradient<T>(layers[l], sums, factors, segments.segment, sample);
        });
      });
}

// out (K, C) = sums over each class's samples of the normalised rows (N, C) in `data`; labels outside of [0, K) add nothing.
static void class_sums(const Layer* layers, int64_t count, const int64_t* labels, int64_t classes, int threads) {
  const int64_t N = layers[0].samples;
  Scratch scratch(count * N * sizeof(double));
  double* const inverse = static_cast<double*>(scratch.data());
  over_layers(
      count, threads, [&](int64_t) { return N; },
      [&](int64_t l, int64_t sample) {
        const int64_t C = layers[l].neurons;
        const RowNorm norm = layers[l].dtype == Dtype::kFloat64
                                 ? norm_of(static_cast<const double*>(layers[l].data) + sample * C, C)
                                 : norm_of(static_cast<const float*>(layers[l].data) + sample * C, C);
        inverse[l * N + sample] = norm.inverse;
      });
  const auto sum_block = [&](auto acc, int64_t l, int64_t block) {
    using Acc = decltype(acc);
    const int64_t C = layers[l].neurons, begin = block * kSumColumns, columns = smaller(kSumColumns, C - begin);
    Acc* out = static_cast<Acc*>(layers[l].out) + begin;
    for (int64_t k = 0; k < classes; ++k) {
      for (int64_t c = 0; c < columns; ++c) out[k * C + c] = 0;
    }
    for (int64_t n = 0; n < N; ++n) {
      if (labels[n] < 0 || labels[n] >= classes) continue;
      const Acc* row = static_cast<const Acc*>(layers[l].data) + n * C + begin;
      add_normalized(row, inverse[l * N + n], out + labels[n] * C, columns);
    }
  };
  over_layers(
      count, threads, [&](int64_t l) { return sum_blocks(layers[l]); },
      [&](int64_t l, int64_t block) {
        layers[l].dtype == Dtype::kFloat64 ? sum_block(double{}, l, block) : sum_block(float{}, l, block);
      });
}

}  // namespace MODA_ISA
}  // namespace moda
