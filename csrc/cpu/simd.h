// Vectors as wide as the instruction set that this translation unit is compiled for, and elements loaded into them.
//
// Everything lives in a namespace of its own per instruction set, and nothing of the standard library with a body is used: an
// inline function compiled for AVX-512 must never be the copy that the linker keeps for all.
#pragma once

#include <cstring>

#include "types.h"

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#define MODA_X86 1
#else
#define MODA_X86 0
#endif

#ifndef MODA_ISA
#define MODA_ISA portable
#endif

#if defined(__AVX512F__)
#define MODA_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define MODA_VECTOR_BYTES 32
#else
#define MODA_VECTOR_BYTES 16
#endif

#define MODA_INLINE static inline __attribute__((always_inline))

namespace moda {
namespace MODA_ISA {

constexpr int64_t kLine = 64;  // bytes of a cache line

template <class Lane, int64_t lanes>
struct VectorOf {
  typedef Lane type __attribute__((vector_size(lanes * sizeof(Lane))));
};

template <class Lane, int64_t lanes = MODA_VECTOR_BYTES / sizeof(Lane)>
using Vector = typename VectorOf<Lane, lanes>::type;

// Lanes of signed integers as wide as the given lanes; comparisons give all ones for true.
template <class Lane> struct BitsOf;
template <> struct BitsOf<float> { using type = int32_t; };
template <> struct BitsOf<double> { using type = int64_t; };
template <> struct BitsOf<int16_t> { using type = int16_t; };
template <> struct BitsOf<int32_t> { using type = int32_t; };
template <> struct BitsOf<int64_t> { using type = int64_t; };
template <class Lane> using Bits = typename BitsOf<Lane>::type;

template <class Acc> constexpr int64_t kLanes = MODA_VECTOR_BYTES / sizeof(Acc);

struct Half { uint16_t bits; };
struct Bfloat { uint16_t bits; };

template <class To, class From>
MODA_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <class V>
MODA_INLINE V load_unaligned(const void* from) {
  V value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

template <class V>
MODA_INLINE void store_unaligned(void* to, V value) {
  std::memcpy(to, &value, sizeof value);
}

template <class Acc>
MODA_INLINE Vector<Acc> keep_where(Vector<Bits<Acc>> mask, Vector<Acc> value) {
  return bit_cast<Vector<Acc>>(mask & bit_cast<Vector<Bits<Acc>>>(value));
}

template <class Acc>
MODA_INLINE Vector<Acc> absolute(Vector<Acc> value) {
  constexpr Bits<Acc> magnitude = sizeof(Acc) == 4 ? Bits<Acc>(0x7fffffff) : Bits<Acc>(0x7fffffffffffffff);
  return bit_cast<Vector<Acc>>(bit_cast<Vector<Bits<Acc>>>(value) & magnitude);
}

MODA_INLINE Vector<float> absolute(Vector<float> value) { return absolute<float>(value); }
MODA_INLINE Vector<double> absolute(Vector<double> value) { return absolute<double>(value); }
MODA_INLINE float absolute(float value) { return __builtin_fabsf(value); }
MODA_INLINE double absolute(double value) { return __builtin_fabs(value); }

// a * b + c, rounded once where there is an instruction for it.
template <class Acc>
MODA_INLINE Vector<Acc> multiply_add(Vector<Acc> a, Vector<Acc> b, Vector<Acc> c) {
#if defined(__AVX512F__)
  if constexpr (sizeof(Acc) == 4) {
    return bit_cast<Vector<Acc>>(_mm512_fmadd_ps(bit_cast<__m512>(a), bit_cast<__m512>(b), bit_cast<__m512>(c)));
  } else {
    return bit_cast<Vector<Acc>>(_mm512_fmadd_pd(bit_cast<__m512d>(a), bit_cast<__m512d>(b), bit_cast<__m512d>(c)));
  }
#elif defined(__FMA__)
  if constexpr (sizeof(Acc) == 4) {
    return bit_cast<Vector<Acc>>(_mm256_fmadd_ps(bit_cast<__m256>(a), bit_cast<__m256>(b), bit_cast<__m256>(c)));
  } else {
    return bit_cast<Vector<Acc>>(_mm256_fmadd_pd(bit_cast<__m256d>(a), bit_cast<__m256d>(b), bit_cast<__m256d>(c)));
  }
#else
  return a * b + c;
#endif
}

// Joins all lanes, the two halves first, so that the order is that of a tree.
template <class Lane, int64_t count = MODA_VECTOR_BYTES / sizeof(Lane), class Join>
MODA_INLINE Lane join_lanes(Vector<Lane, count> value, Join join) {
  if constexpr (count == 2) {
    return join(Lane(value[0]), Lane(value[1]));
  } else {
    struct Halves {
      Vector<Lane, count / 2> low, high;
    };
    const Halves halves = bit_cast<Halves>(value);
    return join_lanes<Lane, count / 2>(join(halves.low, halves.high), join);
  }
}

template <class Acc>
MODA_INLINE Acc sum_lanes(Vector<Acc> value) {
  return join_lanes<Acc>(value, [](auto a, auto b) { return a + b; });
}

template <class Lane>
MODA_INLINE bool any(Vector<Lane> mask) {
#if defined(__AVX512F__)
  const __m512i bits = bit_cast<__m512i>(mask);
  if constexpr (sizeof(Lane) == 2) return _mm512_movepi16_mask(bits) != 0;
  if constexpr (sizeof(Lane) == 4) return _mm512_movepi32_mask(bits) != 0;
  return _mm512_movepi64_mask(bits) != 0;
#elif defined(__AVX2__)
  const __m256i bits = bit_cast<__m256i>(mask);
  return !_mm256_testz_si256(bits, bits);
#else
  const Vector<int64_t> bits = bit_cast<Vector<int64_t>>(mask);
  return (bits[0] | bits[1]) != 0;
#endif
}

template <class Lane>
MODA_INLINE bool all(Vector<Lane> mask) { return !any<Lane>(~mask); }

// half <-> float by IEEE 754: subnormals, infinities and NaN included, ties to even.
MODA_INLINE float half_to_float(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000u) << 16, exponent = (half >> 10) & 0x1fu, fraction = half & 0x3ffu;
  if (exponent == 0x1f) return bit_cast<float>(sign | 0x7f800000u | (fraction << 13));
  if (exponent != 0) return bit_cast<float>(sign | ((exponent + 112) << 23) | (fraction << 13));
  const float magnitude = float(fraction) * 0x1p-24f;
  return sign ? -magnitude : magnitude;
}

MODA_INLINE uint16_t float_to_half(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return uint16_t(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return uint16_t(sign | 0x7c00u);  // 65520 and more round to infinity
  if (magnitude < 0x38800000u) {  // below 2^-14: adding 2^-1 leaves the subnormal, rounded, in the low bits
    const float shifted = bit_cast<float>(magnitude) + 0.5f;
    return uint16_t(sign | (bit_cast<uint32_t>(shifted) - 0x3f000000u));
  }
  const uint32_t odd = (magnitude >> 13) & 1u;
  return uint16_t(sign | ((magnitude - 0x38000000u + 0xfffu + odd) >> 13));
}

MODA_INLINE float bfloat_to_float(uint16_t bits) { return bit_cast<float>(uint32_t(bits) << 16); }

MODA_INLINE uint16_t float_to_bfloat(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0u;
  return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// How elements of type T are loaded into, and stored from, vectors of their accumulation type.
template <class T>
struct Element {  // float, double
  using Acc = T;
  MODA_INLINE T load1(const T* from) { return *from; }
  MODA_INLINE void store1(T* to, T value) { *to = value; }
  MODA_INLINE Vector<T> load(const T* from) { return load_unaligned<Vector<T>>(from); }
  MODA_INLINE Vector<T> narrow(Vector<T> value) { return value; }
  MODA_INLINE Vector<T> widen(Vector<T> value) { return value; }
};

template <>
struct Element<Bfloat> {
  using Acc = float;
  using Narrow = Vector<uint16_t, kLanes<float>>;
  MODA_INLINE float load1(const Bfloat* from) { return bfloat_to_float(from->bits); }
  MODA_INLINE void store1(Bfloat* to, float value) { to->bits = float_to_bfloat(value); }
  MODA_INLINE Vector<float> load(const Bfloat* from) { return widen(load_unaligned<Narrow>(from)); }
  MODA_INLINE Vector<float> widen(Narrow value) {
    return bit_cast<Vector<float>>(__builtin_convertvector(value, Vector<uint32_t>) << 16);
  }
  MODA_INLINE Narrow narrow(Vector<float> value) {
    const Vector<uint32_t> bits = bit_cast<Vector<uint32_t>>(value);
    const Vector<uint32_t> nan = bit_cast<Vector<uint32_t>>((bits & 0x7fffffffu) > 0x7f800000u);
    const Vector<uint32_t> rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return __builtin_convertvector((nan & 0x7fc0u) | (~nan & rounded), Narrow);
  }
};

template <>
struct Element<Half> {
  using Acc = float;
  using Narrow = Vector<uint16_t, kLanes<float>>;
  MODA_INLINE float load1(const Half* from) { return half_to_float(from->bits); }
  MODA_INLINE void store1(Half* to, float value) { to->bits = float_to_half(value); }
  MODA_INLINE Vector<float> load(const Half* from) { return widen(load_unaligned<Narrow>(from)); }
  MODA_INLINE Vector<float> widen(Narrow value) {
#if defined(__AVX512F__)
    return bit_cast<Vector<float>>(_mm512_cvtph_ps(bit_cast<__m256i>(value)));
#elif defined(__AVX2__)
    return bit_cast<Vector<float>>(_mm256_cvtph_ps(bit_cast<__m128i>(value)));
#else
    Vector<float> wide{};
    for (int64_t i = 0; i < kLanes<float>; ++i) wide[i] = half_to_float(value[i]);
    return wide;
#endif
  }
  MODA_INLINE Narrow narrow(Vector<float> value) {
#if defined(__AVX512F__)
    return bit_cast<Narrow>(_mm512_cvtps_ph(bit_cast<__m512>(value), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__AVX2__)
    return bit_cast<Narrow>(_mm256_cvtps_ph(bit_cast<__m256>(value), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
    Narrow narrowed{};
    for (int64_t i = 0; i < kLanes<float>; ++i) narrowed[i] = float_to_half(value[i]);
    return narrowed;
#endif
  }
};

template <class T> using AccOf = typename Element<T>::Acc;

template <class T>
MODA_INLINE void store(T* to, Vector<AccOf<T>> value) {
  store_unaligned(to, Element<T>::narrow(value));
}

// Stores past the caches; `to` is aligned to the bytes stored. Nobody reads a tensor that is larger than the caches from
// them anyway, and a store that does not first read the line it overwrites saves a third of the traffic.
template <class T>
MODA_INLINE void store_past_caches(T* to, Vector<AccOf<T>> value) {
  const auto narrow = Element<T>::narrow(value);
#if MODA_X86
#if defined(__AVX512F__)
  if constexpr (sizeof narrow == 64) return _mm512_stream_si512(reinterpret_cast<__m512i*>(to), bit_cast<__m512i>(narrow));
#endif
#if defined(__AVX2__)
  if constexpr (sizeof narrow == 32) return _mm256_stream_si256(reinterpret_cast<__m256i*>(to), bit_cast<__m256i>(narrow));
#endif
  if constexpr (sizeof narrow == 16) return _mm_stream_si128(reinterpret_cast<__m128i*>(to), bit_cast<__m128i>(narrow));
  if constexpr (sizeof narrow == 8) return _mm_stream_si64(reinterpret_cast<long long*>(to), bit_cast<long long>(narrow));
#endif
  store_unaligned(to, narrow);
}

// Makes stores past the caches visible to other threads, before they are told that the work is done.
MODA_INLINE void fence_stores() {
#if MODA_X86
  _mm_sfence();
#endif
}

MODA_INLINE bool aligned_to_line(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % kLine == 0; }

constexpr MODA_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr MODA_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr MODA_INLINE int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Calls function(T{}) with the element type of `dtype`.
template <class Function>
MODA_INLINE void with_element(Dtype dtype, Function&& function) {
  switch (dtype) {
    case Dtype::kFloat32: return function(float{});
    case Dtype::kFloat64: return function(double{});
    case Dtype::kFloat16: return function(Half{});
    case Dtype::kBfloat16: return function(Bfloat{});
  }
}

}  // namespace MODA_ISA
}  // namespace moda
