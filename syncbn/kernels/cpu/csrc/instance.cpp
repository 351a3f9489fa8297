// The kernels for one instruction set: that of the compiler's flags. SYNCBN_KERNELS is their name.
#include "alone.h"
#include "channels.h"
#include "columns.h"
#include "rows.h"

namespace {

template <class T>
Strided<T> as(Operand operand) {
  return {static_cast<T*>(operand.data), operand.stride};
}

template <class Op, class T>
void sum(const Input& in, Operand pair, const compute_t<T>* coefficients, Sums* sums) {
  int threads = useful_threads(in.threads, numel(in.shape));
  if (numel(in.shape) == 0)
    for (int64_t c = 0; c < in.shape.channels; ++c) sums[c] = Sums{};
  else if (in.shape.space >= SHORTEST_ROW)
    RowSums<Op, T>(in.shape, as<const T>(in.x), as<const T>(pair), coefficients).run(threads, sums);
  else
    ColumnSums<Op, T>(in.shape, as<const T>(in.x), as<const T>(pair), coefficients)
        .run(threads, sums);
}

template <class Op, class T>
void map(const Input& in, Operand pair, Operand out, const compute_t<T>* coefficients) {
  if (numel(in.shape) == 0) return;
  int threads = useful_threads(in.threads, numel(in.shape));
  bool streamed = in.whole * int64_t{sizeof(T)} >= STREAMED_BYTES && out.data != pair.data;
  auto map_all = in.shape.space >= SHORTEST_ROW ? map_rows<Op, T> : map_columns<Op, T>;
  map_all(in.shape, as<const T>(in.x), as<const T>(pair), as<T>(out), coefficients, threads,
          streamed);
}

void moments(Input in, double* message) {
  Scratch<Sums> sums(in.shape.channels);
  with_type(in.dtype, [&](auto t) { sum<Moments, decltype(t)>(in, {}, nullptr, sums.data()); });
  write_message(sums.data(), in.shape, {message, in.shape.channels, in.dtype});
}

void normalize(Input in, double* message, double eps, Transform transform, Operand residual,
               Operand y, Running running) {
  Packed packed{message, in.shape.channels, in.dtype};
  move_running(packed, running);
  write_statistics(packed, eps, transform.statistics);
  with_type(in.dtype, [&](auto t) {
    using T = decltype(t);
    Coefficients<compute_t<T>> all(transform.statistics, in.shape.channels, transform.weight,
                                   transform.bias);
    bool plus = residual.data != nullptr;
    auto form =
        plus ? transform.relu ? map<Normalize<true, true>, T> : map<Normalize<true, false>, T>
        : transform.relu ? map<Normalize<false, true>, T>
                         : map<Normalize<false, false>, T>;
    form(in, residual, y, all.data());
  });
}

void write_parameter_gradients(const double* sums, int64_t channels, ParameterGradients out) {
  if (out.weight.data != nullptr) write_all(sums + channels, channels, out.weight);
  if (out.bias.data != nullptr) write_all(sums, channels, out.bias);
}

void backward_reduce(Input in, Transform transform, Operand dy, double* out,
                     ParameterGradients gradients) {
  int64_t channels = in.shape.channels;
  Scratch<Sums> sums(channels);
  with_type(in.dtype, [&](auto t) {
    using T = decltype(t);
    Coefficients<compute_t<T>> all(transform.statistics, channels, transform.weight,
                                   transform.bias);
    auto form = transform.relu ? sum<GradientSums<true>, T> : sum<GradientSums<false>, T>;
    form(in, dy, all.data(), sums.data());
    write_gradient_sums(sums.data(), all.rest(), transform.statistics + channels, channels, out);
  });
  write_parameter_gradients(out, channels, gradients);
}

void backward_elemt(Input in, Transform transform, const double* sums, Operand dy, Operand dx) {
  with_type(in.dtype, [&](auto t) {
    using T = decltype(t);
    Coefficients<compute_t<T>> all(transform.statistics, in.shape.channels, transform.weight,
                                   transform.bias);
    all.add_gradient(transform.statistics, sums);
    auto form = transform.relu ? map<InputGradient<true>, T> : map<InputGradient<false>, T>;
    form(in, dy, dx, all.data());
  });
}

void forward_local(Input in, double eps, Transform transform, Operand residual, Operand y,
                   Running running) {
  int64_t channels = in.shape.channels;
  Scratch<double> message(packed_size(channels, in.dtype));
  int parts = has_two_parts(in.dtype) ? 4 : 2;
  Numbers weight = transform.weight, bias = transform.bias;
  each_tile(in, [&](const Tile& tile) {
    int64_t size = packed_size(tile.channels, in.dtype);
    Scratch<double> own(size + tile.numbers());
    double *own_message = own.data(), *own_statistics = own_message + size;
    moments(tile.of(in), own_message);
    Transform part{own_statistics, tile.of(weight), tile.of(bias), transform.relu};
    normalize(tile.of(in), own_message, eps, part, tile.of(residual), tile.of(y), {});
    tile.scatter(own_message, parts, message.data());
    tile.scatter(own_statistics, 2, transform.statistics);
  });
  Packed packed{message.data(), channels, in.dtype};
  packed.count() = transform.statistics[2 * channels] =
      static_cast<double>(in.shape.batch * in.shape.space);
  move_running(packed, running);
}

void backward_local(Input in, Transform transform, Operand dy, double* sums,
                    ParameterGradients gradients, Operand dx) {
  Numbers weight = transform.weight, bias = transform.bias;
  each_tile(in, [&](const Tile& tile) {
    Scratch<double> own(2 * tile.numbers());
    double *own_statistics = own.data(), *own_sums = own_statistics + tile.numbers();
    tile.gather(transform.statistics, own_statistics);
    own_statistics[2 * tile.channels] = transform.statistics[2 * in.shape.channels];
    Transform part{own_statistics, tile.of(weight), tile.of(bias), transform.relu};
    backward_reduce(tile.of(in), part, tile.of(dy), own_sums, {});
    backward_elemt(tile.of(in), part, own_sums, tile.of(dy), tile.of(dx));
    tile.scatter(own_sums, 2, sums);
  });
  write_parameter_gradients(sums, in.shape.channels, gradients);
}

}  // namespace

extern const Kernels SYNCBN_KERNELS = {moments,        normalize,     backward_reduce,
                                       backward_elemt, forward_local, backward_local};
