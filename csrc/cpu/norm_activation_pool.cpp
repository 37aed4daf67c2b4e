// As norm_relu_pool.cpp, for the activations that are no ReLU.
#include "cpu/norm_relu_pool.h"

namespace moda {
namespace MODA_ISA {

void norm_activation_pool_forward(const NormForward& norm, int threads) { norm_pool_forward(norm, Other{norm.activation}, threads); }

void norm_activation_pool_backward(const NormBackward& norm, int threads) { norm_pool_backward(norm, Other{norm.activation}, threads); }

}  // namespace MODA_ISA
}  // namespace moda
