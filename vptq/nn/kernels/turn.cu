// A rotation (see quantize/rotation.py) of rows of numbers: the matrix small ⊗ H, H a Hadamard matrix of RUN columns, with
// signs before it or after. Each block makes RUN numbers of the answer, so that one row keeps many multiprocessors busy.
//   RUN      a power of two, 32 to 1024, and the threads of a block; HEIGHT: rows of `small`
//   IN, OUT  type of x and y: 0 float16, 1 bfloat16, 2 float
//   BACK     1: signs after the mixing, and bias

template <int TYPE> struct Numbers { typedef u16 Type; };
template <> struct Numbers<2> { typedef float Type; };
template <int TYPE> DEVICE float read(typename Numbers<TYPE>::Type v) {
  if constexpr (TYPE == 2) return v;
  else return widened<TYPE>(v);
}
template <int TYPE> DEVICE typename Numbers<TYPE>::Type written(float f) {
  if constexpr (TYPE == 2) return f;
  else return narrowed<TYPE>(f);
}

// x, y: (rows, blocks · HEIGHT · RUN); signs: (blocks, words of 32 signs down HEIGHT, RUN), a bit set for -1;
// small: (HEIGHT, HEIGHT), symmetric; bias: as a row of y, or null. Grid: (HEIGHT, blocks, rows).
extern "C" __global__ void __launch_bounds__(RUN)
    turn(const Numbers<IN>::Type* x, Numbers<OUT>::Type* y, const u32* signs, const float* small, const Numbers<OUT>::Type* bias) {
  constexpr int WORDS = (HEIGHT + 31) / 32;
  __shared__ float exchange[RUN], factors[HEIGHT];
  const int j = threadIdx.x, i = blockIdx.x;
  const i64 first = (i64(blockIdx.z) * gridDim.y + blockIdx.y) * HEIGHT * RUN + j;
  let_next_begin();
  for (int k = j; k < HEIGHT; k += RUN) factors[k] = small[i * HEIGHT + k];
  u32 sign[WORDS];
#pragma unroll
  for (int k = 0; k < WORDS; k++) sign[k] = signs[(blockIdx.y * WORDS + k) * RUN + j];
  __syncthreads();
  wait_for_inputs();
  float sum = 0;
#pragma unroll
  for (int k = 0; k < HEIGHT; k++) {
    float value = read<IN>(x[first + k * RUN]);
    if (!BACK) value = __uint_as_float(__float_as_uint(value) ^ (sign[k / 32] << (31 - k % 32) & 0x80000000u));
    sum += factors[k] * value;
  }
#pragma unroll
  for (int s = 1; s < 32; s *= 2) {
    const float other = __shfl_xor_sync(~0u, sum, s);
    sum = j & s ? other - sum : sum + other;
  }
#pragma unroll
  for (int s = 32; s < RUN; s *= 2) {
    exchange[j] = sum;
    __syncthreads();
    const float other = exchange[j ^ s];
    sum = j & s ? other - sum : sum + other;
    __syncthreads();
  }
  if (BACK) {
    u32 word = 0;
#pragma unroll
    for (int k = 0; k < WORDS; k++) word = i / 32 == k ? sign[k] : word;
    if (word >> i % 32 & 1) sum = -sum;
    if (bias) sum += read<OUT>(bias[(blockIdx.y * HEIGHT + i) * RUN + j]);
  }
  y[first + i * RUN] = written<OUT>(sum);
}
