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

// The block that comes last adds the partial sums of all samples, always in the same order.
__device__ inline double sum_of(const double* partials, int count, SumRoom<1>& room) {
  double sum[1] = {0};
  for (int i = threadIdx.x; i < count; i += threads) sum[0] += static_cast<const volatile double*>(partials)[i];
  __syncthreads();  // the room may still be read
  sum_over_block(sum, room);
  return sum[0];
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
  constexpr int unroll = one_pass && Power::unroll > 1 ? 3 : Power::unroll;  // staging takes registers, too
  map_of<unroll>(pair.teacher, slice, sample, power, teachers, scratch, false, stage);
  map_of<unroll>(pair.student, slice, sample, power, students, scratch, one_pass, stage);

  double squares[2] = {0, 0};
  for (int j = threadIdx.x; j < slice.positions; j += threads) {
    squares[0] += static_cast<double>(students[j]) * students[j];
    squares[1] += static_cast<double>(teachers[j]) * teachers[j];
  }
  sum_over_team(squares, rooms.norms, cluster_size, rank - member, 1 << pair.team_log2);
  // As in fp32, clamped there: NaN stays NaN.
  const auto student_norm = static_cast<float>(sqrt(squares[0])), teacher_norm = static_cast<float>(sqrt(squares[1]));
  const bool student_clamped = student_norm < table.eps, teacher_clamped = teacher_norm < table.eps;
  const double student_inverse = 1 / static_cast<double>(student_clamped ? table.eps : student_norm);
  const double teacher_inverse = 1 / static_cast<double>(teacher_clamped ? table.eps : teacher_norm);

  // With u, v the normalised maps and d = u - v: d|d|^2/dQ_S = 2 (d - u <u, d>) / |Q_S|, and likewise for v.
  double sums[3] = {0, 0, 0};
  for (int j = threadIdx.x; j < slice.positions; j += threads) {
    const auto u = static_cast<float>(students[j] * student_inverse);
    const auto v = static_cast<float>(teachers[j] * teacher_inverse);
    const float d = u - v;
    students[j] = u;
    teachers[j] = v;
    sums[0] += static_cast<double>(d) * d;
    sums[1] += static_cast<double>(u) * d;
    sums[2] += static_cast<double>(v) * d;
  }
  sum_over_team(sums, rooms.distance, cluster_size, rank - member, 1 << pair.team_log2);
  if (threadIdx.x == 0) {
    rooms.last = table.samples == 0 && blockIdx.x == 0;
    if (works && member == 0) {
      pair.partials[sample] = pair.weight * sums[0];
      __threadfence();
      rooms.last = atomicAdd(table.counter, 1u) + 1 == static_cast<unsigned>(table.samples);
      __threadfence();
    }
  }
  const float along_student = student_clamped ? 0 : static_cast<float>(sums[1]);  // a clamped norm is a constant
  const float along_teacher = teacher_clamped ? 0 : static_cast<float>(sums[2]);

  const auto student_factor = static_cast<float>(2 * pair.weight * student_inverse);
  const auto teacher_factor = static_cast<float>(-2 * pair.weight * teacher_inverse);
  const int64_t offset = static_cast<int64_t>(sample) * pair.student.positions + slice.position;
  for (int j = threadIdx.x; j < slice.positions; j += threads) {
    const float u = students[j], v = teachers[j], d = u - v;
    const float student_slope = (d - u * along_student) * student_factor;
    if (pair.student_slopes) pair.student_slopes[offset + j] = student_slope;
    if (pair.teacher_slopes) pair.teacher_slopes[offset + j] = (d - v * along_teacher) * teacher_factor;
    if (one_pass) students[j] = student_slope;
  }
  if (one_pass) {
    __syncthreads();
    gradient_of<true>(pair.student, slice, sample, stage, power, students, table.p, pair.grad);
  }

  sync_cluster(cluster_size);  // nobody leaves while its sums are read
  if (rooms.last) finish_loss(table, rooms);
}

__device__ inline int item_of_block(const ItemTable& table) {
  int i = 0;
  while (i + 1 < table.items && table.item[i + 1].first_block <= static_cast<int>(blockIdx.x)) ++i;
  return i;
}

// Raw maps: a (feature, sample) per block.
template <class Power>
__global__ void __launch_bounds__(threads, Power::blocks) maps_kernel(const __grid_constant__ ItemTable table) {
  const Item& item = table.item[item_of_block(table)];
  const int64_t sample = static_cast<int>(blockIdx.x) - item.first_block;
  const Slice slice{0, item.feat.positions};
  map_of<Power::unroll>(item.feat, slice, sample, Power(table.p), item.map + sample * item.feat.positions,
         reinterpret_cast<float*>(shared_memory()), false, nullptr);
}

// Gradients: a (feature, sample, slice) per block.
template <class Power>
__global__ void __launch_bounds__(threads, Power::blocks) backward_kernel(const __grid_constant__ ItemTable table) {
  const int index = item_of_block(table);
  const Item& item = table.item[index];
  const float scale = table.scale ? table.scale[index * table.scale_stride] : 1;
  if (table.scale_was_one && blockIdx.x == 0 && threadIdx.x == 0) *table.scale_was_one = scale == 1;
  if (table.grads_at_one && scale == 1) return;
  const int block = static_cast<int>(blockIdx.x) - item.first_block;
  const int64_t sample = block / item.slices;
  Slice slice{0, item.feat.positions};
  slice.row = block % item.slices * item.rows_per_slice;
  slice.end_row = slice.row + item.rows_per_slice;
  if (item.feat.channels_last) slice = {slice.row, slice.end_of(item.feat) - slice.row};
  gradient_of<false>(item.feat, slice, sample, nullptr, Power(table.p),
                     item.map + sample * item.feat.positions + slice.position, scale * table.p, item.grad);
}

template <class Power>
constexpr Kernels kernels_of() {
  return {loss_kernel<Power, false>, loss_kernel<Power, true>, maps_kernel<Power>, backward_kernel<Power>};
}

}  // namespace at_fused::cuda
