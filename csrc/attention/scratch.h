// Scratch memory that a thread keeps between calls: a fresh block of this size would be handed back
// to the system at the end of each call and paid for in page faults at the next.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(from, bytes) ((void)0)
#define ASAN_UNPOISON_MEMORY_REGION(from, bytes) ((void)0)
#endif

namespace dvla_fast::attention {

// What lies untouchable behind each piece of scratch memory, under the address sanitizer.
#if defined(__SANITIZE_ADDRESS__)
constexpr int64_t kGuard = 64;
#else
constexpr int64_t kGuard = 0;
#endif

// Hands out aligned pieces of one block; without a block, only adds up what is asked for.
class Arena {
 public:
  Arena() = default;
  explicit Arena(int64_t bytes) {
    thread_local Block block;
    if (block.bytes < bytes) block = Block(bytes);
    base_ = block.data.get();
    ASAN_UNPOISON_MEMORY_REGION(base_, static_cast<size_t>(block.bytes));
  }
  int64_t used() const { return used_; }

  template <class T>
  T* take(int64_t n) {
    constexpr int64_t line = kAlign;
    T* piece = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    const int64_t end = used_ + n * static_cast<int64_t>(sizeof(T));
    used_ = (end + line - 1) / line * line + kGuard;
    if (base_) ASAN_POISON_MEMORY_REGION(base_ + end, static_cast<size_t>(used_ - end));
    return piece;
  }

 private:
  static constexpr int64_t kAlign = 64;
  struct Free {
    void operator()(char* p) const { ::operator delete(p, std::align_val_t(kAlign)); }
  };
  struct Block {
    Block() = default;
    explicit Block(int64_t n)
        : bytes(n),
          data(static_cast<char*>(
              ::operator new(static_cast<size_t>(n), std::align_val_t(kAlign)))) {}
    int64_t bytes = 0;
    std::unique_ptr<char, Free> data;
  };

  char* base_ = nullptr;
  int64_t used_ = 0;
};

// A Scratch(Arena&, args...) on the thread's block; it lives until the thread asks for the next.
template <class Scratch, class... Args>
Scratch on_arena(const Args&... args) {
  Arena size;
  Scratch(size, args...);
  Arena arena(size.used());
  return Scratch(arena, args...);
}

}  // namespace dvla_fast::attention
