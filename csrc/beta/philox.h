// Philox4x32-10 of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3"
// (SC 2011): a pure function of (counter, key), so that every element owns its stream and neither
// the number of threads nor the device changes a draw.
#pragma once

#include "beta/elementary.h"

namespace dvla_fast {

struct Words {
  std::uint32_t w0, w1, w2, w3;
};

constexpr int kPhiloxRounds = 10;
constexpr std::uint32_t kPhiloxLeft = 0xD2511F53u, kPhiloxRight = 0xCD9E8D57u;  // multipliers
constexpr std::uint32_t kPhiloxKey0 = 0x9E3779B9u, kPhiloxKey1 = 0xBB67AE85u;   // a round's step

DVLA_HD Words philox(Words counter, std::uint32_t key0, std::uint32_t key1) {
#if defined(__CUDACC__)
#pragma unroll
#else
#pragma GCC unroll 10
#endif
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const std::uint64_t left = std::uint64_t(kPhiloxLeft) * counter.w0;
    const std::uint64_t right = std::uint64_t(kPhiloxRight) * counter.w2;
    counter = {static_cast<std::uint32_t>(right >> 32) ^ counter.w1 ^ key0,
               static_cast<std::uint32_t>(right),
               static_cast<std::uint32_t>(left >> 32) ^ counter.w3 ^ key1,
               static_cast<std::uint32_t>(left)};
    key0 += kPhiloxKey0;
    key1 += kPhiloxKey1;
  }
  return counter;
}

// Which element of the call a draw belongs to: its index in two halves, which keeps vector loops
// in 32-bit lanes.
struct Element {
  std::uint32_t low, high;
};

// The stream of one policy call: an element draws its block number `block`.
struct Stream {
  std::uint32_t seed_low, seed_high, offset;

  DVLA_HD Words draw(Element element, std::uint32_t block) const {
    return philox({element.low, element.high, block, offset}, seed_low, seed_high);
  }
};

DVLA_HD Stream stream_of(std::int64_t seed, std::int64_t offset) {
  return {static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32),
          static_cast<std::uint32_t>(offset)};
}

}  // namespace dvla_fast
