// Lets one allocation by operator new fail. Replaces the global operators, so one file of a program includes it,
// once, and not count_allocations.hpp as well.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdlib>
#include <new>

namespace test {

inline std::atomic<long> allocations_left{-1};  // before the one that fails; below 0: none does

inline void* allocate(std::size_t bytes, std::size_t alignment) {
  if (allocations_left >= 0 && allocations_left-- == 0) throw std::bad_alloc();
  const std::size_t whole = (std::max<std::size_t>(bytes, 1) + alignment - 1) / alignment * alignment;
  void* memory = std::aligned_alloc(alignment, whole);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

/// Out of line: g++ warns of a mismatch if it sees std::free in an expression with `new`.
[[gnu::noinline]] inline void release(void* memory) noexcept { std::free(memory); }

/// work(), whose allocation number n fails. Did that reach the caller?
template <class Work>
bool runs_out_of_memory(long n, const Work& work) {
  allocations_left = n;
  bool failed = false;
  try {
    work();
  } catch (const std::bad_alloc&) {
    failed = true;
  }
  allocations_left = -1;
  return failed;
}

}  // namespace test

void* operator new(std::size_t bytes) { return test::allocate(bytes, alignof(std::max_align_t)); }
void* operator new[](std::size_t bytes) { return operator new(bytes); }
void* operator new(std::size_t bytes, std::align_val_t alignment) {
  return test::allocate(bytes, static_cast<std::size_t>(alignment));
}
void* operator new[](std::size_t bytes, std::align_val_t alignment) { return operator new(bytes, alignment); }
void operator delete(void* memory) noexcept { test::release(memory); }
void operator delete[](void* memory) noexcept { test::release(memory); }
void operator delete(void* memory, std::size_t) noexcept { test::release(memory); }
void operator delete[](void* memory, std::size_t) noexcept { test::release(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { test::release(memory); }
void operator delete[](void* memory, std::align_val_t) noexcept { test::release(memory); }
void operator delete(void* memory, std::size_t, std::align_val_t) noexcept { test::release(memory); }
void operator delete[](void* memory, std::size_t, std::align_val_t) noexcept { test::release(memory); }
