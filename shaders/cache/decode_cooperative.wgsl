{#- One query against many cached keys on cooperative matrices, f16: as `decode`, with one subgroup a workgroup. Rows of a fragment are
    query heads of one key head, of which up to ROWS are used; columns are keys.

    Tiles of keys and values go from the cache into registers, as many tiles ahead as are to be on their way, then into workgroup
    memory, whence fragments are loaded. Scores go through a strip there to become weights; what is hidden may be a NaN, and is
    staged as zeros among the values. -#}
enable f16;
enable wgpu_cooperative_matrix;
{% include "params.wgsl" %}
{% include "operands.wgsl" %}
{% include "exp.wgsl" %}
{% include "cache/range.wgsl" %}

const LANES_A_ROW: u32 = {{ lanes // rows }}u;
// Vectors of 16 bytes in a row of keys and of values.
const KEY_ROW: u32 = {{ row_vectors.k }}u;
const VALUE_ROW: u32 = {{ row_vectors.v }}u;
// In vectors of 8 bytes, and of 16: padded, so that neighbouring rows start in different banks.
const K_PITCH: u32 = {{ pitches.k }}u;
const V_PITCH: u32 = {{ pitches.v }}u;
const STRIP_ROW: u32 = {{ strip_row }}u;
const HIDDEN: f32 = -1e30;
// The maximum of a row may stay behind by so many powers of two, within f16, before its output is rescaled.
const SLACK: f32 = 8.0;
var<workgroup> k_stage: array<vec4<f16>, {{ pitches.k * tile }}>;
var<workgroup> v_stage: array<vec4<f16>, {{ pitches.v * tile }}>;
var<workgroup> strip: array<vec4<f32>, {{ side * strip_row }}>;
var<workgroup> weights: array<vec4<f16>, {{ side * strip_row }}>;

{% macro sync() %}{% if not in_step %}subgroupBarrier();{% endif %}{% endmacro %}

// The first row that is read for a tile from `start` on: none lies beyond its block.
fn first_row_of(block: u32, kv_head: u32, start: u32) -> u32 {
  let base = (block * params.kv_heads + kv_head) * params.block_rows;
{% if paged %}
  return base + (start & (params.block_rows - 1u));
{% else %}
  return base + min(start, params.block_rows - TILE);
{% endif %}
}

{#- The first row that is read for a tile from `start` on. -#}
{% macro row_of_tile(start) %}
{% if paged %}
      let page = {{ start }} >> params.block_shift;
      if (page - first_page >= {{ lanes }}u) {
        first_page = page;
        pages = state[table + min(page + lane, params.table_row - 1u)];
      }
      let block = subgroupShuffle(pages, page - first_page);
{% else %}
      let block = sequence;
{% endif %}
      let row = first_row_of(block, kv_head, {{ start }});
{% endmacro %}
{#- A lane's vectors of a tile whose first row is `row`. -#}
{% macro load(name, a, row) %}
{% set buffer = "keys" if name == "k" else "values" %}
{% for n in range(tile_vectors[name]) %}
    {
      let item = lane + {{ n * lanes }}u;
      {{ name }}_{{ a }}_{{ n }} = {{ buffer }}[({{ row }} + item / {{ data_vectors[name] }}u) * {{ "KEY_ROW" if name == "k" else "VALUE_ROW" }} + item % {{ data_vectors[name] }}u];
    }
{% endfor %}
{% endmacro %}
{% macro put(name, a) %}
{% for n in range(tile_vectors[name]) %}
      {
        let item = lane + {{ n * lanes }}u;
        let at = item / {{ data_vectors[name] }}u * {{ name | upper }}_PITCH + item % {{ data_vectors[name] }}u * 2u;
        let raw = {{ name }}_{{ a }}_{{ n }};
        {{ name }}_stage[at] = halves4(raw.xy);
        {{ name }}_stage[at + 1u] = halves4(raw.zw);
      }
{% endfor %}
{% endmacro %}

fn halves4(raw: vec2<u32>) -> vec4<f16> {
  return vec4<f16>(vec4<f32>(unpack2x16float(raw.x), unpack2x16float(raw.y)));
}

@compute @workgroup_size({{ lanes }})
fn main(
  @builtin(workgroup_id) workgroup: vec3<u32>,
  @builtin(num_workgroups) grid: vec3<u32>,
  @builtin(subgroup_invocation_id) lane: u32,
) {
  let split = workgroup.x / params.row_tiles;
  // Key heads of sequences are numbered along both of the other axes.
  let number_of_group = workgroup.y + workgroup.z * grid.y;
  if (number_of_group >= params.groups) { return; }
  let kv_head = number_of_group % params.kv_heads;
  let entry = number_of_group / params.kv_heads;
  let sequence = {{ "entries[entry]" if indexed else "entry" }};
  let range = key_range(sequence);
  let group = params.heads / params.kv_heads;
  let first_row = workgroup.x % params.row_tiles * {{ rows }}u;
  // A lane's row, and its place among the lanes of that row.
  let row = lane / LANES_A_ROW;
  let part = lane % LANES_A_ROW;
  let strip_at = row * STRIP_ROW + part;
  // Position of the query.
  let position = i32(range.keys) - 1;
{% if softcap %}
  let scale = LOG2_E;
{% else %}
  // Never zero, so that hidden scores stay hidden.
  let scale = max(abs(params.scale) * LOG2_E, 1e-25);
{% endif %}

  // A shorter sequence has fewer splits: the others find no tile. None returns, as all must meet at matrices.
  let end = min((split + 1u) * range.split_tiles, range.tiles);
  let last_tile = max(end, 1u) - 1u;
  let first_tile = split * range.split_tiles;
  var tile = first_tile;
{% if paged %}
  // Each lane holds a page of the block table, from this one on: a lookup a tile would be waited for with the tile's rows.
  let table = params.table + sequence * params.table_row;
  var first_page = tile_start(range, min(tile, last_tile)) >> params.block_shift;
  var pages = state[table + min(first_page + lane, params.table_row - 1u)];
{% endif %}
{% for a in range(ahead) %}
{% for name in ["k", "v"] %}{% for n in range(tile_vectors[name]) %}
  var {{ name }}_{{ a }}_{{ n }} = vec4<u32>();
{% endfor %}{% endfor %}
  {
    let start = tile_start(range, min(tile + {{ a }}u, last_tile));
{{ row_of_tile("start") }}
{{ load("k", a, "row") }}{{ load("v", a, "row") }}
  }
{% endfor %}

  // The sign of the scale goes with the queries.
{% for f in range(features.k) %}
  for (var quad = part; quad < {{ side // 4 }}u; quad += LANES_A_ROW) {
    var x = vec4<f32>();
    if (first_row + row < group) {
      let base = operand_base(params.q, entry, kv_head * group + first_row + row);
      x = load_q(base, {{ f * side // 4 }}u + quad) * sign(params.scale);
    }
    weights[row * STRIP_ROW + quad] = vec4<f16>(x);
  }
  {{ sync() }}
  let q_{{ f }} = coopLoadT<coop_mat{{ side }}x{{ side }}<f16, A>>(&weights[0], STRIP_ROW);
  {{ sync() }}
{% endfor %}
{% for f in range(features.v) %}
  var o_{{ f }} = coop_mat{{ side }}x{{ side }}<f32, C>();
{% endfor %}
  // Where nothing has been seen the maximum is finite, and so far above hidden scores that their weights are zero.
  var most = 0.5 * HIDDEN;
  // What scores may reach before it follows.
  var limit = 0.5 * HIDDEN;
  var sum = 0.0;
{% if has_row_max %}
  // The maximum of now, of the columns of this lane.
  var largest = HIDDEN;
{% endif %}

  loop {
{% for a in range(ahead) %}
    if (tile >= end) { break; }
    {
    let start = tile_start(range, tile);
{% if paged %}
    let first = start;
{% else %}
    let first = min(start, params.block_rows - TILE);
{% endif %}
    let masked = start + TILE > range.keys || i32(start + TILE) - 1 > position + params.right
      || (i32(start) < position - params.left && start + TILE > params.sink_tokens);
    var hides = masked;
    loop {
      if (!hides) { break; }
      hides = false;
{% for n in range(tile_vectors.v) %}
      {
        let place = first + (lane + {{ n * lanes }}u) / {{ data_vectors.v }}u;
        if (place < start || !visible(position, place, range.keys)) { v_{{ a }}_{{ n }} = vec4<u32>(); }
      }
{% endfor %}
    }
{{ put("k", a) }}{{ put("v", a) }}
    {
      let next = tile_start(range, min(tile + {{ ahead }}u, last_tile));
{{ row_of_tile("next") }}
{{ load("k", a, "row") }}{{ load("v", a, "row") }}
    }
    {{ sync() }}
{% for c in range(columns) %}
    var s_{{ c }} = coop_mat{{ side }}x{{ side }}<f32, C>();
{% for f in range(features.k) %}
    s_{{ c }} = coopMultiplyAdd(q_{{ f }}, coopLoad<coop_mat{{ side }}x{{ side }}<f16, B>>(&k_stage[{{ c * side }}u * K_PITCH + {{ f * side // 4 }}u], K_PITCH), s_{{ c }});
{% endfor %}
    coopStoreT(s_{{ c }}, &strip[{{ c * side // 4 }}u], STRIP_ROW);
{% endfor %}
    {{ sync() }}
{% for n in range(lane_quads) %}
    var x_{{ n }} = strip[strip_at + {{ n * lanes // rows }}u];
{% if softcap %}
    x_{{ n }} *= abs(params.scale) / params.softcap;
    // Drivers' own overflows for large numbers.
    x_{{ n }} = params.softcap * tanh(select(x_{{ n }}, sign(x_{{ n }}) * 20.0, abs(x_{{ n }}) > vec4<f32>(20.0)));
{% endif %}
{% endfor %}
    var masks = masked;
    loop {
      if (!masks) { break; }
      masks = false;
{% for n in range(lane_quads) %}{% for e in range(4) %}
      {
        let place = first + 4u * (part + {{ n * lanes // rows }}u) + {{ e }}u;
        if (place < start || !visible(position, place, range.keys)) { x_{{ n }}.{{ xyzw[e] }} = HIDDEN; }
      }
{% endfor %}{% endfor %}
    }
{% if has_row_max %}
    {
      var largest4 = x_0;
{% for n in range(1, lane_quads) %}
      largest4 = max(largest4, x_{{ n }});
{% endfor %}
      largest = max(largest, max(max(largest4.x, largest4.y), max(largest4.z, largest4.w)));
    }
{% endif %}
    loop {
      if (!subgroupAny(any({% for n in range(lane_quads) %}{{ " | " if n > 0 }}(x_{{ n }} > vec4<f32>(limit)){% endfor %}))) { break; }
      let before = most;
      {
        var top4 = x_0;
{% for n in range(1, lane_quads) %}
        top4 = max(top4, x_{{ n }});
{% endfor %}
        var top = max(max(top4.x, top4.y), max(top4.z, top4.w));
{% for n in [1, 2, 4] %}{% if n < lanes // rows %}
        top = max(top, subgroupShuffleXor(top, {{ n }}u));
{% endif %}{% endfor %}
        // A NaN, which a maximum may keep, becomes the limit: else the loop would not end.
        if (top > limit || (bitcast<u32>(top) & 0x7fffffffu) > 0x7f800000u) {
          most = top;
          limit = top + SLACK / scale;
        }
      }
      let rescale = exp2((before - most) * scale);
      sum *= rescale;
      // Nothing to rescale yet.
      if (tile == first_tile) { continue; }
{% for f in range(features.v) %}
      {{ sync() }}
      coopStoreT(o_{{ f }}, &strip[0], STRIP_ROW);
      {{ sync() }}
      for (var quad = part; quad < {{ side // 4 }}u; quad += LANES_A_ROW) { strip[row * STRIP_ROW + quad] *= rescale; }
      {{ sync() }}
      o_{{ f }} = coopLoadT<coop_mat{{ side }}x{{ side }}<f32, C>>(&strip[0], STRIP_ROW);
{% endfor %}
      {{ sync() }}
    }
{% for n in range(lane_quads) %}
    let p_{{ n }} = exp2((x_{{ n }} - most) * scale);
    sum += (p_{{ n }}.x + p_{{ n }}.y) + (p_{{ n }}.z + p_{{ n }}.w);
    weights[strip_at + {{ n * lanes // rows }}u] = vec4<f16>(p_{{ n }});
{% endfor %}
    {{ sync() }}
{% for c in range(columns) %}
    {
      let weight = coopLoadT<coop_mat{{ side }}x{{ side }}<f16, A>>(&weights[{{ c * side // 4 }}u], STRIP_ROW);
{% for f in range(features.v) %}
      o_{{ f }} = coopMultiplyAdd(weight, coopLoadT<coop_mat{{ side }}x{{ side }}<f16, B>>(&v_stage[{{ c * side }}u * V_PITCH + {{ f * side // 4 }}u], V_PITCH), o_{{ f }});
{% endfor %}
    }
{% endfor %}
    {{ sync() }}
    tile += 1u;
    }
{% endfor %}
  }

{% for n in [1, 2, 4] %}{% if n < lanes // rows %}
  sum += subgroupShuffleXor(sum, {{ n }}u);
{% endif %}{% endfor %}
{% if has_row_max %}
{% for n in [1, 2, 4] %}{% if n < lanes // rows %}
  largest = max(largest, subgroupShuffleXor(largest, {{ n }}u));
{% endif %}{% endfor %}
  largest = select(largest{{ "" if softcap else " * abs(params.scale)" }}, LOWEST, sum == 0.0);
{% endif %}
  let index = (entry * params.heads + kv_head * group + first_row + row) * params.most_splits + split;
  let writes = first_row + row < group && split < range.splits;
{% for f in range(features.v) %}
  {{ sync() }}
  coopStoreT(o_{{ f }}, &strip[0], STRIP_ROW);
  {{ sync() }}
  for (var quad = part; quad < {{ side // 4 }}u; quad += LANES_A_ROW) {
    if (writes) { partials[index * {{ operand_quads.o + 1 }}u + {{ f * side // 4 }}u + quad] = strip[row * STRIP_ROW + quad]; }
  }
{% endfor %}
  // The maximum as a score, whose weights are powers of e; none has been seen where it is LOWEST.
  let score = select(most{{ "" if softcap else " * abs(params.scale)" }}, LOWEST, sum == 0.0);
  if (writes && part == 0u) { partials[index * {{ operand_quads.o + 1 }}u + {{ operand_quads.o }}u] = vec4<f32>(score, sum, {{ "largest" if has_row_max else "0.0" }}, 0.0); }
}
