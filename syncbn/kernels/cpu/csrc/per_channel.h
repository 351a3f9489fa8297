// Per-channel arithmetic in float64. coefficients.py and moments.py explain the formulas and
// implement them in torch.
#pragma once
#include <cmath>

#include "kernels.h"
#include "simd.h"

namespace {

// Relative rounding error of a raw float64 sum of squares, and of a two-part one (moments.py).
constexpr double ROUNDING = 1e-15, TWO_PART_ROUNDING = 0x1p-72;

inline double at_least_one(double count) { return count > 1 ? count : 1; }

// Calls work with a value of the storage type.
template <class Work>
void with_type(Dtype dtype, const Work& work) {
  switch (dtype) {
    case Dtype::float32: return work(float{});
    case Dtype::float64: return work(double{});
    case Dtype::bfloat16: return work(bfloat16{});
    case Dtype::float16: return work(float16{});
  }
}

// Converts values of a storage type to float64; writes `fallback` for every channel if null.
inline void read_doubles(ChannelValues from, double fallback, int64_t size, double* to) {
  if (from.data == nullptr) {
    for (int64_t i = 0; i < size; ++i) to[i] = fallback;
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

// Converts float64 to values of a storage type, unless they are null.
inline void write_doubles(const double* from, int64_t size, ChannelValues to) {
  if (to.data == nullptr) return;
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

// Packed moments of an input: [sum (C) | sum of squares (C) | count], or, for float64
// inputs, [sum (C) | sum of squares (C) | low parts of both (2C) | count].
struct PackedMoments {
  double* data;
  int64_t channels;
  Dtype dtype;

  bool has_two_parts() const { return ::has_two_parts(dtype); }
  double* part(int k) const { return data + k * channels; }
  double& count() const { return data[packed_size(channels, dtype) - 1]; }
};

// A value as the sum of a float64 and its rounding error.
struct DoubleDouble {
  double high, low;
};

inline DoubleDouble two_sum(double a, double b) {
  double sum = a + b, b_rounded = sum - a;
  return {sum, (a - (sum - b_rounded)) + (b - b_rounded)};
}

// Not inlined: -ffp-contract=fast would fuse the product with a sum in the caller, which would then
// add an unrounded product to the error of the rounded one.
__attribute__((noinline)) DoubleDouble two_product(double a, double b) {
  double product = a * b;
  return {product, std::fma(a, b, -product)};
}

// Keeps 26 bits in the high part: high parts of several ranks add without rounding. Dekker's split
// multiplies, and -ffp-contract=fast would fuse the product.
inline DoubleDouble split(DoubleDouble v) {
  auto high = bits_of<double>(bits_of<uint64_t>(v.high) & ~0ull << 27);
  return {high, (v.high - high) + v.low};
}

// Moments.from_pivot: packed moments from sums around pivots.
inline void pack_moments(const Sums* sums, const Shape& shape, PackedMoments packed) {
  for (int64_t c = 0; c < shape.channels; ++c) {
    const Sums& s = sums[c];
    if (!packed.has_two_parts()) {
      double sum = s.first + s.n * s.pivot;
      packed.part(0)[c] = sum;
      packed.part(1)[c] = s.second + s.pivot * (s.first + sum);
      continue;
    }
    DoubleDouble shift = two_product(s.n, s.pivot), sum = two_sum(shift.high, s.first);
    sum.low += shift.low;
    DoubleDouble both = two_sum(sum.high, s.first), square = two_product(s.pivot, both.high);
    DoubleDouble sum_sq = two_sum(square.high, s.second);
    sum_sq.low += square.low + s.pivot * (both.low + sum.low);
    sum = split(sum);
    sum_sq = split(sum_sq);
    packed.part(0)[c] = sum.high;
    packed.part(1)[c] = sum_sq.high;
    packed.part(2)[c] = sum.low;
    packed.part(3)[c] = sum_sq.low;
  }
  packed.count() = static_cast<double>(shape.batch * shape.space);
}

// Moments.mean_and_m2: the mean and the sum of squares around it, zero within rounding error.
inline void mean_and_m2(PackedMoments packed, double* mean, double* m2) {
  double count = at_least_one(packed.count());
  const double *sum = packed.part(0), *sum_sq = packed.part(1);
  if (!packed.has_two_parts()) {
    for (int64_t c = 0; c < packed.channels; ++c) {
      mean[c] = sum[c] / count;
      double around = sum_sq[c] - sum[c] * mean[c];
      // A product keeps NaN.
      m2[c] = around * (around > ROUNDING * sum_sq[c]);
    }
    return;
  }
  const double *sum_low = packed.part(2), *sum_sq_low = packed.part(3);
  for (int64_t c = 0; c < packed.channels; ++c) {
    double rough = (sum[c] + sum_low[c]) / count;
    DoubleDouble product = two_product(count, rough), square = two_product(rough, product.high);
    double error = (sum[c] - product.high) + (sum_low[c] - product.low), shift = error / count;
    double around = (sum_sq[c] - square.high) + (sum_sq_low[c] - square.low);
    around -= rough * product.low + error * (2 * rough + shift);
    mean[c] = rough + shift;
    m2[c] = around * (around > TWO_PART_ROUNDING * sum_sq[c]);
  }
}

// Writes [mean (C) | invstd (C) | count].
inline void write_statistics(PackedMoments packed, double eps, double* out) {
  int64_t channels = packed.channels;
  double* invstd = out + channels;
  mean_and_m2(packed, out, invstd);
  double count = packed.count();
  for (int64_t c = 0; c < channels; ++c)
    invstd[c] = 1 / std::sqrt(invstd[c] / at_least_one(count) + eps);
  out[2 * channels] = count;
}

// Counts the batch if it has a variance; running += (batch - running) * momentum, with the unbiased
// variance. A momentum of NaN means 1 / num_batches_tracked, after counting.
inline void update_running_stats(PackedMoments packed, const Call& call) {
  int64_t channels = packed.channels, *tracked = call.num_batches_tracked;
  if (!(packed.count() > 1)) return;
  if (tracked != nullptr) ++*tracked;
  if (call.running_mean == nullptr && call.running_var == nullptr) return;
  double momentum = call.momentum;
  if (momentum != momentum)
    momentum = tracked == nullptr ? 0 : 1 / at_least_one(static_cast<double>(*tracked));
  Scratch<double> scratch(3 * channels);
  double *means = scratch.data(), *vars = means + channels, *updated = vars + channels;
  mean_and_m2(packed, means, vars);
  double degrees = at_least_one(packed.count() - 1);
  for (int64_t c = 0; c < channels; ++c) vars[c] /= degrees;
  auto update = [&](const double* batch, void* data) {
    if (data == nullptr) return;
    ChannelValues stored{data, call.running_dtype};
    read_doubles(stored, 0, channels, updated);
    for (int64_t c = 0; c < channels; ++c) updated[c] += (batch[c] - updated[c]) * momentum;
    write_doubles(updated, channels, stored);
  };
  update(means, call.running_mean);
  update(vars, call.running_var);
}

// The coefficients of the loops over elements: [5][C], named in functors.h.
template <class A>
class Coefficients {
 public:
  explicit Coefficients(const Call& call)
      : channels_(call.shape.channels), channel_values_(3 * channels_), values_(5 * channels_) {
    int64_t channels = channels_;
    double *weights = channel_values_.data(), *biases = weights + channels,
           *errors = biases + channels;
    read_doubles({call.weight, call.parameter_dtype}, 1, channels, weights);
    read_doubles({call.bias, call.parameter_dtype}, 0, channels, biases);
    const double *mean = call.statistics, *invstd = mean + channels;
    for (int64_t c = 0; c < channels; ++c) {
      auto pivot = static_cast<A>(mean[c]);
      double scale = invstd[c] * weights[c];
      errors[c] = mean[c] - pivot;
      row(0)[c] = pivot;
      row(1)[c] = static_cast<A>(scale);
      row(2)[c] = static_cast<A>(biases[c] - errors[c] * scale);
    }
  }

  // Adds the coefficients of dx; sums: [sum(dy) (C) | sum(dy xhat) (C)] over all ranks.
  void add_gradient(const double* statistics, const double* sums) {
    double count = at_least_one(statistics[2 * channels_]);
    const double *invstd = statistics + channels_, *weights = channel_values_.data(),
                 *errors = mean_errors();
    for (int64_t c = 0; c < channels_; ++c) {
      double scale = invstd[c] * weights[c], mean_dy = sums[c] / count;
      double slope = invstd[c] * (sums[channels_ + c] / count);
      row(3)[c] = static_cast<A>(-slope * scale);
      row(4)[c] = static_cast<A>((errors[c] * slope - mean_dy) * scale);
    }
  }

  const A* data() const { return values_.data(); }
  const double* mean_errors() const { return channel_values_.data() + 2 * channels_; }

 private:
  A* row(int k) const { return values_.data() + k * channels_; }

  int64_t channels_;
  // Weights, biases, and the rounding errors of the means, [3][C].
  Scratch<double> channel_values_;
  Scratch<A> values_;
};

// Writes [sum(dy) (C) | sum(dy xhat) (C)] from sum(dy) and sum(dy (x - pivot)).
inline void write_gradient_sums(const Sums* sums, const double* mean_errors, const double* invstd,
                                int64_t channels, double* out) {
  for (int64_t c = 0; c < channels; ++c) {
    out[c] = sums[c].first;
    out[channels + c] = (sums[c].second - mean_errors[c] * sums[c].first) * invstd[c];
  }
}

}  // namespace
