// Vectors of the compiler's own (GCC and Clang), as wide as AT_FUSED_VECTOR_BYTES: no intrinsics, any processor.
// Included inside an instruction set's anonymous namespace.

using VecF = float __attribute__((vector_size(AT_FUSED_VECTOR_BYTES)));
using VecI = int32_t __attribute__((vector_size(AT_FUSED_VECTOR_BYTES)));
using VecU = uint32_t __attribute__((vector_size(AT_FUSED_VECTOR_BYTES)));
using VecU16 = uint16_t __attribute__((vector_size(AT_FUSED_VECTOR_BYTES / 2)));
using VecD = double __attribute__((vector_size(AT_FUSED_VECTOR_BYTES)));
using VecL = int64_t __attribute__((vector_size(AT_FUSED_VECTOR_BYTES)));

struct Bf16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <class V>
struct Traits;
template <>
struct Traits<VecF> {
  using Scalar = float;
  using Mask = VecI;
  static constexpr int32_t magnitude_bits = 0x7fffffff;
};
template <>
struct Traits<VecD> {
  using Scalar = double;
  using Mask = VecL;
  static constexpr int64_t magnitude_bits = 0x7fffffffffffffff;
};

// The vector in which a feature's elements are accumulated.
template <class T>
struct Accumulator {
  using V = VecF;
};
template <>
struct Accumulator<double> {
  using V = VecD;
};

template <class V>
constexpr int lanes = sizeof(V) / sizeof(typename Traits<V>::Scalar);

template <class V>
using Mask = typename Traits<V>::Mask;

template <class V>
V splat(double value) {
  return V{} + static_cast<typename Traits<V>::Scalar>(value);
}

// `yes` in the lanes whose mask is all ones, `no` where it is zero.
template <class M, class V>
V select(M mask, V yes, V no) {
  return (V)((mask & (M)yes) | (~mask & (M)no));
}

template <class V>
V magnitude(V x) {
  return (V)((Mask<V>)x & Traits<V>::magnitude_bits);
}

// -1, 0 or 1.
template <class V>
V sign(V x) {
  const V one = splat<V>(1);
  return (V)((Mask<V>)one & (Mask<V>)(x > 0)) - (V)((Mask<V>)one & (Mask<V>)(x < 0));
}

// --- element types ---

inline VecF load(const float* x) {
  VecF v;
  std::memcpy(&v, x, sizeof v);
  return v;
}

inline VecD load(const double* x) {
  VecD v;
  std::memcpy(&v, x, sizeof v);
  return v;
}

inline VecU load_u16(const void* x) {
  VecU16 v;
  std::memcpy(&v, x, sizeof v);
  return __builtin_convertvector(v, VecU);
}

inline VecF load(const Bf16* x) { return (VecF)(load_u16(x) << 16); }

inline VecF load(const Half* x) {
  const VecU h = load_u16(x), exponent = h & 0x7c00, mantissa = h & 0x03ff;
  const VecU rebias = select(exponent == 0x7c00, VecU{} + 0x70000000, VecU{} + 0x38000000);
  const VecU normal = ((h & 0x7fff) << 13) + rebias;
  const VecU subnormal = (VecU)(__builtin_convertvector((VecI)mantissa, VecF) * 0x1p-24f);
  return (VecF)(select(exponent == 0, subnormal, normal) | ((h & 0x8000) << 16));
}

inline void store(float* y, VecF v) { std::memcpy(y, &v, sizeof v); }
inline void store(double* y, VecD v) { std::memcpy(y, &v, sizeof v); }

inline void store_u16(void* y, VecU v) {
  const VecU16 narrow = __builtin_convertvector(v, VecU16);
  std::memcpy(y, &narrow, sizeof narrow);
}

// Both narrow to the nearest, ties to even.
inline void store(Bf16* y, VecF v) {
  const VecU bits = (VecU)v, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  store_u16(y, select(v != v, VecU{} + 0x7fc0, rounded));
}

inline void store(Half* y, VecF v) {
  const VecU bits = (VecU)v, absolute = bits & 0x7fffffff;
  const VecU normal = (absolute - (112u << 23) + 0xfff + ((absolute >> 13) & 1)) >> 13;
  // Adding 0.5 lets the processor round to a multiple of 2^-24, the spacing of subnormal halves.
  const VecU subnormal = (VecU)((VecF)absolute + 0.5f) - 0x3f000000;
  VecU half = select(absolute < 0x38800000, subnormal, normal);
  half = select(absolute >= 0x477ff000, VecU{} + 0x7c00, half);  // 65520 and more round to infinity
  half = select(absolute > 0x7f800000, VecU{} + 0x7e00, half);
  store_u16(y, half | ((bits >> 16) & 0x8000));
}

// The first `count` elements, `stride` apart; zeros behind them.
template <class T>
auto load_some(const T* x, int64_t stride, int64_t count) {
  T buffer[lanes<typename Accumulator<T>::V>] = {};
  for (int64_t i = 0; i < count; ++i) buffer[i] = x[i * stride];
  return load(buffer);
}

template <class T, class V>
void store_some(T* y, int64_t stride, int64_t count, V v) {
  T buffer[lanes<V>];
  store(buffer, v);
  for (int64_t i = 0; i < count; ++i) y[i * stride] = buffer[i];
}

// --- reductions over the lanes, always in the same order ---

template <class V, class Join>
typename Traits<V>::Scalar reduce(V v, Join join) {
  typename Traits<V>::Scalar lane[lanes<V>];
  store(lane, v);
  for (int width = lanes<V> / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lane[i] = join(lane[i], lane[i + width]);
  }
  return lane[0];
}
