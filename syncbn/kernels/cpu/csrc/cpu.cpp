// The C interface of the CPU kernels, for cpu.py: plain pointers and numbers, so that one build
// serves every version of torch and of Python. Shapes and strides are explained in cpp/work.h.
#include <cstdint>
#include <cstring>
#include <new>

#include "kernels.h"

namespace {

#if defined(__x86_64__)
constexpr const Kernels* LEVELS[] = {&kernels_baseline, &kernels_avx2, &kernels_avx512};
#else
constexpr const Kernels* LEVELS[] = {&kernels_baseline};
#endif

// What a function is told: as bytes, which Python packs in a tenth of the time that it takes to
// convert as many arguments. Tensors that are not there are null.
struct Call {
  // That of syncbn_level(), or a lower one.
  int64_t level;
  int64_t threads;
  int64_t dtype, batch, channels, space;
  void* x;
  int64_t x_stride;
  double* statistics;
  // The dtype of weight and bias.
  int64_t parameters;
  void *weight, *bias;
  int64_t relu;
  // Of weight and bias, where they are wanted.
  void *dweight, *dbias;
  // The message, or the sums of the gradient.
  double* packed;
  // A residual, or dy.
  void* pair;
  int64_t pair_stride;
  // y or dx.
  void* out;
  int64_t out_stride;
  // The dtype of the averages.
  int64_t averages;
  void *mean, *var;
  int64_t* tracked;
  double momentum, eps;

  Input input() const {
    return {{batch, channels, space},
            static_cast<Dtype>(dtype),
            static_cast<int>(threads),
            {x, x_stride},
            batch * channels * space};
  }
  Transform transform() const {
    auto type = static_cast<Dtype>(parameters);
    return {statistics, {weight, type}, {bias, type}, relu != 0};
  }
  ParameterGradients gradients() const {
    auto type = static_cast<Dtype>(parameters);
    return {{dweight, type}, {dbias, type}};
  }
  Operand beside() const { return {pair, pair_stride}; }
  Operand result() const { return {out, out_stride}; }
  Running running() const {
    auto type = static_cast<Dtype>(averages);
    return {{mean, type}, {var, type}, tracked, momentum};
  }
};

static_assert(sizeof(Call) == 26 * 8, "cpu_call.py packs 26 numbers of eight bytes");

// Return 0, or 1 if there was no memory.
template <class Work>
int run(const char* bytes, const Work& work) {
  Call call;
  std::memcpy(&call, bytes, sizeof call);
  try {
    work(*LEVELS[call.level], call);
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

PUBLIC int syncbn_moments(const char* call) {
  return run(call, [](auto& k, auto& c) { k.moments(c.input(), c.packed); });
}

PUBLIC int syncbn_normalize(const char* call) {
  return run(call, [](auto& k, auto& c) {
    k.normalize(c.input(), c.packed, c.eps, c.transform(), c.beside(), c.result(), c.running());
  });
}

PUBLIC int syncbn_backward_reduce(const char* call) {
  return run(call, [](auto& k, auto& c) {
    k.backward_reduce(c.input(), c.transform(), c.beside(), c.packed, c.gradients());
  });
}

PUBLIC int syncbn_backward_elemt(const char* call) {
  return run(call, [](auto& k, auto& c) {
    k.backward_elemt(c.input(), c.transform(), c.packed, c.beside(), c.result());
  });
}

PUBLIC int syncbn_forward_local(const char* call) {
  return run(call, [](auto& k, auto& c) {
    k.forward_local(c.input(), c.eps, c.transform(), c.beside(), c.result(), c.running());
  });
}

PUBLIC int syncbn_backward_local(const char* call) {
  return run(call, [](auto& k, auto& c) {
    k.backward_local(c.input(), c.transform(), c.beside(), c.packed, c.gradients(), c.result());
  });
}
}
