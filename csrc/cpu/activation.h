// What stands behind a batch norm: y = f(z), and the gradient of z from that of y.
//
// Results are right to a few units in the last place, of the result or of 1. Where no series is named, constants are those of the
// polynomial with the least largest error in its range.
#pragma once

#include "cpu/simd.h"

namespace moda {
namespace MODA_ISA {

template <class Acc>
MODA_INLINE Vector<Acc> all_lanes_of(Acc value) { return Vector<Acc>{} + value; }

// `value` where the mask is set, else `otherwise`.
template <class Acc>
MODA_INLINE Vector<Acc> choose(Vector<Bits<Acc>> mask, Vector<Acc> value, Vector<Acc> otherwise) {
  return mask ? value : otherwise;
}

// Comparisons with NaN are false, so that NaN stays.
template <class Acc>
MODA_INLINE Vector<Acc> clamped(Vector<Acc> x, Acc least, Acc most) {
  const Vector<Acc> above = choose<Acc>(x < least, all_lanes_of<Acc>(least), x);
  return choose<Acc>(above > most, all_lanes_of<Acc>(most), above);
}

// The polynomial whose coefficients, lowest first, these are.
template <class Acc, size_t count>
MODA_INLINE Vector<Acc> polynomial(Vector<Acc> x, const Acc (&coefficients)[count]) {
  Vector<Acc> sum = all_lanes_of<Acc>(coefficients[count - 1]);
  for (size_t i = count - 1; i-- > 0;) sum = multiply_add<Acc>(sum, x, all_lanes_of(coefficients[i]));
  return sum;
}

// Adding `magic` rounds to an integer, which is then in the low bits; ln 2 in two parts, of which the first times any integer met
// here is exact. (e^r - 1 - r) / r^2 within half of ln 2 of 0.
template <class Acc> struct Exponential;
template <>
struct Exponential<float> {
  static constexpr float least = -104, most = 89, magic = 0x1.8p23F, ln2_high = 0x1.62ep-1F, ln2_low = 0x1.0bfbe8p-15F;
  static constexpr float terms[] = {0.5F, 0.166665763F, 0.0416663736F, 0.00836317614F, 0.00139411155F};
  static constexpr int32_t mantissa = 23, bias = 127;
};
template <>
struct Exponential<double> {
  static constexpr double least = -746, most = 710, magic = 0x1.8p52, ln2_high = 0x1.62e42feep-1, ln2_low = 0x1.a39ef35793c76p-33;
  static constexpr double terms[] = {  // of Taylor's series
      1. / 2, 1. / 6, 1. / 24, 1. / 120, 1. / 720, 1. / 5040, 1. / 40320, 1. / 362880, 1. / 3628800, 1. / 39916800, 1. / 479001600,
      1. / 6227020800};
  static constexpr int64_t mantissa = 52, bias = 1023;
};

// e^x: infinity or 0 beyond what Acc holds.
template <class Acc>
MODA_INLINE Vector<Acc> exponential(Vector<Acc> x) {
  using E = Exponential<Acc>;
  using Integers = Vector<Bits<Acc>>;
  constexpr Acc per_ln2 = Acc(1.44269504088896340736);
  x = clamped<Acc>(x, E::least, E::most);
  const Vector<Acc> shifted = x * per_ln2 + E::magic, count = shifted - E::magic;
  const Vector<Acc> r = (x - count * E::ln2_high) - count * E::ln2_low;
  const Vector<Acc> power = 1 + multiply_add<Acc>(r * r, polynomial<Acc>(r, E::terms), r);
  // 2^count as a product of two, of which each is a normal number.
  const Integers whole = bit_cast<Integers>(shifted) - bit_cast<Bits<Acc>>(Acc(E::magic)), half = whole >> 1;
  const auto power_of_two = [](Integers exponent) { return bit_cast<Vector<Acc>>((exponent + E::bias) << E::mantissa); };
  return power * power_of_two(half) * power_of_two(whole - half);
}

// The share of a standard normal distribution below z, from e^(-z^2 / 2): 1/2 + z p(z^2) where |z| < 1, and beyond, by its smaller side,
// e^(-z^2 / 2) t q(t) with t = 1 / (1 + 0.3 |z|).
MODA_INLINE Vector<float> normal_share(Vector<float> z, Vector<float> bell) {
  constexpr float near[] = {0.398942292F, -0.0664903596F, 0.00997333135F, -0.00118635304F, 0.000113512659F, -7.66467929e-06F};
  constexpr float far[] = {0.120033845F, 0.114747368F, 0.136162996F, 0.011851632F, 0.164721847F, -0.0326866657F, -0.0148848202F};
  const Vector<float> magnitude = absolute<float>(z), t = 1 / (1 + 0.3F * magnitude), smaller_side = bell * t * polynomial<float>(t, far);
  const Vector<float> side = choose<float>(z < 0, smaller_side, 1 - smaller_side);
  return choose<float>(magnitude < 1, multiply_add<float>(z, polynomial<float>(z * z, near), all_lanes_of(0.5F)), side);
}

MODA_INLINE Vector<double> normal_share(Vector<double> z, Vector<double>) {
  for (int64_t i = 0; i < kLanes<double>; ++i) z[i] = 0.5 * __builtin_erfc(z[i] * -0.70710678118654752440);
  return z;
}

template <class Acc>
MODA_INLINE Vector<Acc> bell_curve(Vector<Acc> z) { return exponential<Acc>(Acc(-0.5) * z * z); }

template <class Acc>
MODA_INLINE Vector<Acc> value_at(Activation activation, Vector<Acc> z) {
  switch (activation) {
    case Activation::kRelu: return keep_where<Acc>(~(z <= Acc(0)), z);
    case Activation::kRelu6: return clamped<Acc>(z, 0, 6);
    case Activation::kHardswish: return z * clamped<Acc>(z + 3, 0, 6) / 6;
    case Activation::kSilu: return z / (1 + exponential<Acc>(-z));
    case Activation::kGelu: return z * normal_share(z, bell_curve<Acc>(z));
  }
  return z;
}

// f(z). Functions and no part of the loops: they are long.
[[gnu::noinline, maybe_unused]] static Vector<float> activated(Activation activation, Vector<float> z) {
  return value_at<float>(activation, z);
}
[[gnu::noinline, maybe_unused]] static Vector<double> activated(Activation activation, Vector<double> z) {
  return value_at<double>(activation, z);
}

// f'(z) of the activations that do not rectify.
template <class Acc>
MODA_INLINE Vector<Acc> slope_of(Activation activation, Vector<Acc> z) {
  switch (activation) {
    case Activation::kHardswish:
      return choose<Acc>(z <= Acc(-3), Vector<Acc>{}, choose<Acc>(z < Acc(3), z / 3 + Acc(0.5), all_lanes_of<Acc>(1)));
    case Activation::kSilu: {
      const Vector<Acc> share = 1 / (1 + exponential<Acc>(-z));
      // Where e^-z is infinite the share is 0, and so is its product with any finite z.
      return share * (1 + z * (1 - share));
    }
    case Activation::kGelu: {
      const Vector<Acc> bell = bell_curve<Acc>(z);
      return normal_share(z, bell) + z * (Acc(0.39894228040143267794) * bell);
    }
    case Activation::kRelu: case Activation::kRelu6: break;
  }
  return all_lanes_of<Acc>(1);
}

}  // namespace MODA_ISA
}  // namespace moda
