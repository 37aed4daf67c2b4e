#include "cpu/parallel.h"

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

namespace moda {
namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

std::atomic<GompParallel> gomp_parallel{nullptr};

struct Work {
  std::atomic<std::int64_t> next{0};
  std::int64_t tasks;
  void (*body)(void*, std::int64_t);
  void* context;
};

void take_tasks(void* pointer) {
  Work& work = *static_cast<Work*>(pointer);
  for (std::int64_t task; (task = work.next.fetch_add(1, std::memory_order_relaxed)) < work.tasks;) {
    work.body(work.context, task);
  }
}

}  // namespace

bool use_openmp_of(const char* library) {
  // RTLD_NOLOAD: only a handle to what is loaded already; its symbols are looked up in it and what it links.
  void* handle = dlopen(library, RTLD_LAZY | RTLD_NOLOAD);
  if (handle == nullptr) return false;
  gomp_parallel = reinterpret_cast<GompParallel>(dlsym(handle, "GOMP_parallel"));
  dlclose(handle);
  return gomp_parallel != nullptr;
}

const char* threading() { return gomp_parallel != nullptr ? "torch's OpenMP pool" : "std::thread"; }

void parallel(std::int64_t tasks, int threads, void (*body)(void*, std::int64_t), void* context) {
  Work work;
  work.tasks = tasks;
  work.body = body;
  work.context = context;
  const int workers = static_cast<int>(std::min<std::int64_t>(tasks, threads));
  if (workers <= 1) {
    take_tasks(&work);
  } else if (GompParallel run = gomp_parallel) {
    run(take_tasks, &work, static_cast<unsigned>(workers), 0);
  } else {
    std::vector<std::thread> others;
    for (int i = 1; i < workers; ++i) others.emplace_back(take_tasks, &work);
    take_tasks(&work);
    for (std::thread& other : others) other.join();
  }
}

}  // namespace moda
