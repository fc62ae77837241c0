// Counts the allocations of a program by operator new, and can make them fail. It replaces the global operators, so
// only one file of a program may include it.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdlib>
#include <limits>
#include <new>

namespace test {

inline std::atomic<long> allocations{0};
inline std::atomic<std::size_t> allocated_bytes{0};
/// Allocations from this number on fail.
inline std::atomic<long> first_to_fail{std::numeric_limits<long>::max()};

inline void* allocate(std::size_t bytes, std::size_t alignment) {
  if (allocations++ >= first_to_fail) throw std::bad_alloc();
  allocated_bytes += bytes;
  const std::size_t whole = (bytes + alignment - 1) / alignment * alignment;
  void* memory = std::aligned_alloc(alignment, whole == 0 ? alignment : whole);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

// Not inlined: g++ warns about a mismatch if it sees std::free in an expression with `new`.
[[gnu::noinline]] inline void release(void* memory) noexcept { std::free(memory); }

/// How many times `work` called any form of operator new, on all threads together.
template <class Work>
long allocations_of(const Work& work) {
  const long before = allocations;
  work();
  return allocations - before;
}

/// The bytes that `work` allocated, whether it released them or not.
template <class Work>
std::size_t bytes_allocated_by(const Work& work) {
  const std::size_t before = allocated_bytes;
  work();
  return allocated_bytes - before;
}

/// Runs `work` with memory for only `count` allocations. Returns true if it threw bad_alloc.
template <class Work>
bool runs_out_of_memory(long count, const Work& work) {
  first_to_fail = allocations + count;
  struct Restore {
    ~Restore() { first_to_fail = std::numeric_limits<long>::max(); }
  } restore;
  try {
    work();
  } catch (const std::bad_alloc&) {
    return true;
  }
  return false;
}

}  // namespace test

// All forms are replaced, because a sanitizer would provide its own for the others.
void* operator new(std::size_t bytes) { return test::allocate(bytes, alignof(std::max_align_t)); }
void* operator new[](std::size_t bytes) { return operator new(bytes); }
void* operator new(std::size_t bytes, std::align_val_t alignment) {
  return test::allocate(bytes, static_cast<std::size_t>(alignment));
}
void* operator new[](std::size_t bytes, std::align_val_t alignment) { return operator new(bytes, alignment); }
void* operator new(std::size_t bytes, const std::nothrow_t&) noexcept {
  ++test::allocations;
  return std::malloc(bytes == 0 ? 1 : bytes);
}
void* operator new[](std::size_t bytes, const std::nothrow_t& nothrow) noexcept {
  return operator new(bytes, nothrow);
}
void operator delete(void* memory) noexcept { test::release(memory); }
void operator delete[](void* memory) noexcept { test::release(memory); }
void operator delete(void* memory, std::size_t) noexcept { test::release(memory); }
void operator delete[](void* memory, std::size_t) noexcept { test::release(memory); }
void operator delete(void* memory, const std::nothrow_t&) noexcept { test::release(memory); }
void operator delete[](void* memory, const std::nothrow_t&) noexcept { test::release(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { test::release(memory); }
void operator delete[](void* memory, std::align_val_t) noexcept { test::release(memory); }
void operator delete(void* memory, std::size_t, std::align_val_t) noexcept { test::release(memory); }
void operator delete[](void* memory, std::size_t, std::align_val_t) noexcept { test::release(memory); }
