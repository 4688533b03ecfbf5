// Numbers in memory and in registers: TYPE 0 float16, 1 bfloat16, 2 float.

template <int TYPE> struct Numbers {
  typedef u16 Type;
  static constexpr u16 ZERO = 0;
};
constexpr int FLOAT = 2;
template <> struct Numbers<FLOAT> {
  typedef float Type;
  static constexpr float ZERO = 0;
};
template <int TYPE> DEVICE float read(typename Numbers<TYPE>::Type v) {
  if constexpr (TYPE == FLOAT) return v;
  else return widened<TYPE>(v);
}
template <int TYPE> DEVICE typename Numbers<TYPE>::Type written(float f) {
  if constexpr (TYPE == FLOAT) return f;
  else return narrowed<TYPE>(f);
}

// What a row of x is before anything else is done with it.
constexpr int PLAIN = 0;   // itself
constexpr int NORMED = 1;  // over its root mean square, times weights
constexpr int GATED = 2;   // silu(x), times other numbers

DEVICE float gated(float gate, float other) { return gate / (1 + exponential(-gate)) * other; }

DEVICE float sum_of_warp(float value) {
#pragma unroll
  for (int s = 16; s; s >>= 1) value += __shfl_xor_sync(~0u, value, s);
  return value;
}
