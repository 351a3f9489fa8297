// Some channels after the other, when nothing has to be known of other ranks in between: their
// values stay in the second-level cache from the first look to the second, so memory is read once.
#pragma once
#include "kernels.h"
#include "rows.h"

namespace {

// Bytes of an input that stay in the cache beside a gradient and what is written.
constexpr int64_t TILE_BYTES = 1 << 18;

inline int64_t size_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::float32: return 4;
    case Dtype::float64: return 8;
    case Dtype::bfloat16:
    case Dtype::float16: break;
  }
  return 2;
}

// Some channels of a tensor.
struct Tile {
  int64_t first, channels;
  Shape all;
  int64_t bytes;
  int threads;

  // Of packed statistics: two for each channel, and a count.
  int64_t numbers() const { return 2 * channels + 1; }

  Input of(const Input& in) const {
    return {{all.batch, channels, all.space}, in.dtype, threads, of(in.x), in.whole};
  }
  Operand of(Operand t) const {
    if (t.data == nullptr) return t;
    return {static_cast<char*>(t.data) + first * all.space * bytes, t.stride};
  }
  Numbers of(Numbers t) const {
    if (t.data == nullptr) return t;
    return {static_cast<char*>(t.data) + first * size_of(t.dtype), t.dtype};
  }
  // Copy rows of this tile, [numbers][tile channels], into rows of all channels.
  void scatter(const double* own, int numbers, double* packed) const {
    for (int k = 0; k < numbers; ++k)
      for (int64_t c = 0; c < channels; ++c)
        packed[k * all.channels + first + c] = own[k * channels + c];
  }
  void gather(const double* packed, double* own) const {
    for (int64_t c = 0; c < channels; ++c) {
      own[c] = packed[first + c];
      own[channels + c] = packed[all.channels + first + c];
    }
  }
};

// Call work for tiles that cover the channels. A thread has tiles of its own, if there are enough.
// Columns are not taken apart: a few of each line are read at half the speed of whole lines.
template <class Work>
void each_tile(const Input& in, const Work& work) {
  const Shape& all = in.shape;
  int64_t bytes = size_of(in.dtype), channel = at_least(all.batch * all.space * bytes, 1);
  int64_t fit = all.space < SHORTEST_ROW ? all.channels : TILE_BYTES / channel;
  int64_t size = at_least(at_most(fit, all.channels), 1);
  int64_t tiles = ceil_div(all.channels, size);
  int threads = useful_threads(in.threads, numel(all));
  bool apart = tiles >= threads;
  bool no_memory = false;
  // No exception may leave a thread.
  share(tiles, apart ? threads : 1, [&](int, int64_t begin, int64_t end) {
    try {
      for (int64_t i = begin; i < end; ++i) {
        int64_t first = i * size, count = at_most(size, all.channels - first);
        work(Tile{first, count, all, bytes, apart ? 1 : threads});
      }
    } catch (const std::bad_alloc&) {
      __atomic_store_n(&no_memory, true, __ATOMIC_RELAXED);
    }
  });
  if (no_memory) throw std::bad_alloc();
}

}  // namespace
