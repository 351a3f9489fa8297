// Loops over columns: where space is 1, as in channels_last and [N, C], or too short for a row.
#pragma once
#include "lines.h"
#include "operations.h"
#include "output.h"

namespace {

// Lines that are summed before they are added to the lines before them, which saves traffic with
// the accumulators, and keeps the errors of float32 small.
constexpr int64_t GROUP = 8;
// Values of a block, after which float64 takes over, and limits for its lines.
constexpr int64_t BLOCK = 1 << 15;
constexpr int64_t FEWEST_LINES = 128, MOST_LINES = 512;
// Values whose sums are one unit of work.
constexpr int64_t COLUMN_UNIT = 1 << 16;

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
        unit_(at_least(ceil_div(COLUMN_UNIT / lines_.width, block_), 1) * block_),
        units_(ceil_div(lines_.full, unit_) + (lines_.rest > 0)),
        coefficients_(Op::CHOOSES_PIVOT ? 0 : K * padded_) {
    if constexpr (!Op::CHOOSES_PIVOT)
      for (int k = 0; k < K; ++k)
        lines_.template spread<T>(coefficients + k * shape.channels,
                                  coefficients_.data() + k * padded_, paired(lines_.width));
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
    auto choose = [&](int64_t j, V sum) { store(pivot + j, coarse(sum / static_cast<A>(lines))); };
    auto x = [&](int64_t i, int64_t j) { return lines_.in(x_, unit.line + i) + j; };
    int64_t j = 0;
    for (; j < paired(unit.width); j += 2 * L) {
      V a{}, b{};
      for (int64_t i = 0; i < lines; ++i) {
        Two<T> values = load_two(x(i, j));
        a += values.a;
        b += values.b;
      }
      choose(j, a);
      choose(j + L, b);
    }
    for (; j < unit.width; j += L) {
      int k = static_cast<int>(at_most(L, unit.width - j));
      V sum{};
      for (int64_t i = 0; i < lines; ++i) sum += load(x(i, j), k);
      choose(j, sum);
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
    auto add_to = [](A* sums, V more) { store(sums, load(sums) + more); };
    int64_t j = 0;
    for (; j < paired(block.width); j += 2 * L) {
      Columns<A, K> ca(coefficients + j, padded_), cb(coefficients + j + L, padded_);
      V fa{}, sa{}, fb{}, sb{};
      for (int64_t i = 0; i < lines; ++i) {
        Two<T> values = load_two(x + i * x_step + j), pair{};
        if constexpr (Op::HAS_PAIR) pair = load_two(dy + i * dy_step + j);
        V a, b;
        Op::terms(values.a, pair.a, ca.values, a, b);
        fa += a;
        sa += b;
        Op::terms(values.b, pair.b, cb.values, a, b);
        fb += a;
        sb += b;
      }
      add_to(first + j, fa);
      add_to(second + j, sa);
      add_to(first + j + L, fb);
      add_to(second + j + L, sb);
    }
    auto sum_columns = [&](auto... part) {
      Columns<A, K> c(coefficients + j, padded_);
      V f{}, s{};
      for (int64_t i = 0; i < lines; ++i) {
        V a, b, pair = Op::HAS_PAIR ? load(dy + i * dy_step + j, part...) : V{};
        Op::terms(load(x + i * x_step + j, part...), pair, c.values, a, b);
        f += a;
        s += b;
      }
      add_to(first + j, f);
      add_to(second + j, s);
    };
    for (; j + L <= block.width; j += L) sum_columns();
    if (j < block.width) sum_columns(static_cast<int>(block.width - j));
  }

  int64_t paired(int64_t columns) const { return lines_.template paired<T>(columns); }

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
      int64_t at = column<T>(j, paired(width));
      Sums more{n, sums.pivot[at], sums.first[at], sums.second[at]};
      add(totals[j % narrow / shape.space], more, Op::CHOOSES_PIVOT);
    }
  }

  Strided<const T> x_, dy_;
  Lines lines_;
  // Accumulators are whole vectors.
  int64_t padded_, block_, unit_, units_;
  Scratch<A> coefficients_;
};

// Write Op::value of every element. y has no gaps.
template <class Op, class T>
void map_columns(Shape shape, Strided<const T> x, Strided<const T> pair, Strided<T> y,
                 const compute_t<T>* coefficients, int threads, bool streamed) {
  using A = compute_t<T>;
  constexpr int L = LANES<A>, K = Op::COEFFICIENTS;
  Lines lines(shape, dense(shape, x) && (!Op::HAS_PAIR || dense(shape, pair)));
  int64_t paired = lines.paired<T>(lines.width);
  // A vector may begin at the last column.
  int64_t padded = lines.width + L;
  Scratch<A> columns(K * padded);
  for (int k = 0; k < K; ++k)
    lines.spread<T>(coefficients + k * shape.channels, columns.data() + k * padded, paired);
  // A unit is some lines, or a part of one if it is long.
  int64_t part = at_most(lines.width, SEGMENT), parts = ceil_div(lines.width, part);
  int64_t together = SEGMENT / part;
  int64_t units = ceil_div(lines.count(), together) * parts;
  share(units, threads, [&](int, int64_t begin, int64_t end) {
    Output<T> output(y.data, lines.width, paired, streamed);
    from_the_end(begin, end, FORWARDS / (part * together), [&](int64_t unit) {
      int64_t first = unit / parts * together, j = unit % parts * part, done = 0;
      T *place = lines.in(y, first) + j, *to = output.begin(place);
      for (int64_t i = first; i < at_most(first + together, lines.count()); ++i) {
        int64_t width = at_most(part, (i < lines.full ? lines.width : lines.rest) - j);
        const T* from = lines.in(x, i) + j;
        const T* with = Op::HAS_PAIR ? lines.in(pair, i) + j : from;
        map_run<Op>(from, with, to + done, width, at_most(paired - j, width), output.streamed(),
                    [&](int64_t k) { return Columns<A, K>(columns.data() + j + k, padded); });
        done += width;
      }
      output.end(place, done);
    });
  });
}

}  // namespace
