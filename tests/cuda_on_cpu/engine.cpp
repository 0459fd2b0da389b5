// Compiled without ThreadSanitizer, also where the kernels are not: it tells ThreadSanitizer by hand what happens.
#include "engine.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <vector>

#include "context.h"

#ifdef SIMT_TSAN
#include <sanitizer/tsan_interface.h>
extern "C" void __tsan_ignore_thread_begin();
extern "C" void __tsan_ignore_thread_end();
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace simt {

Device device;
unsigned last_cluster = 0, last_grid = 0;
std::map<std::string, int> calls;
uint64_t seed = 0;

namespace {

constexpr size_t stack_bytes = 128 << 10;
constexpr size_t shared_alignment = 128;

void release([[maybe_unused]] void* clock) {
#ifdef SIMT_TSAN
  __tsan_release(clock);
#endif
}

void acquire([[maybe_unused]] void* clock) {
#ifdef SIMT_TSAN
  __tsan_acquire(clock);
#endif
}

// What the engine itself allocates and writes is none of ThreadSanitizer's business.
struct Unwatched {
#ifdef SIMT_TSAN
  Unwatched() { __tsan_ignore_thread_begin(); }
  ~Unwatched() { __tsan_ignore_thread_end(); }
#else
  Unwatched() {}
#endif
};

// --- fibres -----------------------------------------------------------------------------------------------------

struct Fiber {
  Context context;
  void* stack = nullptr;
  size_t size = 0;
#ifdef SIMT_TSAN
  void* tsan = nullptr;
#endif
};

void switch_fibers(Fiber& from, Fiber& to) {
#ifdef SIMT_TSAN
  __tsan_switch_to_fiber(to.tsan, __tsan_switch_to_fiber_no_sync);
#endif
#ifdef __SANITIZE_ADDRESS__
  void* fake_stack;
  __sanitizer_start_switch_fiber(&fake_stack, to.stack, to.size);
#endif
  from.context.switch_to(to.context);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
}

// Fibres with stacks, made once. Under ThreadSanitizer no two threads of a launch share one while there are
// enough, lest the order of the blocks look like synchronisation.
class Pool {
 public:
  ~Pool() {
    for (const auto& fiber : fibers_) std::free(fiber->stack);
  }

  void start_launch() { next_ = 0; }

  void start_cluster([[maybe_unused]] size_t threads) {
#ifdef SIMT_TSAN
    constexpr size_t most = 2048;  // each costs ThreadSanitizer a megabyte and some milliseconds
    if (next_ + threads <= most) return;
#endif
    next_ = 0;
  }

  Fiber& next(void (*entry)()) {
    if (next_ == fibers_.size()) {
      auto fiber = std::make_unique<Fiber>();
      fiber->stack = std::malloc(stack_bytes);
      fiber->size = stack_bytes;
#ifdef SIMT_TSAN
      fiber->tsan = __tsan_create_fiber(0);
#endif
      fibers_.push_back(std::move(fiber));
    }
    Fiber& fiber = *fibers_[next_++];
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(fiber.stack, fiber.size);  // what the last thread left there
#endif
    fiber.context.start(fiber.stack, fiber.size, entry);
    return fiber;
  }

 private:
  std::vector<std::unique_ptr<Fiber>> fibers_;
  size_t next_ = 0;
};

// --- threads and what they wait for -----------------------------------------------------------------------------

std::string at(const Site& site) {
  const std::string file = site.file;
  return " at " + file.substr(file.rfind('/') + 1) + ":" + std::to_string(site.line);
}

// Opens when all its members have arrived; threads that return are members no longer.
struct Barrier {
  const char* name;
  unsigned members = 0, arrived = 0, phase = 0;
  Site site{};
  char clocks[2];  // by parity of the phase, so that fast threads' next arrival does not count

  void open() {
    arrived = 0;
    ++phase;
  }

  void leave() {
    if (--members == arrived && arrived) open();
  }
};

struct LaneBarrier : Barrier {
  Lanes lanes[2];  // by parity of the phase
};

struct Warp {
  uint32_t live = 0;
  std::map<uint32_t, LaneBarrier> barriers;  // by mask
};

struct Memory {
  size_t size;
  std::unique_ptr<void, decltype(&std::free)> data;

  explicit Memory(size_t bytes) : size(bytes), data(nullptr, &std::free) {
    void* memory = nullptr;
    if (posix_memalign(&memory, shared_alignment, bytes)) throw std::bad_alloc();
    std::memset(memory, 0xFF, bytes);
    data.reset(memory);
  }
};

struct Block {
  uint3 index{};
  unsigned rank = 0;
  Barrier barrier{"__syncthreads"};
  std::vector<Warp> warps;
  std::map<const void*, Memory> shared;  // static arrays by variable, the dynamic one under nullptr
  char exit_clock = 0;

  Memory& memory(const void* variable, size_t bytes) { return shared.try_emplace(variable, bytes).first->second; }
};

struct Thread {
  Block* block;
  uint3 index;
  unsigned linear;
  Fiber* fiber;
  bool done = false;
  Barrier* waits = nullptr;
  unsigned phase = 0;
  unsigned cluster_phase = 0;
  bool fenced = false;
  void* last_atomic = nullptr;

  Warp& warp() { return block->warps[linear / 32]; }
  bool ready() const { return !done && !(waits && waits->phase == phase); }
};

std::string name_of(const uint3& index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " + std::to_string(index.z) + ")";
}

// --- the launch under way ---------------------------------------------------------------------------------------

struct Launch {
  const std::function<void()>* body = nullptr;
  std::vector<Block> blocks;  // of the cluster under way
  std::vector<Thread> threads;
  Barrier cluster_barrier{"cluster.sync"};
  Thread* current = nullptr;
  std::string error;
  char start_clock = 0, end_clock = 0;
};

Launch launch;
Fiber scheduler;
Pool pool;
std::mt19937_64 random_order;
std::mutex launches;

Thread& self() {
  if (!launch.current) throw Error("device code was called outside a kernel");
  return *launch.current;
}

void yield() { switch_fibers(*self().fiber, scheduler); }

void arrive(Barrier& barrier, Site site, bool orders_memory, unsigned& phase) {
  if (barrier.arrived == 0) {
    barrier.site = site;
  } else if (barrier.site != site) {
    fail(std::string("divergence: in ") + barrier.name + at(site) + " while others wait in the one" +
         at(barrier.site));
  }
  phase = barrier.phase;
  if (orders_memory) release(&barrier.clocks[phase & 1]);
  if (++barrier.arrived == barrier.members) barrier.open();
}

void wait(Barrier& barrier, bool orders_memory, unsigned phase) {
  Thread& thread = self();
  thread.waits = &barrier;
  thread.phase = phase;
  if (!thread.ready()) yield();
  thread.waits = nullptr;
  if (orders_memory) acquire(&barrier.clocks[phase & 1]);
}

LaneBarrier& lane_barrier(uint32_t mask) {
  const Unwatched engine;
  Thread& thread = self();
  Warp& warp = thread.warp();
  if (!(mask >> lane() & 1)) fail("its own lane is not in the mask of a warp operation");
  const auto [entry, is_new] = warp.barriers.try_emplace(mask);
  if (is_new) {
    entry->second.name = "a warp operation";
    entry->second.members = __builtin_popcount(mask & warp.live);
  }
  return entry->second;
}

void leave() {
  Thread& thread = self();
  Block& block = *thread.block;
  thread.done = true;
  thread.warp().live &= ~(1u << lane());
  for (auto& [mask, barrier] : thread.warp().barriers) {
    if (mask >> lane() & 1) barrier.leave();
  }
  block.barrier.leave();
  launch.cluster_barrier.leave();
  release(&block.exit_clock);
  release(&launch.end_clock);
  if (block.barrier.members == 0) {
    acquire(&block.exit_clock);
    block.shared.clear();
  }
}

void thread_entry() {
#ifdef __SANITIZE_ADDRESS__
  const void* stack;
  size_t size;
  __sanitizer_finish_switch_fiber(nullptr, &stack, &size);
  scheduler.stack = const_cast<void*>(stack);
  scheduler.size = size;
#endif
  acquire(&launch.start_clock);
  (*launch.body)();
  leave();
  yield();
}

void resume(Thread& thread) {
  launch.current = &thread;
  threadIdx = thread.index;
  blockIdx = thread.block->index;
  switch_fibers(scheduler, *thread.fiber);
  launch.current = nullptr;
}

std::string deadlock() {
  std::map<std::string, int> waiting;
  for (const Thread& thread : launch.threads) {
    if (!thread.done) ++waiting[thread.waits->name + at(thread.waits->site)];
  }
  std::string what = "deadlock:";
  for (const auto& [where, count] : waiting) {
    what += (what.back() == ':' ? " " : ", ") + std::to_string(count) + " threads wait in " + where;
  }
  return what;
}

void run_cluster(const uint3& first, dim3 cluster, size_t shared_bytes) {
  const size_t block_threads = size_t{blockDim.x} * blockDim.y * blockDim.z;
  const size_t count = size_t{cluster.x} * cluster.y * cluster.z;
  launch.cluster_barrier = {"cluster.sync", static_cast<unsigned>(count * block_threads)};
  launch.blocks = std::vector<Block>(count);
  launch.threads.clear();
  pool.start_cluster(count * block_threads);
  for (unsigned rank = 0; rank < count; ++rank) {
    Block& block = launch.blocks[rank];
    block.rank = rank;
    block.index = {first.x + rank % cluster.x, first.y + rank / cluster.x % cluster.y,
                   first.z + rank / cluster.x / cluster.y};
    block.barrier.members = block_threads;
    block.warps.resize((block_threads + 31) / 32);
    block.memory(nullptr, shared_bytes);
    for (unsigned i = 0; i < block_threads; ++i) {
      const uint3 index{i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
      launch.threads.push_back({&block, index, i, &pool.next(thread_entry)});
      block.warps[i / 32].live |= 1u << i % 32;
    }
  }
  release(&launch.start_clock);

  std::vector<Thread*> order;
  for (Thread& thread : launch.threads) order.push_back(&thread);
  for (size_t live = order.size(); live > 0;) {
    if (seed) std::shuffle(order.begin(), order.end(), random_order);
    bool progress = false;
    for (Thread* thread : order) {
      if (!thread->ready()) continue;
      progress = true;
      resume(*thread);
      live -= thread->done;
      if (!launch.error.empty()) throw Error(launch.error);
    }
    if (!progress) throw Error(deadlock());
  }
}

}  // namespace

void run(dim3 grid, dim3 block, dim3 cluster, size_t shared_bytes, const std::function<void()>& thread) {
  const std::lock_guard one_at_a_time(launches);
  const Unwatched engine;
#ifdef SIMT_TSAN
  scheduler.tsan = __tsan_get_current_fiber();
#endif
  gridDim = grid;
  blockDim = block;
  last_cluster = cluster.x * cluster.y * cluster.z;
  last_grid = grid.x * grid.y * grid.z;
  launch.body = &thread;
  launch.error.clear();
  random_order.seed(seed);
  pool.start_launch();
  std::vector<uint3> firsts;
  for (unsigned z = 0; z < grid.z; z += cluster.z) {
    for (unsigned y = 0; y < grid.y; y += cluster.y) {
      for (unsigned x = 0; x < grid.x; x += cluster.x) firsts.push_back({x, y, z});
    }
  }
  if (seed) std::shuffle(firsts.begin(), firsts.end(), random_order);
  for (const uint3& first : firsts) run_cluster(first, cluster, shared_bytes);
  acquire(&launch.end_clock);
}

void fail(const std::string& what) {
  const Thread& thread = self();
  const Unwatched engine;
  launch.error = "thread " + name_of(thread.index) + " of block " + name_of(thread.block->index) + ": " + what;
  yield();  // the scheduler throws, and never comes back
  std::abort();
}

void* dynamic_shared() { return self().block->shared.at(nullptr).data.get(); }

void* static_shared(const void* variable, size_t bytes) {
  const Unwatched engine;
  return self().block->memory(variable, bytes).data.get();
}

void* map_shared(const void* pointer, unsigned rank) {
  const Unwatched engine;
  if (rank >= launch.blocks.size()) fail("map_shared_rank: there is no block " + std::to_string(rank));
  for (const auto& [variable, memory] : self().block->shared) {
    const auto offset = static_cast<const char*>(pointer) - static_cast<const char*>(memory.data.get());
    if (offset < 0 || static_cast<size_t>(offset) >= memory.size) continue;
    Block& other = launch.blocks[rank];
    if (other.barrier.members == 0) fail("map_shared_rank: that block has returned");
    return static_cast<char*>(other.memory(variable, memory.size).data.get()) + offset;
  }
  fail("map_shared_rank: not a pointer into this block's shared memory");
}

unsigned lane() { return self().linear % 32; }
unsigned block_rank() { return self().block->rank; }
unsigned cluster_size() { return launch.blocks.size(); }

void sync_block(Site site) {
  Barrier& barrier = self().block->barrier;
  unsigned phase;
  arrive(barrier, site, true, phase);
  wait(barrier, true, phase);
}

void arrive_cluster(Site site) { arrive(launch.cluster_barrier, site, true, self().cluster_phase); }

void wait_cluster(Site) { wait(launch.cluster_barrier, true, self().cluster_phase); }

void sync_warp(uint32_t mask, Site site) {
  LaneBarrier& barrier = lane_barrier(mask);
  unsigned phase;
  arrive(barrier, site, true, phase);
  wait(barrier, true, phase);
}

Lanes exchange(uint32_t mask, uint64_t value, Site site) {
  LaneBarrier& barrier = lane_barrier(mask);
  Lanes& lanes = barrier.lanes[barrier.phase & 1];
  if (barrier.arrived == 0) lanes.present = 0;
  lanes.present |= 1u << lane();
  lanes.values[lane()] = value;
  unsigned phase;
  arrive(barrier, site, false, phase);
  wait(barrier, false, phase);
  return lanes;
}

// A fence before an atomic makes it a release, one after it an acquire.
void fence() {
  Thread& thread = self();
  thread.fenced = true;
  if (thread.last_atomic) acquire(thread.last_atomic);
}

void before_atomic(void* address) {
  if (self().fenced) release(address);
}

void after_atomic(void* address) { self().last_atomic = address; }

}  // namespace simt
