// What the kernels know of a tensor: no torch, so that they also build alone under the sanitizers.
#pragma once

#include <cstdint>

namespace at_fused {

enum class DType { f64, f32, bf16, f16 };

constexpr int max_spatial_dims = 8;

// A feature (B, C, *spatial) with any strides, counted in elements.
struct Feature {
  void* data;
  DType dtype;
  int64_t batch;
  int64_t channels;
  int64_t batch_stride;
  int64_t channel_stride;
  int spatial_dims;
  int64_t sizes[max_spatial_dims];
  int64_t strides[max_spatial_dims];
  bool fresh = false;            // memory of the system's that nothing has been written to yet
  const void* addend = nullptr;  // of a gradient: what is added to it, of the same type and strides

  // The same type, shape and strides.
  bool lies_as(const Feature& other) const {
    bool same = dtype == other.dtype && batch == other.batch && channels == other.channels &&
                spatial_dims == other.spatial_dims && (batch_stride == other.batch_stride || batch == 1) &&
                (channel_stride == other.channel_stride || channels == 1);
    for (int i = 0; same && i < spatial_dims; ++i) {
      same = sizes[i] == other.sizes[i] && (strides[i] == other.strides[i] || sizes[i] == 1);
    }
    return same;
  }

  int64_t positions() const {
    int64_t count = 1;
    for (int i = 0; i < spatial_dims; ++i) count *= sizes[i];
    return count;
  }
};

// F_sum^p or F_max^p.
struct Mapping {
  double p;
  bool max;
};

// The spatial grid as rows of equally spaced positions, in one feature or in two of the same shape at once:
// neighbouring dimensions are merged where the strides of both allow, so dense tensors are a single row.
class Rows {
 public:
  explicit Rows(const Feature& a) : Rows(a, a) {}

  Rows(const Feature& a, const Feature& b) {
    for (int i = 0; i < a.spatial_dims; ++i) {
      const Dim dim{a.sizes[i], a.strides[i], b.strides[i]};
      if (dim.size == 1) continue;
      if (depth_ > 0 && follows(dims_[depth_ - 1], dim)) {
        dims_[depth_ - 1] = {dims_[depth_ - 1].size * dim.size, dim.a, dim.b};
      } else {
        dims_[depth_++] = dim;
      }
    }
    if (depth_ == 0) dims_[depth_++] = {1, 1, 1};
  }

  int64_t length() const { return dims_[depth_ - 1].size; }
  int64_t stride_a() const { return dims_[depth_ - 1].a; }
  int64_t stride_b() const { return dims_[depth_ - 1].b; }

  // Calls row(first position, offset in a, offset in b) for every row, in the order of the positions.
  template <class Row>
  void for_each(Row row) const {
    walk(0, 0, 0, 0, row);
  }

 private:
  struct Dim {
    int64_t size, a, b;
  };
  Dim dims_[max_spatial_dims];
  int depth_ = 0;

  static bool follows(const Dim& outer, const Dim& inner) {
    return outer.a == inner.size * inner.a && outer.b == inner.size * inner.b;
  }

  template <class Row>
  int64_t walk(int depth, int64_t position, int64_t a, int64_t b, Row& row) const {
    const Dim& dim = dims_[depth];
    if (depth + 1 == depth_) {
      if (dim.size) row(position, a, b);
      return position + dim.size;
    }
    for (int64_t i = 0; i < dim.size; ++i) position = walk(depth + 1, position, a + i * dim.a, b + i * dim.b, row);
    return position;
  }
};

}  // namespace at_fused
