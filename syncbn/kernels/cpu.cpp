// The C interface of the CPU kernels, for cpu.py: plain pointers and numbers, so that one build
// serves every version of torch and of Python. Shapes and strides are explained in cpp/work.h.
//
// Each function returns 0, or 1 if there was no memory. `level` is that of syncbn_level(), or a
// lower one; data_ptr() of tensors that are not there is null.
#include <cstdint>
#include <new>

#include "cpp/kernels.h"

namespace {

#if defined(__x86_64__)
constexpr const Kernels* LEVELS[] = {&kernels_baseline, &kernels_avx2, &kernels_avx512};
#else
constexpr const Kernels* LEVELS[] = {&kernels_baseline};
#endif

template <class Work>
int without_exceptions(const Work& work) {
  try {
    work();
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return 0;
}

}  // namespace

#define PUBLIC __attribute__((visibility("default")))

extern "C" {

// What the library was built from (hatch_build.py).
PUBLIC extern const char syncbn_mark[] = SYNCBN_MARK;

// The best level that this processor has: 0 for what every one has, 1 for AVX2, 2 for AVX-512.
PUBLIC int syncbn_level() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return 2;
  // Every processor with AVX2 and FMA has F16C.
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
  return 0;
}

PUBLIC int syncbn_moments(int level, int threads, Dtype dtype, int64_t batch, int64_t channels,
                          int64_t space, void* x, int64_t x_stride, double* message) {
  return without_exceptions([&] {
    Input in{{batch, channels, space}, dtype, threads, {x, x_stride}, batch * channels * space};
    LEVELS[level]->moments(in, message);
  });
}

PUBLIC int syncbn_normalize(int level, int threads, Dtype dtype, int64_t batch, int64_t channels,
                            int64_t space, void* x, int64_t x_stride, double* statistics,
                            Dtype parameters, void* weight, void* bias, bool relu,
                            const double* message, double eps, void* residual,
                            int64_t residual_stride, void* y, int64_t y_stride, double momentum,
                            Dtype averages, void* mean, void* var, int64_t* tracked) {
  return without_exceptions([&] {
    Input in{{batch, channels, space}, dtype, threads, {x, x_stride}, batch * channels * space};
    Transform transform{statistics, {weight, parameters}, {bias, parameters}, relu};
    Running running{{mean, averages}, {var, averages}, tracked, momentum};
    LEVELS[level]->normalize(in, message, eps, transform, {residual, residual_stride},
                             {y, y_stride}, running);
  });
}

PUBLIC int syncbn_backward_reduce(int level, int threads, Dtype dtype, int64_t batch,
                                  int64_t channels, int64_t space, void* x, int64_t x_stride,
                                  double* statistics, Dtype parameters, void* weight, void* bias,
                                  bool relu, void* dy, int64_t dy_stride, double* sums) {
  return without_exceptions([&] {
    Input in{{batch, channels, space}, dtype, threads, {x, x_stride}, batch * channels * space};
    Transform transform{statistics, {weight, parameters}, {bias, parameters}, relu};
    LEVELS[level]->backward_reduce(in, transform, {dy, dy_stride}, sums);
  });
}

PUBLIC int syncbn_backward_elemt(int level, int threads, Dtype dtype, int64_t batch,
                                 int64_t channels, int64_t space, void* x, int64_t x_stride,
                                 double* statistics, Dtype parameters, void* weight, void* bias,
                                 bool relu, void* dy, int64_t dy_stride, const double* sums,
                                 void* dx, int64_t dx_stride) {
  return without_exceptions([&] {
    Input in{{batch, channels, space}, dtype, threads, {x, x_stride}, batch * channels * space};
    Transform transform{statistics, {weight, parameters}, {bias, parameters}, relu};
    LEVELS[level]->backward_elemt(in, transform, sums, {dy, dy_stride}, {dx, dx_stride});
  });
}

PUBLIC int syncbn_forward_alone(int level, int threads, Dtype dtype, int64_t batch,
                                int64_t channels, int64_t space, void* x, int64_t x_stride,
                                double* statistics, Dtype parameters, void* weight, void* bias,
                                bool relu, double* message, double eps, void* residual,
                                int64_t residual_stride, void* y, int64_t y_stride, double momentum,
                                Dtype averages, void* mean, void* var, int64_t* tracked) {
  return without_exceptions([&] {
    Input in{{batch, channels, space}, dtype, threads, {x, x_stride}, batch * channels * space};
    Transform transform{statistics, {weight, parameters}, {bias, parameters}, relu};
    Running running{{mean, averages}, {var, averages}, tracked, momentum};
    LEVELS[level]->forward_alone(in, message, eps, transform, {residual, residual_stride},
                                 {y, y_stride}, running);
  });
}

PUBLIC int syncbn_backward_alone(int level, int threads, Dtype dtype, int64_t batch,
                                 int64_t channels, int64_t space, void* x, int64_t x_stride,
                                 double* statistics, Dtype parameters, void* weight, void* bias,
                                 bool relu, void* dy, int64_t dy_stride, double* sums, void* dx,
                                 int64_t dx_stride) {
  return without_exceptions([&] {
    Input in{{batch, channels, space}, dtype, threads, {x, x_stride}, batch * channels * space};
    Transform transform{statistics, {weight, parameters}, {bias, parameters}, relu};
    LEVELS[level]->backward_alone(in, transform, {dy, dy_stride}, sums, {dx, dx_stride});
  });
}
}
