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

// GCC 12 splits these two conversions into halves, which costs a third of the bf16 kernels' speed.
inline VecU load_u16(const void* x) {
#if AT_FUSED_VECTOR_BYTES == 64
  return (VecU)_mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(x)));
#elif AT_FUSED_VECTOR_BYTES == 32
  return (VecU)_mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(x)));
#else
  VecU16 v;
  std::memcpy(&v, x, sizeof v);
  return __builtin_convertvector(v, VecU);
#endif
}

inline VecF load(const Bf16* x) { return (VecF)(load_u16(x) << 16); }

// Twice as many elements without a widening shuffle: those at even places, and those at odd ones.
struct EvenOdd {
  VecF even, odd;
};
inline EvenOdd load_pairs(const Bf16* x) {
  VecU pairs;
  std::memcpy(&pairs, x, sizeof pairs);
  return {(VecF)(pairs << 16), (VecF)(pairs & 0xffff0000)};
}

inline VecF load(const Half* x) {
  const VecU h = load_u16(x), exponent = h & 0x7c00, mantissa = h & 0x03ff;
  const VecU rebias = select(exponent == 0x7c00, VecU{} + 0x70000000, VecU{} + 0x38000000);
  const VecU normal = ((h & 0x7fff) << 13) + rebias;
  const VecU subnormal = (VecU)(__builtin_convertvector((VecI)mantissa, VecF) * 0x1p-24f);
  return (VecF)(select(exponent == 0, subnormal, normal) | ((h & 0x8000) << 16));
}

// What a vector is in memory, as T.
template <class T>
auto encode(typename Accumulator<T>::V v) {
  return v;
}

inline VecU16 low_halves(VecU v) {
#if AT_FUSED_VECTOR_BYTES == 64
  return (VecU16)_mm512_cvtepi32_epi16((__m512i)v);
#else
  return __builtin_convertvector(v, VecU16);
#endif
}

// Both narrow to the nearest, ties to even.
template <>
inline auto encode<Bf16>(VecF v) {
  const VecU bits = (VecU)v, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return low_halves(select(v != v, VecU{} + 0x7fc0, rounded));
}

template <>
inline auto encode<Half>(VecF v) {
  const VecU bits = (VecU)v, absolute = bits & 0x7fffffff;
  const VecU normal = (absolute - (112u << 23) + 0xfff + ((absolute >> 13) & 1)) >> 13;
  // Adding 0.5 lets the processor round to a multiple of 2^-24, the spacing of subnormal halves.
  const VecU subnormal = (VecU)((VecF)absolute + 0.5f) - 0x3f000000;
  VecU half = select(absolute < 0x38800000, subnormal, normal);
  half = select(absolute >= 0x477ff000, VecU{} + 0x7c00, half);  // 65520 and more round to infinity
  half = select(absolute > 0x7f800000, VecU{} + 0x7e00, half);
  return low_halves(half | ((bits >> 16) & 0x8000));
}

template <class T, class V>
void store(T* y, V v) {
  const auto encoded = encode<T>(v);
  std::memcpy(y, &encoded, sizeof encoded);
}

// Whether `stream` may write rows of `length` elements, `stride` apart, of which the first begins at y.
template <class T>
bool streams(const T* y, int64_t stride, int64_t length) {
  constexpr int count = lanes<typename Accumulator<T>::V>;
  return reinterpret_cast<uintptr_t>(y) % (count * sizeof(T)) == 0 && stride % count == 0 && length % count == 0;
}

// A store past the caches, which need not read first what it replaces. Ordered by what ends the kernel.
template <class T, class V>
void stream(T* y, V v) {
  const auto encoded = encode<T>(v);
#if defined(__x86_64__)
  constexpr size_t bytes = sizeof encoded;
#if AT_FUSED_VECTOR_BYTES == 64
  if constexpr (bytes == 64) return _mm512_stream_si512(reinterpret_cast<__m512i*>(y), (__m512i)encoded);
#endif
#if AT_FUSED_VECTOR_BYTES >= 32
  if constexpr (bytes == 32) return _mm256_stream_si256(reinterpret_cast<__m256i*>(y), (__m256i)encoded);
#endif
  if constexpr (bytes == 16) return _mm_stream_si128(reinterpret_cast<__m128i*>(y), (__m128i)encoded);
#endif
  std::memcpy(y, &encoded, sizeof encoded);
}

// How many of the `left` elements fit one vector.
template <class V>
int64_t at_most_lanes(int64_t left) {
  return left < lanes<V> ? left : lanes<V>;
}

// All ones in the last `count` lanes.
template <class V>
Mask<V> last_lanes(int64_t count) {
  Mask<V> index;
  for (int i = 0; i < lanes<V>; ++i) index[i] = i;
  return index >= static_cast<decltype(+index[0])>(lanes<V> - count);
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

#if defined(__clang__) || __GNUC__ >= 12
#define AT_FUSED_SHUFFLE(V, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define AT_FUSED_SHUFFLE(V, a, b, ...) __builtin_shuffle(a, b, Mask<V>{__VA_ARGS__})
#endif

// The lanes i ^ bit.
template <int bit, class V, int... I>
V with_neighbours(V v, std::integer_sequence<int, I...>) {
  return AT_FUSED_SHUFFLE(V, v, v, (I ^ bit)...);
}

// A lane i joins the lanes i and i ^ bit of `a` where i has that bit clear, of `b` where it is set.
template <int bit, class V, class Join, int... I>
V join_neighbours(V a, V b, Join join, std::integer_sequence<int, I...>) {
  const V same = AT_FUSED_SHUFFLE(V, a, b, ((I & bit) ? lanes<V> + I : I)...);  // a blend, cheaper than a shuffle
  const V other = AT_FUSED_SHUFFLE(V, a, b, ((I & bit) ? lanes<V> + (I ^ bit) : (I ^ bit))...);
  return join(same, other);
}

// Joins `count` vectors into one. With as many as there are lanes, lane i of the result joins all lanes of v[i];
// with half as many, lanes i and i + count join the lower and the upper half of v[i].
template <int count, int bit = 1, class V, class Join>
V reduce_all(V* v, Join join) {
  if constexpr (count == 1) {
    return v[0];
  } else {
    constexpr auto indices = std::make_integer_sequence<int, lanes<V>>{};
    for (int i = 0; i < count / 2; ++i) v[i] = join_neighbours<bit>(v[2 * i], v[2 * i + 1], join, indices);
    return reduce_all<count / 2, 2 * bit>(v, join);
  }
}

// In the order of `reduce_all`.
template <int bit = 1, class V, class Join>
typename Traits<V>::Scalar reduce(V v, Join join) {
  if constexpr (bit == lanes<V>) {
    return v[0];
  } else {
    constexpr auto indices = std::make_integer_sequence<int, lanes<V>>{};
    return reduce<2 * bit>(join(v, with_neighbours<bit>(v, indices)), join);
  }
}

// The lower and the upper half of the lanes, in turn.
template <class V, int... I>
V interleave_halves(V v, std::integer_sequence<int, I...>) {
  return AT_FUSED_SHUFFLE(V, v, v, (I / 2 + (I % 2) * (lanes<V> / 2))...);
}
