// Polynomials of this library's elementary functions. Written by build_tools/series.py.
#pragma once

#include "beta/portable.h"

namespace dvla_fast {

// (2 atanh(s) - 2s) / s^3 in z = s^2, |s| <= 3 - 2 sqrt 2; error 3.1e-16
DVLA_HD double atanh_series(double x) {
  double sum = 0x1.2b5900de53b32p-3;
  sum = fma_(sum, x, 0x1.39fe51a7c18f9p-3);
  sum = fma_(sum, x, 0x1.7462b51cb66b1p-3);
  sum = fma_(sum, x, 0x1.c71c62e3f11e6p-3);
  sum = fma_(sum, x, 0x1.2492492df281ap-2);
  sum = fma_(sum, x, 0x1.99999999952d7p-2);
  sum = fma_(sum, x, 0x1.5555555555558p-1);
  return sum;
}

// (2 atanh(s) - 2s) / s^3 in z = s^2, |s| <= 3 - 2 sqrt 2; error 1.9e-7
DVLA_HD float atanh_series(float x) {
  float sum = 0x1.2ee6560000000p-2f;
  sum = fma_(sum, x, 0x1.997c2e0000000p-2f);
  sum = fma_(sum, x, 0x1.55555c0000000p-1f);
  return sum;
}

// (exp(r) - 1 - r) / r^2, |r| <= ln 2 / 2; error 1.1e-16
DVLA_HD double exp_series(double x) {
  double sum = 0x1.af38a9b0ec855p-26;
  sum = fma_(sum, x, 0x1.289185613a3d6p-22);
  sum = fma_(sum, x, 0x1.71de0dae63bb3p-19);
  sum = fma_(sum, x, 0x1.a019b90d2ae7ap-16);
  sum = fma_(sum, x, 0x1.a01a01a7c41d5p-13);
  sum = fma_(sum, x, 0x1.6c16c1788bd90p-10);
  sum = fma_(sum, x, 0x1.11111111109b3p-7);
  sum = fma_(sum, x, 0x1.5555555553d63p-5);
  sum = fma_(sum, x, 0x1.5555555555556p-3);
  sum = fma_(sum, x, 0x1.0000000000001p-1);
  return sum;
}

// (sin(t) / t - 1) / t^2 in z = t^2, |t| <= pi/4; error 2.8e-11
template <class T>
DVLA_HD T sin_series(T x) {
  T sum = T(0x1.6dbe0838a06e9p-19);
  sum = fma_(sum, x, T(-0x1.a013a793b98cep-13));
  sum = fma_(sum, x, T(0x1.11110def2e1c9p-7));
  sum = fma_(sum, x, T(-0x1.555555545e0acp-3));
  return sum;
}

// (cos(t) - 1) / t^2 in z = t^2, |t| <= pi/4; error 3.6e-13
template <class T>
DVLA_HD T cos_series(T x) {
  T sum = T(-0x1.2474e1a97d143p-22);
  sum = fma_(sum, x, T(0x1.a01298d866458p-16));
  sum = fma_(sum, x, T(-0x1.6c16bae5ef6d4p-10));
  sum = fma_(sum, x, T(0x1.555555514f774p-5));
  sum = fma_(sum, x, T(-0x1.fffffffffe697p-2));
  return sum;
}

// -(log(1 + t) - t + t^2/2 - t^3/3) / t^4, |t| <= 0.3; error 6.7e-8
template <class T>
DVLA_HD T acceptance_series(T x) {
  T sum = T(-0x1.b3c92d11de6cfp-4);
  sum = fma_(sum, x, T(0x1.de38b66518a64p-4));
  sum = fma_(sum, x, T(-0x1.c36bf91a9f36bp-4));
  sum = fma_(sum, x, T(0x1.fc027864261ddp-4));
  sum = fma_(sum, x, T(-0x1.249ae64d0d90dp-3));
  sum = fma_(sum, x, T(0x1.555ea611eb568p-3));
  sum = fma_(sum, x, T(-0x1.99999361fec56p-3));
  sum = fma_(sum, x, T(0x1.fffff946d3939p-3));
  return sum;
}

// y (lgamma(y) - Stirling's formula) in z = 1/y^2, y >= 8; error 3.1e-15
DVLA_HD double delta_series(double x) {
  double sum = 0x1.9517858f1a5aap-11;
  sum = fma_(sum, x, -0x1.3797f4ede8393p-11);
  sum = fma_(sum, x, 0x1.a0195329980f1p-11);
  sum = fma_(sum, x, -0x1.6c16c15665122p-9);
  sum = fma_(sum, x, 0x1.5555555555477p-4);
  return sum;
}

// y^2 (log y - psi(y) - 1/(2y)) in z = 1/y^2, y >= 8; error 4.7e-16
DVLA_HD double epsilon_series(double x) {
  double sum = -0x1.222dfdb0a8462p-6;
  sum = fma_(sum, x, 0x1.ecc55e0bfae80p-8);
  sum = fma_(sum, x, -0x1.1109888ec96aep-8);
  sum = fma_(sum, x, 0x1.04103a08e759dp-8);
  sum = fma_(sum, x, -0x1.1111110fe066dp-7);
  sum = fma_(sum, x, 0x1.5555555555534p-4);
  return sum;
}

// y^2 (y psi'(y) - 1 - 1/(2y)) in z = 1/y^2, y >= 8; error 6.3e-15
DVLA_HD double trigamma_series(double x) {
  double sum = -0x1.a7460f12073a3p-3;
  sum = fma_(sum, x, 0x1.3322fdb06ee69p-4);
  sum = fma_(sum, x, -0x1.110442dc37ab3p-5);
  sum = fma_(sum, x, 0x1.861849d3fbb09p-6);
  sum = fma_(sum, x, -0x1.1111110d07bfep-5);
  sum = fma_(sum, x, 0x1.5555555555470p-3);
  return sum;
}

}  // namespace dvla_fast
