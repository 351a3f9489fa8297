// What is computed at each element. An operation that reduces has terms(), one that writes has
// value(); the loops around them are in rows.h and columns.h.
//
// Coefficients are per channel, and of the compute type: pivot, the mean rounded to it; scale =
// invstd * weight; what else there is, the structs say. The mean's rest is in the others
// (transform.py): x - pivot is exact where x is near the mean, x * scale + shift is not.
#pragma once
#include "simd.h"
#include "work.h"

namespace {

// y = (x - pivot) scale + shift
template <class V>
inline V affine(V x, const V* c) {
  return (x - c[0]) * c[1] + c[2];
}

// What torch's relu and its gradient do with NaN: keep it, and let the gradient pass.
template <class V>
inline V relu(V z) {
  return z < 0 ? V{} : z;
}
template <class V>
inline V relu_gradient(V dy, V z) {
  return z <= 0 ? V{} : dy;
}

// Around a pivot that the loop chooses: sum(x - pivot), sum((x - pivot)^2).
struct Moments {
  static constexpr int COEFFICIENTS = 1;
  static constexpr bool HAS_PAIR = false, CHOOSES_PIVOT = true;

  template <class V>
  static void terms(V x, V, const V* c, V& first, V& second) {
    first = x - c[0];
    second = first * first;
  }
};

// sum(dy), sum(dy (x - pivot)); with RELU, dy is what comes through it. Coefficients: pivot; with
// RELU scale and shift, too.
template <bool RELU>
struct GradientSums {
  static constexpr int COEFFICIENTS = RELU ? 3 : 1;
  static constexpr bool HAS_PAIR = true, CHOOSES_PIVOT = false;

  template <class V>
  static void terms(V x, V dy, const V* c, V& first, V& second) {
    if constexpr (RELU) dy = relu_gradient(dy, affine(x, c));
    first = dy;
    second = dy * (x - c[0]);
  }
};

// y = (x - pivot) scale + shift (+ residual) (through relu)
template <bool RESIDUAL, bool RELU>
struct Normalize {
  static constexpr int COEFFICIENTS = 3;
  static constexpr bool HAS_PAIR = RESIDUAL;

  template <class V>
  static V value(V x, V residual, const V* c) {
    V z = affine(x, c);
    if constexpr (RESIDUAL) z += residual;
    if constexpr (RELU) z = relu(z);
    return z;
  }
};

// dx = dy scale + (x - pivot) slope + offset. Coefficients: pivot, scale, shift, slope, offset.
template <bool RELU>
struct InputGradient {
  static constexpr int COEFFICIENTS = 5;
  static constexpr bool HAS_PAIR = true;

  template <class V>
  static V value(V x, V dy, const V* c) {
    if constexpr (RELU) dy = relu_gradient(dy, affine(x, c));
    return dy * c[1] + ((x - c[0]) * c[3] + c[4]);
  }
};

// Write Op::value of `size` elements; coefficients(i) are those of the vector from i on. The first
// `paired` of them are in the order of two vectors. What is streamed is whole cache lines.
template <class Op, class T, class Coefficients>
inline void map_run(const T* x, const T* pair, T* y, int64_t size, int64_t paired, bool streamed,
                    const Coefficients& coefficients) {
  constexpr int L = LANES<compute_t<T>>;
  auto values = [&](int64_t i) {
    Two<T> first = load_two(x + i), second{};
    if constexpr (Op::HAS_PAIR) second = load_two(pair + i);
    const auto &c = coefficients(i), &d = coefficients(i + L);
    return Two<T>{Op::value(first.a, second.a, c.values), Op::value(first.b, second.b, d.values)};
  };
  auto value = [&](int64_t i, auto... part) {
    vector_t<T> second{};
    if constexpr (Op::HAS_PAIR) second = load(pair + i, part...);
    const auto& c = coefficients(i);
    return Op::value(load(x + i, part...), second, c.values);
  };
  int64_t i = 0;
  if (streamed) {
    for (; i + 2 * L <= paired; i += 2 * L) stream_two(y + i, values(i));
    if constexpr (sizeof(T) > 2)
      for (; i + L <= size; i += L) stream(y + i, bits_of<Words>(value(i)));
  }
  for (; i + 2 * L <= paired; i += 2 * L) store_two(y + i, values(i));
  for (; i + L <= size; i += L) store(y + i, value(i));
  if (int k = static_cast<int>(size - i); k > 0) store(y + i, value(i, k), k);
}

}  // namespace
