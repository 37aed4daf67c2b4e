// Work on the rows of the layout (N, C, S), as many rows at a time as a vector has lanes.
//
// A row's lanes are added as `sum_lanes` adds them, halves first, but for all those rows together: one shuffle and one addition
// take the place of a row's own. Where rows are short, that is most of the work.
#pragma once

#include "cpu/simd.h"

namespace moda {
namespace MODA_ISA {

// Lane i of the result is lane from(i) of a, or lane from(i) - lanes of b.
template <class Acc, class From>
MODA_INLINE Vector<Acc> shuffled(Vector<Acc> a, Vector<Acc> b, From from) {
#if defined(__clang__)
  Vector<Acc> result{};
  for (int64_t i = 0; i < kLanes<Acc>; ++i) result[i] = from(i) < kLanes<Acc> ? a[from(i)] : b[from(i) - kLanes<Acc>];
  return result;
#else
  Vector<Bits<Acc>> order{};
  for (int64_t i = 0; i < kLanes<Acc>; ++i) order[i] = static_cast<Bits<Acc>>(from(i));
  return __builtin_shuffle(a, b, order);
#endif
}

// Splits a, and then b, into blocks of `width` lanes, and joins every first block of two with the second.
template <class Lane, int64_t width, class Join>
MODA_INLINE Vector<Lane> join_neighbours(Vector<Lane> a, Vector<Lane> b, Join join) {
  const auto first = [](int64_t i) { return 2 * (i / width) * width + i % width; };
  return join(shuffled<Lane>(a, b, first), shuffled<Lane>(a, b, [&](int64_t i) { return first(i) + width; }));
}

// kLanes rows of `length` lanes each, a power of two, that lie one after the other in `length` vectors: get(i) gives vector i.
// The lanes of each row, joined, in order of the rows. `count` vectors from `first` on are part of the work.
template <class Lane, int64_t length, int64_t count = length, class Get, class Join>
MODA_INLINE Vector<Lane> join_rows(Get get, Join join, int64_t first = 0) {
  if constexpr (count == 1) {
    return get(first);
  } else {
    const Vector<Lane> a = join_rows<Lane, length, count / 2>(get, join, first);
    const Vector<Lane> b = join_rows<Lane, length, count / 2>(get, join, first + count / 2);
    return join_neighbours<Lane, length / count>(a, b, join);
  }
}

// Rows of so many positions are worth taking together; of longer ones the lanes are joined once in a long while.
template <class Lane> constexpr int64_t kRowsTogetherBelow = 16 * kLanes<Lane>;

// Whether `reduce_rows` takes rows of S positions.
template <class Lane>
MODA_INLINE bool are_reduced_together(int64_t S) {
  return S < kRowsTogetherBelow<Lane> && (S >= kLanes<Lane> || (S & (S - 1)) == 0);
}

// A mask of the first lanes of a vector.
template <class Lane>
MODA_INLINE Vector<Bits<Lane>> first_lanes(int64_t count) {
  Vector<Bits<Lane>> lane{};
  for (int64_t i = 0; i < kLanes<Lane>; ++i) lane[i] = static_cast<Bits<Lane>>(i);
  return lane < static_cast<Bits<Lane>>(count);
}

// One row of S >= kLanes positions, joined down to one vector; joining a zero changes nothing.
template <class Lane, class Get, class Join>
MODA_INLINE Vector<Lane> lanes_of_row(int64_t offset, int64_t S, Get get, Join join) {
  constexpr int64_t lanes = kLanes<Lane>;
  Vector<Lane> even{}, odd{};
  int64_t i = 0;
  for (; i + 2 * lanes <= S; i += 2 * lanes) {
    even = join(even, get(offset + i));
    odd = join(odd, get(offset + i + lanes));
  }
  if (i + lanes <= S) {
    even = join(even, get(offset + i));
    i += lanes;
  }
  // The last vector ends where the row does; its lanes that earlier vectors have given are left out.
  if (i < S) odd = join(odd, keep_where<Lane>(~first_lanes<Lane>(lanes - (S - i)), get(offset + S - lanes)));
  return join(even, odd);
}

// Rows shorter than a vector: `count` positions, a power of two.
template <class Lane, int64_t count, class Get, class Get1, class Join, class Put, class Put1>
MODA_INLINE void reduce_short_rows(int64_t begin, int64_t end, Get get, Get1 get1, Join join, Put put, Put1 put1) {
  constexpr int64_t lanes = kLanes<Lane>;
  int64_t row = begin;
  for (; row + lanes <= end; row += lanes) {
    put(row, join_rows<Lane, count>([&](int64_t i) { return get(row * count + i * lanes); }, join));
  }
  for (; row < end; ++row) {  // in the same order
    Lane part[count];
    for (int64_t i = 0; i < count; ++i) part[i] = get1(row * count + i);
    for (int64_t half = count / 2; half > 0; half /= 2) {
      for (int64_t i = 0; i < half; ++i) part[i] = join(part[i], part[i + half]);
    }
    put1(row, part[0]);
  }
}

// Joins the values of each row of S positions, for rows [begin, end); `are_reduced_together(S)`. get(offset) gives the vector at an
// offset from the first row's first element, get1(offset) one element; they may be asked twice for the same. put(row, results)
// takes those of kLanes rows, put1(row, result) that of one.
template <class Lane, class Get, class Get1, class Join, class Put, class Put1>
MODA_INLINE void reduce_rows(int64_t begin, int64_t end, int64_t S, Get get, Get1 get1, Join join, Put put, Put1 put1) {
  constexpr int64_t lanes = kLanes<Lane>;
  if (S < lanes) {
    switch (S) {
      case 1: return reduce_short_rows<Lane, 1>(begin, end, get, get1, join, put, put1);
      case 2: return reduce_short_rows<Lane, 2>(begin, end, get, get1, join, put, put1);
      case 4: return reduce_short_rows<Lane, 4>(begin, end, get, get1, join, put, put1);
      default: return reduce_short_rows<Lane, 8>(begin, end, get, get1, join, put, put1);
    }
  }
  const auto lanes_of = [&](int64_t row) { return lanes_of_row<Lane>(row * S, S, get, join); };
  int64_t row = begin;
  for (; row + lanes <= end; row += lanes) {
    put(row, join_rows<Lane, lanes>([&](int64_t i) { return lanes_of(row + i); }, join));
  }
  for (; row < end; ++row) put1(row, join_lanes<Lane>(lanes_of(row), join));
}

// means[row] = mean of the row's values; the other arguments are those of `reduce_rows`.
template <class Acc, class Get, class Get1>
MODA_INLINE void mean_of_rows(int64_t begin, int64_t end, int64_t S, Acc* means, Get get, Get1 get1) {
  reduce_rows<Acc>(
      begin, end, S, get, get1, [](auto a, auto b) { return a + b; },
      [&](int64_t row, Vector<Acc> sums) { store_unaligned(means + row, sums / Acc(S)); },
      [&](int64_t row, Acc sum) { means[row] = sum / Acc(S); });
}

// Rows shorter than a vector, as in reduce_short_rows.
template <class Acc, int64_t count, class Put, class Put1>
MODA_INLINE void share_among_short_rows(int64_t begin, int64_t end, const Acc* values, Put put, Put1 put1) {
  constexpr int64_t lanes = kLanes<Acc>;
  int64_t row = begin;
  for (; row + lanes <= end; row += lanes) {
    const Vector<Acc> shares = load_unaligned<Vector<Acc>>(values + row) / Acc(count);
    for (int64_t i = 0; i < count; ++i) {
      put(row * count + i * lanes, shuffled<Acc>(shares, shares, [&](int64_t lane) { return (i * lanes + lane) / count; }));
    }
  }
  for (; row < end; ++row) {
    for (int64_t p = 0; p < count; ++p) put1(row * count + p, values[row] / Acc(count));
  }
}

// Whether `share_among_rows` takes rows of S positions.
template <class Acc>
MODA_INLINE bool are_shared_together(int64_t S) { return S >= kLanes<Acc> || (S & (S - 1)) == 0; }

// Gives every element of rows [begin, end) its share values[row] / S: put(offset, shares of a vector), put1(offset, share);
// `are_shared_together(S)`. Elements may be given twice.
template <class Acc, class Put, class Put1>
MODA_INLINE void share_among_rows(int64_t begin, int64_t end, int64_t S, const Acc* values, Put put, Put1 put1) {
  constexpr int64_t lanes = kLanes<Acc>;
  if (S < lanes) {
    switch (S) {
      case 1: return share_among_short_rows<Acc, 1>(begin, end, values, put, put1);
      case 2: return share_among_short_rows<Acc, 2>(begin, end, values, put, put1);
      case 4: return share_among_short_rows<Acc, 4>(begin, end, values, put, put1);
      default: return share_among_short_rows<Acc, 8>(begin, end, values, put, put1);
    }
  }
  for (int64_t row = begin; row < end; ++row) {
    const Vector<Acc> share = values[row] / Acc(S) - Vector<Acc>{};
    int64_t i = 0;
    for (; i + lanes <= S; i += lanes) put(row * S + i, share);
    if (i < S) put(row * S + S - lanes, share);
  }
}

}  // namespace MODA_ISA
}  // namespace moda
