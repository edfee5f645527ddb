{#- The cooperative micro-kernel: matrix products by subgroups on square fragments, f16 in and f32 out (tensor cores).

    As in the portable one, a kernel keeps a tile of rows (queries, or keys in the d_k/d_v kernel) and walks over tiles of
    columns. A subgroup has ROW_FRAGMENTS x SIDE rows to itself. Their operands and accumulators are fragments in its registers,
    each with a name of its own: drivers do not keep indexed arrays there. Two kinds of product:

      product(s, a, b)        s[row, column] = sum over features of a[row] * b[column]
      accumulate(x, b)        x[row] += sum over columns of weights[row, column] * b[column]

    Columns are staged in workgroup memory for all subgroups, twice: while one tile is in use, the next one is under way, and
    one barrier a tile is enough. WGSL has no arithmetic on a fragment's elements, so scores go through workgroup memory to
    become weights: `park` leaves a row of fragments in the subgroup's strip, `take` reads them back by rows, LANES_A_ROW
    lanes to a row. Only the subgroup's own lanes stand between; a strip's second use waits for all of them.

    Fragments have no hidden elements: where a hidden column is NaN or infinite, its zero weight makes a NaN of the results.
    `finish` reports a tile that holds one, and the portable kernel computes that tile again. -#}

{%- macro declare() %}
const SIDE: u32 = {{ side }}u;
const LANES: u32 = {{ lanes }}u;
const SUBGROUPS: u32 = {{ subgroups }}u;
const THREADS: u32 = {{ threads }}u;
const LANES_A_ROW: u32 = {{ lanes // side }}u;
// Rows are padded so that neighbours start in different banks; fragment loads want multiples of 16 bytes.
const STRIP_ROW: u32 = {{ strip_row }}u;
const WEIGHT_ROW: u32 = {{ weight_row }}u;
{% for b in staged %}
const {{ b | upper }}_ROW: u32 = {{ staged_rows[b] }}u;
const {{ b | upper }}_TILE: u32 = {{ staged_rows[b] * tile_columns }}u;
var<workgroup> {{ b }}_stage: array<vec4<f16>, {{ 2 * staged_rows[b] * tile_columns }}>;
{% endfor %}
var<workgroup> strips: array<vec4<f32>, {{ subgroups * side * strip_row }}>;
var<workgroup> weights: array<vec4<f16>, {{ subgroups * row_fragments * weight_sets * side * weight_row }}>;
{% if column_statistics %}
// lse and delta of two tiles of columns.
var<workgroup> statistics: array<f32, {{ 4 * tile_columns }}>;
{% endif %}
var<workgroup> broken: atomic<u32>;

// By the bits: compilers may take for granted that a float comparison meets no NaN.
fn is_finite4(x: vec4<f32>) -> bool {
  return all((bitcast<vec4<u32>>(x) & vec4<u32>(0x7f800000u)) < vec4<u32>(0x7f800000u));
}
{% endmacro -%}

{%- macro begin() %}
  let strip = subgroup * {{ side * strip_row }}u;
  // A lane's row within a fragment, and its place among the lanes of that row.
  let lane_row = lane / LANES_A_ROW;
  let part = lane % LANES_A_ROW;
  let strip_at = strip + lane_row * STRIP_ROW + part;
  let weight_at = (subgroup * {{ row_fragments * weight_sets * side }}u + lane_row) * WEIGHT_ROW + part;
  if (thread == 0u) { atomicStore(&broken, 0u); }
{% for r in range(row_fragments) %}
  let row_{{ r }} = row0 + subgroup * {{ row_fragments * side }}u + {{ r * side }}u + lane_row;
{% endfor %}
{% endmacro -%}

{#- The subgroup's rows of an operand as fragments, times `factor`; zeros beyond its end. -#}
{%- macro resident(a, factor) %}
{% for r in range(row_fragments) %}{% for f in range(fragments[a]) %}
  for (var quad = part; quad < {{ side // 4 }}u; quad += LANES_A_ROW) {
    var x = vec4<f16>();
    if (row_{{ r }} < row_limit{% if (f + 1) * side // 4 > operand_quads[a] %} && {{ f * side // 4 }}u + quad < {{ operand_quads[a] }}u{% endif %}) {
      x = half_{{ a }}({{ a }}_base + row_{{ r }} * params.{{ a }}.seq, {{ f * side // 4 }}u + quad, {{ factor }});
    }
    weights[weight_at - part + quad] = x;
  }
  subgroupBarrier();
  let {{ a }}_{{ r }}_{{ f }} = coopLoadT<coop_mat{{ side }}x{{ side }}<f16, A>>(&weights[weight_at - part - lane_row * WEIGHT_ROW], WEIGHT_ROW);
  subgroupBarrier();
{% endfor %}{% endfor %}
{% endmacro -%}

{%- macro accumulator(x, operand) %}
{% for r in range(row_fragments) %}{% for f in range(fragments[operand]) %}
  var {{ x }}_{{ r }}_{{ f }} = coop_mat{{ side }}x{{ side }}<f32, C>();
{% endfor %}{% endfor %}
{% endmacro -%}

{#- A thread's share of a staged tile; `put` leaves it in workgroup memory. -#}
{%- macro shares(b) %}
{% for n in range(staged_shares[b]) %}
  var {{ b }}_share_{{ n }} = vec4<f16>();
{% endfor %}
{% endmacro -%}

{#- Reads a thread's share of the tile of columns from `column` on. Columns beyond the end are the last one again: they are
    hidden, but must be finite where the others are. -#}
{%- macro fetch(b, column, factor) %}
{% set quads = staged_quads[b] %}
{% set total = tile_columns * quads %}
{% for n in range(staged_shares[b]) %}
{% if (n + 1) * threads > total %}
    if (thread < {{ total - n * threads }}u)
{% endif %}
    {
      let item = thread + {{ n * threads }}u;
      let source = min({{ column }} + item / {{ quads }}u, column_limit - 1u);
{% if quads > operand_quads[b] %}
      if (item % {{ quads }}u < {{ operand_quads[b] }}u)
{% endif %}
      { {{ b }}_share_{{ n }} = half_{{ b }}({{ b }}_base + source * params.{{ b }}.seq, item % {{ quads }}u, {{ factor }}); }
    }
{% endfor %}
{% endmacro -%}

{%- macro put(b, stage) %}
{% set quads = staged_quads[b] %}
{% set total = tile_columns * quads %}
{% for n in range(staged_shares[b]) %}
{% if (n + 1) * threads > total %}
    if (thread < {{ total - n * threads }}u)
{% endif %}
    {
      let item = thread + {{ n * threads }}u;
      {{ b }}_stage[{{ stage }} * {{ b | upper }}_TILE + item / {{ quads }}u * {{ b | upper }}_ROW + item % {{ quads }}u] = {{ b }}_share_{{ n }};
    }
{% endfor %}
{% endmacro -%}

{#- s[row, column] = a[row] . b[column]. -#}
{%- macro product(s, a, b, stage) %}
{% for c in range(column_fragments) %}
{% for r in range(row_fragments) %}
    {{ s }}_{{ r }}_{{ c }} = coop_mat{{ side }}x{{ side }}<f32, C>();
{% endfor %}
{% for f in range(fragments[a]) %}
    {
      let column = coopLoad<coop_mat{{ side }}x{{ side }}<f16, B>>(&{{ b }}_stage[{{ stage }} * {{ b | upper }}_TILE + {{ c * side }}u * {{ b | upper }}_ROW + {{ f * side // 4 }}u], {{ b | upper }}_ROW);
{% for r in range(row_fragments) %}
      {{ s }}_{{ r }}_{{ c }} = coopMultiplyAdd({{ a }}_{{ r }}_{{ f }}, column, {{ s }}_{{ r }}_{{ c }});
{% endfor %}
    }
{% endfor %}
{% endfor %}
{% endmacro -%}

{%- macro scores_of(s) %}
{% for r in range(row_fragments) %}{% for c in range(column_fragments) %}
    var {{ s }}_{{ r }}_{{ c }} = coop_mat{{ side }}x{{ side }}<f32, C>();
{% endfor %}{% endfor %}
{% endmacro -%}

{#- Leaves a row of fragments in the strip, and waits for it. -#}
{%- macro park(s, r) %}
{% for c in range(column_fragments) %}
    coopStoreT({{ s }}_{{ r }}_{{ c }}, &strips[strip + {{ c * side // 4 }}u], STRIP_ROW);
{% endfor %}
    subgroupBarrier();
{% endmacro -%}

{#- First column of a lane's n-th quad of a strip. -#}
{%- macro quad_column(n) %}column0 + 4u * ({{ n * lanes // side }}u + part){% endmacro -%}

{%- macro take(x, r) %}
{% for n in range(lane_quads) %}
    let {{ x }}_{{ r }}_{{ n }} = strips[strip_at + {{ n * lanes // side }}u];
{% endfor %}
    subgroupBarrier();
{% endmacro -%}

{%- macro keep_weights(r, set, n, x) %}
    weights[weight_at + {{ (r * weight_sets + set) * side * weight_row + n * lanes // side }}u] = vec4<f16>({{ x }});
{% endmacro -%}

{#- x[row] += sum over columns of weights[row, column] * b[column]. -#}
{%- macro accumulate(x, b, stage, set) %}
{% for c in range(column_fragments) %}
    {
{% for r in range(row_fragments) %}
      let weight_{{ r }} = coopLoadT<coop_mat{{ side }}x{{ side }}<f16, A>>(&weights[(subgroup * {{ row_fragments * weight_sets }}u + {{ r * weight_sets + set }}u) * {{ side * weight_row }}u + {{ c * side // 4 }}u], WEIGHT_ROW);
{% endfor %}
{% for f in range(fragments[b]) %}
      {
        let column = coopLoadT<coop_mat{{ side }}x{{ side }}<f16, B>>(&{{ b }}_stage[{{ stage }} * {{ b | upper }}_TILE + {{ c * side }}u * {{ b | upper }}_ROW + {{ f * side // 4 }}u], {{ b | upper }}_ROW);
{% for r in range(row_fragments) %}
        {{ x }}_{{ r }}_{{ f }} = coopMultiplyAdd(weight_{{ r }}, column, {{ x }}_{{ r }}_{{ f }});
{% endfor %}
      }
{% endfor %}
    }
{% endfor %}
{% endmacro -%}

{#- One fragment of an accumulator in the strip, and a lane's quads of it as `quad`. -#}
{%- macro by_quads(x) %}
    subgroupBarrier();
    coopStoreT({{ x }}, &strips[strip], STRIP_ROW);
    subgroupBarrier();
    for (var quad = part; quad < {{ side // 4 }}u; quad += LANES_A_ROW)
{%- endmacro -%}

{#- Writes an accumulator times `factor`, which may name a value of each row by its stem and "_"; of o also what rounding
    takes, where that is wanted. -#}
{%- macro store(x, operand, factor) %}
{% for r in range(row_fragments) %}
  {
    let base = {{ operand }}_base + row_{{ r }} * params.{{ operand }}.seq;
{% if o_rest %}
    let rest_base = o_rest_base + row_{{ r }} * params.o_rest.seq;
{% endif %}
{% for f in range(fragments[operand]) %}
    {{ by_quads(x ~ "_" ~ r ~ "_" ~ f) }} {
      if (row_{{ r }} < row_limit{% if (f + 1) * side // 4 > operand_quads[operand] %} && {{ f * side // 4 }}u + quad < {{ operand_quads[operand] }}u{% endif %}) {
        let result = strips[strip_at - part + quad] * {{ factor ~ r if factor is endingwith("_") else factor }};
        if (!is_finite4(result)) { atomicStore(&broken, 1u); }
        store_{{ operand }}(base, {{ f * side // 4 }}u + quad, result);
{% if o_rest %}
        store_o_rest(rest_base, {{ f * side // 4 }}u + quad, result);
{% endif %}
      }
    }
{% endfor %}
  }
{% endfor %}
{% endmacro -%}

{#- Reports whether the tile is to be computed again. -#}
{%- macro report() %}
  workgroupBarrier();
  if (thread == 0u) { repairs[index] = atomicLoad(&broken); }
{% endmacro -%}
