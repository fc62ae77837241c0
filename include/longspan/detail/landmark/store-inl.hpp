// The file of a landmark cache's blocks, and the payload of its state.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "longspan/detail/landmark/block_counts.hpp"
#include "longspan/detail/landmark/store.hpp"
#include "longspan/detail/storage/block_file.hpp"
#include "longspan/detail/storage/state_file.hpp"
#include "longspan/error.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"

LONGSPAN_NAMESPACE_BEGIN
namespace detail {

/// Writes the blocks that become final to the file. A block in the file consists of its pages, one for each batch row,
/// and its landmarks. Only when all of these blocks are written does the file count them, and do they replace the pages
/// in memory.
template <StoredElement T>
void LandmarkStore<T>::write_blocks(const BlockCounts& next) {
  BlockFile& file = *writer_.file;
  file.reserve(next.settled - filed_);
  written_.resize(at(file_bytes()));
  std::vector<std::vector<Page>> pages;
  const auto copy = [&](Index to, const void* from, Index bytes) {
    if (bytes > 0) std::memcpy(written_.data() + to, from, at(bytes));
    return to + bytes;
  };
  for (Index number = filed_; number < next.settled; ++number) {
    for (Index b = 0; b < batch_; ++b) {
      copy(b * file_page_bytes(), pages_[at(b)][at(number - gone_)].get(),
           page_size() * static_cast<Index>(sizeof(T)));
    }
    Index to = batch_ * file_page_bytes();
    for (const auto& list : landmarks_) {
      to = copy(to, list.data() + (number - gone_) * head_dim_, head_dim_ * static_cast<Index>(sizeof(Open)));
    }
    file.write(number - filed_, written_.data());
    pages.push_back(pages_of_file(number));
  }
  file.count(next.settled - filed_, next.gone());
  for (const std::vector<Page>& of_block : pages) {
    for (Index b = 0; b < batch_; ++b) pages_[at(b)][at(filed_ - gone_)] = of_block[at(b)];
    ++filed_;
  }
}

/// The pages of one block in the file, one for each batch row.
template <StoredElement T>
std::vector<typename LandmarkStore<T>::Page> LandmarkStore<T>::pages_of_file(Index number) const {
  const std::shared_ptr<BlockFile> file = writer_.file;
  const std::shared_ptr<const std::byte> block(file->block(number),
                                               [file, number](const std::byte*) { file->give_back(number); });
  std::vector<Page> pages;
  for (Index b = 0; b < batch_; ++b)
    pages.push_back(Page(block, reinterpret_cast<const T*>(block.get() + b * file_page_bytes())));
  return pages;
}

template <StoredElement T>
void LandmarkStore<T>::open(const std::string& path, const BlockFileKind& kind, Index resident) {
  writer_.file = std::make_shared<BlockFile>(path, kind, [&](Index, const std::byte* block) {
    const auto* landmark = block + batch_ * file_page_bytes();
    for (auto& list : landmarks_) {
      list.resize(list.size() + at(head_dim_));
      const auto bytes = at(head_dim_) * sizeof(Open);
      if (bytes > 0) std::memcpy(list.data() + list.size() - at(head_dim_), landmark, bytes);
      landmark += bytes;
    }
  });
  of_file_ = writer_.file;
  resident_ = resident;
  counts_.opened = counts_.settled = filed_ = of_file_->blocks();
  counts_.let_go = gone_ = of_file_->dropped();
  counts_.truncate(counts_.opened * counts_.block);
  for (Index n = gone_; n < filed_; ++n) {
    const std::vector<Page> pages = pages_of_file(n);
    for (Index b = 0; b < batch_; ++b) pages_[at(b)].push_back(pages[at(b)]);
  }
  settle();  // the capacity may have become smaller
}

/// The payload has a mark of one byte for each block, so that a file cannot claim more blocks than it has bytes, and
/// then the rows.
template <StoredElement T>
Index LandmarkStore<T>::payload_bytes(std::string_view function) const {
  constexpr Index most = PTRDIFF_MAX / 4;
  const Index of_block = 1 + array_bytes<T>(function, batch_ * page_size()) +
                         array_bytes<Open>(function, batch_ * kv_heads_ * head_dim_),
              blocks = counts_.sealed - gone_,
              of_row = array_bytes<Open>(function, batch_ * kv_heads_ * (head_dim_ + value_dim_)),
              rows = counts_.tokens - counts_.settled * counts_.block;
  if (blocks > most / of_block || (of_row > 0 && rows > most / of_row))
    refuse<FileError>(function, "the number of tokens", std::to_string(counts_.tokens), "fewer");
  return of_block * blocks + of_row * rows;
}

template <StoredElement T>
void LandmarkStore<T>::load(StateReader& reader, const BlockCounts& counts) {
  counts_ = counts;
  gone_ = counts.gone();
  reader.expect_payload(payload_bytes("landmark_cache::load"));
  const Index blocks = counts.sealed - gone_;
  for (const std::uint8_t mark : reader.template array<std::uint8_t>(blocks)) {
    if (mark != 1)
      refuse<FileError>("landmark_cache::load", "the byte that marks a kept block", std::to_string(mark),
                        "1");
  }
  for (auto& row : pages_) {
    for (Index n = 0; n < blocks; ++n) {
      const auto page = std::make_shared<std::vector<T>>(reader.template array<T>(page_size()));
      row.push_back(Page(page, page->data()));
    }
  }
  for (auto& list : landmarks_) list = reader.template array<Open>(blocks * head_dim_);
  unsealed_.load(reader, counts.tokens - counts.settled * counts.block);
}

}  // namespace detail
LONGSPAN_NAMESPACE_END
