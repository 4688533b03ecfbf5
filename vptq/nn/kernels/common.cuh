// What all kernels use. No header is needed.
//   PROGRAMMATIC   1: a kernel may begin before the one ahead of it has ended, and waits before it touches what that one wrote

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;
typedef long long i64;
#define DEVICE __device__ __forceinline__

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
