// Compiled once for each instruction set, with MODA_ISA as its name.
#include "cpu/kernels.h"
#include "cpu/attribution.h"
#include "cpu/firing.h"
#include "cpu/losses.h"
#include "cpu/pool.h"
#include "cpu/relu_pool.h"
#include "cpu/statistics.h"

namespace moda {
namespace MODA_ISA {

// norm_relu_pool.cpp
void norm_relu_pool_forward(const NormForward& norm, int threads);
void norm_relu_pool_backward(const NormBackward& norm, int threads);

extern const CpuKernels kKernels;
const CpuKernels kKernels{pool_forward,    pool_backward, relu_pool_forward, relu_pool_backward, losses_forward,
                          losses_backward, class_sums,    count_firings,     class_statistics,   class_attributions,
                          norm_relu_pool_forward, norm_relu_pool_backward};

}  // namespace MODA_ISA
}  // namespace moda
