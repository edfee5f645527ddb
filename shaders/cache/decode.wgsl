{#- A few queries against many cached keys. One workgroup computes ROWS rows (queries of the query heads of one key head) against one split
    of the keys, and `combine` adds up the splits. A slot of LANES threads takes one key at a time:

      row_max = lowest;  row_sum = 0;  O = 0
      for each tile of keys of the split, and for each round, EXCHANGED keys of each slot:
        S = Q K^T                                        products
        S *= scale                                       score: softcap where asked for
        S -= slope |p - j|                               subtract_alibi: where asked for
        S = hidden where the rule hides                  mask
        m = max(row_max, max of S)                       row_max
        P = exp(S - m);  row_max = m                     exponentiate
        row_sum = exp(row_max - m) row_sum + sum of P    row_sum
        O *= exp(row_max - m)                            rescale
        O += P V                                         accumulate
      add up the slots, each with a softmax of its own   merge_slots
      partial state = O, row_max, row_sum                store_state

    A lane holds its numbers of q and of O for all rows in registers, so that each number of the cache is loaded once and used ROWS times.
    In the softmax each row of a slot belongs to one lane: workgroup memory takes the parts of products from all lanes to that lane, and P
    back. A lane loads its keys and values of the next tile as soon as it has used those of this tile, so loads are always under way. -#}
# include "params.wgsl"
# include "operands.wgsl"
# include "exp.wgsl"
# include "cache/range.wgsl"
# from "cache/group.wgsl" import begin_group, begin_sequence
# if relative
# include "cache/rotary.wgsl"
# endif
# if tree
# include "cache/tree.wgsl"
# endif

const THREADS: u32 = {{ threads }}u;
const LANES: u32 = {{ lanes }}u;
const SLOTS: u32 = {{ slots }}u;
const ROWS: u32 = {{ rows }}u;
const ROW_PITCH: u32 = {{ row_pitch }}u;
const SLOT_PITCH: u32 = {{ slot_pitch }}u;
// Vectors of 16 bytes in a row of keys and of values.
const KEY_ROW: u32 = {{ row_vectors.k }}u;
const VALUE_ROW: u32 = {{ row_vectors.v }}u;
# set several = queries == "several"
# set vector = "vec4<f32>" if not is_half and not quantised else "vec4<u32>"
# set halves = is_half
{#- P of the exchanged keys, and the factor of O: in one vector where they fit. -#}
# set packed = exchanged < 4
# set p_vector = ["", "vec2<f32>", "vec4<f32>", "", "vec4<f32>"][exchanged]
{#- Half precision does not see the last bits of the driver's own function. -#}
# set exp = "exp" if halves else "exp1"
# set owned = (rows + lanes - 1) // lanes

// Parts of products, and in the end O of the slots.
var<workgroup> exchange: array<vec4<f32>, {{ exchange_len }}>;
var<workgroup> p_tile: array<{{ p_vector }}, {{ slots * rows }}>;
# if not packed
var<workgroup> rescales: array<f32, {{ slots * rows }}>;
# endif
// row_max and row_sum.
var<workgroup> slot_states: array<vec2<f32>, {{ slots * rows }}>;

# if rolling

// The row of a place: behind the sink rows, the window begins with its oldest row.
fn row_in_window(place: u32, oldest: u32) -> u32 {
  let at = place - params.sink_rows + oldest;
  return select(params.sink_rows + select(at, at - params.window_rows, at >= params.window_rows), place, place < params.sink_rows);
}
# endif

# if quantised
# include "cache/scales.wgsl"

// The scale of the block that a vector of 16 bytes lies in, among those of eight blocks.
fn scale_of(scales: vec4<u32>, vector: u32) -> f32 {
  let pairs = select(scales.xy, scales.zw, (vector & 8u) != 0u);
  let pair = select(pairs.x, pairs.y, (vector & 4u) != 0u);
  return widen_scale(select(pair & 0xffffu, pair >> 16u, (vector & 2u) != 0u));
}
# endif

// First row of a tile. In a rolling cache the row that places count from.
fn tile_base(block: u32, kv_head: u32, start: u32) -> u32 {
  let base = (block * params.kv_heads + kv_head) * params.block_rows;
# if rolling
  return base;
# elif paged
  return base + (start & (params.block_rows - 1u));
# else
  return base + start;
# endif
}

{#- A row's numbers in a lane. A lane has vectors n = 0, 1, ... of 16 bytes, LANES vectors apart. Quad c of the lane is part h of vector n,
    c = n * vector_quads + h. -#}

{#- Part h of a vector, in f32. Quantised numbers still lack their scale. -#}
{%- macro quad_of(vector, h) -%}
{%- if quantised -%}
  quad_of_bytes({{ vector }}.{{ xyzw[h] }})
{%- elif halves -%}
  vec4<f32>(widen2({{ vector }}.{{ xyzw[2 * h] }}), widen2({{ vector }}.{{ xyzw[2 * h + 1] }}))
{%- else -%}
  {{ vector }}
{%- endif -%}
{%- endmacro -%}

{#- `row`, the row of a slot's key s in the tile at `start`. Beyond the last key it is the last key's. -#}
# macro row_of(base, start, s)
# if rolling
      let row = {{ base }} + row_in_window(min({{ start }} + slot + {{ s * slots }}u, range.keys - 1u), oldest);
# else
      let row = {{ base }} + min(slot + {{ s * slots }}u, range.keys - 1u - {{ start }});
# endif
# endmacro

{#- Loads a lane's vectors of `row`. Vectors beyond the width stay zero. -#}
# macro load(name, s)
# set cache = "keys" if name == "k" else "values"
# set row_start = "row * " ~ ("KEY_ROW" if name == "k" else "VALUE_ROW")
# set end = data_vectors[name]
# for n in range(lane_vectors[name])
# set load_vector = name ~ "_" ~ s ~ "_" ~ n ~ " = " ~ cache ~ "[" ~ row_start ~ " + lane + " ~ n * lanes ~ "u];"
# if (n + 1) * lanes <= end
      {{ load_vector }}
# else
      if (lane + {{ n * lanes }}u < {{ end }}u) { {{ load_vector }} }
# endif
# if quantised
      {{ name }}_scales_{{ s }}_{{ n }} = {{ cache }}[{{ row_start }} + {{ end }}u + min(lane + {{ n * lanes }}u, {{ end - 1 }}u) / 16u];
# endif
# endfor
# endmacro

{#- The vectors of a slot's key s, zero. -#}
# macro declare_vectors(name, s)
# for n in range(lane_vectors[name])
  var {{ name }}_{{ s }}_{{ n }} = {{ vector }}();
# if quantised
  var {{ name }}_scales_{{ s }}_{{ n }} = vec4<u32>();
# endif
# endfor
# endmacro

# macro block_scales(name, s)
# if quantised
# for n in range(lane_vectors[name])
      let scale_{{ n }} = scale_of({{ name }}_scales_{{ s }}_{{ n }}, lane + {{ n * lanes }}u);
# endfor
# endif
# endmacro

{#- The queries, and O = 0. -#}
# macro load_q()
# for r in range(rows)
# for c in range(lane_quads.k)
  var q_{{ r }}_{{ c }} = vec4<f32>();
# endfor
  if (first_row + {{ r }}u < row_end) {
    let group_row = first_row + {{ r }}u;
    let base = operand_base(params.q, entry, kv_head * heads_per_kv + group_row % heads_per_kv)
      + group_row / heads_per_kv * params.q.seq;
# for c in range(lane_quads.k)
    { let quad = (lane + {{ c // vector_quads * lanes }}u) * {{ vector_quads }}u + {{ c % vector_quads }}u;
      if (quad < {{ operand_quads.q }}u) { q_{{ r }}_{{ c }} = load_q(base, quad); } }
# endfor
  }
# for c in range(lane_quads.v)
  var o_{{ r }}_{{ c }} = vec4<f32>();
# endfor
# endfor
# endmacro

{#- The softmax of the rows that this lane owns in its slot. -#}
# macro begin_softmax()
# for n in range(owned)
  let row_{{ n }} = lane + {{ n * lanes }}u;
# if tree
  // Rows beyond the last query have its word.
  let query_{{ n }} = min((first_row + row_{{ n }}) / heads_per_kv, params.queries - 1u);
  let sees_{{ n }} = tree_mask[tree + query_{{ n }}];
  let position_{{ n }} = offset + tree_depth(sees_{{ n }}, query_{{ n }});
# else
  let position_{{ n }} = offset + i32((first_row + row_{{ n }}) / heads_per_kv);
# endif
# if alibi
  let slope_{{ n }} = alibi_slopes[params.slope_offset + kv_head * heads_per_kv + (first_row + row_{{ n }}) % heads_per_kv];
# endif
  var row_max_{{ n }} = LOWEST;
  var row_sum_{{ n }} = 0.0;
# if has_row_max
  // The largest visible score, which row_max may lag behind.
  var largest_{{ n }} = LOWEST;
# endif
# endfor
# endmacro

{#- Lanes beyond the last row own none. -#}
{%- macro if_owned(n) %}{{ "if (row_" ~ n ~ " < ROWS) " if rows < (n + 1) * lanes }}{% endmacro -%}

{#- The first tile of the split, with its loads under way. -#}
# macro load_first_tile()
  let end = min((split + 1u) * range.split_tiles, range.tiles);
  var tile = split * range.split_tiles;
  var start = tile_start(range, tile);
# if paged
  let table = params.table + sequence * params.table_row;
  var block = state[table + (start >> params.block_shift)];
  // The block of the tile after, which is looked up one tile before its rows are.
  var next_block = state[table + (tile_start(range, min(tile + 1u, end - 1u)) >> params.block_shift)];
# else
  let block = sequence;
# endif
  let first_base = tile_base(block, kv_head, start);
# for s in range(steps)
{{ declare_vectors("k", s) }}
{{ declare_vectors("v", s) }}
  {
{{ row_of("first_base", "start", s) }}
{{ load("k", s) }}
{{ load("v", s) }}
  }
# endfor
# endmacro

# macro find_next_tile()
    let next_start = tile_start(range, min(tile + 1u, end - 1u));
# if paged
    let next_base = tile_base(next_block, kv_head, next_start);
    next_block = state[table + (tile_start(range, min(tile + 2u, end - 1u)) >> params.block_shift)];
# else
    let next_base = tile_base(block, kv_head, next_start);
# endif
# endmacro

{#- The product of the quads first .. end of a row and a key. -#}
{%- macro dots(r, first, end) -%}
{% for c in range(first, end) %}{{ " + " if c > first }}dot(q_{{ r }}_{{ c }}, k_{{ c }}){% endfor %}
{%- endmacro -%}

{#- S = Q K^T of a round's keys. A lane leaves the part that its own numbers make, in `exchange`. -#}
# macro products(round)
    // S = Q K^T{{ ", of rotated keys" if relative }}.
# for x in range(exchanged)
# set s = round * exchanged + x
    {
{{ key_quads(s) }}
{{ block_scales("k", s) }}
# for r in range(rows)
      exchange[{{ x * slots }}u * SLOT_PITCH + slot * SLOT_PITCH + {{ r }}u * ROW_PITCH + lane / 4u][lane % 4u] =
# if quantised
# for n in range(lane_vectors.k)
        {{ "+ " if n }}scale_{{ n }} * ({{ dots(r, 4 * n, 4 * n + 4) }}){{ ";" if loop.last }}
# endfor
# else
        {{ dots(r, 0, lane_quads.k) }};
# endif
# endfor
    }
    {
{{ row_of("next_base", "next_start", s) }}
{{ load("k", s) }}
    }
# endfor
# endmacro

{#- A key's quads in this lane, rotated by the key's place where positions are relative to the cache. -#}
# macro key_quads(s)
# if relative
      let place = min(start + slot + {{ s * slots }}u, range.keys - 1u);
# if rotary.half_split
      let own_row = (base + row_in_window(place, oldest)) * KEY_ROW;
# endif
# endif
# for n in range(lane_vectors.k)
# if relative and rotary.half_split
# set rotated_vectors = rotary.dim // (4 * vector_quads)
      let vector_{{ n }} = lane + {{ n * lanes }}u;
      var partner_{{ n }} = {{ vector }}();
      if (vector_{{ n }} < {{ rotated_vectors }}u) {
        partner_{{ n }} = keys[own_row + (vector_{{ n }} + {{ rotary.dim // (8 * vector_quads) }}u) % {{ rotated_vectors }}u];
      }
# endif
# for h in range(vector_quads)
# set c = n * vector_quads + h
      let x_{{ c }} = {{ quad_of("k_" ~ s ~ "_" ~ n, h) }};
# if relative
# set partner = quad_of("partner_" ~ n, h) if rotary.half_split else "x_" ~ c ~ ".yxwz"
      let turn_{{ c }} = rotation(place, (lane + {{ n * lanes }}u) * {{ vector_quads }}u + {{ h }}u);
      let k_{{ c }} = x_{{ c }} * turn_{{ c }}.cosines + {{ partner }} * turn_{{ c }}.sines;
# else
      let k_{{ c }} = x_{{ c }};
# endif
# endfor
# endfor
# endmacro

{#- The online softmax of a round. It leaves P in `p_tile`, and the factor of O. -#}
# macro softmax(round)
    // m = max(row_max, max of S);  P = exp(S - m);  row_sum = exp(row_max - m) row_sum + sum of P.
# for n in range(owned)
    {{ if_owned(n) }}{
      let at = slot * SLOT_PITCH + row_{{ n }} * ROW_PITCH;
# for x in range(exchanged)
{{ score(x) }}
      var hidden_{{ x }} = false;
# endfor
{{ subtract_alibi(round, n) }}
{{ mask(round, n) }}
{{ row_max(n) }}
{{ exponentiate(n) }}
{{ row_sum(n) }}
{{ store_p(n) }}
    }
# endfor
# endmacro

{#- The score of an exchanged key: the parts of its product, times the scale. -#}
# macro score(x)
      var s_{{ x }} = 0.0;
      {
        var parts = exchange[{{ x * slots }}u * SLOT_PITCH + at];
# for l in range(1, lanes // 4)
        parts += exchange[{{ x * slots }}u * SLOT_PITCH + at + {{ l }}u];
# endfor
        s_{{ x }} = ((parts.x + parts.y) + (parts.z + parts.w)) * params.scale;
# if softcap
        let capped = s_{{ x }} / params.softcap;
        // Drivers' own functions overflow for large numbers.
        s_{{ x }} = params.softcap * tanh(select(capped, sign(capped) * 20.0, abs(capped) > 20.0));
# endif
      }
# endmacro

{#- The place of an exchanged key. -#}
{%- macro place_of(round, x) %}start + slot + {{ (round * exchanged + x) * slots }}u{% endmacro -%}

{#- S -= slope |p - j|, by positions in the sequence, exact below 2^24. -#}
# macro subtract_alibi(round, n)
# if alibi
# for x in range(exchanged)
      {
        let place = {{ place_of(round, x) }};
        let key = {{ "key_position(place, tree, offset)" if tree else "i32(place)" }}{{ " - select(0, given_up, place < params.sink_rows)" if rolling }};
        s_{{ x }} -= slope_{{ n }} * f32(abs(position_{{ n }} - key));
      }
# endfor
# endif
# endmacro

# macro mask(round, n)
      if (is_partial) {
# for x in range(exchanged)
# if tree
        hidden_{{ x }} = !tree_visible(position_{{ n }}, sees_{{ n }}, {{ place_of(round, x) }}, range.keys, tree, offset);
# else
        hidden_{{ x }} = !visible(position_{{ n }}, {{ place_of(round, x) }}, range.keys);
# endif
        s_{{ x }} = select(s_{{ x }}, LOWEST, hidden_{{ x }});
# endfor
      }
# endmacro

{#- m = max(row_max, max of S), and exp(row_max - m). row_max follows only when it has grown by more than 1: a stale maximum is exact up to
    rounding, and exp is accurate up to 1. -#}
# macro row_max(n)
      var round_max = s_0;
# for x in range(1, exchanged)
      round_max = max(round_max, s_{{ x }});
# endfor
# if has_row_max
      largest_{{ n }} = max(largest_{{ n }}, round_max);
# endif
      var rescale = 1.0;
      if (round_max > row_max_{{ n }} + 1.0) {
        rescale = {{ exp }}(row_max_{{ n }} - round_max);
        row_max_{{ n }} = round_max;
      }
# endmacro

{#- P = exp(S - m). -#}
# macro exponentiate(n)
# for x in range(exchanged)
      let p_{{ x }} = select({{ exp }}(s_{{ x }} - row_max_{{ n }}), 0.0, hidden_{{ x }});
# endfor
# endmacro

{#- row_sum = exp(row_max - m) row_sum + sum of P. -#}
# macro row_sum(n)
      row_sum_{{ n }} = fma(row_sum_{{ n }}, rescale, {% for x in range(exchanged) %}{{ " + " if x }}p_{{ x }}{% endfor %});
# endmacro

{#- Of several queries, a hidden pair has -1 for P, so that its value is left out: to other rows the key may be visible. -#}
{%- macro p_or_hidden(x) %}{{ "select(p_" ~ x ~ ", -1.0, hidden_" ~ x ~ ")" if several else "p_" ~ x }}{% endmacro -%}

{#- P of the exchanged keys, for all lanes of the slot, and the factor of O. -#}
# macro store_p(n)
# set rescale = ["", ", rescale", ", rescale, 0.0", "", ""][exchanged]
      p_tile[slot * ROWS + row_{{ n }}] = {{ p_vector }}({% for x in range(exchanged) %}{{ ", " if x }}{{ p_or_hidden(x) }}{% endfor %}{{ rescale }});
# if not packed
      rescales[slot * ROWS + row_{{ n }}] = rescale;
# endif
# endmacro

{#- O *= exp(row_max - m). -#}
# macro rescale(round)
    // O *= exp(row_max - m).
# for r in range(rows)
    let p_{{ round }}_{{ r }} = p_tile[slot * ROWS + {{ r }}u];
# if packed
    let rescale_{{ round }}_{{ r }} = p_{{ round }}_{{ r }}.{{ xyzw[exchanged] }};
# else
    let rescale_{{ round }}_{{ r }} = rescales[slot * ROWS + {{ r }}u];
# endif
# endfor
    if ({% for r in range(rows) %}{{ " || " if r }}rescale_{{ round }}_{{ r }} != 1.0{% endfor %}) {
# for r, c in pairs(rows, lane_quads.v)
      o_{{ r }}_{{ c }} *= rescale_{{ round }}_{{ r }};
# endfor
    }
# endmacro

{#- O += P V of a round's keys. -#}
# macro accumulate(round)
    // O += P V.
# for x in range(exchanged)
# set s = round * exchanged + x
    {
{{ value_quads(s) }}
{{ block_scales("v", s) }}
# for r in range(rows)
# set p = "p_" ~ round ~ "_" ~ r ~ "." ~ xyzw[x]
# if several
      // A value that this row does not see may be a NaN.
      if (!({{ p }} < 0.0)) {
{{ add_value(r, p) }}
      }
# else
{{ add_value(r, p) }}
# endif
# endfor
    }
    {
{{ row_of("next_base", "next_start", s) }}
{{ load("v", s) }}
    }
# endfor
# endmacro

{#- A value's quads in this lane. Of one query, a hidden value counts as zero, since it may be a NaN. -#}
# macro value_quads(s)
# if not several
      if (is_partial && !visible(offset, start + slot + {{ s * slots }}u, range.keys)) {
# for n in range(lane_vectors.v)
        v_{{ s }}_{{ n }} = {{ vector }}();
# if quantised
        v_scales_{{ s }}_{{ n }} = vec4<u32>();
# endif
# endfor
      }
# endif
# for n, h in pairs(lane_vectors.v, vector_quads)
      let x_{{ n * vector_quads + h }} = {{ quad_of("v_" ~ s ~ "_" ~ n, h) }};
# endfor
# endmacro

# macro add_value(r, p)
# for c in range(lane_quads.v)
        o_{{ r }}_{{ c }} = fma(vec4<f32>({{ p }}{{ " * scale_" ~ (c // 4) if quantised }}), x_{{ c }}, o_{{ r }}_{{ c }});
# endfor
# endmacro

{#- m = max over slots of row_max;  O = sum over slots of exp(row_max - m) O, in their order. As many rows at a time as fit `exchange`. -#}
# macro merge_slots()
  // m = max over slots of row_max;  O = sum over slots of exp(row_max - m) O.
# if has_row_max
  // All have read the last P. In its place the largest scores go from slot to slot.
  workgroupBarrier();
# for n in range(owned)
  {{ if_owned(n) }}{ p_tile[slot * ROWS + row_{{ n }}].x = largest_{{ n }}; }
# endfor
# endif
# for n in range(owned)
  {{ if_owned(n) }}{ slot_states[slot * ROWS + row_{{ n }}] = vec2<f32>(row_max_{{ n }}, row_sum_{{ n }}); }
# endfor
  workgroupBarrier();
# for first in range(0, rows, merged_rows)
# set last = [first + merged_rows, rows]|min
# for r in range(first, last)
  var m_{{ r }} = LOWEST;
  for (var n = 0u; n < SLOTS; n++) { m_{{ r }} = max(m_{{ r }}, slot_states[n * ROWS + {{ r }}u].x); }
  {
    let rescale = exp1(slot_states[slot * ROWS + {{ r }}u].x - m_{{ r }});
# for c in range(lane_quads.v)
    exchange[{{ ((r - first) * lane_quads.v + c) * threads }}u + thread] = o_{{ r }}_{{ c }} * rescale;
# endfor
  }
# endfor
  workgroupBarrier();
# for r in range(first, last)
{{ store_state(r, (r - first) * lane_quads.v * threads) }}
# endfor
  workgroupBarrier();
# endfor
# endmacro

{#- The partial state of a row whose O begins at `first` of `exchange`: O, and behind it row_max, row_sum and the largest score. -#}
# macro store_state(r, first)
  if (first_row + {{ r }}u < row_end) {
    let group_row = first_row + {{ r }}u;
    let state_at = ((entry * params.heads + kv_head * heads_per_kv + group_row % heads_per_kv) * params.queries
      + group_row / heads_per_kv) * params.most_splits + split;
    for (var item = thread; item < {{ lane_quads.v * lanes }}u; item += THREADS) {
      let c = item / LANES;
      let at = {{ first }}u + c * THREADS + item % LANES;
      var x = exchange[at];
      for (var n = 1u; n < SLOTS; n++) { x += exchange[at + n * LANES]; }
      let quad = (item % LANES + c / {{ vector_quads }}u * LANES) * {{ vector_quads }}u + c % {{ vector_quads }}u;
      if (quad < {{ operand_quads.o }}u) { partials[state_at * {{ operand_quads.o + 1 }}u + quad] = x; }
    }
    if (thread == 0u) {
      var row_sum = 0.0;
      for (var n = 0u; n < SLOTS; n++) {
        let slot_state = slot_states[n * ROWS + {{ r }}u];
        row_sum = fma(exp1(slot_state.x - m_{{ r }}), slot_state.y, row_sum);
      }
# if has_row_max
      var largest = LOWEST;
      for (var n = 0u; n < SLOTS; n++) { largest = max(largest, p_tile[n * ROWS + {{ r }}u].x); }
# endif
      partials[state_at * {{ operand_quads.o + 1 }}u + {{ operand_quads.o }}u] =
        vec4<f32>(m_{{ r }}, row_sum, {{ "largest" if has_row_max else "0.0" }}, 0.0);
    }
  }
# endmacro

@compute @workgroup_size({{ threads }})
fn main(
  @builtin(workgroup_id) workgroup: vec3<u32>,
  @builtin(num_workgroups) grid: vec3<u32>,
  @builtin(local_invocation_index) thread: u32,
) {
{{ begin_group() }}
  let first_row = workgroup.x % params.row_tiles * ROWS;
  if (split >= range.splits) { return; }
  let slot = thread / LANES;
  let lane = thread % LANES;
  let row_end = heads_per_kv * params.queries;
{{ begin_sequence() }}

{{ load_q() }}
{{ begin_softmax() }}
{{ load_first_tile() }}
  let last_position = offset + i32(params.queries) - 1;
  while (tile < end) {
{{ find_next_tile() }}
# if relative
    let base = tile_base(block, kv_head, start);
# endif
    // Whether some row does not see some key of the tile.
    let is_partial = start + TILE > range.keys || i32(start + TILE) - 1 > offset + params.right
      || (i32(start) < last_position - params.left && start + TILE > params.sink_tokens){{ " || i32(start + TILE) > offset" if tree }};
# for round in range(steps // exchanged)
{{ products(round) }}
    workgroupBarrier();
{{ softmax(round) }}
    workgroupBarrier();
{{ rescale(round) }}
{{ accumulate(round) }}
# endfor
    start = next_start;
# if paged and relative
    block = next_block;
# endif
    tile += 1u;
  }
{{ merge_slots() }}
}
