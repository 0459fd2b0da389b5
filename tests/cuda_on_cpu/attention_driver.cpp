// Runs the kernels of csrc/cuda in every form on small cases, each tensor an allocation of its own: what the
// sanitizers say of it is the test. The numbers are looked at only to see that something was computed.
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "cuda/launch.cuh"
#include "cuda/vector.cuh"

using namespace at_fused::cuda;

namespace {

void check(bool fine, const char* what) {
  if (fine) return;
  std::printf("failed: %s\n", what);
  std::exit(1);
}

void check(cudaError_t error) { check(error == cudaSuccess, cudaGetErrorString(error)); }

std::mt19937 generator(0);

// (batch, channels, positions), channels-first or -last, from byte `shift` of its memory on; a gradient like it.
struct Tensor {
  int batch, channels, positions;
  DType dtype;
  bool channels_last;
  int shift = 0;
  std::vector<char> data = std::vector<char>(size_t(batch) * channels * positions * size_of(dtype) + shift);
  std::vector<char> grad = data;
  std::vector<float> slopes = std::vector<float>(size_t(batch) * positions);

  void fill() {
    std::normal_distribution<float> normal;
    for (char* x = data.data() + shift; x != data.data() + data.size(); x += size_of(dtype)) {
      const float value = normal(generator);
      if (dtype == DType::f32) *reinterpret_cast<float*>(x) = value;
      if (dtype == DType::bf16) *reinterpret_cast<__nv_bfloat16*>(x) = __nv_bfloat16(value);
      if (dtype == DType::f16) *reinterpret_cast<__half*>(x) = __half(value);
    }
  }

  Strided strided(std::vector<char>& bytes) {
    const int64_t sample = int64_t{channels} * positions;
    return {bytes.data() + shift, dtype, batch, channels, positions, sample, channels_last ? 1 : positions,
            channels_last ? channels : 1};
  }

  void describe(Feature& feat, Gradient& out) {
    const Strided x = strided(data), dx = strided(grad);
    check(at_fused::cuda::describe(x, &dx, feat, out) == nullptr, "unsupported");
  }
};

struct Couple {
  Tensor student, teacher;
};

// Forward in either form, maps, backward.
void run(std::vector<Couple> couples, float p, bool one_pass, size_t shared_per_multiprocessor, bool reduce) {
  simt::device.shared_per_multiprocessor = shared_per_multiprocessor;
  Device device;
  check(query(device, kernels(p)));
  const int batch = couples[0].student.batch, pairs = couples.size();
  std::vector<double> partials(batch * pairs);
  std::vector<float> losses(reduce ? 1 : pairs, NAN);
  LossTable table{};
  ItemTable items{};
  for (int i = 0; i < pairs; ++i) {
    auto& [student, teacher] = couples[i];
    student.fill();
    teacher.fill();
    Pair& pair = table.pair[i];
    Gradient none;
    student.describe(pair.student, pair.grad);
    teacher.describe(pair.teacher, none);
    pair.student_slopes = student.slopes.data();
    pair.teacher_slopes = teacher.slopes.data();
    pair.weight = 1.0 / std::max(batch * student.positions, 1);
    pair.partials = partials.data() + i * batch;
    pair.batch = batch;
    pair.index = i;
  }
  table.loss = losses.data();
  table.partials = partials.data();
  table.counter = counter_of(device, nullptr);
  table.p = p;
  table.eps = 1e-12f;
  table.all_samples = batch * pairs;
  table.pairs = pairs;
  table.reduce = reduce;
  const bool pays = plan_loss(table, device, one_pass);
  check(pays || !one_pass, "one pass does not fit");
  check(launch(one_pass ? kernels(p).loss_one_pass : kernels(p).loss, loss_grid(table, one_pass), table, nullptr));
  for (const float loss : losses) check(batch ? loss >= 0 && loss < pairs : loss == 0, "wrong loss");

  const float scale = 3;
  for (auto& [student, teacher] : couples) {
    for (Tensor* tensor : {&student, &teacher}) {
      Item& item = items.item[items.items++];
      tensor->describe(item.feat, item.grad);
      item.map = tensor->slopes.data();
      item.batch = batch;
    }
  }
  items.p = p;
  items.scale = &scale;
  check(launch(kernels(p).backward, plan_backward(items, device), items, nullptr));
  items.grads_at_one = true;  // wrongly guessed: few blocks take all slices in turns
  Device few = device;
  few.multiprocessors = 1;
  check(launch(kernels(p).backward, plan_backward(items, few), items, nullptr));
  check(launch(kernels(p).maps, plan_maps(items), items, nullptr));
}

}  // namespace

int main() {
  constexpr size_t h100 = 228 << 10, small = 37 << 10;
  for (simt::seed = 0; simt::seed < 2; ++simt::seed) {
    for (const bool last : {false, true}) {
      for (const bool one_pass : {false, true}) {
        for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
          run({{{2, 8, 49, dtype, last}, {2, 5, 49, DType::f32, last}}}, 2, one_pass, h100, true);
          run({{{1, 1, 1, dtype, last}, {1, 9, 1, dtype, last}},
               {{1, 7, 30, dtype, last}, {1, 8, 30, dtype, !last}}},
              1, one_pass, h100, false);
        }
        run({{{0, 8, 9, DType::f32, last}, {0, 8, 9, DType::f32, last}}}, 4, one_pass, h100, true);
        // A cluster's blocks share the first pair's sample; the second pair's leave some of them idle.
        run({{{1, 24, 320, DType::f32, last}, {1, 24, 320, DType::bf16, last}},
             {{1, 8, 49, DType::f32, last}, {1, 8, 49, DType::f32, last}}},
            2, true, small, true);
      }
    }
    run({{{2, 3, 12, DType::f32, false}, {2, 4, 12, DType::f32, true}}}, 2.5f, false, h100, true);
    run({{{2, 8, 16, DType::f32, false, 4}, {2, 8, 16, DType::f16, true, 2}}}, 2, true, h100, true);
  }
}
