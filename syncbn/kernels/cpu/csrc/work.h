// What is worked on: tensors, sums, scratch memory, and the division of work among threads.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <new>

// Every tensor is [batch, channels, space] with samples that are dense: element (n, c, s) is
// data[n * stride + c * space + s]. That is an [N, C, *] that is contiguous, with the product of *
// as space. One that is channels_last has N times the product of * as batch, and 1 as space.
struct Shape {
  int64_t batch, channels, space;
};

// All that is compiled for each instruction set has no name for the linker (simd.h).
namespace {

inline int64_t numel(const Shape& shape) { return shape.batch * shape.channels * shape.space; }

template <class T>
struct Strided {
  T* data;
  int64_t stride;
};

// Two sums over n values: of (x - pivot) and of its square, or of two products that need no pivot.
struct Sums {
  double n = 0, pivot = 0, first = 0, second = 0;
};

// Elements that are worth a thread of their own.
constexpr int64_t GRAIN = 1 << 15;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t at_least(int64_t a, int64_t low) { return a < low ? low : a; }
inline int64_t at_most(int64_t a, int64_t high) { return a > high ? high : a; }

inline int useful_threads(int threads, int64_t numel) {
  return static_cast<int>(at_least(at_most(threads, numel / GRAIN), 1));
}

// Values that are written forwards, before those in front of them (from_the_end).
constexpr int64_t FORWARDS = 1 << 15;

// Uninitialized memory of its own, aligned for vectors.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t size)
      : memory_(std::malloc(sizeof(T) * static_cast<size_t>(size) + ALIGNMENT)) {
    if (memory_ == nullptr) throw std::bad_alloc();
    auto address = (reinterpret_cast<uintptr_t>(memory_) + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    data_ = reinterpret_cast<T*>(address);
  }
  ~Scratch() { std::free(memory_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  T* data() const { return data_; }

 private:
  static constexpr size_t ALIGNMENT = 64;
  void* memory_;
  T* data_;
};

// Call work(i, begin, end) for each of at most `threads` parts of 0...units, each on a thread.
template <class Work>
inline void share(int64_t units, int threads, const Work& work) {
  int parts = static_cast<int>(at_least(at_most(threads, units), 1));
  if (parts == 1) return work(0, int64_t{0}, units);
#pragma omp parallel for num_threads(parts) schedule(static)
  for (int i = 0; i < parts; ++i) work(i, units * i / parts, units * (i + 1) / parts);
}

// Call work(i) for begin...end, for the last of them first: what a sum has read last is in the
// cache still. But for some at a time forwards, as processors read ahead.
template <class Work>
inline void from_the_end(int64_t begin, int64_t end, int64_t together, const Work& work) {
  int64_t step = at_least(together, 1);
  for (int64_t last = end; last > begin; last -= step)
    for (int64_t i = at_least(last - step, begin); i < last; ++i) work(i);
}

// Add sums of other values; the total keeps its pivot, so that sums of squares stay small.
inline void add(Sums& total, const Sums& more, bool around_pivot) {
  if (total.n == 0) {
    total = more;
    return;
  }
  double moved = around_pivot ? more.pivot - total.pivot : 0;
  total.n += more.n;
  total.second += more.second + moved * (2 * more.first + more.n * moved);
  total.first += more.first + more.n * moved;
}

// Whether (mean - pivot)^2 is at most 4 variances, so that the sum of squares around the pivot is
// at most 5 times that around the mean, and no more than a digit is lost. Not, if there is a NaN.
inline bool is_near(double n, double first, double second) {
  double shift = first * first / n;
  return shift <= 4 * (second - shift);
}

// A pivot that is near the mean of values with these sums around the last one, or zero if that is
// not finite: the mean in units of about half a standard deviation. More digits would do harm.
// Values often are of few digits, and then all differences to such a pivot end in the same ones,
// all roundings of their sums go the same way, and a sum of 100 is off by 2e-6 instead of 2e-7.
inline double near_pivot(double pivot, double n, double first, double second) {
  double mean = pivot + first / n, variance = (second - first * first / n) / n;
  if (mean - mean != 0) return 0;
  if (!(variance > 0)) return mean;
  int exponent;
  std::frexp(std::sqrt(variance), &exponent);
  double unit = std::ldexp(0.5, exponent);
  return std::nearbyint(mean / unit) * unit;
}

}  // namespace
