// From packed indices to pairs of weights, ready for the tensor cores. Compiled at run time, for one setting at a time:
//   BF16             0: weights are float16; 1: bfloat16
//   V                numbers of a vector; ENTRY: those that one look-up brings, a power of two, padded with zeros
//   INDEX_BITS       of an index as it is stored; MAIN_BITS at its low end and RES_BITS at its high end name entries; RES_BITS 0:
//                    no residual codebook
//   STEP_BITS        of a trellis, 0 without one; then MAIN_BITS are read for ENTRY / V vectors at once
//   COPIES           of a codebook in shared memory, side by side; 0: codebooks stay in global memory
//   WIDE             1: rows of words may be read 16 bytes at a time
//   EVEN             1: groups have a multiple of 8 columns, and those a whole number of words
//   GROUPED          1: more than one group of columns
// A lane holds LANE_COLUMNS neighbouring columns of UNIT_ROWS rows.

__device__ constexpr int min_of(int a, int b) { return a < b ? a : b; }
__device__ constexpr int max_of(int a, int b) { return a > b ? a : b; }
__device__ constexpr int log2_of(int n) { return n <= 1 ? 0 : 1 + log2_of(n / 2); }
__device__ constexpr int gcd_of(int a, int b) { return b ? gcd_of(b, a % b) : a; }

#if STEP_BITS
constexpr int UNIT_WORDS = STEP_BITS / gcd_of(STEP_BITS, 32);
constexpr int UNIT_VECTORS = 32 * UNIT_WORDS / STEP_BITS;
constexpr int LANE_COLUMNS = 4;
constexpr int LOOKUPS = UNIT_VECTORS * V / ENTRY;  // of one column
#else
constexpr int UNIT_VECTORS = 1;
constexpr int LANE_COLUMNS = 8;
#endif
constexpr int UNIT_ROWS = UNIT_VECTORS * V;
constexpr int PAIRS = (UNIT_ROWS + 1) / 2;  // of rows
constexpr int WARP_COLUMNS = 32 * LANE_COLUMNS;
constexpr int ENTRY_BYTES = 2 * ENTRY;
constexpr int MAIN_ENTRIES = 1 << MAIN_BITS;
constexpr int TABLE_BYTES = MAIN_ENTRIES * ENTRY_BYTES;
constexpr int RES_TABLE_BYTES = RES_BITS ? (1 << RES_BITS) * ENTRY_BYTES : 0;

DEVICE float to_float(u16 h) { return widened<BF16>(h); }
DEVICE u16 from_float(float f) { return narrowed<BF16>(f); }
DEVICE u32 pair_of(float low, float high) { return u32(from_float(low)) | (u32(from_float(high)) << 16); }
DEVICE u32 low_halves(u32 a, u32 b) { return __byte_perm(a, b, 0x5410); }
DEVICE u32 high_halves(u32 a, u32 b) { return __byte_perm(a, b, 0x7632); }

DEVICE void spread(const u32x4& v, u32* q) { q[0] = v.x; q[1] = v.y; q[2] = v.z; q[3] = v.w; }

struct Entry { u32 r[max_of(1, ENTRY / 2)]; };

// One entry of a codebook, `offset` bytes in.
DEVICE Entry look_up(const char* table, u32 offset) {
  Entry e;
  const char* p = table + offset;
#if COPIES
  if constexpr (ENTRY == 1) e.r[0] = *(const u16*)p;
  if constexpr (ENTRY == 2) e.r[0] = *(const u32*)p;
  if constexpr (ENTRY == 4) { u64 v = *(const u64*)p; e.r[0] = u32(v); e.r[1] = u32(v >> 32); }
  if constexpr (ENTRY >= 8) {
#pragma unroll
    for (int i = 0; i < ENTRY / 8; i++) spread(((const u32x4*)p)[i], e.r + 4 * i);
  }
#else
  if constexpr (ENTRY < 16) read_constant<ENTRY_BYTES>(p, e.r);
  else read_constant<16>(p, e.r), read_constant<16>(p + 16, e.r + 4);
#endif
  return e;
}

DEVICE u32 joined(u32 value, u32 mask, u32 copy) { return COPIES > 1 ? and_or(value, mask, copy) : value & mask; }

// Bits [start, start + bits) of a stream, shifted so that they count entries of `1 << SHIFT` bytes.
template <int START, int BITS, int SHIFT, int WORDS> DEVICE u32 offset_at(const u32 (&q)[WORDS], u32 copy) {
  constexpr u32 mask = (BITS >= 32 ? ~0u : (1u << (BITS & 31)) - 1u) << SHIFT;
  constexpr int from = START - SHIFT;
  if constexpr (from < 0) return joined(q[0] << (-from & 31), mask, copy);
  else {
    constexpr int word = from / 32, shift = from % 32;
    constexpr bool two = shift + BITS + SHIFT > 32 && word + 1 < WORDS;
    const u32 value = two ? __funnelshift_r(q[word], q[two ? word + 1 : word], shift) : q[word] >> shift;
    return joined(value, mask, copy);
  }
}

constexpr int ENTRY_SHIFT = log2_of(ENTRY_BYTES * (COPIES ? COPIES : 1));

// Codebooks, as a lane looks things up in them.
struct Tables {
  const char *main, *residual;
  u32 copy;  // of entries that lie side by side, this lane's own
};

// The pairs of weights of two columns: low[i] has row 2i, high[i] row 2i + 1, the first column in the lower half.
struct Pairs { u32 low[PAIRS], high[PAIRS]; };

#if STEP_BITS

constexpr int LANE_WORDS = (UNIT_WORDS + 1) * LANE_COLUMNS;  // the word before the unit's own, and those

template <int LOOKUP, int COLUMN> DEVICE Entry entry_of(const u32 (&q)[LANE_WORDS], const Tables& tables) {
  u32 w[UNIT_WORDS + 1];
#pragma unroll
  for (int i = 0; i <= UNIT_WORDS; i++) w[i] = q[i * LANE_COLUMNS + COLUMN];
  constexpr int end = 32 + (LOOKUP + 1) * STEP_BITS * (ENTRY / V);
  return look_up(tables.main, offset_at<end - MAIN_BITS, MAIN_BITS, ENTRY_SHIFT>(w, tables.copy));
}

template <int PAIR, int LOOKUP> DEVICE void decode_from(const u32 (&q)[LANE_WORDS], const Tables& tables, Pairs& out) {
  if constexpr (LOOKUP < LOOKUPS) {
    const Entry a = entry_of<LOOKUP, 2 * PAIR>(q, tables), b = entry_of<LOOKUP, 2 * PAIR + 1>(q, tables);
    if constexpr (ENTRY == 1) {
      if constexpr (LOOKUP % 2 == 0) out.low[LOOKUP / 2] = low_halves(a.r[0], b.r[0]);
      else out.high[LOOKUP / 2] = low_halves(a.r[0], b.r[0]);
    } else {
#pragma unroll
      for (int i = 0; i < ENTRY / 2; i++) {
        out.low[LOOKUP * ENTRY / 2 + i] = low_halves(a.r[i], b.r[i]);
        out.high[LOOKUP * ENTRY / 2 + i] = high_halves(a.r[i], b.r[i]);
      }
    }
    decode_from<PAIR, LOOKUP + 1>(q, tables, out);
  }
}

template <int PAIR> DEVICE void decode(const u32 (&q)[LANE_WORDS], const Tables& tables, Pairs& out, Pairs&) {
  decode_from<PAIR, 0>(q, tables, out);
}

#else

constexpr int LANE_BITS = LANE_COLUMNS * INDEX_BITS;
constexpr bool WHOLE_WORDS = LANE_BITS % 32 == 0;
constexpr int LANE_WORDS = (LANE_BITS + 31) / 32 + (WHOLE_WORDS ? 0 : 1);

DEVICE void pairs_of(const Entry& a, const Entry& b, Pairs& out) {
#pragma unroll
  for (int i = 0; i < PAIRS; i++) {
    out.low[i] = low_halves(a.r[i], b.r[i]);
    out.high[i] = high_halves(a.r[i], b.r[i]);
  }
}

template <int START, int BITS> DEVICE Entry entry_at(const u32 (&q)[LANE_WORDS], const char* table, u32 copy) {
  return look_up(table, offset_at<START, BITS, ENTRY_SHIFT>(q, copy));
}

template <int PAIR> DEVICE void decode(const u32 (&q)[LANE_WORDS], const Tables& t, Pairs& out, Pairs& second) {
  constexpr int first = 2 * PAIR * INDEX_BITS, next = first + INDEX_BITS;
  pairs_of(entry_at<first, MAIN_BITS>(q, t.main, t.copy), entry_at<next, MAIN_BITS>(q, t.main, t.copy), out);
  if constexpr (RES_BITS > 0)
    pairs_of(entry_at<next - RES_BITS, RES_BITS>(q, t.residual, t.copy),
             entry_at<next + INDEX_BITS - RES_BITS, RES_BITS>(q, t.residual, t.copy), second);
}

#endif

// A packed matrix as kernels take it.
struct Matrix {
  const u32* words;
  const char *main, *residual;  // codebooks (groups, entries, ENTRY), padded
  int row_words;                // from a row of words to the next
  int units;                    // runs of UNIT_ROWS rows, of one group
  int out_features, groups, group_size;
  int ring_words;               // words of a ring, one below the other; 0 without rings
  int last_words;               // the last place from which one lane's words can be read
};

// Where a lane's words are, from its first one on, LANE_READS of them, by four where WIDE: visit(number, place, whether it is
// there). Past the end of a row what comes next is read: it meets zeros of x, or rows of W that nobody asks for. (Places past the
// last must not all become the last: thousands of readers of one address wait for each other.)
constexpr int READ_WORDS = WIDE ? 4 : 1, LANE_READS = LANE_WORDS / READ_WORDS;

template <class Visit> DEVICE void visit_words(const Matrix& m, int place, int unit, Visit visit) {
#if STEP_BITS
  const int ring_units = m.ring_words / UNIT_WORDS;
  const int before = unit % ring_units ? -m.row_words : (m.ring_words - 1) * m.row_words;
#pragma unroll
  for (int i = 0; i <= UNIT_WORDS; i++) {
    const int at = place + (i ? (i - 1) * m.row_words : before);
#pragma unroll
    for (int c = 0; c < 4; c += READ_WORDS) visit((4 * i + c) / READ_WORDS, at + c, at + c <= m.last_words);
  }
#else
#pragma unroll
  for (int i = 0; i < LANE_READS; i++) {
    const int at = place + READ_WORDS * i;
    visit(i, at, (EVEN ? place : at) <= m.last_words);
  }
#endif
}

// A lane's words, from its first one on, moved so that its first index begins them; the last one is only moved from.
DEVICE void align_words(u32 (&q)[LANE_WORDS], int shift) {
#pragma unroll
  for (int i = 0; i + 1 < LANE_WORDS; i++) q[i] = __funnelshift_r(q[i], q[i + 1], shift);
}

// Codebooks into shared memory, COPIES times side by side; where they stay in global memory, nothing. One copy comes in the
// background: close_copies and await_copies are to follow. Several come through registers, so that all readers of a number are one
// reader for L2, where thousands would wait for each other.
DEVICE void fill_tables(const Matrix& m, char* shared) {
#if COPIES
  constexpr int UNIT = COPIES == 1 ? 16 : min_of(16, ENTRY_BYTES * COPIES), FROM = min_of(16, ENTRY_BYTES);  // bytes written and read at once
#pragma unroll
  for (int second = 0; second < (RES_BITS ? 2 : 1); second++) {
    const char* from = second ? m.residual : m.main;
    char* to = shared + (second ? TABLE_BYTES * COPIES : 0);
    const int bytes = (second ? RES_TABLE_BYTES : TABLE_BYTES) * COPIES;
    const int shift = blockIdx.x * 2048;  // blocks begin at different places, so that they don't all ask for the same lines
#pragma unroll 8
    for (int i = UNIT * threadIdx.x; i < bytes; i += UNIT * blockDim.x) {
      const int at = (i + shift) & (bytes - 1), entry = at / (ENTRY_BYTES * COPIES);
      const char* p = from + (COPIES == 1 ? at : entry * ENTRY_BYTES + at % ENTRY_BYTES / FROM * FROM);
      if constexpr (COPIES == 1) copy_16(shared_address(to + at), (const u32*)p, true);
      if constexpr (COPIES > 1) {
        u32 v[4];
        if constexpr (FROM == 16) spread(*(const u32x4*)p, v);
        if constexpr (FROM == 8) { const u64 e = *(const u64*)p; v[0] = v[2] = u32(e); v[1] = v[3] = u32(e >> 32); }
        if constexpr (FROM == 4) v[0] = v[1] = v[2] = v[3] = *(const u32*)p;
        if constexpr (FROM == 2) v[0] = v[1] = v[2] = v[3] = *(const u16*)p * 0x10001u;
        if constexpr (UNIT == 16) *(u32x4*)(to + at) = {v[0], v[1], v[2], v[3]};
        if constexpr (UNIT == 8) *(u64*)(to + at) = v[0] | u64(v[1]) << 32;
        if constexpr (UNIT == 4) *(u32*)(to + at) = v[0];
      }
    }
  }
#endif
}

// Where a lane's look-ups go, for a group of columns.
DEVICE Tables tables_of(const Matrix& m, const char* shared, int group) {
#if COPIES
  return {shared, shared + TABLE_BYTES * COPIES, threadIdx.x % COPIES * ENTRY_BYTES};
#else
  return {m.main + i64(group) * TABLE_BYTES, m.residual + i64(group) * RES_TABLE_BYTES, 0};
#endif
}
