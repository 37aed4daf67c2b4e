// How batch norm's kernels split a layer, and loops over the parts.
//
// Statistics are sums over all samples of one neuron, and normalising reads every element again. A block of neurons is so
// small that its elements of all samples are still in a cache when they are read the second time: 4 KiB a sample, half a megabyte
// of a batch of 128. Where there are too few blocks for the threads, their samples are split into chunks and the two readings become
// two parallel loops. Sums are taken chunk by chunk either way, so that results do not depend on the choice.
#pragma once

#include "cpu/pool.h"

namespace moda {
namespace MODA_ISA {

constexpr int64_t kSegment = 1024;           // elements of a block in one sample
constexpr int64_t kShortSegment = 256;       // blocks are not made shorter for the sake of their number
constexpr int64_t kBlocks = 8;               // wanted of a layer
constexpr int64_t kChunkElements = 1 << 16;  // of a chunk of a block
constexpr int64_t kFlatBelow = 32;           // positions: shorter rows are worked on as one flat array
constexpr int64_t kSegmentsTogether = 64;    // segments added up in the accumulation dtype, before their sums are widened

// Whether the neurons of a position are neighbours in memory.
MODA_INLINE bool has_columns(const Layer& layer) { return layer.layout != Layout::kPositionsLast || layer.positions == 1; }

struct Blocks {
  int64_t neurons;  // of a block; the last may have fewer
  int64_t blocks;
  int64_t samples;  // of a chunk; the last may have fewer
  int64_t chunks;
};

MODA_INLINE Blocks blocks_of(const Layer& layer) {
  const int64_t C = layer.neurons, S = layer.positions;
  Blocks cut{};
  if (has_columns(layer)) {
    cut.neurons = smaller(C, kColumns);
  } else {
    const int64_t most = larger(1, kSegment / S), least = smaller(most, larger(1, kShortSegment / S));
    cut.neurons = smaller(larger(smaller(most, C / kBlocks), least), C);
  }
  cut.blocks = divide_up(C, cut.neurons);
  cut.samples = larger(1, smaller(layer.samples, kChunkElements / (cut.neurons * S)));
  cut.chunks = divide_up(layer.samples, cut.samples);
  return cut;
}

// A block's neurons, and a chunk's samples.
struct Part {
  Range neurons;
  Range samples;
};

MODA_INLINE Range block_neurons(const Layer& layer, const Blocks& cut, int64_t block) {
  return {block * cut.neurons, smaller((block + 1) * cut.neurons, layer.neurons)};
}

MODA_INLINE Part part_of(const Layer& layer, const Blocks& cut, int64_t block, int64_t chunk) {
  return {block_neurons(layer, cut, block), {chunk * cut.samples, smaller((chunk + 1) * cut.samples, layer.samples)}};
}

// Calls begin(block), first(block, chunk) for every chunk of it, finish(block), and second(block, chunk) for every chunk again. The
// chunk that was read last is the first to be read again.
template <class Begin, class First, class Finish, class Second>
MODA_INLINE void in_two_readings(const Layer& layer, const Blocks& cut, int threads, Begin begin, First first, Finish finish,
                                 Second second) {
  if (bytes_of(layer) <= kTaskBytes) threads = 1;
  if (threads == 1 || cut.blocks >= 2 * threads) {
    parallel_for(cut.blocks, threads, [&](int64_t block) {
      begin(block);
      for (int64_t chunk = 0; chunk < cut.chunks; ++chunk) first(block, chunk);
      finish(block);
      for (int64_t chunk = cut.chunks; chunk-- > 0;) second(block, chunk);
    });
    return;
  }
  const int64_t tasks = cut.blocks * cut.chunks;
  parallel_for(cut.blocks, threads, begin);
  parallel_for(tasks, threads, [&](int64_t task) { first(task % cut.blocks, task / cut.blocks); });
  parallel_for(cut.blocks, threads, finish);
  parallel_for(tasks, threads, [&](int64_t task) { second((tasks - 1 - task) % cut.blocks, (tasks - 1 - task) / cut.blocks); });
}

// The largest number that T rounds to 0: half of its least one, as ties go to the even neighbour.
template <class T>
inline constexpr AccOf<T> kRoundsToZero = 0;
template <>
inline constexpr float kRoundsToZero<Half> = 0x1p-25F;
template <>
inline constexpr float kRoundsToZero<Bfloat> = 0x1p-134F;

// Loads and stores of whole vectors, or of single elements, under the same names, so that a loop's body is written once for both.
template <class Acc>
struct Vectors {
  using Value = Vector<Acc>;
  template <class T>
  MODA_INLINE Value load(const T* from) { return Element<T>::load(from); }
  template <class T>
  MODA_INLINE void save(T* to, Value value) { store(to, value); }
  template <bool kPastCaches, class T>
  MODA_INLINE void put(T* to, Value value) {
    if constexpr (kPastCaches) {
      store_past_caches(to, value);
    } else {
      store(to, value);
    }
  }
  // A vector that has the value in every lane that matters, and back.
  MODA_INLINE Value in_lanes(Value value) { return value; }
  MODA_INLINE Value in_lanes(Acc value) { return Value{} + value; }
  MODA_INLINE Value of_lanes(Value value) { return value; }
  // `value` where z is above `bound` or NaN, else 0.
  MODA_INLINE Value where_fires(Value z, Value value, Acc bound = 0) { return keep_where<Acc>(~(z <= bound), value); }
};

template <class Acc>
struct Singles {
  using Value = Acc;
  template <class T>
  MODA_INLINE Value load(const T* from) { return Element<T>::load1(from); }
  template <class T>
  MODA_INLINE void save(T* to, Value value) { Element<T>::store1(to, value); }
  template <bool kPastCaches, class T>
  MODA_INLINE void put(T* to, Value value) { Element<T>::store1(to, value); }
  MODA_INLINE Vector<Acc> in_lanes(Value value) { return Vector<Acc>{} + value; }
  MODA_INLINE Value of_lanes(Vector<Acc> value) { return value[0]; }
  MODA_INLINE Value where_fires(Value z, Value value, Acc bound = 0) { return z <= bound ? Acc(0) : value; }
};

// Calls body(i, Vectors or Singles) for `count` elements.
template <class Acc, class Body>
MODA_INLINE void over_elements(int64_t count, Body body) {
  int64_t i = 0;
  for (; i + kLanes<Acc> <= count; i += kLanes<Acc>) body(i, Vectors<Acc>{});
  for (; i < count; ++i) body(i, Singles<Acc>{});
}

// Calls add(i, keep, first, second) for the vectors of a row of at least kLanes positions, and adds up what it adds to the vectors
// `first` and `second`. The last vector ends where the row does: keep(value) is 0 in lanes that an earlier one has given.
template <class Acc, class Add>
MODA_INLINE void add_row(int64_t S, double& first, double& second, Add add) {
  constexpr int64_t lanes = kLanes<Acc>;
  const auto all_lanes = [](Vector<Acc> value) { return value; };
  for (int64_t begin = 0; begin < S;) {
    const int64_t end = S - begin < kSegment + lanes ? S : begin + kSegment;
    Vector<Acc> first0{}, first1{}, second0{}, second1{};
    int64_t i = begin;
    for (; i + 2 * lanes <= end; i += 2 * lanes) {
      add(i, all_lanes, first0, second0);
      add(i + lanes, all_lanes, first1, second1);
    }
    if (i + lanes <= end) {
      add(i, all_lanes, first0, second0);
      i += lanes;
    }
    if (i < end) {
      const auto fresh = ~first_lanes<Acc>(lanes - (end - i));
      add(end - lanes, [&](Vector<Acc> value) { return keep_where<Acc>(fresh, value); }, first1, second1);
    }
    first += double(sum_lanes<Acc>(first0 + first1));
    second += double(sum_lanes<Acc>(second0 + second1));
    begin = end;
  }
}

// Calls add(n, offset, first, second) for the segments of a part: the neighbouring elements of its neurons, of one sample or of one
// position of it. `add` adds to arrays, element by element; the sums of each neuron's elements are added to those in double.
template <class Acc, class Add>
MODA_INLINE void add_segments(const Layer& layer, const Part& part, double* first, double* second, Add add) {
  const bool columns = has_columns(layer);
  const int64_t C = layer.neurons, S = layer.positions, neurons = part.neurons.end - part.neurons.begin;
  const int64_t each = columns ? 1 : S, elements = neurons * each, segments = columns ? S : 1;
  Acc first_of[kSegment], second_of[kSegment];
  int64_t waiting = 0;
  const auto widen = [&] {
    for (int64_t c = 0; c < neurons; ++c) {
      for (int64_t e = c * each; e < (c + 1) * each; ++e) {
        first[c] += double(first_of[e]);
        second[c] += double(second_of[e]);
      }
    }
    waiting = 0;
  };
  for (int64_t n = part.samples.begin; n < part.samples.end; ++n) {
    for (int64_t p = 0; p < segments; ++p) {
      if (waiting == 0) {
        for (int64_t e = 0; e < elements; ++e) first_of[e] = second_of[e] = 0;
      }
      add(n, columns ? (n * S + p) * C + part.neurons.begin : (n * C + part.neurons.begin) * S, first_of, second_of);
      if (++waiting == kSegmentsTogether) widen();
    }
  }
  if (waiting > 0) widen();
}

// values[e] = of(neuron of element e), for a segment of the neurons.
template <class Acc, class Of>
MODA_INLINE void expand(const Layer& layer, Range neurons, Acc* values, Of of) {
  const int64_t each = has_columns(layer) ? 1 : layer.positions;
  for (int64_t c = neurons.begin; c < neurons.end; ++c) {
    const Acc value = of(c);
    for (int64_t p = 0; p < each; ++p) *values++ = value;
  }
}

}  // namespace MODA_ISA
}  // namespace moda
