// The arithmetic on C numbers, in float64: what transform.py and moments.py do for the kernels
// of torch calls, where the formulas are explained.
#pragma once
#include <cmath>

#include "kernels.h"
#include "simd.h"

namespace {

// Relative rounding of a raw float64 sum of squares, and of a two-part one (moments.py).
constexpr double ROUNDING = 1e-15, TWO_PART_ROUNDING = 0x1p-72;

inline double at_least_one(double count) { return count > 1 ? count : 1; }

// Call work with a value of the storage type.
template <class Work>
void with_type(Dtype dtype, const Work& work) {
  switch (dtype) {
    case Dtype::float32: return work(float{});
    case Dtype::float64: return work(double{});
    case Dtype::bfloat16: return work(bfloat16{});
    case Dtype::float16: return work(float16{});
  }
}

// Read numbers of a storage type as float64, or take a number for all of them if there are none.
inline void read_all(Numbers from, double otherwise, int64_t size, double* to) {
  if (from.data == nullptr) {
    for (int64_t i = 0; i < size; ++i) to[i] = otherwise;
    return;
  }
  with_type(from.dtype, [&](auto t) {
    using T = decltype(t);
    auto data = static_cast<const T*>(from.data);
    constexpr int L = LANES<compute_t<T>>;
    for (int64_t i = 0; i < size; i += L) {
      int k = static_cast<int>(at_most(L, size - i));
      vector_t<T> v = k == L ? load(data + i) : load(data + i, k);
      for (int j = 0; j < k; ++j) to[i + j] = v[j];
    }
  });
}

inline void write_all(const double* from, int64_t size, Numbers to) {
  with_type(to.dtype, [&](auto t) {
    using T = decltype(t);
    auto data = static_cast<T*>(to.data);
    constexpr int L = LANES<compute_t<T>>;
    for (int64_t i = 0; i < size; i += L) {
      int k = static_cast<int>(at_most(L, size - i));
      vector_t<T> v{};
      for (int j = 0; j < k; ++j) v[j] = static_cast<compute_t<T>>(from[i + j]);
      k == L ? store(data + i, v) : store(data + i, v, k);
    }
  });
}

// Moments of an input in a message: [sum (C) | sum of squares (C) | count], or, for float64 inputs,
// [sum (C) | sum of squares (C) | low parts of both (2C) | count].
struct Packed {
  double* data;
  int64_t channels;
  Dtype dtype;

  bool has_two_parts() const { return ::has_two_parts(dtype); }
  double* part(int k) const { return data + k * channels; }
  double& count() const { return data[packed_size(channels, dtype) - 1]; }
};

// A value as the sum of a float64 and its rounding error.
struct Pair {
  double high, low;
};

inline Pair two_sum(double a, double b) {
  double sum = a + b, rest = sum - a;
  return {sum, (a - (sum - rest)) + (b - rest)};
}

// Not inlined: -ffp-contract=fast would fuse the product with a sum of the caller, which then adds
// an unrounded product to the error of the rounded one.
__attribute__((noinline)) Pair two_product(double a, double b) {
  double product = a * b;
  return {product, std::fma(a, b, -product)};
}

// The first 26 bits as the high part: high parts of several ranks add without rounding. Dekker's
// split multiplies, and -ffp-contract=fast would fuse the product.
inline Pair split(Pair v) {
  auto high = bits_of<double>(bits_of<uint64_t>(v.high) & ~0ull << 27);
  return {high, (v.high - high) + v.low};
}

// Message from sums around pivots: Moments.from_pivot.
inline void write_message(const Sums* sums, const Shape& shape, Packed message) {
  for (int64_t c = 0; c < shape.channels; ++c) {
    const Sums& s = sums[c];
    if (!message.has_two_parts()) {
      double sum = s.first + s.n * s.pivot;
      message.part(0)[c] = sum;
      message.part(1)[c] = s.second + s.pivot * (s.first + sum);
      continue;
    }
    Pair moved = two_product(s.n, s.pivot), sum = two_sum(moved.high, s.first);
    sum.low += moved.low;
    Pair both = two_sum(sum.high, s.first), square = two_product(s.pivot, both.high);
    Pair sum_sq = two_sum(square.high, s.second);
    sum_sq.low += square.low + s.pivot * (both.low + sum.low);
    sum = split(sum);
    sum_sq = split(sum_sq);
    message.part(0)[c] = sum.high;
    message.part(1)[c] = sum_sq.high;
    message.part(2)[c] = sum.low;
    message.part(3)[c] = sum_sq.low;
  }
  message.count() = static_cast<double>(shape.batch * shape.space);
}

// The mean, and the sum of squares around it: zero within its rounding. Moments.mean_and_m2.
inline void centre(Packed message, double* mean, double* squares) {
  double count = at_least_one(message.count());
  const double *sum = message.part(0), *sum_sq = message.part(1);
  if (!message.has_two_parts()) {
    for (int64_t c = 0; c < message.channels; ++c) {
      mean[c] = sum[c] / count;
      double around = sum_sq[c] - sum[c] * mean[c];
      // A product, for NaN to stay.
      squares[c] = around * (around > ROUNDING * sum_sq[c]);
    }
    return;
  }
  const double *sum_low = message.part(2), *sum_sq_low = message.part(3);
  for (int64_t c = 0; c < message.channels; ++c) {
    double rough = (sum[c] + sum_low[c]) / count;
    Pair product = two_product(count, rough), square = two_product(rough, product.high);
    double rest = (sum[c] - product.high) + (sum_low[c] - product.low), shift = rest / count;
    double around = (sum_sq[c] - square.high) + (sum_sq_low[c] - square.low);
    around -= rough * product.low + rest * (2 * rough + shift);
    mean[c] = rough + shift;
    squares[c] = around * (around > TWO_PART_ROUNDING * sum_sq[c]);
  }
}

// Statistics [mean (C) | invstd (C) | count].
inline void write_statistics(Packed message, double eps, double* out) {
  int64_t channels = message.channels;
  double* invstd = out + channels;
  centre(message, out, invstd);
  double count = message.count();
  for (int64_t c = 0; c < channels; ++c)
    invstd[c] = 1 / std::sqrt(invstd[c] / at_least_one(count) + eps);
  out[2 * channels] = count;
}

// Count a batch if it has a variance; running <- running + (batch - running) momentum, with the
// unbiased variance. A momentum of NaN is 1/tracked, after counting.
inline void move_running(Packed message, const Running& running) {
  int64_t channels = message.channels, *tracked = running.tracked;
  if (!(message.count() > 1)) return;
  if (tracked != nullptr) ++*tracked;
  if (running.mean.data == nullptr && running.var.data == nullptr) return;
  double momentum = running.momentum;
  if (momentum != momentum)
    momentum = tracked == nullptr ? 0 : 1 / at_least_one(static_cast<double>(*tracked));
  Scratch<double> scratch(3 * channels);
  double *means = scratch.data(), *vars = means + channels, *moved = vars + channels;
  centre(message, means, vars);
  double degrees = at_least_one(message.count() - 1);
  for (int64_t c = 0; c < channels; ++c) vars[c] /= degrees;
  auto move = [&](const double* batch, Numbers average) {
    if (average.data == nullptr) return;
    read_all(average, 0, channels, moved);
    for (int64_t c = 0; c < channels; ++c) moved[c] += (batch[c] - moved[c]) * momentum;
    write_all(moved, channels, average);
  };
  move(means, running.mean);
  move(vars, running.var);
}

// The numbers that the loops over elements take: [5][C], named in operations.h.
template <class A>
class Coefficients {
 public:
  Coefficients(const double* statistics, int64_t channels, Numbers weight, Numbers bias)
      : channels_(channels), numbers_(3 * channels), values_(5 * channels) {
    double *weights = numbers_.data(), *biases = weights + channels, *rest = biases + channels;
    read_all(weight, 1, channels, weights);
    read_all(bias, 0, channels, biases);
    const double *mean = statistics, *invstd = mean + channels;
    for (int64_t c = 0; c < channels; ++c) {
      auto pivot = static_cast<A>(mean[c]);
      double scale = invstd[c] * weights[c];
      rest[c] = mean[c] - pivot;
      row(0)[c] = pivot;
      row(1)[c] = static_cast<A>(scale);
      row(2)[c] = static_cast<A>(biases[c] - rest[c] * scale);
    }
  }

  // The coefficients of the input gradient; sums are [sum(dy) (C) | sum(dy xhat) (C)] of all ranks.
  void add_gradient(const double* statistics, const double* sums) {
    double count = at_least_one(statistics[2 * channels_]);
    const double *invstd = statistics + channels_, *weights = numbers_.data(), *rest = this->rest();
    for (int64_t c = 0; c < channels_; ++c) {
      double scale = invstd[c] * weights[c], mean_dy = sums[c] / count;
      double slope = invstd[c] * (sums[channels_ + c] / count);
      row(3)[c] = static_cast<A>(-slope * scale);
      row(4)[c] = static_cast<A>((rest[c] * slope - mean_dy) * scale);
    }
  }

  const A* data() const { return values_.data(); }
  const double* rest() const { return numbers_.data() + 2 * channels_; }

 private:
  A* row(int k) const { return values_.data() + k * channels_; }

  int64_t channels_;
  // Weights, biases, and what rounding has taken from the means.
  Scratch<double> numbers_;
  Scratch<A> values_;
};

// [sum(dy) (C) | sum(dy xhat) (C)] from sum(dy) and sum(dy (x - pivot)).
inline void write_gradient_sums(const Sums* sums, const double* rest, const double* invstd,
                                int64_t channels, double* out) {
  for (int64_t c = 0; c < channels; ++c) {
    out[c] = sums[c].first;
    out[channels + c] = (sums[c].second - rest[c] * sums[c].first) * invstd[c];
  }
}

}  // namespace
