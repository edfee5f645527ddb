enable f16;
enable wgpu_cooperative_matrix;

struct Operand { offset: u32, batch: u32, head: u32, seq: u32 }

struct Params {
  q: Operand,
  k: Operand,
  v: Operand,
  d_o: Operand,
  d_k: Operand,
  d_v: Operand,
  // lse and delta of each row, in half precision also its unit. The ALiBi slope of a head follows its last row.
  row_stats: Operand,
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
  batch: u32,
  scale: f32,
  // `score_scale` is `scale_sign` (1 or -1) times `scale_size`.
  scale_sign: f32,
  scale_size: f32,
  // -infinity, for which WGSL has no literal.
  negative_infinity: f32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> q: array<vec2<u32>>;
@group(0) @binding(2) var<storage, read> k: array<vec2<u32>>;
@group(0) @binding(3) var<storage, read> v: array<vec2<u32>>;
@group(0) @binding(7) var<storage, read> d_o: array<vec2<u32>>;
@group(0) @binding(13) var<storage, read> row_stats: array<vec4<f32>>;
@group(0) @binding(10) var<storage, read_write> d_k: array<vec2<u32>>;
@group(0) @binding(11) var<storage, read_write> d_v: array<vec2<u32>>;
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
  at.head = params.slice_head + rest % params.slice_heads;
  rest /= params.slice_heads;
  at.batch = params.slice_batch + rest % params.slice_batches;
  rest /= params.slice_batches;
  at.tile = params.slice_tile + rest;
  return at;
}

const TILE_ROWS: u32 = 32u;
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

// Whether each of the four queries of a quad from i on sees key j. The queries that see a key are consecutive.
fn visible4(seq: Sequence, j: u32, i: u32) -> vec4<bool> {
  let seq_q = i32(seq.seq_q);
  let start = clamp(i32(j) - seq.upper, 0, seq_q);
  let end = select(clamp(i32(j) + 1 - seq.lower, start, seq_q), seq_q, j < seq.sink_tokens);
  let queries = vec4<u32>(i - u32(start)) + vec4<u32>(0u, 1u, 2u, 3u);
  return (queries < vec4<u32>(u32(end - start)));
}

// The tiles first..end of queries see keys of key0..key_end. They are one range: the queries that see a key are consecutive, and a sink
// token is seen up to the last query.
struct QueryTiles { first: u32, end: u32 }

fn query_tiles(seq: Sequence, key0: u32, key_end: u32) -> QueryTiles {
  let seq_q = i32(seq.seq_q);
  let start = clamp(i32(key0) - seq.upper, 0, seq_q);
  let end = select(clamp(i32(key_end) - seq.lower, 0, seq_q), seq_q, key0 < seq.sink_tokens);
  if (start >= end || key0 >= key_end) { return QueryTiles(0u, 0u); }
  return QueryTiles(u32(start) / TILE_COLUMNS, (u32(end) + TILE_COLUMNS - 1u) / TILE_COLUMNS);
}

// Tiles of queries within start..end are full: every query sees all of key0..key_end.
struct FullTiles { start: u32, end: u32 }

fn full_tiles(seq: Sequence, key0: u32, key_end: u32) -> FullTiles {
  let seq_q = i32(seq.seq_q);
  let start = clamp(i32(key_end) - 1 - seq.upper, 0, seq_q);
  let end = clamp(i32(max(key0, seq.sink_tokens)) + 1 - seq.lower, 0, seq_q);
  let limit = select(seq_q, 0, key_end > seq.seq_k);
  return FullTiles(u32(start), u32(min(select(end, seq_q, seq.sink_tokens >= key_end), limit)));
}

fn is_full(full: FullTiles, column0: u32) -> bool {
  return column0 >= full.start && column0 + TILE_COLUMNS <= full.end;
}

// The first word of the report of a tile of 32 rows. The word is zero where no row is reported. Otherwise a bit for each
// row follows.
fn fallback_slot(seq: Sequence, work: TileWork, tile: u32) -> u32 {
  return ((tile * params.batch + work.batch) * params.kv_heads + work.kv_head) * 2u;
}

// IEEE 754 half precision, two numbers a word, without the extension that has a type for it.

// Drivers may flush numbers below 2^-14 to zero.
fn widen2(word: u32) -> vec2<f32> {
  return unpack2x16float(word);
}

// Rounds like the driver, as the products of these kernels do. Rounding by bits would take longer than the attention of a narrow window.
fn narrow4(x: vec4<f32>) -> vec4<u32> {
  let words = vec2<u32>(pack2x16float(x.xy), pack2x16float(x.zw)).xxyy;
  return (words >> vec4<u32>(0u, 16u, 0u, 16u)) & vec4<u32>(0xffffu);
}

// Four neighbours of a row, zero beyond the width. With vec4 loads the width is a multiple of four.
fn store_d_k(base: u32, quad: u32, x: vec4<f32>) {
  let stored = narrow4(x);
  d_k[base + quad] = stored.xz | (stored.yw << vec2<u32>(16u));
}

fn store_d_v(base: u32, quad: u32, x: vec4<f32>) {
  let stored = narrow4(x);
  d_v[base + quad] = stored.xz | (stored.yw << vec2<u32>(16u));
}

alias Raw = vec2<u32>;

fn halves4(raw: Raw) -> vec4<f16> {
  return vec4<f16>(vec4<f32>(unpack2x16float(raw.x), unpack2x16float(raw.y)));
}

fn half4(raw: Raw, factor: f32) -> vec4<f16> {
  return halves4(raw) * f16(factor);
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

// Zero beyond the width.
fn raw_d_o(base: u32, row: u32, quad: u32) -> Raw {
  // The row is added last, because only it changes from tile to tile.
  return d_o[base + quad + row];
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

// The lse for a row's probabilities. An lse of -infinity becomes infinity, so that every probability is 0, even that of a visible key
// whose score overflowed.
fn probability_lse(lse: f32) -> f32 {
  return select(lse, -params.negative_infinity, lse == params.negative_infinity);
}

// An lse from here down to the lowest finite number has absorbed the logarithm of a count, and products below 32. Only a bias makes an
// lse so low.
const ABSORBING: f32 = -1e9;
const LANES_A_ROW: u32 = 2u;

// Padding lets neighbouring rows start in different banks. Fragments are loaded from multiples of 16 bytes.
const SCORE_ROW: u32 = 6u;
const P_ROW: u32 = 6u;
const Q_ROW: u32 = 18u;
const Q_TILE: u32 = 288u;
var<workgroup> q_stage: array<vec4<f16>, 288>;
const D_O_ROW: u32 = 18u;
const D_O_TILE: u32 = 288u;
var<workgroup> d_o_stage: array<vec4<f16>, 288>;
var<workgroup> score_rows: array<vec4<f32>, 192>;
var<workgroup> p_tile: array<vec4<f16>, 192>;

// Numbers of each column: the shifts by lse and delta of a query, and in bf16 the inverse token scales.
var<workgroup> column_stats: array<vec4<f32>, 8>;

// In the second run the unit follows dS beyond this size, which is within f16.
const UNIT_LIMIT: f32 = 32768.0;

// Bits are compared: compilers may assume that a float comparison meets no NaN.
fn is_finite4(x: vec4<f32>) -> bool {
  return all((bitcast<vec4<u32>>(x) & vec4<u32>(0x7f800000u)) < vec4<u32>(0x7f800000u));
}

@compute @workgroup_size(64)
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
  let row_limit = seq.k_rows;
  let column_limit = seq.seq_q;
  let row_end = min(row0 + TILE_ROWS, row_limit);
  // Rows beyond the end of a padded sequence see nothing.
  let used_end = min(row_end, seq.seq_k);
  let k_base = operand_base(params.k, work.batch, work.kv_head) + seq.k_start * params.k.seq;
  let v_base = operand_base(params.v, work.batch, work.kv_head) + seq.k_start * params.v.seq;
  let d_k_base = operand_base(params.d_k, work.batch, work.kv_head) + seq.k_start * params.d_k.seq;
  let d_v_base = operand_base(params.d_v, work.batch, work.kv_head) + seq.k_start * params.d_v.seq;
  let tiles = query_tiles(seq, row0, used_end);
  let full = full_tiles(seq, row0, row_end);
  // An empty sequence has a first row that is loaded and never used.
  let last_column = max(column_limit, 1u) - 1u;
  let subgroup_scores = subgroup * 96u;
  // The lane's row within a fragment in workgroup memory, and its place among the lanes of that row.
  let lane_row = lane / LANES_A_ROW;
  let part = lane % LANES_A_ROW;
  let score_at = subgroup_scores + lane_row * SCORE_ROW + part;
  let subgroup_p = subgroup * 96u;
  let p_at = subgroup_p + lane_row * P_ROW + part;
  // The row and the column of the lane's first element in registers.
  let element_row = lane_row;
  let lane_column = 4u * part;
  var fallback_0 = false;
  let row_0 = row0 + subgroup * 16u + 0u + element_row;
  var k_raw_0_0_0 = Raw();
  {
    let quad = part + 0u;
    {
      if (row_0 < row_limit) {
        k_raw_0_0_0 = raw_k(k_base, row_0 * params.k.seq, 0u + quad);
      }
    }
  }
  var k_raw_0_0_1 = Raw();
  {
    let quad = part + 2u;
    {
      if (row_0 < row_limit) {
        k_raw_0_0_1 = raw_k(k_base, row_0 * params.k.seq, 0u + quad);
      }
    }
  }
  var k_raw_0_1_0 = Raw();
  {
    let quad = part + 0u;
    {
      if (row_0 < row_limit) {
        k_raw_0_1_0 = raw_k(k_base, row_0 * params.k.seq, 4u + quad);
      }
    }
  }
  var k_raw_0_1_1 = Raw();
  {
    let quad = part + 2u;
    {
      if (row_0 < row_limit) {
        k_raw_0_1_1 = raw_k(k_base, row_0 * params.k.seq, 4u + quad);
      }
    }
  }
  var k_raw_0_2_0 = Raw();
  {
    let quad = part + 0u;
    {
      if (row_0 < row_limit) {
        k_raw_0_2_0 = raw_k(k_base, row_0 * params.k.seq, 8u + quad);
      }
    }
  }
  var k_raw_0_2_1 = Raw();
  {
    let quad = part + 2u;
    {
      if (row_0 < row_limit) {
        k_raw_0_2_1 = raw_k(k_base, row_0 * params.k.seq, 8u + quad);
      }
    }
  }
  var k_raw_0_3_0 = Raw();
  {
    let quad = part + 0u;
    {
      if (row_0 < row_limit) {
        k_raw_0_3_0 = raw_k(k_base, row_0 * params.k.seq, 12u + quad);
      }
    }
  }
  var k_raw_0_3_1 = Raw();
  {
    let quad = part + 2u;
    {
      if (row_0 < row_limit) {
        k_raw_0_3_1 = raw_k(k_base, row_0 * params.k.seq, 12u + quad);
      }
    }
  }
  {
    let quad = part + 0u;
    {
      let raw = k_raw_0_0_0;
      p_tile[p_at - part + 0u + quad] = half4(raw, params.scale_sign);
    }
  }
  {
    let quad = part + 2u;
    {
      let raw = k_raw_0_0_1;
      p_tile[p_at - part + 0u + quad] = half4(raw, params.scale_sign);
    }
  }
  subgroupBarrier();
  let k_0_0 = coopLoadT<coop_mat16x16<f16, A>>(&p_tile[subgroup_p + 0u], P_ROW);
  subgroupBarrier();
  {
    let quad = part + 0u;
    {
      let raw = k_raw_0_1_0;
      p_tile[p_at - part + 0u + quad] = half4(raw, params.scale_sign);
    }
  }
  {
    let quad = part + 2u;
    {
      let raw = k_raw_0_1_1;
      p_tile[p_at - part + 0u + quad] = half4(raw, params.scale_sign);
    }
  }
  subgroupBarrier();
  let k_0_1 = coopLoadT<coop_mat16x16<f16, A>>(&p_tile[subgroup_p + 0u], P_ROW);
  subgroupBarrier();
  {
    let quad = part + 0u;
    {
      let raw = k_raw_0_2_0;
      p_tile[p_at - part + 0u + quad] = half4(raw, params.scale_sign);
    }
  }
  {
    let quad = part + 2u;
    {
      let raw = k_raw_0_2_1;
      p_tile[p_at - part + 0u + quad] = half4(raw, params.scale_sign);
    }
  }
  subgroupBarrier();
  let k_0_2 = coopLoadT<coop_mat16x16<f16, A>>(&p_tile[subgroup_p + 0u], P_ROW);
  subgroupBarrier();
  {
    let quad = part + 0u;
    {
      let raw = k_raw_0_3_0;
      p_tile[p_at - part + 0u + quad] = half4(raw, params.scale_sign);
    }
  }
  {
    let quad = part + 2u;
    {
      let raw = k_raw_0_3_1;
      p_tile[p_at - part + 0u + quad] = half4(raw, params.scale_sign);
    }
  }
  subgroupBarrier();
  let k_0_3 = coopLoadT<coop_mat16x16<f16, A>>(&p_tile[subgroup_p + 0u], P_ROW);
  subgroupBarrier();
  var v_raw_0_0_0 = Raw();
  {
    let quad = part + 0u;
    {
      if (row_0 < row_limit) {
        v_raw_0_0_0 = raw_v(v_base, row_0 * params.v.seq, 0u + quad);
      }
    }
  }
  var v_raw_0_0_1 = Raw();
  {
    let quad = part + 2u;
    {
      if (row_0 < row_limit) {
        v_raw_0_0_1 = raw_v(v_base, row_0 * params.v.seq, 0u + quad);
      }
    }
  }
  var v_raw_0_1_0 = Raw();
  {
    let quad = part + 0u;
    {
      if (row_0 < row_limit) {
        v_raw_0_1_0 = raw_v(v_base, row_0 * params.v.seq, 4u + quad);
      }
    }
  }
  var v_raw_0_1_1 = Raw();
  {
    let quad = part + 2u;
    {
      if (row_0 < row_limit) {
        v_raw_0_1_1 = raw_v(v_base, row_0 * params.v.seq, 4u + quad);
      }
    }
  }
  var v_raw_0_2_0 = Raw();
  {
    let quad = part + 0u;
    {
      if (row_0 < row_limit) {
        v_raw_0_2_0 = raw_v(v_base, row_0 * params.v.seq, 8u + quad);
      }
    }
  }
  var v_raw_0_2_1 = Raw();
  {
    let quad = part + 2u;
    {
      if (row_0 < row_limit) {
        v_raw_0_2_1 = raw_v(v_base, row_0 * params.v.seq, 8u + quad);
      }
    }
  }
  var v_raw_0_3_0 = Raw();
  {
    let quad = part + 0u;
    {
      if (row_0 < row_limit) {
        v_raw_0_3_0 = raw_v(v_base, row_0 * params.v.seq, 12u + quad);
      }
    }
  }
  var v_raw_0_3_1 = Raw();
  {
    let quad = part + 2u;
    {
      if (row_0 < row_limit) {
        v_raw_0_3_1 = raw_v(v_base, row_0 * params.v.seq, 12u + quad);
      }
    }
  }
  {
    let quad = part + 0u;
    {
      let raw = v_raw_0_0_0;
      p_tile[p_at - part + 0u + quad] = halves4(raw);
    }
  }
  {
    let quad = part + 2u;
    {
      let raw = v_raw_0_0_1;
      p_tile[p_at - part + 0u + quad] = halves4(raw);
    }
  }
  subgroupBarrier();
  let v_0_0 = coopLoadT<coop_mat16x16<f16, A>>(&p_tile[subgroup_p + 0u], P_ROW);
  subgroupBarrier();
  {
    let quad = part + 0u;
    {
      let raw = v_raw_0_1_0;
      p_tile[p_at - part + 0u + quad] = halves4(raw);
    }
  }
  {
    let quad = part + 2u;
    {
      let raw = v_raw_0_1_1;
      p_tile[p_at - part + 0u + quad] = halves4(raw);
    }
  }
  subgroupBarrier();
  let v_0_1 = coopLoadT<coop_mat16x16<f16, A>>(&p_tile[subgroup_p + 0u], P_ROW);
  subgroupBarrier();
  {
    let quad = part + 0u;
    {
      let raw = v_raw_0_2_0;
      p_tile[p_at - part + 0u + quad] = halves4(raw);
    }
  }
  {
    let quad = part + 2u;
    {
      let raw = v_raw_0_2_1;
      p_tile[p_at - part + 0u + quad] = halves4(raw);
    }
  }
  subgroupBarrier();
  let v_0_2 = coopLoadT<coop_mat16x16<f16, A>>(&p_tile[subgroup_p + 0u], P_ROW);
  subgroupBarrier();
  {
    let quad = part + 0u;
    {
      let raw = v_raw_0_3_0;
      p_tile[p_at - part + 0u + quad] = halves4(raw);
    }
  }
  {
    let quad = part + 2u;
    {
      let raw = v_raw_0_3_1;
      p_tile[p_at - part + 0u + quad] = halves4(raw);
    }
  }
  subgroupBarrier();
  let v_0_3 = coopLoadT<coop_mat16x16<f16, A>>(&p_tile[subgroup_p + 0u], P_ROW);
  subgroupBarrier();
  var d_k_unit_0 = 1.0;
  var d_k_waits_0 = row_0 < min(row_limit, seq.seq_k);
  var waits = true;

  // The scale is never zero, so hidden scores stay hidden.
  let scale = max(params.scale_size * LOG2_E, 1e-25);
  var stage = 0u;
  let q_row = thread / 16u;
  let q_part = thread % 16u;
  var q_share_0 = Raw();
  var q_share_1 = Raw();
  var q_share_2 = Raw();
  var q_share_3 = Raw();
  let d_o_row = thread / 16u;
  let d_o_part = thread % 16u;
  var d_o_share_0 = Raw();
  var d_o_share_1 = Raw();
  var d_o_share_2 = Raw();
  var d_o_share_3 = Raw();
  var lse_delta_0 = vec2<f32>();

  // Loop: heads
  for (var head = work.head; waits && head < work.head + params.heads / params.kv_heads; head += 1u) {
    let q_base = operand_base(params.q, work.batch, head) + seq.q_start * params.q.seq;
    let d_o_base = operand_base(params.d_o, work.batch, head) + seq.q_start * params.d_o.seq;
    let stats_base = operand_base(params.row_stats, work.batch, head) + seq.q_start;
    let first_tile = tiles.first;
    let walk_tile = clamp(full.start / TILE_COLUMNS, tiles.first, max(tiles.end, 1u) - 1u);
    var next_of_walk = tiles.first;
    var is_first = true;
    {
      {
        let part = q_part;
        let source = min((walk_tile) * TILE_COLUMNS + q_row + 0u, last_column);
        { q_share_0 = raw_q(q_base, source * params.q.seq, part); }
      }
      {
        let part = q_part;
        let source = min((walk_tile) * TILE_COLUMNS + q_row + 4u, last_column);
        { q_share_1 = raw_q(q_base, source * params.q.seq, part); }
      }
      {
        let part = q_part;
        let source = min((walk_tile) * TILE_COLUMNS + q_row + 8u, last_column);
        { q_share_2 = raw_q(q_base, source * params.q.seq, part); }
      }
      {
        let part = q_part;
        let source = min((walk_tile) * TILE_COLUMNS + q_row + 12u, last_column);
        { q_share_3 = raw_q(q_base, source * params.q.seq, part); }
      }
      {
        let part = d_o_part;
        let source = min((walk_tile) * TILE_COLUMNS + d_o_row + 0u, last_column);
        { d_o_share_0 = raw_d_o(d_o_base, source * params.d_o.seq, part); }
      }
      {
        let part = d_o_part;
        let source = min((walk_tile) * TILE_COLUMNS + d_o_row + 4u, last_column);
        { d_o_share_1 = raw_d_o(d_o_base, source * params.d_o.seq, part); }
      }
      {
        let part = d_o_part;
        let source = min((walk_tile) * TILE_COLUMNS + d_o_row + 8u, last_column);
        { d_o_share_2 = raw_d_o(d_o_base, source * params.d_o.seq, part); }
      }
      {
        let part = d_o_part;
        let source = min((walk_tile) * TILE_COLUMNS + d_o_row + 12u, last_column);
        { d_o_share_3 = raw_d_o(d_o_base, source * params.d_o.seq, part); }
      }
      if (thread < 16u) {
        let source = min((walk_tile) * TILE_COLUMNS + thread + 0u, last_column);
        lse_delta_0 = row_stats[stats_base + source].xy;
      }
    }

    // Loop: tiles
    for (var tile = walk_tile; tile < tiles.end; tile = next_of_walk) {
      let column0 = tile * TILE_COLUMNS;
      let is_partial = !is_full(full, column0);
      {
        q_stage[stage * Q_TILE + (q_row + 0u) * Q_ROW + q_part] = halves4(q_share_0);
      }
      {
        q_stage[stage * Q_TILE + (q_row + 4u) * Q_ROW + q_part] = halves4(q_share_1);
      }
      {
        q_stage[stage * Q_TILE + (q_row + 8u) * Q_ROW + q_part] = halves4(q_share_2);
      }
      {
        q_stage[stage * Q_TILE + (q_row + 12u) * Q_ROW + q_part] = halves4(q_share_3);
      }
      {
        d_o_stage[stage * D_O_TILE + (d_o_row + 0u) * D_O_ROW + d_o_part] = halves4(d_o_share_0);
      }
      {
        d_o_stage[stage * D_O_TILE + (d_o_row + 4u) * D_O_ROW + d_o_part] = halves4(d_o_share_1);
      }
      {
        d_o_stage[stage * D_O_TILE + (d_o_row + 8u) * D_O_ROW + d_o_part] = halves4(d_o_share_2);
      }
      {
        d_o_stage[stage * D_O_TILE + (d_o_row + 12u) * D_O_ROW + d_o_part] = halves4(d_o_share_3);
      }
      if (thread < 16u) {
        let item = thread + 0u;
        column_stats[stage * 8u + item / 4u + 0u][item % 4u] = 15.0 - lse_delta_0.x * LOG2_E;
        column_stats[stage * 8u + item / 4u + 4u][item % 4u] = -lse_delta_0.y;
      }
      workgroupBarrier();
      var s_0_0 = coop_mat16x16<f32, C>();
      {
        let column = coopLoad<coop_mat16x16<f16, B>>(&q_stage[stage * Q_TILE + 0u * Q_ROW + 0u], Q_ROW);
        s_0_0 = coopMultiplyAdd(k_0_0, column, s_0_0);
      }
      {
        let column = coopLoad<coop_mat16x16<f16, B>>(&q_stage[stage * Q_TILE + 0u * Q_ROW + 4u], Q_ROW);
        s_0_0 = coopMultiplyAdd(k_0_1, column, s_0_0);
      }
      {
        let column = coopLoad<coop_mat16x16<f16, B>>(&q_stage[stage * Q_TILE + 0u * Q_ROW + 8u], Q_ROW);
        s_0_0 = coopMultiplyAdd(k_0_2, column, s_0_0);
      }
      {
        let column = coopLoad<coop_mat16x16<f16, B>>(&q_stage[stage * Q_TILE + 0u * Q_ROW + 12u], Q_ROW);
        s_0_0 = coopMultiplyAdd(k_0_3, column, s_0_0);
      }
      coopStoreT(s_0_0, &score_rows[subgroup_scores + 0u], SCORE_ROW);
      subgroupBarrier();
      var x_0_0 = score_rows[score_at + 0u];
      var x_0_1 = score_rows[score_at + 2u];
      subgroupBarrier();
      var p_0_0 = exp2(fma(x_0_0, vec4<f32>(scale), column_stats[stage * 8u + part + 0u]));
      var p_0_1 = exp2(fma(x_0_1, vec4<f32>(scale), column_stats[stage * 8u + part + 2u]));
      var hides_p = is_partial;
      loop {
        if (!hides_p) { break; }
        hides_p = false;
        p_0_0 = select(vec4<f32>(0.0), p_0_0, visible4(seq, row_0, column0 + 0u + lane_column));
        p_0_1 = select(vec4<f32>(0.0), p_0_1, visible4(seq, row_0, column0 + 8u + lane_column));
      }
      var d_p_0_0 = coop_mat16x16<f32, C>();
      {
        let column = coopLoad<coop_mat16x16<f16, B>>(&d_o_stage[stage * D_O_TILE + 0u * D_O_ROW + 0u], D_O_ROW);
        d_p_0_0 = coopMultiplyAdd(v_0_0, column, d_p_0_0);
      }
      {
        let column = coopLoad<coop_mat16x16<f16, B>>(&d_o_stage[stage * D_O_TILE + 0u * D_O_ROW + 4u], D_O_ROW);
        d_p_0_0 = coopMultiplyAdd(v_0_1, column, d_p_0_0);
      }
      {
        let column = coopLoad<coop_mat16x16<f16, B>>(&d_o_stage[stage * D_O_TILE + 0u * D_O_ROW + 8u], D_O_ROW);
        d_p_0_0 = coopMultiplyAdd(v_0_2, column, d_p_0_0);
      }
      {
        let column = coopLoad<coop_mat16x16<f16, B>>(&d_o_stage[stage * D_O_TILE + 0u * D_O_ROW + 12u], D_O_ROW);
        d_p_0_0 = coopMultiplyAdd(v_0_3, column, d_p_0_0);
      }
      coopStoreT(d_p_0_0, &score_rows[subgroup_scores + 0u], SCORE_ROW);
      subgroupBarrier();
      var y_0_0 = score_rows[score_at + 0u];
      var y_0_1 = score_rows[score_at + 2u];
      subgroupBarrier();
      var d_s_0_0 = p_0_0 * d_k_unit_0 * (y_0_0 + column_stats[stage * 8u + part + 4u]);
      var d_s_0_1 = p_0_1 * d_k_unit_0 * (y_0_1 + column_stats[stage * 8u + part + 6u]);
      {
        var factor_0 = 1.0;
        {
          var largest4 = abs(d_s_0_0);
          largest4 = max(largest4, abs(d_s_0_1));
          var largest = max(max(largest4.x, largest4.y), max(largest4.z, largest4.w));
          largest = max(largest, subgroupShuffleXor(largest, 1u));
          let exponent = i32(bitcast<u32>(largest) >> 23u) - 127;
          // No unit brings infinity or NaN within range. The row is reported.
          if (exponent < 128 && d_k_waits_0 && largest > 0.0) {
            factor_0 = bitcast<f32>(u32(127 + clamp(-6 - exponent, -100, 100)) << 23u);
            d_k_waits_0 = false;
          }
        }
        d_k_unit_0 *= factor_0;
      }
      let subgroup_waits = subgroupAny(d_k_waits_0);
      workgroupBarrier();
      if (lane == 0u) { score_rows[subgroup] = vec4<f32>(select(0.0, 1.0, subgroup_waits)); }
      workgroupBarrier();
      waits = false;
      for (var n = 0u; n < 2u; n += 1u) { waits = waits || score_rows[n].x > 0.0; }
      if (!waits) { break; }
      next_of_walk = select(tile + 1u, tiles.first, is_first);
      is_first = false;
      let next = (next_of_walk) * TILE_COLUMNS;
      {
        let part = q_part;
        let source = min(next + q_row + 0u, last_column);
        { q_share_0 = raw_q(q_base, source * params.q.seq, part); }
      }
      {
        let part = q_part;
        let source = min(next + q_row + 4u, last_column);
        { q_share_1 = raw_q(q_base, source * params.q.seq, part); }
      }
      {
        let part = q_part;
        let source = min(next + q_row + 8u, last_column);
        { q_share_2 = raw_q(q_base, source * params.q.seq, part); }
      }
      {
        let part = q_part;
        let source = min(next + q_row + 12u, last_column);
        { q_share_3 = raw_q(q_base, source * params.q.seq, part); }
      }
      {
        let part = d_o_part;
        let source = min(next + d_o_row + 0u, last_column);
        { d_o_share_0 = raw_d_o(d_o_base, source * params.d_o.seq, part); }
      }
      {
        let part = d_o_part;
        let source = min(next + d_o_row + 4u, last_column);
        { d_o_share_1 = raw_d_o(d_o_base, source * params.d_o.seq, part); }
      }
      {
        let part = d_o_part;
        let source = min(next + d_o_row + 8u, last_column);
        { d_o_share_2 = raw_d_o(d_o_base, source * params.d_o.seq, part); }
      }
      {
        let part = d_o_part;
        let source = min(next + d_o_row + 12u, last_column);
        { d_o_share_3 = raw_d_o(d_o_base, source * params.d_o.seq, part); }
      }
      if (thread < 16u) {
        let source = min(next + thread + 0u, last_column);
        lse_delta_0 = row_stats[stats_base + source].xy;
      }
    }
  }
  var d_k_0_0 = coop_mat16x16<f32, C>();
  var d_k_0_1 = coop_mat16x16<f32, C>();
  var d_k_0_2 = coop_mat16x16<f32, C>();
  var d_k_0_3 = coop_mat16x16<f32, C>();
  var d_v_0_0 = coop_mat16x16<f32, C>();
  var d_v_0_1 = coop_mat16x16<f32, C>();
  var d_v_0_2 = coop_mat16x16<f32, C>();
  var d_v_0_3 = coop_mat16x16<f32, C>();

  // Loop: heads
  for (var head = work.head; head < work.head + params.heads / params.kv_heads; head += 1u) {
    let q_base = operand_base(params.q, work.batch, head) + seq.q_start * params.q.seq;
    let d_o_base = operand_base(params.d_o, work.batch, head) + seq.q_start * params.d_o.seq;
    let stats_base = operand_base(params.row_stats, work.batch, head) + seq.q_start;
    let first_tile = tiles.first;
    {
      {
        let part = q_part;
        let source = min((tiles.first) * TILE_COLUMNS + q_row + 0u, last_column);
        { q_share_0 = raw_q(q_base, source * params.q.seq, part); }
      }
      {
        let part = q_part;
        let source = min((tiles.first) * TILE_COLUMNS + q_row + 4u, last_column);
        { q_share_1 = raw_q(q_base, source * params.q.seq, part); }
      }
      {
        let part = q_part;
        let source = min((tiles.first) * TILE_COLUMNS + q_row + 8u, last_column);
        { q_share_2 = raw_q(q_base, source * params.q.seq, part); }
      }
      {
        let part = q_part;
        let source = min((tiles.first) * TILE_COLUMNS + q_row + 12u, last_column);
        { q_share_3 = raw_q(q_base, source * params.q.seq, part); }
      }
      {
        let part = d_o_part;
        let source = min((tiles.first) * TILE_COLUMNS + d_o_row + 0u, last_column);
        { d_o_share_0 = raw_d_o(d_o_base, source * params.d_o.seq, part); }
      }
      {
        let part = d_o_part;
        let source = min((tiles.first) * TILE_COLUMNS + d_o_row + 4u, last_column);
        { d_o_share_1 = raw_d_o(d_o_base, source * params.d_o.seq, part); }
      }
      {
        let part = d_o_part;
        let source = min((tiles.first) * TILE_COLUMNS + d_o_row + 8u, last_column);
        { d_o_share_2 = raw_d_o(d_o_base, source * params.d_o.seq, part); }
      }
      {
        let part = d_o_part;
        let source = min((tiles.first) * TILE_COLUMNS + d_o_row + 12u, last_column);
        { d_o_share_3 = raw_d_o(d_o_base, source * params.d_o.seq, part); }
      }
      if (thread < 16u) {
        let source = min((tiles.first) * TILE_COLUMNS + thread + 0u, last_column);
        lse_delta_0 = row_stats[stats_base + source].xy;
      }
    }
    {
      q_stage[stage * Q_TILE + (q_row + 0u) * Q_ROW + q_part] = halves4(q_share_0);
    }
    {
      q_stage[stage * Q_TILE + (q_row + 4u) * Q_ROW + q_part] = halves4(q_share_1);
    }
    {
      q_stage[stage * Q_TILE + (q_row + 8u) * Q_ROW + q_part] = halves4(q_share_2);
    }
    {
      q_stage[stage * Q_TILE + (q_row + 12u) * Q_ROW + q_part] = halves4(q_share_3);
    }
    {
      d_o_stage[stage * D_O_TILE + (d_o_row + 0u) * D_O_ROW + d_o_part] = halves4(d_o_share_0);
    }
    {
      d_o_stage[stage * D_O_TILE + (d_o_row + 4u) * D_O_ROW + d_o_part] = halves4(d_o_share_1);
    }
    {
      d_o_stage[stage * D_O_TILE + (d_o_row + 8u) * D_O_ROW + d_o_part] = halves4(d_o_share_2);
    }
    {
      d_o_stage[stage * D_O_TILE + (d_o_row + 12u) * D_O_ROW + d_o_part] = halves4(d_o_share_3);
    }
    if (thread < 16u) {
      let item = thread + 0u;
      column_stats[stage * 8u + item / 4u + 0u][item % 4u] = 15.0 - lse_delta_0.x * LOG2_E;
      column_stats[stage * 8u + item / 4u + 4u][item % 4u] = -lse_delta_0.y;
    }
    workgroupBarrier();

    // Loop: tiles
    for (var tile = first_tile; tile < tiles.end; tile = tile + 1u) {
      let column0 = tile * TILE_COLUMNS;
      let is_partial = !is_full(full, column0);

      // S = K Q^T.
      let next = (tile + 1u) * TILE_COLUMNS;
      {
        let part = q_part;
        let source = min(next + q_row + 0u, last_column);
        { q_share_0 = raw_q(q_base, source * params.q.seq, part); }
      }
      {
        let part = q_part;
        let source = min(next + q_row + 4u, last_column);
        { q_share_1 = raw_q(q_base, source * params.q.seq, part); }
      }
      {
        let part = q_part;
        let source = min(next + q_row + 8u, last_column);
        { q_share_2 = raw_q(q_base, source * params.q.seq, part); }
      }
      {
        let part = q_part;
        let source = min(next + q_row + 12u, last_column);
        { q_share_3 = raw_q(q_base, source * params.q.seq, part); }
      }
      {
        let part = d_o_part;
        let source = min(next + d_o_row + 0u, last_column);
        { d_o_share_0 = raw_d_o(d_o_base, source * params.d_o.seq, part); }
      }
      {
        let part = d_o_part;
        let source = min(next + d_o_row + 4u, last_column);
        { d_o_share_1 = raw_d_o(d_o_base, source * params.d_o.seq, part); }
      }
      {
        let part = d_o_part;
        let source = min(next + d_o_row + 8u, last_column);
        { d_o_share_2 = raw_d_o(d_o_base, source * params.d_o.seq, part); }
      }
      {
        let part = d_o_part;
        let source = min(next + d_o_row + 12u, last_column);
        { d_o_share_3 = raw_d_o(d_o_base, source * params.d_o.seq, part); }
      }
      if (thread < 16u) {
        let source = min(next + thread + 0u, last_column);
        lse_delta_0 = row_stats[stats_base + source].xy;
      }
      var s_0_0 = coop_mat16x16<f32, C>();
      {
        let column = coopLoad<coop_mat16x16<f16, B>>(&q_stage[stage * Q_TILE + 0u * Q_ROW + 0u], Q_ROW);
        s_0_0 = coopMultiplyAdd(k_0_0, column, s_0_0);
      }
      {
        let column = coopLoad<coop_mat16x16<f16, B>>(&q_stage[stage * Q_TILE + 0u * Q_ROW + 4u], Q_ROW);
        s_0_0 = coopMultiplyAdd(k_0_1, column, s_0_0);
      }
      {
        let column = coopLoad<coop_mat16x16<f16, B>>(&q_stage[stage * Q_TILE + 0u * Q_ROW + 8u], Q_ROW);
        s_0_0 = coopMultiplyAdd(k_0_2, column, s_0_0);
      }
      {
        let column = coopLoad<coop_mat16x16<f16, B>>(&q_stage[stage * Q_TILE + 0u * Q_ROW + 12u], Q_ROW);
        s_0_0 = coopMultiplyAdd(k_0_3, column, s_0_0);
      }

      // P, stored as the P tile and kept in registers.
      coopStoreT(s_0_0, &score_rows[subgroup_scores + 0u], SCORE_ROW);
      subgroupBarrier();
      var x_0_0 = score_rows[score_at + 0u];
      var x_0_1 = score_rows[score_at + 2u];
      subgroupBarrier();
      var p_0_0 = exp2(fma(x_0_0, vec4<f32>(scale), column_stats[stage * 8u + part + 0u]));
      var p_0_1 = exp2(fma(x_0_1, vec4<f32>(scale), column_stats[stage * 8u + part + 2u]));
      var hides_p = is_partial;
      loop {
        if (!hides_p) { break; }
        hides_p = false;
        p_0_0 = select(vec4<f32>(0.0), p_0_0, visible4(seq, row_0, column0 + 0u + lane_column));
        p_0_1 = select(vec4<f32>(0.0), p_0_1, visible4(seq, row_0, column0 + 8u + lane_column));
      }
      p_tile[p_at + 0u] = vec4<f16>(p_0_0);
      p_tile[p_at + 2u] = vec4<f16>(p_0_1);
      subgroupBarrier();

      // dV += P dO.
      {
        let p_left_0_0 = coopLoadT<coop_mat16x16<f16, A>>(&p_tile[subgroup_p + 0u], P_ROW);
        {
          let column = coopLoadT<coop_mat16x16<f16, B>>(&d_o_stage[stage * D_O_TILE + 0u * D_O_ROW + 0u], D_O_ROW);
          d_v_0_0 = coopMultiplyAdd(p_left_0_0, column, d_v_0_0);
        }
        {
          let column = coopLoadT<coop_mat16x16<f16, B>>(&d_o_stage[stage * D_O_TILE + 0u * D_O_ROW + 4u], D_O_ROW);
          d_v_0_1 = coopMultiplyAdd(p_left_0_0, column, d_v_0_1);
        }
        {
          let column = coopLoadT<coop_mat16x16<f16, B>>(&d_o_stage[stage * D_O_TILE + 0u * D_O_ROW + 8u], D_O_ROW);
          d_v_0_2 = coopMultiplyAdd(p_left_0_0, column, d_v_0_2);
        }
        {
          let column = coopLoadT<coop_mat16x16<f16, B>>(&d_o_stage[stage * D_O_TILE + 0u * D_O_ROW + 12u], D_O_ROW);
          d_v_0_3 = coopMultiplyAdd(p_left_0_0, column, d_v_0_3);
        }
      }

      // dP = V dO^T.
      var d_p_0_0 = coop_mat16x16<f32, C>();
      {
        let column = coopLoad<coop_mat16x16<f16, B>>(&d_o_stage[stage * D_O_TILE + 0u * D_O_ROW + 0u], D_O_ROW);
        d_p_0_0 = coopMultiplyAdd(v_0_0, column, d_p_0_0);
      }
      {
        let column = coopLoad<coop_mat16x16<f16, B>>(&d_o_stage[stage * D_O_TILE + 0u * D_O_ROW + 4u], D_O_ROW);
        d_p_0_0 = coopMultiplyAdd(v_0_1, column, d_p_0_0);
      }
      {
        let column = coopLoad<coop_mat16x16<f16, B>>(&d_o_stage[stage * D_O_TILE + 0u * D_O_ROW + 8u], D_O_ROW);
        d_p_0_0 = coopMultiplyAdd(v_0_2, column, d_p_0_0);
      }
      {
        let column = coopLoad<coop_mat16x16<f16, B>>(&d_o_stage[stage * D_O_TILE + 0u * D_O_ROW + 12u], D_O_ROW);
        d_p_0_0 = coopMultiplyAdd(v_0_3, column, d_p_0_0);
      }

      // dS, stored as the P tile.
      coopStoreT(d_p_0_0, &score_rows[subgroup_scores + 0u], SCORE_ROW);
      subgroupBarrier();
      var y_0_0 = score_rows[score_at + 0u];
      var y_0_1 = score_rows[score_at + 2u];
      subgroupBarrier();
      var d_s_0_0 = p_0_0 * d_k_unit_0 * (y_0_0 + column_stats[stage * 8u + part + 4u]);
      var d_s_0_1 = p_0_1 * d_k_unit_0 * (y_0_1 + column_stats[stage * 8u + part + 6u]);
      p_tile[p_at + 0u] = vec4<f16>(d_s_0_0);
      p_tile[p_at + 2u] = vec4<f16>(d_s_0_1);
      subgroupBarrier();

      // dK += dS Q.
      {
        let d_s_left_0_0 = coopLoadT<coop_mat16x16<f16, A>>(&p_tile[subgroup_p + 0u], P_ROW);
        {
          let column = coopLoadT<coop_mat16x16<f16, B>>(&q_stage[stage * Q_TILE + 0u * Q_ROW + 0u], Q_ROW);
          d_k_0_0 = coopMultiplyAdd(d_s_left_0_0, column, d_k_0_0);
        }
        {
          let column = coopLoadT<coop_mat16x16<f16, B>>(&q_stage[stage * Q_TILE + 0u * Q_ROW + 4u], Q_ROW);
          d_k_0_1 = coopMultiplyAdd(d_s_left_0_0, column, d_k_0_1);
        }
        {
          let column = coopLoadT<coop_mat16x16<f16, B>>(&q_stage[stage * Q_TILE + 0u * Q_ROW + 8u], Q_ROW);
          d_k_0_2 = coopMultiplyAdd(d_s_left_0_0, column, d_k_0_2);
        }
        {
          let column = coopLoadT<coop_mat16x16<f16, B>>(&q_stage[stage * Q_TILE + 0u * Q_ROW + 12u], Q_ROW);
          d_k_0_3 = coopMultiplyAdd(d_s_left_0_0, column, d_k_0_3);
        }
      }
      workgroupBarrier();
      {
        q_stage[stage * Q_TILE + (q_row + 0u) * Q_ROW + q_part] = halves4(q_share_0);
      }
      {
        q_stage[stage * Q_TILE + (q_row + 4u) * Q_ROW + q_part] = halves4(q_share_1);
      }
      {
        q_stage[stage * Q_TILE + (q_row + 8u) * Q_ROW + q_part] = halves4(q_share_2);
      }
      {
        q_stage[stage * Q_TILE + (q_row + 12u) * Q_ROW + q_part] = halves4(q_share_3);
      }
      {
        d_o_stage[stage * D_O_TILE + (d_o_row + 0u) * D_O_ROW + d_o_part] = halves4(d_o_share_0);
      }
      {
        d_o_stage[stage * D_O_TILE + (d_o_row + 4u) * D_O_ROW + d_o_part] = halves4(d_o_share_1);
      }
      {
        d_o_stage[stage * D_O_TILE + (d_o_row + 8u) * D_O_ROW + d_o_part] = halves4(d_o_share_2);
      }
      {
        d_o_stage[stage * D_O_TILE + (d_o_row + 12u) * D_O_ROW + d_o_part] = halves4(d_o_share_3);
      }
      if (thread < 16u) {
        let item = thread + 0u;
        column_stats[stage * 8u + item / 4u + 0u][item % 4u] = 15.0 - lse_delta_0.x * LOG2_E;
        column_stats[stage * 8u + item / 4u + 4u][item % 4u] = -lse_delta_0.y;
      }
      workgroupBarrier();
    }
  }
  let d_k_factor_0 = params.scale * 0.000030517578125 / d_k_unit_0;
  let d_v_factor_0 = 0.000030517578125;
  {
    let base = d_k_base + row_0 * params.d_k.seq;
    subgroupBarrier();
    coopStoreT(d_k_0_0, &score_rows[subgroup_scores], SCORE_ROW);
    subgroupBarrier();
    {
      let quad = part + 0u;
      {
        if (row_0 < row_limit) {
          let result = score_rows[score_at - part + quad] * d_k_factor_0;
          fallback_0 = fallback_0 || !is_finite4(result);
          store_d_k(base, 0u + quad, result);
        }
      }
    }
    {
      let quad = part + 2u;
      {
        if (row_0 < row_limit) {
          let result = score_rows[score_at - part + quad] * d_k_factor_0;
          fallback_0 = fallback_0 || !is_finite4(result);
          store_d_k(base, 0u + quad, result);
        }
      }
    }
    subgroupBarrier();
    coopStoreT(d_k_0_1, &score_rows[subgroup_scores], SCORE_ROW);
    subgroupBarrier();
    {
      let quad = part + 0u;
      {
        if (row_0 < row_limit) {
          let result = score_rows[score_at - part + quad] * d_k_factor_0;
          fallback_0 = fallback_0 || !is_finite4(result);
          store_d_k(base, 4u + quad, result);
        }
      }
    }
    {
      let quad = part + 2u;
      {
        if (row_0 < row_limit) {
          let result = score_rows[score_at - part + quad] * d_k_factor_0;
          fallback_0 = fallback_0 || !is_finite4(result);
          store_d_k(base, 4u + quad, result);
        }
      }
    }
    subgroupBarrier();
    coopStoreT(d_k_0_2, &score_rows[subgroup_scores], SCORE_ROW);
    subgroupBarrier();
    {
      let quad = part + 0u;
      {
        if (row_0 < row_limit) {
          let result = score_rows[score_at - part + quad] * d_k_factor_0;
          fallback_0 = fallback_0 || !is_finite4(result);
          store_d_k(base, 8u + quad, result);
        }
      }
    }
    {
      let quad = part + 2u;
      {
        if (row_0 < row_limit) {
          let result = score_rows[score_at - part + quad] * d_k_factor_0;
          fallback_0 = fallback_0 || !is_finite4(result);
          store_d_k(base, 8u + quad, result);
        }
      }
    }
    subgroupBarrier();
    coopStoreT(d_k_0_3, &score_rows[subgroup_scores], SCORE_ROW);
    subgroupBarrier();
    {
      let quad = part + 0u;
      {
        if (row_0 < row_limit) {
          let result = score_rows[score_at - part + quad] * d_k_factor_0;
          fallback_0 = fallback_0 || !is_finite4(result);
          store_d_k(base, 12u + quad, result);
        }
      }
    }
    {
      let quad = part + 2u;
      {
        if (row_0 < row_limit) {
          let result = score_rows[score_at - part + quad] * d_k_factor_0;
          fallback_0 = fallback_0 || !is_finite4(result);
          store_d_k(base, 12u + quad, result);
        }
      }
    }
  }
  {
    let base = d_v_base + row_0 * params.d_v.seq;
    subgroupBarrier();
    coopStoreT(d_v_0_0, &score_rows[subgroup_scores], SCORE_ROW);
    subgroupBarrier();
    {
      let quad = part + 0u;
      {
        if (row_0 < row_limit) {
          let result = score_rows[score_at - part + quad] * d_v_factor_0;
          fallback_0 = fallback_0 || !is_finite4(result);
          store_d_v(base, 0u + quad, result);
        }
      }
    }
    {
      let quad = part + 2u;
      {
        if (row_0 < row_limit) {
          let result = score_rows[score_at - part + quad] * d_v_factor_0;
          fallback_0 = fallback_0 || !is_finite4(result);
          store_d_v(base, 0u + quad, result);
        }
      }
    }
    subgroupBarrier();
    coopStoreT(d_v_0_1, &score_rows[subgroup_scores], SCORE_ROW);
    subgroupBarrier();
    {
      let quad = part + 0u;
      {
        if (row_0 < row_limit) {
          let result = score_rows[score_at - part + quad] * d_v_factor_0;
          fallback_0 = fallback_0 || !is_finite4(result);
          store_d_v(base, 4u + quad, result);
        }
      }
    }
    {
      let quad = part + 2u;
      {
        if (row_0 < row_limit) {
          let result = score_rows[score_at - part + quad] * d_v_factor_0;
          fallback_0 = fallback_0 || !is_finite4(result);
          store_d_v(base, 4u + quad, result);
        }
      }
    }
    subgroupBarrier();
    coopStoreT(d_v_0_2, &score_rows[subgroup_scores], SCORE_ROW);
    subgroupBarrier();
    {
      let quad = part + 0u;
      {
        if (row_0 < row_limit) {
          let result = score_rows[score_at - part + quad] * d_v_factor_0;
          fallback_0 = fallback_0 || !is_finite4(result);
          store_d_v(base, 8u + quad, result);
        }
      }
    }
    {
      let quad = part + 2u;
      {
        if (row_0 < row_limit) {
          let result = score_rows[score_at - part + quad] * d_v_factor_0;
          fallback_0 = fallback_0 || !is_finite4(result);
          store_d_v(base, 8u + quad, result);
        }
      }
    }
    subgroupBarrier();
    coopStoreT(d_v_0_3, &score_rows[subgroup_scores], SCORE_ROW);
    subgroupBarrier();
    {
      let quad = part + 0u;
      {
        if (row_0 < row_limit) {
          let result = score_rows[score_at - part + quad] * d_v_factor_0;
          fallback_0 = fallback_0 || !is_finite4(result);
          store_d_v(base, 12u + quad, result);
        }
      }
    }
    {
      let quad = part + 2u;
      {
        if (row_0 < row_limit) {
          let result = score_rows[score_at - part + quad] * d_v_factor_0;
          fallback_0 = fallback_0 || !is_finite4(result);
          store_d_v(base, 12u + quad, result);
        }
      }
    }
  }
  let subgroup_fallback = subgroupAny((fallback_0 && row_0 < row_limit));
  var any_fallback = false;
  workgroupBarrier();
  if (lane == 0u) { score_rows[subgroup] = vec4<f32>(select(0.0, 1.0, subgroup_fallback)); }
  workgroupBarrier();
  any_fallback = false;
  for (var n = 0u; n < 2u; n += 1u) { any_fallback = any_fallback || score_rows[n].x > 0.0; }
  let slot = fallback_slot(seq, work, work.tile);
  if (thread == 0u) { fallback[slot] = u32(any_fallback); }
  var has_any = any_fallback;
  loop {
    if (!has_any) { break; }
    has_any = false;
    workgroupBarrier();
    var reported_0 = select(0.0, 1.0, fallback_0);
    reported_0 = max(reported_0, subgroupShuffleXor(reported_0, 1u));
    if (lane_column == 0u) { score_rows[row_0 - row0] = vec4<f32>(reported_0); }
    workgroupBarrier();
    if (thread < 1u) {
      var bits = 0u;
      for (var n = 0u; n < min(32u - thread * 32u, 32u); n += 1u) { bits |= u32(score_rows[thread * 32u + n].x) << n; }
      fallback[slot + 1u + thread] = bits;
    }
  }
}
