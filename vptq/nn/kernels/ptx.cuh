// What needs instructions of its own, each behind a name; all else is plain C++. Compiled before the other sources.
//   PROGRAMMATIC   1: a kernel may begin before the one ahead of it has ended, and waits before it touches what that one wrote

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;
typedef long long i64;
#define DEVICE __device__ __forceinline__
#define DYNAMIC_SHARED(TYPE, NAME) extern __shared__ TYPE NAME[]

struct alignas(16) u32x4 { u32 x, y, z, w; };

DEVICE void wait_for_inputs() {
#if PROGRAMMATIC
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

DEVICE void let_next_begin() {
#if PROGRAMMATIC
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Numbers of 16 bits: TYPE 0 float16, 1 bfloat16.
template <int TYPE> DEVICE float widened(u16 h) {
  if constexpr (TYPE == 1) return __uint_as_float(u32(h) << 16);
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
  return f;
}

template <int TYPE> DEVICE u16 narrowed(float f) {
  u16 h;
  if constexpr (TYPE == 0) asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
  else asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(f));
  return h;
}

// a b + c of two numbers each, rounded once.
template <int TYPE> DEVICE u32 fused_pair(u32 a, u32 b, u32 c) {
  if constexpr (TYPE == 0) asm("fma.rn.f16x2 %0, %0, %1, %2;" : "+r"(a) : "r"(b), "r"(c));
  else asm("fma.rn.bf16x2 %0, %0, %1, %2;" : "+r"(a) : "r"(b), "r"(c));
  return a;
}

DEVICE float exponential(float v) {
  v *= 1.44269504f;
  asm("ex2.approx.ftz.f32 %0, %0;" : "+f"(v));
  return v;
}

// What other blocks wrote: not from this multiprocessor's own cache.
DEVICE float read_fresh(const float* p) {
  float v;
  asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(v) : "l"(p) : "memory");
  return v;
}

// (value & mask) | other, in one instruction that the compiler does not take apart.
DEVICE u32 and_or(u32 value, u32 mask, u32 other) {
  asm("lop3.b32 %0, %0, %1, %2, 0xEA;" : "+r"(value) : "r"(mask), "r"(other));
  return value;
}

// Copies to shared memory that are waited for later; zeros where nothing is there to read.
DEVICE u32 shared_address(const void* p) { return u32(__cvta_generic_to_shared(p)); }
DEVICE void copy_4(u32 to, const u32* from, bool there) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(there ? 4 : 0) : "memory");
}
DEVICE void copy_16(u32 to, const u32* from, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(there ? 16 : 0) : "memory");
}
DEVICE void close_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> DEVICE void await_copies() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

// Constants in global memory, BYTES (2, 4, 8 or 16) at once.
template <int BYTES> DEVICE void read_constant(const char* p, u32* r) {
  if constexpr (BYTES == 2) { u16 h; asm("ld.global.nc.u16 %0, [%1];" : "=h"(h) : "l"(p)); r[0] = h; }
  if constexpr (BYTES == 4) asm("ld.global.nc.u32 %0, [%1];" : "=r"(r[0]) : "l"(p));
  if constexpr (BYTES == 8) asm("ld.global.nc.v2.u32 {%0,%1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "l"(p));
  if constexpr (BYTES == 16)
    asm("ld.global.nc.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "l"(p));
}

// The tensor cores' product: d (16 x 8) += a (16 x 16) b (16 x 8), spread over a warp as the PTX manual says (mma.m16n8k16).
template <int TYPE> DEVICE void multiply(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  if constexpr (TYPE == 0)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
