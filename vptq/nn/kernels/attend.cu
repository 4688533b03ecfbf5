// Attention of one new token to all tokens so far, its key and value among them, which are put into the cache on the way.
// A block has one head of keys, all query heads that go with it, and a part of the tokens; the last block of a head to come to
// its end adds the parts up.
//   BF16     0: float16; 1: bfloat16
//   DIM      numbers of a head, a power of two from 32 to 256; HEADS: query heads of a key's
//   THREADS  of a block
//   NORM     1: queries and keys are normed, each head for itself

struct Attention {
  const u16 *q, *k, *v;        // (groups · HEADS, DIM), (groups, DIM), (groups, DIM)
  const u16 *cosine, *sine;    // (DIM)
  const u16 *q_norm, *k_norm;  // (DIM)
  u16 *keys, *values;          // (groups, length, DIM)
  const i64* position;         // of the new token, below length
  u16* out;                    // (groups · HEADS, DIM)
  float* parts;                // (groups, splits, HEADS, DIM + 2): sums, maximum, weight
  u32* arrived;                // (groups), zeros before and after
  float scale, epsilon;
  int length;
};

constexpr int WARPS = THREADS / 32;
constexpr int LANES = DIM / 8;              // of a token
constexpr int AT_ONCE = 32 / LANES;         // tokens of a warp
constexpr int STREAMS = WARPS * AT_ONCE;    // tokens of a block
constexpr int AHEAD = 4;                    // of which so many are on their way for each lane
constexpr int PART = DIM + 2;
constexpr float LEAST = -1e30f;

DEVICE void read_numbers(const u16* p, float (&v)[8]) {
  const u32x4 q = *(const u32x4*)p;
  const u32 words[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
  for (int i = 0; i < 8; i++) v[i] = widened<BF16>(u16(words[i / 2] >> (i % 2 * 16)));
}

// A head as the model's rotary embedding turns it (halves, arXiv:2104.09864), by one warp.
DEVICE void place_head(const Attention& a, const u16* from, const u16* norm, float* to) {
  constexpr int OWN = DIM / 32;
  const int lane = threadIdx.x % 32;
  float factor = 1;  // of the norm
  if (NORM) {
    float squares = 0;
#pragma unroll
    for (int i = 0; i < OWN; i++) {
      const float v = widened<BF16>(from[lane + 32 * i]);
      squares += v * v;
    }
    factor = rsqrtf(sum_of_warp(squares) / DIM + a.epsilon);
  }
  auto get = [&](int at) { return widened<BF16>(from[at]) * (NORM ? widened<BF16>(norm[at]) * factor : 1.f); };
#pragma unroll
  for (int i = 0; i < OWN; i++) {
    const int at = lane + 32 * i;
    const float other = get((at + DIM / 2) % DIM);
    to[at] = get(at) * widened<BF16>(a.cosine[at]) + (at < DIM / 2 ? -other : other) * widened<BF16>(a.sine[at]);
  }
}

// Sums of weighted values of some tokens, with the largest score that they are relative to, and the sum of the weights.
struct Found {
  float best[HEADS], weight[HEADS], sum[HEADS][8];
};

DEVICE void add_token(Found& f, const float (&q)[HEADS][8], const float (&key)[8], const float (&value)[8], bool there) {
#pragma unroll
  for (int h = 0; h < HEADS; h++) {
    float score = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) score += q[h][i] * key[i];
#pragma unroll
    for (int s = LANES / 2; s; s >>= 1) score += __shfl_xor_sync(~0u, score, s);
    const float best = there ? fmaxf(f.best[h], score) : f.best[h];
    const float old = exponential(f.best[h] - best), own = there ? exponential(score - best) : 0.f;
    f.best[h] = best;
    f.weight[h] = f.weight[h] * old + own;
#pragma unroll
    for (int i = 0; i < 8; i++) f.sum[h][i] = f.sum[h][i] * old + own * value[i];
  }
}

// One number of a head from the parts of several streams or blocks, `stride` apart: what it comes to, relative to `best`.
template <bool FRESH> DEVICE float add_parts(const float* part, int count, int stride, int i, float& best, float& weight) {
  auto get = [](const float* p) { return FRESH ? read_fresh(p) : *p; };
  best = LEAST;
  for (int s = 0; s < count; s++) best = fmaxf(best, get(part + s * stride + DIM));
  float sum = 0;
  weight = 0;
  for (int s = 0; s < count; s++) {
    const float factor = exponential(get(part + s * stride + DIM) - best);
    sum += factor * get(part + s * stride + i);
    weight += factor * get(part + s * stride + DIM + 1);
  }
  return sum;
}

// Grid: (splits, groups).
extern "C" __global__ void __launch_bounds__(THREADS) attend(const __grid_constant__ Attention a) {
  __shared__ float queries[HEADS][DIM];
  __shared__ float streams[STREAMS][HEADS][PART];
  __shared__ float new_key[DIM];
  __shared__ bool last;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = blockIdx.y, split = blockIdx.x, splits = gridDim.x;
  let_next_begin();
  wait_for_inputs();
  const int position = int(min(i64(a.length) - 1, *a.position)), tokens = position + 1;
  const int share = (tokens + splits - 1) / splits, begin = split * share, end = min(tokens, begin + share);
  u16* keys = a.keys + i64(group) * a.length * DIM;
  u16* values = a.values + i64(group) * a.length * DIM;
  for (int h = warp; h <= HEADS; h += WARPS) {
    if (h < HEADS) place_head(a, a.q + (group * HEADS + h) * DIM, a.q_norm, queries[h]);
    else if (begin <= position && position < end) {
      place_head(a, a.k + group * DIM, a.k_norm, new_key);
#pragma unroll
      for (int i = lane; i < DIM; i += 32) {
        keys[i64(position) * DIM + i] = narrowed<BF16>(new_key[i]);
        values[i64(position) * DIM + i] = a.v[group * DIM + i];
      }
    }
  }
  __syncthreads();

  const int first = lane % LANES * 8;
  float q[HEADS][8];
  Found f;
#pragma unroll
  for (int h = 0; h < HEADS; h++) {
    f.best[h] = LEAST;
    f.weight[h] = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) q[h][i] = queries[h][first + i] * a.scale, f.sum[h][i] = 0;
  }
  for (int start = begin + warp * AT_ONCE; start < end; start += STREAMS * AHEAD) {
    float key[AHEAD][8], value[AHEAD][8];
#pragma unroll
    for (int n = 0; n < AHEAD; n++) {
      const int token = min(start + n * STREAMS + lane / LANES, position);
      read_numbers(keys + i64(token) * DIM + first, key[n]);
      read_numbers(values + i64(token) * DIM + first, value[n]);
    }
#pragma unroll
    for (int n = 0; n < AHEAD; n++) add_token(f, q, key[n], value[n], start + n * STREAMS + lane / LANES < end);
  }

  const int stream = warp * AT_ONCE + lane / LANES;
#pragma unroll
  for (int h = 0; h < HEADS; h++) {
#pragma unroll
    for (int i = 0; i < 8; i++) streams[stream][h][first + i] = f.sum[h][i];
    if (!first) streams[stream][h][DIM] = f.best[h], streams[stream][h][DIM + 1] = f.weight[h];
  }
  __syncthreads();
  float* parts = a.parts + i64(group) * splits * HEADS * PART;
  u16* out = a.out + group * HEADS * DIM;
  for (int at = threadIdx.x; at < HEADS * DIM; at += THREADS) {
    const int h = at / DIM, i = at % DIM;
    float best, weight;
    const float sum = add_parts<false>(streams[0][h], STREAMS, HEADS * PART, i, best, weight);
    if (splits == 1) {
      out[at] = narrowed<BF16>(sum / weight);
    } else {
      float* part = parts + (split * HEADS + h) * PART;
      part[i] = sum;
      if (!i) part[DIM] = best, part[DIM + 1] = weight;
    }
  }
  if (splits == 1) return;
  __threadfence();
  __syncthreads();
  if (!threadIdx.x) last = atomicAdd(a.arrived + group, 1u) == splits - 1;
  __syncthreads();
  if (!last) return;
  __threadfence();
  for (int at = threadIdx.x; at < HEADS * DIM; at += THREADS) {
    float best, weight;
    const float sum = add_parts<true>(parts + at / DIM * PART, splits, HEADS * PART, at % DIM, best, weight);
    out[at] = narrowed<BF16>(sum / weight);
  }
  if (!threadIdx.x) a.arrived[group] = 0;
}
