// Loops over rows: the values of a channel of a sample, where there are enough of them.
#pragma once
#include "operations.h"
#include "output.h"
#include "work.h"

namespace {

// Shorter rows are seen as columns: a vector of AVX-512 would be half empty.
constexpr int64_t SHORTEST_ROW = 16;
constexpr int64_t MOST_CHANNELS = SEGMENT / SHORTEST_ROW;
// Values whose sums are one unit of work.
constexpr int64_t ROW_UNIT = 1 << 16;

template <class A, int K>
struct Broadcast {
  Vector<A> values[K];

  Broadcast(const A* coefficients, int64_t stride) {
    for (int k = 0; k < K; ++k) values[k] = Vector<A>{} + coefficients[k * stride];
  }
};

// Where a piece of a row is: the row of a sample, or a segment of it if rows are long.
struct Piece {
  int64_t sample, begin, size;

  Piece(int64_t piece, int64_t segments, int64_t space)
      : sample(piece / segments),
        begin(piece % segments * SEGMENT),
        size(at_most(SEGMENT, space - begin)) {}

  template <class T>
  T* in(Strided<T> t, int64_t channel, int64_t space) const {
    return t.data + sample * t.stride + channel * space + begin;
  }
};

// Channels whose rows are worked on together, since they lie together: as many as fill a segment.
// Pieces of the first tile come first, of all samples, and then those of the next.
struct Tiles {
  int64_t length, segments, pieces, size, count;

  explicit Tiles(const Shape& shape)
      : length(at_most(shape.space, SEGMENT)),
        segments(ceil_div(shape.space, SEGMENT)),
        pieces(shape.batch * segments),
        size(at_most(at_most(SEGMENT / length, MOST_CHANNELS), shape.channels)),
        count(ceil_div(shape.channels, size)) {}
};

template <class Op, class T>
class RowSums {
  using A = compute_t<T>;
  using V = Vector<A>;
  static constexpr int L = LANES<A>, K = Op::COEFFICIENTS;

 public:
  // coefficients: [K][channels]; none for an operation that chooses its pivot.
  RowSums(Shape shape, Strided<const T> x, Strided<const T> dy, const A* coefficients)
      : shape_(shape),
        x_(x),
        dy_(dy),
        coefficients_(coefficients),
        tiles_(shape),
        block_(SEGMENT / tiles_.length),
        pieces_a_unit_(ceil_div(at_least(ROW_UNIT / (tiles_.size * tiles_.length), 1), block_) *
                       block_),
        parts_(ceil_div(tiles_.pieces, pieces_a_unit_)) {}

  // Write the sums of each channel.
  void run(int threads, Sums* totals) {
    Scratch<Sums> sums(parts_ * shape_.channels);
    share(tiles_.count * parts_, threads, [&](int, int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit) {
        int64_t part = unit % parts_, channel = unit / parts_ * tiles_.size;
        sum_unit(channel, part, sums.data() + part * shape_.channels);
      }
    });
    for (int64_t c = 0; c < shape_.channels; ++c) {
      totals[c] = Sums{};
      for (int64_t part = 0; part < parts_; ++part)
        add(totals[c], sums.data()[part * shape_.channels + c], Op::CHOOSES_PIVOT);
    }
  }

 private:
  // Some pieces of some channels.
  struct Block {
    int64_t channel, channels, piece, pieces;
  };
  struct Accumulators {
    V first[MOST_CHANNELS], second[MOST_CHANNELS];
    A pivot[MOST_CHANNELS];
  };

  void sum_unit(int64_t channel, int64_t part, Sums* sums) const {
    int64_t channels = at_most(tiles_.size, shape_.channels - channel);
    int64_t begin = part * pieces_a_unit_, end = at_most(begin + pieces_a_unit_, tiles_.pieces);
    Accumulators a;
    for (int64_t c = 0; c < channels; ++c) {
      a.pivot[c] = Op::CHOOSES_PIVOT ? first_pivot(channel + c, begin) : A{};
      sums[channel + c] = Sums{};
    }
    for (int64_t piece = begin; piece < end; piece += block_) {
      Block block{channel, channels, piece, at_most(block_, end - piece)};
      sum_block(block, a.pivot, a.first, a.second);
      double n = 0;
      for (int64_t i = 0; i < block.pieces; ++i) n += static_cast<double>(at(piece + i).size);
      for (int64_t c = 0; c < channels; ++c) settle(block, n, c, a, sums[channel + c]);
    }
  }

  // A value alone may be padding, far from all others, and means moved later cost a second look.
  A first_pivot(int64_t channel, int64_t piece) const {
    Piece p = at(piece);
    int k = static_cast<int>(at_most(p.size, L));
    double mean = total(load(p.in(x_, channel, shape_.space), k)) / k;
    return coarse(V{} + static_cast<A>(mean))[0];
  }

  // Add the sums of a block of one channel; look again, from its mean, if the pivot is far from it.
  void settle(Block block, double n, int64_t c, Accumulators& a, Sums& sums) const {
    double first = total(a.first[c]), second = total(a.second[c]);
    if constexpr (Op::CHOOSES_PIVOT) {
      if (!is_near(n, first, second)) {
        a.pivot[c] = static_cast<A>(near_pivot(a.pivot[c], n, first, second));
        V again[2];
        Block channel{block.channel + c, 1, block.piece, block.pieces};
        sum_block(channel, a.pivot + c, again, again + 1);
        first = total(again[0]);
        second = total(again[1]);
      }
    }
    add(sums, Sums{n, a.pivot[c], first, second}, Op::CHOOSES_PIVOT);
  }

  void sum_block(Block block, const A* pivots, V* first, V* second) const {
    for (int64_t c = 0; c < block.channels; ++c) first[c] = second[c] = V{};
    for (int64_t i = 0; i < block.pieces; ++i) {
      Piece piece = at(block.piece + i);
      for (int64_t c = 0; c < block.channels; ++c) {
        int64_t channel = block.channel + c;
        const A* coefficients = Op::CHOOSES_PIVOT ? pivots + c : coefficients_ + channel;
        Broadcast<A, K> broadcast(coefficients, shape_.channels);
        const T* x = piece.in(x_, channel, shape_.space);
        const T* dy = Op::HAS_PAIR ? piece.in(dy_, channel, shape_.space) : x;
        sum_piece(x, dy, piece.size, broadcast.values, first[c], second[c]);
      }
    }
  }

  static void sum_piece(const T* x, const T* dy, int64_t size, const V* c, V& first, V& second) {
    constexpr int PAIRS = 2, STEP = 2 * PAIRS * L;
    V a{}, b{};
    auto add_terms = [&](V x, V dy, V& a, V& b) {
      V p, q;
      Op::terms(x, dy, c, p, q);
      a += p;
      b += q;
    };
    int64_t i = 0;
    if (size >= STEP) {
      V as[2 * PAIRS] = {}, bs[2 * PAIRS] = {};
      for (; i + STEP <= size; i += STEP)
        for (int u = 0; u < PAIRS; ++u) {
          Two<T> values = load_two(x + i + 2 * u * L), gradients{};
          if constexpr (Op::HAS_PAIR) gradients = load_two(dy + i + 2 * u * L);
          add_terms(values.a, gradients.a, as[2 * u], bs[2 * u]);
          add_terms(values.b, gradients.b, as[2 * u + 1], bs[2 * u + 1]);
        }
      a = (as[0] + as[1]) + (as[2] + as[3]);
      b = (bs[0] + bs[1]) + (bs[2] + bs[3]);
    }
    for (; i + L <= size; i += L) add_terms(load(x + i), Op::HAS_PAIR ? load(dy + i) : V{}, a, b);
    // Behind the last value there are pivots, and gradients that are zero: they add nothing.
    if (int k = static_cast<int>(size - i); k > 0)
      add_terms(::first(k, load(x + i, k), c[0]), Op::HAS_PAIR ? load(dy + i, k) : V{}, a, b);
    first += a;
    second += b;
  }

  Piece at(int64_t piece) const { return Piece(piece, tiles_.segments, shape_.space); }

  Shape shape_;
  Strided<const T> x_, dy_;
  const A* coefficients_;
  Tiles tiles_;
  int64_t block_, pieces_a_unit_, parts_;
};

// Write Op::value of every element.
template <class Op, class T>
void map_rows(Shape shape, Strided<const T> x, Strided<const T> pair, Strided<T> y,
              const compute_t<T>* coefficients, int threads, bool streamed) {
  Tiles tiles(shape);
  share(tiles.count * tiles.pieces, threads, [&](int, int64_t begin, int64_t end) {
    Output<T> output(y.data, shape.space, shape.space, streamed);
    from_the_end(begin, end, FORWARDS / (tiles.size * tiles.length), [&](int64_t unit) {
      Piece piece(unit % tiles.pieces, tiles.segments, shape.space);
      int64_t first = unit / tiles.pieces * tiles.size;
      int64_t channels = at_most(tiles.size, shape.channels - first);
      T *place = piece.in(y, first, shape.space), *to = output.begin(place);
      for (int64_t i = 0; i < channels; ++i) {
        int64_t c = first + i;
        Broadcast<compute_t<T>, Op::COEFFICIENTS> same(coefficients + c, shape.channels);
        const T* from = piece.in(x, c, shape.space);
        const T* with = Op::HAS_PAIR ? piece.in(pair, c, shape.space) : from;
        map_run<Op>(from, with, to + i * piece.size, piece.size, piece.size, output.streamed(),
                    [&](int64_t) -> const auto& { return same; });
      }
      output.end(place, channels * piece.size);
    });
  });
}

}  // namespace
