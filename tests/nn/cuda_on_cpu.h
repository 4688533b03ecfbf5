// Runs the CUDA sources of vptq/nn/kernels on a CPU, for tests: every thread of a block is a fiber, blocks go one after the other.
// Stands in for ptx.cuh, function by function. x86-64.
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

typedef uint32_t u32;
typedef uint16_t u16;
typedef unsigned long long u64;
typedef long long i64;
#define __device__
#define __global__
#define __shared__ static
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define DEVICE inline
#define DYNAMIC_SHARED(TYPE, NAME) TYPE* NAME = (TYPE*)emulated.shared

struct alignas(16) u32x4 { u32 x, y, z, w; };
struct Place { int x, y, z; };
static Place threadIdx, blockIdx, gridDim, blockDim;

extern "C" void switch_stack(void** save, void* load);
asm(R"(
switch_stack:
  push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp
  ret
)");

struct Barrier { int arrived = 0, generation = 0; };
struct Fiber { void* stack; char* memory; bool done; };
struct Warp { Barrier barrier; u32 words[32][6]; float number[32]; };
struct Emulated {
  char* shared;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Barrier block;
  int current, alive;
  void* scheduler;
  void (*body)(void*);
  void* argument;
};
static Emulated emulated;

static void yield_fiber() {
  const int me = emulated.current;
  switch_stack(&emulated.fibers[me].stack, emulated.scheduler);
}

static void meet(Barrier& barrier, int count) {
  const int generation = barrier.generation;
  if (++barrier.arrived == count) { barrier.arrived = 0; barrier.generation++; return; }
  while (barrier.generation == generation) yield_fiber();
}

static void __syncthreads() { meet(emulated.block, blockDim.x); }
static Warp& warp() { return emulated.warps[threadIdx.x / 32]; }
static void meet_warp() { meet(warp().barrier, 32); }

static float __shfl_xor_sync(u32, float value, int mask) {
  const int lane = threadIdx.x % 32;
  warp().number[lane] = value;
  meet_warp();
  const float other = warp().number[lane ^ mask];
  meet_warp();
  return other;
}

template <class T, class U> static T bits_as(U v) { T t; memcpy(&t, &v, 4); return t; }
static float __uint_as_float(u32 v) { return bits_as<float>(v); }
static u32 __float_as_uint(float v) { return bits_as<u32>(v); }
static u32 __funnelshift_r(u32 low, u32 high, int shift) { return u32(((u64(high) << 32) | low) >> (shift & 31)); }
static u32 __byte_perm(u32 a, u32 b, u32 how) {
  const u64 both = (u64(b) << 32) | a;
  u32 found = 0;
  for (int i = 0; i < 4; i++) found |= u32(both >> (8 * (how >> (4 * i) & 7)) & 255) << (8 * i);
  return found;
}
static int min(int a, int b) { return a < b ? a : b; }
static int max(int a, int b) { return a > b ? a : b; }

static i64 min(i64 a, i64 b) { return a < b ? a : b; }
static float rsqrtf(float v) { return 1 / sqrtf(v); }
static float exponential(float v) { return expf(v); }
static float read_fresh(const float* p) { return *p; }
static void __threadfence() {}
static u32 atomicAdd(u32* p, u32 n) { const u32 old = *p; *p += n; return old; }

DEVICE void wait_for_inputs() {}
DEVICE void let_next_begin() {}

template <int TYPE> DEVICE float widened(u16 h) {
  if (TYPE == 1) return __uint_as_float(u32(h) << 16);
  _Float16 f;
  memcpy(&f, &h, 2);
  return f;
}

template <int TYPE> DEVICE u16 narrowed(float f) {
  if (TYPE == 1) {
    const u32 v = __float_as_uint(f);
    return u16((v + 0x7fff + (v >> 16 & 1)) >> 16);
  }
  const _Float16 n = f;
  u16 h;
  memcpy(&h, &n, 2);
  return h;
}

template <int TYPE> DEVICE u32 fused_pair(u32 a, u32 b, u32 c) {
  u32 found = 0;
  for (int s = 0; s < 32; s += 16)
    found |= u32(narrowed<TYPE>(widened<TYPE>(u16(a >> s)) * widened<TYPE>(u16(b >> s)) + widened<TYPE>(u16(c >> s)))) << s;
  return found;
}

DEVICE u32 and_or(u32 value, u32 mask, u32 other) { return (value & mask) | other; }
DEVICE u32 shared_address(const void* p) { return u32((const char*)p - emulated.shared); }
DEVICE void copy_n(u32 to, const void* from, bool there, int n) {
  if (to % n || uintptr_t(from) % n) abort();  // as the GPU would
  if (there) memcpy(emulated.shared + to, from, n);
  else memset(emulated.shared + to, 0, n);
}
DEVICE void copy_4(u32 to, const u32* from, bool there) { copy_n(to, from, there, 4); }
DEVICE void copy_16(u32 to, const u32* from, bool there) { copy_n(to, from, there, 16); }
DEVICE void close_copies() {}
template <int N> DEVICE void await_copies() {}

template <int BYTES> DEVICE void read_constant(const char* p, u32* r) {
  if (uintptr_t(p) % BYTES) abort();
  if (BYTES == 2) r[0] = *(const u16*)p;
  else memcpy(r, p, BYTES);
}

template <int TYPE> DEVICE void multiply(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  Warp& w = warp();
  const u32 own[6] = {a0, a1, a2, a3, b0, b1};
  memcpy(w.words[lane], own, sizeof own);
  meet_warp();
  for (int i = 0; i < 4; i++) {
    const int column = 2 * t + i % 2;
    for (int k = 0; k < 16; k++) {
      const u32 a = w.words[g * 4 + k % 8 / 2][i / 2 + k / 8 * 2], b = w.words[column * 4 + k % 8 / 2][4 + k / 8];
      d[i] += widened<TYPE>(u16(a >> (k % 2 * 16))) * widened<TYPE>(u16(b >> (k % 2 * 16)));
    }
  }
  meet_warp();
}

static void run_fiber() {
  emulated.body(emulated.argument);
  emulated.fibers[emulated.current].done = true;
  emulated.alive--;
  for (;;) yield_fiber();
}

static void run_block(int threads) {
  constexpr size_t STACK = 64 << 10;
  emulated.warps.assign((threads + 31) / 32, Warp());
  emulated.block = Barrier();
  emulated.fibers.resize(threads);
  for (Fiber& fiber : emulated.fibers) {
    if (!fiber.memory) fiber.memory = (char*)aligned_alloc(64, STACK);
    void** top = (void**)(fiber.memory + STACK) - 2;
    *top = (void*)run_fiber;
    fiber.stack = top - 6;
    fiber.done = false;
  }
  emulated.alive = threads;
  while (emulated.alive)
    for (int i = 0; i < threads; i++)
      if (!emulated.fibers[i].done) {
        emulated.current = i;
        threadIdx = {i, 0, 0};
        switch_stack(&emulated.scheduler, emulated.fibers[i].stack);
      }
}

static void run_grid(int x, int y, int z, int threads, int shared_bytes, void (*body)(void*), void* argument) {
  emulated.body = body;
  emulated.argument = argument;
  gridDim = {x, y, z};
  blockDim = {threads, 1, 1};
  char* memory = (char*)aligned_alloc(1024, (shared_bytes + 2047) / 1024 * 1024);
  emulated.shared = memory;
  for (int k = 0; k < z; k++)
    for (int j = 0; j < y; j++)
      for (int i = 0; i < x; i++) {
        memset(memory, 0xFF, shared_bytes);  // NaN, so that what nobody wrote shows
        blockIdx = {i, j, k};
        run_block(threads);
      }
  free(memory);
}
