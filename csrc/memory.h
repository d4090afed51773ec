// Working memory of a call. A thread keeps what it last used, for new pages cost more than small kernels do.
#pragma once

#include <cstdint>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "check.h"

namespace mtml {

// Blocks that begin at a cache line.
class BlockPool {
 public:
  static BlockPool& of_this_thread() {
    thread_local BlockPool pool;
    return pool;
  }

  struct Block {
    void* data = nullptr;
    int64_t bytes = 0;
  };

  Block take(int64_t bytes) {
    if (bytes == 0) return {};
    size_t best = blocks_.size();
    for (size_t i = 0; i < blocks_.size(); ++i) {
      const bool fits = blocks_[i].bytes >= bytes && blocks_[i].bytes <= 2 * bytes + kSmall;
      if (fits && (best == blocks_.size() || blocks_[i].bytes < blocks_[best].bytes)) best = i;
    }
    if (best == blocks_.size()) {
      void* data = ::operator new(bytes, kAlign, std::nothrow);
      if (!data) throw NoMemory(std::to_string(bytes) + " bytes");
      return {data, bytes};
    }
    const Block block = blocks_[best];
    blocks_.erase(blocks_.begin() + static_cast<int64_t>(best));
    held_ -= block.bytes;
    return block;
  }

  void give(Block block) {
    if (!block.data) return;
    blocks_.push_back(block);
    held_ += block.bytes;
    // the oldest go first
    while (held_ > kHeld || blocks_.size() > kBlocks) {
      held_ -= blocks_.front().bytes;
      ::operator delete(blocks_.front().data, kAlign);
      blocks_.erase(blocks_.begin());
    }
  }

  ~BlockPool() {
    for (const Block& block : blocks_) ::operator delete(block.data, kAlign);
  }

 private:
  static constexpr std::align_val_t kAlign{64};
  static constexpr int64_t kSmall = 1 << 16, kHeld = int64_t{64} << 20;
#ifdef __SANITIZE_ADDRESS__
  // none is kept: what lies behind a block that is used again, and longer than asked for, hides a step outside
  static constexpr size_t kBlocks = 0;
#else
  static constexpr size_t kBlocks = 16;
#endif
  std::vector<Block> blocks_;
  int64_t held_ = 0;
};

// Uninitialised elements, for the length of a scope and of the thread that opened it.
template <class T>
class Memory {
 public:
  explicit Memory(int64_t elements)
      : block_(BlockPool::of_this_thread().take(elements * static_cast<int64_t>(sizeof(T)))) {}
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() { BlockPool::of_this_thread().give(block_); }
  operator T*() const { return static_cast<T*>(block_.data); }

 private:
  BlockPool::Block block_;
};

}  // namespace mtml
