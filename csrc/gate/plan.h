// How a pass over the images is cut into chunks. Everything here follows from the shape alone, so
// results do not depend on the number of threads.
#pragma once

#include <algorithm>
#include <cstdint>

#include "attention/vec_math.h"

namespace dvla_fast::gate {

using attention::ceil_div;

// Keys and values of a chunk that one thread works on, in bytes: with its tokens they stay in that
// core's second-level cache, and the matrix products are long enough to run at full speed.
constexpr int64_t kChunkBytes = 768 * 1024;
// Keys and values of all images that are kept for the backward pass where they take no more bytes
// than this: they are then read again in less time than they are projected again.
constexpr int64_t kKeptBytes = 32 * 1024 * 1024;
// Fewer chunks than this leave threads idle: they are then made this many times longer, taken one
// after another, and the threads share the work inside each.
constexpr int64_t kFewChunks = 16;

// Whether it pays to absorb the weights of keys and values into what surrounds them (absorb.h):
// products (queries of all heads) x tokens in the place of tokens x weights. In multiplications of
// an image, those of attention counted at their lower speed. Also in
// dvla_fast/ops/gated_attention.py.
inline bool absorbs(int64_t H, int64_t P, int64_t D, int64_t N, int64_t C) {
  const int64_t projected = 2 * N * C * H * D + 2 * P * N * H * D;
  const int64_t absorbed = 2 * H * P * N * C + P * C * H * D;
  return P > 0 && 9 * absorbed < 5 * projected;
}

// Images [image, image + images), of text groups [group, group + groups).
struct Chunk {
  int64_t image, images, group, groups;
};

class Plan {
 public:
  // B images in T text groups, what is made of one image (keys and values) taking `bytes`.
  // `least`: bytes that a chunk takes at least, where it is short products that cost most.
  Plan(int64_t B, int64_t T, int64_t bytes, int64_t least)
      : T_(T), G_(B / T), kept_(B * bytes <= kKeptBytes) {
    const int64_t image = std::max<int64_t>(1, bytes), chunk = std::max(kChunkBytes, least);
    cut(std::max<int64_t>(1, chunk / image));
    parallel_ = count_ >= kFewChunks && image <= kChunkBytes * kFewChunks / 4;
    if (!parallel_) cut(std::max<int64_t>(1, kFewChunks * chunk / image));
  }

  int64_t count() const { return count_; }
  // Whether the backward pass gets keys and values from the forward.
  bool kept() const { return kept_; }
  // Whether threads take chunks each, or share the work inside each chunk.
  bool parallel() const { return parallel_; }
  // Whether a chunk is whole text groups, rather than a part of one.
  bool whole_groups() const { return pieces_ == 1; }
  int64_t most_groups() const {
    return whole_groups() ? ceil_div(T_, std::max<int64_t>(1, count_)) : 1;
  }
  int64_t most_images() const {
    return whole_groups() ? most_groups() * G_ : ceil_div(G_, pieces_);
  }

  Chunk operator[](int64_t i) const {
    if (whole_groups()) {
      const int64_t first = T_ * i / count_, last = T_ * (i + 1) / count_;
      return {first * G_, (last - first) * G_, first, last - first};
    }
    const int64_t group = i / pieces_, piece = i % pieces_;
    const int64_t first = G_ * piece / pieces_, last = G_ * (piece + 1) / pieces_;
    return {group * G_ + first, last - first, group, 1};
  }

 private:
  void cut(int64_t images) {
    pieces_ = G_ <= images ? 1 : ceil_div(G_, images);
    count_ = pieces_ > 1 ? T_ * pieces_ : G_ == 0 ? 1 : ceil_div(T_, images / G_);
  }

  int64_t T_, G_;
  bool kept_;
  int64_t pieces_ = 1, count_ = 1;
  bool parallel_ = false;
};

// The backward pass adds up what chunks have in common (the weight's gradient, and a shared
// query's) in slots, each a run of chunks that one thread takes in order; then the slots are added
// in order.
class Slots {
 public:
  Slots(const Plan& plan, int64_t groups, int64_t most) : plan_(plan), T_(groups) {
    if (!plan.parallel()) return;
    count_ = std::min(most, plan.whole_groups() ? plan.count() : T_);
    // Where groups are fewer than slots could be, each group gets several of its own.
    while (!plan.whole_groups() && 2 * count_ <= most && 2 * per_group_ * T_ <= plan.count()) {
      count_ *= 2, per_group_ *= 2;
    }
  }
  int64_t count() const { return count_; }
  // Slots that share a group.
  int64_t per_group() const { return per_group_; }
  // First chunk of a slot; that of slot count() is the number of chunks.
  int64_t first(int64_t slot) const {
    if (plan_.whole_groups()) return plan_.count() * slot / count_;
    const int64_t pieces = plan_.count() / T_;
    if (per_group_ == 1) return T_ * slot / count_ * pieces;
    return slot / per_group_ * pieces + pieces * (slot % per_group_) / per_group_;
  }

 private:
  const Plan& plan_;
  int64_t T_, count_ = 1, per_group_ = 1;
};

}  // namespace dvla_fast::gate
