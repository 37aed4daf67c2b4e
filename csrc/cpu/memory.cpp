#include "cpu/memory.h"

#include <sys/mman.h>

#include <memory>
#include <new>

namespace moda {
namespace {

constexpr std::align_val_t kAlignment{64};
constexpr std::uintptr_t kHugePage = 2 << 20;

}  // namespace

Scratch::Scratch(std::int64_t bytes) : data_(::operator new(static_cast<std::size_t>(bytes), kAlignment)) {}

Scratch::~Scratch() { ::operator delete(data_, kAlignment); }

void* Scratch::data() const { return data_; }

void* thread_scratch(std::int64_t bytes) {
  thread_local std::unique_ptr<Scratch> block;
  thread_local std::int64_t size = 0;
  if (size < bytes) {
    block = std::make_unique<Scratch>(bytes);
    size = bytes;
  }
  return block->data();
}

void prefer_huge_pages(void* begin, std::int64_t bytes) {
#ifdef MADV_HUGEPAGE
  if (bytes < kLargeBytes) return;
  // Whole huge pages inside of the tensor only: not a byte more than it has is allocated.
  const std::uintptr_t first = (reinterpret_cast<std::uintptr_t>(begin) + kHugePage - 1) / kHugePage * kHugePage;
  const std::uintptr_t last = (reinterpret_cast<std::uintptr_t>(begin) + static_cast<std::uintptr_t>(bytes)) / kHugePage * kHugePage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // a wish: failure is no error
#else
  (void)begin;
  (void)bytes;
#endif
}

}  // namespace moda
