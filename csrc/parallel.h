// Work split over threads.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <vector>

// Of the OpenMP runtime that torch brings. Called by their names: at `#pragma omp parallel`
// compilers other than GCC start the threads of a runtime of their own, which compete with torch's.
extern "C" void GOMP_parallel(void (*f)(void*), void* data, unsigned threads, unsigned flags);
extern "C" int omp_get_thread_num();

namespace dvla_fast {

// f(i) on thread i of torch's threads, all of them at once; an exception is thrown again here.
template <class F>
inline void on_each_thread(const F& f) {
  struct Team {
    const F& f;
    std::atomic_flag failed = ATOMIC_FLAG_INIT;
    std::exception_ptr error = nullptr;
  } team{f};
  const auto run = [](void* data) {
    Team& team = *static_cast<Team*>(data);
    try {
      team.f(omp_get_thread_num());
    } catch (...) {
      if (!team.failed.test_and_set()) team.error = std::current_exception();
    }
  };
  GOMP_parallel(run, &team, 0, 0);  // 0: as many as torch.set_num_threads said
  if (team.error) std::rethrow_exception(team.error);
}

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
  on_each_thread([&](int64_t own) {
    if (own >= threads) return;
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
