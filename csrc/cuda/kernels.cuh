// The kernels. A table's features lie side by side in the grid, the largest first.
#pragma once

#include "block.cuh"
#include "sample.cuh"

namespace at_fused::cuda {

// The slice of team member `member`; positions are split, rows are not.
__host__ __device__ inline Slice slice_of(const Pair& pair, int member) {
  const int first = member * pair.chunk, left = pair.student.positions - first;
  return {first, left < 0 ? 0 : (left < pair.chunk ? left : pair.chunk)};
}

// One counter per stream, 0 between launches.
static __device__ unsigned counters[max_counters];

// Sum of the squares of the thread's share of a map: in fp32, or in fp64 where they leave its range.
__device__ inline double squares_of(const float* map, int positions) {
  float sum = 0;
#pragma unroll 1
  for (int j = threadIdx.x; j < positions; j += threads) sum += map[j] * map[j];
  if (sum > 1e-24f && sum < 1e36f) return sum;
  double exact = 0;
#pragma unroll 1
  for (int j = threadIdx.x; j < positions; j += threads) exact += static_cast<double>(map[j]) * map[j];
  return exact;
}

// The square root, in fp32 of what is left of `x` = 4^e [1, 4) after 4^e: 0, infinity and NaN stay what they are.
__device__ inline float root(double x) {
  const int exponent = max(-300, min((__double2hiint(x) >> 20) - 1023, 300)) & ~1;
  const double scale = __hiloint2double((1023 - exponent) << 20, 0);
  return scalbnf(sqrtf(static_cast<float>(x * scale)), exponent / 2);
}

// The block that comes last adds the partial sums of all samples, always in the same order.
__device__ inline double sum_of(const double* partials, int count, SumRoom<1>& room) {
  double sum[1] = {0};
  for (int i = threadIdx.x; i < count; i += threads) sum[0] += static_cast<const volatile double*>(partials)[i];
  __syncthreads();  // the room may still be read
  return sum_over_block(sum, room);
}

__device__ inline void finish_loss(const LossTable& table, SumRooms& rooms) {
  if (!table.reduce) {
    for (int i = 0; i < table.pairs; ++i) {
      const Pair& pair = table.pair[i];
      const double sum = sum_of(pair.partials, pair.batch, rooms.loss);
      if (threadIdx.x == 0) table.loss[pair.index] = static_cast<float>(sum);
    }
  } else if (table.all_samples >= 0) {
    const double sum = sum_of(table.partials, table.all_samples, rooms.loss);
    if (threadIdx.x == 0) *table.loss = static_cast<float>(sum);
  }
}

// Loss and slopes of a (pair, sample) per team of blocks; one_pass: the student's gradient, too.
template <class Power, bool one_pass>
__global__ void __launch_bounds__(threads, Power::blocks) loss_kernel(const __grid_constant__ LossTable table) {
  const int cluster_size = 1 << table.cluster_log2;
  const int cluster = blockIdx.x >> table.cluster_log2, rank = blockIdx.x & (cluster_size - 1);
  int i = 0;
  while (i + 1 < table.pairs && table.pair[i + 1].first_cluster <= cluster) ++i;
  const Pair& pair = table.pair[i];
  const int member = rank & ((1 << pair.team_log2) - 1);
  const int sample = (((cluster - pair.first_cluster) << table.cluster_log2) + rank) >> pair.team_log2;
  const bool works = sample < pair.batch;  // else it only keeps the cluster's barriers company
  Slice slice = slice_of(pair, member);
  if (!works) slice.positions = 0;

  unsigned char* shared = shared_memory();
  auto& rooms = *reinterpret_cast<SumRooms*>(shared);
  auto* students = reinterpret_cast<float*>(shared + maps_offset);
  float* teachers = students + pair.chunk;
  auto* scratch = reinterpret_cast<float*>(shared + pair.scratch);
  unsigned char* stage = shared + pair.stage;

  const Power power(table.p);
  map_of<false>(pair.teacher, slice, sample, power, teachers, scratch, stage);
  map_of<one_pass>(pair.student, slice, sample, power, students, scratch, stage);

  double squares[2] = {squares_of(students, slice.positions), squares_of(teachers, slice.positions)};
  const float norm = root(sum_over_team(squares, rooms.norms, cluster_size, rank - member, 1 << pair.team_log2));
  const float student_norm = __shfl_sync(all_lanes, norm, 0), teacher_norm = __shfl_sync(all_lanes, norm, 1);
  const bool student_clamped = student_norm < table.eps, teacher_clamped = teacher_norm < table.eps;  // NaN stays NaN
  const float student_divisor = student_clamped ? table.eps : student_norm;
  const float teacher_divisor = teacher_clamped ? table.eps : teacher_norm;

  // With u, v the normalised maps and d = u - v: d|d|^2/dQ_S = 2 (d - u <u, d>) / |Q_S|, and likewise for v.
  float sums[4] = {0, 0, 0, 0};  // the last is none
#pragma unroll 1
  for (int j = threadIdx.x; j < slice.positions; j += threads) {
    const float u = students[j] / student_divisor, v = teachers[j] / teacher_divisor, d = u - v;
    students[j] = u;
    teachers[j] = v;
    sums[0] += d * d;
    sums[1] += u * d;
    sums[2] += v * d;
  }
  const double sum = sum_over_team(sums, rooms.distance, cluster_size, rank - member, 1 << pair.team_log2);
  arrive_at_cluster(cluster_size);  // it has read the others' sums
  const float along_u = __shfl_sync(all_lanes, static_cast<float>(sum), 1);
  const float along_v = __shfl_sync(all_lanes, static_cast<float>(sum), 2);
  const float along_student = student_clamped ? 0 : along_u;  // a clamped norm is a constant
  const float along_teacher = teacher_clamped ? 0 : along_v;

  const float weight = 2 * static_cast<float>(pair.weight);
  const float student_factor = weight / student_divisor, teacher_factor = -weight / teacher_divisor;
  const int64_t offset = static_cast<int64_t>(sample) * pair.student.positions + slice.position;
#pragma unroll 1
  for (int j = threadIdx.x; j < slice.positions; j += threads) {
    const float u = students[j], v = teachers[j], d = u - v;
    const float student_slope = (d - u * along_student) * student_factor;
    if (pair.student_slopes) pair.student_slopes[offset + j] = student_slope;
    if (pair.teacher_slopes) pair.teacher_slopes[offset + j] = (d - v * along_teacher) * teacher_factor;
    if (one_pass) students[j] = student_slope;
  }
  if (one_pass) __syncthreads();

  // Behind what all warps wait for; the counter's answer is looked at after the gradient.
  const bool counts = works && member == 0 && threadIdx.x == 0;
  unsigned before = 0;
  if (counts) {
    pair.partials[sample] = pair.weight * sum;
    __threadfence();
    before = atomicInc(table.counter, table.samples - 1);  // back to 0 for the next launch
  }
  if (one_pass) gradient_of<true, false>(pair.student, slice, sample, stage, power, students, table.p, pair.grad);
  if (threadIdx.x == 0) {
    rooms.last = counts ? before + 1 == table.samples : table.samples == 0 && blockIdx.x == 0;
    __threadfence();
  }
  wait_for_cluster(cluster_size);  // nobody leaves while its sums are read
  __syncthreads();
  if (rooms.last) finish_loss(table, rooms);
}

__device__ inline int item_of_block(const ItemTable& table, int block) {
  int i = 0;
  while (i + 1 < table.items && table.item[i + 1].first_block <= block) ++i;
  return i;
}

// Raw maps: a (feature, sample) per block.
template <class Power>
__global__ void __launch_bounds__(threads, Power::blocks) maps_kernel(const __grid_constant__ ItemTable table) {
  const Item& item = table.item[item_of_block(table, blockIdx.x)];
  const int64_t sample = static_cast<int>(blockIdx.x) - item.first_block;
  const Slice slice{0, item.feat.positions};
  map_of<false>(item.feat, slice, sample, Power(table.p), item.map + sample * item.feat.positions,
                reinterpret_cast<float*>(shared_memory()), nullptr);
}

// Gradients: a (feature, sample, slice) at a time.
template <class Power, bool added>
__global__ void __launch_bounds__(threads, Power::blocks) backward_kernel(const __grid_constant__ ItemTable table) {
  if (table.scale_was_one && blockIdx.x == 0 && threadIdx.x == 0) *table.scale_was_one = *table.scale == 1;
  if (table.grads_at_one && *table.scale == 1) return;
  int block = blockIdx.x;
#pragma unroll 1
  do {
    const int index = item_of_block(table, block);
    const Item& item = table.item[index];
    const float scale = table.scale ? table.scale[index * table.scale_stride] : 1;
    const int slice_index = block - item.first_block;
    const int64_t sample = slice_index / item.slices;
    Slice slice{0, item.feat.positions};
    slice.row = slice_index % item.slices * item.rows_per_slice;
    slice.end_row = slice.row + item.rows_per_slice;
    if (item.feat.channels_last) slice = {slice.row, slice.end_of(item.feat) - slice.row};
    gradient_of<false, added>(item.feat, slice, sample, nullptr, Power(table.p),
                       item.map + sample * item.feat.positions + slice.position, scale * table.p, item.grad);
    block += gridDim.x;
  } while (block < table.blocks);
}

template <class Power>
constexpr Kernels kernels_of() {
  return {loss_kernel<Power, false>,     loss_kernel<Power, true>,     maps_kernel<Power>,
          backward_kernel<Power, false>, backward_kernel<Power, true>, counters};
}

}  // namespace at_fused::cuda
