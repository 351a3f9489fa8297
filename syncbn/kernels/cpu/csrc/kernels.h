// What is compiled once for each instruction set (instance.cpp), and chosen from by cpu.cpp.
#pragma once
#include "work.h"

enum class Dtype : int { float32, float64, bfloat16, float16 };

// C numbers, or none.
struct Numbers {
  void* data;
  Dtype dtype;
};

// A tensor of the call's shape and dtype, or none.
struct Operand {
  void* data;
  int64_t stride;
};

// Numbers in packed moments (moments.py): two-part sums for float64 inputs.
static constexpr bool has_two_parts(Dtype dtype) { return dtype == Dtype::float64; }
static constexpr int64_t packed_size(int64_t channels, Dtype dtype) {
  return (has_two_parts(dtype) ? 4 : 2) * channels + 1;
}

// An input, and how it is to be worked on.
struct Input {
  Shape shape;
  Dtype dtype;
  int threads;
  Operand x;
  // Elements of the tensor that it is a part of.
  int64_t whole;
};

// The transform of an input: statistics [mean (C) | invstd (C) | count], weight, bias, and relu.
struct Transform {
  double* statistics;
  Numbers weight, bias;
  bool relu;
};

// Averages to move, or none. A momentum of NaN is 1/tracked.
struct Running {
  Numbers mean, var;
  int64_t* tracked;
  double momentum;
};

// Gradients of weight and bias to write, or none.
struct ParameterGradients {
  Numbers weight, bias;
};

// The functions of reference.py. They throw std::bad_alloc.
struct Kernels {
  void (*moments)(Input, double* message);
  // Writes the statistics of the transform, too.
  void (*normalize)(Input, double* message, double eps, Transform, Operand residual, Operand y,
                    Running);
  void (*backward_reduce)(Input, Transform, Operand dy, double* sums, ParameterGradients);
  void (*backward_elemt)(Input, Transform, const double* sums, Operand dy, Operand dx);
  // The functions above in two, for who has no other rank to wait for.
  void (*forward_local)(Input, double eps, Transform, Operand residual, Operand y, Running);
  void (*backward_local)(Input, Transform, Operand dy, double* sums, ParameterGradients,
                         Operand dx);
};

extern const Kernels kernels_baseline;
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
