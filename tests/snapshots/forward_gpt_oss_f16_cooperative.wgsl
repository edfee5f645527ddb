enable f16;
enable wgpu_cooperative_matrix;

struct Operand { offset: u32, batch: u32, head: u32, seq: u32 }

struct Params {
  q: Operand,
  k: Operand,
  v: Operand,
  o: Operand,
  lse: Operand,
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
  sink_offset: u32,
  batch: u32,
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
@group(0) @binding(6) var<storage, read> sink_logits: array<f32>;
@group(0) @binding(4) var<storage, read_write> o: array<vec2<u32>>;
@group(0) @binding(5) var<storage, read_write> lse: array<f32>;
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

const TILE_ROWS: u32 = 64u;
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
  let keys = vec4<u32>(j) + vec4<u32>(0u, 1u, 2u, 3u);
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

// The first word of the report of a tile of 64 rows. The word is zero where no row is reported. Otherwise a bit for each
// row follows.
fn fallback_slot(seq: Sequence, work: TileWork, tile: u32) -> u32 {
  return ((tile * params.batch + work.batch) * params.heads + work.head) * 3u;
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
fn store_o(base: u32, quad: u32, x: vec4<f32>) {
  let stored = narrow4(x);
  o[base + quad] = stored.xz | (stored.yw << vec2<u32>(16u));
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
  let score = row_max * params.scale_size;
  let sink = sink_logits[params.sink_offset + head];
  if (row_sum == 0.0) { return RowEnd(0.0, sink); }
  // The rounding error of the score. With it lse fits the unrounded scores of the backward pass.
  let rest = select(0.0, fma(row_max, params.scale_size, -score), score > sink && score < infinity);
  let top = max(score, sink);
  // Equal terms give exp(0), even where they exceed f32.
  let keys = select(select(exp1(score - top), 1.0, score == top), 0.0, sink == infinity);
  let total = fma(row_sum, keys, select(exp1(sink - top), 1.0, sink == top && (sink == infinity || score < infinity)));
  return RowEnd(keys / total, select(top + (natural_log(total) + rest), infinity, score == infinity));
}

const LANES_A_ROW: u32 = 2u;

// Padding lets neighbouring rows start in different banks. Fragments are loaded from multiples of 16 bytes.
const SCORE_ROW: u32 = 6u;
const P_ROW: u32 = 6u;
const K_ROW: u32 = 18u;
const K_TILE: u32 = 288u;
var<workgroup> k_stage: array<vec4<f16>, 288>;
const V_ROW: u32 = 18u;
const V_TILE: u32 = 288u;
var<workgroup> v_stage: array<vec4<f16>, 288>;
var<workgroup> score_rows: array<vec4<f32>, 384>;
var<workgroup> p_tile: array<vec4<f16>, 384>;

// Bits are compared: compilers may assume that a float comparison meets no NaN.
fn is_finite4(x: vec4<f32>) -> bool {
  return all((bitcast<vec4<u32>>(x) & vec4<u32>(0x7f800000u)) < vec4<u32>(0x7f800000u));
}

// Below every product of halves, and far from the end of f32.
const HIDDEN: f32 = -1e30;

// row_max may lag behind by this power of two, within the range of f16, before O is rescaled.
const SLACK: f32 = 8.0;

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
  let tiles = key_tiles(seq, row0, used_end);
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
  let hidden = HIDDEN;
  // The scale is never zero, so hidden scores stay hidden.
  let scale = max(params.scale_size * LOG2_E, 1e-25);
  var stage = 0u;
  let k_row = thread / 16u;
  let k_part = thread % 16u;
  var k_share_0 = Raw();
  var k_share_1 = Raw();
  let v_row = thread / 16u;
  let v_part = thread % 16u;
  var v_share_0 = Raw();
  var v_share_1 = Raw();
  {
    {
      let part = k_part;
      let source = min(first_column(tiles, tiles.first) + k_row + 0u, last_column);
      { k_share_0 = raw_k(k_base, source * params.k.seq, part); }
    }
    {
      let part = k_part;
      let source = min(first_column(tiles, tiles.first) + k_row + 8u, last_column);
      { k_share_1 = raw_k(k_base, source * params.k.seq, part); }
    }
    {
      let part = v_part;
      let source = min(first_column(tiles, tiles.first) + v_row + 0u, last_column);
      { v_share_0 = raw_v(v_base, source * params.v.seq, part); }
    }
    {
      let part = v_part;
      let source = min(first_column(tiles, tiles.first) + v_row + 8u, last_column);
      { v_share_1 = raw_v(v_base, source * params.v.seq, part); }
    }
  }
  var q_raw_0_0_0 = Raw();
  {
    let quad = part + 0u;
    {
      if (row_0 < row_limit) {
        q_raw_0_0_0 = raw_q(q_base, row_0 * params.q.seq, 0u + quad);
      }
    }
  }
  var q_raw_0_0_1 = Raw();
  {
    let quad = part + 2u;
    {
      if (row_0 < row_limit) {
        q_raw_0_0_1 = raw_q(q_base, row_0 * params.q.seq, 0u + quad);
      }
    }
  }
  var q_raw_0_1_0 = Raw();
  {
    let quad = part + 0u;
    {
      if (row_0 < row_limit) {
        q_raw_0_1_0 = raw_q(q_base, row_0 * params.q.seq, 4u + quad);
      }
    }
  }
  var q_raw_0_1_1 = Raw();
  {
    let quad = part + 2u;
    {
      if (row_0 < row_limit) {
        q_raw_0_1_1 = raw_q(q_base, row_0 * params.q.seq, 4u + quad);
      }
    }
  }
  var q_raw_0_2_0 = Raw();
  {
    let quad = part + 0u;
    {
      if (row_0 < row_limit) {
        q_raw_0_2_0 = raw_q(q_base, row_0 * params.q.seq, 8u + quad);
      }
    }
  }
  var q_raw_0_2_1 = Raw();
  {
    let quad = part + 2u;
    {
      if (row_0 < row_limit) {
        q_raw_0_2_1 = raw_q(q_base, row_0 * params.q.seq, 8u + quad);
      }
    }
  }
  var q_raw_0_3_0 = Raw();
  {
    let quad = part + 0u;
    {
      if (row_0 < row_limit) {
        q_raw_0_3_0 = raw_q(q_base, row_0 * params.q.seq, 12u + quad);
      }
    }
  }
  var q_raw_0_3_1 = Raw();
  {
    let quad = part + 2u;
    {
      if (row_0 < row_limit) {
        q_raw_0_3_1 = raw_q(q_base, row_0 * params.q.seq, 12u + quad);
      }
    }
  }
  {
    let quad = part + 0u;
    {
      let raw = q_raw_0_0_0;
      p_tile[p_at - part + 0u + quad] = half4(raw, params.scale_sign);
    }
  }
  {
    let quad = part + 2u;
    {
      let raw = q_raw_0_0_1;
      p_tile[p_at - part + 0u + quad] = half4(raw, params.scale_sign);
    }
  }
  subgroupBarrier();
  let q_0_0 = coopLoadT<coop_mat16x16<f16, A>>(&p_tile[subgroup_p + 0u], P_ROW);
  subgroupBarrier();
  {
    let quad = part + 0u;
    {
      let raw = q_raw_0_1_0;
      p_tile[p_at - part + 0u + quad] = half4(raw, params.scale_sign);
    }
  }
  {
    let quad = part + 2u;
    {
      let raw = q_raw_0_1_1;
      p_tile[p_at - part + 0u + quad] = half4(raw, params.scale_sign);
    }
  }
  subgroupBarrier();
  let q_0_1 = coopLoadT<coop_mat16x16<f16, A>>(&p_tile[subgroup_p + 0u], P_ROW);
  subgroupBarrier();
  {
    let quad = part + 0u;
    {
      let raw = q_raw_0_2_0;
      p_tile[p_at - part + 0u + quad] = half4(raw, params.scale_sign);
    }
  }
  {
    let quad = part + 2u;
    {
      let raw = q_raw_0_2_1;
      p_tile[p_at - part + 0u + quad] = half4(raw, params.scale_sign);
    }
  }
  subgroupBarrier();
  let q_0_2 = coopLoadT<coop_mat16x16<f16, A>>(&p_tile[subgroup_p + 0u], P_ROW);
  subgroupBarrier();
  {
    let quad = part + 0u;
    {
      let raw = q_raw_0_3_0;
      p_tile[p_at - part + 0u + quad] = half4(raw, params.scale_sign);
    }
  }
  {
    let quad = part + 2u;
    {
      let raw = q_raw_0_3_1;
      p_tile[p_at - part + 0u + quad] = half4(raw, params.scale_sign);
    }
  }
  subgroupBarrier();
  let q_0_3 = coopLoadT<coop_mat16x16<f16, A>>(&p_tile[subgroup_p + 0u], P_ROW);
  subgroupBarrier();
  var o_0_0 = coop_mat16x16<f32, C>();
  var o_0_1 = coop_mat16x16<f32, C>();
  var o_0_2 = coop_mat16x16<f32, C>();
  var o_0_3 = coop_mat16x16<f32, C>();
  {
    k_stage[stage * K_TILE + (k_row + 0u) * K_ROW + k_part] = halves4(k_share_0);
  }
  {
    k_stage[stage * K_TILE + (k_row + 8u) * K_ROW + k_part] = halves4(k_share_1);
  }
  {
    v_stage[stage * V_TILE + (v_row + 0u) * V_ROW + v_part] = halves4(v_share_0);
  }
  {
    v_stage[stage * V_TILE + (v_row + 8u) * V_ROW + v_part] = halves4(v_share_1);
  }
  workgroupBarrier();

  // The first maximum is finite, and so far above hidden scores that their probabilities are zero.
  let floor = max(0.5 * HIDDEN * scale, LOWEST);
  let slack = SLACK / scale;
  var row_max_0 = floor;
  // Scores above the limit raise the maximum.
  var limit_0 = 0.5 * HIDDEN;
  var row_sum_0 = 0.0;

  // Loop: tiles
  for (var tile = tiles.first; tile < tiles.end; tile = next_tile(tiles, tile)) {
    let column0 = first_column(tiles, tile);
    let is_partial = !is_full(seq, full, column0);

    // S = Q K^T.
    let next = first_column(tiles, next_tile(tiles, tile));
    {
      let part = k_part;
      let source = min(next + k_row + 0u, last_column);
      { k_share_0 = raw_k(k_base, source * params.k.seq, part); }
    }
    {
      let part = k_part;
      let source = min(next + k_row + 8u, last_column);
      { k_share_1 = raw_k(k_base, source * params.k.seq, part); }
    }
    {
      let part = v_part;
      let source = min(next + v_row + 0u, last_column);
      { v_share_0 = raw_v(v_base, source * params.v.seq, part); }
    }
    {
      let part = v_part;
      let source = min(next + v_row + 8u, last_column);
      { v_share_1 = raw_v(v_base, source * params.v.seq, part); }
    }
    var s_0_0 = coop_mat16x16<f32, C>();
    {
      let column = coopLoad<coop_mat16x16<f16, B>>(&k_stage[stage * K_TILE + 0u * K_ROW + 0u], K_ROW);
      s_0_0 = coopMultiplyAdd(q_0_0, column, s_0_0);
    }
    {
      let column = coopLoad<coop_mat16x16<f16, B>>(&k_stage[stage * K_TILE + 0u * K_ROW + 4u], K_ROW);
      s_0_0 = coopMultiplyAdd(q_0_1, column, s_0_0);
    }
    {
      let column = coopLoad<coop_mat16x16<f16, B>>(&k_stage[stage * K_TILE + 0u * K_ROW + 8u], K_ROW);
      s_0_0 = coopMultiplyAdd(q_0_2, column, s_0_0);
    }
    {
      let column = coopLoad<coop_mat16x16<f16, B>>(&k_stage[stage * K_TILE + 0u * K_ROW + 12u], K_ROW);
      s_0_0 = coopMultiplyAdd(q_0_3, column, s_0_0);
    }
    coopStoreT(s_0_0, &score_rows[subgroup_scores + 0u], SCORE_ROW);
    subgroupBarrier();
    var x_0_0 = score_rows[score_at + 0u];
    var x_0_1 = score_rows[score_at + 2u];
    subgroupBarrier();
    var hides_x = is_partial;
    loop {
      if (!hides_x) { break; }
      hides_x = false;
      x_0_0 = select(vec4<f32>(hidden), x_0_0, visible4(seq, row_0, column0 + 0u + lane_column));
      x_0_1 = select(vec4<f32>(hidden), x_0_1, visible4(seq, row_0, column0 + 8u + lane_column));
    }

    // m = max(row_max, max of S by rows);  O and row_sum *= exp(row_max - m). Runs at most once; a loop, because with an `if` NVIDIA's
    // compiler moves the registers of fragments.
    loop {
      if (!subgroupAny(any((x_0_0 > vec4<f32>(limit_0)) | (x_0_1 > vec4<f32>(limit_0))))) { break; }
      let old_max_0 = row_max_0;
      {
        var tile_max4 = vec4<f32>(limit_0);
        tile_max4 = select(tile_max4, x_0_0, x_0_0 > tile_max4);
        tile_max4 = select(tile_max4, x_0_1, x_0_1 > tile_max4);
        var tile_max = max(max(tile_max4.x, tile_max4.y), max(tile_max4.z, tile_max4.w));
        tile_max = max(tile_max, subgroupShuffleXor(tile_max, 1u));
        if (tile_max > limit_0) {
          row_max_0 = tile_max * scale;
          limit_0 = tile_max + slack;
        }
      }

      // A row that keeps its maximum keeps its bits.
      let rescale_0 = select(exp2(old_max_0 - row_max_0), 1.0, old_max_0 == row_max_0);
      row_sum_0 *= rescale_0;

      // The first tile finds O = 0.
      if (tile == tiles.first) { continue; }
      subgroupBarrier();
      coopStoreT(o_0_0, &score_rows[subgroup_scores], SCORE_ROW);
      subgroupBarrier();
      {
        let quad = part + 0u;
        {
          score_rows[score_at - part + quad] *= rescale_0;
        }
      }
      {
        let quad = part + 2u;
        {
          score_rows[score_at - part + quad] *= rescale_0;
        }
      }
      subgroupBarrier();
      o_0_0 = coopLoadT<coop_mat16x16<f32, C>>(&score_rows[subgroup_scores], SCORE_ROW);
      subgroupBarrier();
      coopStoreT(o_0_1, &score_rows[subgroup_scores], SCORE_ROW);
      subgroupBarrier();
      {
        let quad = part + 0u;
        {
          score_rows[score_at - part + quad] *= rescale_0;
        }
      }
      {
        let quad = part + 2u;
        {
          score_rows[score_at - part + quad] *= rescale_0;
        }
      }
      subgroupBarrier();
      o_0_1 = coopLoadT<coop_mat16x16<f32, C>>(&score_rows[subgroup_scores], SCORE_ROW);
      subgroupBarrier();
      coopStoreT(o_0_2, &score_rows[subgroup_scores], SCORE_ROW);
      subgroupBarrier();
      {
        let quad = part + 0u;
        {
          score_rows[score_at - part + quad] *= rescale_0;
        }
      }
      {
        let quad = part + 2u;
        {
          score_rows[score_at - part + quad] *= rescale_0;
        }
      }
      subgroupBarrier();
      o_0_2 = coopLoadT<coop_mat16x16<f32, C>>(&score_rows[subgroup_scores], SCORE_ROW);
      subgroupBarrier();
      coopStoreT(o_0_3, &score_rows[subgroup_scores], SCORE_ROW);
      subgroupBarrier();
      {
        let quad = part + 0u;
        {
          score_rows[score_at - part + quad] *= rescale_0;
        }
      }
      {
        let quad = part + 2u;
        {
          score_rows[score_at - part + quad] *= rescale_0;
        }
      }
      subgroupBarrier();
      o_0_3 = coopLoadT<coop_mat16x16<f32, C>>(&score_rows[subgroup_scores], SCORE_ROW);
      subgroupBarrier();
    }
    // P = exp(S - m);  row_sum += sum of P.
    var total_0 = vec4<f32>();
    let p_0_0 = exp2(fma(x_0_0, vec4<f32>(scale), vec4<f32>(-row_max_0)));
    total_0 += p_0_0;
    let p_0_1 = exp2(fma(x_0_1, vec4<f32>(scale), vec4<f32>(-row_max_0)));
    total_0 += p_0_1;
    row_sum_0 += (total_0.x + total_0.y) + (total_0.z + total_0.w);
    p_tile[p_at + 0u] = vec4<f16>(p_0_0);
    p_tile[p_at + 2u] = vec4<f16>(p_0_1);
    subgroupBarrier();

    // O += P V.
    {
      let p_left_0_0 = coopLoadT<coop_mat16x16<f16, A>>(&p_tile[subgroup_p + 0u], P_ROW);
      {
        let column = coopLoadT<coop_mat16x16<f16, B>>(&v_stage[stage * V_TILE + 0u * V_ROW + 0u], V_ROW);
        o_0_0 = coopMultiplyAdd(p_left_0_0, column, o_0_0);
      }
      {
        let column = coopLoadT<coop_mat16x16<f16, B>>(&v_stage[stage * V_TILE + 0u * V_ROW + 4u], V_ROW);
        o_0_1 = coopMultiplyAdd(p_left_0_0, column, o_0_1);
      }
      {
        let column = coopLoadT<coop_mat16x16<f16, B>>(&v_stage[stage * V_TILE + 0u * V_ROW + 8u], V_ROW);
        o_0_2 = coopMultiplyAdd(p_left_0_0, column, o_0_2);
      }
      {
        let column = coopLoadT<coop_mat16x16<f16, B>>(&v_stage[stage * V_TILE + 0u * V_ROW + 12u], V_ROW);
        o_0_3 = coopMultiplyAdd(p_left_0_0, column, o_0_3);
      }
    }
    workgroupBarrier();
    {
      k_stage[stage * K_TILE + (k_row + 0u) * K_ROW + k_part] = halves4(k_share_0);
    }
    {
      k_stage[stage * K_TILE + (k_row + 8u) * K_ROW + k_part] = halves4(k_share_1);
    }
    {
      v_stage[stage * V_TILE + (v_row + 0u) * V_ROW + v_part] = halves4(v_share_0);
    }
    {
      v_stage[stage * V_TILE + (v_row + 8u) * V_ROW + v_part] = halves4(v_share_1);
    }
    workgroupBarrier();
  }
  row_sum_0 = row_sum_0 + subgroupShuffleXor(row_sum_0, 1u);
  let end_0 = finish_row(row_max_0 / scale, row_sum_0, work.head);
  let factor_0 = end_0.factor;
  if (row_0 < row_limit && lane_column == 0u) { lse[lse_base + row_0] = select(params.negative_infinity, end_0.lse, row_0 < seq.seq_q); }
  {
    let base = o_base + row_0 * params.o.seq;
    subgroupBarrier();
    coopStoreT(o_0_0, &score_rows[subgroup_scores], SCORE_ROW);
    subgroupBarrier();
    {
      let quad = part + 0u;
      {
        if (row_0 < row_limit) {
          let result = score_rows[score_at - part + quad] * factor_0;
          fallback_0 = fallback_0 || !is_finite4(result);
          store_o(base, 0u + quad, result);
        }
      }
    }
    {
      let quad = part + 2u;
      {
        if (row_0 < row_limit) {
          let result = score_rows[score_at - part + quad] * factor_0;
          fallback_0 = fallback_0 || !is_finite4(result);
          store_o(base, 0u + quad, result);
        }
      }
    }
    subgroupBarrier();
    coopStoreT(o_0_1, &score_rows[subgroup_scores], SCORE_ROW);
    subgroupBarrier();
    {
      let quad = part + 0u;
      {
        if (row_0 < row_limit) {
          let result = score_rows[score_at - part + quad] * factor_0;
          fallback_0 = fallback_0 || !is_finite4(result);
          store_o(base, 4u + quad, result);
        }
      }
    }
    {
      let quad = part + 2u;
      {
        if (row_0 < row_limit) {
          let result = score_rows[score_at - part + quad] * factor_0;
          fallback_0 = fallback_0 || !is_finite4(result);
          store_o(base, 4u + quad, result);
        }
      }
    }
    subgroupBarrier();
    coopStoreT(o_0_2, &score_rows[subgroup_scores], SCORE_ROW);
    subgroupBarrier();
    {
      let quad = part + 0u;
      {
        if (row_0 < row_limit) {
          let result = score_rows[score_at - part + quad] * factor_0;
          fallback_0 = fallback_0 || !is_finite4(result);
          store_o(base, 8u + quad, result);
        }
      }
    }
    {
      let quad = part + 2u;
      {
        if (row_0 < row_limit) {
          let result = score_rows[score_at - part + quad] * factor_0;
          fallback_0 = fallback_0 || !is_finite4(result);
          store_o(base, 8u + quad, result);
        }
      }
    }
    subgroupBarrier();
    coopStoreT(o_0_3, &score_rows[subgroup_scores], SCORE_ROW);
    subgroupBarrier();
    {
      let quad = part + 0u;
      {
        if (row_0 < row_limit) {
          let result = score_rows[score_at - part + quad] * factor_0;
          fallback_0 = fallback_0 || !is_finite4(result);
          store_o(base, 12u + quad, result);
        }
      }
    }
    {
      let quad = part + 2u;
      {
        if (row_0 < row_limit) {
          let result = score_rows[score_at - part + quad] * factor_0;
          fallback_0 = fallback_0 || !is_finite4(result);
          store_o(base, 12u + quad, result);
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
    if (lane_column == 0u) { score_rows[row_0 - row0] = vec4<f32>(reported_0); }
    workgroupBarrier();
    if (thread < 2u) {
      var bits = 0u;
      for (var n = 0u; n < min(64u - thread * 32u, 32u); n += 1u) { bits |= u32(score_rows[thread * 32u + n].x) << n; }
      fallback[slot + 1u + thread] = bits;
    }
  }
}
