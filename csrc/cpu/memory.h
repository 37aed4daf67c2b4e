// The memory that the kernels ask for. The functions are out of line, so that no instruction set's translation unit holds library code.
#pragma once

#include <cstdint>

namespace moda {

// A block of uninitialised bytes, aligned to a cache line; throws std::bad_alloc.
class Scratch {
 public:
  explicit Scratch(std::int64_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* data() const;

 private:
  void* data_;
};

// This thread's own block of at least `bytes`, valid until its next call.
void* thread_scratch(std::int64_t bytes);

// Tensors of at least this many bytes fit in no cache, and come from the operating system page by page.
constexpr std::int64_t kLargeBytes = 16 << 20;

// Asks for huge pages under memory that is about to be written for the first time. A fresh tensor's page faults cost more than
// computing it: 98 MB of ReLU took 165 ms with pages of 4 KiB, of which 20 ms were the ReLU's (2 cores of an AMD EPYC Milan).
// Does nothing for less than kLargeBytes, and where the system has no such pages.
void prefer_huge_pages(void* begin, std::int64_t bytes);

}  // namespace moda
