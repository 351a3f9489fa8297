// Where results are written: to memory, or past the caches.
#pragma once
#include <cstring>

#include "simd.h"
#include "work.h"

namespace {

// Values that are worked on together: they stay in a first-level cache, and sums of so many of a
// channel, 64 a lane of each of four accumulators, are few enough for float32.
constexpr int64_t SEGMENT = 64 * VECTOR_BYTES;
// Tensors of as many bytes do not stay in a second-level cache until they are read again. Past the
// caches, memory is not read only to be overwritten.
constexpr int64_t STREAMED_BYTES = 1 << 22;

// Writes pieces of a tensor, each of up to a segment of values that lie together and in runs of
// some length, of which so many are in the order of two vectors.
template <class T>
class Output {
 public:
  Output(const T* y, int64_t run, int64_t paired, bool streamed) : way_(Way::cached) {
    if (!streamed) return;
    bool whole = reinterpret_cast<uintptr_t>(y) % VECTOR_BYTES == 0 && run % STEP == 0;
    way_ = whole && (sizeof(T) > 2 || paired == run) ? Way::streamed : Way::collected;
  }
  ~Output() {
    if (way_ != Way::cached) end_of_stream();
  }
  Output(const Output&) = delete;
  Output& operator=(const Output&) = delete;

  // Whether runs are to be streamed.
  bool streamed() const { return way_ == Way::streamed; }
  // Where to write what belongs to a place. Past the caches go whole cache lines only; if runs are
  // not, they are collected here.
  T* begin(T* place) { return way_ == Way::collected ? lines_ : place; }
  void end(T* place, int64_t size) {
    if (way_ == Way::collected) stream_all(place, size);
  }

 private:
  enum class Way { cached, streamed, collected };
  static constexpr int64_t STEP = VECTOR_BYTES / sizeof(T);

  void stream_all(T* place, int64_t size) const {
    auto misaligned = static_cast<int64_t>(reinterpret_cast<uintptr_t>(place) % VECTOR_BYTES);
    int64_t head = misaligned == 0 ? 0 : STEP - misaligned / static_cast<int64_t>(sizeof(T));
    int64_t i = at_most(head, size);
    copy(place, 0, i);
    for (; i + STEP <= size; i += STEP) stream(place + i, read<Words>(lines_ + i));
    copy(place, i, size - i);
  }
  void copy(T* place, int64_t i, int64_t size) const {
    std::memcpy(place + i, lines_ + i, static_cast<size_t>(size) * sizeof(T));
  }

  Way way_;
  alignas(VECTOR_BYTES) T lines_[SEGMENT];
};

}  // namespace
