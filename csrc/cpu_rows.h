// Work on the rows of the layout (N, C, S), as many rows at a time as a vector has lanes.
//
// A row's lanes are added as `sum_lanes` adds them, halves first, but for all those rows together: one shuffle and one addition
// take the place of a row's own. Where rows are short, that is most of the work.
#pragma once

#include "simd.h"

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

// Of a, then of b: blocks of `width` lanes, each first of two joined with the second.
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

template <class Acc, int64_t length, class Get>
MODA_INLINE Vector<Acc> sum_each(Get get) {
  return join_rows<Acc, length>(get, [](Vector<Acc> a, Vector<Acc> b) { return a + b; });
}

// Rows of so many positions are worth taking together; of longer ones the lanes are added once in a long while.
template <class Acc> constexpr int64_t kRowsTogetherBelow = 16 * kLanes<Acc>;

// Whether `sum_rows` takes rows of S positions.
template <class Acc>
MODA_INLINE bool are_summed_together(int64_t S) {
  return S < kRowsTogetherBelow<Acc> && (S >= kLanes<Acc> || (S & (S - 1)) == 0);
}

// A mask of the first lanes of a vector.
template <class Lane>
MODA_INLINE Vector<Bits<Lane>> first_lanes(int64_t count) {
  Vector<Bits<Lane>> lane{};
  for (int64_t i = 0; i < kLanes<Lane>; ++i) lane[i] = static_cast<Bits<Lane>>(i);
  return lane < static_cast<Bits<Lane>>(count);
}

// One row of S >= kLanes positions, down to one vector.
template <class Acc, class Get>
MODA_INLINE Vector<Acc> lanes_of_row(int64_t offset, int64_t S, Get get) {
  constexpr int64_t lanes = kLanes<Acc>;
  Vector<Acc> sum0{}, sum1{};
  int64_t i = 0;
  for (; i + 2 * lanes <= S; i += 2 * lanes) {
    sum0 += get(offset + i);
    sum1 += get(offset + i + lanes);
  }
  if (i + lanes <= S) {
    sum0 += get(offset + i);
    i += lanes;
  }
  // A vector that ends where the row does, but for the lanes that earlier ones have given.
  if (i < S) sum1 += keep_where<Acc>(~first_lanes<Acc>(lanes - (S - i)), get(offset + S - lanes));
  return sum0 + sum1;
}

// Rows shorter than a vector: `count` positions, a power of two.
template <class Acc, int64_t count, class Get, class Get1>
MODA_INLINE void mean_of_short_rows(int64_t begin, int64_t end, Acc* means, Get get, Get1 get1) {
  constexpr int64_t lanes = kLanes<Acc>;
  int64_t row = begin;
  for (; row + lanes <= end; row += lanes) {
    const auto sums = sum_each<Acc, count>([&](int64_t i) { return get(row * count + i * lanes); });
    store_unaligned(means + row, sums / Acc(count));
  }
  for (; row < end; ++row) {  // in the same order
    Acc part[count];
    for (int64_t i = 0; i < count; ++i) part[i] = get1(row * count + i);
    for (int64_t half = count / 2; half > 0; half /= 2) {
      for (int64_t i = 0; i < half; ++i) part[i] += part[i + half];
    }
    means[row] = part[0] / Acc(count);
  }
}

// means[row] = mean of the row's S values, for rows [begin, end); `are_summed_together(S)`. get(offset) gives the vector at an
// offset from the first row's first element, get1(offset) one element; they may be asked twice for the same.
template <class Acc, class Get, class Get1>
MODA_INLINE void mean_of_rows(int64_t begin, int64_t end, int64_t S, Acc* means, Get get, Get1 get1) {
  constexpr int64_t lanes = kLanes<Acc>;
  if (S < lanes) {
    switch (S) {
      case 1: return mean_of_short_rows<Acc, 1>(begin, end, means, get, get1);
      case 2: return mean_of_short_rows<Acc, 2>(begin, end, means, get, get1);
      case 4: return mean_of_short_rows<Acc, 4>(begin, end, means, get, get1);
      default: return mean_of_short_rows<Acc, 8>(begin, end, means, get, get1);
    }
  }
  int64_t row = begin;
  for (; row + lanes <= end; row += lanes) {
    const auto sums = sum_each<Acc, lanes>([&](int64_t i) { return lanes_of_row<Acc>((row + i) * S, S, get); });
    store_unaligned(means + row, sums / Acc(S));
  }
  for (; row < end; ++row) means[row] = sum_lanes<Acc>(lanes_of_row<Acc>(row * S, S, get)) / Acc(S);
}

// Rows shorter than a vector, as in mean_of_short_rows.
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
