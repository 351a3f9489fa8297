// The arithmetic of one element, and where results are stored. A reduction functor has terms(), an
// elementwise one value(). The loops are in contiguous.h and channels_last.h. A functor's
// activation is a class of activations.h.
//
// Coefficients are per channel, in the compute type. pivot is the mean rounded to that type, scale
// is invstd * weight; the structs define the rest. The rounding error of the mean is folded into
// the coefficients (coefficients.py): x - pivot is exact near the mean, x * scale + shift is not.
#pragma once
#include <cstring>
#include <type_traits>

#include "activations.h"
#include "parallel.h"
#include "simd.h"

namespace {

// y = (x - pivot) scale + shift
template <class V>
inline V affine(V x, const V* c) {
  return (x - c[0]) * c[1] + c[2];
}

// sum(x - pivot), sum((x - pivot)^2) around a pivot that the loop chooses.
struct Moments {
  static constexpr int COEFFICIENTS = 1;
  static constexpr bool IS_BINARY = false, CHOOSES_PIVOT = true;

  template <class V>
  void terms(V x, V, const V* c, V& first, V& second) const {
    first = x - c[0];
    second = first * first;
  }
};

// sum(dy), sum(dy (x - pivot)), dy before the activation. Coefficients: pivot; with an activation
// also scale and shift.
template <class Activation>
struct GradientSums {
  static constexpr int COEFFICIENTS = std::is_same_v<Activation, Identity> ? 1 : 3;
  static constexpr bool IS_BINARY = true, CHOOSES_PIVOT = false;
  Activation activation;

  template <class V>
  void terms(V x, V dy, const V* c, V& first, V& second) const {
    if constexpr (COEFFICIENTS == 3) dy = activation.gradient(dy, affine(x, c));
    first = dy;
    second = dy * (x - c[0]);
  }
};

// y = (x - pivot) scale + shift, plus a residual, then the activation.
template <bool RESIDUAL, class Activation>
struct Normalize {
  static constexpr int COEFFICIENTS = 3;
  static constexpr bool IS_BINARY = RESIDUAL;
  Activation activation;

  template <class V>
  V value(V x, V residual, const V* c) const {
    V z = affine(x, c);
    if constexpr (RESIDUAL) z += residual;
    return activation.value(z);
  }
};

// dx = dy scale + (x - pivot) slope + offset. Coefficients: pivot, scale, shift, slope, offset.
template <class Activation>
struct InputGradient {
  static constexpr int COEFFICIENTS = 5;
  static constexpr bool IS_BINARY = true;
  Activation activation;

  template <class V>
  V value(V x, V dy, const V* c) const {
    dy = activation.gradient(dy, affine(x, c));
    return dy * c[1] + ((x - c[0]) * c[3] + c[4]);
  }
};

// K coefficients of one channel, the same in every lane.
template <class A, int K>
struct PerChannel {
  Vector<A> values[K];

  PerChannel(const A* coefficients, int64_t stride) {
    for (int k = 0; k < K; ++k) values[k] = Vector<A>{} + coefficients[k * stride];
  }
};

// K coefficients of a vector of columns.
template <class A, int K>
struct PerColumn {
  Vector<A> values[K];

  PerColumn(const A* coefficients, int64_t stride) {
    for (int k = 0; k < K; ++k) values[k] = load(coefficients + k * stride);
  }
};

// Position of column j if the first `interleaved` columns are in the order of a VectorPair.
template <class T>
int64_t position(int64_t j, int64_t interleaved) {
  constexpr int64_t TWO = 2 * LANES<compute_t<T>>;
  return j < interleaved ? j - j % TWO + pair_lane<T>(static_cast<int>(j % TWO)) : j;
}

// Writes op.value() of `size` elements; coefficients(i) returns the ones of the vector at i.
// The first `interleaved` coefficients are in the order of a VectorPair. Streamed sizes are whole
// cache lines.
template <class Op, class T, class Coefficients>
inline void map_elements(Op op, const T* x, const T* other, T* y, int64_t size, int64_t interleaved,
                         bool streamed, const Coefficients& coefficients) {
  constexpr int L = LANES<compute_t<T>>;
  auto values = [&](int64_t i) {
    VectorPair<T> first = load_pair(x + i), second{};
    if constexpr (Op::IS_BINARY) second = load_pair(other + i);
    const auto &c = coefficients(i), &d = coefficients(i + L);
    return VectorPair<T>{op.value(first.a, second.a, c.values),
                         op.value(first.b, second.b, d.values)};
  };
  auto value = [&](int64_t i, auto... part) {
    vector_t<T> second{};
    if constexpr (Op::IS_BINARY) second = load(other + i, part...);
    const auto& c = coefficients(i);
    return op.value(load(x + i, part...), second, c.values);
  };
  int64_t i = 0;
  if (streamed) {
    for (; i + 2 * L <= interleaved; i += 2 * L) stream_pair(y + i, values(i));
    if constexpr (sizeof(T) > 2)
      for (; i + L <= size; i += L) stream(y + i, bits_of<Words>(value(i)));
  }
  for (; i + 2 * L <= interleaved; i += 2 * L) store_pair(y + i, values(i));
  for (; i + L <= size; i += L) store(y + i, value(i));
  if (int k = static_cast<int>(size - i); k > 0) store(y + i, value(i, k), k);
}

// Values processed together. They fit in a first-level cache, and float32 can sum so many values
// of a channel: 64 per lane of each of four accumulators.
constexpr int64_t SEGMENT = 64 * VECTOR_BYTES;
// Tensors of this many bytes leave a second-level cache before they are read again. Stores that
// bypass the caches save the read of memory that is overwritten.
constexpr int64_t MIN_STREAMED_BYTES = 1 << 22;

// Writes pieces of a tensor, to the caches or past them. A piece is up to a segment of adjacent
// values in runs of equal length; the first `interleaved` of a run are in the order of a
// VectorPair.
template <class T>
class StreamingStore {
 public:
  StreamingStore(const T* y, int64_t run, int64_t interleaved, bool streamed)
      : mode_(Mode::cached) {
    if (!streamed) return;
    bool whole = reinterpret_cast<uintptr_t>(y) % VECTOR_BYTES == 0 && run % STEP == 0;
    mode_ = whole && (sizeof(T) > 2 || interleaved == run) ? Mode::streamed : Mode::staged;
  }
  ~StreamingStore() {
    if (mode_ != Mode::cached) end_of_stream();
  }
  StreamingStore(const StreamingStore&) = delete;
  StreamingStore& operator=(const StreamingStore&) = delete;

  // True if the runs themselves are streamed.
  bool streams_runs() const { return mode_ == Mode::streamed; }
  // Returns the address to write a piece to. Only whole cache lines can be streamed; runs that are
  // not whole lines are staged.
  T* begin(T* destination) { return mode_ == Mode::staged ? staging_ : destination; }
  void end(T* destination, int64_t size) {
    if (mode_ == Mode::staged) stream_staged(destination, size);
  }

 private:
  enum class Mode { cached, streamed, staged };
  static constexpr int64_t STEP = VECTOR_BYTES / sizeof(T);

  void stream_staged(T* destination, int64_t size) const {
    auto misaligned = static_cast<int64_t>(reinterpret_cast<uintptr_t>(destination) % VECTOR_BYTES);
    int64_t head = misaligned == 0 ? 0 : STEP - misaligned / static_cast<int64_t>(sizeof(T));
    int64_t i = at_most(head, size);
    copy(destination, 0, i);
    for (; i + STEP <= size; i += STEP) stream(destination + i, read<Words>(staging_ + i));
    copy(destination, i, size - i);
  }
  void copy(T* destination, int64_t i, int64_t size) const {
    std::memcpy(destination + i, staging_ + i, static_cast<size_t>(size) * sizeof(T));
  }

  Mode mode_;
  alignas(VECTOR_BYTES) T staging_[SEGMENT];
};

}  // namespace
