// A rotation (see quantize/rotation.py) of rows of numbers: the matrix small ⊗ H, H a Hadamard matrix of RUN columns, with
// signs before it or after. For a few rows each block makes RUN numbers of the answer, so that one row keeps many multiprocessors
// busy; for many, a block makes all of a row and reads it once.
//   RUN      a power of two, 32 to 1024, and the threads of a block; HEIGHT: rows of `small`
//   IN, OUT  type of x and y: 0 float16, 1 bfloat16, 2 float
//   BACK     1: signs after the mixing, bias and residual
//   GIVEN    what x is, see numbers.cuh; else than PLAIN only for one row of one x

// Several x of one size, each turned by signs of its own. x, y: (rows, blocks · HEIGHT · RUN); residual: as y, or null; bias: as
// a row of y, or null; beside: as x, NORMED: weights of the norm, GATED: what the gate is multiplied with;
// signs: (blocks, words of 32 signs down HEIGHT, RUN), a bit set for -1. small: (HEIGHT, HEIGHT), symmetric.
constexpr int MOST_TURNS = 4;
struct Turns {
  const Numbers<IN>::Type* x[MOST_TURNS];
  Numbers<OUT>::Type* y[MOST_TURNS];
  const u32* signs[MOST_TURNS];
  const Numbers<OUT>::Type* bias[MOST_TURNS];
  const Numbers<OUT>::Type* residual[MOST_TURNS];
  const Numbers<IN>::Type* beside;
  const float* small;
  float epsilon;  // NORMED: added to the mean of x²
  int rows;
};

constexpr int SIGN_WORDS = (HEIGHT + 31) / 32;
constexpr int EXCHANGED = RUN / 32;  // numbers that a thread reads of other warps'
constexpr int PADDED_HEIGHT = (HEIGHT + 3) / 4 * 4;

// Hadamard's matrix on the numbers of all threads; `exchange` is not written again before all have met twice.
DEVICE float mixed(float value, float* exchange) {
  const int j = threadIdx.x;
#pragma unroll
  for (int s = 1; s < 32; s *= 2) {
    const float other = __shfl_xor_sync(~0u, value, s);
    value = j & s ? other - value : value + other;
  }
  if (EXCHANGED == 1) return value;
  exchange[j] = value;
  __syncthreads();
  float sum = 0;
#pragma unroll
  for (int s = 0; s < EXCHANGED; s++) {
    int parity = s & j / 32;
    parity ^= parity >> 4;
    parity ^= parity >> 2;
    parity ^= parity >> 1;
    const float other = exchange[j % 32 + 32 * s];
    sum += parity & 1 ? -other : other;
  }
  return sum;
}

DEVICE float with_sign(float value, const u32 (&signs)[SIGN_WORDS], int k) {
  u32 word = 0;
#pragma unroll
  for (int i = 0; i < SIGN_WORDS; i++) word = k / 32 == i ? signs[i] : word;
  return __uint_as_float(__float_as_uint(value) ^ (word >> k % 32 << 31));
}

DEVICE void read_signs(const u32* signs, int block, u32 (&words)[SIGN_WORDS]) {
#pragma unroll
  for (int k = 0; k < SIGN_WORDS; k++) words[k] = signs[(block * SIGN_WORDS + k) * RUN + threadIdx.x];
}

// Number `at` of x, and what it adds to the sum of squares.
DEVICE float given(const Turns& t, const Numbers<IN>::Type* x, i64 at, float& squares) {
  const float value = read<IN>(x[at]);
  if (GIVEN == GATED) return gated(value, read<IN>(t.beside[at]));
  if (GIVEN != NORMED) return value;
  squares += value * value;
  return value * read<IN>(t.beside[at]);
}

// One over the root mean square of the row, of which this block has seen the part that it turns.
DEVICE float norm_factor(const Turns& t, const Numbers<IN>::Type* x, float squares) {
  __shared__ float parts[RUN / 32];
  for (int other = 0; other < gridDim.y; other++)
    if (other != blockIdx.y)
      for (int k = 0; k < HEIGHT; k++) {
        const float value = read<IN>(x[(i64(other) * HEIGHT + k) * RUN + threadIdx.x]);
        squares += value * value;
      }
  squares = sum_of_warp(squares);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = squares;
  __syncthreads();
  float sum = 0;
  for (int i = 0; i < RUN / 32; i++) sum += parts[i];
  return rsqrtf(sum / (gridDim.y * HEIGHT * RUN) + t.epsilon);
}

// Grid: (HEIGHT, blocks, rows · number of x).
extern "C" __global__ void __launch_bounds__(RUN) turn(const __grid_constant__ Turns t) {
  __shared__ float exchange[RUN];
  __shared__ float factors[HEIGHT];
  const int j = threadIdx.x, i = blockIdx.x, own = blockIdx.z / t.rows, row = blockIdx.z - own * t.rows;
  const i64 first = (i64(row) * gridDim.y + blockIdx.y) * HEIGHT * RUN + j;
  let_next_begin();
  for (int k = j; k < HEIGHT; k += RUN) factors[k] = t.small[i * HEIGHT + k];
  u32 signs[SIGN_WORDS];
  read_signs(t.signs[own], blockIdx.y, signs);
  __syncthreads();
  wait_for_inputs();
  float sum = 0, squares = 0;
#pragma unroll
  for (int k = 0; k < HEIGHT; k++) {
    const float value = given(t, t.x[own], first + k * RUN, squares);
    sum += factors[k] * (BACK ? value : with_sign(value, signs, k));
  }
  sum = mixed(sum, exchange);
  if (GIVEN == NORMED) sum *= norm_factor(t, t.x[own], squares);
  if (BACK) {
    sum = with_sign(sum, signs, i);
    if (t.bias[own]) sum += read<OUT>(t.bias[own][(blockIdx.y * HEIGHT + i) * RUN + j]);
    if (t.residual[own]) sum += read<OUT>(t.residual[own][first + i * RUN]);
  }
  t.y[own][first + i * RUN] = written<OUT>(sum);
}

// Grid: (rows, blocks, number of x).
extern "C" __global__ void __launch_bounds__(RUN) turn_rows(const __grid_constant__ Turns t) {
  __shared__ float exchange[2][RUN];
  __shared__ u32x4 factors[HEIGHT][PADDED_HEIGHT / 4];
  const int j = threadIdx.x, own = blockIdx.z;
  const i64 first = (i64(blockIdx.x) * gridDim.y + blockIdx.y) * HEIGHT * RUN + j;
  let_next_begin();
  for (int k = j; k < HEIGHT * PADDED_HEIGHT; k += RUN) {
    const int row = k / PADDED_HEIGHT, column = k % PADDED_HEIGHT;
    ((float*)factors)[k] = column < HEIGHT ? t.small[row * HEIGHT + column] : 0.f;
  }
  u32 signs[SIGN_WORDS];
  read_signs(t.signs[own], blockIdx.y, signs);
  __syncthreads();
  wait_for_inputs();
  const Numbers<IN>::Type* x = t.x[own] + first;
  float v[PADDED_HEIGHT];
#pragma unroll
  for (int k = 0; k < PADDED_HEIGHT; k++) {
    v[k] = k < HEIGHT ? read<IN>(x[k * RUN]) : 0.f;
    if (!BACK && k < HEIGHT) v[k] = with_sign(v[k], signs, k);
  }
#pragma unroll 1
  for (int i = 0; i < HEIGHT; i++) {
    float sum = 0;
#pragma unroll
    for (int k = 0; k < PADDED_HEIGHT / 4; k++) {
      const u32x4 f = factors[i][k];
      sum += __uint_as_float(f.x) * v[4 * k] + __uint_as_float(f.y) * v[4 * k + 1] + __uint_as_float(f.z) * v[4 * k + 2] +
             __uint_as_float(f.w) * v[4 * k + 3];
    }
    sum = mixed(sum, exchange[i % 2]);
    if (BACK) {
      sum = with_sign(sum, signs, i);
      if (t.bias[own]) sum += read<OUT>(t.bias[own][(blockIdx.y * HEIGHT + i) * RUN + j]);
      if (t.residual[own]) sum += read<OUT>(t.residual[own][first + i * RUN]);
    }
    t.y[own][first + i * RUN] = written<OUT>(sum);
  }
}
