{#- A few queries against many cached keys: one workgroup computes some rows (queries of the query heads of one key head) against
    one split of the keys. What it leaves, `combine` puts together.

    A key's row is shared by LANES neighbouring threads, a slot; each holds its numbers of q and of the result for all ROWS rows in
    registers, so that each number of the cache is loaded once and used ROWS times. The slots work on neighbouring keys and keep
    maximum and sum each for itself until the end. Threads of a slot meet through workgroup memory, EXCHANGED keys at a time: a
    product's parts go from all lanes to the one that owns the row, weights come back. Keys and values of the next tile are loaded
    where those of this one have been used, so that loads are always in flight. -#}
{% include "params.wgsl" %}
{% include "operands.wgsl" %}
{% include "exp.wgsl" %}
{% include "cache/range.wgsl" %}
{% if relative %}
{% include "cache/rotary.wgsl" %}
{% endif %}

const THREADS: u32 = {{ threads }}u;
const LANES: u32 = {{ lanes }}u;
const SLOTS: u32 = {{ slots }}u;
const ROWS: u32 = {{ rows }}u;
const ROW_PITCH: u32 = {{ row_pitch }}u;
const SLOT_PITCH: u32 = {{ slot_pitch }}u;
// Vectors of 16 bytes in a row of keys and of values.
const KEY_ROW: u32 = {{ row_vectors.k }}u;
const VALUE_ROW: u32 = {{ row_vectors.v }}u;
{% set several = queries == "several" %}
{% set vector = "vec4<f32>" if dtype == "f32" and not quantised else "vec4<u32>" %}
{% set halves = dtype != "f32" %}
{# The weights of the exchanged keys, and the factor of what was summed before: together where they fit a vector. #}
{% set packed = exchanged < 4 %}
{% set weight = ["", "vec2<f32>", "vec4<f32>", "", "vec4<f32>"][exchanged] %}
{# Half precision does not see the last bits of the driver's own. #}
{% set exp = "exp" if halves else "exp1" %}
{% set owned = (rows + lanes - 1) // lanes %}

var<workgroup> exchange: array<vec4<f32>, {{ exchange_len }}>;
var<workgroup> weights: array<{{ weight }}, {{ slots * rows }}>;
{% if not packed %}
var<workgroup> factors: array<f32, {{ slots * rows }}>;
{% endif %}
var<workgroup> states: array<vec2<f32>, {{ slots * rows }}>;

{% if rolling %}

// The row of a place: behind the kept ones the ring begins with its oldest.
fn row_in_ring(place: u32, oldest: u32) -> u32 {
  let at = place - params.kept_rows + oldest;
  return select(params.kept_rows + select(at, at - params.ring_rows, at >= params.ring_rows), place, place < params.kept_rows);
}
{% endif %}

{% if quantised %}
{% include "cache/scales.wgsl" %}

// The scale of the block that a vector of 16 bytes lies in, among those of eight blocks.
fn scale_of(scales: vec4<u32>, vector: u32) -> f32 {
  let pairs = select(scales.xy, scales.zw, (vector & 8u) != 0u);
  let pair = select(pairs.x, pairs.y, (vector & 4u) != 0u);
  return widen_scale(select(pair & 0xffffu, pair >> 16u, (vector & 2u) != 0u));
}
{% endif %}
{% macro quad_of(name, words, c) -%}
{%- if quantised -%} quad_of_bytes({{ words }}.{{ xyzw[c] }}) {%- elif halves -%} vec4<f32>(widen2({{ words }}.{{ xyzw[2 * c] }}), widen2({{ words }}.{{ xyzw[2 * c + 1] }})) {%- else -%} {{ words }} {%- endif -%}
{%- endmacro %}
{# The vectors of a step's row, those beyond its end zero. #}
{% macro load(name, s, declare) %}
{% set count = lane_vectors[name] %}
{% set cache = "keys" if name == "k" else "values" %}
{% for n in range(count) %}
{% set index = "row * " ~ ("KEY_ROW" if name == "k" else "VALUE_ROW") ~ " + lane + " ~ (n * lanes) ~ "u" %}
{% if (n + 1) * lanes <= data_vectors[name] %}
      {{ name }}_{{ s }}_{{ n }} = {{ cache }}[{{ index }}];
{% else %}
      if (lane + {{ n * lanes }}u < {{ data_vectors[name] }}u) { {{ name }}_{{ s }}_{{ n }} = {{ cache }}[{{ index }}]; }
{% endif %}
{% if quantised %}
      {{ name }}_scales_{{ s }}_{{ n }} = {{ cache }}[row * {{ "KEY_ROW" if name == "k" else "VALUE_ROW" }} + {{ data_vectors[name] }}u + min(lane + {{ n * lanes }}u, {{ data_vectors[name] - 1 }}u) / 16u];
{% endif %}
{% endfor %}
{% endmacro %}
{% macro row_of(base, start, s) %}
{% if rolling %}
      let row = {{ base }} + row_in_ring(min({{ start }} + slot + {{ s * slots }}u, range.keys - 1u), oldest);
{% else %}
      let row = {{ base }} + min(slot + {{ s * slots }}u, range.keys - 1u - {{ start }});
{% endif %}
{% endmacro %}
// First row of a tile, or where places begin in a ring.
fn tile_base(block: u32, kv_head: u32, start: u32) -> u32 {
  let base = (block * params.kv_heads + kv_head) * params.block_rows;
{% if rolling %}
  return base;
{% elif paged %}
  return base + (start & (params.block_rows - 1u));
{% else %}
  return base + start;
{% endif %}
}

@compute @workgroup_size({{ threads }})
fn main(
  @builtin(workgroup_id) workgroup: vec3<u32>,
  @builtin(num_workgroups) grid: vec3<u32>,
  @builtin(local_invocation_index) thread: u32,
) {
  let split = workgroup.x / params.row_tiles;
  let first_row = workgroup.x % params.row_tiles * ROWS;
  // Key heads of sequences are numbered along both of the other axes.
  let number_of_group = workgroup.y + workgroup.z * grid.y;
  if (number_of_group >= params.groups) { return; }
  let kv_head = number_of_group % params.kv_heads;
  let entry = number_of_group / params.kv_heads;
  let sequence = {{ "entries[entry]" if indexed else "entry" }};
  let range = key_range(sequence);
  if (split >= range.splits) { return; }
  let slot = thread / LANES;
  let lane = thread % LANES;
  let group = params.heads / params.kv_heads;
  let row_end = group * params.queries;
  // Position of query 0.
  let offset = i32(range.keys) - i32(params.queries);
{% if rolling %}
  let total = state[params.current + sequence];
  let oldest = select((total - params.kept_rows) % params.ring_rows, 0u, total <= params.kept_rows + params.ring_rows);
{% endif %}

{% for r in range(rows) %}
{% for c in range(lane_quads.k) %}
  var q_{{ r }}_{{ c }} = vec4<f32>();
{% endfor %}
  if (first_row + {{ r }}u < row_end) {
    let number = first_row + {{ r }}u;
    let base = operand_base(params.q, entry, kv_head * group + number % group) + number / group * params.q.seq;
{% for c in range(lane_quads.k) %}
    { let quad = (lane + {{ c // vector_quads * lanes }}u) * {{ vector_quads }}u + {{ c % vector_quads }}u;
      if (quad < {{ operand_quads.q }}u) { q_{{ r }}_{{ c }} = load_q(base, quad); } }
{% endfor %}
  }
{% for c in range(lane_quads.v) %}
  var o_{{ r }}_{{ c }} = vec4<f32>();
{% endfor %}
{% endfor %}
{% for n in range(owned) %}
  // Maximum and sum of the row that this thread owns in its slot, and the row's position.
  let row_{{ n }} = lane + {{ n * lanes }}u;
  let position_{{ n }} = offset + i32((first_row + row_{{ n }}) / group);
  var most_{{ n }} = LOWEST;
  var sum_{{ n }} = 0.0;
{% if has_row_max %}
  // The maximum of now, behind which `most` may stay.
  var largest_{{ n }} = LOWEST;
{% endif %}
{% endfor %}

  let end = min((split + 1u) * range.split_tiles, range.tiles);
  var tile = split * range.split_tiles;
  var start = tile_start(range, tile);
{% if paged %}
  let table = params.table + sequence * params.table_row;
  var block = state[table + (start >> params.block_shift)];
  // Of the tile after: looked up one tile before its rows are.
  var next_block = state[table + (tile_start(range, min(tile + 1u, end - 1u)) >> params.block_shift)];
{% else %}
  let block = sequence;
{% endif %}
  let first_base = tile_base(block, kv_head, start);
{% for s in range(steps) %}
{% for name in ["k", "v"] %}
{% for n in range(lane_vectors[name]) %}
  var {{ name }}_{{ s }}_{{ n }} = {{ vector }}();
{% if quantised %}
  var {{ name }}_scales_{{ s }}_{{ n }} = vec4<u32>();
{% endif %}
{% endfor %}
{% endfor %}
  {
{{ row_of("first_base", "start", s) }}{{ load("k", s) }}{{ load("v", s) }}  }
{% endfor %}
  let last_position = offset + i32(params.queries) - 1;
  while (tile < end) {
    let next_start = tile_start(range, min(tile + 1u, end - 1u));
{% if paged %}
    let next_base = tile_base(next_block, kv_head, next_start);
    next_block = state[table + (tile_start(range, min(tile + 2u, end - 1u)) >> params.block_shift)];
{% else %}
    let next_base = tile_base(block, kv_head, next_start);
{% endif %}
{% if relative %}
    let base = tile_base(block, kv_head, start);
{% endif %}
    // Whether some row does not see some key of the tile.
    let masked = start + TILE > range.keys || i32(start + TILE) - 1 > offset + params.right
      || (i32(start) < last_position - params.left && start + TILE > params.sink_tokens);
{% for part in range(steps // exchanged) %}
{% for x in range(exchanged) %}
{% set s = part * exchanged + x %}
    {
{% if relative %}
      let place = min(start + slot + {{ s * slots }}u, range.keys - 1u);
{% if rotary.half_split %}
      let own_row = (base + row_in_ring(place, oldest)) * KEY_ROW;
{% endif %}
{% endif %}
{% for n in range(lane_vectors.k) %}
{% if relative and rotary.half_split %}
      let vector_{{ n }} = lane + {{ n * lanes }}u;
      var pair_{{ n }} = {{ vector }}();
      if (vector_{{ n }} < {{ rotary.dim // (4 * vector_quads) }}u) {
        pair_{{ n }} = keys[own_row + (vector_{{ n }} + {{ rotary.dim // (8 * vector_quads) }}u) % {{ rotary.dim // (4 * vector_quads) }}u];
      }
{% endif %}
{% for h in range(vector_quads) %}
{% set c = n * vector_quads + h %}
      let x{{ c }} = {{ quad_of("k", "k_" ~ s ~ "_" ~ n, h) }};
{% if relative %}
      let turn{{ c }} = rotation(place, (lane + {{ n * lanes }}u) * {{ vector_quads }}u + {{ h }}u);
      let k{{ c }} = x{{ c }} * turn{{ c }}.cosines + {{ quad_of("k", "pair_" ~ n, h) if rotary.half_split else "x" ~ c ~ ".yxwz" }} * turn{{ c }}.sines;
{% else %}
      let k{{ c }} = x{{ c }};
{% endif %}
{% endfor %}
{% endfor %}
{% if quantised %}
{% for n in range(lane_vectors.k) %}
      let scale{{ n }} = scale_of(k_scales_{{ s }}_{{ n }}, lane + {{ n * lanes }}u);
{% endfor %}
{% endif %}
{% for r in range(rows) %}
      exchange[{{ x * slots }}u * SLOT_PITCH + slot * SLOT_PITCH + {{ r }}u * ROW_PITCH + lane / 4u][lane % 4u] =
{% if quantised %}
        {% for n in range(lane_vectors.k) %}{{ " + " if n else "" }}scale{{ n }} * ({% for h in range(4) %}{{ " + " if h else "" }}dot(q_{{ r }}_{{ n * 4 + h }}, k{{ n * 4 + h }}){% endfor %}){% endfor %};
{% else %}
        {% for c in range(lane_quads.k) %}{{ " + " if c else "" }}dot(q_{{ r }}_{{ c }}, k{{ c }}){% endfor %};
{% endif %}
{% endfor %}
    }
    {
{{ row_of("next_base", "next_start", s) }}{{ load("k", s) }}    }
{% endfor %}
    workgroupBarrier();
{% for n in range(owned) %}
    {{ "if (row_" ~ n ~ " < ROWS) " if rows < (n + 1) * lanes else "" }}{
      let at = slot * SLOT_PITCH + row_{{ n }} * ROW_PITCH;
{% for x in range(exchanged) %}
      var s{{ x }} = 0.0;
      {
        var parts = exchange[{{ x * slots }}u * SLOT_PITCH + at];
{% for l in range(1, lanes // 4) %}
        parts += exchange[{{ x * slots }}u * SLOT_PITCH + at + {{ l }}u];
{% endfor %}
        s{{ x }} = ((parts.x + parts.y) + (parts.z + parts.w)) * params.scale;
{% if softcap %}
        let capped = s{{ x }} / params.softcap;
        // Drivers' own overflows for large numbers.
        s{{ x }} = params.softcap * tanh(select(capped, sign(capped) * 20.0, abs(capped) > 20.0));
{% endif %}
      }
      var hidden{{ x }} = false;
{% endfor %}
      if (masked) {
{% for x in range(exchanged) %}
        hidden{{ x }} = !visible(position_{{ n }}, start + slot + {{ (part * exchanged + x) * slots }}u, range.keys);
        s{{ x }} = select(s{{ x }}, LOWEST, hidden{{ x }});
{% endfor %}
      }
      var top = s0;
{% for x in range(1, exchanged) %}
      top = max(top, s{{ x }});
{% endfor %}
{% if has_row_max %}
      largest_{{ n }} = max(largest_{{ n }}, top);
{% endif %}
      // A maximum that is a little stale does: exp is good up to 1.
      var factor = 1.0;
      if (top > most_{{ n }} + 1.0) {
        factor = {{ exp }}(most_{{ n }} - top);
        most_{{ n }} = top;
      }
{% for x in range(exchanged) %}
      let p{{ x }} = select({{ exp }}(s{{ x }} - most_{{ n }}), 0.0, hidden{{ x }});
{% endfor %}
      sum_{{ n }} = fma(sum_{{ n }}, factor, {% for x in range(exchanged) %}{{ " + " if x else "" }}p{{ x }}{% endfor %});
{% set hide = "select(p{x}, -1.0, hidden{x})" if several else "p{x}" %}
      weights[slot * ROWS + row_{{ n }}] = {{ weight }}({% for x in range(exchanged) %}{{ ", " if x else "" }}{{ hide|replace("{x}", x) }}{% endfor %}{{ ["", ", factor", ", factor, 0.0", "", ""][exchanged] }});
{% if not packed %}
      factors[slot * ROWS + row_{{ n }}] = factor;
{% endif %}
    }
{% endfor %}
    workgroupBarrier();
{% for r in range(rows) %}
    let w{{ part }}_{{ r }} = weights[slot * ROWS + {{ r }}u];
    let f{{ part }}_{{ r }} = {{ "w" ~ part ~ "_" ~ r ~ "." ~ xyzw[exchanged] if packed else "factors[slot * ROWS + " ~ r ~ "u]" }};
{% endfor %}
    if ({% for r in range(rows) %}{{ " || " if r else "" }}f{{ part }}_{{ r }} != 1.0{% endfor %}) {
{% for r in range(rows) %}
{% for c in range(lane_quads.v) %}
      o_{{ r }}_{{ c }} *= f{{ part }}_{{ r }};
{% endfor %}
{% endfor %}
    }
{% for x in range(exchanged) %}
{% set s = part * exchanged + x %}
    {
{% if not several %}
      // What is hidden may be a NaN.
      if (masked && !visible(offset, start + slot + {{ s * slots }}u, range.keys)) {
{% for n in range(lane_vectors.v) %}
        v_{{ s }}_{{ n }} = {{ vector }}();
{% if quantised %}
        v_scales_{{ s }}_{{ n }} = vec4<u32>();
{% endif %}
{% endfor %}
      }
{% endif %}
{% for n in range(lane_vectors.v) %}
{% for h in range(vector_quads) %}
      let x{{ n * vector_quads + h }} = {{ quad_of("v", "v_" ~ s ~ "_" ~ n, h) }};
{% endfor %}
{% endfor %}
{% if quantised %}
{% for n in range(lane_vectors.v) %}
      let scale{{ n }} = scale_of(v_scales_{{ s }}_{{ n }}, lane + {{ n * lanes }}u);
{% endfor %}
{% endif %}
{% for r in range(rows) %}
{% set w = "w" ~ part ~ "_" ~ r ~ "." ~ xyzw[x] %}
{% if several %}
      // Another row may see what is hidden here, a NaN or not.
      if (!({{ w }} < 0.0)) {
{% for c in range(lane_quads.v) %}
        o_{{ r }}_{{ c }} = fma(vec4<f32>({{ w }}{{ " * scale" ~ (c // 4) if quantised else "" }}), x{{ c }}, o_{{ r }}_{{ c }});
{% endfor %}
      }
{% else %}
{% for c in range(lane_quads.v) %}
      o_{{ r }}_{{ c }} = fma(vec4<f32>({{ w }}{{ " * scale" ~ (c // 4) if quantised else "" }}), x{{ c }}, o_{{ r }}_{{ c }});
{% endfor %}
{% endif %}
{% endfor %}
    }
    {
{{ row_of("next_base", "next_start", s) }}{{ load("v", s) }}    }
{% endfor %}
{% endfor %}
    start = next_start;
{% if paged and relative %}
    block = next_block;
{% endif %}
    tile += 1u;
  }

{% if has_row_max %}
  // All have read the last weights. In their place the largest scores go from slot to slot.
  workgroupBarrier();
{% for n in range(owned) %}
  {{ "if (row_" ~ n ~ " < ROWS) " if rows < (n + 1) * lanes else "" }}{ weights[slot * ROWS + row_{{ n }}].x = largest_{{ n }}; }
{% endfor %}
{% endif %}
  // The slots, in their order.
{% for n in range(owned) %}
  {{ "if (row_" ~ n ~ " < ROWS) " if rows < (n + 1) * lanes else "" }}{ states[slot * ROWS + row_{{ n }}] = vec2<f32>(most_{{ n }}, sum_{{ n }}); }
{% endfor %}
  workgroupBarrier();
{% for first in range(0, rows, merged_rows) %}
{% set last = [first + merged_rows, rows]|min %}
{% for r in range(first, last) %}
  var most_of_{{ r }} = LOWEST;
  for (var n = 0u; n < SLOTS; n++) { most_of_{{ r }} = max(most_of_{{ r }}, states[n * ROWS + {{ r }}u].x); }
  {
    let factor = exp1(states[slot * ROWS + {{ r }}u].x - most_of_{{ r }});
{% for c in range(lane_quads.v) %}
    exchange[{{ ((r - first) * lane_quads.v + c) * threads }}u + thread] = o_{{ r }}_{{ c }} * factor;
{% endfor %}
  }
{% endfor %}
  workgroupBarrier();
{% for r in range(first, last) %}
  if (first_row + {{ r }}u < row_end) {
    let number = first_row + {{ r }}u;
    let place = ((entry * params.heads + kv_head * group + number % group) * params.queries + number / group) * params.most_splits + split;
    for (var item = thread; item < {{ lane_quads.v * lanes }}u; item += THREADS) {
      let c = item / LANES;
      let at = {{ (r - first) * lane_quads.v * threads }}u + c * THREADS + item % LANES;
      var x = exchange[at];
      for (var n = 1u; n < SLOTS; n++) { x += exchange[at + n * LANES]; }
      let quad = (item % LANES + c / {{ vector_quads }}u * LANES) * {{ vector_quads }}u + c % {{ vector_quads }}u;
      if (quad < {{ operand_quads.o }}u) { partials[place * {{ operand_quads.o + 1 }}u + quad] = x; }
    }
    if (thread == 0u) {
      var sum = 0.0;
      for (var n = 0u; n < SLOTS; n++) {
        let state = states[n * ROWS + {{ r }}u];
        sum = fma(exp1(state.x - most_of_{{ r }}), state.y, sum);
      }
{% if has_row_max %}
      var largest = LOWEST;
      for (var n = 0u; n < SLOTS; n++) { largest = max(largest, weights[n * ROWS + {{ r }}u].x); }
{% endif %}
      partials[place * {{ operand_quads.o + 1 }}u + {{ operand_quads.o }}u] = vec4<f32>(most_of_{{ r }}, sum, {{ "largest" if has_row_max else "0.0" }}, 0.0);
    }
  }
{% endfor %}
  workgroupBarrier();
{% endfor %}
}
