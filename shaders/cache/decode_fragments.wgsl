{#- A few queries against many cached keys, in f16 on cooperative matrices whose elements are computed with in registers. A subgroup computes ROWS
    rows (queries of the query heads of one key head) against some tiles of a split of the keys, on its own: keys and values go from memory
    to registers, and from there into matrices. KEY_PARTS subgroups of a workgroup take the tiles of a split in turn, ROW_PARTS rows each
    of their own. Rows of a fragment of scores are rows, columns are keys:

      row_max = floor;  row_sum = 0;  O = 0
      for each tile of keys of the subgroup, full ones in a loop of their own:
        S = Q K^T                                        products, scores: softcap and ALiBi where asked for
        load K, `ahead` tiles on                         load: of full tiles
        S = hidden where the rule hides                  mask: of partial tiles
        m = max(row_max, max of S by rows)               row_max
        O *= exp(row_max - m);  row_sum *= the same      rescale
        P = exp(S - m)                                   exponentiate
        row_sum += sum of P by rows                      row_sum
        O += P V                                         accumulate
        load V, `ahead` tiles on                         load: of full tiles
      add up the subgroups, each with a softmax of its own    merge
      partial state = O, row_max, row_sum                store_state

    A lane loads vectors of 16 bytes, eight features of a key, and makes right operands of them, whose elements it has to give in the
    places of the driver's layout (`shares`). So a product's features are those of the vectors in another order, in which Q is loaded,
    too; and the features of O are written to where they belong.

      K   a lane has k.keys.offsets keys, and of each the vectors of its part: vector n of the part is n * parts + part of the row
      V   the same, with the keys and features that rows and columns of a right operand have -#}
enable f16;
enable wgpu_cooperative_matrix;
# include "params.wgsl"
# include "operands.wgsl"
# include "exp.wgsl"
# include "cache/range.wgsl"
# from "cache/group.wgsl" import begin_group, begin_sequence
# if tree
# include "cache/tree.wgsl"
# endif

{#- Scores are more than products, which the exponential scales. -#}
# set formed = softcap or alibi
# set subgroups = key_parts * row_parts
// Rows of a subgroup.
const ROWS: u32 = {{ rows }}u;
const KEY_PARTS: u32 = {{ key_parts }}u;
// Vectors of 16 bytes in a row of keys and of values.
const KEY_ROW: u32 = {{ row_vectors.k }}u;
const VALUE_ROW: u32 = {{ row_vectors.v }}u;
const HIDDEN: f32 = -1e30;
// row_max may lag behind by this power of two, within the range of f16, before O is rescaled.
const SLACK: f32 = 8.0;
# if key_parts > 1
// O of the subgroups, `merged` fragments of each at a time, as its lanes have it.
var<workgroup> exchange: array<vec4<f32>, {{ subgroups * merged * lanes * components // 4 }}>;
// row_max, row_sum and the largest score of each row of the subgroups.
var<workgroup> subgroup_states: array<vec4<f32>, {{ subgroups * row_fragments * side }}>;
# endif

// Marker functions: calls of them become instructions of SPIR-V, and their bodies are never run.
fn component_c(m: coop_mat{{ side }}x{{ side }}<f32, C>, i: u32) -> f32 { return 0.0; }
# for role, scalar in [["a", "f16"], ["b", "f16"], ["c", "f32"]]
fn matrix_of_{{ role }}({% for i in range(components) %}{{ ", " if i > 0 }}x{{ i }}: {{ scalar }}{% endfor %}) -> coop_mat{{ side }}x{{ side }}<{{ scalar }}, {{ role | upper }}> {
  return coop_mat{{ side }}x{{ side }}<{{ scalar }}, {{ role | upper }}>();
}
# endfor
fn bits_as_halves(x: u32) -> vec2<f16> { return vec2<f16>(); }

// The feature of a row of K^T in the fragment with these features, and of a column of V.
fn key_feature(fragment: u32, place: u32) -> u32 {
  let n = fragment * {{ k.features.offsets | length }}u + {{ k.features.rank_of_place }};
  return (n / 8u * {{ k.features.parts }}u + {{ k.features.part_of_place }}) * 8u + n % 8u;
}

fn value_feature(fragment: u32, place: u32) -> u32 {
  let n = fragment * {{ v.features.offsets | length }}u + {{ v.features.rank_of_place }};
  return (n / 8u * {{ v.features.parts }}u + {{ v.features.part_of_place }}) * 8u + n % 8u;
}
# if rolling

// The row of a place: behind the sink rows, the window begins with its oldest row.
fn row_in_window(place: u32, oldest: u32) -> u32 {
  let at = place - params.sink_rows + oldest;
  return select(params.sink_rows + select(at, at - params.window_rows, at >= params.window_rows), place, place < params.sink_rows);
}
# endif

// The tiles of which every row sees every key, but for tiles of sink tokens.
fn full_tiles(range: KeyRange, first_position: i32, last_position: i32) -> vec2<u32> {
  let shown = min(i32(range.keys), first_position + params.right + 1);
  let shown_end = u32(max({{ "min(shown, first_position)" if tree else "shown" }}, 0)) / TILE;
  let shown_start = (u32(max(last_position - params.left, 0)) + TILE - 1u) / TILE;
  let window = vec2<u32>(max(shown_start, range.first), max(shown_end, range.first));
  return window - range.first + range.sink_tiles;
}
# if several

fn has_nonfinite_halves(x: vec4<u32>) -> bool {
  return any(((x & vec4<u32>(0x7c00u)) == vec4<u32>(0x7c00u)) | ((x & vec4<u32>(0x7c000000u)) == vec4<u32>(0x7c000000u)));
}
# endif

{#- The type of a fragment: A, B or C, left operand, right operand or result. -#}
{%- macro fragment(role) %}coop_mat{{ side }}x{{ side }}<{{ "f32" if role == "C" else "f16" }}, {{ role }}>{% endmacro -%}

{#- The lane's row of component i, and the place of its key. -#}
{%- macro row_of(r, i) %}{{ r * rows_a_lane + row_ranks[i] }}{% endmacro -%}
{%- macro place_of(c, i) %}first + element_column + {{ c * side + column_offsets[column_ranks[i]] }}u{% endmacro -%}

{#- The place of a lane's key in its tile, by the column of fragments and the key's rank. -#}
{%- macro key_at(x, c, r) %}{{ x }}_key + {{ c * side + shares[x].keys.offsets[r] }}u{% endmacro -%}

{#- `base`, the first row that is read for a tile from `start` on: none lies beyond its block. In a ring the row that places count from. -#}
# macro row_of_tile(start)
# if paged
      let page = {{ start }} >> params.block_shift;
      if (page - first_page >= {{ lanes }}u) {
        first_page = page;
        pages = state[table + min(page + lane, params.table_row - 1u)];
      }
      let block = subgroupShuffle(pages, page - first_page);
      let base = (block * params.kv_heads + kv_head) * params.block_rows + ({{ start }} & (params.block_rows - 1u));
# elif rolling
      let base = (sequence * params.kv_heads + kv_head) * params.block_rows;
# else
      let base = (sequence * params.kv_heads + kv_head) * params.block_rows + min({{ start }}, params.block_rows - TILE);
# endif
# endmacro

{#- Loads a lane's vectors of a tile. -#}
# macro load(x, a, start)
# set cache, pitch = ("keys", "KEY_ROW") if x == "k" else ("values", "VALUE_ROW")
# for c, r in pairs(columns, shares[x].keys.offsets | length)
      {
# if rolling
        let row = base + row_in_window(min({{ start }} + {{ key_at(x, c, r) }}, max(range.keys, 1u) - 1u), oldest);
# else
        let row = base + {{ key_at(x, c, r) }};
# endif
        let at = row * {{ pitch }} + {{ x }}_part;
# for n in range(shares[x].vectors)
        {{ x }}_{{ a }}_{{ c }}_{{ r }}_{{ n }} = {{ cache }}[at + {{ n * shares[x].features.parts }}u];
# endfor
      }
# endfor
# endmacro

{#- The right operand of fragment f of features and c of keys, from a lane's vectors. -#}
{%- macro right(x, name, c, f) -%}
{%- set own = shares[x] -%}
{%- set count = own.features.offsets | length -%}
matrix_of_b(
{%- for i in range(components) -%}
{%- set n = f * count + own.features.ranks[i] -%}
{{ ", " if i > 0 }}bits_as_halves({{ name }}_{{ c }}_{{ own.keys.ranks[i] }}_{{ n // 8 }}.{{ xyzw[n % 8 // 2] }}).{{ xyzw[n % 2] }}
{%- endfor -%}
)
{%- endmacro -%}

{#- The largest number, or the sum, of the lanes of a row. -#}
# macro reduce_row(x, reduction)
# for n in row_lanes
# if reduction == "sum"
  {{ x }} += subgroupShuffleXor({{ x }}, {{ n }}u);
# else
  {
    let other = subgroupShuffleXor({{ x }}, {{ n }}u);
    {{ x }} = select({{ x }}, other, other > {{ x }});
  }
# endif
# endfor
# endmacro

{#- The tiles of the subgroup. A shorter sequence has fewer splits, and the remaining workgroups find no tile. No lane returns, because all
    lanes must meet at matrices. -#}
# macro begin_tiles()
  let end = min((split + 1u) * range.split_tiles, range.tiles);
  let last_tile = max(end, 1u) - 1u;
  var tile = split * range.split_tiles + key_part;
# if paged
  // Each lane holds a page of the block table, from this one on: a lookup for each tile would delay the loads of its rows.
  let table = params.table + sequence * params.table_row;
  var first_page = tile_start(range, min(tile, last_tile)) >> params.block_shift;
  var pages = state[table + min(first_page + lane, params.table_row - 1u)];
# endif
# endmacro

# macro declare_tile(a)
# for x in ["k", "v"]
# for c, r in pairs(columns, shares[x].keys.offsets | length)
# for n in range(shares[x].vectors)
  var {{ x }}_{{ a }}_{{ c }}_{{ r }}_{{ n }} = vec4<u32>();
# endfor
# endfor
# endfor
# endmacro

{#- The first of several tiles, with their loads under way. -#}
# macro load_first_tiles()
# for a in range(ahead)
{{ declare_tile(a) }}
  {
    let start = tile_start(range, min(tile + {{ a }}u * KEY_PARTS, last_tile));
{{ row_of_tile("start") }}
{{ load("k", a, "start") }}
{{ load("v", a, "start") }}
  }
# endfor
# endmacro

{#- A lane's rows: `row_H` of the group, `position_H`, and what a row has in the softmax. -#}
# macro begin_rows()
# for h in range(lane_rows)
  let row_{{ h }} = first_row + element_row + {{ row_offsets[h] }}u;
# if several or alibi
  // Rows beyond the last are like it.
  let group_row_{{ h }} = min(row_{{ h }}, row_end - 1u);
# endif
# if tree
  let query_{{ h }} = group_row_{{ h }} / heads_per_kv;
  let sees_{{ h }} = tree_mask[tree + query_{{ h }}];
  let position_{{ h }} = offset + tree_depth(sees_{{ h }}, query_{{ h }});
# elif several
  let position_{{ h }} = offset + i32(group_row_{{ h }} / heads_per_kv);
# else
  let position_{{ h }} = offset;
# endif
# if alibi
  let slope_{{ h }} = alibi_slopes[params.slope_offset + kv_head * heads_per_kv + group_row_{{ h }} % heads_per_kv];
# endif
  // Where nothing has been seen the maximum is finite, and so far above hidden scores that their probabilities are zero.
  var row_max_{{ h }} = 0.5 * HIDDEN;
  // Scores above the limit raise the maximum.
  var limit_{{ h }} = 0.5 * HIDDEN;
  var row_sum_{{ h }} = 0.0;
# if has_row_max
  // The largest visible score of this lane's columns, which row_max may lag behind.
  var largest_{{ h }} = HIDDEN;
# endif
# endfor
# endmacro

{#- The queries times the sign of the scale, and O = 0. -#}
# macro load_q()
# for h in range(lane_rows)
# for f in range(features.k)
# for quad in range(query_quads)
  var q_{{ h }}_{{ f }}_{{ quad }} = vec4<f32>();
# endfor
# endfor
  if (row_{{ h }} < row_end) {
    let base = operand_base(params.q, entry, kv_head * heads_per_kv + row_{{ h }} % heads_per_kv) + row_{{ h }} / heads_per_kv * params.q.seq;
# for f in range(features.k)
# if query_is_key
# for quad in range(query_quads)
# set n = f * query_quads + quad
    q_{{ h }}_{{ f }}_{{ quad }} = load_q(base, ({{ n // 2 * k.features.parts }}u + k_part) * 2u + {{ n % 2 }}u);
# endfor
# else
# for m in range(columns_a_lane)
    {
      let feature = key_feature({{ f }}u, element_column + {{ column_offsets[m] }}u);
      q_{{ h }}_{{ f }}_{{ m // 4 }}.{{ xyzw[m % 4] }} = load_q(base, feature / 4u)[feature % 4u];
    }
# endfor
# endif
# endfor
  }
# endfor
# for r, f in pairs(row_fragments, features.k)
  let q_{{ r }}_{{ f }} = matrix_of_a({% for i in range(components) %}{{ ", " if i > 0 }}{% if row_ranks[i] < used_ranks %}f16(q_{{ row_of(r, i) }}_{{ f }}_{{ column_ranks[i] // 4 }}.{{ xyzw[column_ranks[i] % 4] }} * query_sign){% else %}0.0h{% endif %}{% endfor %});
# endfor
# for r, f in pairs(row_fragments, features.v)
  var o_{{ r }}_{{ f }} = {{ fragment("C") }}();
# endfor
# endmacro

{#- Whether a row sees the key at a place. -#}
{%- macro sees(h, place) -%}
{%- if tree -%}
tree_visible(position_{{ h }}, sees_{{ h }}, {{ place }}, range.keys, tree, offset)
{%- else -%}
visible(position_{{ h }}, {{ place }}, range.keys)
{%- endif -%}
{%- endmacro -%}

{#- A hidden value may be a NaN, and 0 times a NaN is one: it is taken as zero. -#}
# macro zero_hidden_values(a)
# if several
    // Keys with values that are not finite, which some rows may not see.
    var bad = 0u;
# endif
# for c, r in pairs(columns, v.keys.offsets | length)
    {
        let place = first + {{ key_at("v", c, r) }};
# if several
        let is_hidden = place < start || place >= range.keys;
        var is_bad = false;
# for n in range(v.vectors)
        is_bad = is_bad || has_nonfinite_halves(v_{{ a }}_{{ c }}_{{ r }}_{{ n }});
# endfor
        if (!is_hidden && is_bad) { bad |= 1u << ({{ key_at("v", c, r) }}); }
# else
        let is_hidden = place < start || !visible(offset, place, range.keys);
# endif
        if (is_hidden) {
# for n in range(v.vectors)
          v_{{ a }}_{{ c }}_{{ r }}_{{ n }} = vec4<u32>();
# endfor
        }
    }
# endfor
# endmacro

{#- Values that are not finite, key by key: O += P V of the rows that see the key. To all others the value is zero. -#}
# macro add_bad_values(a)
    for (var all_bad = subgroupOr(bad); all_bad != 0u; all_bad &= all_bad - 1u) {
        let bad_key = firstTrailingBit(all_bad);
# for c, r in pairs(columns, v.keys.offsets | length)
# for n in range(v.vectors)
        let own_{{ c }}_{{ r }}_{{ n }} = select(vec4<u32>(), v_{{ a }}_{{ c }}_{{ r }}_{{ n }}, {{ key_at("v", c, r) }} == bad_key);
# endfor
# endfor
# for h in range(lane_rows)
        let sees_key_{{ h }} = {{ sees(h, "first + bad_key") }};
# endfor
# for r, f in pairs(row_fragments, features.v)
        {
          var sum = o_{{ r }}_{{ f }};
# for c in range(columns)
          sum = coopMultiplyAdd(p_{{ r }}_{{ c }}, {{ right("v", "own", c, f) }}, sum);
# endfor
          o_{{ r }}_{{ f }} = matrix_of_c({% for i in range(components) %}{{ ", " if i > 0 }}{% if row_ranks[i] < used_ranks %}select(component_c(o_{{ r }}_{{ f }}, {{ i }}u), component_c(sum, {{ i }}u), sees_key_{{ row_of(r, i) }}){% else %}0.0{% endif %}{% endfor %});
        }
# endfor
    }
# for c, r in pairs(columns, v.keys.offsets | length)
    if (((bad >> ({{ key_at("v", c, r) }})) & 1u) == 1u) {
# for n in range(v.vectors)
      v_{{ a }}_{{ c }}_{{ r }}_{{ n }} = vec4<u32>();
# endfor
    }
# endfor
# endmacro

{#- S = Q K^T: element i of this lane in fragment r, c is s_r_c_i. -#}
# macro products(a)
    // S = Q K^T.
# for r, c in pairs(row_fragments, columns)
    var fragment_{{ r }}_{{ c }} = {{ fragment("C") }}();
# endfor
# for f, c in pairs(features.k, columns)
    {
      let key = {{ right("k", "k_" ~ a, c, f) }};
# for r in range(row_fragments)
      fragment_{{ r }}_{{ c }} = coopMultiplyAdd(q_{{ r }}_{{ f }}, key, fragment_{{ r }}_{{ c }});
# endfor
    }
# endfor
# endmacro

# macro scores()
# for r, c, i in used
    var s_{{ r }}_{{ c }}_{{ i }} = component_c(fragment_{{ r }}_{{ c }}, {{ i }}u);
# set s = "s_" ~ r ~ "_" ~ c ~ "_" ~ i
# if softcap
    {{ s }} *= abs(params.scale) / params.softcap;
    // Drivers' own functions overflow for large numbers.
    {{ s }} = params.softcap * tanh(select({{ s }}, sign({{ s }}) * 20.0, abs({{ s }}) > 20.0));
# elif alibi
    {{ s }} *= abs(params.scale);
# endif
# if alibi
    // S -= slope |p - j|, by positions in the sequence, exact below 2^24.
    {
      let place = {{ place_of(c, i) }};
      let key = {{ "key_position(place, tree, offset)" if tree else "i32(place)" }}{{ " - select(0, given_up, place < params.sink_rows)" if rolling }};
      {{ s }} -= slope_{{ row_of(r, i) }} * f32(abs(position_{{ row_of(r, i) }} - key));
    }
# endif
# endfor
# endmacro

# macro mask()
# for r, c, i in used
    {
      let place = {{ place_of(c, i) }};
      if (place < start || !{{ sees(row_of(r, i), "place") }}) { s_{{ r }}_{{ c }}_{{ i }} = HIDDEN; }
    }
# endfor
{{ keep_largest() }}
# endmacro

# macro keep_largest()
# if has_row_max
# for r, c, i in used
    largest_{{ row_of(r, i) }} = max(largest_{{ row_of(r, i) }}, s_{{ r }}_{{ c }}_{{ i }});
# endfor
# endif
# endmacro

{#- m = max(row_max, max of S by rows), for rows that have passed their limit. `rescale_H` is exp(row_max - m). A NaN among scores makes the row
    NaN, but not its maximum: a maximum below another score would not end the loop. -#}
# macro row_max()
# for h in range(lane_rows)
      var tile_max_{{ h }} = HIDDEN;
# endfor
# for r, c, i in used
      tile_max_{{ row_of(r, i) }} = select(tile_max_{{ row_of(r, i) }}, s_{{ r }}_{{ c }}_{{ i }}, s_{{ r }}_{{ c }}_{{ i }} > tile_max_{{ row_of(r, i) }});
# endfor
# for h in range(lane_rows)
{{ reduce_row("tile_max_" ~ h, "max") }}
      var rescale_{{ h }} = 1.0;
      if (tile_max_{{ h }} > limit_{{ h }}) {
        rescale_{{ h }} = exp2((row_max_{{ h }} - tile_max_{{ h }}) * scale);
        row_max_{{ h }} = tile_max_{{ h }};
        limit_{{ h }} = tile_max_{{ h }} + SLACK / scale;
      }
# endfor
# endmacro

{#- O *= exp(row_max - m), and row_sum. -#}
# macro rescale()
# for h in range(lane_rows)
      row_sum_{{ h }} *= rescale_{{ h }};
# endfor
# for r, f in pairs(row_fragments, features.v)
      o_{{ r }}_{{ f }} = matrix_of_c({% for i in range(components) %}{{ ", " if i > 0 }}{% if row_ranks[i] < used_ranks %}component_c(o_{{ r }}_{{ f }}, {{ i }}u) * rescale_{{ row_of(r, i) }}{% else %}0.0{% endif %}{% endfor %});
# endfor
# endmacro

{#- P = exp(S - m). -#}
{%- macro exponentiate(r, c, i) %}exp2((s_{{ r }}_{{ c }}_{{ i }} - row_max_{{ row_of(r, i) }}) * scale){% endmacro -%}

{#- The online softmax. row_max follows only when it has grown by more than SLACK, which is rare. It leaves P as left operands. -#}
# macro softmax()
    // m = max(row_max, max of S by rows);  O and row_sum *= exp(row_max - m). Runs at most once.
    loop {
      if (!subgroupAny({% for r, c, i in used %}{{ " || " if not loop.first }}s_{{ r }}_{{ c }}_{{ i }} > limit_{{ row_of(r, i) }}{% endfor %})) { break; }
{{ row_max() }}
{{ rescale() }}
    }
    // P = exp(S - m);  row_sum += sum of P, of the columns of this lane; `merge` adds up the lanes of a row.
# for r, c, i in used
    let p_{{ r }}_{{ c }}_{{ i }} = {{ exponentiate(r, c, i) }};
# endfor
# for h in range(lane_rows)
    row_sum_{{ h }} += {% for r, c, i in used if row_of(r, i) | int == h %}{{ " + " if not loop.first }}p_{{ r }}_{{ c }}_{{ i }}{% endfor %};
# endfor
# for r, c in pairs(row_fragments, columns)
    let p_{{ r }}_{{ c }} = matrix_of_a({% for i in range(components) %}{{ ", " if i > 0 }}{% if row_ranks[i] < used_ranks %}f16(p_{{ r }}_{{ c }}_{{ i }}){% else %}0.0h{% endif %}{% endfor %});
# endfor
# endmacro

{#- O += P V. -#}
# macro accumulate(a)
    // O += P V.
# for c, f in pairs(columns, features.v)
    {
      let value = {{ right("v", "v_" ~ a, c, f) }};
# for r in range(row_fragments)
      o_{{ r }}_{{ f }} = coopMultiplyAdd(p_{{ r }}_{{ c }}, value, o_{{ r }}_{{ f }});
# endfor
    }
# endfor
# endmacro

{#- Sums over the lanes of a row, and over the subgroups with the same rows, in their order: `m_H`, `sum_H` and `factor_H`, by which the
    subgroup's O counts. -#}
# macro merge()
# for h in range(lane_rows)
{{ reduce_row("row_sum_" ~ h, "sum") }}
# if has_row_max
{{ reduce_row("largest_" ~ h, "max") }}
# endif
# endfor
# if key_parts > 1
  // m = max over subgroups of row_max;  O = sum over subgroups of exp(row_max - m) O.
# for h in range(lane_rows)
  if (element_column == 0u) {
    subgroup_states[subgroup * {{ row_fragments * side }}u + element_row + {{ row_offsets[h] }}u] =
      vec4<f32>(row_max_{{ h }}, row_sum_{{ h }}, {{ "largest_" ~ h if has_row_max else "0.0" }}, 0.0);
  }
# endfor
  workgroupBarrier();
  let first_subgroup = row_part * KEY_PARTS;
# for h in range(lane_rows)
  var m_{{ h }} = 0.5 * HIDDEN;
  var sum_{{ h }} = 0.0;
# if has_row_max
  largest_{{ h }} = HIDDEN;
# endif
  {
    let state_of_row = element_row + {{ row_offsets[h] }}u;
    for (var n = first_subgroup; n < first_subgroup + KEY_PARTS; n += 1u) {
      m_{{ h }} = max(m_{{ h }}, subgroup_states[n * {{ row_fragments * side }}u + state_of_row].x);
    }
    for (var n = first_subgroup; n < first_subgroup + KEY_PARTS; n += 1u) {
      let other = subgroup_states[n * {{ row_fragments * side }}u + state_of_row];
      sum_{{ h }} = fma(exp2((other.x - m_{{ h }}) * scale), other.y, sum_{{ h }});
# if has_row_max
      largest_{{ h }} = max(largest_{{ h }}, other.z);
# endif
    }
  }
  let factor_{{ h }} = exp2((row_max_{{ h }} - m_{{ h }}) * scale);
# endfor
# else
# for h in range(lane_rows)
  let m_{{ h }} = row_max_{{ h }};
  let sum_{{ h }} = row_sum_{{ h }};
# endfor
# endif
# endmacro

{#- The place of a fragment of O among those that are merged together. -#}
{%- macro chunk_place(r, f) %}{{ (r * features.v + f) % merged }}{% endmacro -%}

{#- The partial state of a row: O, and behind it row_max, row_sum and the largest score. -#}
# macro store_state()
# for h in range(lane_rows)
  let writes_{{ h }} = row_{{ h }} < row_end && split < range.splits;
  let state_at_{{ h }} = (((entry * params.heads + kv_head * heads_per_kv + row_{{ h }} % heads_per_kv) * params.queries
    + row_{{ h }} / heads_per_kv) * params.most_splits + split) * {{ operand_quads.o + 1 }}u;
# endfor
# for chunk in chunks
# if key_parts > 1
# for r, f in chunk
# for quad in range(components // 4)
  exchange[(subgroup * {{ merged }}u + {{ chunk_place(r, f) }}u) * {{ lanes * components // 4 }}u + {{ quad * lanes }}u + lane] =
    vec4<f32>({% for i in range(4 * quad, 4 * quad + 4) %}{{ ", " if i > 4 * quad }}{% if row_ranks[i] < used_ranks %}component_c(o_{{ r }}_{{ f }}, {{ i }}u) * factor_{{ row_of(r, i) }}{% else %}0.0{% endif %}{% endfor %});
# endfor
# endfor
  workgroupBarrier();
# endif
# for r, f in chunk
  {{ "if (key_part == " ~ ((r * features.v + f) % key_parts) ~ "u) " if key_parts > 1 }}{
# for quad in range(components // 4)
# if key_parts > 1
    var x_{{ quad }} = vec4<f32>();
    for (var n = first_subgroup; n < first_subgroup + KEY_PARTS; n += 1u) {
      x_{{ quad }} += exchange[(n * {{ merged }}u + {{ chunk_place(r, f) }}u) * {{ lanes * components // 4 }}u + {{ quad * lanes }}u + lane];
    }
# else
    let x_{{ quad }} = vec4<f32>({% for i in range(4 * quad, 4 * quad + 4) %}{{ ", " if i > 4 * quad }}component_c(o_{{ r }}_{{ f }}, {{ i }}u){% endfor %});
# endif
# endfor
# for i in range(components) if row_ranks[i] < used_ranks
    if (writes_{{ row_of(r, i) }}) {
      let feature = value_feature({{ f }}u, element_column + {{ column_offsets[column_ranks[i]] }}u);
      partials[state_at_{{ row_of(r, i) }} + feature / 4u][feature % 4u] = x_{{ i // 4 }}.{{ xyzw[i % 4] }};
    }
# endfor
  }
# endfor
# if key_parts > 1 and not loop.last
  workgroupBarrier();
# endif
# endfor
# for h in range(lane_rows)
  if (writes_{{ h }} && key_part == 0u && element_column == 0u) {
    // The maximum as a score, for `combine` takes powers of e. It is LOWEST where nothing has been seen.
    let score = select(m_{{ h }}{{ " * abs(params.scale)" if not formed }}, LOWEST, sum_{{ h }} == 0.0);
# if has_row_max
    let largest = select(largest_{{ h }}{{ " * abs(params.scale)" if not formed }}, LOWEST, sum_{{ h }} == 0.0);
# endif
    partials[state_at_{{ h }} + {{ operand_quads.o }}u] = vec4<f32>(score, sum_{{ h }}, {{ "largest" if has_row_max else "0.0" }}, 0.0);
  }
# endfor
# endmacro

@compute @workgroup_size({{ lanes * subgroups }})
fn main(
  @builtin(workgroup_id) workgroup: vec3<u32>,
  @builtin(num_workgroups) grid: vec3<u32>,
  @builtin(subgroup_id) subgroup: u32,
  @builtin(subgroup_invocation_id) lane: u32,
) {
{{ begin_group() }}
  let key_part = subgroup % KEY_PARTS;
  let row_part = subgroup / KEY_PARTS;
  let first_row = workgroup.x % params.row_tiles * {{ rows * row_parts }}u + row_part * ROWS;
  let row_end = heads_per_kv * params.queries;
  // A lane's first row and column in a fragment of scores, and its first key and its part of the features in right operands.
  let element_row = {{ elements.row }};
  let element_column = {{ elements.column }};
# for x in ["k", "v"]
  let {{ x }}_key = {{ shares[x].keys.first }};
  let {{ x }}_part = {{ shares[x].features.part }};
# endfor
{{ begin_sequence() }}
# if formed
  let scale = LOG2_E;
# else
  // Never zero, so that hidden scores stay hidden.
  let scale = max(abs(params.scale) * LOG2_E, 1e-25);
# endif
  let query_sign = sign(params.scale);

{{ begin_tiles() }}
{{ begin_rows() }}
{{ load_q() }}
  let full = full_tiles(range, offset, offset + i32(params.queries) - 1);
  let full_end = min(full.y, end);
  loop {
    // Tiles that are not full, or may not be, one by one.
    loop {
      if (tile >= end || (tile >= full.x && tile < full.y)) { break; }
      let start = tile_start(range, tile);
      // The place of the first row that was read.
      let first = {{ "start" if paged or rolling else "min(start, params.block_rows - TILE)" }};
{{ row_of_tile("start") }}
{{ declare_tile("hidden") }}
{{ load("k", "hidden", "start") }}
{{ load("v", "hidden", "start") }}
{{ products("hidden") }}
{{ scores() }}
{{ mask() }}
{{ softmax() }}
{{ zero_hidden_values("hidden") }}
# if several
{{ add_bad_values("hidden") }}
# endif
{{ accumulate("hidden") }}
      tile += KEY_PARTS;
    }
    if (tile >= end) { break; }
    // Full tiles, with the loads of the next ones under way.
{{ load_first_tiles() }}
    loop {
# for a in range(ahead)
      if (tile >= full_end) { break; }
      {
# if alibi
      let first = tile_start(range, tile);
# endif
      let next = tile_start(range, min(tile + {{ ahead }}u * KEY_PARTS, last_tile));
{{ row_of_tile("next") }}
{{ products(a) }}
{{ load("k", a, "next") }}
{{ scores() }}
{{ keep_largest() }}
{{ softmax() }}
{{ accumulate(a) }}
{{ load("v", a, "next") }}
      tile += KEY_PARTS;
      }
# endfor
    }
  }
{{ merge() }}
{{ store_state() }}
}
