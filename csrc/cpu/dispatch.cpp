#include "cpu/kernels.h"

#include <cstring>

namespace moda {
namespace portable {
extern const CpuKernels kKernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const CpuKernels kKernels;
}
namespace avx512 {
extern const CpuKernels kKernels;
}
#endif

namespace {

struct Choice {
  const char* isa;
  const CpuKernels* kernels;
  bool runs;
};

// Widest first.
const Choice* choices() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  static const Choice all[] = {
      {"avx512", &avx512::kKernels,
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma")},
      // Every processor with AVX2 and FMA has F16C.
      {"avx2", &avx2::kKernels, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
      {"portable", &portable::kKernels, true},
  };
#else
  static const Choice all[] = {{"portable", &portable::kKernels, true}};
#endif
  return all;
}

}  // namespace

const char* best_isa() {
  const Choice* choice = choices();
  while (!choice->runs) ++choice;
  return choice->isa;
}

const CpuKernels* cpu_kernels(const char* isa) {
  for (const Choice* choice = choices();; ++choice) {
    if (std::strcmp(choice->isa, isa) == 0) return choice->runs ? choice->kernels : nullptr;
    if (std::strcmp(choice->isa, "portable") == 0) return nullptr;
  }
}

}  // namespace moda
