// Loops over rows, the channels of a sample: channels_last and [N, C] tensors, and small planes.
#pragma once
#include "functors.h"

namespace {

// Rows this wide make a loop over columns worth it. Narrower samples form rows of several samples,
// as many as fill vectors of MAX_LANES.
constexpr int64_t MIN_WIDTH = 64, MAX_LANES = 16;
// Rows summed before they are added to the accumulators: fewer memory accesses, smaller errors.
constexpr int64_t GROUP = 8;
// Values of a block, whose float32 sums are then added in float64, and limits for its rows.
constexpr int64_t BLOCK = 1 << 15, MIN_BLOCK_ROWS = 128, MAX_BLOCK_ROWS = 512;
// Values of one unit of work of a reduction.
constexpr int64_t CHANNELS_LAST_UNIT = 1 << 16;

// A tensor as a matrix: a row is one sample or several; column j has channel j / space % channels.
struct Rows {
  Shape shape;
  int64_t samples, full, width, partial_width;

  // joins: whether a row may have several samples; they must be adjacent.
  Rows(Shape s, bool joins) : shape(s) {
    int64_t narrow = s.channels * s.space;
    samples = 1;
    if (joins && narrow < MIN_WIDTH) {
      samples = ceil_div(MIN_WIDTH, narrow);
      while (narrow * samples % MAX_LANES != 0) ++samples;
    }
    full = s.batch / samples;
    width = narrow * samples;
    partial_width = s.batch % samples * narrow;
  }

  int64_t count() const { return full + (partial_width > 0); }

  template <class T>
  int64_t stride(Strided<T> t) const {
    return samples * t.stride;
  }
  template <class T>
  T* address(Strided<T> t, int64_t row) const {
    return t.data + row * stride(t);
  }

  // Number of leading columns that are processed by vector pairs. None if a partial row could
  // have another order of columns.
  template <class T>
  int64_t interleaved(int64_t columns) const {
    constexpr int64_t TWO = 2 * LANES<compute_t<T>>;
    return samples > 1 && pair_lane<T>(1) != 1 ? 0 : columns / TWO * TWO;
  }
  // Repeats per-channel values for every column, in the order of the columns.
  template <class T>
  void expand(const compute_t<T>* values, compute_t<T>* columns, int64_t interleaved) const {
    for (int64_t j = 0; j < width;)
      for (int64_t c = 0; c < shape.channels; ++c)
        for (int64_t i = 0; i < shape.space; ++i)
          columns[position<T>(j++, interleaved)] = values[c];
  }
};

template <class Op, class T>
class ChannelsLastSums {
  using A = compute_t<T>;
  using V = Vector<A>;
  static constexpr int L = LANES<A>, K = Op::COEFFICIENTS;

 public:
  // coefficients: [K][channels]; null for a functor that chooses its pivot.
  ChannelsLastSums(Op op, Shape shape, Strided<const T> x, Strided<const T> dy,
                   const A* coefficients)
      : op_(op),
        x_(x),
        dy_(dy),
        rows_(shape, is_dense(shape, x) && (!Op::IS_BINARY || is_dense(shape, dy))),
        padded_(ceil_div(rows_.width, L) * L),
        block_rows_(at_least(at_most(BLOCK / rows_.width, MAX_BLOCK_ROWS), MIN_BLOCK_ROWS)),
        unit_rows_(at_least(ceil_div(CHANNELS_LAST_UNIT / rows_.width, block_rows_), 1) *
                   block_rows_),
        units_(ceil_div(rows_.full, unit_rows_) + (rows_.partial_width > 0)),
        coefficients_(Op::CHOOSES_PIVOT ? 0 : K * padded_) {
    if constexpr (!Op::CHOOSES_PIVOT)
      for (int k = 0; k < K; ++k)
        rows_.template expand<T>(coefficients + k * shape.channels,
                                 coefficients_.data() + k * padded_, interleaved(rows_.width));
  }

  // Writes the sums of each channel.
  void run(int threads, Sums* totals) {
    Scratch<double> sums(units_ * SUMS * rows_.width);
    Scratch<A> accumulators(threads * 3 * padded_);
    parallel_for(units_, threads, [&](int part, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        sum_unit(unit(i), accumulators.data() + part * 3 * padded_, at(sums, i));
    });
    for (int64_t i = 1; i < units_; ++i) add_unit(at(sums, 0), at(sums, i), unit(i));
    reduce_columns(at(sums, 0), totals);
  }

 private:
  // Float64 sums of the columns of a unit, around fixed pivots: three arrays.
  static constexpr int SUMS = 3;
  struct UnitSums {
    double *pivot, *first, *second;
  };
  struct Unit {
    int64_t row, rows, width;
  };

  // The last unit may be a partial row.
  Unit unit(int64_t i) const {
    int64_t row = i * unit_rows_;
    if (row < rows_.full) return {row, at_most(unit_rows_, rows_.full - row), rows_.width};
    return {rows_.full, 1, rows_.partial_width};
  }
  UnitSums at(const Scratch<double>& sums, int64_t i) const {
    double* begin = sums.data() + i * SUMS * rows_.width;
    return {begin, begin + rows_.width, begin + 2 * rows_.width};
  }

  void sum_unit(Unit unit, A* pivot, UnitSums sums) const {
    A *first = pivot + padded_, *second = first + padded_;
    if constexpr (Op::CHOOSES_PIVOT) initial_pivots(unit, pivot);
    for (int64_t done = 0; done < unit.rows; done += block_rows_) {
      Unit block{unit.row + done, at_most(block_rows_, unit.rows - done), unit.width};
      sum_block(block, pivot, first, second);
      auto n = static_cast<double>(block.rows);
      if constexpr (Op::CHOOSES_PIVOT) {
        if (move_pivots(block, n, pivot, first, second)) sum_block(block, pivot, first, second);
      }
      for (int64_t j = 0; j < unit.width; ++j) {
        double p = Op::CHOOSES_PIVOT ? pivot[j] : 0, a = first[j], b = second[j];
        if (done == 0) {
          sums.pivot[j] = p;
          sums.first[j] = a;
          sums.second[j] = b;
        } else {
          double shift = p - sums.pivot[j];
          sums.first[j] += a + n * shift;
          sums.second[j] += b + shift * (2 * a + n * shift);
        }
      }
    }
  }

  // The mean of a few rows: a single value may be padding, far from all the rest, and a pivot that
  // moves later costs a second read.
  void initial_pivots(Unit unit, A* pivot) const {
    int64_t rows = at_most(GROUP, unit.rows);
    auto choose = [&](int64_t j, V sum) { store(pivot + j, coarse(sum / static_cast<A>(rows))); };
    auto x = [&](int64_t i, int64_t j) { return rows_.address(x_, unit.row + i) + j; };
    int64_t j = 0;
    for (; j < interleaved(unit.width); j += 2 * L) {
      V a{}, b{};
      for (int64_t i = 0; i < rows; ++i) {
        VectorPair<T> values = load_pair(x(i, j));
        a += values.a;
        b += values.b;
      }
      choose(j, a);
      choose(j + L, b);
    }
    for (; j < unit.width; j += L) {
      int k = static_cast<int>(at_most(L, unit.width - j));
      V sum{};
      for (int64_t i = 0; i < rows; ++i) sum += load(x(i, j), k);
      choose(j, sum);
    }
  }

  // Moves pivots that are far from the means of a block; returns whether any has moved.
  static bool move_pivots(Unit block, double n, A* pivot, const A* first, const A* second) {
    int64_t far = 0;
    for (int64_t j = 0; j < block.width; ++j) far += !is_pivot_near(n, first[j], second[j]);
    if (far == 0) return false;
    for (int64_t j = 0; j < block.width; ++j) {
      if (!is_pivot_near(n, first[j], second[j]))
        pivot[j] = static_cast<A>(choose_pivot(pivot[j], n, first[j], second[j]));
    }
    return true;
  }

  void sum_block(Unit block, const A* pivot, A* first, A* second) const {
    for (int64_t j = 0; j < padded_; ++j) first[j] = second[j] = 0;
    int64_t row = block.row, end = block.row + block.rows;
    // A constant lets the compiler unroll the loop.
    for (; row + GROUP <= end; row += GROUP) sum_group(row, GROUP, block, pivot, first, second);
    if (row < end) sum_group(row, end - row, block, pivot, first, second);
  }

  inline __attribute__((always_inline)) void sum_group(int64_t row, int64_t rows, Unit block,
                                                       const A* pivot, A* first, A* second) const {
    const T *x = rows_.address(x_, row), *dy = Op::IS_BINARY ? rows_.address(dy_, row) : x;
    int64_t x_step = rows_.stride(x_), dy_step = Op::IS_BINARY ? rows_.stride(dy_) : 0;
    const A* coefficients = Op::CHOOSES_PIVOT ? pivot : coefficients_.data();
    auto add_to = [](A* sums, V more) { store(sums, load(sums) + more); };
    int64_t j = 0;
    for (; j < interleaved(block.width); j += 2 * L) {
      PerColumn<A, K> ca(coefficients + j, padded_), cb(coefficients + j + L, padded_);
      V fa{}, sa{}, fb{}, sb{};
      for (int64_t i = 0; i < rows; ++i) {
        VectorPair<T> values = load_pair(x + i * x_step + j), other{};
        if constexpr (Op::IS_BINARY) other = load_pair(dy + i * dy_step + j);
        V a, b;
        op_.terms(values.a, other.a, ca.values, a, b);
        fa += a;
        sa += b;
        op_.terms(values.b, other.b, cb.values, a, b);
        fb += a;
        sb += b;
      }
      add_to(first + j, fa);
      add_to(second + j, sa);
      add_to(first + j + L, fb);
      add_to(second + j + L, sb);
    }
    auto sum_columns = [&](auto... part) {
      PerColumn<A, K> c(coefficients + j, padded_);
      V f{}, s{};
      for (int64_t i = 0; i < rows; ++i) {
        V a, b, other = Op::IS_BINARY ? load(dy + i * dy_step + j, part...) : V{};
        op_.terms(load(x + i * x_step + j, part...), other, c.values, a, b);
        f += a;
        s += b;
      }
      add_to(first + j, f);
      add_to(second + j, s);
    };
    for (; j + L <= block.width; j += L) sum_columns();
    if (j < block.width) sum_columns(static_cast<int>(block.width - j));
  }

  int64_t interleaved(int64_t columns) const { return rows_.template interleaved<T>(columns); }

  static void add_unit(UnitSums total, UnitSums more, Unit unit) {
    auto n = static_cast<double>(unit.rows);
    for (int64_t j = 0; j < unit.width; ++j) {
      double shift = more.pivot[j] - total.pivot[j];
      total.second[j] += more.second[j] + shift * (2 * more.first[j] + n * shift);
      total.first[j] += more.first[j] + n * shift;
    }
  }

  // Adds up the columns of each channel.
  void reduce_columns(UnitSums sums, Sums* totals) const {
    const Shape& shape = rows_.shape;
    for (int64_t c = 0; c < shape.channels; ++c) totals[c] = Sums{};
    int64_t width = rows_.full > 0 ? rows_.width : rows_.partial_width;
    for (int64_t j = 0, narrow = shape.channels * shape.space; j < width; ++j) {
      auto n = static_cast<double>(rows_.full + (j < rows_.partial_width));
      int64_t at = position<T>(j, interleaved(width));
      Sums more{n, sums.pivot[at], sums.first[at], sums.second[at]};
      add(totals[j % narrow / shape.space], more, Op::CHOOSES_PIVOT);
    }
  }

  Op op_;
  Strided<const T> x_, dy_;
  Rows rows_;
  int64_t padded_, block_rows_, unit_rows_, units_;  // padded_: a width in whole vectors
  Scratch<A> coefficients_;
};

// Writes op.value() of every element of a dense y.
template <class Op, class T>
void map_channels_last(Op op, Shape shape, Strided<const T> x, Strided<const T> other, Strided<T> y,
                       const compute_t<T>* coefficients, int threads, bool streamed) {
  using A = compute_t<T>;
  constexpr int L = LANES<A>, K = Op::COEFFICIENTS;
  Rows rows(shape, is_dense(shape, x) && (!Op::IS_BINARY || is_dense(shape, other)));
  int64_t interleaved = rows.interleaved<T>(rows.width);
  // A vector may start at the last column.
  int64_t padded = rows.width + L;
  Scratch<A> columns(K * padded);
  for (int k = 0; k < K; ++k)
    rows.expand<T>(coefficients + k * shape.channels, columns.data() + k * padded, interleaved);
  // A unit is several rows, or a part of a long one.
  int64_t part = at_most(rows.width, SEGMENT), parts = ceil_div(rows.width, part);
  int64_t unit_rows = SEGMENT / part, units = ceil_div(rows.count(), unit_rows) * parts;
  parallel_for(units, threads, [&](int, int64_t begin, int64_t end) {
    StreamingStore<T> output(y.data, rows.width, interleaved, streamed);
    for_each_from_end(begin, end, CHUNK / (part * unit_rows), [&](int64_t unit) {
      int64_t first = unit / parts * unit_rows, j = unit % parts * part, done = 0;
      T *destination = rows.address(y, first) + j, *to = output.begin(destination);
      for (int64_t i = first; i < at_most(first + unit_rows, rows.count()); ++i) {
        int64_t width = at_most(part, (i < rows.full ? rows.width : rows.partial_width) - j);
        const T* from = rows.address(x, i) + j;
        const T* with = Op::IS_BINARY ? rows.address(other, i) + j : from;
        map_elements(op, from, with, to + done, width, at_most(interleaved - j, width),
                     output.streams_runs(),
                     [&](int64_t k) { return PerColumn<A, K>(columns.data() + j + k, padded); });
        done += width;
      }
      output.end(destination, done);
    });
  });
}

}  // namespace
