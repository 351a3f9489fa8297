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

// Calls a function with a Call, as bytes: packing them in Python is 10x faster than converting as
// many arguments with ctypes. Returns 0, or 1 if memory could not be allocated.
int run(const char* bytes, Kernels::Function Kernels::* function) {
  Call call;
  std::memcpy(&call, bytes, sizeof call);
  try {
    (LEVELS[call.level]->*function)(call);
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

PUBLIC int syncbn_moments(const char* c) { return run(c, &Kernels::moments); }
PUBLIC int syncbn_normalize(const char* c) { return run(c, &Kernels::normalize); }
PUBLIC int syncbn_backward_reduce(const char* c) { return run(c, &Kernels::backward_reduce); }
PUBLIC int syncbn_backward_elemt(const char* c) { return run(c, &Kernels::backward_elemt); }
PUBLIC int syncbn_forward_local(const char* c) { return run(c, &Kernels::forward_local); }
PUBLIC int syncbn_backward_local(const char* c) { return run(c, &Kernels::backward_local); }
}
