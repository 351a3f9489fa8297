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

template <class T, class Op>
void sum(Op op, const Call& call, const compute_t<T>* coefficients, Sums* sums) {
  const Shape& shape = call.shape;
  auto x = as<const T>(call.x), other = as<const T>(call.other);
  int threads = choose_threads(call.threads, numel(shape));
  if (numel(shape) == 0)
    for (int64_t c = 0; c < shape.channels; ++c) sums[c] = Sums{};
  else if (shape.space >= MIN_PLANE)
    ContiguousSums<Op, T>(op, shape, x, other, coefficients).run(threads, sums);
  else
    ChannelsLastSums<Op, T>(op, shape, x, other, coefficients).run(threads, sums);
}

template <class T, class Op>
void map(Op op, const Call& call, const compute_t<T>* coefficients) {
  if (numel(call.shape) == 0) return;
  int threads = choose_threads(call.threads, numel(call.shape));
  bool streamed = call.whole_numel * int64_t{sizeof(T)} >= MIN_STREAMED_BYTES &&
                  call.out.data != call.other.data;
  auto map_all = call.shape.space >= MIN_PLANE ? map_contiguous<Op, T> : map_channels_last<Op, T>;
  map_all(op, call.shape, as<const T>(call.x), as<const T>(call.other), as<T>(call.out),
          coefficients, threads, streamed);
}

// Calls work with the activation of a call.
template <class Work>
void with_activation(const Call& call, const Work& work) {
  switch (call.activation) {
    case ActivationKind::identity: return work(Identity{});
    case ActivationKind::relu: return work(Relu{});
    case ActivationKind::leaky_relu: return work(LeakyRelu{call.negative_slope});
    default: return work(OtherActivation{call.activation});
  }
}

PackedMoments packed_moments(const Call& call) {
  return {call.packed, call.shape.channels, call.dtype};
}

void moments(const Call& call) {
  Scratch<Sums> sums(call.shape.channels);
  with_type(call.dtype, [&](auto t) { sum<decltype(t)>(Moments{}, call, nullptr, sums.data()); });
  pack_moments(sums.data(), call.shape, packed_moments(call));
}

void normalize(const Call& call) {
  update_running_stats(packed_moments(call), call);
  write_statistics(packed_moments(call), call.eps, call.statistics);
  with_type(call.dtype, [&](auto t) {
    using T = decltype(t);
    Coefficients<compute_t<T>> all(call);
    with_activation(call, [&](auto activation) {
      using Activation = decltype(activation);
      if (call.other.data != nullptr)
        map<T>(Normalize<true, Activation>{activation}, call, all.data());
      else
        map<T>(Normalize<false, Activation>{activation}, call, all.data());
    });
  });
}

void write_parameter_gradients(const Call& call) {
  int64_t channels = call.shape.channels;
  write_doubles(call.packed + channels, channels, {call.dweight, call.parameter_dtype});
  write_doubles(call.packed, channels, {call.dbias, call.parameter_dtype});
}

void backward_reduce(const Call& call) {
  int64_t channels = call.shape.channels;
  Scratch<Sums> sums(channels);
  with_type(call.dtype, [&](auto t) {
    using T = decltype(t);
    Coefficients<compute_t<T>> all(call);
    with_activation(call, [&](auto activation) {
      sum<T>(GradientSums<decltype(activation)>{activation}, call, all.data(), sums.data());
    });
    write_gradient_sums(sums.data(), all.mean_errors(), call.statistics + channels, channels,
                        call.packed);
  });
  write_parameter_gradients(call);
}

void backward_elemt(const Call& call) {
  with_type(call.dtype, [&](auto t) {
    using T = decltype(t);
    Coefficients<compute_t<T>> all(call);
    all.add_gradient(call.statistics, call.packed);
    with_activation(call, [&](auto activation) {
      map<T>(InputGradient<decltype(activation)>{activation}, call, all.data());
    });
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

// Returns a call for a range of channels, without per-channel results.
inline Call slice(const Call& call, int64_t first, int64_t channels, int threads) {
  Call tile = call;
  tile.shape.channels = channels;
  tile.threads = threads;
  auto skip = [&](void*& data, int64_t values, Dtype dtype) {
    if (data != nullptr) data = static_cast<char*>(data) + values * size_of(dtype);
  };
  int64_t values = first * call.shape.space;
  skip(tile.x.data, values, call.dtype);
  skip(tile.other.data, values, call.dtype);
  skip(tile.out.data, values, call.dtype);
  skip(tile.weight, first, call.parameter_dtype);
  skip(tile.bias, first, call.parameter_dtype);
  tile.dweight = tile.dbias = tile.running_mean = tile.running_var = nullptr;
  tile.num_batches_tracked = nullptr;
  return tile;
}

// Copies [rows][channels] into columns of [rows][all channels].
inline void scatter(const double* tile, int64_t rows, int64_t channels, double* all,
                    int64_t all_channels) {
  for (int64_t k = 0; k < rows; ++k)
    for (int64_t c = 0; c < channels; ++c) all[k * all_channels + c] = tile[k * channels + c];
}

// Calls work(tile, first channel) for tiles that cover the channels. With enough tiles, each thread
// processes whole tiles. channels_last tensors are one tile: a few columns of every row are read at
// half the speed of whole rows.
template <class Work>
void for_each_tile(const Call& call, const Work& work) {
  const Shape& all = call.shape;
  int64_t channel = at_least(all.batch * all.space * size_of(call.dtype), 1);
  int64_t fit = all.space < MIN_PLANE ? all.channels : TILE_BYTES / channel;
  int64_t size = at_least(at_most(fit, all.channels), 1);
  int64_t tiles = ceil_div(all.channels, size);
  int threads = choose_threads(call.threads, numel(all));
  bool enough = tiles >= threads;
  bool no_memory = false;
  // An exception must not leave a thread.
  parallel_for(tiles, enough ? threads : 1, [&](int, int64_t begin, int64_t end) {
    try {
      for (int64_t i = begin; i < end; ++i) {
        int64_t first = i * size, channels = at_most(size, all.channels - first);
        work(slice(call, first, channels, enough ? 1 : threads), first);
      }
    } catch (const std::bad_alloc&) {
      __atomic_store_n(&no_memory, true, __ATOMIC_RELAXED);
    }
  });
  if (no_memory) throw std::bad_alloc();
}

void forward_local(const Call& call) {
  int64_t channels = call.shape.channels;
  Scratch<double> packed(packed_size(channels, call.dtype));
  for_each_tile(call, [&](Call tile, int64_t first) {
    int64_t own = tile.shape.channels, size = packed_size(own, call.dtype);
    Scratch<double> scratch(size + 2 * own + 1);
    tile.packed = scratch.data();
    tile.statistics = tile.packed + size;
    moments(tile);
    normalize(tile);
    scatter(tile.packed, (size - 1) / own, own, packed.data() + first, channels);
    scatter(tile.statistics, 2, own, call.statistics + first, channels);
  });
  PackedMoments moments{packed.data(), channels, call.dtype};
  moments.count() = call.statistics[2 * channels] =
      static_cast<double>(call.shape.batch * call.shape.space);
  update_running_stats(moments, call);
}

void backward_local(const Call& call) {
  int64_t channels = call.shape.channels;
  for_each_tile(call, [&](Call tile, int64_t first) {
    int64_t own = tile.shape.channels;
    Scratch<double> scratch(4 * own + 1);
    tile.packed = scratch.data();
    tile.statistics = tile.packed + 2 * own;
    for (int64_t c = 0; c < 2 * own; ++c)
      tile.statistics[c] = call.statistics[first + (c < own ? c : channels + c - own)];
    tile.statistics[2 * own] = call.statistics[2 * channels];
    backward_reduce(tile);
    backward_elemt(tile);
    scatter(tile.packed, 2, own, call.packed + first, channels);
  });
  write_parameter_gradients(call);
}

}  // namespace

extern const Kernels SYNCBN_KERNELS = {moments,        normalize,     backward_reduce,
                                       backward_elemt, forward_local, backward_local};
