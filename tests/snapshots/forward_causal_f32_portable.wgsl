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
  // `score_scale` is `scale_sign` (1 or -1) times `scale_size`.
  scale_sign: f32,
  scale_size: f32,
  // -infinity, for which WGSL has no literal.
  negative_infinity: f32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> q: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> k: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> v: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read_write> o: array<vec4<f32>>;
@group(0) @binding(5) var<storage, read_write> lse: array<f32>;

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

const TILE_ROWS: u32 = 32u;
const TILE_COLUMNS: u32 = 64u;

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
  if (row_sum == 0.0) { return RowEnd(0.0, params.negative_infinity); }
  return RowEnd(1.0 / row_sum, select(fma(row_max, params.scale_size, natural_log(row_sum)), infinity, score == infinity));
}

const THREADS_C: u32 = 8u;
const THREADS_R: u32 = 16u;
const THREADS: u32 = 128u;

// Feature quads staged at once for a product, and columns staged at once for an accumulation.
const K_STEP: u32 = 4u;
const N_STEP: u32 = 16u;
const K_STEP_ROW: u32 = 5u;
const P_ROW: u32 = 17u;

// A product stages columns, then rows. An accumulation has the P tile, then a step of columns.
const ROW_STAGE: u32 = 320u;
const N_STAGE: u32 = 544u;
var<workgroup> memory: array<vec4<f32>, 800>;

// One number for each row and tx. Scalars, because threads that write components of one vector may race.
var<workgroup> partials: array<f32, 256>;

// 1 + the last step of a partial tile in which a staged column was NaN or infinite.
var<workgroup> nonfinite_step: atomic<u32>;

// The column of a tile that lies in a staged row.
fn staged_column(row: u32) -> u32 {
  let within = row % (4u * THREADS_C);
  return row - within + (within % THREADS_C) * 4u + within / THREADS_C;
}

// Bits are compared: compilers may assume that a float comparison meets no NaN.
fn is_finite4(x: vec4<f32>) -> bool {
  return all((bitcast<vec4<u32>>(x) & vec4<u32>(0x7f800000u)) < vec4<u32>(0x7f800000u));
}

@compute @workgroup_size(128)
fn main(
  @builtin(workgroup_id) workgroup: vec3<u32>,
  @builtin(num_workgroups) grid: vec3<u32>,
  @builtin(local_invocation_index) thread: u32,
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
  // Eight neighbours form a block of four by two threads, which share rows of both sides.
  let block = thread / 8u;
  let tx = thread % 4u + 4u * (block % (THREADS_C / 4u));
  let ty = thread / 4u % 2u + 2u * (block / (THREADS_C / 4u));
  var step = 0u;
  if (thread == 0u) { atomicStore(&nonfinite_step, 0u); }
  let row_0 = row0 + ty + 0u * THREADS_R;
  let row_1 = row0 + ty + 1u * THREADS_R;
  var row_max_0 = LOWEST;
  var row_sum_0 = 0.0;
  var row_max_1 = LOWEST;
  var row_sum_1 = 0.0;
  var o_0_0 = vec4<f32>();
  var o_0_1 = vec4<f32>();
  var o_1_0 = vec4<f32>();
  var o_1_1 = vec4<f32>();

  // Loop: tiles
  for (var tile = tiles.first; tile < tiles.end; tile = next_tile(tiles, tile)) {
    let column0 = first_column(tiles, tile);
    let is_partial = !is_full(seq, full, column0);

    // S = Q K^T.
    var s_0_0 = vec4<f32>();
    var s_0_1 = vec4<f32>();
    var s_1_0 = vec4<f32>();
    var s_1_1 = vec4<f32>();
    // Loop: k_steps
    for (var quad0 = 0u; quad0 < 16u; quad0 += K_STEP) {
      var column_share_0 = vec4<f32>();
      {
        let item = thread + 0u;
        let staged = item / 4u;
        let quad = quad0 + item % 4u;
        let source = column0 + staged_column(staged);
        if (source < column_limit) {
          column_share_0 = load_k(k_base + source * params.k.seq, quad);
        }
      }
      var column_share_1 = vec4<f32>();
      {
        let item = thread + 128u;
        let staged = item / 4u;
        let quad = quad0 + item % 4u;
        let source = column0 + staged_column(staged);
        if (source < column_limit) {
          column_share_1 = load_k(k_base + source * params.k.seq, quad);
        }
      }
      var row_share_0 = vec4<f32>();
      {
        let item = thread + 0u;
        let staged = item / 4u;
        let quad = quad0 + item % 4u;
        let source = row0 + staged;
        if (source < row_limit) {
          row_share_0 = load_q(q_base + source * params.q.seq, quad);
        }
      }
      workgroupBarrier();
      {
        let item = thread + 0u;
        { memory[0u + item / 4u * K_STEP_ROW + item % 4u] = column_share_0; }
      }
      {
        let item = thread + 128u;
        { memory[0u + item / 4u * K_STEP_ROW + item % 4u] = column_share_1; }
      }
      {
        let item = thread + 0u;
        { memory[ROW_STAGE + item / 4u * K_STEP_ROW + item % 4u] = row_share_0; }
      }
      workgroupBarrier();
      // Loop: inner
      for (var quad = 0u; quad < K_STEP; quad += 2u) {
        {
          let a_0 = memory[ROW_STAGE + (ty + 0u * THREADS_R) * K_STEP_ROW + quad + 0u];
          let a_1 = memory[ROW_STAGE + (ty + 1u * THREADS_R) * K_STEP_ROW + quad + 0u];
          {
            let b_0 = memory[(tx + 0u * THREADS_C) * K_STEP_ROW + quad + 0u];
            let b_1 = memory[(tx + 1u * THREADS_C) * K_STEP_ROW + quad + 0u];
            let b_2 = memory[(tx + 2u * THREADS_C) * K_STEP_ROW + quad + 0u];
            let b_3 = memory[(tx + 3u * THREADS_C) * K_STEP_ROW + quad + 0u];
            let b_x = vec4<f32>(b_0.x, b_1.x, b_2.x, b_3.x);
            let b_y = vec4<f32>(b_0.y, b_1.y, b_2.y, b_3.y);
            let b_z = vec4<f32>(b_0.z, b_1.z, b_2.z, b_3.z);
            let b_w = vec4<f32>(b_0.w, b_1.w, b_2.w, b_3.w);
            s_0_0 += fma(vec4<f32>(a_0.w), b_w, fma(vec4<f32>(a_0.z), b_z, fma(vec4<f32>(a_0.y), b_y, a_0.x * b_x)));
            s_1_0 += fma(vec4<f32>(a_1.w), b_w, fma(vec4<f32>(a_1.z), b_z, fma(vec4<f32>(a_1.y), b_y, a_1.x * b_x)));
          }
          {
            let b_0 = memory[(tx + 4u * THREADS_C) * K_STEP_ROW + quad + 0u];
            let b_1 = memory[(tx + 5u * THREADS_C) * K_STEP_ROW + quad + 0u];
            let b_2 = memory[(tx + 6u * THREADS_C) * K_STEP_ROW + quad + 0u];
            let b_3 = memory[(tx + 7u * THREADS_C) * K_STEP_ROW + quad + 0u];
            let b_x = vec4<f32>(b_0.x, b_1.x, b_2.x, b_3.x);
            let b_y = vec4<f32>(b_0.y, b_1.y, b_2.y, b_3.y);
            let b_z = vec4<f32>(b_0.z, b_1.z, b_2.z, b_3.z);
            let b_w = vec4<f32>(b_0.w, b_1.w, b_2.w, b_3.w);
            s_0_1 += fma(vec4<f32>(a_0.w), b_w, fma(vec4<f32>(a_0.z), b_z, fma(vec4<f32>(a_0.y), b_y, a_0.x * b_x)));
            s_1_1 += fma(vec4<f32>(a_1.w), b_w, fma(vec4<f32>(a_1.z), b_z, fma(vec4<f32>(a_1.y), b_y, a_1.x * b_x)));
          }
        }
        {
          let a_0 = memory[ROW_STAGE + (ty + 0u * THREADS_R) * K_STEP_ROW + quad + 1u];
          let a_1 = memory[ROW_STAGE + (ty + 1u * THREADS_R) * K_STEP_ROW + quad + 1u];
          {
            let b_0 = memory[(tx + 0u * THREADS_C) * K_STEP_ROW + quad + 1u];
            let b_1 = memory[(tx + 1u * THREADS_C) * K_STEP_ROW + quad + 1u];
            let b_2 = memory[(tx + 2u * THREADS_C) * K_STEP_ROW + quad + 1u];
            let b_3 = memory[(tx + 3u * THREADS_C) * K_STEP_ROW + quad + 1u];
            let b_x = vec4<f32>(b_0.x, b_1.x, b_2.x, b_3.x);
            let b_y = vec4<f32>(b_0.y, b_1.y, b_2.y, b_3.y);
            let b_z = vec4<f32>(b_0.z, b_1.z, b_2.z, b_3.z);
            let b_w = vec4<f32>(b_0.w, b_1.w, b_2.w, b_3.w);
            s_0_0 += fma(vec4<f32>(a_0.w), b_w, fma(vec4<f32>(a_0.z), b_z, fma(vec4<f32>(a_0.y), b_y, a_0.x * b_x)));
            s_1_0 += fma(vec4<f32>(a_1.w), b_w, fma(vec4<f32>(a_1.z), b_z, fma(vec4<f32>(a_1.y), b_y, a_1.x * b_x)));
          }
          {
            let b_0 = memory[(tx + 4u * THREADS_C) * K_STEP_ROW + quad + 1u];
            let b_1 = memory[(tx + 5u * THREADS_C) * K_STEP_ROW + quad + 1u];
            let b_2 = memory[(tx + 6u * THREADS_C) * K_STEP_ROW + quad + 1u];
            let b_3 = memory[(tx + 7u * THREADS_C) * K_STEP_ROW + quad + 1u];
            let b_x = vec4<f32>(b_0.x, b_1.x, b_2.x, b_3.x);
            let b_y = vec4<f32>(b_0.y, b_1.y, b_2.y, b_3.y);
            let b_z = vec4<f32>(b_0.z, b_1.z, b_2.z, b_3.z);
            let b_w = vec4<f32>(b_0.w, b_1.w, b_2.w, b_3.w);
            s_0_1 += fma(vec4<f32>(a_0.w), b_w, fma(vec4<f32>(a_0.z), b_z, fma(vec4<f32>(a_0.y), b_y, a_0.x * b_x)));
            s_1_1 += fma(vec4<f32>(a_1.w), b_w, fma(vec4<f32>(a_1.z), b_z, fma(vec4<f32>(a_1.y), b_y, a_1.x * b_x)));
          }
        }
      }
    }

    // The largest visible score of each row in the tile.
    var thread_max_0 = 0.0;
    var thread_max_1 = 0.0;
    if (is_partial) {
      {
        var largest = vec4<f32>(LOWEST);
        largest = max(largest, select(vec4<f32>(LOWEST), s_0_0 * params.scale_sign, visible4(seq, row_0, column0 + 4u * (tx + 0u * THREADS_C))));
        largest = max(largest, select(vec4<f32>(LOWEST), s_0_1 * params.scale_sign, visible4(seq, row_0, column0 + 4u * (tx + 1u * THREADS_C))));
        thread_max_0 = max(max(largest.x, largest.y), max(largest.z, largest.w));
      }
      {
        var largest = vec4<f32>(LOWEST);
        largest = max(largest, select(vec4<f32>(LOWEST), s_1_0 * params.scale_sign, visible4(seq, row_1, column0 + 4u * (tx + 0u * THREADS_C))));
        largest = max(largest, select(vec4<f32>(LOWEST), s_1_1 * params.scale_sign, visible4(seq, row_1, column0 + 4u * (tx + 1u * THREADS_C))));
        thread_max_1 = max(max(largest.x, largest.y), max(largest.z, largest.w));
      }
    } else {
      {
        var largest = vec4<f32>(LOWEST);
        largest = max(largest, s_0_0 * params.scale_sign);
        largest = max(largest, s_0_1 * params.scale_sign);
        thread_max_0 = max(max(largest.x, largest.y), max(largest.z, largest.w));
      }
      {
        var largest = vec4<f32>(LOWEST);
        largest = max(largest, s_1_0 * params.scale_sign);
        largest = max(largest, s_1_1 * params.scale_sign);
        thread_max_1 = max(max(largest.x, largest.y), max(largest.z, largest.w));
      }
    }
    partials[(ty + 0u * THREADS_R) * THREADS_C + tx] = thread_max_0;
    partials[(ty + 1u * THREADS_R) * THREADS_C + tx] = thread_max_1;
    workgroupBarrier();
    var tile_max_0 = 0.0;
    {
      let at = (ty + 0u * THREADS_R) * THREADS_C;
      var x = partials[at];
      x = max(x, partials[at + 1u]);
      x = max(x, partials[at + 2u]);
      x = max(x, partials[at + 3u]);
      x = max(x, partials[at + 4u]);
      x = max(x, partials[at + 5u]);
      x = max(x, partials[at + 6u]);
      x = max(x, partials[at + 7u]);
      tile_max_0 = x;
    }
    var tile_max_1 = 0.0;
    {
      let at = (ty + 1u * THREADS_R) * THREADS_C;
      var x = partials[at];
      x = max(x, partials[at + 1u]);
      x = max(x, partials[at + 2u]);
      x = max(x, partials[at + 3u]);
      x = max(x, partials[at + 4u]);
      x = max(x, partials[at + 5u]);
      x = max(x, partials[at + 6u]);
      x = max(x, partials[at + 7u]);
      tile_max_1 = x;
    }

    // m = max(row_max, max of S by rows);  P = exp(S - m).
    let old_max_0 = row_max_0;
    row_max_0 = max(old_max_0, tile_max_0);
    s_0_0 = exp4(fma(s_0_0, vec4<f32>(params.scale_sign), vec4<f32>(-row_max_0)) * params.scale_size);
    s_0_1 = exp4(fma(s_0_1, vec4<f32>(params.scale_sign), vec4<f32>(-row_max_0)) * params.scale_size);
    let old_max_1 = row_max_1;
    row_max_1 = max(old_max_1, tile_max_1);
    s_1_0 = exp4(fma(s_1_0, vec4<f32>(params.scale_sign), vec4<f32>(-row_max_1)) * params.scale_size);
    s_1_1 = exp4(fma(s_1_1, vec4<f32>(params.scale_sign), vec4<f32>(-row_max_1)) * params.scale_size);
    if (is_partial) {
      s_0_0 = select(vec4<f32>(), s_0_0, visible4(seq, row_0, column0 + 4u * (tx + 0u * THREADS_C)));
      s_0_1 = select(vec4<f32>(), s_0_1, visible4(seq, row_0, column0 + 4u * (tx + 1u * THREADS_C)));
      s_1_0 = select(vec4<f32>(), s_1_0, visible4(seq, row_1, column0 + 4u * (tx + 0u * THREADS_C)));
      s_1_1 = select(vec4<f32>(), s_1_1, visible4(seq, row_1, column0 + 4u * (tx + 1u * THREADS_C)));
    }

    // O *= exp(row_max - m);  row_sum = exp(row_max - m) row_sum + sum of P.
    {
      let rescale = exp1((old_max_0 - row_max_0) * params.scale_size);
      o_0_0 *= rescale;
      o_0_1 *= rescale;
      var total = s_0_0;
      total += s_0_1;
      row_sum_0 = fma(row_sum_0, rescale, (total.x + total.y) + (total.z + total.w));
    }
    {
      let rescale = exp1((old_max_1 - row_max_1) * params.scale_size);
      o_1_0 *= rescale;
      o_1_1 *= rescale;
      var total = s_1_0;
      total += s_1_1;
      row_sum_1 = fma(row_sum_1, rescale, (total.x + total.y) + (total.z + total.w));
    }
    memory[(ty + 0u * THREADS_R) * P_ROW + tx + 0u * THREADS_C] = s_0_0;
    memory[(ty + 0u * THREADS_R) * P_ROW + tx + 1u * THREADS_C] = s_0_1;
    memory[(ty + 1u * THREADS_R) * P_ROW + tx + 0u * THREADS_C] = s_1_0;
    memory[(ty + 1u * THREADS_R) * P_ROW + tx + 1u * THREADS_C] = s_1_1;

    // O += P V.
    // Loop: n_steps
    for (var first = 0u; first < 64u; first += N_STEP) {
      var share_0 = vec4<f32>();
      {
        let item = thread + 0u;
        let staged = item / 16u;
        let quad = 0u + item % 16u;
        let source = column0 + first + staged;
        if (source < column_limit) {
          share_0 = load_v(v_base + source * params.v.seq, quad);
          if (is_partial && !is_finite4(share_0)) { atomicStore(&nonfinite_step, step + 1u); }
        }
      }
      var share_1 = vec4<f32>();
      {
        let item = thread + 128u;
        let staged = item / 16u;
        let quad = 0u + item % 16u;
        let source = column0 + first + staged;
        if (source < column_limit) {
          share_1 = load_v(v_base + source * params.v.seq, quad);
          if (is_partial && !is_finite4(share_1)) { atomicStore(&nonfinite_step, step + 1u); }
        }
      }
      if (first != 0u) { workgroupBarrier(); }
      {
        let item = thread + 0u;
        { memory[N_STAGE + item / 16u * 16u + item % 16u] = share_0; }
      }
      {
        let item = thread + 128u;
        { memory[N_STAGE + item / 16u * 16u + item % 16u] = share_1; }
      }
      workgroupBarrier();
      if (is_partial && atomicLoad(&nonfinite_step) == step + 1u) {
        // A hidden column may be NaN or infinite, and 0 times it is NaN: hidden pairs are skipped.
        for (var j = 0u; j < N_STEP; j += 1u) {
          let column = column0 + first + j;
          if (visible4(seq, row_0, column).x) {
            let p = memory[(ty + 0u * THREADS_R) * P_ROW + (first + j) / 4u][(first + j) % 4u];
            o_0_0 = fma(vec4<f32>(p), memory[N_STAGE + j * 16u + tx + 0u * THREADS_C], o_0_0);
            o_0_1 = fma(vec4<f32>(p), memory[N_STAGE + j * 16u + tx + 1u * THREADS_C], o_0_1);
          }
          if (visible4(seq, row_1, column).x) {
            let p = memory[(ty + 1u * THREADS_R) * P_ROW + (first + j) / 4u][(first + j) % 4u];
            o_1_0 = fma(vec4<f32>(p), memory[N_STAGE + j * 16u + tx + 0u * THREADS_C], o_1_0);
            o_1_1 = fma(vec4<f32>(p), memory[N_STAGE + j * 16u + tx + 1u * THREADS_C], o_1_1);
          }
        }
      } else {
        // Loop: inner
        for (var quad = 0u; quad < N_STEP / 4u; quad += 1u) {
          let p_0 = memory[(ty + 0u * THREADS_R) * P_ROW + first / 4u + quad];
          let p_1 = memory[(ty + 1u * THREADS_R) * P_ROW + first / 4u + quad];
          {
            let at = N_STAGE + (quad * 4u + 0u) * 16u + tx;
            let b_0 = memory[at + 0u * THREADS_C];
            let b_1 = memory[at + 1u * THREADS_C];
            o_0_0 = fma(vec4<f32>(p_0.x), b_0, o_0_0);
            o_0_1 = fma(vec4<f32>(p_0.x), b_1, o_0_1);
            o_1_0 = fma(vec4<f32>(p_1.x), b_0, o_1_0);
            o_1_1 = fma(vec4<f32>(p_1.x), b_1, o_1_1);
          }
          {
            let at = N_STAGE + (quad * 4u + 1u) * 16u + tx;
            let b_0 = memory[at + 0u * THREADS_C];
            let b_1 = memory[at + 1u * THREADS_C];
            o_0_0 = fma(vec4<f32>(p_0.y), b_0, o_0_0);
            o_0_1 = fma(vec4<f32>(p_0.y), b_1, o_0_1);
            o_1_0 = fma(vec4<f32>(p_1.y), b_0, o_1_0);
            o_1_1 = fma(vec4<f32>(p_1.y), b_1, o_1_1);
          }
          {
            let at = N_STAGE + (quad * 4u + 2u) * 16u + tx;
            let b_0 = memory[at + 0u * THREADS_C];
            let b_1 = memory[at + 1u * THREADS_C];
            o_0_0 = fma(vec4<f32>(p_0.z), b_0, o_0_0);
            o_0_1 = fma(vec4<f32>(p_0.z), b_1, o_0_1);
            o_1_0 = fma(vec4<f32>(p_1.z), b_0, o_1_0);
            o_1_1 = fma(vec4<f32>(p_1.z), b_1, o_1_1);
          }
          {
            let at = N_STAGE + (quad * 4u + 3u) * 16u + tx;
            let b_0 = memory[at + 0u * THREADS_C];
            let b_1 = memory[at + 1u * THREADS_C];
            o_0_0 = fma(vec4<f32>(p_0.w), b_0, o_0_0);
            o_0_1 = fma(vec4<f32>(p_0.w), b_1, o_0_1);
            o_1_0 = fma(vec4<f32>(p_1.w), b_0, o_1_0);
            o_1_1 = fma(vec4<f32>(p_1.w), b_1, o_1_1);
          }
        }
      }
    }
    step += 1u;
  }
  workgroupBarrier();
  partials[(ty + 0u * THREADS_R) * THREADS_C + tx] = row_sum_0;
  partials[(ty + 1u * THREADS_R) * THREADS_C + tx] = row_sum_1;
  workgroupBarrier();
  var total_0 = 0.0;
  {
    let at = (ty + 0u * THREADS_R) * THREADS_C;
    var x = partials[at];
    x += partials[at + 1u];
    x += partials[at + 2u];
    x += partials[at + 3u];
    x += partials[at + 4u];
    x += partials[at + 5u];
    x += partials[at + 6u];
    x += partials[at + 7u];
    total_0 = x;
  }
  var total_1 = 0.0;
  {
    let at = (ty + 1u * THREADS_R) * THREADS_C;
    var x = partials[at];
    x += partials[at + 1u];
    x += partials[at + 2u];
    x += partials[at + 3u];
    x += partials[at + 4u];
    x += partials[at + 5u];
    x += partials[at + 6u];
    x += partials[at + 7u];
    total_1 = x;
  }
  let end_0 = finish_row(row_max_0, total_0, work.head);
  let factor_0 = end_0.factor;
  if (tx == 0u && row_0 < row_limit) { lse[lse_base + row_0] = select(params.negative_infinity, end_0.lse, row_0 < seq.seq_q); }
  let end_1 = finish_row(row_max_1, total_1, work.head);
  let factor_1 = end_1.factor;
  if (tx == 0u && row_1 < row_limit) { lse[lse_base + row_1] = select(params.negative_infinity, end_1.lse, row_1 < seq.seq_q); }
  if (row_0 < row_limit) {
    let base = o_base + row_0 * params.o.seq;
    if (tx + 0u * THREADS_C < 16u) {
      store_o(base, tx + 0u * THREADS_C, o_0_0 * factor_0);
    }
    if (tx + 1u * THREADS_C < 16u) {
      store_o(base, tx + 1u * THREADS_C, o_0_1 * factor_0);
    }
  }
  if (row_1 < row_limit) {
    let base = o_base + row_1 * params.o.seq;
    if (tx + 0u * THREADS_C < 16u) {
      store_o(base, tx + 0u * THREADS_C, o_1_0 * factor_1);
    }
    if (tx + 1u * THREADS_C < 16u) {
      store_o(base, tx + 1u * THREADS_C, o_1_1 * factor_1);
    }
  }
}
