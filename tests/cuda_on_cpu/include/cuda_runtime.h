// The part of CUDA that the kernels use, for g++: device code runs on engine.h, and so do launches.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <map>
#include <tuple>
#include <type_traits>
#include <utility>

#include "../engine.h"

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

constexpr int warpSize = 32;

using std::isfinite;
using std::isinf;
using std::isnan;
using std::max;
using std::min;

// The kernel's line that calls.
#define SIMT_SITE_PARAMETERS const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define SIMT_SITE simt::Site{file, line}

// --- synchronisation --------------------------------------------------------------------------------------------

inline void __syncthreads(SIMT_SITE_PARAMETERS) { simt::sync_block(SIMT_SITE); }
inline void __syncwarp(unsigned mask = 0xffffffff, SIMT_SITE_PARAMETERS) { simt::sync_warp(mask, SIMT_SITE); }
inline void __threadfence() { simt::fence(); }
inline void __threadfence_block() { simt::fence(); }
[[noreturn]] inline void __trap() { simt::fail("__trap()"); }

template <class Int, class Update>
Int simt_atomic(Int* address, Update update) {
  static_assert(std::is_integral_v<Int>, "floating-point atomics are not deterministic");
  simt::before_atomic(address);
  Int old = __atomic_load_n(address, __ATOMIC_RELAXED);  // threads change at barriers only: none comes between
  __atomic_store_n(address, update(old), __ATOMIC_RELAXED);
  simt::after_atomic(address);
  return old;
}

template <class Int>
Int atomicAdd(Int* address, std::common_type_t<Int> value) {
  return simt_atomic(address, [=](Int old) { return old + value; });
}
inline unsigned atomicInc(unsigned* address, unsigned most) {
  return simt_atomic(address, [=](unsigned old) { return old >= most ? 0 : old + 1; });
}
template <class Int>
Int atomicExch(Int* address, std::common_type_t<Int> value) {
  return simt_atomic(address, [=](Int) { return value; });
}

// --- warps ------------------------------------------------------------------------------------------------------

template <class T>
T simt_shuffle(unsigned mask, T value, int source, simt::Site site) {
  static_assert(std::is_arithmetic_v<T> && sizeof(T) >= 4, "CUDA shuffles 4 or 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  const simt::Lanes lanes = simt::exchange(mask, bits, site);
  if (!(lanes.present >> source & 1)) {
    simt::fail("shuffle from lane " + std::to_string(source) + ", which takes no part");
  }
  std::memcpy(&value, &lanes.values[source], sizeof(T));
  return value;
}

// A source beyond the segment of `width` lanes is the lane itself.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, SIMT_SITE_PARAMETERS) {
  const int lane = simt::lane();
  return simt_shuffle(mask, value, (lane & -width) | (source & (width - 1)), SIMT_SITE);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, SIMT_SITE_PARAMETERS) {
  const int lane = simt::lane(), source = lane ^ bits;
  return simt_shuffle(mask, value, source < (lane & -width) + width ? source : lane, SIMT_SITE);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, SIMT_SITE_PARAMETERS) {
  const int lane = simt::lane(), source = lane + int(delta);
  return simt_shuffle(mask, value, source < (lane & -width) + width ? source : lane, SIMT_SITE);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, SIMT_SITE_PARAMETERS) {
  const int lane = simt::lane(), source = lane - int(delta);
  return simt_shuffle(mask, value, source >= (lane & -width) ? source : lane, SIMT_SITE);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, SIMT_SITE_PARAMETERS) {
  const simt::Lanes lanes = simt::exchange(mask, predicate != 0, SIMT_SITE);
  unsigned votes = 0;
  for (int i = 0; i < 32; ++i) votes |= (lanes.present >> i & 1 && lanes.values[i]) ? 1u << i : 0;
  return votes;
}
inline int __any_sync(unsigned mask, int predicate, SIMT_SITE_PARAMETERS) {
  return __ballot_sync(mask, predicate, file, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, SIMT_SITE_PARAMETERS) {
  return __ballot_sync(mask, !predicate, file, line) == 0;
}

// --- loads, stores, arithmetic ----------------------------------------------------------------------------------

template <class T> T __ldg(const T* p) { return *p; }
template <class T> T __ldcs(const T* p) { return *p; }
template <class T> T __ldcg(const T* p) { return *p; }
template <class T> void __stcs(T* p, std::common_type_t<T> value) { *p = value; }
template <class T> void __stcg(T* p, std::common_type_t<T> value) { *p = value; }

template <class To, class From>
To simt_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}
inline unsigned __float_as_uint(float x) { return simt_cast<unsigned>(x); }
inline int __float_as_int(float x) { return simt_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return simt_cast<float>(x); }
inline float __int_as_float(int x) { return simt_cast<float>(x); }
inline int __double2hiint(double x) { return static_cast<int>(simt_cast<uint64_t>(x) >> 32); }
inline double __hiloint2double(int high, int low) {
  return simt_cast<double>(uint64_t{static_cast<unsigned>(high)} << 32 | static_cast<unsigned>(low));
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __umulhi(unsigned x, unsigned y) { return uint64_t{x} * y >> 32; }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1 / x; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __powf(float x, float y) { return std::pow(x, y); }

// --- host -------------------------------------------------------------------------------------------------------

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
inline const char* cudaGetErrorString(cudaError_t e) { return e == cudaSuccess ? "no error" : "invalid argument"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

using cudaStream_t = struct CUstream_st*;

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrL2CacheSize,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrClusterLaunch,
};
inline cudaError_t cudaGetDevice(int* device) {
  *device = simt::device.ordinal;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const simt::Device& device = simt::device;
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = device.multiprocessors; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = int(device.shared_per_block); break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = int(device.shared_per_multiprocessor); break;
    case cudaDevAttrL2CacheSize: *value = device.l2; break;
    case cudaDevAttrComputeCapabilityMajor: *value = device.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = device.minor; break;
    case cudaDevAttrClusterLaunch: *value = device.cluster_launch; break;
  }
  return cudaSuccess;
}

inline cudaError_t cudaMemsetAsync(void* pointer, int value, size_t bytes, cudaStream_t) {
  ++simt::calls["cudaMemsetAsync"];
  std::memset(pointer, value, bytes);
  return cudaSuccess;
}

enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = simt::device.capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

inline cudaError_t cudaGetSymbolAddress(void** pointer, const void* symbol) {
  *pointer = const_cast<void*>(symbol);
  return cudaSuccess;
}

enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize,
  cudaFuncAttributePreferredSharedMemoryCarveout,
  cudaFuncAttributeNonPortableClusterSizeAllowed,
};

// Bytes of dynamic shared memory that a kernel may have: 48 KiB until it asks for more.
inline size_t& simt_shared_limit(const void* kernel) {
  static std::map<const void*, size_t> limits;
  return limits.try_emplace(kernel, 48 << 10).first->second;
}

inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  ++simt::calls["cudaFuncSetAttribute"];
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || size_t(value) > simt::device.shared_per_block) return cudaErrorInvalidValue;
  simt_shared_limit(kernel) = value;
  return cudaSuccess;
}

struct cudaFuncAttributes {
  int ptxVersion, binaryVersion;
};
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = {simt::device.ptx_version, simt::device.binary_version};
  return cudaSuccess;
}

enum cudaLaunchAttributeID {
  cudaLaunchAttributeClusterDimension,
  cudaLaunchAttributeProgrammaticStreamSerialization,
};
union cudaLaunchAttributeValue {
  struct {
    unsigned x, y, z;
  } clusterDim;
  int programmaticStreamSerializationAllowed;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

template <class... Parameters>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, void (*)(Parameters...), const cudaLaunchConfig_t* config) {
  if (config->gridDim.x > simt::device.blocks_per_cluster) return cudaErrorInvalidValue;
  *clusters = simt::device.multiprocessors;
  return cudaSuccess;
}

// Runs at once.
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  static_assert((sizeof(Parameters) + ... + 0) <= 32764, "a kernel's parameters take at most 32764 bytes");
  const auto& device = simt::device;
  const dim3 grid = config->gridDim, block = config->blockDim;
  dim3 cluster;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const auto& [id, value] = config->attrs[i];
    if (id != cudaLaunchAttributeClusterDimension) continue;
    cluster = {value.clusterDim.x, value.clusterDim.y, value.clusterDim.z};
  }
  const size_t threads = size_t{block.x} * block.y * block.z, blocks = size_t{cluster.x} * cluster.y * cluster.z;
  const unsigned most_blocks = device.has_clusters() ? device.blocks_per_cluster : 1;
  const bool shared_fits = config->dynamicSmemBytes <= simt_shared_limit(reinterpret_cast<const void*>(kernel));
  const bool fits = threads >= 1 && threads <= 1024 && block.z <= 64 &&
                    grid.x >= 1 && grid.x <= 0x7fffffff && grid.y >= 1 && grid.y <= 65535 &&
                    grid.z >= 1 && grid.z <= 65535 && shared_fits &&
                    blocks >= 1 && blocks <= most_blocks && grid.x % cluster.x == 0 && grid.y % cluster.y == 0 &&
                    grid.z % cluster.z == 0;
  if (!fits) return cudaErrorInvalidValue;
  if (!device.runs) return cudaSuccess;
  const std::tuple<std::decay_t<Parameters>...> values(std::forward<Arguments>(arguments)...);
  simt::run(grid, block, cluster, config->dynamicSmemBytes, [&] { std::apply(kernel, values); });
  return cudaSuccess;
}
