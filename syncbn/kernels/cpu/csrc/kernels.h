// The kernel table: isa_kernels.cpp is compiled once per instruction set, cpu.cpp selects a table.
#pragma once
#include "parallel.h"

enum class Dtype : int64_t { float32, float64, bfloat16, float16 };

// The last operation of a forward pass: names of activations.py, in the order of its NAMES.
enum class ActivationKind : int64_t { identity, relu, relu6, leaky_relu, silu, hardswish, gelu };

// C values, one per channel, or null.
struct ChannelValues {
  void* data;
  Dtype dtype;
};

// A tensor of the call's shape and dtype, or null.
struct Operand {
  void* data;
  int64_t stride;
};

// The arguments of every function, packed by __init__.py. Missing tensors are null.
struct Call {
  // The result of syncbn_level(), or a lower level.
  int64_t level;
  int64_t threads;
  Dtype dtype;
  Shape shape;
  // Elements of the whole tensor; shape may be a slice of its channels.
  int64_t whole_numel;
  Operand x;
  // [mean (C) | invstd (C) | count]
  double* statistics;
  // Dtype of weight, bias and their gradients.
  Dtype parameter_dtype;
  void *weight, *bias;
  ActivationKind activation;
  void *dweight, *dbias;
  // Packed moments, or the sums of the backward pass.
  double* packed;
  // residual or dy
  Operand other;
  // y or dx
  Operand out;
  Dtype running_dtype;
  void *running_mean, *running_var;
  int64_t* num_batches_tracked;
  // A momentum of NaN means 1 / num_batches_tracked.
  double momentum, eps, negative_slope;
};

static_assert(sizeof(Call) == 28 * 8, "_CALL in __init__.py packs 28 numbers of eight bytes");

// Length of packed moments (moments.py): float64 inputs have two-part sums.
static constexpr bool has_two_parts(Dtype dtype) { return dtype == Dtype::float64; }
static constexpr int64_t packed_size(int64_t channels, Dtype dtype) {
  return (has_two_parts(dtype) ? 4 : 2) * channels + 1;
}

// The functions of reference.py. They throw std::bad_alloc. normalize also writes the statistics.
// The last two are for a single rank: pairs of functions without an all-reduce between them.
struct Kernels {
  using Function = void (*)(const Call&);
  Function moments, normalize, backward_reduce, backward_elemt, forward_local, backward_local;
};

extern const Kernels kernels_baseline;
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
