// y = x Wᵀ for a few rows of x, W read as it is packed. Weights meet the activations in the tensor cores, 16 x 8 x 16 at a time,
// with float32 sums. Of such a product's 8 columns each has one row of x and one set of W's columns, and of its 16 rows each
// pair has one unit of W's rows and one set; only where the sets are the same is the sum one that we want. With one row of x
// that makes every lane's work its own: 8 sets, one unit. With 8 rows, one set and 8 units.
//   BATCH   1, 2, 4 or 8 rows of x in a product; TILES: products side by side, for up to BATCH · TILES rows
//   THREADS of a block; STAGES_BYTES of shared memory for words on their way
//   FLOAT_X, FLOAT_Y: type of x and y, else the weights' own
//   GIVEN   what x is, see numbers.cuh; PLAIN where PREPARED
//   PREPARED 1: x is ready, 16 bits, by slices; 0 (BATCH 1): every block makes it ready for itself

constexpr int WARPS = THREADS / 32;
constexpr int SETS = 8 / BATCH;
constexpr int ROWS_X = BATCH * TILES;
constexpr int SLICE = WARP_COLUMNS / BATCH;  // columns of a warp's step
#if STEP_BITS
constexpr int STEP_WORDS = SLICE, UNIT_WORDS_OR_1 = UNIT_WORDS;
constexpr bool STEPS_ARE_WORDS = true;
#define SHIFT_OF(slice) 0
#else
constexpr int STEP_WORDS = SLICE * INDEX_BITS / 32, UNIT_WORDS_OR_1 = 1;  // a slice's words
#define SHIFT_OF(slice) ((((slice) - (GROUPED ? (slice) / cut.of_group : 0) * cut.of_group) * SLICE + lane_column) * INDEX_BITS & 31)
constexpr bool STEPS_ARE_WORDS = SLICE * INDEX_BITS % 32 == 0;
#endif
constexpr int PAIR_FLOATS = WARPS * 2 * BATCH * ROWS_X;  // sums of a pair of rows, of all warps
constexpr int PART_FLOATS = 4096;
constexpr int ALL_PAIRS = BATCH == 1 ? (PAIRS + 3) / 4 * 4 : PAIRS;
constexpr int PART_PAIRS = max_of(1, min_of(ALL_PAIRS, PART_FLOATS / PAIR_FLOATS));
constexpr int PART_TURNS = PART_PAIRS < ALL_PAIRS ? 1 : max_of(1, min_of(8, PART_FLOATS / (PAIR_FLOATS * ALL_PAIRS)));

constexpr int X_TYPE = FLOAT_X ? FLOAT : BF16, Y_TYPE = FLOAT_Y ? FLOAT : BF16;
typedef Numbers<X_TYPE>::Type XType;
typedef Numbers<Y_TYPE>::Type YType;

// A lane's words are copied to its own places in shared memory, so that many are on their way at once and no thread waits for
// another. Word i of a thread lies at i · THREADS + its number, by 16 bytes where WIDE.
constexpr int READ_BYTES = 4 * READ_WORDS;
constexpr int STAGE_BYTES = LANE_WORDS * 4 * THREADS;
constexpr int STAGES = max_of(2, min_of(8, STAGES_BYTES / STAGE_BYTES));

DEVICE void begin_words(const Matrix& m, int place, int unit, u32 stage) {
  visit_words(m, place, unit, [&](int number, int at, bool there) {
    const u32 to = stage + READ_BYTES * number * THREADS;
    if constexpr (WIDE) copy_16(to, m.words + at, there);
    else copy_4(to, m.words + at, there);
  });
}

DEVICE void take_words(const char* stage, int shift, u32 (&q)[LANE_WORDS]) {
#pragma unroll
  for (int i = 0; i < LANE_READS; i++) {
    if constexpr (WIDE) spread(((const u32x4*)stage)[i * THREADS], q + 4 * i);
    else q[i] = ((const u32*)stage)[i * THREADS];
  }
#if !STEP_BITS
  if constexpr (!WHOLE_WORDS) align_words(q, shift);
#endif
}

// One matrix and what is done with it.
struct Product {
  Matrix m;
  const XType* x;         // (rows, x_stride); PREPARED: what `prepare` reads
  const XType* beside;    // NORMED: weights of the norm, GATED: what the gate is multiplied with; as x
  const u16* perm;        // column of x for each stored one; null: x_first on
  const u16 *scale, *offset;  // by stored column, or null
  const float* added;     // (rows, out_features) added to the sums, or null
  const float* row_scale; // by row of W, one for all, or null
  const YType *bias, *residual;  // residual: (rows, out_features), or null
  YType* y;               // (rows, out_features)
  u16* ready;             // PREPARED: (rows, columns of `Slices`)
  float* sums;            // PREPARED: Σ x offset of each row, or null
  float epsilon;          // NORMED: added to the mean of x²
  int rows, in_features, x_stride, x_first;
  int scale_step, warp_columns;  // scale_step 0: one row_scale; warp_columns: warps along the columns
};

// Matrices that are multiplied with one x in one launch; blocks from first[i] to first[i + 1] work on the i-th.
constexpr int MOST_MATRICES = 4;
struct Products {
  Product p[MOST_MATRICES];
  int first[MOST_MATRICES + 1];
  int count;
};

DEVICE int matrix_of(const Products& all) {
  int i = 0;
  while (i + 1 < all.count && int(blockIdx.x) >= all.first[i + 1]) i++;
  return i;
}

// How the columns are shared out: slices of SLICE columns, group by group, dealt to the warps that lie side by side.
struct Slices {
  int of_group, steps, across;
  DEVICE Slices(const Product& p) {
    of_group = (p.m.group_size + SLICE - 1) / SLICE;
    across = p.warp_columns;
    steps = ((GROUPED ? of_group * p.m.groups : of_group) + across - 1) / across;
  }
  DEVICE int columns() const { return steps * across * SLICE; }  // of x made ready: whole slices, zeros where there is none
};

// Neighbouring numbers, as many as a lane has columns.
template <int TYPE> struct Run {
  u32 words[LANE_COLUMNS * sizeof(typename Numbers<TYPE>::Type) / 4];
  DEVICE float get(int i) const {
    if constexpr (TYPE == FLOAT) return __uint_as_float(words[i]);
    else return widened<TYPE>(u16(words[i / 2] >> (i % 2 * 16)));
  }
  DEVICE void put(int i, typename Numbers<TYPE>::Type v) {
    if constexpr (TYPE == FLOAT) words[i] = __float_as_uint(v);
    else words[i / 2] = i % 2 ? words[i / 2] | u32(v) << 16 : v;
  }
  // The first `count` of them, then zeros.
  DEVICE void read(const typename Numbers<TYPE>::Type* p, int count) {
    if (count >= LANE_COLUMNS && u64(p) % min_of(16, sizeof words) == 0) {
      if constexpr (sizeof words == 8) {
        const u64 v = *(const u64*)p;
        words[0] = u32(v), words[1] = u32(v >> 32);
      } else {
#pragma unroll
        for (int i = 0; i < sizeof words / 16; i++) spread(((const u32x4*)p)[i], words + 4 * i);
      }
    } else {
#pragma unroll
      for (int i = 0; i < LANE_COLUMNS; i++) put(i, i < count ? p[i] : Numbers<TYPE>::ZERO);
    }
  }
};

// A lane's stored columns, and what they ask of x: constants, so they are read before x is there.
struct Chunk {
  Run<BF16> perm, scale, offset;  // perm: as it is stored, not to be taken for numbers of that type
  Run<X_TYPE> x, beside;
  int stored, count;  // the first column, and how many there are
};

DEVICE int column_of(const Chunk& c, int j) { return u16(c.perm.words[j / 2] >> (j % 2 * 16)); }

// Numbers of x, or what goes with them, for the columns of a chunk.
DEVICE void read_columns(const Product& p, const Chunk& c, const XType* from, Run<X_TYPE>& to) {
  if (!p.perm) return to.read(from + p.x_first + c.stored, c.count);
#pragma unroll
  for (int j = 0; j < LANE_COLUMNS; j++) to.put(j, j < c.count ? from[column_of(c, j)] : Numbers<X_TYPE>::ZERO);
}

DEVICE void read_constants(const Product& p, const Slices& cut, int chunk, Chunk& c) {
  const int of_group = cut.of_group * (SLICE / LANE_COLUMNS), group = GROUPED ? chunk / of_group : 0;
  const int i = (chunk - group * of_group) * LANE_COLUMNS;
  c.stored = group * p.m.group_size + i;
  c.count = GROUPED && group >= p.m.groups ? 0 : max(0, min(LANE_COLUMNS, p.m.group_size - i));
  if (p.perm) c.perm.read(p.perm + c.stored, c.count);
  if (p.scale) c.scale.read(p.scale + c.stored, c.count);
  if (p.offset) c.offset.read(p.offset + c.stored, c.count);
  if (GIVEN == NORMED) read_columns(p, c, p.beside, c.beside);
}

DEVICE void read_values(const Product& p, const XType* x, Chunk& c) {
  read_columns(p, c, x, c.x);
  if (GIVEN == GATED) read_columns(p, c, p.beside, c.beside);
}

// Those columns of x, times `factor`, in stored order, scaled, 16 bits; the answer is their share of Σ x offset.
DEVICE float ready_of(const Product& p, const Chunk& c, float factor, u32 (&to)[LANE_COLUMNS / 2]) {
  float sum = 0, v[LANE_COLUMNS];
#pragma unroll
  for (int j = 0; j < LANE_COLUMNS; j++) {
    v[j] = c.x.get(j);
    if (GIVEN == NORMED) v[j] *= factor * c.beside.get(j);
    if (GIVEN == GATED) v[j] = gated(v[j], c.beside.get(j));
  }
  if (p.offset)
#pragma unroll
    for (int j = 0; j < LANE_COLUMNS; j++) sum += v[j] * c.offset.get(j);
  if (p.scale)
#pragma unroll
    for (int j = 0; j < LANE_COLUMNS; j++) v[j] *= c.scale.get(j);
#pragma unroll
  for (int j = 0; j < LANE_COLUMNS / 2; j++) to[j] = pair_of(v[2 * j], v[2 * j + 1]);
  return sum;
}

// A thread's chunks of x, AT_ONCE of them on their way together.
constexpr int AT_ONCE = 2;
struct Chunks { Chunk c[AT_ONCE]; };

DEVICE void read_constants(const Product& p, const Slices& cut, int first, Chunks& chunks) {
#pragma unroll
  for (int i = 0; i < AT_ONCE; i++) read_constants(p, cut, first + i * THREADS, chunks.c[i]);
}

DEVICE void read_values(const Product& p, const XType* x, Chunks& chunks) {
#pragma unroll
  for (int i = 0; i < AT_ONCE; i++) read_values(p, x, chunks.c[i]);
}

// One row of x, all of its columns. own: this thread's first ones, read.
DEVICE float make_ready(const Product& p, const Slices& cut, const XType* x, Chunks& own, float factor, u16* to) {
  float sum = 0;
  const int chunks = cut.columns() / LANE_COLUMNS;
  for (int first = threadIdx.x; first < chunks; first += AT_ONCE * THREADS) {
    if (first >= AT_ONCE * THREADS) {
      read_constants(p, cut, first, own);
      read_values(p, x, own);
    }
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++)
      if (first + i * THREADS < chunks) {
        u32 v[LANE_COLUMNS / 2];
        sum += ready_of(p, own.c[i], factor, v);
        u16* place = to + LANE_COLUMNS * (first + i * THREADS);
        if constexpr (LANE_COLUMNS == 8) *(u32x4*)place = {v[0], v[1], v[2], v[3]};
        else *(u64*)place = v[0] | u64(v[1]) << 32;
      }
  }
  return sum;
}

// A sum over all threads, in two halves with a barrier between them.
DEVICE void put_part(float value, float* parts) {
  value = sum_of_warp(value);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
}

DEVICE float sum_of_parts(const float* parts) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < WARPS; i++) sum += parts[i];
  return sum;
}

// This thread's share of the squares of a row of x, all of its numbers (outliers are columns of their own).
DEVICE float squares_of(const Product& p, const XType* x) {
  float sum = 0;
#pragma unroll 4
  for (int i = threadIdx.x; i < p.in_features; i += THREADS) {
    const float v = read<X_TYPE>(x[i]);
    sum += v * v;
  }
  return sum;
}

// One over the root mean square of a row, for NORMED; parts: of its squares.
DEVICE float factor_of(const Product& p, const float* parts) {
  return GIVEN == NORMED ? rsqrtf(sum_of_parts(parts) / p.in_features + p.epsilon) : 1.f;
}

// Sums over the sets of a warp: lanes that hold the sums of the same outputs each keep some of them, the first ones the first set.
template <int N> DEVICE void add_sets(float (&v)[N], int set) {
  constexpr int masks[3] = {18, 9, 4};  // from a lane with sums to that whose set differs in the highest bit, the next, ...
  int keep = N / 2;
#pragma unroll
  for (int stage = 0; stage < log2_of(SETS); stage++) {
    const bool upper = set & (SETS / 2 >> stage);
#pragma unroll
    for (int i = 0; i < N / 2; i++)
      if (i < keep) {
        const float mine = upper ? v[keep + i] : v[i], other = upper ? v[i] : v[keep + i];
        v[i] = mine + __shfl_xor_sync(~0u, other, masks[stage]);
      }
    keep /= 2;
  }
}

template <int FIRST> DEVICE void add_step(const u32 (&q)[LANE_WORDS], const Tables& tables,
                                          const u32 (&x)[TILES][LANE_COLUMNS / 2], float (&d)[TILES][PAIRS][4]) {
  if constexpr (FIRST < LANE_COLUMNS / 2) {
    Pairs a, b, a2, b2;
    decode<FIRST>(q, tables, a, a2);
    decode<FIRST + 1>(q, tables, b, b2);
#pragma unroll
    for (int i = 0; i < PAIRS; i++)
#pragma unroll
      for (int tile = 0; tile < TILES; tile++) {
        multiply<BF16>(d[tile][i], a.low[i], a.high[i], b.low[i], b.high[i], x[tile][FIRST], x[tile][FIRST + 1]);
        if constexpr (RES_BITS > 0)
          multiply<BF16>(d[tile][i], a2.low[i], a2.high[i], b2.low[i], b2.high[i], x[tile][FIRST], x[tile][FIRST + 1]);
      }
    add_step<FIRST + 2>(q, tables, x, d);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) product(const __grid_constant__ Products all) {
  const int own_matrix = matrix_of(all), block = blockIdx.x - all.first[own_matrix];
  const int blocks = all.first[own_matrix + 1] - all.first[own_matrix];
  const Product& p = all.p[own_matrix];
  DYNAMIC_SHARED(u32x4, shared);
  const Slices cut(p);
  char* books = (char*)shared;
  char* stages = books + (TABLE_BYTES + RES_TABLE_BYTES) * COPIES;
  u16* ready = (u16*)(stages + STAGES * STAGE_BYTES);
  float* squares = (float*)(ready + (PREPARED ? 0 : cut.columns()));
  float *offsets = squares + WARPS, *parts = offsets + WARPS;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int across = cut.across, down = WARPS / across, my_across = warp % across, my_down = warp / across;
  const int set = g / BATCH, own = g % BATCH;  // own: which unit of W, and which row of x, this lane reads
  const int stride = across + 1;
  const int turn_units = blocks * down * BATCH, turns = (p.m.units + turn_units - 1) / turn_units;
  const int lane_column = (set * 4 + t) * LANE_COLUMNS;
  const int first_unit = (my_down * blocks + block) * BATCH + own;

  // Words are copied STAGES - 1 steps ahead of those that are worked on, through the same turns and steps.
  const int turn_jump = turn_units * UNIT_WORDS_OR_1 * p.m.row_words;
  const u32 to = shared_address(stages) + READ_BYTES * threadIdx.x;
  int ahead_slice = my_across, ahead_steps = cut.steps, ahead_unit = first_unit;
  auto place_in_unit = [&](int slice) {
    const int group = GROUPED ? slice / cut.of_group : 0, column = (slice - group * cut.of_group) * SLICE + lane_column;
    return group * p.m.units * p.m.row_words + (STEP_BITS ? column : column * INDEX_BITS >> 5);
  };
  const int lane_place = place_in_unit(my_across);
  int ahead = lane_place, ahead_turn = first_unit * UNIT_WORDS_OR_1 * p.m.row_words;
  auto begin = [&](u32 stage) {
    begin_words(p.m, ahead_turn + ahead, ahead_unit, to + stage);
    close_copies();
    const bool over = --ahead_steps == 0;
    if (GROUPED || !STEPS_ARE_WORDS) {
      ahead_slice = over ? my_across : ahead_slice + across;
      ahead = place_in_unit(ahead_slice);
    } else {
      ahead = over ? lane_place : ahead + across * STEP_WORDS;
    }
    if (over) ahead_turn += turn_jump, ahead_steps = cut.steps, ahead_unit += turn_units;
  };

  let_next_begin();
  fill_tables(p.m, books);
  close_copies();
#pragma unroll
  for (int i = 0; i < STAGES - 1; i++) begin(i * STAGE_BYTES);
#if !PREPARED
  Chunks chunks;
  read_constants(p, cut, threadIdx.x, chunks);
  wait_for_inputs();
  read_values(p, p.x, chunks);
  if (GIVEN == NORMED) put_part(squares_of(p, p.x), squares), __syncthreads();
  put_part(make_ready(p, cut, p.x, chunks, factor_of(p, squares), ready), offsets);
  const u16* x_row[1] = {ready};
#else
  wait_for_inputs();
  const u16* x_row[TILES];
#pragma unroll
  for (int tile = 0; tile < TILES; tile++) {
    const int row = tile * BATCH + own;
    x_row[tile] = row < p.rows ? p.ready + i64(row) * cut.columns() : nullptr;
  }
#endif
  await_copies<STAGES - 1>();  // the codebooks'
  __syncthreads();

  auto load_x = [&](int column, u32 (&x)[TILES][LANE_COLUMNS / 2]) {
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
      if constexpr (LANE_COLUMNS == 8) {
        u32x4 v = {0, 0, 0, 0};
        if (!PREPARED || x_row[tile]) v = *(const u32x4*)(x_row[tile] + column);
        spread(v, x[tile]);
      } else {
        u64 v = 0;
        if (!PREPARED || x_row[tile]) v = *(const u64*)(x_row[tile] + column);
        x[tile][0] = u32(v); x[tile][1] = u32(v >> 32);
      }
    }
  };

  u32 stage = 0, free_stage = (STAGES - 1) * STAGE_BYTES;
  float d[TILES][PAIRS][4];
  Tables tables = tables_of(p.m, books, 0);
  for (int turn = 0; turn < turns; turn++) {
#pragma unroll
    for (int i = 0; i < TILES * PAIRS * 4; i++) ((float*)d)[i] = 0;
    int slice = my_across;
    for (int number = 0; number < cut.steps; number++, slice += across) {
      u32 q[LANE_WORDS], x[TILES][LANE_COLUMNS / 2];
      load_x(slice * SLICE + lane_column, x);
      await_copies<STAGES - 2>();
      take_words(stages + stage + READ_BYTES * threadIdx.x, SHIFT_OF(slice), q);
      begin(free_stage);
      free_stage = stage;
      stage = stage == (STAGES - 1) * STAGE_BYTES ? 0 : stage + STAGE_BYTES;
#if GROUPED && !COPIES
      tables = tables_of(p.m, books, min(slice / cut.of_group, p.m.groups - 1));
#endif
      add_step<0>(q, tables, x, d);
    }
    const bool last = turn + 1 == turns;
#pragma unroll
    for (int first = 0; first < ALL_PAIRS; first += PART_PAIRS) {
      const int slot = (turn % PART_TURNS) * down + my_down;
      constexpr int COLUMNS = BATCH == 1 ? 1 : 2, SUMS = PART_PAIRS * 2 * COLUMNS, KEPT = SUMS / SETS;
      const int n = 2 * t;
#pragma unroll
      for (int tile = 0; tile < TILES; tile++) {
        float v[SUMS];
#pragma unroll
        for (int i = 0; i < SUMS; i++) {
          const int pair = first + i / (2 * COLUMNS), high = i / COLUMNS % 2;
          if (pair >= PAIRS) v[i] = 0;
          else if (BATCH == 1) v[i] = g & 1 ? d[tile][pair][2 * high + 1] : d[tile][pair][2 * high];
          else v[i] = d[tile][pair][2 * high + i % COLUMNS];
        }
        add_sets(v, set);
        if ((BATCH == 1 ? t == g / 2 : n / BATCH == set))
#pragma unroll
          for (int i = 0; i < KEPT; i++) {
            const int row = (set * KEPT + i) / COLUMNS, column = BATCH == 1 ? 0 : (n + (set * KEPT + i) % COLUMNS) % BATCH;
            const int at = ((slot * 2 * PART_PAIRS + row) * BATCH + own) * ROWS_X + tile * BATCH + column;
            parts[at * stride + my_across] = v[i];
          }
      }
      if (turn % PART_TURNS != PART_TURNS - 1 && !last) continue;
      __syncthreads();
      const int slots = (turn % PART_TURNS + 1) * down, outputs = slots * 2 * PART_PAIRS * BATCH * ROWS_X;
      for (int at = threadIdx.x / 8; at < (outputs + 3) / 4 * 4; at += THREADS / 8) {
        float sum = 0;
        if (at < outputs)
          for (int i = threadIdx.x % 8; i < across; i += 8) sum += parts[at * stride + i];
        sum += __shfl_xor_sync(~0u, sum, 4);
        sum += __shfl_xor_sync(~0u, sum, 2);
        sum += __shfl_xor_sync(~0u, sum, 1);
        int rest = at / ROWS_X;
        const int row_x = at % ROWS_X, unit_own = rest % BATCH;
        rest /= BATCH;
        const int row = rest % (2 * PART_PAIRS) + 2 * first, done = rest / (2 * PART_PAIRS);
        const int of_turn = turn - turn % PART_TURNS + done / down;
        const int unit = ((of_turn * down + done % down) * blocks + block) * BATCH + unit_own;
        const int out = unit * UNIT_ROWS + row;
        if (threadIdx.x % 8 || at >= outputs || row >= UNIT_ROWS || unit >= p.m.units || out >= p.m.out_features || row_x >= p.rows)
          continue;
        sum += PREPARED ? (p.sums ? p.sums[row_x] : 0.f) : (p.offset ? sum_of_parts(offsets) : 0.f);
        const i64 place = i64(row_x) * p.m.out_features + out;
        if (p.added) sum += p.added[place];
        if (p.row_scale) sum *= p.row_scale[out * p.scale_step];
        if (p.bias) sum += read<Y_TYPE>(p.bias[out]);
        if (p.residual) sum += read<Y_TYPE>(p.residual[place]);
        p.y[place] = written<Y_TYPE>(sum);
      }
      __syncthreads();
    }
  }
}

#if PREPARED
// Rows of x made ready, one a block, for the matrix blockIdx.y: 16 bits, and Σ x offset of each.
extern "C" __global__ void __launch_bounds__(THREADS) prepare(const __grid_constant__ Products all) {
  const Product& p = all.p[blockIdx.y];
  __shared__ float parts[WARPS];
  let_next_begin();
  const Slices cut(p);
  Chunks chunks;
  read_constants(p, cut, threadIdx.x, chunks);
  wait_for_inputs();
  const i64 row = blockIdx.x;
  const XType* x = p.x + row * p.x_stride;
  read_values(p, x, chunks);
  put_part(make_ready(p, cut, x, chunks, 1.f, p.ready + row * cut.columns()), parts);
  __syncthreads();
  if (p.sums && !threadIdx.x) p.sums[row] = sum_of_parts(parts);
}
#endif
