// A packed matrix in full, (out_features, columns) of 16 bits, columns in stored order: a warp writes a unit's rows of a slice.
//   SCALED   1: columns have a scale and an offset, or rows a scale

struct Weight {
  Matrix m;
  u16* out;
  const float *scale, *offset;  // by stored column, or null
  const float* row_scale;       // by row, one for all, or null
  int stride, scale_step;       // from one row of `out` to the next; 0: one row_scale
};

DEVICE void read_words(const Matrix& m, int place, int unit, int shift, u32 (&q)[LANE_WORDS]) {
#if STEP_BITS
  const int ring_units = m.ring_words / UNIT_WORDS;
  const int before = unit % ring_units ? -m.row_words : (m.ring_words - 1) * m.row_words;
#pragma unroll
  for (int i = 0; i <= UNIT_WORDS; i++) {
    const int at = place + (i ? (i - 1) * m.row_words : before);
#if WIDE
    u32x4 v = {0, 0, 0, 0};
    if (at <= m.last_words) v = *(const u32x4*)(m.words + at);
    q[4 * i] = v.x; q[4 * i + 1] = v.y; q[4 * i + 2] = v.z; q[4 * i + 3] = v.w;
#else
#pragma unroll
    for (int c = 0; c < 4; c++) q[4 * i + c] = at + c <= m.last_words ? m.words[at + c] : 0;
#endif
  }
#else
#if WIDE
#pragma unroll
  for (int i = 0; i < LANE_WORDS; i += 4) {
    u32x4 v = {0, 0, 0, 0};
    if (place <= m.last_words) v = *(const u32x4*)(m.words + place + i);
    q[i] = v.x; q[i + 1] = v.y; q[i + 2] = v.z; q[i + 3] = v.w;
  }
#else
#pragma unroll
  for (int i = 0; i < LANE_WORDS; i++) q[i] = place + (EVEN ? 0 : i) <= m.last_words ? m.words[place + i] : 0;
#endif
  if constexpr (!WHOLE_WORDS) align_words(q, shift);
#endif
}

DEVICE float half_of(u32 pair, int high) { return to_float(u16(high ? pair >> 16 : pair)); }

constexpr int COLUMN_PAIRS = LANE_COLUMNS / 2;

// The numbers of a row, COLUMN_PAIRS pairs, to memory. `first`: stored column, of which `count` are there.
DEVICE void write_row(const Weight& w, int row, int first, int count, const u32 (&pairs)[COLUMN_PAIRS]) {
  u16* to = w.out + i64(row) * w.stride + first;
  if (EVEN || (STEP_BITS && WIDE)) {
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
  extern __shared__ u32x4 shared[];
  const Matrix& m = w.m;
  let_next_begin();
  fill_tables(m, (char*)shared);
  wait_for_inputs();
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
    float scale[LANE_COLUMNS], offset[LANE_COLUMNS];
#pragma unroll
    for (int c = 0; c < LANE_COLUMNS; c++) {
      scale[c] = w.scale && c < count ? w.scale[first + c] : 1.f;
      offset[c] = w.offset && c < count ? w.offset[first + c] : 0.f;
    }
#endif
#pragma unroll
    for (int i = 0; i < UNIT_ROWS; i++) {
      const int row = unit * UNIT_ROWS + i;
      if (row >= m.out_features) break;
      u32 pairs[COLUMN_PAIRS];
#if SCALED
      const float row_scale = w.row_scale ? w.row_scale[row * w.scale_step] : 1.f;
#endif
#pragma unroll
      for (int p = 0; p < COLUMN_PAIRS; p++) {
        const u32 main = i % 2 ? a[p].high[i / 2] : a[p].low[i / 2];
#if SCALED || RES_BITS
        float v[2];
#pragma unroll
        for (int h = 0; h < 2; h++) {
          v[h] = half_of(main, h);
          if constexpr (RES_BITS > 0) v[h] += half_of(i % 2 ? b[p].high[i / 2] : b[p].low[i / 2], h);
#if SCALED
          v[h] = (v[h] * scale[2 * p + h] + offset[2 * p + h]) * row_scale;
#endif
        }
        pairs[p] = pair_of(v[0], v[1]);
#else
        pairs[p] = main;
#endif
      }
      write_row(w, row, first, count, pairs);
    }
  }
}
