// The module moda_kernels._native. It takes addresses and sizes as integers and checks nothing about them: moda_kernels/native.py
// is its only caller. A list of layers comes as one flat list of integers, in the order of the fields of the structs in types.h.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "build_info.h"
#include "cpu/kernels.h"
#include "cuda/firing.h"
#include "cpu/parallel.h"
#include "cuda/statistics.h"

namespace py = pybind11;

namespace {

using moda::Activation;
using moda::AttributionLayer;
using moda::CpuKernels;
using moda::Dtype;
using moda::FiringBatch;
using moda::FiringLayer;
using moda::Layer;
using moda::Layout;
using moda::NormBackward;
using moda::NormForward;
using moda::SegmentsView;
using moda::StatisticsBatch;
using moda::StatisticsLayer;
using moda::Terms;
using Integers = std::vector<std::int64_t>;

constexpr std::size_t kLayerFields = 8;
constexpr std::size_t kFiringLayerFields = 7;
constexpr std::size_t kStatisticsLayerFields = kLayerFields + 2;
constexpr std::size_t kAttributionLayerFields = kLayerFields + 1;
constexpr std::size_t kFiringBatchFields = 6;

const char* chosen_isa = nullptr;
const CpuKernels* kernels = nullptr;

void use_isa(const std::string& isa) {
  for (const char* known : {"portable", "avx2", "avx512"}) {
    if (isa != known) continue;
    const CpuKernels* found = moda::cpu_kernels(known);
    if (found == nullptr) throw std::invalid_argument("this processor does not run " + isa);
    chosen_isa = known;
    kernels = found;
    return;
  }
  throw std::invalid_argument("expected portable, avx2 or avx512, got " + isa);
}

template <class T>
T* address(std::int64_t integer) {
  return reinterpret_cast<T*>(static_cast<std::uintptr_t>(integer));
}

void check_fields(const Integers& fields, std::size_t per_layer) {
  if (fields.size() % per_layer != 0) throw std::invalid_argument("layers: fields are missing");
}

// Reads the eight fields of a Layer from `f` on.
Layer layer_of(Integers::const_iterator f) {
  return {address<const void>(f[0]), static_cast<Dtype>(f[1]), static_cast<Layout>(f[2]), f[3], f[4], f[5],
          address<void>(f[6]), address<void>(f[7])};
}

std::vector<Layer> layers_of(const Integers& fields) {
  check_fields(fields, kLayerFields);
  std::vector<Layer> layers;
  layers.reserve(fields.size() / kLayerFields);
  for (auto f = fields.begin(); f != fields.end(); f += kLayerFields) layers.push_back(layer_of(f));
  return layers;
}

std::vector<FiringLayer> firing_layers_of(const Integers& fields) {
  check_fields(fields, kFiringLayerFields);
  std::vector<FiringLayer> layers;
  layers.reserve(fields.size() / kFiringLayerFields);
  for (auto f = fields.begin(); f != fields.end(); f += kFiringLayerFields) {
    layers.push_back({address<const void>(f[0]), static_cast<Dtype>(f[1]), static_cast<Layout>(f[2]), f[3], f[4],
                      static_cast<std::uint64_t>(f[5]), address<std::int64_t>(f[6])});
  }
  return layers;
}

// The fields are labels, whether they are int64, samples, classes, class_sizes, invalid.
FiringBatch firing_batch_of(const Integers& f) {
  if (f.size() != kFiringBatchFields) throw std::invalid_argument("batch: fields are missing");
  return {address<const void>(f[0]), f[1] != 0, f[2], f[3], address<std::int64_t>(f[4]), address<std::int64_t>(f[5])};
}

// Fields: those of a Layer, threshold, counts.
std::vector<StatisticsLayer> statistics_layers_of(const Integers& fields) {
  check_fields(fields, kStatisticsLayerFields);
  std::vector<StatisticsLayer> layers;
  layers.reserve(fields.size() / kStatisticsLayerFields);
  for (auto f = fields.begin(); f != fields.end(); f += kStatisticsLayerFields) {
    const auto rest = f + kLayerFields;
    layers.push_back({layer_of(f), static_cast<std::uint64_t>(rest[0]), address<std::int64_t>(rest[1])});
  }
  return layers;
}

// Fields: those of a Layer, gradient.
std::vector<AttributionLayer> attribution_layers_of(const Integers& fields) {
  check_fields(fields, kAttributionLayerFields);
  std::vector<AttributionLayer> layers;
  layers.reserve(fields.size() / kAttributionLayerFields);
  for (auto f = fields.begin(); f != fields.end(); f += kAttributionLayerFields) {
    layers.push_back({layer_of(f), address<const void>(f[kLayerFields])});
  }
  return layers;
}

// Fields: those of a FiringBatch, with sorted labels; order.
StatisticsBatch statistics_batch_of(Integers f) {
  if (f.size() != kFiringBatchFields + 1) throw std::invalid_argument("batch: fields are missing");
  const auto* order = address<const std::int64_t>(f.back());
  f.pop_back();
  return {firing_batch_of(f), order};
}

// Fields: order, offsets, segment, same_pairs, diff_pairs, room.
SegmentsView segments_of(const Integers& f) {
  if (f.size() != 6) throw std::invalid_argument("segments: fields are missing");
  return {address<const std::int64_t>(f[0]), address<const std::int64_t>(f[1]), address<const std::int64_t>(f[2]), f[3], f[4], f[5]};
}

// Fields: those of a Layer, residual, weight, bias, running_mean, running_var, saved, of_batch, activation.
NormForward norm_forward_of(const Integers& f, double momentum, double eps) {
  if (f.size() != kLayerFields + 8) throw std::invalid_argument("norm: fields are missing");
  const auto rest = f.begin() + kLayerFields;
  return {layer_of(f.begin()),    address<const void>(rest[0]), address<const void>(rest[1]), address<const void>(rest[2]),
          address<void>(rest[3]), address<void>(rest[4]),       address<void>(rest[5]),       momentum,
          eps,                    rest[6] != 0,                 static_cast<Activation>(rest[7])};
}

// Fields: those of a Layer, dy, kept, dresidual, saved, parameters, of_batch, activation.
NormBackward norm_backward_of(const Integers& f) {
  if (f.size() != kLayerFields + 7) throw std::invalid_argument("norm: fields are missing");
  const auto rest = f.begin() + kLayerFields;
  return {layer_of(f.begin()),          address<const void>(rest[0]), address<const void>(rest[1]), address<void>(rest[2]),
          address<const void>(rest[3]), address<void>(rest[4]),       rest[5] != 0,
          static_cast<Activation>(rest[6])};
}

py::dict build_info() {
  py::dict info;
  info["version"] = MODA_VERSION;
  info["source_digest"] = MODA_SOURCE_DIGEST;
  info["compiler"] = MODA_CXX_COMPILER;
  info["cuda"] = static_cast<bool>(MODA_CUDA);
  info["nvcc"] = MODA_NVCC_VERSION;
  info["cuda_architectures"] = MODA_CUDA_ARCHITECTURES;
  info["cpu_isa"] = chosen_isa;
  py::list isas;
  for (const char* isa : {"portable", "avx2", "avx512"}) {
    if (moda::cpu_kernels(isa) != nullptr) isas.append(isa);
  }
  info["cpu_isas"] = isas;
  info["threading"] = moda::threading();
  return info;
}

void pool_forward(const Integers& fields, int threads) {
  const auto layers = layers_of(fields);
  py::gil_scoped_release release;
  kernels->pool_forward(layers.data(), static_cast<std::int64_t>(layers.size()), threads);
}

void pool_backward(const Integers& fields, int threads) {
  const auto layers = layers_of(fields);
  py::gil_scoped_release release;
  kernels->pool_backward(layers.data(), static_cast<std::int64_t>(layers.size()), threads);
}

void relu_pool_forward(const Integers& fields, int threads) {
  const auto layers = layers_of(fields);
  py::gil_scoped_release release;
  kernels->relu_pool_forward(layers.at(0), threads);
}

void relu_pool_backward(const Integers& fields, std::int64_t upstream, int threads) {
  const auto layers = layers_of(fields);
  py::gil_scoped_release release;
  kernels->relu_pool_backward(layers.at(0), address<const void>(upstream), threads);
}

void norm_relu_pool_forward(const Integers& fields, double momentum, double eps, int threads) {
  const NormForward norm = norm_forward_of(fields, momentum, eps);
  py::gil_scoped_release release;
  kernels->norm_relu_pool_forward(norm, threads);
}

void norm_relu_pool_backward(const Integers& fields, int threads) {
  const NormBackward norm = norm_backward_of(fields);
  py::gil_scoped_release release;
  kernels->norm_relu_pool_backward(norm, threads);
}

py::tuple losses_forward(const Integers& fields, const Integers& segment_fields, std::int64_t workspace, int threads) {
  const auto layers = layers_of(fields);
  const SegmentsView segments = segments_of(segment_fields);
  Terms terms{};
  {
    py::gil_scoped_release release;
    terms = kernels->losses_forward(layers.data(), static_cast<std::int64_t>(layers.size()), segments,
                                    address<void>(workspace), threads);
  }
  return py::make_tuple(terms.affinity, terms.dispersion, terms.compactness);
}

void losses_backward(const Integers& fields, const Integers& segment_fields, const std::vector<double>& upstream,
                     std::int64_t workspace, int threads) {
  const auto layers = layers_of(fields);
  const SegmentsView segments = segments_of(segment_fields);
  const Terms gradients{upstream.at(0), upstream.at(1), upstream.at(2)};
  py::gil_scoped_release release;
  kernels->losses_backward(layers.data(), static_cast<std::int64_t>(layers.size()), segments, gradients,
                           address<void>(workspace), threads);
}

void class_sums(const Integers& fields, std::int64_t labels, std::int64_t classes, int threads) {
  const auto layers = layers_of(fields);
  py::gil_scoped_release release;
  kernels->class_sums(layers.data(), static_cast<std::int64_t>(layers.size()), address<const std::int64_t>(labels), classes,
                      threads);
}

void count_firings(const Integers& fields, const Integers& batch_fields, int threads) {
  const auto layers = firing_layers_of(fields);
  const FiringBatch batch = firing_batch_of(batch_fields);
  py::gil_scoped_release release;
  kernels->count_firings(layers.data(), static_cast<std::int64_t>(layers.size()), batch, threads);
}

void class_statistics(const Integers& fields, const Integers& batch_fields, int threads) {
  const auto layers = statistics_layers_of(fields);
  const StatisticsBatch batch = statistics_batch_of(batch_fields);
  py::gil_scoped_release release;
  kernels->class_statistics(layers.data(), static_cast<std::int64_t>(layers.size()), batch, threads);
}

void class_attributions(const Integers& fields, const Integers& batch_fields, int threads) {
  const auto layers = attribution_layers_of(fields);
  const StatisticsBatch batch = statistics_batch_of(batch_fields);
  py::gil_scoped_release release;
  kernels->class_attributions(layers.data(), static_cast<std::int64_t>(layers.size()), batch, threads);
}

#if MODA_CUDA
void check_cuda(const moda::CudaError& error) {
  if (error.name != nullptr) throw std::runtime_error(std::string(error.name) + ": " + error.meaning);
}

void count_firings_cuda(const Integers& fields, const Integers& batch_fields, int device, std::int64_t stream) {
  const auto layers = firing_layers_of(fields);
  const FiringBatch batch = firing_batch_of(batch_fields);
  check_cuda(moda::count_firings_cuda(layers.data(), static_cast<std::int64_t>(layers.size()), batch, device,
                                      address<void>(stream)));
}

void class_statistics_cuda(const Integers& fields, const Integers& batch_fields, int device, std::int64_t stream) {
  const auto layers = statistics_layers_of(fields);
  const StatisticsBatch batch = statistics_batch_of(batch_fields);
  check_cuda(moda::class_statistics_cuda(layers.data(), static_cast<std::int64_t>(layers.size()), batch, device,
                                         address<void>(stream)));
}
#endif

void count_firings_emulated(const Integers& fields, const Integers& batch_fields) {
  const auto layers = firing_layers_of(fields);
  moda::count_firings_emulated(layers.data(), static_cast<std::int64_t>(layers.size()), firing_batch_of(batch_fields));
}

void class_statistics_emulated(const Integers& fields, const Integers& batch_fields) {
  const auto layers = statistics_layers_of(fields);
  moda::class_statistics_emulated(layers.data(), static_cast<std::int64_t>(layers.size()), statistics_batch_of(batch_fields));
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() = "Compiled kernels of moda_kernels; called through moda_kernels.native only.";
  use_isa(moda::best_isa());
  module.def("build_info", build_info);
  module.def("use_isa", use_isa);
  module.def("use_openmp_of", &moda::use_openmp_of);
  // For csrc/torch/autograd.cpp, if that was built from the same sources.
  module.def("kernels", [] { return py::capsule(&kernels, MODA_SOURCE_DIGEST); });
  module.def("pool_forward", pool_forward);
  module.def("pool_backward", pool_backward);
  module.def("relu_pool_forward", relu_pool_forward);
  module.def("relu_pool_backward", relu_pool_backward);
  module.def("norm_relu_pool_forward", norm_relu_pool_forward);
  module.def("norm_relu_pool_backward", norm_relu_pool_backward);
  module.def("losses_forward", losses_forward);
  module.def("losses_backward", losses_backward);
  module.def("class_sums", class_sums);
  module.def("count_firings", count_firings);
  module.def("class_statistics", class_statistics);
  module.def("class_attributions", class_attributions);
#if MODA_CUDA
  module.def("count_firings_cuda", count_firings_cuda);
  module.def("class_statistics_cuda", class_statistics_cuda);
#endif
  // The tests call these: they run on the host what the CUDA kernels do.
  module.def("count_firings_emulated", count_firings_emulated);
  module.def("class_statistics_emulated", class_statistics_emulated);
}
