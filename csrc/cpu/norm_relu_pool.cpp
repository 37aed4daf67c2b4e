#include "cpu/norm_relu_pool.h"

#include "cpu/kernels.h"

namespace moda {
namespace MODA_ISA {

// norm_activation_pool.cpp
void norm_activation_pool_forward(const NormForward& norm, int threads);
void norm_activation_pool_backward(const NormBackward& norm, int threads);

void norm_relu_pool_forward(const NormForward& norm, int threads) {
  if (norm.activation != Activation::kRelu) return norm_activation_pool_forward(norm, threads);
  norm_pool_forward(norm, Relu{}, threads);
}

void norm_relu_pool_backward(const NormBackward& norm, int threads) {
  if (norm.activation != Activation::kRelu) return norm_activation_pool_backward(norm, threads);
  norm_pool_backward(norm, Relu{}, threads);
}

}  // namespace MODA_ISA
}  // namespace moda
