// The operators at_fused_cuda::*: outputs are allocated by the caller, all pairs go through one launch.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <string>
#include <vector>

#include "launch.cuh"

// Declared by torch only where USE_CUDA is defined; exported by every CUDA build of it.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace at_fused::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

void check(cudaError_t error) {
  if (error != cudaSuccess) cudaGetLastError();  // else PyTorch's next check would report it again
  STD_TORCH_CHECK(error == cudaSuccess, "at_fused: CUDA: ", cudaGetErrorString(error));
}

// Makes the tensors' device the current one, for as long as it lives, for the kernels of a power.
struct OnDevice {
  OnDevice(const Tensor& tensor, double p) : guard(tensor.get_device_index()) {
    check(current_device(device, kernels(p)));
    void* handle;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &handle));
    stream = static_cast<cudaStream_t>(handle);
  }

  torch::stable::accelerator::DeviceGuard guard;
  Device device;
  cudaStream_t stream;
};

Strided strided(const Tensor& tensor) {
  Strided feat;
  feat.data = tensor.data_ptr();
  switch (tensor.scalar_type()) {
    case ScalarType::Float: feat.dtype = DType::f32; break;
    case ScalarType::BFloat16: feat.dtype = DType::bf16; break;
    case ScalarType::Half: feat.dtype = DType::f16; break;
    default: STD_TORCH_CHECK(false, "at_fused: features must be fp32, bf16 or fp16");
  }
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.dim() >= 2 &&
                      merge_positions(feat, tensor.sizes().data(), tensor.strides().data(), tensor.dim()),
                  "at_fused: features must be CUDA tensors (B, C, *spatial) with evenly spaced positions");
  return feat;
}

Feature feature_of(const Tensor& tensor, const Tensor* grad, Gradient& out) {
  Feature feat;
  const Strided x = strided(tensor), g = grad ? strided(*grad) : x;
  STD_TORCH_CHECK(g.dtype == x.dtype && g.batch == x.batch && g.channels == x.channels && g.positions == x.positions,
                  "at_fused: a gradient must have its feature's shape and dtype");
  const char* problem = describe(x, grad ? &g : nullptr, feat, out);
  STD_TORCH_CHECK(!problem, "at_fused: the kernels can't serve a feature: ", problem);
  return feat;
}

int batch_of(const Tensor& tensor) { return static_cast<int>(tensor.size(0)); }

float* floats(const Tensor& tensor, int64_t count) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float && tensor.is_contiguous() && tensor.is_cuda() &&
                      tensor.numel() == count,
                  "at_fused: maps must be contiguous fp32 CUDA tensors (B, *spatial)");
  return static_cast<float*>(tensor.data_ptr());
}

Item item_of(const Tensor& feat, const Tensor& map, const Tensor* grad) {
  Item item{};
  item.feat = feature_of(feat, grad, item.grad);
  item.batch = batch_of(feat);
  item.map = floats(map, int64_t{item.batch} * item.feat.positions);
  return item;
}

// Calls use(table, first index) for every max_features of them.
template <class Use>
void for_each_table(const Tensors& feats, const Tensors& maps, const Tensors* grads, double p, Use use) {
  STD_TORCH_CHECK(maps.size() == feats.size() && (!grads || grads->size() == feats.size()),
                  "at_fused: one map and one gradient per feature");
  for (size_t first = 0; first < feats.size(); first += max_features) {
    ItemTable table{};
    table.p = static_cast<float>(p);
    for (size_t i = first; i < feats.size() && table.items < max_features; ++i) {
      table.item[table.items++] = item_of(feats[i], maps[i], grads ? &(*grads)[i] : nullptr);
    }
    use(table, first);
  }
}

void attention_maps(Tensors feats, Tensors maps, double p) {
  const OnDevice on(feats.at(0), p);
  for_each_table(feats, maps, nullptr, p, [&](ItemTable& table, size_t) {
    check(launch(kernels(p).maps, plan_maps(table), table, on.stream));
  });
}

// The data of what is added to a gradient, which has its type, shape and strides.
const void* addend_of(const Tensor& addend, const Tensor& grad) {
  STD_TORCH_CHECK(addend.scalar_type() == grad.scalar_type() && addend.is_cuda() && addend.sizes() == grad.sizes() &&
                      addend.strides() == grad.strides(),
                  "at_fused: an addend must have its gradient's type, shape and strides");
  return addend.data_ptr();
}

void run_backward(const OnDevice& on, const Tensors& feats, const Tensors& slopes, const Tensor* scale,
                  const Tensors& grads, const Tensors& addends, double p, int32_t* scale_was_one, bool grads_at_one) {
  STD_TORCH_CHECK(!scale || (scale->scalar_type() == ScalarType::Float && scale->is_cuda() && scale->dim() <= 1 &&
                             (scale->numel() == 1 || scale->numel() == static_cast<int64_t>(feats.size()))),
                  "at_fused: the scale must be fp32, one or one per feature");
  for_each_table(feats, slopes, &grads, p, [&](ItemTable& table, size_t first) {
    if (scale) {
      table.scale_stride = scale->numel() == 1 ? 0 : static_cast<int>(scale->stride(0));
      table.scale = static_cast<const float*>(scale->data_ptr()) + first * table.scale_stride;
    }
    table.scale_was_one = first == 0 ? scale_was_one : nullptr;
    table.grads_at_one = grads_at_one;
    for (int i = 0; i < table.items && !addends.empty(); ++i) {
      table.item[i].grad.addend = addend_of(addends.at(first + i), grads[first + i]);
    }
    const auto kernel = addends.empty() ? kernels(p).backward : kernels(p).backward_added;
    check(launch(kernel, plan_backward(table, on.device), table, on.stream));
  });
}

// `addends`, if there are any, are added to the gradients. `note`, if there, is one int32 of pinned host memory that
// receives whether `scale` was 1. With `grads_at_one` the gradients at a scale of 1 are in `grads` already.
void attention_maps_backward(Tensors feats, Tensors slopes, std::optional<Tensor> scale, Tensors addends,
                             Tensors grads, double p, std::optional<Tensor> note, bool grads_at_one) {
  const OnDevice on(feats.at(0), p);
  run_backward(on, feats, slopes, scale ? &*scale : nullptr, grads, addends, p,
               note ? static_cast<int32_t*>(note->data_ptr()) : nullptr, grads_at_one);
}

// The pairs' features in tables of max_pairs; what else a table holds is left empty.
std::vector<LossTable> tables_of(const Tensors& students, const Tensors& teachers, const Tensors& grads) {
  STD_TORCH_CHECK(teachers.size() == students.size() && (grads.empty() || grads.size() == students.size()),
                  "at_fused: lists of different lengths");
  std::vector<LossTable> tables;
  for (size_t i = 0; i < students.size(); ++i) {
    if (i % max_pairs == 0) tables.push_back({});
    Pair& pair = tables.back().pair[tables.back().pairs++];
    Gradient none;
    pair.student = feature_of(students[i], grads.empty() ? nullptr : &grads[i], pair.grad);
    pair.teacher = feature_of(teachers[i], nullptr, none);
    pair.batch = batch_of(students[i]);
    pair.index = static_cast<int>(i);
    STD_TORCH_CHECK(batch_of(teachers[i]) == pair.batch && pair.teacher.positions == pair.student.positions,
                    "at_fused: the maps of a pair must have the same shape");
  }
  return tables;
}

// Plans every table; returns whether the one-pass form pays for all.
bool plan(std::vector<LossTable>& tables, const Device& device, double p) {
  int64_t bytes = 0;
  for (const LossTable& table : tables) {
    for (int i = 0; i < table.pairs; ++i) bytes += sample_bytes(table.pair[i]) * table.pair[i].batch;
  }
  const bool streams = bytes > device.l2 && &kernels(p) != &power_any;  // powf takes longer than memory
  bool one_pass = true;
  for (LossTable& table : tables) one_pass = plan_loss(table, device, streams) && one_pass;
  return one_pass;
}

bool one_pass_pays(Tensors students, Tensors teachers, double p) {
  const OnDevice on(students.at(0), p);
  auto tables = tables_of(students, teachers, {});
  return plan(tables, on.device, p);
}

// `loss` is () or (n_pairs,). Slopes and gradients are written if their lists are not empty; the gradients, for which
// the students' slopes are needed, in the same pass where that pays, else in a launch of their own. `workspace` has a
// double per sample and one more.
void attention_loss(Tensors students, Tensors teachers, std::vector<double> weights, Tensor loss,
                    Tensors student_slopes, Tensors teacher_slopes, Tensors grads, Tensor workspace, double p,
                    double eps) {
  const size_t pairs = students.size();
  STD_TORCH_CHECK(weights.size() == pairs &&
                      (student_slopes.empty() || student_slopes.size() == pairs) &&
                      (teacher_slopes.empty() || teacher_slopes.size() == pairs) &&
                      (grads.empty() || !student_slopes.empty()),
                  "at_fused: lists of different lengths");
  const OnDevice on(students.at(0), p);
  auto tables = tables_of(students, teachers, grads);

  int samples = 0;
  auto* const partials = static_cast<double*>(workspace.data_ptr());
  for (LossTable& table : tables) {
    for (int i = 0; i < table.pairs; ++i) {
      Pair& pair = table.pair[i];
      const int64_t elements = int64_t{pair.batch} * pair.student.positions;
      pair.weight = elements ? weights[pair.index] / static_cast<double>(elements) : 0;
      if (!student_slopes.empty()) pair.student_slopes = floats(student_slopes[pair.index], elements);
      if (!teacher_slopes.empty()) pair.teacher_slopes = floats(teacher_slopes[pair.index], elements);
      pair.partials = partials + samples;
      samples += pair.batch;
    }
  }
  STD_TORCH_CHECK(workspace.scalar_type() == ScalarType::Double && workspace.is_contiguous() &&
                      workspace.numel() > samples,
                  "at_fused: the workspace is too small");

  const bool reduce = loss.dim() == 0, one_pass = plan(tables, on.device, p) && !grads.empty();
  unsigned* counter = counter_of(on.device, on.stream);
  if (!counter) {
    counter = reinterpret_cast<unsigned*>(partials + samples);
    check(cudaMemsetAsync(counter, 0, sizeof(unsigned), on.stream));
  }
  for (LossTable& table : tables) {
    table.loss = floats(loss, reduce ? 1 : static_cast<int64_t>(pairs));
    table.partials = partials;
    table.counter = counter;  // in turns: each launch leaves it at 0
    table.p = static_cast<float>(p);
    table.eps = static_cast<float>(eps);
    table.all_samples = &table == &tables.back() ? samples : -1;
    table.reduce = reduce;
    const auto kernel = one_pass ? kernels(p).loss_one_pass : kernels(p).loss;
    check(launch(kernel, loss_grid(table, one_pass), table, on.stream));
  }
  if (!grads.empty() && !one_pass) {
    run_backward(on, students, student_slopes, nullptr, grads, {}, p, nullptr, false);
  }
}

// Why this build can't run on a device, or "".
std::string problem_with(int64_t device_index) {
  const torch::stable::accelerator::DeviceGuard guard(static_cast<int32_t>(device_index));
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(power2.loss));
  cudaGetLastError();  // asked and answered: it must not surface in a later call
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

// Positions of the largest map of which two fit a block.
int64_t largest_map(int64_t device_index) {
  const torch::stable::accelerator::DeviceGuard guard(static_cast<int32_t>(device_index));
  Device device;
  check(current_device(device, power2));
  constexpr int most_scratch = threads * 8 * sizeof(float) + 2 * 128;  // a vector per thread, and alignment
  return (device.shared_per_block - maps_offset - most_scratch) / (2 * static_cast<int>(sizeof(float)));
}

}  // namespace
}  // namespace at_fused::cuda

STABLE_TORCH_LIBRARY(at_fused_cuda, library) {
  library.def("attention_maps(Tensor[] feats, Tensor(a!)[] maps, float p) -> ()");
  library.def(
      "attention_maps_backward(Tensor[] feats, Tensor[] slopes, Tensor? scale, Tensor[] addends, Tensor(a!)[] grads, "
      "float p, Tensor(b!)? note, bool grads_at_one) -> ()");
  library.def(
      "attention_loss(Tensor[] students, Tensor[] teachers, float[] weights, Tensor(a!) loss, "
      "Tensor(b!)[] student_slopes, Tensor(c!)[] teacher_slopes, Tensor(d!)[] grads, Tensor(e!) workspace, float p, "
      "float eps) -> ()");
  library.def("one_pass_pays(Tensor[] students, Tensor[] teachers, float p) -> bool");
  library.def("problem_with(int device) -> str");
  library.def("largest_map(int device) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(at_fused_cuda, CompositeExplicitAutograd, library) {
  library.impl("attention_maps", TORCH_BOX(&at_fused::cuda::attention_maps));
  library.impl("attention_maps_backward", TORCH_BOX(&at_fused::cuda::attention_maps_backward));
  library.impl("attention_loss", TORCH_BOX(&at_fused::cuda::attention_loss));
  library.impl("one_pass_pays", TORCH_BOX(&at_fused::cuda::one_pass_pays));
  library.impl("problem_with", TORCH_BOX(&at_fused::cuda::problem_with));
  library.impl("largest_map", TORCH_BOX(&at_fused::cuda::largest_map));
}
