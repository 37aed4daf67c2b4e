// Runs a function on several threads, on PyTorch's own pool where there is one.
#pragma once

#include <cstdint>
#include <type_traits>

namespace moda {

// Looks for the OpenMP runtime that the given library (PyTorch's libtorch_cpu) has loaded; true if it was found.
//
// Why not link OpenMP, or keep threads of our own: the workers of an OpenMP runtime spin for a while after each parallel
// region, waiting for the next. A second pool would compete with PyTorch's spinning workers for the same cores, layer by layer.
// Borrowing PyTorch's pool costs one symbol look-up, and binds the extension to no particular runtime.
bool use_openmp_of(const char* library);

// What `parallel` runs on: "torch's OpenMP pool" or "std::thread".
const char* threading();

// Calls body(context, task) once for each task in [0, tasks), on up to `threads` threads, in no particular order.
// `body` must not throw.
void parallel(std::int64_t tasks, int threads, void (*body)(void*, std::int64_t), void* context);

// The same for any callable `body`.
template <class Body>
void parallel_for(std::int64_t tasks, int threads, Body&& body) {
  using Function = std::remove_reference_t<Body>;
  parallel(tasks, threads, [](void* context, std::int64_t task) { (*static_cast<Function*>(context))(task); },
           const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace moda
