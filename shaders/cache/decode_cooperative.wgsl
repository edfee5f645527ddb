{#- One query against many cached keys, in f16 on cooperative matrices. One workgroup, a single subgroup, computes the query heads of one
    key head, up to `rows` of them, against one split of the keys, and `combine` adds up the splits. Rows of a fragment are query heads,
    columns are keys:

      row_max = floor;  row_sum = 0;  O = 0
      for each tile of keys of the split:
        K and V from registers to workgroup memory       stage: hidden values are zeroed before
        load K and V, `ahead` tiles on                   load
        S = Q K^T                                        scores: softcap and ALiBi where asked for
        S = hidden where the rule hides                  mask
        m = max(row_max, max of S by rows)               row_max
        O *= exp(row_max - m);  row_sum *= the same      rescale
        P = exp(S - m)                                   exponentiate
        row_sum += sum of P by rows                      row_sum
        O += P V                                         accumulate
      partial state = O, row_max, row_sum                finish

    Registers hold the next tiles, so that loads are always under way. WGSL has no arithmetic on a fragment's elements: S, P and O go through
    workgroup memory, LANES_A_ROW lanes a row. -#}
enable f16;
enable wgpu_cooperative_matrix;
# include "params.wgsl"
# include "operands.wgsl"
# include "exp.wgsl"
# include "cache/range.wgsl"
# from "cache/group.wgsl" import begin_group

{#- Scores are more than products, which the exponential scales. -#}
# set formed = softcap or alibi
const LANES_A_ROW: u32 = {{ lanes // rows }}u;
// Vectors of 16 bytes in a row of keys and of values.
const KEY_ROW: u32 = {{ row_vectors.k }}u;
const VALUE_ROW: u32 = {{ row_vectors.v }}u;
// In vectors of 8 bytes, and of 16: padded, so that neighbouring rows start in different banks.
const K_PITCH: u32 = {{ pitches.k }}u;
const V_PITCH: u32 = {{ pitches.v }}u;
const TILE_ROW: u32 = {{ tile_row }}u;
const HIDDEN: f32 = -1e30;
// row_max may lag behind by this power of two, within the range of f16, before O is rescaled.
const SLACK: f32 = 8.0;
var<workgroup> k_stage: array<vec4<f16>, {{ pitches.k * tile }}>;
var<workgroup> v_stage: array<vec4<f16>, {{ pitches.v * tile }}>;
// S, and O on its way to be rescaled or written.
var<workgroup> score_rows: array<vec4<f32>, {{ side * tile_row }}>;
// P, and before the loop Q.
var<workgroup> p_tile: array<vec4<f16>, {{ side * tile_row }}>;

// The first row that is read for a tile from `start` on: none lies beyond its block.
fn first_row_of(block: u32, kv_head: u32, start: u32) -> u32 {
  let base = (block * params.kv_heads + kv_head) * params.block_rows;
# if paged
  return base + (start & (params.block_rows - 1u));
# else
  return base + min(start, params.block_rows - TILE);
# endif
}

fn halves4(raw: vec2<u32>) -> vec4<f16> {
  return vec4<f16>(vec4<f32>(unpack2x16float(raw.x), unpack2x16float(raw.y)));
}

{#- Waits for the other lanes of the subgroup, where lanes do not run in step. -#}
{%- macro sync() %}{% if not in_step %}subgroupBarrier();{% endif %}{% endmacro -%}

{#- The type of a fragment: A, B or C, left operand, right operand or result. -#}
{%- macro fragment(role) %}coop_mat{{ side }}x{{ side }}<{{ "f32" if role == "C" else "f16" }}, {{ role }}>{% endmacro -%}

{#- `row`, the first row that is read for a tile from `start` on. -#}
# macro row_of_tile(start)
# if paged
      let page = {{ start }} >> params.block_shift;
      if (page - first_page >= {{ lanes }}u) {
        first_page = page;
        pages = state[table + min(page + lane, params.table_row - 1u)];
      }
      let block = subgroupShuffle(pages, page - first_page);
# else
      let block = sequence;
# endif
      let row = first_row_of(block, kv_head, {{ start }});
# endmacro

{#- Loads a lane's vectors of a tile whose first row is `row`. -#}
# macro load(name, a)
# set cache = "keys" if name == "k" else "values"
# set pitch = "KEY_ROW" if name == "k" else "VALUE_ROW"
# set width = data_vectors[name] ~ "u"
# for n in range(tile_vectors[name])
    {
      let item = lane + {{ n * lanes }}u;
      {{ name }}_{{ a }}_{{ n }} = {{ cache }}[(row + item / {{ width }}) * {{ pitch }} + item % {{ width }}];
    }
# endfor
# endmacro

{#- Stores a lane's vectors of a tile in workgroup memory. -#}
# macro stage(name, a)
# for n in range(tile_vectors[name])
      {
        let item = lane + {{ n * lanes }}u;
        let at = item / {{ data_vectors[name] }}u * {{ name | upper }}_PITCH + item % {{ data_vectors[name] }}u * 2u;
        let raw = {{ name }}_{{ a }}_{{ n }};
        {{ name }}_stage[at] = halves4(raw.xy);
        {{ name }}_stage[at + 1u] = halves4(raw.zw);
      }
# endfor
# endmacro

{#- The largest number, or the sum, of the lanes of a row. -#}
# macro reduce_row(x, reduction)
# for n in [1, 2, 4] if n < lanes // rows
# if reduction == "sum"
  {{ x }} += subgroupShuffleXor({{ x }}, {{ n }}u);
# else
  {{ x }} = max({{ x }}, subgroupShuffleXor({{ x }}, {{ n }}u));
# endif
# endfor
# endmacro

{#- The fragment f of O by rows in `score_rows`. -#}
# macro store_rows(f)
      {{ sync() }}
      coopStoreT(o_{{ f }}, &score_rows[0], TILE_ROW);
      {{ sync() }}
# endmacro

{#- The first tiles of the split, with their loads under way. A shorter sequence has fewer splits, and the remaining workgroups find no tile.
    No lane returns, because all lanes must meet at matrices. -#}
# macro load_first_tiles()
  let end = min((split + 1u) * range.split_tiles, range.tiles);
  let last_tile = max(end, 1u) - 1u;
  let first_tile = split * range.split_tiles;
  var tile = first_tile;
# if paged
  // Each lane holds a page of the block table, from this one on: a lookup for each tile would delay the loads of its rows.
  let table = params.table + sequence * params.table_row;
  var first_page = tile_start(range, min(tile, last_tile)) >> params.block_shift;
  var pages = state[table + min(first_page + lane, params.table_row - 1u)];
# endif
# for a in range(ahead)
# for name in ["k", "v"]
# for n in range(tile_vectors[name])
  var {{ name }}_{{ a }}_{{ n }} = vec4<u32>();
# endfor
# endfor
  {
    let start = tile_start(range, min(tile + {{ a }}u, last_tile));
{{ row_of_tile("start") }}
{{ load("k", a) }}
{{ load("v", a) }}
  }
# endfor
# endmacro

{#- The queries times the sign of the scale, and O = 0. -#}
# macro load_q()
# for f in range(features.k)
  for (var quad = part; quad < {{ side // 4 }}u; quad += LANES_A_ROW) {
    var x = vec4<f32>();
    if (first_row + row < heads_per_kv) {
      let base = operand_base(params.q, entry, kv_head * heads_per_kv + first_row + row);
      x = load_q(base, {{ f * side // 4 }}u + quad) * sign(params.scale);
    }
    p_tile[row * TILE_ROW + quad] = vec4<f16>(x);
  }
  {{ sync() }}
  let q_{{ f }} = coopLoadT<{{ fragment("A") }}>(&p_tile[0], TILE_ROW);
  {{ sync() }}
# endfor
# for f in range(features.v)
  var o_{{ f }} = {{ fragment("C") }}();
# endfor
# endmacro

# macro begin_softmax()
  // Where nothing has been seen the maximum is finite, and so far above hidden scores that their probabilities are zero.
  var row_max = 0.5 * HIDDEN;
  // Scores above the limit raise the maximum.
  var limit = 0.5 * HIDDEN;
  var row_sum = 0.0;
# if has_row_max
  // The largest visible score of this lane's columns, which row_max may lag behind.
  var largest = HIDDEN;
# endif
# endmacro

{#- A hidden value may be a NaN, and 0 times a NaN is one: it is staged as zero. Runs at most once; a loop, because with an `if` NVIDIA's
    compiler moves the registers of fragments. -#}
# macro zero_hidden_values(a)
    var hides_values = is_partial;
    loop {
      if (!hides_values) { break; }
      hides_values = false;
# for n in range(tile_vectors.v)
      {
        let place = first + (lane + {{ n * lanes }}u) / {{ data_vectors.v }}u;
        if (place < start || !visible(position, place, range.keys)) { v_{{ a }}_{{ n }} = vec4<u32>(); }
      }
# endfor
    }
# endmacro

{#- S = Q K^T, by rows: quad n of this lane is s_n. -#}
# macro scores()
    // S = Q K^T{{ ", with softcap" if softcap }}.
# for c in range(columns)
    var fragment_{{ c }} = {{ fragment("C") }}();
# for f in range(features.k)
# set k = "coopLoad<" ~ fragment("B") ~ ">(&k_stage[" ~ c * side ~ "u * K_PITCH + " ~ f * side // 4 ~ "u], K_PITCH)"
    fragment_{{ c }} = coopMultiplyAdd(q_{{ f }}, {{ k }}, fragment_{{ c }});
# endfor
    coopStoreT(fragment_{{ c }}, &score_rows[{{ c * side // 4 }}u], TILE_ROW);
# endfor
    {{ sync() }}
# for n in range(lane_quads)
    var s_{{ n }} = score_rows[row_at + {{ n * lanes // rows }}u];
# if softcap
    s_{{ n }} *= abs(params.scale) / params.softcap;
    // Drivers' own functions overflow for large numbers.
    s_{{ n }} = params.softcap * tanh(select(s_{{ n }}, sign(s_{{ n }}) * 20.0, abs(s_{{ n }}) > vec4<f32>(20.0)));
# elif alibi
    s_{{ n }} *= abs(params.scale);
# endif
# if alibi
    // S -= slope |p - j|, exact below 2^24.
    let places_{{ n }} = vec4<i32>(i32(first + 4u * (part + {{ n * lanes // rows }}u))) + vec4<i32>(0, 1, 2, 3);
    s_{{ n }} -= slope * vec4<f32>(abs(vec4<i32>(position) - places_{{ n }}));
# endif
# endfor
# endmacro

# macro mask()
    var hides_scores = is_partial;
    loop {
      if (!hides_scores) { break; }
      hides_scores = false;
# for n, e in pairs(lane_quads, 4)
      {
        let place = first + 4u * (part + {{ n * lanes // rows }}u) + {{ e }}u;
        if (place < start || !visible(position, place, range.keys)) { s_{{ n }}.{{ xyzw[e] }} = HIDDEN; }
      }
# endfor
    }
# if has_row_max
    {
      var largest4 = s_0;
# for n in range(1, lane_quads)
      largest4 = max(largest4, s_{{ n }});
# endfor
      largest = max(largest, max(max(largest4.x, largest4.y), max(largest4.z, largest4.w)));
    }
# endif
# endmacro

{#- m = max(row_max, max of S by rows), for rows that have passed their limit. A NaN among scores makes the row NaN, but not its maximum: a
    maximum below another score would not end the loop. -#}
# macro row_max()
      let old_max = row_max;
      {
        var tile_max4 = vec4<f32>(limit);
# for n in range(lane_quads)
        tile_max4 = select(tile_max4, s_{{ n }}, s_{{ n }} > tile_max4);
# endfor
        var tile_max = max(max(tile_max4.x, tile_max4.y), max(tile_max4.z, tile_max4.w));
{{ reduce_row("tile_max", "max") }}
        if (tile_max > limit) {
          row_max = tile_max;
          limit = tile_max + SLACK / scale;
        }
      }
# endmacro

{#- O *= exp(row_max - m), and row_sum. -#}
# macro rescale()
      let rescale = exp2((old_max - row_max) * scale);
      row_sum *= rescale;
      // The first tile finds O = 0.
      if (tile == first_tile) { continue; }
# for f in range(features.v)
{{ store_rows(f) }}
      for (var quad = part; quad < {{ side // 4 }}u; quad += LANES_A_ROW) { score_rows[row * TILE_ROW + quad] *= rescale; }
      {{ sync() }}
      o_{{ f }} = coopLoadT<{{ fragment("C") }}>(&score_rows[0], TILE_ROW);
# endfor
      {{ sync() }}
# endmacro

{#- P = exp(S - m). -#}
{%- macro exponentiate(n) %}exp2((s_{{ n }} - row_max) * scale){% endmacro -%}

{#- The sum of P of the columns of this lane; `finish` adds up the lanes of a row. -#}
{%- macro row_sum(n) %}row_sum += (p_{{ n }}.x + p_{{ n }}.y) + (p_{{ n }}.z + p_{{ n }}.w);{% endmacro -%}

{#- The online softmax. row_max follows only when it has grown by more than SLACK, which is rare. It leaves P as the P tile. -#}
# macro softmax()
    // m = max(row_max, max of S by rows);  O and row_sum *= exp(row_max - m). Runs at most once.
    loop {
      if (!subgroupAny(any({% for n in range(lane_quads) %}{{ " | " if n }}(s_{{ n }} > vec4<f32>(limit)){% endfor %}))) { break; }
{{ row_max() }}
{{ rescale() }}
    }
    // P = exp(S - m);  row_sum += sum of P.
# for n in range(lane_quads)
    let p_{{ n }} = {{ exponentiate(n) }};
    {{ row_sum(n) }}
    p_tile[row_at + {{ n * lanes // rows }}u] = vec4<f16>(p_{{ n }});
# endfor
# endmacro

{#- O += P V. -#}
# macro accumulate()
    // O += P V.
# for c in range(columns)
    {
      let p = coopLoadT<{{ fragment("A") }}>(&p_tile[{{ c * side // 4 }}u], TILE_ROW);
# for f in range(features.v)
# set v = "coopLoadT<" ~ fragment("B") ~ ">(&v_stage[" ~ c * side ~ "u * V_PITCH + " ~ f * side // 4 ~ "u], V_PITCH)"
      o_{{ f }} = coopMultiplyAdd(p, {{ v }}, o_{{ f }});
# endfor
    }
# endfor
# endmacro

{#- The partial state of a row: O, and behind it row_max, row_sum and the largest score. -#}
# macro finish()
{{ reduce_row("row_sum", "sum") }}
# if has_row_max
{{ reduce_row("largest", "max") }}
  largest = select(largest{{ " * abs(params.scale)" if not formed }}, LOWEST, row_sum == 0.0);
# endif
  let index = (entry * params.heads + kv_head * heads_per_kv + first_row + row) * params.most_splits + split;
  let writes = first_row + row < heads_per_kv && split < range.splits;
# for f in range(features.v)
{{ store_rows(f) }}
  for (var quad = part; quad < {{ side // 4 }}u; quad += LANES_A_ROW) {
    if (writes) { partials[index * {{ operand_quads.o + 1 }}u + {{ f * side // 4 }}u + quad] = score_rows[row * TILE_ROW + quad]; }
  }
# endfor
  // The maximum as a score, for `combine` takes powers of e. It is LOWEST where nothing has been seen.
  let score = select(row_max{{ " * abs(params.scale)" if not formed }}, LOWEST, row_sum == 0.0);
  if (writes && part == 0u) {
    partials[index * {{ operand_quads.o + 1 }}u + {{ operand_quads.o }}u] = vec4<f32>(score, row_sum, {{ "largest" if has_row_max else "0.0" }}, 0.0);
  }
# endmacro

@compute @workgroup_size({{ lanes }})
fn main(
  @builtin(workgroup_id) workgroup: vec3<u32>,
  @builtin(num_workgroups) grid: vec3<u32>,
  @builtin(subgroup_invocation_id) lane: u32,
) {
{{ begin_group() }}
  let first_row = workgroup.x % params.row_tiles * {{ rows }}u;
  // A lane's row, and its place among the lanes of that row.
  let row = lane / LANES_A_ROW;
  let part = lane % LANES_A_ROW;
  let row_at = row * TILE_ROW + part;
  // Position of the query.
  let position = i32(range.keys) - 1;
# if alibi
  // Rows beyond the last query head have its slope.
  let slope = alibi_slopes[params.slope_offset + kv_head * heads_per_kv + min(first_row + row, heads_per_kv - 1u)];
# endif
# if formed
  let scale = LOG2_E;
# else
  // Never zero, so that hidden scores stay hidden.
  let scale = max(abs(params.scale) * LOG2_E, 1e-25);
# endif

{{ load_first_tiles() }}
{{ load_q() }}
{{ begin_softmax() }}
  loop {
# for a in range(ahead)
    if (tile >= end) { break; }
    {
    let start = tile_start(range, tile);
    // The place of the first row that was read.
    let first = {{ "start" if paged else "min(start, params.block_rows - TILE)" }};
    // Whether the query does not see some key of the tile.
    let is_partial = start + TILE > range.keys || i32(start + TILE) - 1 > position + params.right
      || (i32(start) < position - params.left && start + TILE > params.sink_tokens);
{{ zero_hidden_values(a) }}
{{ stage("k", a) }}
{{ stage("v", a) }}
    {
      let next = tile_start(range, min(tile + {{ ahead }}u, last_tile));
{{ row_of_tile("next") }}
{{ load("k", a) }}
{{ load("v", a) }}
    }
    {{ sync() }}
{{ scores() }}
{{ mask() }}
{{ softmax() }}
    {{ sync() }}
{{ accumulate() }}
    {{ sync() }}
    tile += 1u;
    }
# endfor
  }
{{ finish() }}
}
