#include <pybind11/pybind11.h>

#include "build_info.h"
#include "parallel.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["version"] = MODA_VERSION;
  info["source_digest"] = MODA_SOURCE_DIGEST;
  info["compiler"] = MODA_CXX_COMPILER;
#if MODA_CUDA
  info["cuda"] = true;
  info["nvcc"] = MODA_NVCC_VERSION;
  info["cuda_architectures"] = MODA_CUDA_ARCHITECTURES;
#else
  info["cuda"] = false;
  info["nvcc"] = py::none();
  info["cuda_architectures"] = "";
#endif
  info["threading"] = moda::threading();
  return info;
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() = "Compiled kernels of moda_kernels; called through moda_kernels.native only.";
  module.def("build_info", build_info);
  module.def("use_openmp_of", &moda::use_openmp_of, py::arg("library"));
}
