// Tensor shapes, scratch memory, threads, and sums around a pivot.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <new>

// Every tensor is [batch, channels, space] with dense samples: element (n, c, s) is
// data[n * stride + c * space + s]. For a contiguous [N, C, *], space is the product of *. For a
// channels_last tensor, batch is N times the product of *, and space is 1.
struct Shape {
  int64_t batch, channels, space;
};

// Code that is compiled once per instruction set has no linker symbols (simd.h).
namespace {

inline int64_t numel(const Shape& shape) { return shape.batch * shape.channels * shape.space; }

template <class T>
struct Strided {
  T* data;
  int64_t stride;
};

template <class T>
bool is_dense(Shape shape, Strided<T> t) {
  return t.stride == shape.channels * shape.space;
}

// Two sums over n values: of (x - pivot) and its square, or of two products that need no pivot.
struct Sums {
  double n = 0, pivot = 0, first = 0, second = 0;
};

// Elements that justify one more thread.
constexpr int64_t GRAIN_SIZE = 1 << 15;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t at_least(int64_t a, int64_t low) { return a < low ? low : a; }
inline int64_t at_most(int64_t a, int64_t high) { return a > high ? high : a; }

inline int choose_threads(int64_t threads, int64_t numel) {
  return static_cast<int>(at_least(at_most(threads, numel / GRAIN_SIZE), 1));
}

// Values of one chunk of for_each_from_end.
constexpr int64_t CHUNK = 1 << 15;

// Uninitialized memory, aligned for vectors.
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

// Calls work(i, begin, end) for at most `threads` parts of 0...units, each part on one thread.
template <class Work>
inline void parallel_for(int64_t units, int threads, const Work& work) {
  int parts = static_cast<int>(at_least(at_most(threads, units), 1));
  if (parts == 1) return work(0, int64_t{0}, units);
#pragma omp parallel for num_threads(parts) schedule(static)
  for (int i = 0; i < parts; ++i) work(i, units * i / parts, units * (i + 1) / parts);
}

// Calls work(i) for begin...end in chunks, the last chunk first: the values that a reduction read
// last are still in the cache. Each chunk runs forwards, because processors prefetch forwards.
template <class Work>
inline void for_each_from_end(int64_t begin, int64_t end, int64_t chunk, const Work& work) {
  int64_t step = at_least(chunk, 1);
  for (int64_t last = end; last > begin; last -= step)
    for (int64_t i = at_least(last - step, begin); i < last; ++i) work(i);
}

// Adds the sums of other values. The total keeps its pivot, so that sums of squares stay small.
inline void add(Sums& total, const Sums& more, bool around_pivot) {
  if (total.n == 0) {
    total = more;
    return;
  }
  double shift = around_pivot ? more.pivot - total.pivot : 0;
  total.n += more.n;
  total.second += more.second + shift * (2 * more.first + more.n * shift);
  total.first += more.first + more.n * shift;
}

// True if (mean - pivot)^2 <= 4 variances: the sum of squares around the pivot is then at most 5
// times the one around the mean, and no more than a digit is lost. False for NaN.
inline bool is_pivot_near(double n, double first, double second) {
  double shift = first * first / n;
  return shift <= 4 * (second - shift);
}

// Returns a pivot near the mean of values with these sums around the last pivot: the mean in units
// of about half a standard deviation, or zero if it is not finite. More digits would do harm.
// Values often have few digits; all differences to a precise pivot then end in the same digits,
// all roundings go the same way, and a sum of 100 values is off by 2e-6 instead of 2e-7.
inline double choose_pivot(double pivot, double n, double first, double second) {
  double mean = pivot + first / n, variance = (second - first * first / n) / n;
  if (mean - mean != 0) return 0;
  if (!(variance > 0)) return mean;
  int exponent;
  std::frexp(std::sqrt(variance), &exponent);
  double unit = std::ldexp(0.5, exponent);
  return std::nearbyint(mean / unit) * unit;
}

}  // namespace
