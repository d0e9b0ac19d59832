// Work split over threads.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

namespace dvla_fast {

// f(begin, end) over parts of [0, n), of `least` places or more. Each thread has a share, the same
// at each call, so that its core's cache holds what it worked on; a thread that is done takes parts
// of the others' shares, as cores differ in speed and other programs use them, too. What f computes
// must not depend on the parts.
template <class F>
inline void parallel_items(std::int64_t n, const F& f, std::int64_t least = 1) {
  using std::int64_t;
  const int64_t threads = std::min<int64_t>((n + least - 1) / least, at::get_num_threads());
  if (threads <= 1 || at::in_parallel_region()) {
    if (n > 0) f(int64_t{0}, n);
    return;
  }
  struct alignas(64) Share {  // a cache line each
    std::atomic<int64_t> next;
    int64_t end;
  };
  std::vector<Share> shares(threads);
  for (int64_t i = 0; i < threads; ++i) {
    shares[i].next = n * i / threads, shares[i].end = n * (i + 1) / threads;
  }
  at::parallel_for(0, threads, 1, [&](int64_t own, int64_t) {
    for (int64_t i = own; i < own + threads; ++i) {
      Share& share = shares[i % threads];
      for (int64_t begin = share.next; begin < share.end;) {
        const int64_t end =
            begin + std::max(std::min(least, share.end - begin), (share.end - begin) / 4);
        if (!share.next.compare_exchange_weak(begin, end)) continue;  // begin is what it became
        f(begin, end);
        begin = share.next;
      }
    }
  });
}

}  // namespace dvla_fast
