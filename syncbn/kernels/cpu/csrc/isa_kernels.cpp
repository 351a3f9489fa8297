// The kernels for the instruction set of the compiler's flags; SYNCBN_KERNELS names their table.
#include "channels_last.h"
#include "contiguous.h"
#include "kernels.h"
#include "per_channel.h"

namespace {

template <class T>
Strided<T> as(Operand operand) {
  return {static_cast<T*>(operand.data), operand.stride};
}

template <class Op, class T>
void sum(const Input& in, Operand other, const compute_t<T>* coefficients, Sums* sums) {
  int threads = choose_threads(in.threads, numel(in.shape));
  if (numel(in.shape) == 0)
    for (int64_t c = 0; c < in.shape.channels; ++c) sums[c] = Sums{};
  else if (in.shape.space >= MIN_PLANE)
    ContiguousSums<Op, T>(in.shape, as<const T>(in.x), as<const T>(other), coefficients)
        .run(threads, sums);
  else
    ChannelsLastSums<Op, T>(in.shape, as<const T>(in.x), as<const T>(other), coefficients)
        .run(threads, sums);
}

template <class Op, class T>
void map(const Input& in, Operand other, Operand out, const compute_t<T>* coefficients) {
  if (numel(in.shape) == 0) return;
  int threads = choose_threads(in.threads, numel(in.shape));
  bool streamed =
      in.whole_numel * int64_t{sizeof(T)} >= MIN_STREAMED_BYTES && out.data != other.data;
  auto map_all = in.shape.space >= MIN_PLANE ? map_contiguous<Op, T> : map_channels_last<Op, T>;
  map_all(in.shape, as<const T>(in.x), as<const T>(other), as<T>(out), coefficients, threads,
          streamed);
}

void moments(Input in, double* packed) {
  Scratch<Sums> sums(in.shape.channels);
  with_type(in.dtype, [&](auto t) { sum<Moments, decltype(t)>(in, {}, nullptr, sums.data()); });
  pack_moments(sums.data(), in.shape, {packed, in.shape.channels, in.dtype});
}

void normalize(Input in, double* packed, double eps, SavedStats saved, Operand residual, Operand y,
               RunningStats running) {
  PackedMoments moments{packed, in.shape.channels, in.dtype};
  update_running_stats(moments, running);
  write_statistics(moments, eps, saved.statistics);
  with_type(in.dtype, [&](auto t) {
    using T = decltype(t);
    Coefficients<compute_t<T>> all(saved.statistics, in.shape.channels, saved.weight, saved.bias);
    bool adds = residual.data != nullptr;
    auto map_all = adds
                       ? saved.relu ? map<Normalize<true, true>, T> : map<Normalize<true, false>, T>
                   : saved.relu ? map<Normalize<false, true>, T>
                                : map<Normalize<false, false>, T>;
    map_all(in, residual, y, all.data());
  });
}

void write_parameter_gradients(const double* sums, int64_t channels, ParameterGradients out) {
  if (out.weight.data != nullptr) write_doubles(sums + channels, channels, out.weight);
  if (out.bias.data != nullptr) write_doubles(sums, channels, out.bias);
}

void backward_reduce(Input in, SavedStats saved, Operand dy, double* out,
                     ParameterGradients gradients) {
  int64_t channels = in.shape.channels;
  Scratch<Sums> sums(channels);
  with_type(in.dtype, [&](auto t) {
    using T = decltype(t);
    Coefficients<compute_t<T>> all(saved.statistics, channels, saved.weight, saved.bias);
    auto sum_all = saved.relu ? sum<GradientSums<true>, T> : sum<GradientSums<false>, T>;
    sum_all(in, dy, all.data(), sums.data());
    write_gradient_sums(sums.data(), all.mean_errors(), saved.statistics + channels, channels, out);
  });
  write_parameter_gradients(out, channels, gradients);
}

void backward_elemt(Input in, SavedStats saved, const double* sums, Operand dy, Operand dx) {
  with_type(in.dtype, [&](auto t) {
    using T = decltype(t);
    Coefficients<compute_t<T>> all(saved.statistics, in.shape.channels, saved.weight, saved.bias);
    all.add_gradient(saved.statistics, sums);
    auto map_all = saved.relu ? map<InputGradient<true>, T> : map<InputGradient<false>, T>;
    map_all(in, dy, dx, all.data());
  });
}

// --- a single rank: both passes over a few channels, then the next ones. The values of a tile stay
// in the second-level cache between the passes, so memory is read once. ---

// Bytes of a tile's input that fit in the cache together with a gradient and an output.
constexpr int64_t TILE_BYTES = 1 << 18;

inline int64_t size_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::float32: return 4;
    case Dtype::float64: return 8;
    case Dtype::bfloat16:
    case Dtype::float16: break;
  }
  return 2;
}

// A range of the channels of a tensor.
struct ChannelTile {
  int64_t first, channels;
  Shape all;
  int64_t bytes;
  int threads;

  // Length of packed statistics: two per channel, and a count.
  int64_t statistics_size() const { return 2 * channels + 1; }

  Input slice(const Input& in) const {
    return {{all.batch, channels, all.space}, in.dtype, threads, slice(in.x), in.whole_numel};
  }
  Operand slice(Operand t) const {
    if (t.data == nullptr) return t;
    return {static_cast<char*>(t.data) + first * all.space * bytes, t.stride};
  }
  ChannelValues slice(ChannelValues t) const {
    if (t.data == nullptr) return t;
    return {static_cast<char*>(t.data) + first * size_of(t.dtype), t.dtype};
  }
  // Copies [rows][tile channels] into [rows][all channels].
  void scatter(const double* own, int rows, double* packed) const {
    for (int k = 0; k < rows; ++k)
      for (int64_t c = 0; c < channels; ++c)
        packed[k * all.channels + first + c] = own[k * channels + c];
  }
  void gather(const double* packed, double* own) const {
    for (int64_t c = 0; c < channels; ++c) {
      own[c] = packed[first + c];
      own[channels + c] = packed[all.channels + first + c];
    }
  }
};

// Calls work for tiles that cover the channels. With enough tiles, each thread processes whole
// tiles. channels_last tensors are one tile: a few columns of every row are read at half the speed
// of whole rows.
template <class Work>
void for_each_tile(const Input& in, const Work& work) {
  const Shape& all = in.shape;
  int64_t bytes = size_of(in.dtype), channel = at_least(all.batch * all.space * bytes, 1);
  int64_t fit = all.space < MIN_PLANE ? all.channels : TILE_BYTES / channel;
  int64_t size = at_least(at_most(fit, all.channels), 1);
  int64_t tiles = ceil_div(all.channels, size);
  int threads = choose_threads(in.threads, numel(all));
  bool enough = tiles >= threads;
  bool no_memory = false;
  // An exception must not leave a thread.
  parallel_for(tiles, enough ? threads : 1, [&](int, int64_t begin, int64_t end) {
    try {
      for (int64_t i = begin; i < end; ++i) {
        int64_t first = i * size, count = at_most(size, all.channels - first);
        work(ChannelTile{first, count, all, bytes, enough ? 1 : threads});
      }
    } catch (const std::bad_alloc&) {
      __atomic_store_n(&no_memory, true, __ATOMIC_RELAXED);
    }
  });
  if (no_memory) throw std::bad_alloc();
}

void forward_local(Input in, double eps, SavedStats saved, Operand residual, Operand y,
                   RunningStats running) {
  int64_t channels = in.shape.channels;
  Scratch<double> packed(packed_size(channels, in.dtype));
  int parts = has_two_parts(in.dtype) ? 4 : 2;
  ChannelValues weight = saved.weight, bias = saved.bias;
  for_each_tile(in, [&](const ChannelTile& tile) {
    int64_t size = packed_size(tile.channels, in.dtype);
    Scratch<double> own(size + tile.statistics_size());
    double *own_packed = own.data(), *own_statistics = own_packed + size;
    moments(tile.slice(in), own_packed);
    SavedStats own_saved{own_statistics, tile.slice(weight), tile.slice(bias), saved.relu};
    normalize(tile.slice(in), own_packed, eps, own_saved, tile.slice(residual), tile.slice(y), {});
    tile.scatter(own_packed, parts, packed.data());
    tile.scatter(own_statistics, 2, saved.statistics);
  });
  PackedMoments moments{packed.data(), channels, in.dtype};
  moments.count() = saved.statistics[2 * channels] =
      static_cast<double>(in.shape.batch * in.shape.space);
  update_running_stats(moments, running);
}

void backward_local(Input in, SavedStats saved, Operand dy, double* sums,
                    ParameterGradients gradients, Operand dx) {
  ChannelValues weight = saved.weight, bias = saved.bias;
  for_each_tile(in, [&](const ChannelTile& tile) {
    Scratch<double> own(2 * tile.statistics_size());
    double *own_statistics = own.data(), *own_sums = own_statistics + tile.statistics_size();
    tile.gather(saved.statistics, own_statistics);
    own_statistics[2 * tile.channels] = saved.statistics[2 * in.shape.channels];
    SavedStats own_saved{own_statistics, tile.slice(weight), tile.slice(bias), saved.relu};
    backward_reduce(tile.slice(in), own_saved, tile.slice(dy), own_sums, {});
    backward_elemt(tile.slice(in), own_saved, own_sums, tile.slice(dy), tile.slice(dx));
    tile.scatter(own_sums, 2, sums);
  });
  write_parameter_gradients(sums, in.shape.channels, gradients);
}

}  // namespace

extern const Kernels SYNCBN_KERNELS = {moments,        normalize,     backward_reduce,
                                       backward_elemt, forward_local, backward_local};
