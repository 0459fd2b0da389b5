// The operators at_fused_cpu::*: outputs are allocated by the caller, all pairs go through one call.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <atomic>
#include <memory>
#include <optional>
#include <vector>

#include "kernels.h"

namespace at_fused {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double: return DType::f64;
    case ScalarType::Float: return DType::f32;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    default: STD_TORCH_CHECK(false, "at_fused: features must be fp64, fp32, bf16 or fp16");
  }
}

Feature feature_of(const Tensor& tensor) {
  const int spatial_dims = static_cast<int>(tensor.dim()) - 2;
  STD_TORCH_CHECK(spatial_dims >= 0 && spatial_dims <= max_spatial_dims && tensor.is_cpu(),
                  "at_fused: features must be CPU tensors (B, C, *spatial) of at most ", max_spatial_dims,
                  " spatial dimensions");
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  Feature feat{tensor.data_ptr(), dtype_of(tensor), sizes[0], sizes[1], strides[0], strides[1], spatial_dims, {}, {}};
  for (int i = 0; i < spatial_dims; ++i) {
    feat.sizes[i] = sizes[2 + i];
    feat.strides[i] = strides[2 + i];
  }
  return feat;
}

std::vector<Feature> features_of(const std::vector<Tensor>& tensors) {
  std::vector<Feature> feats;
  feats.reserve(tensors.size());
  for (const Tensor& tensor : tensors) feats.push_back(feature_of(tensor));
  return feats;
}

// Whether nothing has been written yet to a block of memory, as far as its middle tells (the allocator writes to the
// beginning). Smaller blocks are used again and again, and not worth the question.
bool is_fresh(const void* data, int64_t bytes) {
#if defined(__linux__)
  if (bytes < 8 << 20) return false;
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t middle = (reinterpret_cast<uintptr_t>(data) + bytes / 2) / page * page;
  unsigned char resident = 1;
  return mincore(reinterpret_cast<void*>(middle), 1, &resident) == 0 && !(resident & 1);
#else
  return false;
#endif
}

// Gradients at features, to be written.
std::vector<Feature> gradients_of(const std::vector<Tensor>& tensors) {
  std::vector<Feature> grads = features_of(tensors);
  for (size_t i = 0; i < grads.size(); ++i) {
    grads[i].fresh = is_fresh(grads[i].data, tensors[i].numel() * tensors[i].element_size());
  }
  return grads;
}

void add_to(std::vector<Feature>& grads, const std::vector<Tensor>& tensors) {
  const std::vector<Feature> addends = features_of(tensors);
  STD_TORCH_CHECK(addends.size() == grads.size(), "at_fused: one addend per gradient");
  for (size_t i = 0; i < grads.size(); ++i) {
    STD_TORCH_CHECK(addends[i].lies_as(grads[i]), "at_fused: an addend must have its gradient's type, shape and strides");
    grads[i].addend = addends[i].data;
  }
}

int64_t scalar_size(const Feature& feat) { return feat.dtype == DType::f64 ? sizeof(double) : sizeof(float); }

// A sample's row in a contiguous (B, *spatial) map tensor.
char* map_row(const Tensor& maps, const Feature& feat, int64_t sample) {
  return static_cast<char*>(maps.data_ptr()) + sample * feat.positions() * scalar_size(feat);
}

void check_map(const Tensor& maps, const Feature& feat) {
  const auto type = feat.dtype == DType::f64 ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(maps.scalar_type() == type && maps.is_contiguous() && maps.is_cpu() &&
                      maps.numel() == feat.batch * feat.positions(),
                  "at_fused: maps must be contiguous (B, *spatial) in the accumulation dtype");
}

// One number for all features, or one for each, such as the gradient that sum() hands back: expanded.
double read(const Tensor& scale, size_t index) {
  const int64_t offset = scale.numel() == 1 ? 0 : static_cast<int64_t>(index) * scale.stride(0);
  return scale.scalar_type() == ScalarType::Double ? static_cast<const double*>(scale.data_ptr())[offset]
                                                   : static_cast<const float*>(scale.data_ptr())[offset];
}

void check_scale(const Tensor& scale, size_t features) {
  STD_TORCH_CHECK((scale.scalar_type() == ScalarType::Double || scale.scalar_type() == ScalarType::Float) &&
                      scale.is_cpu() && scale.dim() <= 1 &&
                      (scale.numel() == 1 || scale.numel() == static_cast<int64_t>(features)),
                  "at_fused: the scale must be fp32 or fp64, one or one per feature");
}

int64_t largest_map(const std::vector<Feature>& feats) {
  int64_t bytes = 0;
  for (const Feature& feat : feats) {
    const int64_t size = feat.positions() * scalar_size(feat);
    bytes = size > bytes ? size : bytes;
  }
  return bytes;
}

// Calls use(feature index, sample, scratch) for every sample of every feature. Each thread takes its share of
// every feature's samples: features differ in size, samples of one don't.
template <class Use>
void for_each_sample(const std::vector<Feature>& feats, int64_t scratch_bytes, Use use) {
  constexpr int64_t elements_per_thread = 16384;  // waking a thread takes as long as reading some thousands
  int64_t elements = 0;
  for (const Feature& feat : feats) elements += feat.batch * feat.channels * feat.positions();
  const int64_t most = torch::stable::get_num_threads(), wanted = elements / elements_per_thread;
  const int64_t shares = wanted < 1 ? 1 : (wanted < most ? wanted : most);
  const auto work = [&](int64_t first, int64_t last) {
    const auto scratch = std::make_unique<double[]>((scratch_bytes + 7) / 8);
    for (int64_t share = first; share < last; ++share) {
      for (size_t i = 0; i < feats.size(); ++i) {
        const int64_t end = feats[i].batch * (share + 1) / shares;
        for (int64_t sample = feats[i].batch * share / shares; sample < end; ++sample) use(i, sample, scratch.get());
      }
    }
    std::atomic_thread_fence(std::memory_order_seq_cst);  // also ends streamed stores
  };
  if (shares == 1) {
    work(0, 1);
  } else {
    torch::stable::parallel_for(0, shares, 1, work);
  }
}

void attention_maps(std::vector<Tensor> tensors, std::vector<Tensor> maps, double p, bool max) {
  const auto feats = features_of(tensors);
  STD_TORCH_CHECK(maps.size() == feats.size(), "at_fused: one map per feature");
  for (size_t i = 0; i < feats.size(); ++i) check_map(maps[i], feats[i]);
  for_each_sample(feats, 0, [&](size_t i, int64_t sample, void*) {
    kernels().map(feats[i], sample, {p, max}, map_row(maps[i], feats[i], sample));
  });
}

// `addends`, if there are any, are added to the gradients, and of their types and strides.
void attention_maps_backward(std::vector<Tensor> tensors, std::vector<Tensor> slopes, std::optional<Tensor> scale,
                             std::vector<Tensor> addends, std::vector<Tensor> grads, double p, bool max) {
  const auto feats = features_of(tensors);
  auto outs = gradients_of(grads);
  if (!addends.empty()) add_to(outs, addends);
  STD_TORCH_CHECK(slopes.size() == feats.size() && outs.size() == feats.size(), "at_fused: one slope per feature");
  for (size_t i = 0; i < feats.size(); ++i) check_map(slopes[i], feats[i]);
  std::vector<double> factors(feats.size(), 1.0);
  if (scale) {
    check_scale(*scale, feats.size());
    for (size_t i = 0; i < feats.size(); ++i) factors[i] = read(*scale, i);
  }
  for_each_sample(feats, 2 * largest_map(feats), [&](size_t i, int64_t sample, void* scratch) {
    kernels().map_backward(feats[i], outs[i], sample, {p, max}, map_row(slopes[i], feats[i], sample), factors[i],
                           scratch);
  });
}

// `loss` is () or (n_pairs,). Slopes and gradients are written if their lists are not empty; the gradients, for which
// the students' slopes are needed, while each sample is still in the cache.
void attention_loss(std::vector<Tensor> student_tensors, std::vector<Tensor> teacher_tensors,
                    std::vector<double> weights, Tensor loss, std::vector<Tensor> student_slopes,
                    std::vector<Tensor> teacher_slopes, std::vector<Tensor> grads, double p, bool max, double eps) {
  const auto students = features_of(student_tensors), teachers = features_of(teacher_tensors);
  const auto outs = gradients_of(grads);
  const size_t pairs = students.size();
  STD_TORCH_CHECK(teachers.size() == pairs && weights.size() == pairs &&
                      (student_slopes.empty() || student_slopes.size() == pairs) &&
                      (teacher_slopes.empty() || teacher_slopes.size() == pairs) &&
                      (outs.empty() || (outs.size() == pairs && !student_slopes.empty())),
                  "at_fused: lists of different lengths");
  std::vector<std::vector<double>> distances(pairs);
  std::vector<double> factors(pairs);
  for (size_t i = 0; i < pairs; ++i) {
    const Feature &student = students[i], &teacher = teachers[i];
    STD_TORCH_CHECK(student.batch == teacher.batch && student.positions() == teacher.positions() &&
                        scalar_size(student) == scalar_size(teacher),
                    "at_fused: the maps of a pair must have the same shape and dtype");
    if (!student_slopes.empty()) check_map(student_slopes[i], student);
    if (!teacher_slopes.empty()) check_map(teacher_slopes[i], teacher);
    const int64_t elements = student.batch * student.positions();
    factors[i] = elements ? weights[i] / static_cast<double>(elements) : 0;
    distances[i].resize(student.batch);
  }

  const int64_t map_bytes = (largest_map(students) + 63) / 64 * 64;
  for_each_sample(students, 2 * map_bytes, [&](size_t i, int64_t sample, double* scratch) {
    const Feature &student = students[i], &teacher = teachers[i];
    char* spare = reinterpret_cast<char*>(scratch);
    char* student_map = student_slopes.empty() ? spare : map_row(student_slopes[i], student, sample);
    char* teacher_map = teacher_slopes.empty() ? spare + map_bytes : map_row(teacher_slopes[i], teacher, sample);
    kernels().map(teacher, sample, {p, max}, teacher_map);
    kernels().map(student, sample, {p, max}, student_map);
    distances[i][sample] = kernels().distance(student_map, teacher_map, student.positions(),
                                              student.dtype == DType::f64, eps, factors[i], !student_slopes.empty(),
                                              !teacher_slopes.empty());
    if (!outs.empty()) kernels().map_backward(student, outs[i], sample, {p, max}, student_map, 1, scratch);
  });

  // Summed in the order of the samples, so that the result does not depend on the number of threads.
  const bool reduce = loss.dim() == 0;
  double total = 0;
  for (size_t i = 0; i < pairs; ++i) {
    double sum = 0;
    for (double distance : distances[i]) sum += distance;
    total = (reduce ? total : 0) + sum * factors[i];
    if (!reduce || i + 1 == pairs) {
      const size_t index = reduce ? 0 : i;
      if (loss.scalar_type() == ScalarType::Double) {
        static_cast<double*>(loss.data_ptr())[index] = total;
      } else {
        static_cast<float*>(loss.data_ptr())[index] = static_cast<float>(total);
      }
    }
  }
}

std::string instruction_set() { return kernels().name; }

}  // namespace
}  // namespace at_fused

STABLE_TORCH_LIBRARY(at_fused_cpu, library) {
  library.def("attention_maps(Tensor[] feats, Tensor(a!)[] maps, float p, bool max) -> ()");
  library.def(
      "attention_maps_backward(Tensor[] feats, Tensor[] slopes, Tensor? scale, Tensor[] addends, Tensor(a!)[] grads, "
      "float p, bool max) -> ()");
  library.def(
      "attention_loss(Tensor[] students, Tensor[] teachers, float[] weights, Tensor(a!) loss, "
      "Tensor(b!)[] student_slopes, Tensor(c!)[] teacher_slopes, Tensor(d!)[] grads, float p, bool max, float eps) "
      "-> ()");
  library.def("instruction_set() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(at_fused_cpu, CompositeExplicitAutograd, library) {
  library.impl("attention_maps", TORCH_BOX(&at_fused::attention_maps));
  library.impl("attention_maps_backward", TORCH_BOX(&at_fused::attention_maps_backward));
  library.impl("attention_loss", TORCH_BOX(&at_fused::attention_loss));
  library.impl("instruction_set", TORCH_BOX(&at_fused::instruction_set));
}
