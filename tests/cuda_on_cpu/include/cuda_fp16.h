// IEEE half precision, rounded to nearest even, with subnormals.
#pragma once

#include "cuda_runtime.h"

struct __half_raw {
  unsigned short x;
};

struct __half {
  __half() = default;
  __half(__half_raw raw) : bits_(raw.x) {}
  explicit __half(float value) {
    const unsigned sign = __float_as_uint(value) >> 16 & 0x8000;
    value = std::fabs(value);
    unsigned bits = __float_as_uint(value);
    if (std::isnan(value)) {
      bits = 0x7fff;
    } else if (value >= 65520) {
      bits = 0x7c00;
    } else if (value < 0x1p-14f) {
      bits = __float_as_uint(value + 0.5f) - __float_as_uint(0.5f);  // the sum's unit is the least half, 2^-24
    } else {
      bits = (bits + 0xfff + (bits >> 13 & 1) - (112u << 23)) >> 13;
    }
    bits_ = sign | bits;
  }
  operator float() const {
    const unsigned exponent = bits_ >> 10 & 31, fraction = bits_ & 0x3ff;
    const float magnitude = exponent == 0    ? float(fraction) * 0x1p-24f
                            : exponent == 31 ? __uint_as_float(0x7f800000 | fraction << 13)
                                             : __uint_as_float((exponent + 112) << 23 | fraction << 13);
    return bits_ & 0x8000 ? -magnitude : magnitude;
  }

 private:
  unsigned short bits_;
};

struct alignas(4) __half2 {
  __half x, y;
};

using half = __half;
using half2 = __half2;

inline float __half2float(__half x) { return x; }
inline __half __float2half(float x) { return __half(x); }
inline __half __float2half_rn(float x) { return __half(x); }
inline float2 __half22float2(__half2 v) { return {v.x, v.y}; }
inline __half2 __float22half2_rn(float2 v) { return {__half(v.x), __half(v.y)}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__half(x), __half(y)}; }
inline unsigned short __half_as_ushort(__half x) { return simt_cast<unsigned short>(x); }
inline __half __ushort_as_half(unsigned short x) { return __half_raw{x}; }
