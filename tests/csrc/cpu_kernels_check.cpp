// Runs every CPU kernel over shapes, layouts, dtypes and thread counts, for the sanitizers to watch, and checks the counts, the sums
// and the means against plain loops. Built without Python by tests/moda_kernels/test_native_sanitizers.py, threads are std::thread here.
// Buffers have exactly the bytes they need: a read or write beside them is an error of AddressSanitizer.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <vector>

#include "cpu/kernels.h"
#include "cuda/firing.h"
#include "cuda/statistics.h"

#ifndef MODA_ISA
#error "MODA_ISA: the instruction set that csrc/cpu/kernels.cpp was compiled for"
#endif

namespace moda {
namespace MODA_ISA {
extern const CpuKernels kKernels;
}
}  // namespace moda

namespace {

using namespace moda;

constexpr int kThreads = 3;
constexpr int64_t kClasses = 4;

struct Shape {
  int64_t samples, neurons, positions;
  Layout layout;
};

// Bytes on the heap, filled with a pattern that no kernel writes.
struct Buffer {
  explicit Buffer(int64_t size) : bytes(static_cast<size_t>(size)), data(new unsigned char[bytes]) {
    std::memset(data.get(), 0xA5, bytes);
  }
  template <class T = void>
  T* as() const {
    return reinterpret_cast<T*>(data.get());
  }
  size_t bytes;
  std::unique_ptr<unsigned char[]> data;
};

void require(bool condition, const char* what, const Shape& s, Dtype dtype) {
  if (condition) return;
  std::printf("%s: N=%ld C=%ld S=%ld layout=%ld dtype=%ld\n", what, long(s.samples), long(s.neurons), long(s.positions),
              long(s.layout), long(dtype));
  std::exit(1);
}

// Half precision as its upper bits: 2.0, -0.5 and 0 are exact in both.
void set(void* data, Dtype dtype, int64_t at, double value) {
  switch (dtype) {
    case Dtype::kFloat32: static_cast<float*>(data)[at] = static_cast<float>(value); return;
    case Dtype::kFloat64: static_cast<double*>(data)[at] = value; return;
    case Dtype::kBfloat16: static_cast<uint16_t*>(data)[at] = value == 0 ? 0 : value > 0 ? 0x4000 : 0xBF00; return;
    case Dtype::kFloat16: static_cast<uint16_t*>(data)[at] = value == 0 ? 0 : value > 0 ? 0x4000 : 0xB800; return;
  }
}

// Values of 2, -0.5 and 0, whole rows of zeros among them.
std::vector<double> values(const Shape& s) {
  std::vector<double> all(static_cast<size_t>(s.samples * s.neurons * s.positions));
  uint32_t state = 12345;
  for (int64_t row = 0; row < s.samples * s.neurons; ++row) {
    for (int64_t p = 0; p < s.positions; ++p) {
      state = state * 1664525u + 1013904223u;
      const uint32_t kind = state >> 30;
      all[static_cast<size_t>(row * s.positions + p)] = row % 3 == 0 || kind == 0 ? 0.0 : kind == 1 ? -0.5 : 2.0;
    }
  }
  return all;
}

int64_t index_in(const Shape& s, int64_t n, int64_t c, int64_t p) {
  return s.layout == Layout::kNeuronsLast ? (n * s.positions + p) * s.neurons + c : (n * s.neurons + c) * s.positions + p;
}

double row_mean(const Buffer& rows, Dtype dtype, int64_t at) {
  return dtype == Dtype::kFloat64 ? rows.as<double>()[at] : rows.as<float>()[at];
}

void check_pooling(const CpuKernels& kernels, const Shape& s, Dtype dtype, const Buffer& x, const std::vector<double>& plain) {
  const int64_t elements = s.samples * s.neurons * s.positions, acc = dtype == Dtype::kFloat64 ? 8 : 4;
  Buffer rows(s.samples * s.neurons * acc), out(elements * width(dtype));
  const Layer layer{x.as(), dtype, s.layout, s.samples, s.neurons, s.positions, rows.as(), out.as()};
  kernels.pool_forward(&layer, 1, kThreads);
  for (int64_t row = 0; row < s.samples * s.neurons; ++row) {
    double sum = 0;
    for (int64_t p = 0; p < s.positions; ++p) sum += std::fabs(plain[static_cast<size_t>(row * s.positions + p)]);
    require(std::fabs(row_mean(rows, dtype, row) - sum / double(s.positions)) < 1e-5, "pool", s, dtype);
  }
  kernels.pool_backward(&layer, 1, kThreads);
  kernels.relu_pool_forward(layer, kThreads);
  const Layer backward{out.as(), dtype, s.layout, s.samples, s.neurons, s.positions, rows.as(), x.as()};
  Buffer dx(elements * width(dtype));
  Layer gradient = backward;
  gradient.out = dx.as();
  kernels.relu_pool_backward(gradient, x.as(), kThreads);
  Layer in_place = layer;
  in_place.data = out.as();
  kernels.relu_pool_forward(in_place, kThreads);
}

double number(const void* data, Dtype dtype, int64_t at) {
  switch (dtype) {
    case Dtype::kFloat32: return static_cast<const float*>(data)[at];
    case Dtype::kFloat64: return static_cast<const double*>(data)[at];
    case Dtype::kBfloat16: {
      const uint32_t bits = uint32_t(static_cast<const uint16_t*>(data)[at]) << 16;
      float value;
      std::memcpy(&value, &bits, sizeof value);
      return value;
    }
    case Dtype::kFloat16: {  // infinity and NaN do not occur here
      const uint32_t half = static_cast<const uint16_t*>(data)[at];
      const int exponent = int((half >> 10) & 31), sign = half & 0x8000u ? -1 : 1;
      const double fraction = (half & 0x3FFu) / 1024.0;
      return sign * (exponent == 0 ? std::ldexp(fraction, -14) : std::ldexp(1 + fraction, exponent - 15));
    }
  }
  return 0;
}

double activated(Activation activation, double z) {
  switch (activation) {
    case Activation::kRelu: return std::fmax(z, 0);
    case Activation::kRelu6: return std::fmin(std::fmax(z, 0), 6);
    case Activation::kHardswish: return z * std::fmin(std::fmax(z + 3, 0), 6) / 6;
    case Activation::kSilu: return z / (1 + std::exp(-z));
    case Activation::kGelu: return z * (1 + std::erf(z * std::sqrt(0.5))) / 2;
  }
  return 0;
}

// Batch norm without weight and bias, with statistics of the batch and with running ones, with a residual (x itself) and without;
// y against plain loops, the gradients' sums against what they must be.
void check_norm(const CpuKernels& kernels, const Shape& s, Dtype dtype, const Buffer& x, const std::vector<double>& plain,
                bool of_batch, bool with_residual, Activation activation) {
  const int64_t N = s.samples, C = s.neurons, S = s.positions, elements = N * C * S, acc = dtype == Dtype::kFloat64 ? 8 : 4;
  const Dtype wide = acc == 8 ? Dtype::kFloat64 : Dtype::kFloat32;
  Buffer rows(N * C * acc), y(elements * width(dtype)), saved(4 * C * acc), running(2 * C * acc);
  for (int64_t i = 0; i < 2 * C; ++i) set(running.as(), wide, i, 2.0);
  void* var = running.as<unsigned char>() + C * acc;
  const bool matrix = s.layout == Layout::kNoPositions;
  const Layer layer{x.as(), dtype, s.layout, N, C, S, matrix ? nullptr : rows.as(), y.as()};
  kernels.norm_relu_pool_forward({layer, with_residual ? x.as() : nullptr, nullptr, nullptr, running.as(), var, saved.as(), 0.5, 1e-3,
                                  of_batch, activation}, kThreads);
  for (int64_t c = 0; c < C; ++c) {
    double mean = 0, square = 0;
    for (int64_t n = 0; n < N; ++n) {
      for (int64_t p = 0; p < S; ++p) {
        const double value = plain[static_cast<size_t>((n * C + c) * S + p)];
        mean += value / double(N * S);
        square += value * value / double(N * S);
      }
    }
    const double variance = of_batch ? square - mean * mean : 2.0;
    if (!of_batch) mean = 2.0;
    for (int64_t n = 0; n < N; ++n) {
      double sum = 0;
      for (int64_t p = 0; p < S; ++p) {
        const double value = plain[static_cast<size_t>((n * C + c) * S + p)];
        const double z = (value - mean) / std::sqrt(variance + 1e-3) + (with_residual ? value : 0);
        const double expected = activated(activation, z);
        sum += std::fabs(expected);
        require(std::fabs(number(y.as(), dtype, index_in(s, n, c, p)) - expected) < 0.02 * (1 + std::fabs(expected)), "norm", s, dtype);
      }
      if (!matrix) require(std::fabs(row_mean(rows, dtype, n * C + c) - sum / double(S)) < 0.02 * (1 + sum), "norm's rows", s, dtype);
    }
  }
  Buffer dx(elements * width(dtype)), dresidual(elements * width(dtype)), parameters(2 * C * acc);
  const Layer gradient{x.as(), dtype, s.layout, N, C, S, matrix ? nullptr : rows.as(), dx.as()};
  const bool rectifies = activation == Activation::kRelu || activation == Activation::kRelu6;
  const void* kept = with_residual ? (rectifies ? y.as() : x.as()) : nullptr;
  kernels.norm_relu_pool_backward({gradient, x.as(), kept, with_residual ? dresidual.as() : nullptr, saved.as(), parameters.as(),
                                   of_batch, activation}, kThreads);
  for (int64_t c = 0; c < C && of_batch && N * S > 1; ++c) {  // what statistics of the batch take away: the sum
    double sum = 0, largest = 0, upstream = 0;
    for (int64_t n = 0; n < N; ++n) {
      for (int64_t p = 0; p < S; ++p) {
        const double value = number(dx.as(), dtype, index_in(s, n, c, p));
        sum += value;
        largest = std::fmax(largest, std::fabs(value));
        const double of_row = matrix ? 0 : number(rows.as(), wide, n * C + c) / double(S);
        upstream = std::fmax(upstream, std::fabs(plain[static_cast<size_t>((n * C + c) * S + p)]) + of_row);
      }
    }
    // Of the terms whose difference dx is; a residual's gradient has been rounded where it is read again.
    const double ulp = with_residual && width(dtype) == 2 ? 4e-3 : 1e-6;
    const double rounding = ulp * number(saved.as(), wide, 2 * C + c) * upstream;
    require(std::fabs(sum) <= (0.02 * largest + rounding) * double(N * S), "norm's gradient", s, dtype);
  }
}

int64_t up_to_line(int64_t bytes) { return (bytes + 63) / 64 * 64; }

void check_losses(const CpuKernels& kernels, const Shape& s, Dtype dtype, const Buffer& x) {
  const int64_t N = s.samples, C = s.neurons, acc = dtype == Dtype::kFloat64 ? 8 : 4;
  std::vector<int64_t> order, offsets{0}, segment(static_cast<size_t>(N));
  int64_t same_pairs = 0;
  for (int64_t k = 0; k < kClasses; ++k) {
    const auto before = static_cast<int64_t>(order.size());
    for (int64_t n = 0; n < N; ++n) {
      if (n * 7 % kClasses != k) continue;
      order.push_back(n);
      segment[static_cast<size_t>(n)] = static_cast<int64_t>(offsets.size()) - 1;
    }
    const int64_t size = static_cast<int64_t>(order.size()) - before;
    same_pairs += size * (size - 1) / 2;
    if (size > 0) offsets.push_back(static_cast<int64_t>(order.size()));
  }
  const auto room = static_cast<int64_t>(offsets.size()) - 1;
  offsets.resize(static_cast<size_t>(N + 1), N);
  const SegmentsView segments{order.data(), offsets.data(), segment.data(), same_pairs, N * (N - 1) / 2 - same_pairs, room};
  Buffer out(N * C * s.positions * width(dtype)), other(N * C * s.positions * width(dtype));
  const auto inverse = static_cast<int64_t>(N * sizeof(double));
  Buffer workspace(2 * (up_to_line(N * C * acc) + up_to_line(room * C * acc) + up_to_line(inverse) + up_to_line(C * acc)));
  const Layer layer{x.as(), dtype, s.layout, N, C, s.positions, nullptr, out.as()};
  const Layer layers[] = {layer, {x.as(), dtype, s.layout, N, C, s.positions, nullptr, other.as()}};
  const Terms terms = kernels.losses_forward(layers, 2, segments, workspace.as(), kThreads);
  require(terms.affinity > -1e-5 && terms.affinity < 2 && terms.compactness >= 0, "losses", s, dtype);
  kernels.losses_backward(layers, 2, segments, {1, 1, 0.3}, workspace.as(), kThreads);
}

void check_class_sums(const CpuKernels& kernels, const Shape& s, Dtype dtype, const Buffer& x) {
  std::vector<int64_t> labels(static_cast<size_t>(s.samples), 1);
  labels[0] = -1;
  Buffer out(kClasses * s.neurons * width(dtype));
  const Layer layer{x.as(), dtype, s.layout, s.samples, s.neurons, 1, nullptr, out.as()};
  kernels.class_sums(&layer, 1, labels.data(), kClasses, kThreads);
}

template <class Label>
void check_firing(const CpuKernels* kernels, const Shape& s, Dtype dtype, const Buffer& x, const std::vector<double>& plain) {
  std::vector<Label> labels;
  for (int64_t n = 0; n < s.samples; ++n) labels.push_back(static_cast<Label>(n % (kClasses + 2) - 1));
  std::vector<int64_t> counts(static_cast<size_t>(kClasses * s.neurons), 5), expected = counts, sizes(kClasses, 0);
  int64_t invalid = 0;
  for (int64_t n = 0; n < s.samples; ++n) {
    const auto label = static_cast<int64_t>(labels[static_cast<size_t>(n)]);
    for (int64_t c = 0; c < s.neurons && label >= 0 && label < kClasses; ++c) {
      bool fires = false;
      for (int64_t p = 0; p < s.positions; ++p) fires |= plain[static_cast<size_t>((n * s.neurons + c) * s.positions + p)] != 0;
      expected[static_cast<size_t>(label * s.neurons + c)] += fires;
    }
  }
  const FiringLayer layer{x.as(), dtype, s.layout, s.neurons, s.positions, 0, counts.data()};
  const FiringBatch batch{labels.data(), sizeof(Label) == 8, s.samples, kClasses, sizes.data(), &invalid};
  if (kernels != nullptr) {
    kernels->count_firings(&layer, 1, batch, kThreads);
  } else {
    count_firings_emulated(&layer, 1, batch);
  }
  require(counts == expected, "count_firings", s, dtype);
  int64_t total = invalid;
  for (int64_t size : sizes) total += size;
  require(total == s.samples, "class sizes", s, dtype);
}

// Two layers of the same activation, so that tasks of several layers run at once.
template <class Label>
void check_statistics(const CpuKernels* kernels, const Shape& s, Dtype dtype, const Buffer& x, const std::vector<double>& plain) {
  const int64_t N = s.samples, C = s.neurons, acc = dtype == Dtype::kFloat64 ? 8 : 4;
  const bool own_pool = s.layout == Layout::kNoPositions;
  std::vector<int64_t> order(static_cast<size_t>(N));
  std::iota(order.begin(), order.end(), 0);
  const auto label_of = [](int64_t n) { return static_cast<Label>(n * 5 % (kClasses + 2) - 1); };
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return label_of(a) < label_of(b); });
  std::vector<Label> sorted;
  for (int64_t n : order) sorted.push_back(label_of(n));

  std::vector<int64_t> expected(static_cast<size_t>(kClasses * C), 5), sizes(kClasses, 0);
  std::vector<double> expected_sums(expected.size(), 0.0);
  for (int64_t n = 0; n < N; ++n) {
    const auto label = static_cast<int64_t>(label_of(n));
    for (int64_t c = 0; c < C && label >= 0 && label < kClasses; ++c) {
      bool fires = false;
      double sum = 0;
      for (int64_t p = 0; p < s.positions; ++p) {
        const double value = plain[static_cast<size_t>((n * C + c) * s.positions + p)];
        fires |= value != 0;
        sum += own_pool ? value : std::fabs(value);
      }
      expected[static_cast<size_t>(label * C + c)] += fires;
      expected_sums[static_cast<size_t>(label * C + c)] += sum / double(s.positions);
    }
  }

  struct Target {
    Buffer rows, sums;
    std::vector<int64_t> counts;
  };
  std::vector<Target> targets;
  std::vector<StatisticsLayer> layers;
  for (int l = 0; l < 2; ++l) {
    targets.push_back({Buffer(N * C * acc), Buffer(kClasses * C * acc), std::vector<int64_t>(expected.size(), 5)});
    std::memset(targets.back().sums.as(), 0, targets.back().sums.bytes);
  }
  for (Target& target : targets) {
    for (int64_t i = 0; i < N * C && own_pool; ++i) {
      set(target.rows.as(), acc == 8 ? Dtype::kFloat64 : Dtype::kFloat32, i, plain[static_cast<size_t>(i)]);
    }
    layers.push_back({{x.as(), dtype, s.layout, N, C, s.positions, target.rows.as(), target.sums.as()}, 0, target.counts.data()});
  }
  int64_t invalid = 0;
  const FiringBatch firing{sorted.data(), sizeof(Label) == 8, N, kClasses, sizes.data(), &invalid};
  if (kernels != nullptr) {
    kernels->class_statistics(layers.data(), 2, {firing, order.data()}, kThreads);
  } else {
    class_statistics_emulated(layers.data(), 2, {firing, order.data()});
  }
  for (const Target& target : targets) {
    require(target.counts == expected, "class_statistics", s, dtype);
    for (int64_t i = 0; i < kClasses * C; ++i) {
      const double sum = row_mean(target.sums, dtype, i);
      require(std::fabs(sum - expected_sums[static_cast<size_t>(i)]) < 1e-4, "sums", s, dtype);
    }
  }
  require(std::accumulate(sizes.begin(), sizes.end(), invalid) == N, "class sizes beside sums", s, dtype);
}

// The gradient is the activation back to front, so that products differ in sign. Labels from before 0 to beyond the classes.
void check_attributions(const CpuKernels& kernels, const Shape& s, Dtype dtype, const Buffer& x, const std::vector<double>& plain) {
  const int64_t N = s.samples, C = s.neurons, S = s.positions, acc = dtype == Dtype::kFloat64 ? 8 : 4;
  Buffer gradient(N * C * S * width(dtype)), rows(N * C * acc), out(kClasses * C * acc);
  std::memset(out.as(), 0, out.bytes);
  const auto value_of = [&](int64_t n, int64_t c, int64_t p) { return plain[static_cast<size_t>((n * C + c) * S + p)]; };
  std::vector<int64_t> sorted, order(static_cast<size_t>(N)), sizes(kClasses, 0);
  std::iota(order.begin(), order.end(), 0);
  for (int64_t n = 0; n < N; ++n) sorted.push_back(n * (kClasses + 2) / N - 1);
  std::vector<double> expected(static_cast<size_t>(kClasses * C), 0.0);
  for (int64_t n = 0; n < N; ++n) {
    const int64_t label = sorted[static_cast<size_t>(n)];
    for (int64_t c = 0; c < C; ++c) {
      double sum = 0;
      for (int64_t p = 0; p < S; ++p) {
        const double of = value_of(n, C - 1 - c, S - 1 - p);
        set(gradient.as(), dtype, index_in(s, n, c, p), of);
        sum += value_of(n, c, p) * of;
      }
      if (label >= 0 && label < kClasses) expected[static_cast<size_t>(label * C + c)] += std::fabs(sum);
    }
  }
  int64_t invalid = 0;
  const AttributionLayer layer{{x.as(), dtype, s.layout, N, C, S, rows.as(), out.as()}, gradient.as()};
  kernels.class_attributions(&layer, 1, {{sorted.data(), true, N, kClasses, sizes.data(), &invalid}, order.data()}, kThreads);
  for (int64_t i = 0; i < kClasses * C; ++i) {
    require(std::fabs(row_mean(out, dtype, i) - expected[static_cast<size_t>(i)]) < 1e-3, "class_attributions", s, dtype);
  }
  require(std::accumulate(sizes.begin(), sizes.end(), invalid) == N, "class sizes beside attributions", s, dtype);
}

void check(const CpuKernels* kernels, const Shape& s, Dtype dtype) {
  const std::vector<double> plain = values(s);
  Buffer x(s.samples * s.neurons * s.positions * width(dtype));
  for (int64_t n = 0; n < s.samples; ++n) {
    for (int64_t c = 0; c < s.neurons; ++c) {
      for (int64_t p = 0; p < s.positions; ++p) {
        set(x.as(), dtype, index_in(s, n, c, p), plain[static_cast<size_t>((n * s.neurons + c) * s.positions + p)]);
      }
    }
  }
  check_firing<int64_t>(kernels, s, dtype, x, plain);
  check_firing<int32_t>(kernels, s, dtype, x, plain);
  check_statistics<int64_t>(kernels, s, dtype, x, plain);
  check_statistics<int32_t>(kernels, s, dtype, x, plain);
  if (kernels == nullptr) return;  // the walk of the CUDA kernels: the firing counter alone
  check_losses(*kernels, s, dtype, x);
  check_attributions(*kernels, s, dtype, x, plain);
  for (bool of_batch : {true, false}) {
    for (bool with_residual : {true, false}) {
      check_norm(*kernels, s, dtype, x, plain, of_batch, with_residual, Activation::kRelu);
      const auto other = static_cast<Activation>(1 + (s.samples + s.neurons + 2 * of_batch + with_residual) % 4);
      check_norm(*kernels, s, dtype, x, plain, of_batch, with_residual, other);
    }
  }
  if (s.layout != Layout::kNoPositions) return check_pooling(*kernels, s, dtype, x, plain);
  if (width(dtype) >= 4) check_class_sums(*kernels, s, dtype, x);
}

}  // namespace

int main() {
  const Layout first = Layout::kPositionsLast, last = Layout::kNeuronsLast, none = Layout::kNoPositions;
  // Positions and neurons around a vector, a block of 64 positions, a tile of 128 and of 512 neurons.
  const std::vector<Shape> shapes{{1, 1, 1, none}, {5, 130, 1, none},  {3, 1030, 1, none}, {2, 3, 1, first},
                                  {3, 5, 4, first}, {2, 17, 49, first}, {3, 2, 1001, first}, {2, 3, 4, last},
                                  {3, 21, 9, last}, {2, 64, 67, last},  {2, 530, 5, last},   {40, 6, 16, first},
                                  {3, 70, 3, first}, {3, 70, 9, first}, {2, 35, 2, first}, {90, 20, 4, first}};
  const CpuKernels* const all[] = {nullptr, &MODA_ISA::kKernels};
  for (const CpuKernels* kernels : all) {
    for (const Shape& shape : shapes) {
      for (Dtype dtype : {Dtype::kFloat32, Dtype::kFloat64, Dtype::kFloat16, Dtype::kBfloat16}) check(kernels, shape, dtype);
    }
  }
  std::printf("checked %zu shapes\n", shapes.size());
}
