// The C interface of the CPU kernels: plain pointers and numbers, so that one build serves every
// version of torch and of Python. parallel.h explains shapes and strides.
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

// The arguments of every function, as bytes: packing them in Python is 10x faster than converting
// as many arguments with ctypes. Missing tensors are null.
struct Call {
  // The result of syncbn_level(), or a lower level.
  int64_t level;
  int64_t threads;
  int64_t dtype, batch, channels, space;
  void* x;
  int64_t x_stride;
  double* statistics;
  // Dtype of weight, bias and their gradients.
  int64_t parameter_dtype;
  void *weight, *bias;
  int64_t relu;
  void *dweight, *dbias;
  // Packed moments, or the sums of the backward pass.
  double* packed;
  // residual or dy
  void* other;
  int64_t other_stride;
  // y or dx
  void* out;
  int64_t out_stride;
  int64_t running_dtype;
  void *running_mean, *running_var;
  int64_t* num_batches_tracked;
  double momentum, eps;

  Input input() const {
    return {{batch, channels, space},
            static_cast<Dtype>(dtype),
            static_cast<int>(threads),
            {x, x_stride},
            batch * channels * space};
  }
  SavedStats saved() const {
    auto type = static_cast<Dtype>(parameter_dtype);
    return {statistics, {weight, type}, {bias, type}, relu != 0};
  }
  ParameterGradients gradients() const {
    auto type = static_cast<Dtype>(parameter_dtype);
    return {{dweight, type}, {dbias, type}};
  }
  Operand second_operand() const { return {other, other_stride}; }
  Operand result() const { return {out, out_stride}; }
  RunningStats running() const {
    auto type = static_cast<Dtype>(running_dtype);
    return {{running_mean, type}, {running_var, type}, num_batches_tracked, momentum};
  }
};

static_assert(sizeof(Call) == 26 * 8, "abi.py packs 26 numbers of eight bytes");

// Returns 0, or 1 if memory could not be allocated.
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

// Hash of the sources and build flags (hatch_build.py).
PUBLIC extern const char syncbn_mark[] = SYNCBN_MARK;

// The highest level that this processor supports: 0 baseline, 1 AVX2, 2 AVX-512.
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
    k.normalize(c.input(), c.packed, c.eps, c.saved(), c.second_operand(), c.result(), c.running());
  });
}

PUBLIC int syncbn_backward_reduce(const char* call) {
  return run(call, [](auto& k, auto& c) {
    k.backward_reduce(c.input(), c.saved(), c.second_operand(), c.packed, c.gradients());
  });
}

PUBLIC int syncbn_backward_elemt(const char* call) {
  return run(call, [](auto& k, auto& c) {
    k.backward_elemt(c.input(), c.saved(), c.packed, c.second_operand(), c.result());
  });
}

PUBLIC int syncbn_forward_local(const char* call) {
  return run(call, [](auto& k, auto& c) {
    k.forward_local(c.input(), c.eps, c.saved(), c.second_operand(), c.result(), c.running());
  });
}

PUBLIC int syncbn_backward_local(const char* call) {
  return run(call, [](auto& k, auto& c) {
    k.backward_local(c.input(), c.saved(), c.second_operand(), c.packed, c.gradients(), c.result());
  });
}
}
