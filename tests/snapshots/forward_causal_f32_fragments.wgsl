enable f16;
enable wgpu_cooperative_matrix;

struct Operand { offset: u32, batch: u32, head: u32, seq: u32 }

struct Params {
  q: Operand,
  k: Operand,
  v: Operand,
  o: Operand,
  lse: Operand,
  key_scales: Operand,
  heads: u32,
  kv_heads: u32,
  seq_q: u32,
  seq_k: u32,
  lower: i32,
  upper: i32,
  // Position of query 0.
  offset: i32,
  sink_tokens: u32,
  // Workgroups of this dispatch. The grid is folded into two dimensions and may be larger.
  workgroups: u32,
  // The slice of the pass that this dispatch does: first sequence, head and tile, and how many of each. Heads are key
  // heads if a group is kept together.
  slice_batch: u32,
  slice_batches: u32,
  slice_head: u32,
  slice_heads: u32,
  slice_tile: u32,
  slice_tiles: u32,
  // Workgroups of each of these.
  slice_cells: u32,
  batch: u32,
  scale: f32,
  // `score_scale` is `scale_sign` (1 or -1) times `scale_size`.
  scale_sign: f32,
  // -infinity, for which WGSL has no literal.
  negative_infinity: f32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> q: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> k: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> v: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read_write> o: array<vec4<f32>>;
@group(0) @binding(5) var<storage, read_write> lse: array<f32>;
@group(0) @binding(16) var<storage, read> key_scales: array<vec2<f32>>;
@group(0) @binding(15) var<storage, read_write> fallback: array<u32>;

const LOG2_E: f32 = 1.4426950408889634;

// A number below every finite score. It stands for "hidden", and for the maximum of a row that has seen nothing.
const LOWEST: f32 = -3.4028234e38;

fn operand_base(operand: Operand, batch: u32, head: u32) -> u32 {
  return operand.offset + batch * operand.batch + head * operand.head;
}

// `head` is a key head if a group of query heads is kept together. `cell` numbers the workgroups of one head and tile.
struct WorkIndex { batch: u32, head: u32, tile: u32, cell: u32 }

fn decode_work(index: u32) -> WorkIndex {
  var at = WorkIndex(params.slice_batch, params.slice_head, params.slice_tile, 0u);
  var rest = index;
  at.cell = rest % params.slice_cells;
  rest /= params.slice_cells;
  at.head = params.slice_head + rest % params.slice_heads;
  rest /= params.slice_heads;
  at.batch = params.slice_batch + rest % params.slice_batches;
  rest /= params.slice_batches;
  at.tile = params.slice_tile + params.slice_tiles - 1u - rest;
  return at;
}

const TILE_ROWS: u32 = 128u;
const TILE_COLUMNS: u32 = 16u;

// `batch` is the place along the batch axis, `sequence` the number of the sequence. They differ only in batches of sequences of
// different lengths. In a kernel whose rows are keys, `head` is the first query head of the group.
struct TileWork { tile: u32, batch: u32, sequence: u32, head: u32, kv_head: u32 }

fn tile_work(index: u32) -> TileWork {
  let at = decode_work(index);
  let head = at.head * (params.heads / params.kv_heads) + at.cell;
  return TileWork(at.tile, at.batch, at.batch, head, at.head);
}

// A sequence: its place along the batch axis, its rows and keys in memory, and the numbers of the band.
struct Sequence {
  entry: u32,
  q_start: u32,
  q_rows: u32,
  seq_q: u32,
  k_start: u32,
  k_rows: u32,
  seq_k: u32,
  sink_tokens: u32,
  lower: i32,
  upper: i32,
  offset: i32,
}

// Functions get the sequence as an argument: a private variable would not be known to be the same for all threads of a workgroup.
fn load_sequence(index: u32) -> Sequence {
  return Sequence(
    index, 0u, params.seq_q, params.seq_q, 0u, params.seq_k, params.seq_k,
    params.sink_tokens, params.lower, params.upper, params.offset,
  );
}

// Whether query i sees each of the four keys of a quad from j on: keys of its window, which are consecutive, and sink tokens.
fn visible4(seq: Sequence, i: u32, j: u32) -> vec4<bool> {
  let end = clamp(i32(i) + 1 + seq.upper, 0, i32(seq.seq_k));
  let start = clamp(i32(i) + seq.lower, 0, end);
  let sinks = min(seq.sink_tokens, u32(end));
  let keys = vec4<u32>(j) + vec4<u32>(0u, 1u, 8u, 9u);
  return ((keys - vec4<u32>(u32(start)) < vec4<u32>(u32(end - start))) | (keys < vec4<u32>(sinks)));
}

// Queries of row0..row_end see keys of the tiles first..sink_end and window..end.
struct KeyTiles { first: u32, sink_end: u32, window: u32, end: u32 }

fn key_tiles(seq: Sequence, row0: u32, row_end: u32) -> KeyTiles {
  // The tile lies beyond the end of a padded sequence.
  if (row0 >= row_end) { return KeyTiles(0u, 0u, 0u, 0u); }
  let end = u32(clamp(i32(row_end) + seq.upper, 0, i32(seq.seq_k)));
  let start = u32(clamp(i32(row0) + seq.lower, 0, i32(end)));
  let sink_tiles = (min(seq.sink_tokens, end) + TILE_COLUMNS - 1u) / TILE_COLUMNS;
  let end_tile = (end + TILE_COLUMNS - 1u) / TILE_COLUMNS;
  let window = max(select(end_tile, start / TILE_COLUMNS, start < end), sink_tiles);
  let first = select(0u, window, sink_tiles == 0u);
  let tiles_end = max(end_tile, window);
  return KeyTiles(first, sink_tiles, window, tiles_end);
}

fn first_column(tiles: KeyTiles, tile: u32) -> u32 {
  return tile * TILE_COLUMNS;
}

fn next_tile(tiles: KeyTiles, tile: u32) -> u32 {
  return select(tile + 1u, tiles.window, tile + 1u == tiles.sink_end);
}

// Tiles of keys within start..end, and within the sink tokens, are full: all of row0..row_end see every key.
struct FullTiles { start: u32, end: u32 }

fn full_tiles(seq: Sequence, row0: u32, row_end: u32) -> FullTiles {
  let limit = select(i32(seq.seq_k), 0, row_end > seq.seq_q);
  let end = clamp(i32(row0) + 1 + seq.upper, 0, limit);
  let start = u32(clamp(i32(row_end) - 1 + seq.lower, 0, end));
  return FullTiles(select(start, 0u, seq.sink_tokens >= start), u32(end));
}

fn is_full(seq: Sequence, full: FullTiles, column0: u32) -> bool {
  let column_end = column0 + TILE_COLUMNS;
  return column_end <= full.end && (column0 >= full.start || column_end <= seq.sink_tokens);
}

// Full tiles, which are computed first, without a look at pairs. All of them are among the visited tiles.
struct OpenTiles { first: u32, end: u32 }

fn open_tiles(tiles: KeyTiles, full: FullTiles) -> OpenTiles {
  let first = (full.start + TILE_COLUMNS - 1u) / TILE_COLUMNS;
  let end = full.end / TILE_COLUMNS;
  if (first >= end || tiles.first >= tiles.end) { return OpenTiles(0u, 0u); }
  return OpenTiles(first, end);
}

// The first of the other tiles.
fn first_of_rest(tiles: KeyTiles, open: OpenTiles) -> u32 {
  return select(tiles.first, open.end, tiles.first == open.first && open.first < open.end);
}

// The first word of the report of a tile of 128 rows. The word is zero where no row is reported. Otherwise a bit for each
// row follows.
fn fallback_slot(seq: Sequence, work: TileWork, tile: u32) -> u32 {
  return ((tile * params.batch + work.batch) * params.heads + work.head) * 5u;
}

// Four neighbours of a row, zero beyond the width. With vec4 loads the width is a multiple of four.
fn load_q(base: u32, quad: u32) -> vec4<f32> {
  return q[base + quad];
}

fn load_k(base: u32, quad: u32) -> vec4<f32> {
  return k[base + quad];
}

fn load_v(base: u32, quad: u32) -> vec4<f32> {
  return v[base + quad];
}

fn store_o(base: u32, quad: u32, x: vec4<f32>) {
  let stored = x;
  o[base + quad] = stored;
}

// The largest finite size of four numbers. Bits are compared: compilers may assume that a float comparison meets no NaN.
fn finite_size(x: vec4<f32>) -> f32 {
  let bits = bitcast<vec4<u32>>(x) & vec4<u32>(0x7fffffffu);
  let size = bitcast<vec4<f32>>(select(vec4<u32>(), bits, bits < vec4<u32>(0x7f800000u)));
  return max(max(size.x, size.y), max(size.z, size.w));
}

// The power of two that brings a token's largest number to 2^12 .. 2^13. A token of zeros has that of 1. Beyond 2^60 and below
// 2^-60, where the product of several powers would leave the range of f32, it is infinite. Such a token is no longer finite, and the
// portable kernel computes the rows that see it.
fn token_scale(size: f32) -> f32 {
  let exponent = i32(bitcast<u32>(size) >> 23u) - 127;
  if (size == 0.0) { return 4096.0; }
  return bitcast<f32>(select(0x7f800000u, u32(139 - exponent) << 23u, abs(exponent) <= 60));
}

alias Raw = vec4<f32>;

// A number x is hi, the nearest number of 11 significant bits, and lo = x - hi. hi is formed by rounding errors: compilers may take a conversion
// to f16 and back for no change, and NVIDIA's does.
fn hi4(x: vec4<f32>) -> vec4<f32> {
  let far = vec4<f32>(8192.0);
  return fma(x, far, -fma(x, far, -x));
}

fn widened4(raw: Raw) -> vec4<f32> {
  return raw;
}

fn half4(raw: Raw, factor: f32) -> vec4<f16> {
  return vec4<f16>(raw * factor);
}

// Zero beyond the width.
fn raw_q(base: u32, row: u32, quad: u32) -> Raw {
  // The row is added last, because only it changes from tile to tile.
  return q[base + quad + row];
}

// Zero beyond the width.
fn raw_k(base: u32, row: u32, quad: u32) -> Raw {
  // The row is added last, because only it changes from tile to tile.
  return k[base + quad + row];
}

// Zero beyond the width.
fn raw_v(base: u32, row: u32, quad: u32) -> Raw {
  // The row is added last, because only it changes from tile to tile.
  return v[base + quad + row];
}

// exp(x) for x <= 1, within 1 ulp on devices that fuse multiply-adds. The exp2 of drivers is good to 2 or 3 ulp only, and a sum over many
// rows (the gradient of sink logits) may cancel a thousandfold. Twin of src/cpu/simd.rs.
fn exp1(x: f32) -> f32 {
  // x = n ln 2 + r with |r| <= ln(2) / 2. ln 2 has two parts, and the first is short enough for an exact n times it. A NaN has to
  // come through. Drivers turn even a select into a minimum or maximum, which lose it, so only n is bounded.
  let n = floor(fma(clamp(x, f32(-90.0), f32(2.0)), f32(LOG2_E), f32(0.5)));
  let r = fma(n, f32(2.1219444e-4), fma(n, f32(-0.693359375), x));
  // The minimax polynomial of e^r, with a relative error of 3e-9 and an exact 1 + r.
  var p = fma(f32(0.0013814599), r, f32(0.008368717));
  p = fma(p, r, f32(0.04166839));
  p = fma(p, r, f32(0.16666521));
  p = fma(p, r, f32(0.49999994));
  p = fma(p, r, f32(1.0));
  p = fma(p, r, f32(1.0));
  // 2^n through its exponent field. The product keeps a NaN.
  let power = bitcast<f32>(u32(i32(n) + i32(127)) << u32(23u));
  // x > 1 happens only for hidden pairs, or by rounding of a large score: it is clamped to e.
  return select(select(p * power, f32(), x < f32(-87.0)), f32(2.7182817), x > f32(1.0));
}

fn exp4(x: vec4<f32>) -> vec4<f32> {
  // x = n ln 2 + r with |r| <= ln(2) / 2. ln 2 has two parts, and the first is short enough for an exact n times it. A NaN has to
  // come through. Drivers turn even a select into a minimum or maximum, which lose it, so only n is bounded.
  let n = floor(fma(clamp(x, vec4<f32>(-90.0), vec4<f32>(2.0)), vec4<f32>(LOG2_E), vec4<f32>(0.5)));
  let r = fma(n, vec4<f32>(2.1219444e-4), fma(n, vec4<f32>(-0.693359375), x));
  // The minimax polynomial of e^r, with a relative error of 3e-9 and an exact 1 + r.
  var p = fma(vec4<f32>(0.0013814599), r, vec4<f32>(0.008368717));
  p = fma(p, r, vec4<f32>(0.04166839));
  p = fma(p, r, vec4<f32>(0.16666521));
  p = fma(p, r, vec4<f32>(0.49999994));
  p = fma(p, r, vec4<f32>(1.0));
  p = fma(p, r, vec4<f32>(1.0));
  // 2^n through its exponent field. The product keeps a NaN.
  let power = bitcast<vec4<f32>>(vec4<u32>(vec4<i32>(n) + vec4<i32>(127)) << vec4<u32>(23u));
  // x > 1 happens only for hidden pairs, or by rounding of a large score: it is clamped to e.
  return select(select(p * power, vec4<f32>(), x < vec4<f32>(-87.0)), vec4<f32>(2.7182817), x > vec4<f32>(1.0));
}

// 1 / row_sum, and lse. The sink logit enters the denominator here, exactly once.
struct RowEnd { factor: f32, lse: f32 }

// log(x) for x >= 1: one Newton step after the driver's log, which may be coarse near 1.
fn natural_log(x: f32) -> f32 {
  let y = log(x);
  return y + fma(x, exp1(-y), -1.0);
}

// `row_max` times the size of the scale is the row's maximum score, and `row_sum` is the sum of exp(score - maximum score). If the score
// exceeds f32, lse is infinite. If `row_max` exceeds f32, `row_sum` and the factor are NaN. An infinite sink logit takes all.
fn finish_row(row_max: f32, row_sum: f32, head: u32) -> RowEnd {
  let infinity = -params.negative_infinity;
  let score = row_max * 1.0;
  if (row_sum == 0.0) { return RowEnd(0.0, params.negative_infinity); }
  return RowEnd(1.0 / row_sum, select(fma(row_max, 1.0, natural_log(row_sum)), infinity, score == infinity));
}

const LANES_A_ROW: u32 = 2u;

// Padding lets neighbouring rows start in different banks. Fragments are loaded from multiples of 16 bytes.
const SCORE_ROW: u32 = 5u;
const P_ROW: u32 = 6u;
const K_ROW: u32 = 18u;
const K_TILE: u32 = 288u;
const K_LO: u32 = 288u;
var<workgroup> k_stage: array<vec4<f16>, 576>;
const V_ROW: u32 = 18u;
const V_TILE: u32 = 288u;
const V_LO: u32 = 288u;
var<workgroup> v_stage: array<vec4<f16>, 576>;
var<workgroup> score_rows: array<vec4<f32>, 320>;

// Numbers of each column: the shifts by lse and delta of a query, and in bf16 the inverse token scales.
var<workgroup> column_stats: array<f32, 48>;

fn component_c(m: coop_mat16x16<f32, C>, i: u32) -> f32 { return 0.0; }

fn matrix_of_a(x0: f16, x1: f16, x2: f16, x3: f16, x4: f16, x5: f16, x6: f16, x7: f16) -> coop_mat16x16<f16, A> {
  return coop_mat16x16<f16, A>();
}

fn matrix_of_c(x0: f32, x1: f32, x2: f32, x3: f32, x4: f32, x5: f32, x6: f32, x7: f32) -> coop_mat16x16<f32, C> {
  return coop_mat16x16<f32, C>();
}

fn bits_as_halves(x: vec2<u32>) -> vec4<f16> { return vec4<f16>(); }

// Bits are compared: compilers may assume that a float comparison meets no NaN.
fn is_finite4(x: vec4<f32>) -> bool {
  return all((bitcast<vec4<u32>>(x) & vec4<u32>(0x7f800000u)) < vec4<u32>(0x7f800000u));
}

fn is_finite1(x: f32) -> bool { return (bitcast<u32>(x) & 0x7f800000u) < 0x7f800000u; }

// Below every product of halves, and far from the end of f32.
const HIDDEN: f32 = -1e30;

// row_max may lag behind by this power of two, within the range of f16, before O is rescaled.
const SLACK: f32 = 8.0;

// A new row_max is this power of two below the largest score, so that small probabilities have both halves. SLACK is within the range still.
const LIFT: f32 = 7.0;

@compute @workgroup_size(128)
fn main(
  @builtin(workgroup_id) workgroup: vec3<u32>,
  @builtin(num_workgroups) grid: vec3<u32>,
  @builtin(local_invocation_index) thread: u32,
  @builtin(subgroup_id) subgroup: u32,
  @builtin(subgroup_invocation_id) lane: u32,
) {
  let index = workgroup.x + workgroup.y * grid.x;
  if (index >= params.workgroups) { return; }
  let work = tile_work(index);
  let seq = load_sequence(work.sequence);
  let row0 = work.tile * TILE_ROWS;
  let row_limit = seq.q_rows;
  let column_limit = seq.seq_k;
  let row_end = min(row0 + TILE_ROWS, row_limit);
  // Rows beyond the end of a padded sequence see nothing.
  let used_end = min(row_end, seq.seq_q);
  let q_base = operand_base(params.q, work.batch, work.head) + seq.q_start * params.q.seq;
  let k_base = operand_base(params.k, work.batch, work.kv_head) + seq.k_start * params.k.seq;
  let v_base = operand_base(params.v, work.batch, work.kv_head) + seq.k_start * params.v.seq;
  let o_base = operand_base(params.o, work.batch, work.head) + seq.q_start * params.o.seq;
  let lse_base = operand_base(params.lse, work.batch, work.head) + seq.q_start;
  let scales_base = operand_base(params.key_scales, work.batch, work.kv_head) + seq.k_start;
  let tiles = key_tiles(seq, row0, used_end);
  let full = full_tiles(seq, row0, row_end);
  let open = open_tiles(tiles, full);
  let rest = first_of_rest(tiles, open);
  let first_of_all = select(rest, open.first, open.first < open.end);
  // An empty sequence has a first row that is loaded and never used.
  let last_column = max(column_limit, 1u) - 1u;
  let subgroup_scores = subgroup * 80u;
  // The lane's row within a fragment in workgroup memory, and its place among the lanes of that row.
  let lane_row = lane / LANES_A_ROW;
  let part = lane % LANES_A_ROW;
  let score_at = subgroup_scores + lane_row * SCORE_ROW + part;
  let subgroup_p = subgroup * 96u;
  let p_at = subgroup_p + lane_row * P_ROW + part;
  // The row and the column of the lane's first element in registers.
  let element_row = (lane >> 2u) % 8u * 1u;
  let lane_column = (lane >> 0u) % 4u * 2u;
  var fallback_0 = false;
  let row_0 = row0 + subgroup * 32u + 0u + element_row;
  var fallback_1 = false;
  let row_1 = row0 + subgroup * 32u + 8u + element_row;
  var fallback_2 = false;
  let row_2 = row0 + subgroup * 32u + 16u + element_row;
  var fallback_3 = false;
  let row_3 = row0 + subgroup * 32u + 24u + element_row;
  let strip_row_0 = row0 + subgroup * 32u + 0u + lane_row;
  let strip_row_1 = row0 + subgroup * 32u + 16u + lane_row;
  let hidden = params.negative_infinity;
  let scale = params.scale * params.scale_sign * LOG2_E;
  var stage = 0u;
  let k_row = thread / 16u;
  let k_part = thread % 16u;
  var k_share_0 = Raw();
  var k_scale_0 = 1.0;
  var k_share_1 = Raw();
  var k_scale_1 = 1.0;
  let v_row = thread / 16u;
  let v_part = thread % 16u;
  var v_share_0 = Raw();
  var v_scale_0 = 1.0;
  var v_share_1 = Raw();
  var v_scale_1 = 1.0;
  var token_scale_0 = vec2<f32>();
  {
    {
      let part = k_part;
      let source = min(first_column(tiles, first_of_all) + k_row + 0u, last_column);
      { k_share_0 = raw_k(k_base, source * params.k.seq, part); }
      k_scale_0 = key_scales[scales_base + source].x;
    }
    {
      let part = k_part;
      let source = min(first_column(tiles, first_of_all) + k_row + 8u, last_column);
      { k_share_1 = raw_k(k_base, source * params.k.seq, part); }
      k_scale_1 = key_scales[scales_base + source].x;
    }
    {
      let part = v_part;
      let source = min(first_column(tiles, first_of_all) + v_row + 0u, last_column);
      { v_share_0 = raw_v(v_base, source * params.v.seq, part); }
      v_scale_0 = key_scales[scales_base + source].y;
    }
    {
      let part = v_part;
      let source = min(first_column(tiles, first_of_all) + v_row + 8u, last_column);
      { v_share_1 = raw_v(v_base, source * params.v.seq, part); }
      v_scale_1 = key_scales[scales_base + source].y;
    }
    if (thread < 16u) {
      let source = min(first_column(tiles, first_of_all) + thread + 0u, last_column);
      token_scale_0 = key_scales[scales_base + source];
    }
  }
  var q_raw_0_0_0 = Raw();
  {
    let quad = part + 0u;
    {
      if (strip_row_0 < row_limit) {
        q_raw_0_0_0 = raw_q(q_base, strip_row_0 * params.q.seq, 0u + quad);
      }
    }
  }
  var q_raw_0_0_1 = Raw();
  {
    let quad = part + 2u;
    {
      if (strip_row_0 < row_limit) {
        q_raw_0_0_1 = raw_q(q_base, strip_row_0 * params.q.seq, 0u + quad);
      }
    }
  }
  var q_raw_0_1_0 = Raw();
  {
    let quad = part + 0u;
    {
      if (strip_row_0 < row_limit) {
        q_raw_0_1_0 = raw_q(q_base, strip_row_0 * params.q.seq, 4u + quad);
      }
    }
  }
  var q_raw_0_1_1 = Raw();
  {
    let quad = part + 2u;
    {
      if (strip_row_0 < row_limit) {
        q_raw_0_1_1 = raw_q(q_base, strip_row_0 * params.q.seq, 4u + quad);
      }
    }
  }
  var q_raw_0_2_0 = Raw();
  {
    let quad = part + 0u;
    {
      if (strip_row_0 < row_limit) {
        q_raw_0_2_0 = raw_q(q_base, strip_row_0 * params.q.seq, 8u + quad);
      }
    }
  }
  var q_raw_0_2_1 = Raw();
  {
    let quad = part + 2u;
    {
      if (strip_row_0 < row_limit) {
        q_raw_0_2_1 = raw_q(q_base, strip_row_0 * params.q.seq, 8u + quad);
      }
    }
  }
  var q_raw_0_3_0 = Raw();
  {
    let quad = part + 0u;
    {
      if (strip_row_0 < row_limit) {
        q_raw_0_3_0 = raw_q(q_base, strip_row_0 * params.q.seq, 12u + quad);
      }
    }
  }
  var q_raw_0_3_1 = Raw();
  {
    let quad = part + 2u;
    {
      if (strip_row_0 < row_limit) {
        q_raw_0_3_1 = raw_q(q_base, strip_row_0 * params.q.seq, 12u + quad);
      }
    }
  }
  var q_raw_1_0_0 = Raw();
  {
    let quad = part + 0u;
    {
      if (strip_row_1 < row_limit) {
        q_raw_1_0_0 = raw_q(q_base, strip_row_1 * params.q.seq, 0u + quad);
      }
    }
  }
  var q_raw_1_0_1 = Raw();
  {
    let quad = part + 2u;
    {
      if (strip_row_1 < row_limit) {
        q_raw_1_0_1 = raw_q(q_base, strip_row_1 * params.q.seq, 0u + quad);
      }
    }
  }
  var q_raw_1_1_0 = Raw();
  {
    let quad = part + 0u;
    {
      if (strip_row_1 < row_limit) {
        q_raw_1_1_0 = raw_q(q_base, strip_row_1 * params.q.seq, 4u + quad);
      }
    }
  }
  var q_raw_1_1_1 = Raw();
  {
    let quad = part + 2u;
    {
      if (strip_row_1 < row_limit) {
        q_raw_1_1_1 = raw_q(q_base, strip_row_1 * params.q.seq, 4u + quad);
      }
    }
  }
  var q_raw_1_2_0 = Raw();
  {
    let quad = part + 0u;
    {
      if (strip_row_1 < row_limit) {
        q_raw_1_2_0 = raw_q(q_base, strip_row_1 * params.q.seq, 8u + quad);
      }
    }
  }
  var q_raw_1_2_1 = Raw();
  {
    let quad = part + 2u;
    {
      if (strip_row_1 < row_limit) {
        q_raw_1_2_1 = raw_q(q_base, strip_row_1 * params.q.seq, 8u + quad);
      }
    }
  }
  var q_raw_1_3_0 = Raw();
  {
    let quad = part + 0u;
    {
      if (strip_row_1 < row_limit) {
        q_raw_1_3_0 = raw_q(q_base, strip_row_1 * params.q.seq, 12u + quad);
      }
    }
  }
  var q_raw_1_3_1 = Raw();
  {
    let quad = part + 2u;
    {
      if (strip_row_1 < row_limit) {
        q_raw_1_3_1 = raw_q(q_base, strip_row_1 * params.q.seq, 12u + quad);
      }
    }
  }
  var q_size_0 = 0.0;
  q_size_0 = max(q_size_0, finite_size(widened4(q_raw_0_0_0)));
  q_size_0 = max(q_size_0, finite_size(widened4(q_raw_0_0_1)));
  q_size_0 = max(q_size_0, finite_size(widened4(q_raw_0_1_0)));
  q_size_0 = max(q_size_0, finite_size(widened4(q_raw_0_1_1)));
  q_size_0 = max(q_size_0, finite_size(widened4(q_raw_0_2_0)));
  q_size_0 = max(q_size_0, finite_size(widened4(q_raw_0_2_1)));
  q_size_0 = max(q_size_0, finite_size(widened4(q_raw_0_3_0)));
  q_size_0 = max(q_size_0, finite_size(widened4(q_raw_0_3_1)));
  q_size_0 = max(q_size_0, subgroupShuffleXor(q_size_0, 1u));
  let q_scale_0 = token_scale(q_size_0);
  var q_size_1 = 0.0;
  q_size_1 = max(q_size_1, finite_size(widened4(q_raw_1_0_0)));
  q_size_1 = max(q_size_1, finite_size(widened4(q_raw_1_0_1)));
  q_size_1 = max(q_size_1, finite_size(widened4(q_raw_1_1_0)));
  q_size_1 = max(q_size_1, finite_size(widened4(q_raw_1_1_1)));
  q_size_1 = max(q_size_1, finite_size(widened4(q_raw_1_2_0)));
  q_size_1 = max(q_size_1, finite_size(widened4(q_raw_1_2_1)));
  q_size_1 = max(q_size_1, finite_size(widened4(q_raw_1_3_0)));
  q_size_1 = max(q_size_1, finite_size(widened4(q_raw_1_3_1)));
  q_size_1 = max(q_size_1, subgroupShuffleXor(q_size_1, 1u));
  let q_scale_1 = token_scale(q_size_1);
  // By rows in workgroup memory, and from there by the rows of the elements.
  subgroupBarrier();
  if (part == 0u) { score_rows[subgroup_scores + lane_row].x = 1.0 / q_scale_0; }
  subgroupBarrier();
  let q_inverse_0 = score_rows[subgroup_scores + element_row + 0u].x;
  let q_inverse_1 = score_rows[subgroup_scores + element_row + 8u].x;
  subgroupBarrier();
  subgroupBarrier();
  if (part == 0u) { score_rows[subgroup_scores + lane_row].x = 1.0 / q_scale_1; }
  subgroupBarrier();
  let q_inverse_2 = score_rows[subgroup_scores + element_row + 0u].x;
  let q_inverse_3 = score_rows[subgroup_scores + element_row + 8u].x;
  subgroupBarrier();
  {
    let quad = part + 0u;
    {
      let raw = q_raw_0_0_0;
      let x = raw * (q_scale_0 * params.scale_sign);
      k_stage[p_at - part + 0u + quad] = vec4<f16>(hi4(x));
    }
  }
  {
    let quad = part + 2u;
    {
      let raw = q_raw_0_0_1;
      let x = raw * (q_scale_0 * params.scale_sign);
      k_stage[p_at - part + 0u + quad] = vec4<f16>(hi4(x));
    }
  }
  subgroupBarrier();
  let q_0_0 = coopLoadT<coop_mat16x16<f16, A>>(&k_stage[subgroup_p + 0u], P_ROW);
  subgroupBarrier();
  {
    let quad = part + 0u;
    {
      let raw = q_raw_0_0_0;
      let x = raw * (q_scale_0 * params.scale_sign);
      k_stage[p_at - part + 0u + quad] = vec4<f16>(x - hi4(x));
    }
  }
  {
    let quad = part + 2u;
    {
      let raw = q_raw_0_0_1;
      let x = raw * (q_scale_0 * params.scale_sign);
      k_stage[p_at - part + 0u + quad] = vec4<f16>(x - hi4(x));
    }
  }
  subgroupBarrier();
  let q_lo_0_0 = coopLoadT<coop_mat16x16<f16, A>>(&k_stage[subgroup_p + 0u], P_ROW);
  subgroupBarrier();
  {
    let quad = part + 0u;
    {
      let raw = q_raw_1_0_0;
      let x = raw * (q_scale_1 * params.scale_sign);
      k_stage[p_at - part + 0u + quad] = vec4<f16>(hi4(x));
    }
  }
  {
    let quad = part + 2u;
    {
      let raw = q_raw_1_0_1;
      let x = raw * (q_scale_1 * params.scale_sign);
      k_stage[p_at - part + 0u + quad] = vec4<f16>(hi4(x));
    }
  }
  subgroupBarrier();
  let q_1_0 = coopLoadT<coop_mat16x16<f16, A>>(&k_stage[subgroup_p + 0u], P_ROW);
  subgroupBarrier();
  {
    let quad = part + 0u;
    {
      let raw = q_raw_1_0_0;
      let x = raw * (q_scale_1 * params.scale_sign);
      k_stage[p_at - part + 0u + quad] = vec4<f16>(x - hi4(x));
    }
  }
  {
    let quad = part + 2u;
    {
      let raw = q_raw_1_0_1;
      let x = raw * (q_scale_1 * params.scale_sign);
      k_stage[p_at - part + 0u + quad] = vec4<f16>(x - hi4(x));
    }
  }
  subgroupBarrier();
  let q_lo_1_0 = coopLoadT<coop_mat16x16<f16, A>>(&k_stage[subgroup_p + 0u], P_ROW);
  subgroupBarrier();
  {
    let quad = part + 0u;
    {
      let raw = q_raw_0_1_0;
      let x = raw * (q_scale_0 * params.scale_sign);
      k_stage[p_at - part + 0u + quad] = vec4<f16>(hi4(x));
    }
  }
  {
    let quad = part + 2u;
    {
      let raw = q_raw_0_1_1;
      let x = raw * (q_scale_0 * params.scale_sign);
      k_stage[p_at - part + 0u + quad] = vec4<f16>(hi4(x));
    }
  }
  subgroupBarrier();
  let q_0_1 = coopLoadT<coop_mat16x16<f16, A>>(&k_stage[subgroup_p + 0u], P_ROW);
  subgroupBarrier();
  {
    let quad = part + 0u;
    {
      let raw = q_raw_0_1_0;
      let x = raw * (q_scale_0 * params.scale_sign);
      k_stage[p_at - part + 0u + quad] = vec4<f16>(x - hi4(x));
    }
  }
  {
    let quad = part + 2u;
    {
      let raw = q_raw_0_1_1;
      let x = raw * (q_scale_0 * params.scale_sign);
      k_stage[p_at - part + 0u + quad] = vec4<f16>(x - hi4(x));
    }
  }
  subgroupBarrier();
  let q_lo_0_1 = coopLoadT<coop_mat16x16<f16, A>>(&k_stage[subgroup_p + 0u], P_ROW);
  subgroupBarrier();
  {
    let quad = part + 0u;
    {
      let raw = q_raw_1_1_0;
      let x = raw * (q_scale_1 * params.scale_sign);
      k_stage[p_at - part + 0u + quad] = vec4<f16>(hi4(x));
    }
  }
  {
    let quad = part + 2u;
    {
      let raw = q_raw_1_1_1;
      let x = raw * (q_scale_1 * params.scale_sign);
      k_stage[p_at - part + 0u + quad] = vec4<f16>(hi4(x));
    }
  }
  subgroupBarrier();
  let q_1_1 = coopLoadT<coop_mat16x16<f16, A>>(&k_stage[subgroup_p + 0u], P_ROW);
  subgroupBarrier();
  {
    let quad = part + 0u;
    {
      let raw = q_raw_1_1_0;
      let x = raw * (q_scale_1 * params.scale_sign);
      k_stage[p_at - part + 0u + quad] = vec4<f16>(x - hi4(x));
    }
  }
  {
    let quad = part + 2u;
    {
      let raw = q_raw_1_1_1;
      let x = raw * (q_scale_1 * params.scale_sign);
      k_stage[p_at - part + 0u + quad] = vec4<f16>(x - hi4(x));
    }
  }
  subgroupBarrier();
  let q_lo_1_1 = coopLoadT<coop_mat16x16<f16, A>>(&k_stage[subgroup_p + 0u], P_ROW);
  subgroupBarrier();
  {
    let quad = part + 0u;
    {
      let raw = q_raw_0_2_0;
      let x = raw * (q_scale_0 * params.scale_sign);
      k_stage[p_at - part + 0u + quad] = vec4<f16>(hi4(x));
    }
  }
  {
    let quad = part + 2u;
    {
      let raw = q_raw_0_2_1;
      let x = raw * (q_scale_0 * params.scale_sign);
      k_stage[p_at - part + 0u + quad] = vec4<f16>(hi4(x));
    }
  }
  subgroupBarrier();
  let q_0_2 = coopLoadT<coop_mat16x16<f16, A>>(&k_stage[subgroup_p + 0u], P_ROW);
  subgroupBarrier();
  {
    let quad = part + 0u;
    {
      let raw = q_raw_0_2_0;
      let x = raw * (q_scale_0 * params.scale_sign);
      k_stage[p_at - part + 0u + quad] = vec4<f16>(x - hi4(x));
    }
  }
  {
    let quad = part + 2u;
    {
      let raw = q_raw_0_2_1;
      let x = raw * (q_scale_0 * params.scale_sign);
      k_stage[p_at - part + 0u + quad] = vec4<f16>(x - hi4(x));
    }
  }
  subgroupBarrier();
  let q_lo_0_2 = coopLoadT<coop_mat16x16<f16, A>>(&k_stage[subgroup_p + 0u], P_ROW);
  subgroupBarrier();
  {
    let quad = part + 0u;
    {
      let raw = q_raw_1_2_0;
      let x = raw * (q_scale_1 * params.scale_sign);
      k_stage[p_at - part + 0u + quad] = vec4<f16>(hi4(x));
    }
  }
  {
    let quad = part + 2u;
    {
      let raw = q_raw_1_2_1;
      let x = raw * (q_scale_1 * params.scale_sign);
      k_stage[p_at - part + 0u + quad] = vec4<f16>(hi4(x));
    }
  }
  subgroupBarrier();
  let q_1_2 = coopLoadT<coop_mat16x16<f16, A>>(&k_stage[subgroup_p + 0u], P_ROW);
  subgroupBarrier();
  {
    let quad = part + 0u;
    {
      let raw = q_raw_1_2_0;
      let x = raw * (q_scale_1 * params.scale_sign);
      k_stage[p_at - part + 0u + quad] = vec4<f16>(x - hi4(x));
    }
  }
  {
    let quad = part + 2u;
    {
      let raw = q_raw_1_2_1;
      let x = raw * (q_scale_1 * params.scale_sign);
      k_stage[p_at - part + 0u + quad] = vec4<f16>(x - hi4(x));
    }
  }
  subgroupBarrier();
  let q_lo_1_2 = coopLoadT<coop_mat16x16<f16, A>>(&k_stage[subgroup_p + 0u], P_ROW);
  subgroupBarrier();
  {
    let quad = part + 0u;
    {
      let raw = q_raw_0_3_0;
      let x = raw * (q_scale_0 * params.scale_sign);
      k_stage[p_at - part + 0u + quad] = vec4<f16>(hi4(x));
    }
  }
  {
    let quad = part + 2u;
    {
      let raw = q_raw_0_3_1;
      let x = raw * (q_scale_0 * params.scale_sign);
      k_stage[p_at - part + 0u + quad] = vec4<f16>(hi4(x));
    }
  }
  subgroupBarrier();
  let q_0_3 = coopLoadT<coop_mat16x16<f16, A>>(&k_stage[subgroup_p + 0u], P_ROW);
  subgroupBarrier();
  {
    let quad = part + 0u;
    {
      let raw = q_raw_0_3_0;
      let x = raw * (q_scale_0 * params.scale_sign);
      k_stage[p_at - part + 0u + quad] = vec4<f16>(x - hi4(x));
    }
  }
  {
    let quad = part + 2u;
    {
      let raw = q_raw_0_3_1;
      let x = raw * (q_scale_0 * params.scale_sign);
      k_stage[p_at - part + 0u + quad] = vec4<f16>(x - hi4(x));
    }
  }
  subgroupBarrier();
  let q_lo_0_3 = coopLoadT<coop_mat16x16<f16, A>>(&k_stage[subgroup_p + 0u], P_ROW);
  subgroupBarrier();
  {
    let quad = part + 0u;
    {
      let raw = q_raw_1_3_0;
      let x = raw * (q_scale_1 * params.scale_sign);
      k_stage[p_at - part + 0u + quad] = vec4<f16>(hi4(x));
    }
  }
  {
    let quad = part + 2u;
    {
      let raw = q_raw_1_3_1;
      let x = raw * (q_scale_1 * params.scale_sign);
      k_stage[p_at - part + 0u + quad] = vec4<f16>(hi4(x));
    }
  }
  subgroupBarrier();
  let q_1_3 = coopLoadT<coop_mat16x16<f16, A>>(&k_stage[subgroup_p + 0u], P_ROW);
  subgroupBarrier();
  {
    let quad = part + 0u;
    {
      let raw = q_raw_1_3_0;
      let x = raw * (q_scale_1 * params.scale_sign);
      k_stage[p_at - part + 0u + quad] = vec4<f16>(x - hi4(x));
    }
  }
  {
    let quad = part + 2u;
    {
      let raw = q_raw_1_3_1;
      let x = raw * (q_scale_1 * params.scale_sign);
      k_stage[p_at - part + 0u + quad] = vec4<f16>(x - hi4(x));
    }
  }
  subgroupBarrier();
  let q_lo_1_3 = coopLoadT<coop_mat16x16<f16, A>>(&k_stage[subgroup_p + 0u], P_ROW);
  subgroupBarrier();
  // Columns come where the other subgroups' fragments were.
  workgroupBarrier();
  let scale_0 = scale * q_inverse_0;
  let scale_1 = scale * q_inverse_1;
  let scale_2 = scale * q_inverse_2;
  let scale_3 = scale * q_inverse_3;
  var o_0_0 = coop_mat16x16<f32, C>();
  var o_0_1 = coop_mat16x16<f32, C>();
  var o_0_2 = coop_mat16x16<f32, C>();
  var o_0_3 = coop_mat16x16<f32, C>();
  var o_1_0 = coop_mat16x16<f32, C>();
  var o_1_1 = coop_mat16x16<f32, C>();
  var o_1_2 = coop_mat16x16<f32, C>();
  var o_1_3 = coop_mat16x16<f32, C>();
  {
    let at = stage * K_TILE + (k_row + 0u) * K_ROW + k_part;
    let x = k_share_0 * k_scale_0;
    let hi = hi4(x);
    k_stage[at] = vec4<f16>(hi);
    k_stage[at + K_LO] = vec4<f16>(x - hi);
  }
  {
    let at = stage * K_TILE + (k_row + 8u) * K_ROW + k_part;
    let x = k_share_1 * k_scale_1;
    let hi = hi4(x);
    k_stage[at] = vec4<f16>(hi);
    k_stage[at + K_LO] = vec4<f16>(x - hi);
  }
  if (thread < 16u) {
    let item = thread + 0u;
    // A token without finite numbers has no scale to take out.
    let powers = select(token_scale_0, vec2<f32>(1.0), token_scale_0 > vec2<f32>(1e30));
    column_stats[stage * 48u + item + 0u] = 1.0 / powers.x;
    // The powers of values are added to the scores, and taken out of the sum of probabilities.
    column_stats[stage * 48u + item + 16u] = f32(127 - i32(bitcast<u32>(powers.y) >> 23u));
    column_stats[stage * 48u + item + 32u] = powers.y;
  }
  workgroupBarrier();

  // The first maximum is finite, and so far above hidden scores that their probabilities are zero.
  let floor = LOWEST;
  let slack = SLACK;
  var row_max_0 = floor;
  // Scores above the limit raise the maximum.
  var limit_0 = LOWEST;
  var row_sum_0 = 0.0;
  var row_max_1 = floor;
  // Scores above the limit raise the maximum.
  var limit_1 = LOWEST;
  var row_sum_1 = 0.0;
  var row_max_2 = floor;
  // Scores above the limit raise the maximum.
  var limit_2 = LOWEST;
  var row_sum_2 = 0.0;
  var row_max_3 = floor;
  // Scores above the limit raise the maximum.
  var limit_3 = LOWEST;
  var row_sum_3 = 0.0;

  // Loop: tiles
  for (var tile = open.first; tile < open.end; tile += 1u) {
    let following = select(rest, tile + 1u, tile + 1u < open.end);
    let column0 = first_column(tiles, tile);
    let tile_column0 = column0;
    let chunk_column = 0u;

    // S = Q K^T.
    var s_0_0 = coop_mat16x16<f32, C>();
    var s_lo_0_0 = coop_mat16x16<f32, C>();
    var s_1_0 = coop_mat16x16<f32, C>();
    var s_lo_1_0 = coop_mat16x16<f32, C>();
    {
      let column = coopLoad<coop_mat16x16<f16, B>>(&k_stage[stage * K_TILE + 0u * K_ROW + 0u], K_ROW);
      let column_lo = coopLoad<coop_mat16x16<f16, B>>(&k_stage[stage * K_TILE + K_LO + 0u * K_ROW + 0u], K_ROW);
      s_lo_0_0 = coopMultiplyAdd(q_0_0, column_lo, s_lo_0_0);
      s_lo_0_0 = coopMultiplyAdd(q_lo_0_0, column, s_lo_0_0);
      s_0_0 = coopMultiplyAdd(q_0_0, column, s_0_0);
      s_lo_1_0 = coopMultiplyAdd(q_1_0, column_lo, s_lo_1_0);
      s_lo_1_0 = coopMultiplyAdd(q_lo_1_0, column, s_lo_1_0);
      s_1_0 = coopMultiplyAdd(q_1_0, column, s_1_0);
    }
    {
      let column = coopLoad<coop_mat16x16<f16, B>>(&k_stage[stage * K_TILE + 0u * K_ROW + 4u], K_ROW);
      let column_lo = coopLoad<coop_mat16x16<f16, B>>(&k_stage[stage * K_TILE + K_LO + 0u * K_ROW + 4u], K_ROW);
      s_lo_0_0 = coopMultiplyAdd(q_0_1, column_lo, s_lo_0_0);
      s_lo_0_0 = coopMultiplyAdd(q_lo_0_1, column, s_lo_0_0);
      s_0_0 = coopMultiplyAdd(q_0_1, column, s_0_0);
      s_lo_1_0 = coopMultiplyAdd(q_1_1, column_lo, s_lo_1_0);
      s_lo_1_0 = coopMultiplyAdd(q_lo_1_1, column, s_lo_1_0);
      s_1_0 = coopMultiplyAdd(q_1_1, column, s_1_0);
    }
    {
      let column = coopLoad<coop_mat16x16<f16, B>>(&k_stage[stage * K_TILE + 0u * K_ROW + 8u], K_ROW);
      let column_lo = coopLoad<coop_mat16x16<f16, B>>(&k_stage[stage * K_TILE + K_LO + 0u * K_ROW + 8u], K_ROW);
      s_lo_0_0 = coopMultiplyAdd(q_0_2, column_lo, s_lo_0_0);
      s_lo_0_0 = coopMultiplyAdd(q_lo_0_2, column, s_lo_0_0);
      s_0_0 = coopMultiplyAdd(q_0_2, column, s_0_0);
      s_lo_1_0 = coopMultiplyAdd(q_1_2, column_lo, s_lo_1_0);
      s_lo_1_0 = coopMultiplyAdd(q_lo_1_2, column, s_lo_1_0);
      s_1_0 = coopMultiplyAdd(q_1_2, column, s_1_0);
    }
    {
      let column = coopLoad<coop_mat16x16<f16, B>>(&k_stage[stage * K_TILE + 0u * K_ROW + 12u], K_ROW);
      let column_lo = coopLoad<coop_mat16x16<f16, B>>(&k_stage[stage * K_TILE + K_LO + 0u * K_ROW + 12u], K_ROW);
      s_lo_0_0 = coopMultiplyAdd(q_0_3, column_lo, s_lo_0_0);
      s_lo_0_0 = coopMultiplyAdd(q_lo_0_3, column, s_lo_0_0);
      s_0_0 = coopMultiplyAdd(q_0_3, column, s_0_0);
      s_lo_1_0 = coopMultiplyAdd(q_1_3, column_lo, s_lo_1_0);
      s_lo_1_0 = coopMultiplyAdd(q_lo_1_3, column, s_lo_1_0);
      s_1_0 = coopMultiplyAdd(q_1_3, column, s_1_0);
    }
    s_0_0 = s_0_0 + s_lo_0_0;
    s_1_0 = s_1_0 + s_lo_1_0;
    {
      let at = stage * V_TILE + (v_row + 0u) * V_ROW + v_part;
      let x = v_share_0 * v_scale_0;
      let hi = hi4(x);
      v_stage[at] = vec4<f16>(hi);
      v_stage[at + V_LO] = vec4<f16>(x - hi);
    }
    {
      let at = stage * V_TILE + (v_row + 8u) * V_ROW + v_part;
      let x = v_share_1 * v_scale_1;
      let hi = hi4(x);
      v_stage[at] = vec4<f16>(hi);
      v_stage[at + V_LO] = vec4<f16>(x - hi);
    }
    workgroupBarrier();
    let next = first_column(tiles, following);
    {
      let part = k_part;
      let source = min(next + k_row + 0u, last_column);
      { k_share_0 = raw_k(k_base, source * params.k.seq, part); }
      k_scale_0 = key_scales[scales_base + source].x;
    }
    {
      let part = k_part;
      let source = min(next + k_row + 8u, last_column);
      { k_share_1 = raw_k(k_base, source * params.k.seq, part); }
      k_scale_1 = key_scales[scales_base + source].x;
    }
    {
      let part = v_part;
      let source = min(next + v_row + 0u, last_column);
      { v_share_0 = raw_v(v_base, source * params.v.seq, part); }
      v_scale_0 = key_scales[scales_base + source].y;
    }
    {
      let part = v_part;
      let source = min(next + v_row + 8u, last_column);
      { v_share_1 = raw_v(v_base, source * params.v.seq, part); }
      v_scale_1 = key_scales[scales_base + source].y;
    }
    if (thread < 16u) {
      let source = min(next + thread + 0u, last_column);
      token_scale_0 = key_scales[scales_base + source];
    }
    var x_0_0 = vec4<f32>(component_c(s_0_0, 0u), component_c(s_0_0, 1u), component_c(s_0_0, 2u), component_c(s_0_0, 3u)) * vec4<f32>(column_stats[stage * 48u + (column0 - tile_column0) + lane_column + 0u], column_stats[stage * 48u + (column0 - tile_column0) + lane_column + 1u], column_stats[stage * 48u + (column0 - tile_column0) + lane_column + 8u], column_stats[stage * 48u + (column0 - tile_column0) + lane_column + 9u]);
    var x_1_0 = vec4<f32>(component_c(s_0_0, 4u), component_c(s_0_0, 5u), component_c(s_0_0, 6u), component_c(s_0_0, 7u)) * vec4<f32>(column_stats[stage * 48u + (column0 - tile_column0) + lane_column + 0u], column_stats[stage * 48u + (column0 - tile_column0) + lane_column + 1u], column_stats[stage * 48u + (column0 - tile_column0) + lane_column + 8u], column_stats[stage * 48u + (column0 - tile_column0) + lane_column + 9u]);
    var x_2_0 = vec4<f32>(component_c(s_1_0, 0u), component_c(s_1_0, 1u), component_c(s_1_0, 2u), component_c(s_1_0, 3u)) * vec4<f32>(column_stats[stage * 48u + (column0 - tile_column0) + lane_column + 0u], column_stats[stage * 48u + (column0 - tile_column0) + lane_column + 1u], column_stats[stage * 48u + (column0 - tile_column0) + lane_column + 8u], column_stats[stage * 48u + (column0 - tile_column0) + lane_column + 9u]);
    var x_3_0 = vec4<f32>(component_c(s_1_0, 4u), component_c(s_1_0, 5u), component_c(s_1_0, 6u), component_c(s_1_0, 7u)) * vec4<f32>(column_stats[stage * 48u + (column0 - tile_column0) + lane_column + 0u], column_stats[stage * 48u + (column0 - tile_column0) + lane_column + 1u], column_stats[stage * 48u + (column0 - tile_column0) + lane_column + 8u], column_stats[stage * 48u + (column0 - tile_column0) + lane_column + 9u]);
    x_0_0 *= scale_0;
    x_1_0 *= scale_1;
    x_2_0 *= scale_2;
    x_3_0 *= scale_3;
    x_0_0 += vec4<f32>(column_stats[stage * 48u + (column0 - tile_column0) + lane_column + 16u], column_stats[stage * 48u + (column0 - tile_column0) + lane_column + 17u], column_stats[stage * 48u + (column0 - tile_column0) + lane_column + 24u], column_stats[stage * 48u + (column0 - tile_column0) + lane_column + 25u]);
    x_1_0 += vec4<f32>(column_stats[stage * 48u + (column0 - tile_column0) + lane_column + 16u], column_stats[stage * 48u + (column0 - tile_column0) + lane_column + 17u], column_stats[stage * 48u + (column0 - tile_column0) + lane_column + 24u], column_stats[stage * 48u + (column0 - tile_column0) + lane_column + 25u]);
    x_2_0 += vec4<f32>(column_stats[stage * 48u + (column0 - tile_column0) + lane_column + 16u], column_stats[stage * 48u + (column0 - tile_column0) + lane_column + 17u], column_stats[stage * 48u + (column0 - tile_column0) + lane_column + 24u], column_stats[stage * 48u + (column0 - tile_column0) + lane_column + 25u]);
    x_3_0 += vec4<f32>(column_stats[stage * 48u + (column0 - tile_column0) + lane_column + 16u], column_stats[stage * 48u + (column0 - tile_column0) + lane_column + 17u], column_stats[stage * 48u + (column0 - tile_column0) + lane_column + 24u], column_stats[stage * 48u + (column0 - tile_column0) + lane_column + 25u]);
    let pair_max_0_0 = max(x_0_0.xy, x_0_0.zw);
    var tile_max_0 = max(pair_max_0_0.x, pair_max_0_0.y);
    let pair_max_1_0 = max(x_1_0.xy, x_1_0.zw);
    var tile_max_1 = max(pair_max_1_0.x, pair_max_1_0.y);
    let pair_max_2_0 = max(x_2_0.xy, x_2_0.zw);
    var tile_max_2 = max(pair_max_2_0.x, pair_max_2_0.y);
    let pair_max_3_0 = max(x_3_0.xy, x_3_0.zw);
    var tile_max_3 = max(pair_max_3_0.x, pair_max_3_0.y);

    // m = max(row_max, max of S by rows);  O and row_sum *= exp(row_max - m). Runs at most once; a loop, because with an `if` NVIDIA's
    // compiler moves the registers of fragments.
    loop {
      if (!subgroupAny((tile_max_0 > limit_0) || (tile_max_1 > limit_1) || (tile_max_2 > limit_2) || (tile_max_3 > limit_3))) { break; }
      let old_max_0 = row_max_0;
      {
        var tile_max = select(limit_0, tile_max_0, tile_max_0 > limit_0);
        tile_max = max(tile_max, subgroupShuffleXor(tile_max, 1u));
        tile_max = max(tile_max, subgroupShuffleXor(tile_max, 2u));
        if (tile_max > limit_0) {
          row_max_0 = tile_max - LIFT;
          limit_0 = tile_max + slack;
        }
      }

      // A row that keeps its maximum keeps its bits.
      let rescale_0 = select(exp2(old_max_0 - row_max_0), 1.0, old_max_0 == row_max_0);
      row_sum_0 *= rescale_0;
      let old_max_1 = row_max_1;
      {
        var tile_max = select(limit_1, tile_max_1, tile_max_1 > limit_1);
        tile_max = max(tile_max, subgroupShuffleXor(tile_max, 1u));
        tile_max = max(tile_max, subgroupShuffleXor(tile_max, 2u));
        if (tile_max > limit_1) {
          row_max_1 = tile_max - LIFT;
          limit_1 = tile_max + slack;
        }
      }

      // A row that keeps its maximum keeps its bits.
      let rescale_1 = select(exp2(old_max_1 - row_max_1), 1.0, old_max_1 == row_max_1);
      row_sum_1 *= rescale_1;
      let old_max_2 = row_max_2;
      {
        var tile_max = select(limit_2, tile_max_2, tile_max_2 > limit_2);
        tile_max = max(tile_max, subgroupShuffleXor(tile_max, 1u));
        tile_max = max(tile_max, subgroupShuffleXor(tile_max, 2u));
        if (tile_max > limit_2) {
          row_max_2 = tile_max - LIFT;
          limit_2 = tile_max + slack;
        }
      }

      // A row that keeps its maximum keeps its bits.
      let rescale_2 = select(exp2(old_max_2 - row_max_2), 1.0, old_max_2 == row_max_2);
      row_sum_2 *= rescale_2;
      let old_max_3 = row_max_3;
      {
        var tile_max = select(limit_3, tile_max_3, tile_max_3 > limit_3);
        tile_max = max(tile_max, subgroupShuffleXor(tile_max, 1u));
        tile_max = max(tile_max, subgroupShuffleXor(tile_max, 2u));
        if (tile_max > limit_3) {
          row_max_3 = tile_max - LIFT;
          limit_3 = tile_max + slack;
        }
      }

      // A row that keeps its maximum keeps its bits.
      let rescale_3 = select(exp2(old_max_3 - row_max_3), 1.0, old_max_3 == row_max_3);
      row_sum_3 *= rescale_3;
      o_0_0 = matrix_of_c(component_c(o_0_0, 0u) * rescale_0, component_c(o_0_0, 1u) * rescale_0, component_c(o_0_0, 2u) * rescale_0, component_c(o_0_0, 3u) * rescale_0, component_c(o_0_0, 4u) * rescale_1, component_c(o_0_0, 5u) * rescale_1, component_c(o_0_0, 6u) * rescale_1, component_c(o_0_0, 7u) * rescale_1);
      o_0_1 = matrix_of_c(component_c(o_0_1, 0u) * rescale_0, component_c(o_0_1, 1u) * rescale_0, component_c(o_0_1, 2u) * rescale_0, component_c(o_0_1, 3u) * rescale_0, component_c(o_0_1, 4u) * rescale_1, component_c(o_0_1, 5u) * rescale_1, component_c(o_0_1, 6u) * rescale_1, component_c(o_0_1, 7u) * rescale_1);
      o_0_2 = matrix_of_c(component_c(o_0_2, 0u) * rescale_0, component_c(o_0_2, 1u) * rescale_0, component_c(o_0_2, 2u) * rescale_0, component_c(o_0_2, 3u) * rescale_0, component_c(o_0_2, 4u) * rescale_1, component_c(o_0_2, 5u) * rescale_1, component_c(o_0_2, 6u) * rescale_1, component_c(o_0_2, 7u) * rescale_1);
      o_0_3 = matrix_of_c(component_c(o_0_3, 0u) * rescale_0, component_c(o_0_3, 1u) * rescale_0, component_c(o_0_3, 2u) * rescale_0, component_c(o_0_3, 3u) * rescale_0, component_c(o_0_3, 4u) * rescale_1, component_c(o_0_3, 5u) * rescale_1, component_c(o_0_3, 6u) * rescale_1, component_c(o_0_3, 7u) * rescale_1);
      o_1_0 = matrix_of_c(component_c(o_1_0, 0u) * rescale_2, component_c(o_1_0, 1u) * rescale_2, component_c(o_1_0, 2u) * rescale_2, component_c(o_1_0, 3u) * rescale_2, component_c(o_1_0, 4u) * rescale_3, component_c(o_1_0, 5u) * rescale_3, component_c(o_1_0, 6u) * rescale_3, component_c(o_1_0, 7u) * rescale_3);
      o_1_1 = matrix_of_c(component_c(o_1_1, 0u) * rescale_2, component_c(o_1_1, 1u) * rescale_2, component_c(o_1_1, 2u) * rescale_2, component_c(o_1_1, 3u) * rescale_2, component_c(o_1_1, 4u) * rescale_3, component_c(o_1_1, 5u) * rescale_3, component_c(o_1_1, 6u) * rescale_3, component_c(o_1_1, 7u) * rescale_3);
      o_1_2 = matrix_of_c(component_c(o_1_2, 0u) * rescale_2, component_c(o_1_2, 1u) * rescale_2, component_c(o_1_2, 2u) * rescale_2, component_c(o_1_2, 3u) * rescale_2, component_c(o_1_2, 4u) * rescale_3, component_c(o_1_2, 5u) * rescale_3, component_c(o_1_2, 6u) * rescale_3, component_c(o_1_2, 7u) * rescale_3);
      o_1_3 = matrix_of_c(component_c(o_1_3, 0u) * rescale_2, component_c(o_1_3, 1u) * rescale_2, component_c(o_1_3, 2u) * rescale_2, component_c(o_1_3, 3u) * rescale_2, component_c(o_1_3, 4u) * rescale_3, component_c(o_1_3, 5u) * rescale_3, component_c(o_1_3, 6u) * rescale_3, component_c(o_1_3, 7u) * rescale_3);
    }
    // P = exp(S - m);  row_sum += sum of P.
    var total_0 = vec4<f32>();
    let p_0_0 = exp2(x_0_0 - vec4<f32>(row_max_0));
    total_0 = fma(p_0_0, vec4<f32>(column_stats[stage * 48u + (column0 - tile_column0) + lane_column + 32u], column_stats[stage * 48u + (column0 - tile_column0) + lane_column + 33u], column_stats[stage * 48u + (column0 - tile_column0) + lane_column + 40u], column_stats[stage * 48u + (column0 - tile_column0) + lane_column + 41u]), total_0);
    row_sum_0 += (total_0.x + total_0.y) + (total_0.z + total_0.w);
    var total_1 = vec4<f32>();
    let p_1_0 = exp2(x_1_0 - vec4<f32>(row_max_1));
    total_1 = fma(p_1_0, vec4<f32>(column_stats[stage * 48u + (column0 - tile_column0) + lane_column + 32u], column_stats[stage * 48u + (column0 - tile_column0) + lane_column + 33u], column_stats[stage * 48u + (column0 - tile_column0) + lane_column + 40u], column_stats[stage * 48u + (column0 - tile_column0) + lane_column + 41u]), total_1);
    row_sum_1 += (total_1.x + total_1.y) + (total_1.z + total_1.w);
    var total_2 = vec4<f32>();
    let p_2_0 = exp2(x_2_0 - vec4<f32>(row_max_2));
    total_2 = fma(p_2_0, vec4<f32>(column_stats[stage * 48u + (column0 - tile_column0) + lane_column + 32u], column_stats[stage * 48u + (column0 - tile_column0) + lane_column + 33u], column_stats[stage * 48u + (column0 - tile_column0) + lane_column + 40u], column_stats[stage * 48u + (column0 - tile_column0) + lane_column + 41u]), total_2);
    row_sum_2 += (total_2.x + total_2.y) + (total_2.z + total_2.w);
    var total_3 = vec4<f32>();
    let p_3_0 = exp2(x_3_0 - vec4<f32>(row_max_3));
    total_3 = fma(p_3_0, vec4<f32>(column_stats[stage * 48u + (column0 - tile_column0) + lane_column + 32u], column_stats[stage * 48u + (column0 - tile_column0) + lane_column + 33u], column_stats[stage * 48u + (column0 - tile_column0) + lane_column + 40u], column_stats[stage * 48u + (column0 - tile_column0) + lane_column + 41u]), total_3);
    row_sum_3 += (total_3.x + total_3.y) + (total_3.z + total_3.w);
    let p_hi_0_0 = hi4(p_0_0);
    let p_lo_0_0 = p_0_0 - p_hi_0_0;
    let p_hi_1_0 = hi4(p_1_0);
    let p_lo_1_0 = p_1_0 - p_hi_1_0;
    let p_hi_2_0 = hi4(p_2_0);
    let p_lo_2_0 = p_2_0 - p_hi_2_0;
    let p_hi_3_0 = hi4(p_3_0);
    let p_lo_3_0 = p_3_0 - p_hi_3_0;
    let p_hi_left_0_0 = matrix_of_a(f16(p_hi_0_0.x), f16(p_hi_0_0.y), f16(p_hi_0_0.z), f16(p_hi_0_0.w), f16(p_hi_1_0.x), f16(p_hi_1_0.y), f16(p_hi_1_0.z), f16(p_hi_1_0.w));
    let p_hi_left_1_0 = matrix_of_a(f16(p_hi_2_0.x), f16(p_hi_2_0.y), f16(p_hi_2_0.z), f16(p_hi_2_0.w), f16(p_hi_3_0.x), f16(p_hi_3_0.y), f16(p_hi_3_0.z), f16(p_hi_3_0.w));
    let p_lo_left_0_0 = matrix_of_a(f16(p_lo_0_0.x), f16(p_lo_0_0.y), f16(p_lo_0_0.z), f16(p_lo_0_0.w), f16(p_lo_1_0.x), f16(p_lo_1_0.y), f16(p_lo_1_0.z), f16(p_lo_1_0.w));
    let p_lo_left_1_0 = matrix_of_a(f16(p_lo_2_0.x), f16(p_lo_2_0.y), f16(p_lo_2_0.z), f16(p_lo_2_0.w), f16(p_lo_3_0.x), f16(p_lo_3_0.y), f16(p_lo_3_0.z), f16(p_lo_3_0.w));

    // O += P V.
    {
      var sum_0 = coop_mat16x16<f32, C>();
      var sum_1 = coop_mat16x16<f32, C>();
      {
        let column = coopLoadT<coop_mat16x16<f16, B>>(&v_stage[stage * V_TILE + 0u * V_ROW + 0u], V_ROW);
        let column_lo = coopLoadT<coop_mat16x16<f16, B>>(&v_stage[stage * V_TILE + V_LO + 0u * V_ROW + 0u], V_ROW);
        sum_0 = coopMultiplyAdd(p_hi_left_0_0, column_lo, sum_0);
        sum_0 = coopMultiplyAdd(p_lo_left_0_0, column, sum_0);
        sum_0 = coopMultiplyAdd(p_hi_left_0_0, column, sum_0);
        sum_1 = coopMultiplyAdd(p_hi_left_1_0, column_lo, sum_1);
        sum_1 = coopMultiplyAdd(p_lo_left_1_0, column, sum_1);
        sum_1 = coopMultiplyAdd(p_hi_left_1_0, column, sum_1);
      }
      o_0_0 = o_0_0 + sum_0;
      o_1_0 = o_1_0 + sum_1;
    }
    {
      var sum_0 = coop_mat16x16<f32, C>();
      var sum_1 = coop_mat16x16<f32, C>();
      {
        let column = coopLoadT<coop_mat16x16<f16, B>>(&v_stage[stage * V_TILE + 0u * V_ROW + 4u], V_ROW);
        let column_lo = coopLoadT<coop_mat16x16<f16, B>>(&v_stage[stage * V_TILE + V_LO + 0u * V_ROW + 4u], V_ROW);
        sum_0 = coopMultiplyAdd(p_hi_left_0_0, column_lo, sum_0);
        sum_0 = coopMultiplyAdd(p_lo_left_0_0, column, sum_0);
        sum_0 = coopMultiplyAdd(p_hi_left_0_0, column, sum_0);
        sum_1 = coopMultiplyAdd(p_hi_left_1_0, column_lo, sum_1);
        sum_1 = coopMultiplyAdd(p_lo_left_1_0, column, sum_1);
        sum_1 = coopMultiplyAdd(p_hi_left_1_0, column, sum_1);
      }
      o_0_1 = o_0_1 + sum_0;
      o_1_1 = o_1_1 + sum_1;
    }
    {
      var sum_0 = coop_mat16x16<f32, C>();
      var sum_1 = coop_mat16x16<f32, C>();
      {
        let column = coopLoadT<coop_mat16x16<f16, B>>(&v_stage[stage * V_TILE + 0u * V_ROW + 8u], V_ROW);
        let column_lo = coopLoadT<coop_mat16x16<f16, B>>(&v_stage[stage * V_TILE + V_LO + 0u * V_ROW + 8u], V_ROW);
        sum_0 = coopMultiplyAdd(p_hi_left_0_0, column_lo, sum_0);
        sum_0 = coopMultiplyAdd(p_lo_left_0_0, column, sum_0);
        sum_0 = coopMultiplyAdd(p_hi_left_0_0, column, sum_0);
        sum_1 = coopMultiplyAdd(p_hi_left_1_0, column_lo, sum_1);
        sum_1 = coopMultiplyAdd(p_lo_left_1_0, column, sum_1);
        sum_1 = coopMultiplyAdd(p_hi_left_1_0, column, sum_1);
      }
      o_0_2 = o_0_2 + sum_0;
      o_1_2 = o_1_2 + sum_1;
    }
    {
      var sum_0 = coop_mat16x16<f32, C>();
      var sum_1 = coop_mat16x16<f32, C>();
      {
        let column = coopLoadT<coop_mat16x16<f16, B>>(&v_stage[stage * V_TILE + 0u * V_ROW + 12u], V_ROW);
        let column_lo = coopLoadT<coop_mat16x16<f16, B>>(&v_stage[stage * V_TILE + V_LO + 0u * V_ROW + 12u], V_ROW);
        sum_0 = coopMultiplyAdd(p_hi_left_0_0, column_lo, sum_0);
        sum_0 = coopMultiplyAdd(p_lo_left_0_0, column, sum_0);
        sum_0 = coopMultiplyAdd(p_hi_left_0_0, column, sum_0);
        sum_1 = coopMultiplyAdd(p_hi_left_1_0, column_lo, sum_1);
        sum_1 = coopMultiplyAdd(p_lo_left_1_0, column, sum_1);
        sum_1 = coopMultiplyAdd(p_hi_left_1_0, column, sum_1);
      }
      o_0_3 = o_0_3 + sum_0;
      o_1_3 = o_1_3 + sum_1;
    }

    // All subgroups have used K.
    workgroupBarrier();
    {
      let at = stage * K_TILE + (k_row + 0u) * K_ROW + k_part;
      let x = k_share_0 * k_scale_0;
      let hi = hi4(x);
      k_stage[at] = vec4<f16>(hi);
      k_stage[at + K_LO] = vec4<f16>(x - hi);
    }
    {
      let at = stage * K_TILE + (k_row + 8u) * K_ROW + k_part;
      let x = k_share_1 * k_scale_1;
      let hi = hi4(x);
      k_stage[at] = vec4<f16>(hi);
      k_stage[at + K_LO] = vec4<f16>(x - hi);
    }
    if (thread < 16u) {
      let item = thread + 0u;
      // A token without finite numbers has no scale to take out.
      let powers = select(token_scale_0, vec2<f32>(1.0), token_scale_0 > vec2<f32>(1e30));
      column_stats[stage * 48u + item + 0u] = 1.0 / powers.x;
      // The powers of values are added to the scores, and taken out of the sum of probabilities.
      column_stats[stage * 48u + item + 16u] = f32(127 - i32(bitcast<u32>(powers.y) >> 23u));
      column_stats[stage * 48u + item + 32u] = powers.y;
    }
    workgroupBarrier();
  }
  // Loop: tiles
  for (var tile = rest; tile < tiles.end; ) {
    let after = next_tile(tiles, tile);
    let following = select(after, open.end, after == open.first && open.first < open.end);
    let column0 = first_column(tiles, tile);
    let tile_column0 = column0;
    let chunk_column = 0u;

    // S = Q K^T.
    var s_0_0 = coop_mat16x16<f32, C>();
    var s_lo_0_0 = coop_mat16x16<f32, C>();
    var s_1_0 = coop_mat16x16<f32, C>();
    var s_lo_1_0 = coop_mat16x16<f32, C>();
    {
      let column = coopLoad<coop_mat16x16<f16, B>>(&k_stage[stage * K_TILE + 0u * K_ROW + 0u], K_ROW);
      let column_lo = coopLoad<coop_mat16x16<f16, B>>(&k_stage[stage * K_TILE + K_LO + 0u * K_ROW + 0u], K_ROW);
      s_lo_0_0 = coopMultiplyAdd(q_0_0, column_lo, s_lo_0_0);
      s_lo_0_0 = coopMultiplyAdd(q_lo_0_0, column, s_lo_0_0);
      s_0_0 = coopMultiplyAdd(q_0_0, column, s_0_0);
      s_lo_1_0 = coopMultiplyAdd(q_1_0, column_lo, s_lo_1_0);
      s_lo_1_0 = coopMultiplyAdd(q_lo_1_0, column, s_lo_1_0);
      s_1_0 = coopMultiplyAdd(q_1_0, column, s_1_0);
    }
    {
      let column = coopLoad<coop_mat16x16<f16, B>>(&k_stage[stage * K_TILE + 0u * K_ROW + 4u], K_ROW);
      let column_lo = coopLoad<coop_mat16x16<f16, B>>(&k_stage[stage * K_TILE + K_LO + 0u * K_ROW + 4u], K_ROW);
      s_lo_0_0 = coopMultiplyAdd(q_0_1, column_lo, s_lo_0_0);
      s_lo_0_0 = coopMultiplyAdd(q_lo_0_1, column, s_lo_0_0);
      s_0_0 = coopMultiplyAdd(q_0_1, column, s_0_0);
      s_lo_1_0 = coopMultiplyAdd(q_1_1, column_lo, s_lo_1_0);
      s_lo_1_0 = coopMultiplyAdd(q_lo_1_1, column, s_lo_1_0);
      s_1_0 = coopMultiplyAdd(q_1_1, column, s_1_0);
    }
    {
      let column = coopLoad<coop_mat16x16<f16, B>>(&k_stage[stage * K_TILE + 0u * K_ROW + 8u], K_ROW);
      let column_lo = coopLoad<coop_mat16x16<f16, B>>(&k_stage[stage * K_TILE + K_LO + 0u * K_ROW + 8u], K_ROW);
      s_lo_0_0 = coopMultiplyAdd(q_0_2, column_lo, s_lo_0_0);
      s_lo_0_0 = coopMultiplyAdd(q_lo_0_2, column, s_lo_0_0);
      s_0_0 = coopMultiplyAdd(q_0_2, column, s_0_0);
      s_lo_1_0 = coopMultiplyAdd(q_1_2, column_lo, s_lo_1_0);
      s_lo_1_0 = coopMultiplyAdd(q_lo_1_2, column, s_lo_1_0);
      s_1_0 = coopMultiplyAdd(q_1_2, column, s_1_0);
    }
    {
      let column = coopLoad<coop_mat16x16<f16, B>>(&k_stage[stage * K_TILE + 0u * K_ROW + 12u], K_ROW);
      let column_lo = coopLoad<coop_mat16x16<f16, B>>(&k_stage[stage * K_TILE + K_LO + 0u * K_ROW + 12u], K_ROW);
      s_lo_0_0 = coopMultiplyAdd(q_0_3, column_lo, s_lo_0_0);
      s_lo_0_0 = coopMultiplyAdd(q_lo_0_3, column, s_lo_0_0);
      s_0_0 = coopMultiplyAdd(q_0_3, column, s_0_0);
      s_lo_1_0 = coopMultiplyAdd(q_1_3, column_lo, s_lo_1_0);
      s_lo_1_0 = coopMultiplyAdd(q_lo_1_3, column, s_lo_1_0);
      s_1_0 = coopMultiplyAdd(q_1_3, column, s_1_0);
    }
    s_0_0 = s_0_0 + s_lo_0_0;
    s_1_0 = s_1_0 + s_lo_1_0;
    {
      let at = stage * V_TILE + (v_row + 0u) * V_ROW + v_part;
      let x = v_share_0 * v_scale_0;
      let hi = hi4(x);
      v_stage[at] = vec4<f16>(hi);
      v_stage[at + V_LO] = vec4<f16>(x - hi);
    }
    {
      let at = stage * V_TILE + (v_row + 8u) * V_ROW + v_part;
      let x = v_share_1 * v_scale_1;
      let hi = hi4(x);
      v_stage[at] = vec4<f16>(hi);
      v_stage[at + V_LO] = vec4<f16>(x - hi);
    }
    workgroupBarrier();
    let next = first_column(tiles, following);
    {
      let part = k_part;
      let source = min(next + k_row + 0u, last_column);
      { k_share_0 = raw_k(k_base, source * params.k.seq, part); }
      k_scale_0 = key_scales[scales_base + source].x;
    }
    {
      let part = k_part;
      let source = min(next + k_row + 8u, last_column);
      { k_share_1 = raw_k(k_base, source * params.k.seq, part); }
      k_scale_1 = key_scales[scales_base + source].x;
    }
    {
      let part = v_part;
      let source = min(next + v_row + 0u, last_column);
      { v_share_0 = raw_v(v_base, source * params.v.seq, part); }
      v_scale_0 = key_scales[scales_base + source].y;
    }
    {
      let part = v_part;
      let source = min(next + v_row + 8u, last_column);
      { v_share_1 = raw_v(v_base, source * params.v.seq, part); }
      v_scale_1 = key_scales[scales_base + source].y;
    }
    if (thread < 16u) {
      let source = min(next + thread + 0u, last_column);
      token_scale_0 = key_scales[scales_base + source];
    }
    var x_0_0 = vec4<f32>(component_c(s_0_0, 0u), component_c(s_0_0, 1u), component_c(s_0_0, 2u), component_c(s_0_0, 3u)) * vec4<f32>(column_stats[stage * 48u + (column0 - tile_column0) + lane_column + 0u], column_stats[stage * 48u + (column0 - tile_column0) + lane_column + 1u], column_stats[stage * 48u + (column0 - tile_column0) + lane_column + 8u], column_stats[stage * 48u + (column0 - tile_column0) + lane_column + 9u]);
    var x_1_0 = vec4<f32>(component_c(s_0_0, 4u), component_c(s_0_0, 5u), component_c(s_0_0, 6u), component_c(s_0_0, 7u)) * vec4<f32>(column_stats[stage * 48u + (column0 - tile_column0) + lane_column + 0u], column_stats[stage * 48u + (column0 - tile_column0) + lane_column + 1u], column_stats[stage * 48u + (column0 - tile_column0) + lane_column + 8u], column_stats[stage * 48u + (column0 - tile_column0) + lane_column + 9u]);
    var x_2_0 = vec4<f32>(component_c(s_1_0, 0u), component_c(s_1_0, 1u), component_c(s_1_0, 2u), component_c(s_1_0, 3u)) * vec4<f32>(column_stats[stage * 48u + (column0 - tile_column0) + lane_column + 0u], column_stats[stage * 48u + (column0 - tile_column0) + lane_column + 1u], column_stats[stage * 48u + (column0 - tile_column0) + lane_column + 8u], column_stats[stage * 48u + (column0 - tile_column0) + lane_column + 9u]);
    var x_3_0 = vec4<f32>(component_c(s_1_0, 4u), component_c(s_1_0, 5u), component_c(s_1_0, 6u), component_c(s_1_0, 7u)) * vec4<f32>(column_stats[stage * 48u + (column0 - tile_column0) + lane_column + 0u], column_stats[stage * 48u + (column0 - tile_column0) + lane_column + 1u], column_stats[stage * 48u + (column0 - tile_column0) + lane_column + 8u], column_stats[stage * 48u + (column0 - tile_column0) + lane_column + 9u]);
    x_0_0 *= scale_0;
    x_1_0 *= scale_1;
    x_2_0 *= scale_2;
    x_3_0 *= scale_3;
    x_0_0 += vec4<f32>(column_stats[stage * 48u + (column0 - tile_column0) + lane_column + 16u], column_stats[stage * 48u + (column0 - tile_column0) + lane_column + 17u], column_stats[stage * 48u + (column0 - tile_column0) + lane_column + 24u], column_stats[stage * 48u + (column0 - tile_column0) + lane_column + 25u]);
    x_1_0 += vec4<f32>(column_stats[stage * 48u + (column0 - tile_column0) + lane_column + 16u], column_stats[stage * 48u + (column0 - tile_column0) + lane_column + 17u], column_stats[stage * 48u + (column0 - tile_column0) + lane_column + 24u], column_stats[stage * 48u + (column0 - tile_column0) + lane_column + 25u]);
    x_2_0 += vec4<f32>(column_stats[stage * 48u + (column0 - tile_column0) + lane_column + 16u], column_stats[stage * 48u + (column0 - tile_column0) + lane_column + 17u], column_stats[stage * 48u + (column0 - tile_column0) + lane_column + 24u], column_stats[stage * 48u + (column0 - tile_column0) + lane_column + 25u]);
    x_3_0 += vec4<f32>(column_stats[stage * 48u + (column0 - tile_column0) + lane_column + 16u], column_stats[stage * 48u + (column0 - tile_column0) + lane_column + 17u], column_stats[stage * 48u + (column0 - tile_column0) + lane_column + 24u], column_stats[stage * 48u + (column0 - tile_column0) + lane_column + 25u]);
    {
      x_0_0 = select(vec4<f32>(hidden), x_0_0, visible4(seq, row_0, column0 + 0u + lane_column));
      x_1_0 = select(vec4<f32>(hidden), x_1_0, visible4(seq, row_1, column0 + 0u + lane_column));
      x_2_0 = select(vec4<f32>(hidden), x_2_0, visible4(seq, row_2, column0 + 0u + lane_column));
      x_3_0 = select(vec4<f32>(hidden), x_3_0, visible4(seq, row_3, column0 + 0u + lane_column));
    }
    let pair_max_0_0 = max(x_0_0.xy, x_0_0.zw);
    var tile_max_0 = max(pair_max_0_0.x, pair_max_0_0.y);
    let pair_max_1_0 = max(x_1_0.xy, x_1_0.zw);
    var tile_max_1 = max(pair_max_1_0.x, pair_max_1_0.y);
    let pair_max_2_0 = max(x_2_0.xy, x_2_0.zw);
    var tile_max_2 = max(pair_max_2_0.x, pair_max_2_0.y);
    let pair_max_3_0 = max(x_3_0.xy, x_3_0.zw);
    var tile_max_3 = max(pair_max_3_0.x, pair_max_3_0.y);

    // m = max(row_max, max of S by rows);  O and row_sum *= exp(row_max - m). Runs at most once; a loop, because with an `if` NVIDIA's
    // compiler moves the registers of fragments.
    loop {
      if (!subgroupAny((tile_max_0 > limit_0) || (tile_max_1 > limit_1) || (tile_max_2 > limit_2) || (tile_max_3 > limit_3))) { break; }
      let old_max_0 = row_max_0;
      {
        var tile_max = select(limit_0, tile_max_0, tile_max_0 > limit_0);
        tile_max = max(tile_max, subgroupShuffleXor(tile_max, 1u));
        tile_max = max(tile_max, subgroupShuffleXor(tile_max, 2u));
        if (tile_max > limit_0) {
          row_max_0 = tile_max - LIFT;
          limit_0 = tile_max + slack;
        }
      }

      // A row that keeps its maximum keeps its bits.
      let rescale_0 = select(exp2(old_max_0 - row_max_0), 1.0, old_max_0 == row_max_0);
      row_sum_0 *= rescale_0;
      let old_max_1 = row_max_1;
      {
        var tile_max = select(limit_1, tile_max_1, tile_max_1 > limit_1);
        tile_max = max(tile_max, subgroupShuffleXor(tile_max, 1u));
        tile_max = max(tile_max, subgroupShuffleXor(tile_max, 2u));
        if (tile_max > limit_1) {
          row_max_1 = tile_max - LIFT;
          limit_1 = tile_max + slack;
        }
      }

      // A row that keeps its maximum keeps its bits.
      let rescale_1 = select(exp2(old_max_1 - row_max_1), 1.0, old_max_1 == row_max_1);
      row_sum_1 *= rescale_1;
      let old_max_2 = row_max_2;
      {
        var tile_max = select(limit_2, tile_max_2, tile_max_2 > limit_2);
        tile_max = max(tile_max, subgroupShuffleXor(tile_max, 1u));
        tile_max = max(tile_max, subgroupShuffleXor(tile_max, 2u));
        if (tile_max > limit_2) {
          row_max_2 = tile_max - LIFT;
          limit_2 = tile_max + slack;
        }
      }

      // A row that keeps its maximum keeps its bits.
      let rescale_2 = select(exp2(old_max_2 - row_max_2), 1.0, old_max_2 == row_max_2);
      row_sum_2 *= rescale_2;
      let old_max_3 = row_max_3;
      {
        var tile_max = select(limit_3, tile_max_3, tile_max_3 > limit_3);
        tile_max = max(tile_max, subgroupShuffleXor(tile_max, 1u));
        tile_max = max(tile_max, subgroupShuffleXor(tile_max, 2u));
        if (tile_max > limit_3) {
          row_max_3 = tile_max - LIFT;
          limit_3 = tile_max + slack;
        }
      }

      // A row that keeps its maximum keeps its bits.
      let rescale_3 = select(exp2(old_max_3 - row_max_3), 1.0, old_max_3 == row_max_3);
      row_sum_3 *= rescale_3;
      o_0_0 = matrix_of_c(component_c(o_0_0, 0u) * rescale_0, component_c(o_0_0, 1u) * rescale_0, component_c(o_0_0, 2u) * rescale_0, component_c(o_0_0, 3u) * rescale_0, component_c(o_0_0, 4u) * rescale_1, component_c(o_0_0, 5u) * rescale_1, component_c(o_0_0, 6u) * rescale_1, component_c(o_0_0, 7u) * rescale_1);
      o_0_1 = matrix_of_c(component_c(o_0_1, 0u) * rescale_0, component_c(o_0_1, 1u) * rescale_0, component_c(o_0_1, 2u) * rescale_0, component_c(o_0_1, 3u) * rescale_0, component_c(o_0_1, 4u) * rescale_1, component_c(o_0_1, 5u) * rescale_1, component_c(o_0_1, 6u) * rescale_1, component_c(o_0_1, 7u) * rescale_1);
      o_0_2 = matrix_of_c(component_c(o_0_2, 0u) * rescale_0, component_c(o_0_2, 1u) * rescale_0, component_c(o_0_2, 2u) * rescale_0, component_c(o_0_2, 3u) * rescale_0, component_c(o_0_2, 4u) * rescale_1, component_c(o_0_2, 5u) * rescale_1, component_c(o_0_2, 6u) * rescale_1, component_c(o_0_2, 7u) * rescale_1);
      o_0_3 = matrix_of_c(component_c(o_0_3, 0u) * rescale_0, component_c(o_0_3, 1u) * rescale_0, component_c(o_0_3, 2u) * rescale_0, component_c(o_0_3, 3u) * rescale_0, component_c(o_0_3, 4u) * rescale_1, component_c(o_0_3, 5u) * rescale_1, component_c(o_0_3, 6u) * rescale_1, component_c(o_0_3, 7u) * rescale_1);
      o_1_0 = matrix_of_c(component_c(o_1_0, 0u) * rescale_2, component_c(o_1_0, 1u) * rescale_2, component_c(o_1_0, 2u) * rescale_2, component_c(o_1_0, 3u) * rescale_2, component_c(o_1_0, 4u) * rescale_3, component_c(o_1_0, 5u) * rescale_3, component_c(o_1_0, 6u) * rescale_3, component_c(o_1_0, 7u) * rescale_3);
      o_1_1 = matrix_of_c(component_c(o_1_1, 0u) * rescale_2, component_c(o_1_1, 1u) * rescale_2, component_c(o_1_1, 2u) * rescale_2, component_c(o_1_1, 3u) * rescale_2, component_c(o_1_1, 4u) * rescale_3, component_c(o_1_1, 5u) * rescale_3, component_c(o_1_1, 6u) * rescale_3, component_c(o_1_1, 7u) * rescale_3);
      o_1_2 = matrix_of_c(component_c(o_1_2, 0u) * rescale_2, component_c(o_1_2, 1u) * rescale_2, component_c(o_1_2, 2u) * rescale_2, component_c(o_1_2, 3u) * rescale_2, component_c(o_1_2, 4u) * rescale_3, component_c(o_1_2, 5u) * rescale_3, component_c(o_1_2, 6u) * rescale_3, component_c(o_1_2, 7u) * rescale_3);
      o_1_3 = matrix_of_c(component_c(o_1_3, 0u) * rescale_2, component_c(o_1_3, 1u) * rescale_2, component_c(o_1_3, 2u) * rescale_2, component_c(o_1_3, 3u) * rescale_2, component_c(o_1_3, 4u) * rescale_3, component_c(o_1_3, 5u) * rescale_3, component_c(o_1_3, 6u) * rescale_3, component_c(o_1_3, 7u) * rescale_3);
    }
    // P = exp(S - m);  row_sum += sum of P.
    var total_0 = vec4<f32>();
    let p_0_0 = exp2(x_0_0 - vec4<f32>(row_max_0));
    total_0 = fma(p_0_0, vec4<f32>(column_stats[stage * 48u + (column0 - tile_column0) + lane_column + 32u], column_stats[stage * 48u + (column0 - tile_column0) + lane_column + 33u], column_stats[stage * 48u + (column0 - tile_column0) + lane_column + 40u], column_stats[stage * 48u + (column0 - tile_column0) + lane_column + 41u]), total_0);
    row_sum_0 += (total_0.x + total_0.y) + (total_0.z + total_0.w);
    var total_1 = vec4<f32>();
    let p_1_0 = exp2(x_1_0 - vec4<f32>(row_max_1));
    total_1 = fma(p_1_0, vec4<f32>(column_stats[stage * 48u + (column0 - tile_column0) + lane_column + 32u], column_stats[stage * 48u + (column0 - tile_column0) + lane_column + 33u], column_stats[stage * 48u + (column0 - tile_column0) + lane_column + 40u], column_stats[stage * 48u + (column0 - tile_column0) + lane_column + 41u]), total_1);
    row_sum_1 += (total_1.x + total_1.y) + (total_1.z + total_1.w);
    var total_2 = vec4<f32>();
    let p_2_0 = exp2(x_2_0 - vec4<f32>(row_max_2));
    total_2 = fma(p_2_0, vec4<f32>(column_stats[stage * 48u + (column0 - tile_column0) + lane_column + 32u], column_stats[stage * 48u + (column0 - tile_column0) + lane_column + 33u], column_stats[stage * 48u + (column0 - tile_column0) + lane_column + 40u], column_stats[stage * 48u + (column0 - tile_column0) + lane_column + 41u]), total_2);
    row_sum_2 += (total_2.x + total_2.y) + (total_2.z + total_2.w);
    var total_3 = vec4<f32>();
    let p_3_0 = exp2(x_3_0 - vec4<f32>(row_max_3));
    total_3 = fma(p_3_0, vec4<f32>(column_stats[stage * 48u + (column0 - tile_column0) + lane_column + 32u], column_stats[stage * 48u + (column0 - tile_column0) + lane_column + 33u], column_stats[stage * 48u + (column0 - tile_column0) + lane_column + 40u], column_stats[stage * 48u + (column0 - tile_column0) + lane_column + 41u]), total_3);
    row_sum_3 += (total_3.x + total_3.y) + (total_3.z + total_3.w);
    let p_hi_0_0 = hi4(p_0_0);
    let p_lo_0_0 = p_0_0 - p_hi_0_0;
    let p_hi_1_0 = hi4(p_1_0);
    let p_lo_1_0 = p_1_0 - p_hi_1_0;
    let p_hi_2_0 = hi4(p_2_0);
    let p_lo_2_0 = p_2_0 - p_hi_2_0;
    let p_hi_3_0 = hi4(p_3_0);
    let p_lo_3_0 = p_3_0 - p_hi_3_0;
    let p_hi_left_0_0 = matrix_of_a(f16(p_hi_0_0.x), f16(p_hi_0_0.y), f16(p_hi_0_0.z), f16(p_hi_0_0.w), f16(p_hi_1_0.x), f16(p_hi_1_0.y), f16(p_hi_1_0.z), f16(p_hi_1_0.w));
    let p_hi_left_1_0 = matrix_of_a(f16(p_hi_2_0.x), f16(p_hi_2_0.y), f16(p_hi_2_0.z), f16(p_hi_2_0.w), f16(p_hi_3_0.x), f16(p_hi_3_0.y), f16(p_hi_3_0.z), f16(p_hi_3_0.w));
    let p_lo_left_0_0 = matrix_of_a(f16(p_lo_0_0.x), f16(p_lo_0_0.y), f16(p_lo_0_0.z), f16(p_lo_0_0.w), f16(p_lo_1_0.x), f16(p_lo_1_0.y), f16(p_lo_1_0.z), f16(p_lo_1_0.w));
    let p_lo_left_1_0 = matrix_of_a(f16(p_lo_2_0.x), f16(p_lo_2_0.y), f16(p_lo_2_0.z), f16(p_lo_2_0.w), f16(p_lo_3_0.x), f16(p_lo_3_0.y), f16(p_lo_3_0.z), f16(p_lo_3_0.w));

    // O += P V.
    {
      var sum_0 = coop_mat16x16<f32, C>();
      var sum_1 = coop_mat16x16<f32, C>();
      {
        let column = coopLoadT<coop_mat16x16<f16, B>>(&v_stage[stage * V_TILE + 0u * V_ROW + 0u], V_ROW);
        let column_lo = coopLoadT<coop_mat16x16<f16, B>>(&v_stage[stage * V_TILE + V_LO + 0u * V_ROW + 0u], V_ROW);
        sum_0 = coopMultiplyAdd(p_hi_left_0_0, column_lo, sum_0);
        sum_0 = coopMultiplyAdd(p_lo_left_0_0, column, sum_0);
        sum_0 = coopMultiplyAdd(p_hi_left_0_0, column, sum_0);
        sum_1 = coopMultiplyAdd(p_hi_left_1_0, column_lo, sum_1);
        sum_1 = coopMultiplyAdd(p_lo_left_1_0, column, sum_1);
        sum_1 = coopMultiplyAdd(p_hi_left_1_0, column, sum_1);
      }
      o_0_0 = o_0_0 + sum_0;
      o_1_0 = o_1_0 + sum_1;
    }
    {
      var sum_0 = coop_mat16x16<f32, C>();
      var sum_1 = coop_mat16x16<f32, C>();
      {
        let column = coopLoadT<coop_mat16x16<f16, B>>(&v_stage[stage * V_TILE + 0u * V_ROW + 4u], V_ROW);
        let column_lo = coopLoadT<coop_mat16x16<f16, B>>(&v_stage[stage * V_TILE + V_LO + 0u * V_ROW + 4u], V_ROW);
        sum_0 = coopMultiplyAdd(p_hi_left_0_0, column_lo, sum_0);
        sum_0 = coopMultiplyAdd(p_lo_left_0_0, column, sum_0);
        sum_0 = coopMultiplyAdd(p_hi_left_0_0, column, sum_0);
        sum_1 = coopMultiplyAdd(p_hi_left_1_0, column_lo, sum_1);
        sum_1 = coopMultiplyAdd(p_lo_left_1_0, column, sum_1);
        sum_1 = coopMultiplyAdd(p_hi_left_1_0, column, sum_1);
      }
      o_0_1 = o_0_1 + sum_0;
      o_1_1 = o_1_1 + sum_1;
    }
    {
      var sum_0 = coop_mat16x16<f32, C>();
      var sum_1 = coop_mat16x16<f32, C>();
      {
        let column = coopLoadT<coop_mat16x16<f16, B>>(&v_stage[stage * V_TILE + 0u * V_ROW + 8u], V_ROW);
        let column_lo = coopLoadT<coop_mat16x16<f16, B>>(&v_stage[stage * V_TILE + V_LO + 0u * V_ROW + 8u], V_ROW);
        sum_0 = coopMultiplyAdd(p_hi_left_0_0, column_lo, sum_0);
        sum_0 = coopMultiplyAdd(p_lo_left_0_0, column, sum_0);
        sum_0 = coopMultiplyAdd(p_hi_left_0_0, column, sum_0);
        sum_1 = coopMultiplyAdd(p_hi_left_1_0, column_lo, sum_1);
        sum_1 = coopMultiplyAdd(p_lo_left_1_0, column, sum_1);
        sum_1 = coopMultiplyAdd(p_hi_left_1_0, column, sum_1);
      }
      o_0_2 = o_0_2 + sum_0;
      o_1_2 = o_1_2 + sum_1;
    }
    {
      var sum_0 = coop_mat16x16<f32, C>();
      var sum_1 = coop_mat16x16<f32, C>();
      {
        let column = coopLoadT<coop_mat16x16<f16, B>>(&v_stage[stage * V_TILE + 0u * V_ROW + 12u], V_ROW);
        let column_lo = coopLoadT<coop_mat16x16<f16, B>>(&v_stage[stage * V_TILE + V_LO + 0u * V_ROW + 12u], V_ROW);
        sum_0 = coopMultiplyAdd(p_hi_left_0_0, column_lo, sum_0);
        sum_0 = coopMultiplyAdd(p_lo_left_0_0, column, sum_0);
        sum_0 = coopMultiplyAdd(p_hi_left_0_0, column, sum_0);
        sum_1 = coopMultiplyAdd(p_hi_left_1_0, column_lo, sum_1);
        sum_1 = coopMultiplyAdd(p_lo_left_1_0, column, sum_1);
        sum_1 = coopMultiplyAdd(p_hi_left_1_0, column, sum_1);
      }
      o_0_3 = o_0_3 + sum_0;
      o_1_3 = o_1_3 + sum_1;
    }

    // All subgroups have used K.
    workgroupBarrier();
    {
      let at = stage * K_TILE + (k_row + 0u) * K_ROW + k_part;
      let x = k_share_0 * k_scale_0;
      let hi = hi4(x);
      k_stage[at] = vec4<f16>(hi);
      k_stage[at + K_LO] = vec4<f16>(x - hi);
    }
    {
      let at = stage * K_TILE + (k_row + 8u) * K_ROW + k_part;
      let x = k_share_1 * k_scale_1;
      let hi = hi4(x);
      k_stage[at] = vec4<f16>(hi);
      k_stage[at + K_LO] = vec4<f16>(x - hi);
    }
    if (thread < 16u) {
      let item = thread + 0u;
      // A token without finite numbers has no scale to take out.
      let powers = select(token_scale_0, vec2<f32>(1.0), token_scale_0 > vec2<f32>(1e30));
      column_stats[stage * 48u + item + 0u] = 1.0 / powers.x;
      // The powers of values are added to the scores, and taken out of the sum of probabilities.
      column_stats[stage * 48u + item + 16u] = f32(127 - i32(bitcast<u32>(powers.y) >> 23u));
      column_stats[stage * 48u + item + 32u] = powers.y;
    }
    workgroupBarrier();
    tile = following;
  }
  row_sum_0 = row_sum_0 + subgroupShuffleXor(row_sum_0, 1u);
  row_sum_0 = row_sum_0 + subgroupShuffleXor(row_sum_0, 2u);

  // The powers of values may have taken the sum anywhere: a power of two brings it to 1 .. 2.
  let power_0 = select(0, i32(bitcast<u32>(row_sum_0) >> 23u) - 127, row_sum_0 > 0.0);
  let lift_0 = bitcast<f32>(u32(127 - clamp(power_0, -126, 126)) << 23u);
  row_max_0 += f32(power_0);
  row_sum_0 *= lift_0;
  let end_0 = finish_row(row_max_0 / LOG2_E, row_sum_0, work.head);
  let factor_0 = end_0.factor * lift_0;
  if (row_0 < row_limit && lane_column == 0u) { lse[lse_base + row_0] = select(params.negative_infinity, end_0.lse, row_0 < seq.seq_q); }
  row_sum_1 = row_sum_1 + subgroupShuffleXor(row_sum_1, 1u);
  row_sum_1 = row_sum_1 + subgroupShuffleXor(row_sum_1, 2u);

  // The powers of values may have taken the sum anywhere: a power of two brings it to 1 .. 2.
  let power_1 = select(0, i32(bitcast<u32>(row_sum_1) >> 23u) - 127, row_sum_1 > 0.0);
  let lift_1 = bitcast<f32>(u32(127 - clamp(power_1, -126, 126)) << 23u);
  row_max_1 += f32(power_1);
  row_sum_1 *= lift_1;
  let end_1 = finish_row(row_max_1 / LOG2_E, row_sum_1, work.head);
  let factor_1 = end_1.factor * lift_1;
  if (row_1 < row_limit && lane_column == 0u) { lse[lse_base + row_1] = select(params.negative_infinity, end_1.lse, row_1 < seq.seq_q); }
  row_sum_2 = row_sum_2 + subgroupShuffleXor(row_sum_2, 1u);
  row_sum_2 = row_sum_2 + subgroupShuffleXor(row_sum_2, 2u);

  // The powers of values may have taken the sum anywhere: a power of two brings it to 1 .. 2.
  let power_2 = select(0, i32(bitcast<u32>(row_sum_2) >> 23u) - 127, row_sum_2 > 0.0);
  let lift_2 = bitcast<f32>(u32(127 - clamp(power_2, -126, 126)) << 23u);
  row_max_2 += f32(power_2);
  row_sum_2 *= lift_2;
  let end_2 = finish_row(row_max_2 / LOG2_E, row_sum_2, work.head);
  let factor_2 = end_2.factor * lift_2;
  if (row_2 < row_limit && lane_column == 0u) { lse[lse_base + row_2] = select(params.negative_infinity, end_2.lse, row_2 < seq.seq_q); }
  row_sum_3 = row_sum_3 + subgroupShuffleXor(row_sum_3, 1u);
  row_sum_3 = row_sum_3 + subgroupShuffleXor(row_sum_3, 2u);

  // The powers of values may have taken the sum anywhere: a power of two brings it to 1 .. 2.
  let power_3 = select(0, i32(bitcast<u32>(row_sum_3) >> 23u) - 127, row_sum_3 > 0.0);
  let lift_3 = bitcast<f32>(u32(127 - clamp(power_3, -126, 126)) << 23u);
  row_max_3 += f32(power_3);
  row_sum_3 *= lift_3;
  let end_3 = finish_row(row_max_3 / LOG2_E, row_sum_3, work.head);
  let factor_3 = end_3.factor * lift_3;
  if (row_3 < row_limit && lane_column == 0u) { lse[lse_base + row_3] = select(params.negative_infinity, end_3.lse, row_3 < seq.seq_q); }
  {
    let base = o_base + strip_row_0 * params.o.seq;
    let result_0_0 = component_c(o_0_0, 0u) * factor_0;
    fallback_0 = fallback_0 || !is_finite1(result_0_0);
    let result_0_1 = component_c(o_0_0, 1u) * factor_0;
    fallback_0 = fallback_0 || !is_finite1(result_0_1);
    let result_0_2 = component_c(o_0_0, 2u) * factor_0;
    fallback_0 = fallback_0 || !is_finite1(result_0_2);
    let result_0_3 = component_c(o_0_0, 3u) * factor_0;
    fallback_0 = fallback_0 || !is_finite1(result_0_3);
    let result_0_4 = component_c(o_0_0, 4u) * factor_1;
    fallback_1 = fallback_1 || !is_finite1(result_0_4);
    let result_0_5 = component_c(o_0_0, 5u) * factor_1;
    fallback_1 = fallback_1 || !is_finite1(result_0_5);
    let result_0_6 = component_c(o_0_0, 6u) * factor_1;
    fallback_1 = fallback_1 || !is_finite1(result_0_6);
    let result_0_7 = component_c(o_0_0, 7u) * factor_1;
    fallback_1 = fallback_1 || !is_finite1(result_0_7);
    let result_0 = matrix_of_c(result_0_0, result_0_1, result_0_2, result_0_3, result_0_4, result_0_5, result_0_6, result_0_7);
    subgroupBarrier();
    coopStoreT(result_0, &score_rows[subgroup_scores], SCORE_ROW);
    subgroupBarrier();
    {
      let quad = part + 0u;
      {
        if (strip_row_0 < row_limit) {
          let result = score_rows[score_at - part + quad];
          store_o(base, 0u + quad, result);
        }
      }
    }
    {
      let quad = part + 2u;
      {
        if (strip_row_0 < row_limit) {
          let result = score_rows[score_at - part + quad];
          store_o(base, 0u + quad, result);
        }
      }
    }
    let result_1_0 = component_c(o_0_1, 0u) * factor_0;
    fallback_0 = fallback_0 || !is_finite1(result_1_0);
    let result_1_1 = component_c(o_0_1, 1u) * factor_0;
    fallback_0 = fallback_0 || !is_finite1(result_1_1);
    let result_1_2 = component_c(o_0_1, 2u) * factor_0;
    fallback_0 = fallback_0 || !is_finite1(result_1_2);
    let result_1_3 = component_c(o_0_1, 3u) * factor_0;
    fallback_0 = fallback_0 || !is_finite1(result_1_3);
    let result_1_4 = component_c(o_0_1, 4u) * factor_1;
    fallback_1 = fallback_1 || !is_finite1(result_1_4);
    let result_1_5 = component_c(o_0_1, 5u) * factor_1;
    fallback_1 = fallback_1 || !is_finite1(result_1_5);
    let result_1_6 = component_c(o_0_1, 6u) * factor_1;
    fallback_1 = fallback_1 || !is_finite1(result_1_6);
    let result_1_7 = component_c(o_0_1, 7u) * factor_1;
    fallback_1 = fallback_1 || !is_finite1(result_1_7);
    let result_1 = matrix_of_c(result_1_0, result_1_1, result_1_2, result_1_3, result_1_4, result_1_5, result_1_6, result_1_7);
    subgroupBarrier();
    coopStoreT(result_1, &score_rows[subgroup_scores], SCORE_ROW);
    subgroupBarrier();
    {
      let quad = part + 0u;
      {
        if (strip_row_0 < row_limit) {
          let result = score_rows[score_at - part + quad];
          store_o(base, 4u + quad, result);
        }
      }
    }
    {
      let quad = part + 2u;
      {
        if (strip_row_0 < row_limit) {
          let result = score_rows[score_at - part + quad];
          store_o(base, 4u + quad, result);
        }
      }
    }
    let result_2_0 = component_c(o_0_2, 0u) * factor_0;
    fallback_0 = fallback_0 || !is_finite1(result_2_0);
    let result_2_1 = component_c(o_0_2, 1u) * factor_0;
    fallback_0 = fallback_0 || !is_finite1(result_2_1);
    let result_2_2 = component_c(o_0_2, 2u) * factor_0;
    fallback_0 = fallback_0 || !is_finite1(result_2_2);
    let result_2_3 = component_c(o_0_2, 3u) * factor_0;
    fallback_0 = fallback_0 || !is_finite1(result_2_3);
    let result_2_4 = component_c(o_0_2, 4u) * factor_1;
    fallback_1 = fallback_1 || !is_finite1(result_2_4);
    let result_2_5 = component_c(o_0_2, 5u) * factor_1;
    fallback_1 = fallback_1 || !is_finite1(result_2_5);
    let result_2_6 = component_c(o_0_2, 6u) * factor_1;
    fallback_1 = fallback_1 || !is_finite1(result_2_6);
    let result_2_7 = component_c(o_0_2, 7u) * factor_1;
    fallback_1 = fallback_1 || !is_finite1(result_2_7);
    let result_2 = matrix_of_c(result_2_0, result_2_1, result_2_2, result_2_3, result_2_4, result_2_5, result_2_6, result_2_7);
    subgroupBarrier();
    coopStoreT(result_2, &score_rows[subgroup_scores], SCORE_ROW);
    subgroupBarrier();
    {
      let quad = part + 0u;
      {
        if (strip_row_0 < row_limit) {
          let result = score_rows[score_at - part + quad];
          store_o(base, 8u + quad, result);
        }
      }
    }
    {
      let quad = part + 2u;
      {
        if (strip_row_0 < row_limit) {
          let result = score_rows[score_at - part + quad];
          store_o(base, 8u + quad, result);
        }
      }
    }
    let result_3_0 = component_c(o_0_3, 0u) * factor_0;
    fallback_0 = fallback_0 || !is_finite1(result_3_0);
    let result_3_1 = component_c(o_0_3, 1u) * factor_0;
    fallback_0 = fallback_0 || !is_finite1(result_3_1);
    let result_3_2 = component_c(o_0_3, 2u) * factor_0;
    fallback_0 = fallback_0 || !is_finite1(result_3_2);
    let result_3_3 = component_c(o_0_3, 3u) * factor_0;
    fallback_0 = fallback_0 || !is_finite1(result_3_3);
    let result_3_4 = component_c(o_0_3, 4u) * factor_1;
    fallback_1 = fallback_1 || !is_finite1(result_3_4);
    let result_3_5 = component_c(o_0_3, 5u) * factor_1;
    fallback_1 = fallback_1 || !is_finite1(result_3_5);
    let result_3_6 = component_c(o_0_3, 6u) * factor_1;
    fallback_1 = fallback_1 || !is_finite1(result_3_6);
    let result_3_7 = component_c(o_0_3, 7u) * factor_1;
    fallback_1 = fallback_1 || !is_finite1(result_3_7);
    let result_3 = matrix_of_c(result_3_0, result_3_1, result_3_2, result_3_3, result_3_4, result_3_5, result_3_6, result_3_7);
    subgroupBarrier();
    coopStoreT(result_3, &score_rows[subgroup_scores], SCORE_ROW);
    subgroupBarrier();
    {
      let quad = part + 0u;
      {
        if (strip_row_0 < row_limit) {
          let result = score_rows[score_at - part + quad];
          store_o(base, 12u + quad, result);
        }
      }
    }
    {
      let quad = part + 2u;
      {
        if (strip_row_0 < row_limit) {
          let result = score_rows[score_at - part + quad];
          store_o(base, 12u + quad, result);
        }
      }
    }
  }
  {
    let base = o_base + strip_row_1 * params.o.seq;
    let result_0_0 = component_c(o_1_0, 0u) * factor_2;
    fallback_2 = fallback_2 || !is_finite1(result_0_0);
    let result_0_1 = component_c(o_1_0, 1u) * factor_2;
    fallback_2 = fallback_2 || !is_finite1(result_0_1);
    let result_0_2 = component_c(o_1_0, 2u) * factor_2;
    fallback_2 = fallback_2 || !is_finite1(result_0_2);
    let result_0_3 = component_c(o_1_0, 3u) * factor_2;
    fallback_2 = fallback_2 || !is_finite1(result_0_3);
    let result_0_4 = component_c(o_1_0, 4u) * factor_3;
    fallback_3 = fallback_3 || !is_finite1(result_0_4);
    let result_0_5 = component_c(o_1_0, 5u) * factor_3;
    fallback_3 = fallback_3 || !is_finite1(result_0_5);
    let result_0_6 = component_c(o_1_0, 6u) * factor_3;
    fallback_3 = fallback_3 || !is_finite1(result_0_6);
    let result_0_7 = component_c(o_1_0, 7u) * factor_3;
    fallback_3 = fallback_3 || !is_finite1(result_0_7);
    let result_0 = matrix_of_c(result_0_0, result_0_1, result_0_2, result_0_3, result_0_4, result_0_5, result_0_6, result_0_7);
    subgroupBarrier();
    coopStoreT(result_0, &score_rows[subgroup_scores], SCORE_ROW);
    subgroupBarrier();
    {
      let quad = part + 0u;
      {
        if (strip_row_1 < row_limit) {
          let result = score_rows[score_at - part + quad];
          store_o(base, 0u + quad, result);
        }
      }
    }
    {
      let quad = part + 2u;
      {
        if (strip_row_1 < row_limit) {
          let result = score_rows[score_at - part + quad];
          store_o(base, 0u + quad, result);
        }
      }
    }
    let result_1_0 = component_c(o_1_1, 0u) * factor_2;
    fallback_2 = fallback_2 || !is_finite1(result_1_0);
    let result_1_1 = component_c(o_1_1, 1u) * factor_2;
    fallback_2 = fallback_2 || !is_finite1(result_1_1);
    let result_1_2 = component_c(o_1_1, 2u) * factor_2;
    fallback_2 = fallback_2 || !is_finite1(result_1_2);
    let result_1_3 = component_c(o_1_1, 3u) * factor_2;
    fallback_2 = fallback_2 || !is_finite1(result_1_3);
    let result_1_4 = component_c(o_1_1, 4u) * factor_3;
    fallback_3 = fallback_3 || !is_finite1(result_1_4);
    let result_1_5 = component_c(o_1_1, 5u) * factor_3;
    fallback_3 = fallback_3 || !is_finite1(result_1_5);
    let result_1_6 = component_c(o_1_1, 6u) * factor_3;
    fallback_3 = fallback_3 || !is_finite1(result_1_6);
    let result_1_7 = component_c(o_1_1, 7u) * factor_3;
    fallback_3 = fallback_3 || !is_finite1(result_1_7);
    let result_1 = matrix_of_c(result_1_0, result_1_1, result_1_2, result_1_3, result_1_4, result_1_5, result_1_6, result_1_7);
    subgroupBarrier();
    coopStoreT(result_1, &score_rows[subgroup_scores], SCORE_ROW);
    subgroupBarrier();
    {
      let quad = part + 0u;
      {
        if (strip_row_1 < row_limit) {
          let result = score_rows[score_at - part + quad];
          store_o(base, 4u + quad, result);
        }
      }
    }
    {
      let quad = part + 2u;
      {
        if (strip_row_1 < row_limit) {
          let result = score_rows[score_at - part + quad];
          store_o(base, 4u + quad, result);
        }
      }
    }
    let result_2_0 = component_c(o_1_2, 0u) * factor_2;
    fallback_2 = fallback_2 || !is_finite1(result_2_0);
    let result_2_1 = component_c(o_1_2, 1u) * factor_2;
    fallback_2 = fallback_2 || !is_finite1(result_2_1);
    let result_2_2 = component_c(o_1_2, 2u) * factor_2;
    fallback_2 = fallback_2 || !is_finite1(result_2_2);
    let result_2_3 = component_c(o_1_2, 3u) * factor_2;
    fallback_2 = fallback_2 || !is_finite1(result_2_3);
    let result_2_4 = component_c(o_1_2, 4u) * factor_3;
    fallback_3 = fallback_3 || !is_finite1(result_2_4);
    let result_2_5 = component_c(o_1_2, 5u) * factor_3;
    fallback_3 = fallback_3 || !is_finite1(result_2_5);
    let result_2_6 = component_c(o_1_2, 6u) * factor_3;
    fallback_3 = fallback_3 || !is_finite1(result_2_6);
    let result_2_7 = component_c(o_1_2, 7u) * factor_3;
    fallback_3 = fallback_3 || !is_finite1(result_2_7);
    let result_2 = matrix_of_c(result_2_0, result_2_1, result_2_2, result_2_3, result_2_4, result_2_5, result_2_6, result_2_7);
    subgroupBarrier();
    coopStoreT(result_2, &score_rows[subgroup_scores], SCORE_ROW);
    subgroupBarrier();
    {
      let quad = part + 0u;
      {
        if (strip_row_1 < row_limit) {
          let result = score_rows[score_at - part + quad];
          store_o(base, 8u + quad, result);
        }
      }
    }
    {
      let quad = part + 2u;
      {
        if (strip_row_1 < row_limit) {
          let result = score_rows[score_at - part + quad];
          store_o(base, 8u + quad, result);
        }
      }
    }
    let result_3_0 = component_c(o_1_3, 0u) * factor_2;
    fallback_2 = fallback_2 || !is_finite1(result_3_0);
    let result_3_1 = component_c(o_1_3, 1u) * factor_2;
    fallback_2 = fallback_2 || !is_finite1(result_3_1);
    let result_3_2 = component_c(o_1_3, 2u) * factor_2;
    fallback_2 = fallback_2 || !is_finite1(result_3_2);
    let result_3_3 = component_c(o_1_3, 3u) * factor_2;
    fallback_2 = fallback_2 || !is_finite1(result_3_3);
    let result_3_4 = component_c(o_1_3, 4u) * factor_3;
    fallback_3 = fallback_3 || !is_finite1(result_3_4);
    let result_3_5 = component_c(o_1_3, 5u) * factor_3;
    fallback_3 = fallback_3 || !is_finite1(result_3_5);
    let result_3_6 = component_c(o_1_3, 6u) * factor_3;
    fallback_3 = fallback_3 || !is_finite1(result_3_6);
    let result_3_7 = component_c(o_1_3, 7u) * factor_3;
    fallback_3 = fallback_3 || !is_finite1(result_3_7);
    let result_3 = matrix_of_c(result_3_0, result_3_1, result_3_2, result_3_3, result_3_4, result_3_5, result_3_6, result_3_7);
    subgroupBarrier();
    coopStoreT(result_3, &score_rows[subgroup_scores], SCORE_ROW);
    subgroupBarrier();
    {
      let quad = part + 0u;
      {
        if (strip_row_1 < row_limit) {
          let result = score_rows[score_at - part + quad];
          store_o(base, 12u + quad, result);
        }
      }
    }
    {
      let quad = part + 2u;
      {
        if (strip_row_1 < row_limit) {
          let result = score_rows[score_at - part + quad];
          store_o(base, 12u + quad, result);
        }
      }
    }
  }
  let subgroup_fallback = subgroupAny((fallback_0 && row_0 < row_limit) || (fallback_1 && row_1 < row_limit) || (fallback_2 && row_2 < row_limit) || (fallback_3 && row_3 < row_limit));
  var any_fallback = false;
  workgroupBarrier();
  if (lane == 0u) { score_rows[subgroup] = vec4<f32>(select(0.0, 1.0, subgroup_fallback)); }
  workgroupBarrier();
  any_fallback = false;
  for (var n = 0u; n < 4u; n += 1u) { any_fallback = any_fallback || score_rows[n].x > 0.0; }
  let slot = fallback_slot(seq, work, work.tile);
  if (thread == 0u) { fallback[slot] = u32(any_fallback); }
  var has_any = any_fallback;
  loop {
    if (!has_any) { break; }
    has_any = false;
    workgroupBarrier();
    var reported_0 = select(0.0, 1.0, fallback_0);
    reported_0 = max(reported_0, subgroupShuffleXor(reported_0, 1u));
    reported_0 = max(reported_0, subgroupShuffleXor(reported_0, 2u));
    if (lane_column == 0u) { score_rows[row_0 - row0] = vec4<f32>(reported_0); }
    var reported_1 = select(0.0, 1.0, fallback_1);
    reported_1 = max(reported_1, subgroupShuffleXor(reported_1, 1u));
    reported_1 = max(reported_1, subgroupShuffleXor(reported_1, 2u));
    if (lane_column == 0u) { score_rows[row_1 - row0] = vec4<f32>(reported_1); }
    var reported_2 = select(0.0, 1.0, fallback_2);
    reported_2 = max(reported_2, subgroupShuffleXor(reported_2, 1u));
    reported_2 = max(reported_2, subgroupShuffleXor(reported_2, 2u));
    if (lane_column == 0u) { score_rows[row_2 - row0] = vec4<f32>(reported_2); }
    var reported_3 = select(0.0, 1.0, fallback_3);
    reported_3 = max(reported_3, subgroupShuffleXor(reported_3, 1u));
    reported_3 = max(reported_3, subgroupShuffleXor(reported_3, 2u));
    if (lane_column == 0u) { score_rows[row_3 - row0] = vec4<f32>(reported_3); }
    workgroupBarrier();
    if (thread < 4u) {
      var bits = 0u;
      for (var n = 0u; n < min(128u - thread * 32u, 32u); n += 1u) { bits |= u32(score_rows[thread * 32u + n].x) << n; }
      fallback[slot + 1u + thread] = bits;
    }
  }
}
