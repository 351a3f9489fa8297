// The kernel table: isa_kernels.cpp is compiled once per instruction set, cpu.cpp selects a table.
#pragma once
#include "parallel.h"

enum class Dtype : int { float32, float64, bfloat16, float16 };

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

// Length of packed moments (moments.py): float64 inputs have two-part sums.
static constexpr bool has_two_parts(Dtype dtype) { return dtype == Dtype::float64; }
static constexpr int64_t packed_size(int64_t channels, Dtype dtype) {
  return (has_two_parts(dtype) ? 4 : 2) * channels + 1;
}

// An input, and the number of threads to process it with.
struct Input {
  Shape shape;
  Dtype dtype;
  int threads;
  Operand x;
  // Elements of the whole tensor; shape may be a slice of its channels.
  int64_t whole_numel;
};

// Saved for the backward pass: statistics [mean (C) | invstd (C) | count], weight, bias, relu.
struct SavedStats {
  double* statistics;
  ChannelValues weight, bias;
  bool relu;
};

// Running statistics to update, or null. A momentum of NaN means 1 / num_batches_tracked.
struct RunningStats {
  ChannelValues mean, var;
  int64_t* num_batches_tracked;
  double momentum;
};

// Gradients of weight and bias to write, or null.
struct ParameterGradients {
  ChannelValues weight, bias;
};

// The functions of reference.py. They throw std::bad_alloc.
struct Kernels {
  void (*moments)(Input, double* packed);
  // Also writes the statistics of SavedStats.
  void (*normalize)(Input, double* packed, double eps, SavedStats, Operand residual, Operand y,
                    RunningStats);
  void (*backward_reduce)(Input, SavedStats, Operand dy, double* sums, ParameterGradients);
  void (*backward_elemt)(Input, SavedStats, const double* sums, Operand dy, Operand dx);
  // Pairs of the functions above, for a single rank: no all-reduce separates them.
  void (*forward_local)(Input, double eps, SavedStats, Operand residual, Operand y, RunningStats);
  void (*backward_local)(Input, SavedStats, Operand dy, double* sums, ParameterGradients,
                         Operand dx);
};

extern const Kernels kernels_baseline;
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
