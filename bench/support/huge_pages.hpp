// Memory on pages of 2 MB, where the system gives them: with pages of 4 KB the same program ran between 41 and 76 % of
// the roof from one run to the next (Intel AMX), depending on where its pages lay.
#pragma once

#include <cstddef>
#include <fstream>
#include <memory>
#include <new>
#include <string>

#if __has_include(<sys/mman.h>)
#include <sys/mman.h>
#endif

namespace bench {

struct FreeAligned {
  std::align_val_t alignment{64};
  void operator()(std::byte* memory) const { ::operator delete(memory, alignment); }
};
using PagedMemory = std::unique_ptr<std::byte, FreeAligned>;

/// `bytes` bytes, on huge pages where they fill one and the system allows it.
inline PagedMemory huge_memory(std::size_t bytes) {
  constexpr std::size_t page = std::size_t{2} << 20;
  const std::align_val_t alignment{bytes >= page ? page : 64};
  PagedMemory memory(static_cast<std::byte*>(::operator new(bytes, alignment)), FreeAligned{alignment});
#if defined(MADV_HUGEPAGE)
  if (bytes >= page) ::madvise(memory.get(), bytes / page * page, MADV_HUGEPAGE);
#endif
  return memory;
}

/// What the system says of huge pages, for the report.
inline std::string huge_pages_text() {
#if defined(MADV_HUGEPAGE)
  std::ifstream file("/sys/kernel/mm/transparent_hugepage/enabled");
  std::string setting;
  if (std::getline(file, setting) && setting.find("[never]") == std::string::npos)
    return "tensors of 2 MB and more are on huge pages";
#endif
  return "the system has no huge pages for tensors";
}

}  // namespace bench
