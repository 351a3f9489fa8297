// A tensor as lines of columns: how columns.h sees it.
#pragma once
#include "simd.h"
#include "work.h"

namespace {

// Columns that make a loop over them worth it; narrower samples are taken several at a time, as
// many as fill vectors of this many lanes.
constexpr int64_t NARROWEST_LINE = 64;
constexpr int64_t MOST_LANES = 16;
// Where column j is, if the first `paired` ones are in the order of two vectors.
template <class T>
int64_t column(int64_t j, int64_t paired) {
  constexpr int64_t TWO = 2 * LANES<compute_t<T>>;
  return j < paired ? j - j % TWO + place<T>(static_cast<int>(j % TWO)) : j;
}

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

  // How many of the first columns are worked on by two vectors. Not if a line may be less than full
  // and its columns would be in another order.
  template <class T>
  int64_t paired(int64_t columns) const {
    constexpr int64_t TWO = 2 * LANES<compute_t<T>>;
    return together > 1 && place<T>(1) != 1 ? 0 : columns / TWO * TWO;
  }
  // Repeat numbers of channels, so that there is one for each column, where its values are.
  template <class T>
  void spread(const compute_t<T>* values, compute_t<T>* columns, int64_t paired) const {
    for (int64_t j = 0; j < width;)
      for (int64_t c = 0; c < shape.channels; ++c)
        for (int64_t i = 0; i < shape.space; ++i) columns[column<T>(j++, paired)] = values[c];
  }
};

template <class T>
bool dense(Shape shape, Strided<T> t) {
  return t.stride == shape.channels * shape.space;
}

// The coefficients of a vector of columns.
template <class A, int K>
struct Columns {
  Vector<A> values[K];

  Columns(const A* coefficients, int64_t stride) {
    for (int k = 0; k < K; ++k) values[k] = load(coefficients + k * stride);
  }
};

}  // namespace
