// Loops over planes: the adjacent values of one channel of one sample, in contiguous tensors.
#pragma once
#include "functors.h"

namespace {

// channels_last.h takes smaller planes: they would leave an AVX-512 vector half empty.
constexpr int64_t MIN_PLANE = 16;
constexpr int64_t MAX_CHANNELS = SEGMENT / MIN_PLANE;
// Values of one unit of work of a reduction.
constexpr int64_t CONTIGUOUS_UNIT = 1 << 16;

// A plane, or a segment of a long one.
struct Segment {
  int64_t sample, begin, size;

  Segment(int64_t i, int64_t segments_per_plane, int64_t space)
      : sample(i / segments_per_plane),
        begin(i % segments_per_plane * SEGMENT),
        size(at_most(SEGMENT, space - begin)) {}

  template <class T>
  T* address(Strided<T> t, int64_t channel, int64_t space) const {
    return t.data + sample * t.stride + channel * space + begin;
  }
};

// Blocks of channels whose adjacent planes are processed together: as many as fill a segment. Units
// are numbered block by block: the segments of all samples of the first block, then of the next.
struct Blocking {
  int64_t segment_size, segments_per_plane, segments, channels, count;

  explicit Blocking(const Shape& shape)
      : segment_size(at_most(shape.space, SEGMENT)),
        segments_per_plane(ceil_div(shape.space, SEGMENT)),
        segments(shape.batch * segments_per_plane),
        channels(at_most(at_most(SEGMENT / segment_size, MAX_CHANNELS), shape.channels)),
        count(ceil_div(shape.channels, channels)) {}

  // Values of one segment of a block.
  int64_t values() const { return channels * segment_size; }
};

template <class Op, class T>
class ContiguousSums {
  using A = compute_t<T>;
  using V = Vector<A>;
  static constexpr int L = LANES<A>, K = Op::COEFFICIENTS;

 public:
  // coefficients: [K][channels]; null for a functor that chooses its pivot.
  ContiguousSums(Op op, Shape shape, Strided<const T> x, Strided<const T> dy, const A* coefficients)
      : op_(op),
        shape_(shape),
        x_(x),
        dy_(dy),
        coefficients_(coefficients),
        blocking_(shape),
        block_segments_(SEGMENT / blocking_.segment_size),
        unit_segments_(
            ceil_div(at_least(CONTIGUOUS_UNIT / blocking_.values(), 1), block_segments_) *
            block_segments_),
        units_(ceil_div(blocking_.segments, unit_segments_)) {}

  // Writes the sums of each channel.
  void run(int threads, Sums* totals) {
    Scratch<Sums> sums(units_ * shape_.channels);
    parallel_for(blocking_.count * units_, threads, [&](int, int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit) {
        int64_t part = unit % units_, channel = unit / units_ * blocking_.channels;
        sum_unit(channel, part, sums.data() + part * shape_.channels);
      }
    });
    for (int64_t c = 0; c < shape_.channels; ++c) {
      totals[c] = Sums{};
      for (int64_t part = 0; part < units_; ++part)
        add(totals[c], sums.data()[part * shape_.channels + c], Op::CHOOSES_PIVOT);
    }
  }

 private:
  // A range of segments of a range of channels.
  struct Block {
    int64_t channel, channels, segment, segments;
  };
  struct Accumulators {
    V first[MAX_CHANNELS], second[MAX_CHANNELS];
    A pivot[MAX_CHANNELS];
  };

  void sum_unit(int64_t channel, int64_t part, Sums* sums) const {
    int64_t channels = at_most(blocking_.channels, shape_.channels - channel);
    int64_t begin = part * unit_segments_,
            end = at_most(begin + unit_segments_, blocking_.segments);
    Accumulators a;
    for (int64_t c = 0; c < channels; ++c) {
      a.pivot[c] = Op::CHOOSES_PIVOT ? initial_pivot(channel + c, begin) : A{};
      sums[channel + c] = Sums{};
    }
    for (int64_t segment = begin; segment < end; segment += block_segments_) {
      Block block{channel, channels, segment, at_most(block_segments_, end - segment)};
      sum_block(block, a.pivot, a.first, a.second);
      double n = 0;
      for (int64_t i = 0; i < block.segments; ++i) n += static_cast<double>(at(segment + i).size);
      for (int64_t c = 0; c < channels; ++c) add_block(block, n, c, a, sums[channel + c]);
    }
  }

  // The mean of a vector: a single value may be padding, far from all the rest, and a pivot that
  // moves later costs a second read.
  A initial_pivot(int64_t channel, int64_t segment) const {
    Segment p = at(segment);
    int k = static_cast<int>(at_most(p.size, L));
    double mean = total(load(p.address(x_, channel, shape_.space), k)) / k;
    return coarse(V{} + static_cast<A>(mean))[0];
  }

  // Adds the sums of a block of one channel, recomputed around its mean if the pivot is far from
  // it.
  void add_block(Block block, double n, int64_t c, Accumulators& a, Sums& sums) const {
    double first = total(a.first[c]), second = total(a.second[c]);
    if constexpr (Op::CHOOSES_PIVOT) {
      if (!is_pivot_near(n, first, second)) {
        a.pivot[c] = static_cast<A>(choose_pivot(a.pivot[c], n, first, second));
        V recomputed[2];
        Block channel{block.channel + c, 1, block.segment, block.segments};
        sum_block(channel, a.pivot + c, recomputed, recomputed + 1);
        first = total(recomputed[0]);
        second = total(recomputed[1]);
      }
    }
    add(sums, Sums{n, a.pivot[c], first, second}, Op::CHOOSES_PIVOT);
  }

  void sum_block(Block block, const A* pivots, V* first, V* second) const {
    for (int64_t c = 0; c < block.channels; ++c) first[c] = second[c] = V{};
    for (int64_t i = 0; i < block.segments; ++i) {
      Segment segment = at(block.segment + i);
      for (int64_t c = 0; c < block.channels; ++c) {
        int64_t channel = block.channel + c;
        const A* coefficients = Op::CHOOSES_PIVOT ? pivots + c : coefficients_ + channel;
        PerChannel<A, K> broadcast(coefficients, shape_.channels);
        const T* x = segment.address(x_, channel, shape_.space);
        const T* dy = Op::IS_BINARY ? segment.address(dy_, channel, shape_.space) : x;
        sum_segment(x, dy, segment.size, broadcast.values, first[c], second[c]);
      }
    }
  }

  void sum_segment(const T* x, const T* dy, int64_t size, const V* c, V& first, V& second) const {
    constexpr int PAIRS = 2, STEP = 2 * PAIRS * L;
    V a{}, b{};
    auto add_terms = [&](V x, V dy, V& a, V& b) {
      V p, q;
      op_.terms(x, dy, c, p, q);
      a += p;
      b += q;
    };
    int64_t i = 0;
    if (size >= STEP) {
      V as[2 * PAIRS] = {}, bs[2 * PAIRS] = {};
      for (; i + STEP <= size; i += STEP)
        for (int u = 0; u < PAIRS; ++u) {
          VectorPair<T> values = load_pair(x + i + 2 * u * L), gradients{};
          if constexpr (Op::IS_BINARY) gradients = load_pair(dy + i + 2 * u * L);
          add_terms(values.a, gradients.a, as[2 * u], bs[2 * u]);
          add_terms(values.b, gradients.b, as[2 * u + 1], bs[2 * u + 1]);
        }
      a = (as[0] + as[1]) + (as[2] + as[3]);
      b = (bs[0] + bs[1]) + (bs[2] + bs[3]);
    }
    for (; i + L <= size; i += L) add_terms(load(x + i), Op::IS_BINARY ? load(dy + i) : V{}, a, b);
    // The lanes behind the last value hold pivots and zero gradients, which add nothing.
    if (int k = static_cast<int>(size - i); k > 0)
      add_terms(::first(k, load(x + i, k), c[0]), Op::IS_BINARY ? load(dy + i, k) : V{}, a, b);
    first += a;
    second += b;
  }

  Segment at(int64_t i) const { return Segment(i, blocking_.segments_per_plane, shape_.space); }

  Op op_;
  Shape shape_;
  Strided<const T> x_, dy_;
  const A* coefficients_;
  Blocking blocking_;
  int64_t block_segments_, unit_segments_, units_;
};

// Writes op.value() of every element.
template <class Op, class T>
void map_contiguous(Op op, Shape shape, Strided<const T> x, Strided<const T> other, Strided<T> y,
                    const compute_t<T>* coefficients, int threads, bool streamed) {
  Blocking blocking(shape);
  parallel_for(blocking.count * blocking.segments, threads, [&](int, int64_t begin, int64_t end) {
    StreamingStore<T> output(y.data, shape.space, shape.space, streamed);
    for_each_from_end(begin, end, CHUNK / blocking.values(), [&](int64_t unit) {
      Segment segment(unit % blocking.segments, blocking.segments_per_plane, shape.space);
      int64_t first = unit / blocking.segments * blocking.channels;
      int64_t channels = at_most(blocking.channels, shape.channels - first);
      T *destination = segment.address(y, first, shape.space), *to = output.begin(destination);
      for (int64_t i = 0; i < channels; ++i) {
        int64_t c = first + i;
        PerChannel<compute_t<T>, Op::COEFFICIENTS> same(coefficients + c, shape.channels);
        const T* from = segment.address(x, c, shape.space);
        const T* with = Op::IS_BINARY ? segment.address(other, c, shape.space) : from;
        map_elements(op, from, with, to + i * segment.size, segment.size, segment.size,
                     output.streams_runs(), [&](int64_t) -> const auto& { return same; });
      }
      output.end(destination, channels * segment.size);
    });
  });
}

}  // namespace
