// A packed matrix in full, (out_features, columns) of 16 bits, columns in stored order: a warp writes a unit's rows of a slice.
//   SCALED   1: columns have a scale and an offset, or rows a scale
//   VECTOR   1: rows of `out` may be written LANE_COLUMNS numbers at a time

struct Weight {
  Matrix m;
  u16* out;
  const u16 *scale, *offset;  // by stored column, or null
  const float* row_scale;     // by row, one for all, or null
  int stride, scale_step;     // from one row of `out` to the next; 0: one row_scale
};

DEVICE void read_words(const Matrix& m, int place, int unit, int shift, u32 (&q)[LANE_WORDS]) {
  visit_words(m, place, unit, [&](int number, int at, bool there) {
    if constexpr (WIDE) {
      u32x4 v = {0, 0, 0, 0};
      if (there) v = *(const u32x4*)(m.words + at);
      spread(v, q + 4 * number);
    } else {
      q[number] = there ? m.words[at] : 0;
    }
  });
#if !STEP_BITS
  if constexpr (!WHOLE_WORDS) align_words(q, shift);
#endif
}

constexpr int COLUMN_PAIRS = LANE_COLUMNS / 2;
constexpr u32 ONES = BF16 ? 0x3f803f80u : 0x3c003c00u;

DEVICE u32 pair_at(const u16* p, int at, int count) {
#if VECTOR
  return *(const u32*)(p + at);
#else
  return (count > 0 ? p[at] : 0) | u32(count > 1 ? p[at + 1] : 0) << 16;
#endif
}

// The numbers of a row, COLUMN_PAIRS pairs, to memory. `first`: stored column, of which `count` are there.
DEVICE void write_row(const Weight& w, int row, int first, int count, const u32 (&pairs)[COLUMN_PAIRS]) {
  u16* to = w.out + i64(row) * w.stride + first;
  if (VECTOR) {
    if constexpr (COLUMN_PAIRS == 4) *(u32x4*)to = {pairs[0], pairs[1], pairs[2], pairs[3]};
    else *(u64*)to = pairs[0] | u64(pairs[1]) << 32;
  } else {
#pragma unroll
    for (int c = 0; c < LANE_COLUMNS; c++)
      if (c < count) to[c] = u16(c % 2 ? pairs[c / 2] >> 16 : pairs[c / 2]);
  }
}

template <int PAIR> DEVICE void decode_all(const u32 (&q)[LANE_WORDS], const Tables& tables, Pairs (&a)[COLUMN_PAIRS], Pairs (&b)[COLUMN_PAIRS]) {
  if constexpr (PAIR < COLUMN_PAIRS) {
    decode<PAIR>(q, tables, a[PAIR], b[PAIR]);
    decode_all<PAIR + 1>(q, tables, a, b);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS) weight(const __grid_constant__ Weight w) {
  DYNAMIC_SHARED(u32x4, shared);
  const Matrix& m = w.m;
  let_next_begin();
  fill_tables(m, (char*)shared);
  close_copies();
  wait_for_inputs();
  await_copies<0>();
  __syncthreads();
  const int lane = threadIdx.x % 32, group_slices = (m.group_size + WARP_COLUMNS - 1) / WARP_COLUMNS, slices = group_slices * m.groups;
  const i64 items = i64(m.units) * slices, step = i64(gridDim.x) * (THREADS / 32);
  for (i64 item = blockIdx.x * (THREADS / 32) + threadIdx.x / 32; item < items; item += step) {
    const int unit = int(item / slices), slice = int(item - i64(unit) * slices), group = slice / group_slices;
    const int column = (slice - group * group_slices) * WARP_COLUMNS + lane * LANE_COLUMNS, count = m.group_size - column;
    if (count <= 0) continue;
    u32 q[LANE_WORDS];
#if STEP_BITS
    read_words(m, unit * UNIT_WORDS * m.row_words + column, unit, 0, q);
#else
    read_words(m, (group * m.units + unit) * m.row_words + (column * INDEX_BITS >> 5), unit, column * INDEX_BITS & 31, q);
#endif
    Pairs a[COLUMN_PAIRS], b[COLUMN_PAIRS];
    decode_all<0>(q, tables_of(m, (const char*)shared, group), a, b);
    const int first = group * m.group_size + column;
#if SCALED
    u32 scale[COLUMN_PAIRS], offset[COLUMN_PAIRS];
#pragma unroll
    for (int p = 0; p < COLUMN_PAIRS; p++) {
      scale[p] = w.scale ? pair_at(w.scale, first + 2 * p, count - 2 * p) : ONES;
      offset[p] = w.offset ? pair_at(w.offset, first + 2 * p, count - 2 * p) : 0;
    }
#endif
#pragma unroll
    for (int i = 0; i < UNIT_ROWS; i++) {
      const int row = unit * UNIT_ROWS + i;
      if (row < m.out_features) {
        u32 pairs[COLUMN_PAIRS];
#if SCALED
        u32 row_scale = ONES;
        if (w.row_scale) { const float f = w.row_scale[row * w.scale_step]; row_scale = pair_of(f, f); }
#endif
#pragma unroll
        for (int p = 0; p < COLUMN_PAIRS; p++) {
          u32 v = i % 2 ? a[p].high[i / 2] : a[p].low[i / 2];
          if constexpr (RES_BITS > 0) v = fused_pair<BF16>(v, ONES, i % 2 ? b[p].high[i / 2] : b[p].low[i / 2]);
#if SCALED
          v = fused_pair<BF16>(v, scale[p], offset[p]);
          if (w.row_scale) v = fused_pair<BF16>(v, row_scale, 0x80008000u);
#endif
          pairs[p] = v;
        }
        write_row(w, row, first, count, pairs);
      }
    }
  }
}
