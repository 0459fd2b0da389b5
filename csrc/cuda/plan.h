// How tensors become tables and tables become launches: plain host code.
#pragma once

#include <algorithm>
#include <numeric>

#include "shared.cuh"

namespace at_fused::cuda {

struct Device {
  int multiprocessors;
  int shared_per_block;  // bytes, as all sizes
  int shared_per_multiprocessor;
  int l2;
  int max_team_log2;   // of the blocks that may share a sample: 0 without clusters
  unsigned* counters;  // max_counters
};

struct Grid {
  int blocks, cluster, shared_bytes;
};

// --- memory layout ---

// A feature whose spatial dimensions have been merged into one.
struct Strided {
  void* data;
  DType dtype;
  int64_t batch, channels, positions;
  int64_t batch_stride, channel_stride, position_stride;
};

// Of a tensor (B, C, *spatial) with `dims` dimensions; false where its positions are not evenly spaced.
inline bool merge_positions(Strided& feat, const int64_t* sizes, const int64_t* strides, int dims) {
  feat.batch = sizes[0], feat.channels = sizes[1], feat.positions = 1;
  feat.batch_stride = strides[0], feat.channel_stride = strides[1], feat.position_stride = 1;
  for (int i = dims - 1; i >= 2; --i) {
    if (sizes[i] == 1) continue;
    if (feat.positions == 1) {
      feat.position_stride = strides[i];
    } else if (strides[i] != feat.positions * feat.position_stride) {
      return false;
    }
    feat.positions *= sizes[i];
  }
  return true;
}

inline bool has_rows(const Strided& feat, bool channels_last) {
  return channels_last ? feat.channels == 1 || feat.channel_stride == 1
                       : feat.positions == 1 || feat.position_stride == 1;
}

inline int64_t row_stride_of(const Strided& feat, bool channels_last) {
  if (channels_last) return feat.positions == 1 ? feat.channels : feat.position_stride;
  return feat.channels == 1 ? feat.positions : feat.channel_stride;
}

inline bool has_vectors(const Strided& feat, bool channels_last) {
  const int width = 16 / size_of(feat.dtype);
  const int64_t row_stride = row_stride_of(feat, channels_last);
  if (reinterpret_cast<uintptr_t>(feat.data) % 16 || (feat.batch > 1 && feat.batch_stride % width)) return false;
  if (channels_last) return feat.channels % width == 0 && row_stride % width == 0;
  if (feat.positions % width == 0) return row_stride % width == 0;
  return row_stride == feat.positions && feat.channels * feat.positions % width == 0;  // folded
}

// Fills `feat` and, where `grad` is one, `out`. Returns why the kernels can't serve them, or null.
inline const char* describe(const Strided& x, const Strided* grad, Feature& feat, Gradient& out) {
  constexpr int64_t most = 1 << 30;
  const bool channels_last = has_rows(x, true) && (!has_rows(x, false) || x.positions == 1);
  if (!has_rows(x, channels_last) || (grad && !has_rows(*grad, channels_last))) {
    return "neither its channels nor its positions are contiguous";
  }
  const int64_t row_stride = row_stride_of(x, channels_last);
  const int64_t grad_row_stride = grad ? row_stride_of(*grad, channels_last) : 0;
  if (x.channels * x.positions > most || x.batch > most / max_team || row_stride > most || grad_row_stride > most) {
    return "it is too large";
  }
  feat = {};
  feat.data = x.data;
  feat.batch_stride = x.batch_stride;
  feat.row_stride = static_cast<int>(row_stride);
  feat.channels = static_cast<int>(x.channels);
  feat.positions = static_cast<int>(x.positions);
  feat.dtype = x.dtype;
  feat.channels_last = channels_last;
  feat.vectors = has_vectors(x, channels_last) && (!grad || has_vectors(*grad, channels_last));
  if (channels_last) {
    feat.rows = feat.positions;
    feat.row_length = feat.channels;
  } else {  // folded where the vectors don't divide the positions
    feat.row_length = std::lcm(feat.positions, feat.vector_width());
    if (feat.row_length != feat.positions) feat.row_stride = feat.row_length;
    feat.rows = feat.row_length ? divide_up(feat.channels * feat.positions, feat.row_length) : feat.channels;
  }
  if (grad) out = {grad->data, grad->batch_stride, feat.folded() ? feat.row_length : static_cast<int>(grad_row_stride)};
  return nullptr;
}

// --- shares ---

// Shares slices of so many positions, or channels-first of so many rows, among a block's threads.
inline void tile(Feature& feat, const Slice& slice) {
  Tiling& tiling = feat.tiling;
  const int columns = divide_up(slice.length_of(feat), feat.vector_width());
  if (feat.channels_last) {  // a power of two of a warp's lanes per position, or one that takes few vectors alone
    tiling.width = 1;
    while (columns >= max_unroll && tiling.width < 32 && tiling.width < columns) tiling.width *= 2;
    tiling.passes = divide_up(columns, tiling.width);
    tiling.groups = threads / tiling.width;
    tiling.steps = divide_up(slice.positions, tiling.groups);
  } else {
    const int rows = slice.end_of(feat) - slice.row;
    tiling.passes = divide_up(columns, threads);
    tiling.width = tiling.passes ? divide_up(columns, tiling.passes) : 1;
    tiling.groups = std::min(threads / tiling.width, rows);
    tiling.steps = divide_up(rows, tiling.groups);
  }
}

inline int64_t sample_bytes(const Feature& feat) {
  return static_cast<int64_t>(feat.channels) * feat.positions * size_of(feat.dtype);
}

inline int64_t sample_bytes(const Pair& pair) { return sample_bytes(pair.student) + sample_bytes(pair.teacher); }

// --- loss ---

// Gives each sample 2^team_log2 blocks; false where a pair can't be shared so.
inline bool share(Pair& pair, int team_log2) {
  const int team = 1 << team_log2, positions = pair.student.positions;
  const int chunk = team == 1 ? positions : divide_up(positions, 8 * team) * 8;  // whole vectors of any dtype
  if (team > 1 && (pair.student.folded() || pair.teacher.folded() || (team - 1) * chunk >= positions)) return false;
  pair.team_log2 = team_log2;
  pair.chunk = chunk;
  tile(pair.student, {0, chunk});
  tile(pair.teacher, {0, chunk});
  const int scratch = std::max(scratch_floats(pair.student), scratch_floats(pair.teacher));
  pair.scratch = maps_offset + aligned(2 * static_cast<int>(sizeof(float)) * chunk);
  pair.stage = pair.scratch + aligned(static_cast<int>(sizeof(float)) * scratch);
  return true;
}

// Two blocks must fit a multiprocessor: while one waits at a barrier, the other keeps the memory busy.
inline bool fits_twice(const Pair& pair, const Device& device) {
  constexpr int reserved = 1024;  // per block
  return shared_bytes(pair, true) <= device.shared_per_multiprocessor / 2 - reserved;
}

// Teams, grid and order of the pairs in `table`. `streams`: the call's activations exceed the L2 cache, so that a
// student's second read costs device memory. Returns whether the one-pass form pays. Both forms have the same
// teams, hence the same bits.
inline bool plan_loss(LossTable& table, const Device& device, bool streams) {
  Pair *const first = table.pair, *const last = first + table.pairs;
  const int most_log2 = device.max_team_log2;

  bool one_pass = streams;
  for (Pair* pair = first; pair != last; ++pair) {
    share(*pair, 0);
    while (one_pass && !fits_twice(*pair, device)) {
      one_pass = pair->team_log2 < most_log2 && share(*pair, pair->team_log2 + 1);
    }
  }
  for (Pair* pair = first; !one_pass && pair != last; ++pair) share(*pair, 0);

  // Few samples: more blocks for the largest, until there are two for every multiprocessor.
  const auto block_bytes = [](const Pair& pair) { return sample_bytes(pair) >> pair.team_log2; };
  const auto smaller = [&](const Pair& a, const Pair& b) { return block_bytes(a) < block_bytes(b); };
  constexpr int64_t worth_splitting = 64 << 10;  // bytes; below, an estimate, blocks wait more than they read
  for (;;) {
    int64_t blocks = 0;
    for (Pair* pair = first; pair != last; ++pair) blocks += int64_t{pair->batch} << pair->team_log2;
    if (first == last || blocks >= 2 * device.multiprocessors) break;
    Pair& largest = *std::max_element(first, last, smaller);
    if (block_bytes(largest) < worth_splitting || largest.team_log2 == most_log2) break;
    if (!share(largest, largest.team_log2 + 1)) break;
  }

  std::stable_sort(first, last, [&](const Pair& a, const Pair& b) { return smaller(b, a); });
  table.cluster_log2 = 0;
  table.samples = 0;
  for (Pair* pair = first; pair != last; ++pair) {
    table.cluster_log2 = std::max(table.cluster_log2, pair->team_log2);
    table.samples += pair->batch;
  }
  int cluster = 0;
  for (Pair* pair = first; pair != last; ++pair) {
    pair->first_cluster = cluster;
    cluster += divide_up(pair->batch, 1 << (table.cluster_log2 - pair->team_log2));
  }
  return one_pass;
}

// The grid of a planned table: at least one cluster, which writes the loss of no samples.
inline Grid loss_grid(const LossTable& table, bool one_pass) {
  int clusters = 0;
  int64_t shared = maps_offset;
  for (int i = 0; i < table.pairs; ++i) {
    const Pair& pair = table.pair[i];
    clusters += divide_up(pair.batch, 1 << (table.cluster_log2 - pair.team_log2));
    shared = std::max(shared, shared_bytes(pair, one_pass));
  }
  const int size = 1 << table.cluster_log2;
  return {std::max(clusters, 1) * size, size, static_cast<int>(std::min<int64_t>(shared, INT_MAX))};
}

// --- maps and gradients ---

inline Grid plan_maps(ItemTable& table) {
  Grid grid{0, 1, 0};
  for (Item* item = table.item; item != table.item + table.items; ++item) {
    tile(item->feat, {0, item->feat.positions});
    item->first_block = grid.blocks;
    grid.blocks += item->batch;
    grid.shared_bytes = std::max(grid.shared_bytes, static_cast<int>(sizeof(float)) * scratch_floats(item->feat));
  }
  return grid;
}

// Slices of 16 to 32 KiB, so that every multiprocessor has several blocks and a block several vectors per thread.
inline Grid plan_backward(ItemTable& table, const Device& device) {
  int64_t bytes = 0;
  for (int i = 0; i < table.items; ++i) bytes += sample_bytes(table.item[i].feat) * table.item[i].batch;
  const int64_t per_block = std::clamp<int64_t>(bytes / (8 * device.multiprocessors), 16 << 10, 32 << 10);
  Grid grid{0, 1, 0};
  for (Item* item = table.item; item != table.item + table.items; ++item) {
    Feature& feat = item->feat;
    const int64_t row_bytes = std::max<int64_t>(int64_t{feat.row_length} * size_of(feat.dtype), 1);
    item->rows_per_slice = static_cast<int>(std::clamp<int64_t>(per_block / row_bytes, 1, std::max(feat.rows, 1)));
    item->slices = divide_up(feat.rows, item->rows_per_slice);
    tile(feat, feat.channels_last ? Slice{0, item->rows_per_slice}
                                  : Slice{0, feat.positions, 0, item->rows_per_slice});
    item->first_block = grid.blocks;
    grid.blocks += item->batch * item->slices;
  }
  table.blocks = grid.blocks;
  // Where there is nothing to do as a rule, the blocks should not outnumber what runs at once.
  if (table.grads_at_one) grid.blocks = std::min(grid.blocks, 2 * device.multiprocessors);
  return grid;
}

}  // namespace at_fused::cuda
