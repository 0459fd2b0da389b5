// One instruction set's kernels; see kernels.h. Included once per instruction set.

#include <cmath>  // before the target: what is inline here must run on any processor
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "isa.h"
#include "kernels.h"

#ifdef AT_FUSED_TARGET
AT_FUSED_TARGET_BEGIN(AT_FUSED_TARGET)
#endif

namespace at_fused::AT_FUSED_ISA {
namespace {  // what several instruction sets share must never be merged by the linker

#include "simd.h"

// --- |x|^p and its derivative |x|^(p-1) sign(x), the factor p left out ---

struct Power1 {
  static constexpr double p = 1;
  template <class V>
  V value(V x) const { return magnitude(x); }
  template <class V>
  V slope(V x) const { return sign(x); }
};

struct Power2 {
  static constexpr double p = 2;
  template <class V>
  V value(V x) const { return x * x; }
  template <class V>
  V slope(V x) const { return x; }
};

struct Power4 {
  static constexpr double p = 4;
  template <class V>
  V value(V x) const { return (x * x) * (x * x); }
  template <class V>
  V slope(V x) const { return (x * x) * x; }
};

struct WholePower {
  double p;
  template <class V>
  V value(V x) const { return power(magnitude(x), static_cast<int>(p)); }
  template <class V>
  V slope(V x) const { return power(magnitude(x), static_cast<int>(p) - 1) * sign(x); }

 private:
  template <class V>
  static V power(V base, int exponent) {
    V result = splat<V>(1);
    for (; exponent; exponent >>= 1, base *= base) {
      if (exponent & 1) result *= base;
    }
    return result;
  }
};

struct RealPower {
  double p;
  template <class V>
  V value(V x) const { return power(magnitude(x), p); }
  template <class V>
  V slope(V x) const { return power(magnitude(x), p - 1) * sign(x); }

 private:
  static float power(float x, float exponent) { return ::powf(x, exponent); }
  static double power(double x, double exponent) { return ::pow(x, exponent); }
  template <class V>
  static V power(V x, double exponent) {
    for (int i = 0; i < lanes<V>; ++i) x[i] = power(x[i], static_cast<typename Traits<V>::Scalar>(exponent));
    return x;
  }
};

// --- how a position's channels are joined ---

template <class Power>
struct Sum {
  Power power;
  template <class V>
  V value(V x) const { return power.value(x); }
  template <class V>
  V operator()(V a, V b) const { return a + b; }
};

struct Max {
  template <class V>
  V value(V x) const { return magnitude(x); }
  template <class V>
  V operator()(V a, V b) const { return select((Mask<V>)(b > a) | (Mask<V>)(b != b), b, a); }
};

// --- memory ---

// How far ahead of its use a line is asked for: the processors' own prefetchers stop at every 4 KiB page, which
// are a few rows here. Asking beyond the end of a tensor is harmless.
constexpr int64_t ahead_bytes = 2048;

template <class T>
void prefetch(const T* x) {
  __builtin_prefetch(reinterpret_cast<const char*>(x) + ahead_bytes);
}

template <class T>
void prefetch_for_write(T* x) {
  __builtin_prefetch(reinterpret_cast<char*>(x) + ahead_bytes, 1);
}

// --- map ---

template <int count, class T, class Scalar, class Join>
void join_channels(const T* x, int64_t channel_stride, int64_t stride, int64_t length, Scalar* map, Join join) {
  using V = typename Accumulator<T>::V;
  const auto joined = [&](auto read) {
    V v = join.value(read(x));
    for (int c = 1; c < count; ++c) v = join(v, join.value(read(x + c * channel_stride)));
    return v;
  };
  int64_t i = 0;
  if (stride == 1 && length >= lanes<V>) {
    for (; i + lanes<V> <= length; i += lanes<V>) {
      for (int c = 0; c < count; ++c) __builtin_prefetch(x + (count + c) * channel_stride + i);
      store(map + i, join(load(map + i), joined([&](const T* channel) { return load(channel + i); })));
    }
    if (i < length) {  // a whole vector again, of which only the new lanes count: 0 is neutral to every join
      const int64_t end = length - lanes<V>;
      const V v = joined([&](const T* channel) { return load(channel + end); });
      store(map + end, join(load(map + end), (V)((Mask<V>)v & last_lanes<V>(length - i))));
    }
    return;
  }
  for (; i < length; i += lanes<V>) {
    const int64_t some = at_most_lanes<V>(length - i);
    const V v = joined([&](const T* channel) { return load_some(channel + i * stride, stride, some); });
    store_some(map + i, 1, some, join(load_some(map + i, 1, some), v));
  }
}

// Positions side by side in memory (NCHW), or evenly spaced: the map stays in the cache, channels stream past. One
// by one they are one long stream, which processors fetch best; short ones would spend their time on loops.
template <class T, class Scalar, class Join>
void map_over_positions(const T* x, int64_t channels, int64_t channel_stride, int64_t stride, int64_t length,
                        Scalar* map, Join join) {
  constexpr int64_t longest_short = 64;
  for (int64_t i = 0; i < length; ++i) map[i] = 0;
  int64_t c = 0;
  for (; length <= longest_short && c + 4 <= channels; c += 4) {
    join_channels<4>(x + c * channel_stride, channel_stride, stride, length, map, join);
  }
  for (; c < channels; ++c) join_channels<1>(x + c * channel_stride, channel_stride, stride, length, map, join);
}

// All channels of a position, joined lane by lane, in any order.
template <class T, class Join>
auto join_row(const T* row, int64_t channels, Join join) {
  using V = typename Accumulator<T>::V;
  V joined{};
  int64_t c = 0;
  if constexpr (std::is_same_v<T, Bf16>) {
    for (; c + 2 * lanes<V> <= channels; c += 2 * lanes<V>) {
      prefetch(row + c);
      const auto [even, odd] = load_pairs(row + c);
      joined = join(joined, join(join.value(even), join.value(odd)));
    }
  }
  for (; c + lanes<V> <= channels; c += lanes<V>) {
    prefetch(row + c);
    joined = join(joined, join.value(load(row + c)));
  }
  if (c < channels) joined = join(joined, join.value(load_some(row + c, 1, channels - c)));
  return joined;
}

// As many bf16 channels as a vector has lanes: a vector of memory holds two positions.
template <class Join>
int64_t map_narrow_rows(const Bf16* x, int64_t length, float* map, Join join) {
  constexpr int half = lanes<VecF> / 2;
  constexpr auto indices = std::make_integer_sequence<int, lanes<VecF>>{};
  VecF twins[half];
  int64_t i = 0;
  for (; i + lanes<VecF> <= length; i += lanes<VecF>) {
    for (int j = 0; j < half; ++j) {
      const Bf16* twin = x + (i + 2 * j) * lanes<VecF>;
      prefetch(twin);
      const auto [even, odd] = load_pairs(twin);
      twins[j] = join(join.value(even), join.value(odd));
    }
    store(map + i, interleave_halves(reduce_all<half>(twins, join), indices));
  }
  return i;
}

// Channels side by side in memory (NHWC): as many positions at once as a vector has lanes.
template <class T, class Scalar, class Join>
void map_over_channels(const T* x, int64_t channels, int64_t stride, int64_t length, Scalar* map, Join join) {
  using V = typename Accumulator<T>::V;
  V rows[lanes<V>];
  int64_t i = 0;
  if constexpr (std::is_same_v<T, Bf16>) {
    if (channels == lanes<V> && stride == channels) i = map_narrow_rows(x, length, map, join);
  }
  for (; i + lanes<V> <= length; i += lanes<V>) {
    for (int j = 0; j < lanes<V>; ++j) rows[j] = join_row(x + (i + j) * stride, channels, join);
    store(map + i, reduce_all<lanes<V>>(rows, join));
  }
  for (; i < length; ++i) map[i] = reduce(join_row(x + i * stride, channels, join), join);
}

template <class Scalar, class Change>
void change_in_place(Scalar* x, int64_t length, Change change) {
  using V = typename Accumulator<Scalar>::V;
  int64_t i = 0;
  for (; i + lanes<V> <= length; i += lanes<V>) store(x + i, change(load(x + i)));
  if (i < length) store_some(x + i, 1, length - i, change(load_some(x + i, 1, length - i)));
}

// x *= change(y)
template <class Scalar, class Change>
void multiply_in_place(Scalar* x, const Scalar* y, int64_t length, Change change) {
  using V = typename Accumulator<Scalar>::V;
  for (int64_t i = 0; i < length; i += lanes<V>) {
    const int64_t some = at_most_lanes<V>(length - i);
    store_some(x + i, 1, some, load_some(x + i, 1, some) * change(load_some(y + i, 1, some)));
  }
}

template <class T, class Scalar, class Join>
void map_sample(const Feature& feat, int64_t sample, Scalar* map, Join join) {
  const T* x = static_cast<const T*>(feat.data) + sample * feat.batch_stride;
  const Rows rows(feat);
  rows.for_each([&](int64_t position, int64_t offset, int64_t) {
    if (feat.channel_stride == 1 && feat.channels > 1) {
      map_over_channels(x + offset, feat.channels, rows.stride_a(), rows.length(), map + position, join);
    } else {
      map_over_positions(x + offset, feat.channels, feat.channel_stride, rows.stride_a(), rows.length(),
                         map + position, join);
    }
  });
}

// --- backward ---
// Fresh memory gets ordinary stores: the system has just put its pages, zeroed, into the cache.

// What is added to a gradient: nothing, or the values of another, which lies in memory as this one does.
struct NoAddend {
  template <class V>
  V plus(V v, int64_t) const { return v; }
  template <class V>
  V plus_some(V v, int64_t, int64_t, int64_t) const { return v; }
  NoAddend operator+(int64_t) const { return {}; }
};

template <class T>
struct Addend {
  const T* data;
  template <class V>
  V plus(V v, int64_t i) const { return v + load(data + i); }
  template <class V>
  V plus_some(V v, int64_t i, int64_t stride, int64_t some) const { return v + load_some(data + i, stride, some); }
  Addend operator+(int64_t offset) const { return {data + offset}; }
};

template <class T, class Scalar, class Power, class Added>
void backward_over_positions(const T* x, T* grad, Added added, int64_t stride, int64_t grad_stride, int64_t length,
                             const Scalar* slope, Power power, bool fresh) {
  using V = typename Accumulator<T>::V;
  const auto at = [&](int64_t i) { return added.plus(load(slope + i) * power.slope(load(x + i)), i); };
  if (!fresh && stride == 1 && grad_stride == 1 && streams(grad, length, length)) {
    for (int64_t i = 0; i < length; i += lanes<V>) stream(grad + i, at(i));
    return;
  }
  if (stride == 1 && grad_stride == 1 && length >= lanes<V>) {
    int64_t i = 0;
    for (; i + lanes<V> <= length; i += lanes<V>) {
      prefetch_for_write(grad + i);
      store(grad + i, at(i));
    }
    if (i < length) store(grad + length - lanes<V>, at(length - lanes<V>));  // the last lanes once more, alike
    return;
  }
  for (int64_t i = 0; i < length; i += lanes<V>) {
    const int64_t some = at_most_lanes<V>(length - i);
    const V v = load_some(slope + i, 1, some) * power.slope(load_some(x + i * stride, stride, some));
    store_some(grad + i * grad_stride, grad_stride, some, added.plus_some(v, i * grad_stride, grad_stride, some));
  }
}

template <class T, class Scalar, class Power, class Added>
void backward_over_channels(const T* x, T* grad, Added added, int64_t stride, int64_t grad_stride, int64_t channels,
                            int64_t length, const Scalar* slope, Power power, bool fresh) {
  using V = typename Accumulator<T>::V;
  const bool streamed = !fresh && streams(grad, grad_stride, channels);
  for (int64_t i = 0; i < length; ++i, x += stride, grad += grad_stride, added = added + grad_stride) {
    const V factor = splat<V>(slope[i]);
    const auto at = [&](int64_t c) { return added.plus(factor * power.slope(load(x + c)), c); };
    int64_t c = 0;
    if (streamed) {
      for (; c < channels; c += lanes<V>) stream(grad + c, at(c));
    }
    for (; c + lanes<V> <= channels; c += lanes<V>) {
      prefetch_for_write(grad + c);
      store(grad + c, at(c));
    }
    if (c < channels) {
      const int64_t some = channels - c;
      store_some(grad + c, 1, some, added.plus_some(factor * power.slope(load_some(x + c, 1, some)), c, 1, some));
    }
  }
}

template <class T, class Scalar, class Power, class Added>
void backward_sum(const Feature& feat, const Feature& grad, Added addend, int64_t sample, const Scalar* slope,
                  Power power) {
  const T* x = static_cast<const T*>(feat.data) + sample * feat.batch_stride;
  T* g = static_cast<T*>(grad.data) + sample * grad.batch_stride;
  const auto added = addend + sample * grad.batch_stride;
  const Rows rows(feat, grad);
  rows.for_each([&](int64_t position, int64_t offset, int64_t grad_offset) {
    const Scalar* row_slope = slope + position;
    if (feat.channel_stride == 1 && grad.channel_stride == 1 && feat.channels > 1) {
      backward_over_channels(x + offset, g + grad_offset, added + grad_offset, rows.stride_a(), rows.stride_b(),
                             feat.channels, rows.length(), row_slope, power, grad.fresh);
      return;
    }
    for (int64_t c = 0; c < feat.channels; ++c) {
      const int64_t there = grad_offset + c * grad.channel_stride;
      backward_over_positions(x + offset + c * feat.channel_stride, g + there, added + there, rows.stride_a(),
                              rows.stride_b(), rows.length(), row_slope, power, grad.fresh);
    }
  });
}

// Only the first channel that reaches the maximum `peak` receives the gradient: `slope` times its sign.
template <class T, class Scalar, class Added>
void backward_max(const Feature& feat, const Feature& grad, Added addend, int64_t sample, const Scalar* slope,
                  const Scalar* peak) {
  using V = typename Accumulator<T>::V;
  const T* x = static_cast<const T*>(feat.data) + sample * feat.batch_stride;
  T* g = static_cast<T*>(grad.data) + sample * grad.batch_stride;
  const auto added = addend + sample * grad.batch_stride;
  const Rows rows(feat, grad);
  rows.for_each([&](int64_t position, int64_t offset, int64_t grad_offset) {
    for (int64_t i = 0; i < rows.length(); i += lanes<V>) {
      const int64_t some = at_most_lanes<V>(rows.length() - i);
      const V top = load_some(peak + position + i, 1, some), factor = load_some(slope + position + i, 1, some);
      Mask<V> open = ~Mask<V>{};
      for (int64_t c = 0; c < feat.channels; ++c) {
        const V v = load_some(x + offset + c * feat.channel_stride + i * rows.stride_a(), rows.stride_a(), some);
        const Mask<V> hit = open & ((Mask<V>)(magnitude(v) == top) | (Mask<V>)(v != v));
        open &= ~hit;
        const int64_t there = grad_offset + c * grad.channel_stride + i * rows.stride_b(), step = rows.stride_b();
        const V result = select(hit, factor * sign(v), V{});
        store_some(g + there, step, some, added.plus_some(result, there, step, some));
      }
    }
  });
}

// --- distance ---

// Calls use(i, u, v) with the vectors of `a` and `b` from i on; zeros fill the last ones.
template <class Scalar, class Use>
void for_each_vector(const Scalar* a, const Scalar* b, int64_t length, Use use) {
  using V = typename Accumulator<Scalar>::V;
  int64_t i = 0;
  for (; i + lanes<V> <= length; i += lanes<V>) use(i, load(a + i), load(b + i));
  if (i < length) use(i, load_some(a + i, 1, length - i), load_some(b + i, 1, length - i));
}

template <class V>
typename Traits<V>::Scalar sum(V v) {
  return reduce(v, [](V a, V b) { return a + b; });
}

// |map| of a sum of squares, also where that leaves fp32's range, as for fp16's largest features to the 4th.
template <class Scalar>
Scalar norm_of(Scalar squares, const Scalar* map, int64_t length) {
  constexpr Scalar exact_from = std::numeric_limits<Scalar>::min() / std::numeric_limits<Scalar>::epsilon();
  if (std::isfinite(squares) && squares >= exact_from) return std::sqrt(squares);
  double exact = 0;
  for (int64_t i = 0; i < length; ++i) exact += static_cast<double>(map[i]) * map[i];
  return static_cast<Scalar>(std::sqrt(exact));
}

// Finite for any norm above 0: that of the smallest, whose maps are not told apart either, would overflow.
template <class Scalar>
Scalar inverse(Scalar norm) {
  const Scalar inverse = 1 / norm;
  return norm > 0 && std::isinf(inverse) ? std::numeric_limits<Scalar>::max() : inverse;
}

template <class Scalar>
double distance_of(Scalar* student, Scalar* teacher, int64_t length, double eps, double weight, bool student_slope,
                   bool teacher_slope) {
  using V = typename Accumulator<Scalar>::V;
  V student_squares{}, teacher_squares{};
  for_each_vector(student, teacher, length, [&](int64_t, V s, V t) {
    student_squares += s * s;
    teacher_squares += t * t;
  });
  const Scalar student_norm = norm_of(sum(student_squares), student, length);
  const Scalar teacher_norm = norm_of(sum(teacher_squares), teacher, length);
  const auto floor = static_cast<Scalar>(eps);
  const bool student_clamped = student_norm < floor, teacher_clamped = teacher_norm < floor;
  const Scalar student_inverse = inverse(student_clamped ? floor : student_norm);
  const Scalar teacher_inverse = inverse(teacher_clamped ? floor : teacher_norm);

  // With u, v the normalised maps and d = u - v: d|d|^2/dQ_S = 2 (d - u <u, d>) / |Q_S|, and likewise for v.
  V squares{}, students{}, teachers{};
  for_each_vector(student, teacher, length, [&](int64_t, V s, V t) {
    const V u = s * student_inverse, v = t * teacher_inverse, d = u - v;
    squares += d * d;
    students += u * d;
    teachers += v * d;
  });
  if (student_slope || teacher_slope) {
    const Scalar along_student = student_clamped ? 0 : sum(students);  // a clamped norm is a constant
    const Scalar along_teacher = teacher_clamped ? 0 : sum(teachers);
    const Scalar student_factor = static_cast<Scalar>(2 * weight) * student_inverse;
    const Scalar teacher_factor = static_cast<Scalar>(-2 * weight) * teacher_inverse;
    const auto put = [&](Scalar* to, int64_t i, V v) {
      i + lanes<V> <= length ? store(to + i, v) : store_some(to + i, 1, length - i, v);
    };
    for_each_vector(student, teacher, length, [&](int64_t i, V s, V t) {
      const V u = s * student_inverse, v = t * teacher_inverse, d = u - v;
      if (student_slope) put(student, i, (d - u * along_student) * student_factor);
      if (teacher_slope) put(teacher, i, (d - v * along_teacher) * teacher_factor);
    });
  }
  return sum(squares);
}

// --- from run-time types to templates ---

template <class Use>
void with_power(double p, Use use) {
  if (p == 1) return use(Power1{});
  if (p == 2) return use(Power2{});
  if (p == 4) return use(Power4{});
  if (p == std::floor(p) && p <= 64) return use(WholePower{p});
  use(RealPower{p});
}

template <class Use>
void with_type(DType dtype, Use use) {
  switch (dtype) {
    case DType::f64: return use(double{});
    case DType::f32: return use(float{});
    case DType::bf16: return use(Bf16{});
    case DType::f16: return use(Half{});
  }
}

template <class T>
using ScalarOf = typename Traits<typename Accumulator<T>::V>::Scalar;

void map(const Feature& feat, int64_t sample, Mapping mapping, void* out) {
  with_type(feat.dtype, [&](auto type) {
    using T = decltype(type);
    auto* map = static_cast<ScalarOf<T>*>(out);
    if (mapping.max) map_sample<T>(feat, sample, map, Max{});
    with_power(mapping.p, [&](auto power) {
      if (mapping.max) {
        change_in_place(map, feat.positions(), [&](auto v) { return power.value(v); });
      } else {
        map_sample<T>(feat, sample, map, Sum<decltype(power)>{power});
      }
    });
  });
}

void map_backward(const Feature& feat, const Feature& grad, int64_t sample, Mapping mapping, const void* slope,
                  double scale, void* scratch) {
  with_type(feat.dtype, [&](auto type) {
    using T = decltype(type);
    using Scalar = ScalarOf<T>;
    const int64_t positions = feat.positions();
    auto *scaled = static_cast<Scalar*>(scratch), *peak = scaled + positions;
    const auto factor = static_cast<Scalar>(scale * mapping.p);
    for (int64_t i = 0; i < positions; ++i) scaled[i] = static_cast<const Scalar*>(slope)[i] * factor;
    if (mapping.max) map_sample<T>(feat, sample, peak, Max{});
    const auto with_addend = [&](auto use) {
      grad.addend ? use(Addend<T>{static_cast<const T*>(grad.addend)}) : use(NoAddend{});
    };
    with_power(mapping.p, [&](auto power) {
      if (!mapping.max) {
        return with_addend([&](auto added) { backward_sum<T>(feat, grad, added, sample, scaled, power); });
      }
      multiply_in_place(scaled, peak, positions, [&](auto v) { return power.slope(v); });
    });
    if (mapping.max) {
      with_addend([&](auto added) { backward_max<T>(feat, grad, added, sample, scaled, peak); });
    }
  });
}

double distance(void* student, void* teacher, int64_t positions, bool is_double, double eps, double weight,
                bool student_slope, bool teacher_slope) {
  const auto of = [&](auto* s, auto* t) {
    return distance_of(s, t, positions, eps, weight, student_slope, teacher_slope);
  };
  return is_double ? of(static_cast<double*>(student), static_cast<double*>(teacher))
                   : of(static_cast<float*>(student), static_cast<float*>(teacher));
}

}  // namespace

#define AT_FUSED_STRING_(x) #x
#define AT_FUSED_STRING(x) AT_FUSED_STRING_(x)
extern const Kernels table = {AT_FUSED_STRING(AT_FUSED_ISA), map, map_backward, distance};

}  // namespace at_fused::AT_FUSED_ISA

#ifdef AT_FUSED_TARGET
AT_FUSED_TARGET_END
#endif
