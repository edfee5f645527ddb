{#- The cooperative micro-kernel: matrix products by subgroups on square fragments (tensor cores), f16 in and f32 out.

    A kernel keeps a tile of rows (queries, or keys in d_kv) and walks over tiles of columns. A subgroup has row_fragments x side rows to
    itself. Their operands and accumulators are fragments in its registers, each with a name of its own: drivers do not keep indexed
    arrays there. Two kinds of product occur:

      product(s, a, b)        s[row, column] = sum over features of a[row] * b[column]
      accumulate(x, b)        x[row] += sum over columns of P[row, column] * b[column]

    A lane computes with rows of scores, as quads: `rows_of` takes them out of fragments, and `store_p` makes fragments of probabilities in
    f16, the left operands of `accumulate`. There are two ways (`elements`):

      strips      WGSL has no arithmetic on a fragment's elements, so a row of fragments goes through workgroup memory, LANES_A_ROW lanes a
                  row. The rows belong to one subgroup, and a subgroup barrier is enough.
      elements    SPIR-V has it. Calls of the functions that `declare_elements` declares become its instructions (src/device/markers.rs),
                  and scores stay in registers. A lane has the rows and columns that the driver gives it (ElementLayout). Where a bias
                  is read by quads (`column_at`), columns are staged in an order in which a lane's quads are neighbours.

    Numbers of f32 are split: each is two halves (halves.wgsl), and each product is three. That is written for `elements`.

    Fragments have no hidden elements. A hidden column that is NaN or infinite makes the results NaN, since 0 times it is NaN
    (cooperative/fallback.wgsl). f16 has less range than the numbers that are multiplied (cooperative/units.wgsl, token_scales.wgsl).

    bf16 is multiplied as itself where the device can (`multiplies_bf16`), and has no scales and no units then. Drivers differ in how they make
    bf16 of P and dS: they are larger before by what is cut off (`lifts_p`), or rounded by the kernel (`rounds_p`). WGSL has no type for it:
    vec4<f16> holds the bits of four numbers, and the SPIR-V of `coop_mat<f16>` is a matrix of bf16 (src/device/markers.rs).

    Workgroup memory decides how many workgroups run at a time, and how much the driver has for registers that spill. So rows of fragments
    share one place for scores, P and dS share the P tile, and flags and results on their way out use the place of the scores. The size
    of every array is a multiple of 16 bytes, in whatever order a driver places them: NVIDIA's driver loads a fragment from an unaligned
    address as if it were rounded down.

    Needs: `main` of tile_main.wgsl, halves.wgsl, cooperative/columns.wgsl for staged columns.
    Declares: the macros below; the arrays of workgroup memory, is_finite4; `row_R` and `fallback_R` of each row of a lane, `lane_column`. -#}

{#- Waits for the other lanes of the subgroup, where lanes do not run in step. A barrier of the workgroup would not do: subgroups rescale
    at different tiles. -#}
{%- macro sync() %}{% if not in_step %}subgroupBarrier();{% endif %}{% endmacro -%}

# macro declare()
const LANES_A_ROW: u32 = {{ lanes // side }}u;
// Padding lets neighbouring rows start in different banks. Fragments are loaded from multiples of 16 bytes.
const SCORE_ROW: u32 = {{ score_row }}u;
const P_ROW: u32 = {{ p_row }}u;
# for b in staged
const {{ b | upper }}_ROW: u32 = {{ staged_rows[b] }}u;
const {{ b | upper }}_TILE: u32 = {{ staged_rows[b] * tile_columns }}u;
# if splits
const {{ b | upper }}_LO: u32 = {{ stages * staged_rows[b] * tile_columns }}u;
# endif
var<workgroup> {{ b }}_stage: array<vec4<f16>, {{ (2 if splits else 1) * stages * staged_rows[b] * tile_columns }}>;
# endfor
var<workgroup> score_rows: array<vec4<f32>, {{ subgroups * side * score_row }}>;
# if p_tile > 0
var<workgroup> p_tile: array<vec4<f16>, {{ p_tile }}>;
# endif
# if stats_per_column > 0
// Numbers of each column: the shifts by lse and delta of a query, and in bf16 the inverse token scales.
var<workgroup> column_stats: array<{{ "f32" if elements else "vec4<f32>" }}, {{ stages * stats_per_column * tile_columns // (1 if elements else 4) }}>;
# endif
# if elements
{{ declare_elements() }}
# endif
# if "row_stats" in names and not multiplies_bf16
// In the second run the unit follows dS beyond this size, which is within f16.
const UNIT_LIMIT: f32 = 32768.0;
# endif
# if lifts_p
// The driver cuts bits off where it makes bf16 of P and dS, which takes 2^-8 ln 2 of numbers of all sizes on average. So they are larger by as
// much before, times GAIN, without an operation: P = exp2(S - shift + LOG2_GAIN), with LOG2_GAIN in the shift, and dS = P (dP - delta). A P of 1 stays 1.
const GAIN: f32 = 1.0027076;
const LOG2_GAIN: f32 = 0.003900971;
# endif

// Bits are compared: compilers may assume that a float comparison meets no NaN.
fn is_finite4(x: vec4<f32>) -> bool {
  return all((bitcast<vec4<u32>>(x) & vec4<u32>(0x7f800000u)) < vec4<u32>(0x7f800000u));
}
# if elements

fn is_finite1(x: f32) -> bool { return (bitcast<u32>(x) & 0x7f800000u) < 0x7f800000u; }
# if elements and elements.column_at

// The column of the tile in a row of the stage.
fn column_at(place: u32) -> u32 { return {{ elements.column_at }}; }
# endif
# endif
# if rounds_p

// x rounded to the 8 significant bits of bf16, to nearest, ties to even, where the driver rounds in another way. 2^16 x - x is rounded to
// multiples of the last bit that x keeps, and 2^16 x is such a multiple. (A sum would reach the next power of two before x does, and be rounded
// to multiples of the bit above.)
fn rounded(x: f32) -> f32 {
  return fma(x, 65536.0, -fma(x, 65536.0, -x));
}
# endif
# if sanitize

fn is_finite_staged(x: vec4<f16>) -> bool {
# if multiplies_bf16
  let bits = bits_as_words(x);
  return all((vec4<u32>(bits, bits << vec2<u32>(16u)) & vec4<u32>(0x7f800000u)) < vec4<u32>(0x7f800000u));
# else
  return is_finite4(vec4<f32>(x));
# endif
}
# endif
# endmacro

{#- Marker functions: calls of them become instructions of SPIR-V (src/device/markers.rs), and their bodies are never run. -#}
# macro declare_elements()
fn component_c(m: coop_mat{{ side }}x{{ side }}<f32, C>, i: u32) -> f32 { return 0.0; }
# for role, scalar in [["a", "f16"], ["c", "f32"]]
fn matrix_of_{{ role }}({% for i in range(components) %}{{ ", " if i > 0 }}x{{ i }}: {{ "f32" if multiplies_bf16 else scalar }}{% endfor %}) -> coop_mat{{ side }}x{{ side }}<{{ scalar }}, {{ role | upper }}> {
  return coop_mat{{ side }}x{{ side }}<{{ scalar }}, {{ role | upper }}>();
}
# endfor
fn bits_as_halves(x: vec2<u32>) -> vec4<f16> { return vec4<f16>(); }
# if multiplies_bf16
fn bits_as_words(x: vec4<f16>) -> vec2<u32> { return vec2<u32>(); }
# endif
# endmacro

{#- The shift of scores by an lse, in powers of two. -#}
{%- macro shift(lse) %}{{ "(" ~ lse ~ " - params.softcap)" if softcap and not formed else lse }} * LOG2_E{% endmacro -%}

{#- The factor that takes the token scale of an operand's r-th row out of a result, where there are token scales. -#}
{%- macro inverse(a, r) %}{% if column_scales %} * {{ a }}_inverse_{{ r }}{% endif %}{% endmacro -%}

{#- The scale of a row's products, and that of its scores: capped scores are scaled before. -#}
{%- macro product_scale(r) %}{{ "cap_scale" if softcap else "scale" }}{{ "_" ~ r if column_scales }}{% endmacro -%}

{%- macro score_scale(r) %}{{ "scale" if softcap else product_scale(r) }}{% endmacro -%}

# macro begin()
  // An empty sequence has a first row that is loaded and never used.
  let last_column = max(column_limit, 1u) - 1u;
  let subgroup_scores = subgroup * {{ side * score_row }}u;
  // The lane's row within a fragment in workgroup memory, and its place among the lanes of that row.
  let lane_row = lane / LANES_A_ROW;
  let part = lane % LANES_A_ROW;
  let score_at = subgroup_scores + lane_row * SCORE_ROW + part;
  let subgroup_p = subgroup * {{ (1 if elements else row_fragments) * side * p_row }}u;
  let p_at = subgroup_p + lane_row * P_ROW + part;
  // The row and the column of the lane's first element in registers.
  let element_row = {{ elements.row if elements else "lane_row" }};
  let lane_column = {{ elements.column if elements else "4u * part" }};
# if elements and sanitize
  let lane_place = {{ elements.place }};
# endif
# for r in range(lane_rows)
  var fallback_{{ r }} = false;
  let row_{{ r }} = row0 + subgroup * {{ row_fragments * side }}u + {{ row_offsets[r] }}u + element_row;
# endfor
# if elements
# for r in range(row_fragments)
  let strip_row_{{ r }} = row0 + subgroup * {{ row_fragments * side }}u + {{ r * side }}u + lane_row;
# endfor
# endif
# endmacro

{#- The lane's row while the r-th row of fragments is in workgroup memory. -#}
{%- macro strip_row(r) %}{{ "strip_row_" if elements else "row_" }}{{ r }}{% endmacro -%}

{#- The n-th step of a lane over its quads of a fragment's row, around the caller's text. A fragment may have fewer quads than lanes. -#}
# macro each_quad(n)
  {
    let quad = part + {{ n * lanes // side }}u;
    {% if lanes // side > side // 4 %}if (quad < {{ side // 4 }}u) {% endif %}{
{{ caller() }}
    }
  }
# endmacro

{#- Loaded numbers as halves, times `factor`. Where bf16 is multiplied as itself, that is 1 or -1. -#}
{%- macro halves(x, factor) %}{% if (dtype == "f16" or multiplies_bf16) and factor == "1.0" %}halves4({{ x }}){% else %}half4({{ x }}, {{ factor }}){% endif %}{% endmacro -%}

{#- Loads the subgroup's rows of an operand as fragments, with zeros beyond its end. In bf16 rows are multiplied with their token scales.
    The sign of the scale goes to the rows of scores. All loads are under way before the first is needed. -#}
# macro resident(a)
# set sign = "params.scale_sign" if a == signed else "1.0"
# for r in range(row_fragments)
# for f in range(fragments[a])
# for n in range(fragment_quads)
  var {{ a }}_raw_{{ r }}_{{ f }}_{{ n }} = Raw();
# call each_quad(n)
    if ({{ strip_row(r) }} < row_limit{% if (f + 1) * side // 4 > operand_quads[a] %} && {{ f * side // 4 }}u + quad < {{ operand_quads[a] }}u{% endif %}) {
      {{ a }}_raw_{{ r }}_{{ f }}_{{ n }} = raw_{{ a }}({{ a }}_base, {{ strip_row(r) }} * params.{{ a }}.seq, {{ f * side // 4 }}u + quad);
    }
# endcall
# endfor
# endfor
# endfor
# if column_scales
# for r in range(row_fragments)
  var {{ a }}_size_{{ r }} = 0.0;
# for f, n in pairs(fragments[a], fragment_quads)
  {{ a }}_size_{{ r }} = max({{ a }}_size_{{ r }}, finite_size(widened4({{ a }}_raw_{{ r }}_{{ f }}_{{ n }})));
# endfor
{{ reduce_strip(a ~ "_size_" ~ r, "max") }}
  let {{ a }}_scale_{{ r }} = token_scale({{ a }}_size_{{ r }});
# endfor
{{ row_inverses(a) }}
# endif
# set at_once = 1 if elements else row_fragments
# for f in range(fragments[a])
# for first in range(0, row_fragments, at_once)
# for half in (["hi", "lo"] if splits else [""])
# for r in range(first, first + at_once)
# set factor = a ~ "_scale_" ~ r ~ " * " ~ sign if column_scales else sign
# for n in range(fragment_quads)
# call each_quad(n)
    let raw = {{ a }}_raw_{{ r }}_{{ f }}_{{ n }};
# if splits
    let x = raw * ({{ factor }});
# endif
    {{ p_array }}[p_at - part + {{ (r - first) * side * p_row }}u + quad] = {{ {"hi": "vec4<f16>(hi4(x))", "lo": "vec4<f16>(x - hi4(x))"}[half] if splits else halves("raw", factor) }};
# endcall
# endfor
# endfor
  {{ sync() }}
# for r in range(first, first + at_once)
  let {{ a }}_{{ "lo_" if half == "lo" }}{{ r }}_{{ f }} = coopLoadT<coop_mat{{ side }}x{{ side }}<f16, A>>(&{{ p_array }}[subgroup_p + {{ (r - first) * side * p_row }}u], P_ROW);
# endfor
# if half == "hi"
  {{ sync() }}
# endif
# endfor
  {{ sync() }}
# endfor
# endfor
# if elements
  // Columns come where the other subgroups' fragments were.
  workgroupBarrier();
# endif
# endmacro

{#- The inverse token scale of each row of a lane. -#}
# macro row_inverses(a)
# if elements
  // By rows in workgroup memory, and from there by the rows of the elements.
# for r in range(row_fragments)
  {{ sync() }}
  if (part == 0u) { score_rows[subgroup_scores + lane_row].x = 1.0 / {{ a }}_scale_{{ r }}; }
  {{ sync() }}
# for own in range(lane_rows)
# if row_fragment[own] == r
  let {{ a }}_inverse_{{ own }} = score_rows[subgroup_scores + element_row + {{ row_offsets[own] - r * side }}u].x;
# endif
# endfor
  {{ sync() }}
# endfor
# else
# for r in range(row_fragments)
  let {{ a }}_inverse_{{ r }} = 1.0 / {{ a }}_scale_{{ r }};
# endfor
# endif
# endmacro

# macro accumulator(x, operand)
# for r, f in pairs(row_fragments, fragments[operand])
  var {{ x }}_{{ r }}_{{ f }} = coop_mat{{ side }}x{{ side }}<f32, C>();
# endfor
# endmacro

{#- The scales of the rows' products, after `resident` has found the rows' token scales. -#}
# macro row_scales(a)
# if column_scales
# for r in range(lane_rows)
  let {{ product_scale(r) }} = {{ "cap_scale" if softcap else "scale" }}{{ inverse(a, r) }};
# endfor
# endif
# endmacro

{#- A number of each column of a lane's n-th quad. Of queries: the shift by lse (0) and delta (1). Then, in bf16, the inverse token scales
    of the first and of the second staged operand. -#}
{%- macro column_stat(n, which) -%}
{%- set at = "stage * " ~ (stats_per_column * tile_columns) ~ "u + (column0 - tile_column0) + lane_column + " -%}
{%- if elements -%}
  vec4<f32>({% for step in quad_steps %}{{ ", " if not loop.first }}column_stats[{{ at }}{{ quad_offsets[n] + step + which * tile_columns }}u]{% endfor %})
{%- else -%}
  column_stats[stage * {{ stats_per_column * tile_columns // 4 }}u + part + {{ n * lanes // side + which * tile_columns // 4 }}u]
{%- endif -%}
{%- endmacro -%}

{#- A number of a column in workgroup memory, by `item`, its place in the tile. -#}
{%- macro stat_place(which) -%}
{%- if elements -%}
  column_stats[stage * {{ stats_per_column * tile_columns }}u + item + {{ which * tile_columns }}u]
{%- else -%}
  column_stats[stage * {{ stats_per_column * tile_columns // 4 }}u + item / 4u + {{ which * tile_columns // 4 }}u][item % 4u]
{%- endif -%}
{%- endmacro -%}

{%- macro column_inverse(n, which) %}{{ column_stat(n, which + (2 if rows_are_keys else 0)) }}{% endmacro -%}

{#- The first column of a lane's n-th quad. The others are `quad_steps` from it. -#}
{%- macro quad_column(n) %}column0 + {{ quad_offsets[n] }}u + lane_column{% endmacro -%}

{#- The place in the stage of fragment f of an operand's c-th columns, and its pitch; with `half` that of lower halves. -#}
{%- macro staged_at(b, stage, c, f, half="") -%}
{%- set row = (b | upper) ~ "_ROW" -%}
  &{{ b }}_stage[{{ stage }} * {{ b | upper }}_TILE + {{ (b | upper) ~ "_LO + " if half }}{{ c * side }}u * {{ row }} + {{ f * side // 4 }}u], {{ row }}
{%- endmacro -%}

{#- s[row, column] = a[row] . b[column], for the columns of a chunk of the tile. Products with lower halves have a sum of their own, because
    matrices may round each sum towards zero. Where the gradient by slopes multiplies such errors by distances, so has each fragment of
    features: d_alibi of one problem came from 1.5e-5 to 3.4e-6 (NVIDIA H200). -#}
# macro product(s, a, b, stage, chunk=0)
# if elements
# for r, c in pairs(row_fragments, column_fragments)
    var {{ s }}_{{ r }}_{{ c }} = coop_mat{{ side }}x{{ side }}<f32, C>();
# if splits
    var {{ s }}_lo_{{ r }}_{{ c }} = coop_mat{{ side }}x{{ side }}<f32, C>();
# endif
# endfor
# for f, c in pairs(fragments[a], column_fragments)
# if splits and slope_rows
    {
# for r in range(row_fragments)
      var part_{{ r }}_{{ c }} = coop_mat{{ side }}x{{ side }}<f32, C>();
# endfor
{{ multiply("part", a, b, stage, chunk, c, f, s) }}
# for r in range(row_fragments)
      {{ s }}_{{ r }}_{{ c }} = {{ s }}_{{ r }}_{{ c }} + part_{{ r }}_{{ c }};
# endfor
    }
# else
{{ multiply(s, a, b, stage, chunk, c, f) }}
# endif
# endfor
# if splits
# for r, c in pairs(row_fragments, column_fragments)
    {{ s }}_{{ r }}_{{ c }} = {{ s }}_{{ r }}_{{ c }} + {{ s }}_lo_{{ r }}_{{ c }};
# endfor
# endif
# else
# for c in range(column_fragments)
# for r in range(row_fragments)
    var {{ s }}_{{ r }}_{{ c }} = coop_mat{{ side }}x{{ side }}<f32, C>();
# endfor
# for f in range(fragments[a])
{{ multiply(s, a, b, stage, chunk, c, f) }}
# endfor
# endfor
# endif
# endmacro

{#- Adds the product of a fragment of features to s, and of split numbers the products with lower halves to s_lo, or LO_lo. -#}
# macro multiply(s, a, b, stage, chunk, c, f, lo="")
# set lo = lo or s
    {
      let column = coopLoad<coop_mat{{ side }}x{{ side }}<f16, B>>({{ staged_at(b, stage, chunk * column_fragments + c, f) }});
# if splits
      let column_lo = coopLoad<coop_mat{{ side }}x{{ side }}<f16, B>>({{ staged_at(b, stage, chunk * column_fragments + c, f, "lo") }});
# endif
# for r in range(row_fragments)
# if splits
      {{ lo }}_lo_{{ r }}_{{ c }} = coopMultiplyAdd({{ a }}_{{ r }}_{{ f }}, column_lo, {{ lo }}_lo_{{ r }}_{{ c }});
      {{ lo }}_lo_{{ r }}_{{ c }} = coopMultiplyAdd({{ a }}_lo_{{ r }}_{{ f }}, column, {{ lo }}_lo_{{ r }}_{{ c }});
# endif
      {{ s }}_{{ r }}_{{ c }} = coopMultiplyAdd({{ a }}_{{ r }}_{{ f }}, column, {{ s }}_{{ r }}_{{ c }});
# endfor
    }
# endmacro

{#- Stores a row of score fragments, and waits for it. -#}
# macro store_rows(s, r)
# for c in range(column_fragments)
    coopStoreT({{ s }}_{{ r }}_{{ c }}, &score_rows[subgroup_scores + {{ c * side // 4 }}u], SCORE_ROW);
# endfor
    {{ sync() }}
# endmacro

{#- Loads a row of score fragments by rows. In bf16 the token scales of the columns' first (0) or second (1) operand are taken out. -#}
# macro load_rows(x, r, which)
# for n in range(lane_quads)
    var {{ x }}_{{ r }}_{{ n }} = score_rows[score_at + {{ n * lanes // side }}u]{% if column_scales %} * {{ column_inverse(n, which) }}{% endif %};
# endfor
    {{ sync() }}
# endmacro

{#- The lane's rows of a score tile as quads. In bf16 the token scales of the columns' first (0) or second (1) operand are taken out. -#}
# macro rows_of(x, s, which)
# if elements
# for r, n in pairs(lane_rows, lane_quads)
    var {{ x }}_{{ r }}_{{ n }} = vec4<f32>({% for c, i in quad_elements[r % rows_a_lane][n] %}{{ ", " if not loop.first }}component_c({{ s }}_{{ row_fragment[r] }}_{{ c }}, {{ i }}u){% endfor %}){% if column_scales %} * {{ column_inverse(n, which) }}{% endif %};
# endfor
# else
# for r in range(row_fragments)
{{ store_rows(s, r) }}
{{ load_rows(x, r, which) }}
# endfor
# endif
# endmacro

{#- Elements of P, or of dS, as a left operand of 16 bits. `matrix_of_a` makes bf16 of f32. -#}
{%- macro left(x, r, c) %}matrix_of_a({% for h, n, e in element_quads[c] %}{{ ", " if not loop.first }}{{ to_16_bits(x ~ "_" ~ (r * rows_a_lane + h) ~ "_" ~ n ~ "." ~ xyzw[e]) }}{% endfor %}){% endmacro -%}

{%- macro to_16_bits(x) %}{% if rounds_p %}rounded({{ x }}){% elif multiplies_bf16 %}{{ x }}{% else %}f16({{ x }}){% endif %}{% endmacro -%}

{#- Makes P, or dS, rounded to 16 bits, the left operand of `accumulate`: the P tile, or fragments. -#}
# macro store_p(x)
# if elements
# if splits
# for r, n in pairs(lane_rows, lane_quads)
    let {{ x }}_hi_{{ r }}_{{ n }} = hi4({{ x }}_{{ r }}_{{ n }});
    let {{ x }}_lo_{{ r }}_{{ n }} = {{ x }}_{{ r }}_{{ n }} - {{ x }}_hi_{{ r }}_{{ n }};
# endfor
# endif
# for half in (["_hi", "_lo"] if splits else [""])
# for r, c in pairs(row_fragments, column_fragments)
    let {{ x }}{{ half }}_left_{{ r }}_{{ c }} = {{ left(x ~ half, r, c) }};
# endfor
# endfor
# else
# for r, n in pairs(row_fragments, lane_quads)
    p_tile[p_at + {{ r * side * p_row + n * lanes // side }}u] = vec4<f16>({{ x }}_{{ r }}_{{ n }});
# endfor
    {{ sync() }}
# endif
# endmacro

{#- Combines a number of each lane of a row in workgroup memory, by "max" or "sum". -#}
# macro reduce_strip(x, op)
# for n in [1, 2] if n < lanes // side
{{ combine(x, op, n) }}
# endfor
# endmacro

{#- Combines a number of each lane of a row, by "max" or "sum". -#}
# macro reduce_row(x, op)
# for n in row_lanes
{{ combine(x, op, n) }}
# endfor
# endmacro

# macro combine(x, op, n)
# if op == "max"
  {{ x }} = max({{ x }}, subgroupShuffleXor({{ x }}, {{ n }}u));
# else
  {{ x }} = {{ x }} + subgroupShuffleXor({{ x }}, {{ n }}u);
# endif
# endmacro

{#- x[row] += sum over columns of w[row, column] * b[column], for the columns of a chunk of the tile; w is P or dS, as `store_p` has left
    it. -#}
# macro accumulate(x, w, b, stage, chunk=0)
# if splits
{{ accumulate_split(x, w, b, stage, chunk) }}
# else
# for c in range(column_fragments)
    {
# if not elements
# for r in range(row_fragments)
      let {{ w }}_left_{{ r }}_{{ c }} = coopLoadT<coop_mat{{ side }}x{{ side }}<f16, A>>(&p_tile[subgroup_p + {{ r * side * p_row + c * side // 4 }}u], P_ROW);
# endfor
# endif
# for f in range(fragments[b])
      {
        let column = coopLoadT<coop_mat{{ side }}x{{ side }}<f16, B>>({{ staged_at(b, stage, chunk * column_fragments + c, f) }});
# for r in range(row_fragments)
        {{ x }}_{{ r }}_{{ f }} = coopMultiplyAdd({{ w }}_left_{{ r }}_{{ c }}, column, {{ x }}_{{ r }}_{{ f }});
# endfor
      }
# endfor
    }
# endfor
# endif
# endmacro

{#- `accumulate` of split numbers. The tile has sums of its own, which are added to those of all tiles by one addition each: matrices may
    round each sum towards zero, and over thousands of columns that would show. -#}
# macro accumulate_split(x, w, b, stage, chunk)
# for f in range(fragments[b])
    {
# for r in range(row_fragments)
      var sum_{{ r }} = coop_mat{{ side }}x{{ side }}<f32, C>();
# endfor
# for c in range(column_fragments)
      {
        let column = coopLoadT<coop_mat{{ side }}x{{ side }}<f16, B>>({{ staged_at(b, stage, chunk * column_fragments + c, f) }});
        let column_lo = coopLoadT<coop_mat{{ side }}x{{ side }}<f16, B>>({{ staged_at(b, stage, chunk * column_fragments + c, f, "lo") }});
# for r in range(row_fragments)
        sum_{{ r }} = coopMultiplyAdd({{ w }}_hi_left_{{ r }}_{{ c }}, column_lo, sum_{{ r }});
        sum_{{ r }} = coopMultiplyAdd({{ w }}_lo_left_{{ r }}_{{ c }}, column, sum_{{ r }});
        sum_{{ r }} = coopMultiplyAdd({{ w }}_hi_left_{{ r }}_{{ c }}, column, sum_{{ r }});
# endfor
      }
# endfor
# for r in range(row_fragments)
      {{ x }}_{{ r }}_{{ f }} = {{ x }}_{{ r }}_{{ f }} + sum_{{ r }};
# endfor
    }
# endfor
# endmacro

{#- Stores one fragment of an accumulator. -#}
# macro store_fragment(x)
    {{ sync() }}
    coopStoreT({{ x }}, &score_rows[subgroup_scores], SCORE_ROW);
    {{ sync() }}
# endmacro

{#- Multiplies the rows of an accumulator. Few tiles need it. -#}
# macro rescale(x, operand, factor)
# if elements
# for r, f in pairs(row_fragments, fragments[operand])
      {{ x }}_{{ r }}_{{ f }} = matrix_of_c({% for h, n, e in element_quads[0] %}{{ ", " if not loop.first }}component_c({{ x }}_{{ r }}_{{ f }}, {{ loop.index0 }}u) * {{ factor }}{{ r * rows_a_lane + h }}{% endfor %});
# endfor
# else
# for r, f in pairs(row_fragments, fragments[operand])
{{ store_fragment(x ~ "_" ~ r ~ "_" ~ f) }}
# for n in range(fragment_quads)
# call each_quad(n)
      score_rows[score_at - part + quad] *= {{ factor ~ r }};
# endcall
# endfor
      {{ sync() }}
      {{ x }}_{{ r }}_{{ f }} = coopLoadT<coop_mat{{ side }}x{{ side }}<f32, C>>(&score_rows[subgroup_scores], SCORE_ROW);
# endfor
      {{ sync() }}
# endif
# endmacro

{#- A factor that ends with "_" is the stem of a name, which each row completes with its number. -#}
{%- macro factor_of(factor, r) %}{{ factor ~ r if factor is endingwith("_") else factor }}{% endmacro -%}

{#- Writes an accumulator times `factor`. With `o_lo` the rounding error of o is written, too. -#}
# macro store(x, operand, factor)
# for r in range(row_fragments)
  {
    let base = {{ operand }}_base + {{ strip_row(r) }} * params.{{ operand }}.seq;
# if o_lo
    let rest_base = o_lo_base + {{ strip_row(r) }} * params.o_lo.seq;
# endif
# for f in range(fragments[operand])
# if elements
# for h, n, e in element_quads[0]
    let result_{{ f }}_{{ loop.index0 }} = component_c({{ x }}_{{ r }}_{{ f }}, {{ loop.index0 }}u) * {{ factor_of(factor, r * rows_a_lane + h) }};
    fallback_{{ r * rows_a_lane + h }} = fallback_{{ r * rows_a_lane + h }} || !is_finite1(result_{{ f }}_{{ loop.index0 }});
# endfor
    let result_{{ f }} = matrix_of_c({% for i in range(components) %}{{ ", " if i > 0 }}result_{{ f }}_{{ i }}{% endfor %});
{{ store_fragment("result_" ~ f) }}
# else
{{ store_fragment(x ~ "_" ~ r ~ "_" ~ f) }}
# endif
# for n in range(fragment_quads)
# call each_quad(n)
      if ({{ strip_row(r) }} < row_limit{% if (f + 1) * side // 4 > operand_quads[operand] %} && {{ f * side // 4 }}u + quad < {{ operand_quads[operand] }}u{% endif %}) {
# if elements
        let result = score_rows[score_at - part + quad];
# else
        let result = score_rows[score_at - part + quad] * {{ factor_of(factor, r) }};
        fallback_{{ r }} = fallback_{{ r }} || !is_finite4(result);
# endif
        store_{{ operand }}(base, {{ f * side // 4 }}u + quad, result);
# if o_lo
        store_o_lo(rest_base, {{ f * side // 4 }}u + quad, result);
# endif
      }
# endcall
# endfor
# endfor
  }
# endfor
# endmacro

{#- Whether `flag`, which is the same in all lanes of a subgroup, holds in any subgroup. All subgroups have read their columns then. -#}
# macro any_subgroup(name, flag)
    workgroupBarrier();
    if (lane == 0u) { score_rows[subgroup] = vec4<f32>(select(0.0, 1.0, {{ flag }})); }
    workgroupBarrier();
    {{ name }} = false;
    for (var n = 0u; n < {{ subgroups }}u; n += 1u) { {{ name }} = {{ name }} || score_rows[n].x > 0.0; }
# endmacro
