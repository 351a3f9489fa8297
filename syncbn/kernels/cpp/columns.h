// Loops over columns: where space is 1, as in channels_last and [N, C], or too short for a row.
#pragma once
#include "operations.h"
#include "work.h"

namespace {

// Columns that make a loop over them worth it; narrower samples are taken several at a time, as
// many as fill vectors of this many lanes.
constexpr int64_t NARROWEST_LINE = 64;
constexpr int64_t MOST_LANES = 16;
// Lines that are summed before they are added to the lines before them, which saves traffic with
// the accumulators, and keeps the errors of float32 small.
constexpr int64_t GROUP = 8;
// Values of a block, after which float64 takes over, and limits for its lines.
constexpr int64_t BLOCK = 1 << 15;
constexpr int64_t FEWEST_LINES = 128, MOST_LINES = 512;
// Values whose sums are one unit of work.
constexpr int64_t COLUMN_UNIT = 1 << 16;

// A tensor as a matrix: a line is a sample, or several; column j is of channel j / space %
// channels.
struct Lines {
  Shape shape;
  int64_t together, full, width, rest;

  // several: whether samples follow each other without a gap.
  Lines(Shape s, bool several) : shape(s) {
    int64_t narrow = s.channels * s.space;
    together = 1;
    if (several && narrow < NARROWEST_LINE) {
      together = ceil_div(NARROWEST_LINE, narrow);
      while (narrow * together % MOST_LANES != 0) ++together;
    }
    full = s.batch / together;
    width = narrow * together;
    rest = s.batch % together * narrow;
  }

  int64_t count() const { return full + (rest > 0); }

  template <class T>
  int64_t step(Strided<T> t) const {
    return together * t.stride;
  }
  template <class T>
  T* in(Strided<T> t, int64_t line) const {
    return t.data + line * step(t);
  }

  // Repeat numbers of channels, so that there is one for each column.
  template <class A>
  void spread(const A* values, A* columns) const {
    for (int64_t j = 0; j < width; j += shape.channels * shape.space)
      for (int64_t c = 0; c < shape.channels; ++c)
        for (int64_t i = 0; i < shape.space; ++i) columns[j + c * shape.space + i] = values[c];
  }
};

template <class T>
bool dense(Shape shape, Strided<T> t) {
  return t.stride == shape.channels * shape.space;
}

template <class Op, class T>
class ColumnSums {
  using A = compute_t<T>;
  using V = Vector<A>;
  static constexpr int L = LANES<A>, K = Op::COEFFICIENTS;

 public:
  // coefficients: [K][channels]; none for an operation that chooses its pivot.
  ColumnSums(Shape shape, Strided<const T> x, Strided<const T> dy, const A* coefficients)
      : x_(x),
        dy_(dy),
        lines_(shape, dense(shape, x) && (!Op::HAS_PAIR || dense(shape, dy))),
        padded_(ceil_div(lines_.width, L) * L),
        block_(at_least(at_most(BLOCK / lines_.width, MOST_LINES), FEWEST_LINES)),
        unit_(ceil_div(COLUMN_UNIT / lines_.width, block_) * block_),
        units_(ceil_div(lines_.full, unit_) + (lines_.rest > 0)),
        coefficients_(Op::CHOOSES_PIVOT ? 0 : K * padded_) {
    if constexpr (!Op::CHOOSES_PIVOT)
      for (int k = 0; k < K; ++k)
        lines_.spread(coefficients + k * shape.channels, coefficients_.data() + k * padded_);
  }

  // Write the sums of each channel.
  void run(int threads, Sums* totals) {
    Scratch<double> sums(units_ * SUMS * lines_.width);
    Scratch<A> accumulators(threads * 3 * padded_);
    share(units_, threads, [&](int part, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        sum_unit(unit(i), accumulators.data() + part * 3 * padded_, at(sums, i));
    });
    for (int64_t i = 1; i < units_; ++i) add_unit(at(sums, 0), at(sums, i), unit(i));
    fold(at(sums, 0), totals);
  }

 private:
  // Float64 sums of the columns of a unit, around pivots that stay: three arrays.
  static constexpr int SUMS = 3;
  struct UnitSums {
    double *pivot, *first, *second;
  };
  struct Unit {
    int64_t line, lines, width;
  };

  // The last unit may be one line that is not full.
  Unit unit(int64_t i) const {
    int64_t line = i * unit_;
    if (line < lines_.full) return {line, at_most(unit_, lines_.full - line), lines_.width};
    return {lines_.full, 1, lines_.rest};
  }
  UnitSums at(const Scratch<double>& sums, int64_t i) const {
    double* begin = sums.data() + i * SUMS * lines_.width;
    return {begin, begin + lines_.width, begin + 2 * lines_.width};
  }

  void sum_unit(Unit unit, A* pivot, UnitSums sums) const {
    A *first = pivot + padded_, *second = first + padded_;
    if constexpr (Op::CHOOSES_PIVOT) first_pivots(unit, pivot);
    for (int64_t done = 0; done < unit.lines; done += block_) {
      Unit block{unit.line + done, at_most(block_, unit.lines - done), unit.width};
      sum_block(block, pivot, first, second);
      auto n = static_cast<double>(block.lines);
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
          double moved = p - sums.pivot[j];
          sums.first[j] += a + n * moved;
          sums.second[j] += b + moved * (2 * a + n * moved);
        }
      }
    }
  }

  // A value alone may be padding, far from all others, and means moved later cost a second look.
  void first_pivots(Unit unit, A* pivot) const {
    int64_t lines = at_most(GROUP, unit.lines);
    for (int64_t j = 0; j < unit.width; j += L) {
      V sum{};
      for (int64_t i = 0; i < lines; ++i) sum += load_at(x_, unit.line + i, j, unit.width);
      store(pivot + j, coarse(sum / static_cast<A>(lines)));
    }
  }

  // Move pivots that are far from the means of a block to them; return whether there are any.
  static bool move_pivots(Unit block, double n, A* pivot, const A* first, const A* second) {
    int64_t far = 0;
    for (int64_t j = 0; j < block.width; ++j) far += !is_near(n, first[j], second[j]);
    if (far == 0) return false;
    for (int64_t j = 0; j < block.width; ++j) {
      if (!is_near(n, first[j], second[j]))
        pivot[j] = static_cast<A>(near_pivot(pivot[j], n, first[j], second[j]));
    }
    return true;
  }

  void sum_block(Unit block, const A* pivot, A* first, A* second) const {
    for (int64_t j = 0; j < padded_; ++j) first[j] = second[j] = 0;
    int64_t line = block.line, end = block.line + block.lines;
    // A constant, for the compiler to unroll the loop.
    for (; line + GROUP <= end; line += GROUP) sum_group(line, GROUP, block, pivot, first, second);
    if (line < end) sum_group(line, end - line, block, pivot, first, second);
  }

  inline __attribute__((always_inline)) void sum_group(int64_t line, int64_t lines, Unit block,
                                                       const A* pivot, A* first, A* second) const {
    const T *x = lines_.in(x_, line), *dy = Op::HAS_PAIR ? lines_.in(dy_, line) : x;
    int64_t x_step = lines_.step(x_), dy_step = Op::HAS_PAIR ? lines_.step(dy_) : 0;
    const A* coefficients = Op::CHOOSES_PIVOT ? pivot : coefficients_.data();
    auto sum_columns = [&](int64_t j, auto... part) {
      V c[K], f{}, s{};
      for (int k = 0; k < K; ++k) c[k] = load(coefficients + k * padded_ + j);
      for (int64_t i = 0; i < lines; ++i) {
        V a, b, pair = Op::HAS_PAIR ? load(dy + i * dy_step + j, part...) : V{};
        Op::terms(load(x + i * x_step + j, part...), pair, c, a, b);
        f += a;
        s += b;
      }
      store(first + j, load(first + j) + f);
      store(second + j, load(second + j) + s);
    };
    int64_t j = 0;
    for (; j + L <= block.width; j += L) sum_columns(j);
    if (j < block.width) sum_columns(j, static_cast<int>(block.width - j));
  }

  V load_at(Strided<const T> t, int64_t line, int64_t j, int64_t width) const {
    const T* p = lines_.in(t, line) + j;
    return j + L <= width ? load(p) : load(p, static_cast<int>(width - j));
  }

  static void add_unit(UnitSums total, UnitSums more, Unit unit) {
    auto n = static_cast<double>(unit.lines);
    for (int64_t j = 0; j < unit.width; ++j) {
      double moved = more.pivot[j] - total.pivot[j];
      total.second[j] += more.second[j] + moved * (2 * more.first[j] + n * moved);
      total.first[j] += more.first[j] + n * moved;
    }
  }

  // Add up the columns of each channel.
  void fold(UnitSums sums, Sums* totals) const {
    const Shape& shape = lines_.shape;
    for (int64_t c = 0; c < shape.channels; ++c) totals[c] = Sums{};
    int64_t width = lines_.full > 0 ? lines_.width : lines_.rest;
    for (int64_t j = 0, narrow = shape.channels * shape.space; j < width; ++j) {
      auto n = static_cast<double>(lines_.full + (j < lines_.rest));
      Sums column{n, sums.pivot[j], sums.first[j], sums.second[j]};
      add(totals[j % narrow / shape.space], column, Op::CHOOSES_PIVOT);
    }
  }

  Strided<const T> x_, dy_;
  Lines lines_;
  // Accumulators are whole vectors.
  int64_t padded_, block_, unit_, units_;
  Scratch<A> coefficients_;
};

// The coefficients of a vector of columns.
template <class A, int K>
struct Columns {
  Vector<A> values[K];

  Columns(const A* coefficients, int64_t stride) {
    for (int k = 0; k < K; ++k) values[k] = load(coefficients + k * stride);
  }
};

// Write Op::value of every element.
template <class Op, class T>
void map_columns(Shape shape, Strided<const T> x, Strided<const T> pair, Strided<T> y,
                 const compute_t<T>* coefficients, int threads) {
  using A = compute_t<T>;
  constexpr int L = LANES<A>, K = Op::COEFFICIENTS;
  Lines lines(shape, dense(shape, x) && dense(shape, y) && (!Op::HAS_PAIR || dense(shape, pair)));
  // A vector may begin at the last column.
  int64_t padded = lines.width + L;
  Scratch<A> columns(K * padded);
  for (int k = 0; k < K; ++k)
    lines.spread(coefficients + k * shape.channels, columns.data() + k * padded);
  bool streamed = streams(shape, y, pair, lines.width);
  share(lines.count(), threads, [&](int, int64_t begin, int64_t end) {
    from_the_end(begin, end, FORWARDS / lines.width, [&](int64_t line) {
      const T* from = lines.in(x, line);
      const T* with = Op::HAS_PAIR ? lines.in(pair, line) : from;
      int64_t width = line < lines.full ? lines.width : lines.rest;
      map_run<Op, false>(from, with, lines.in(y, line), width, streamed,
                         [&](int64_t j) { return Columns<A, K>(columns.data() + j, padded); });
    });
    if (streamed) end_of_stream();
  });
}

}  // namespace
