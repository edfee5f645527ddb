{#- The cooperative micro-kernel: matrix products by subgroups on square fragments, f16 in and f32 out (tensor cores).

    As in the portable one, a kernel keeps a tile of rows (queries, or keys in the d_k/d_v kernel) and walks over tiles of
    columns. A subgroup has ROW_FRAGMENTS x SIDE rows to itself. Their operands and accumulators are fragments in its registers,
    each with a name of its own: drivers do not keep indexed arrays there. Two kinds of product:

      product(s, a, b)        s[row, column] = sum over features of a[row] * b[column]
      accumulate(x, b)        x[row] += sum over columns of p_tile[row, column] * b[column]

    Columns are staged in workgroup memory for all subgroups; twice, so that one tile is in use while the next one is written,
    and one barrier a tile is enough, or once, where the memory is better spent on more workgroups. WGSL has no arithmetic on a fragment's elements, so scores go through workgroup memory to
    become weights: `store_rows` leaves a row of fragments in the subgroup's strip, `load_rows` reads them back by rows, LANES_A_ROW
    lanes to a row. Only the subgroup's own lanes stand between; a strip's second use waits for all of them.

    Fragments have no hidden elements: where a hidden column is NaN or infinite, its zero weight makes a NaN of the results.
    `report` tells of a tile that holds such a row. A second run of the kernel (`sanitize`) does such tiles again with zeros in place of
    these columns, so that rows that do not see them get the bits that they get beside any other hidden column, and reports the
    rows that do see one. The portable kernel computes these rows.

    Halves have less range than what is computed. So the weights of an accumulator's row are multiplied with the row's unit, a power of
    two. The first weights that the row sees set it, in a walk over few tiles before the loop over all of them; that of d_q in f16
    comes with delta (unit.wgsl). Operands in bf16 come with a power of two for each token (token_scales.wgsl). Nothing is scaled by
    what a row does not see.

    Workgroup memory is what decides how many workgroups run at a time, and what the driver has left for registers that it
    cannot keep: rows of fragments take turns in one strip, p and d_s in one place for weights, and flags use the score_rows. Every
    array's size is a multiple of 16 bytes, in whatever order a driver lays them out: NVIDIA's loads a fragment from an address
    that is none as if it were rounded down. -#}

{#- Waits for the other lanes of the subgroup, where they do not run in step. Subgroups that rescale at different tiles do not
    reach such a barrier together. -#}
{%- macro sync() %}{% if not in_step %}subgroupBarrier();{% endif %}{% endmacro -%}

# macro declare()
const LANES_A_ROW: u32 = {{ lanes // side }}u;
// Rows are padded so that neighbours start in different banks; fragment loads want multiples of 16 bytes.
const SCORE_ROW: u32 = {{ score_row }}u;
const P_ROW: u32 = {{ p_row }}u;
# for b in staged
const {{ b | upper }}_ROW: u32 = {{ staged_rows[b] }}u;
const {{ b | upper }}_TILE: u32 = {{ staged_rows[b] * tile_columns }}u;
var<workgroup> {{ b }}_stage: array<vec4<f16>, {{ stages * staged_rows[b] * tile_columns }}>;
# endfor
var<workgroup> score_rows: array<vec4<f32>, {{ subgroups * side * score_row }}>;
var<workgroup> p_tile: array<vec4<f16>, {{ subgroups * row_fragments * side * p_row }}>;
# if stats_per_column > 0
// What goes with each column: of queries what lse and delta add, in bf16 what takes the token scales out.
var<workgroup> column_stats: array<vec4<f32>, {{ stages * stats_per_column * tile_columns // 4 }}>;
# endif
# if "row_terms" in names
// What weights may reach before their unit follows in the second run, within f16.
const UNIT_LIMIT: f32 = 32768.0;
# endif

// By the bits: compilers may take for granted that a float comparison meets no NaN.
fn is_finite4(x: vec4<f32>) -> bool {
  return all((bitcast<vec4<u32>>(x) & vec4<u32>(0x7f800000u)) < vec4<u32>(0x7f800000u));
}
# endmacro

{#- What an lse takes from scores, in powers of two. -#}
{%- macro shift(lse) %}{{ "(" ~ lse ~ " - params.softcap)" if softcap and not formed else lse }} * LOG2_E{% endmacro -%}

{#- What takes the token scale of an operand's r-th row out of a result: a factor, where there are scales. -#}
{%- macro inverse(a, r) %}{% if column_scales %} * {{ a }}_inverse_{{ r }}{% endif %}{% endmacro -%}

{#- The scale of a row's products, and of what the softmax works on: capped scores have had it. -#}
{%- macro product_scale(r) %}{{ "cap_scale" if softcap else "scale" }}{{ "_" ~ r if column_scales }}{% endmacro -%}

{%- macro score_scale(r) %}{{ "scale" if softcap else product_scale(r) }}{% endmacro -%}

# macro begin()
  // Of an empty sequence, whose rows lie at the start, there is nothing but a first row that is never used.
  let last_column = max(column_limit, 1u) - 1u;
  let subgroup_scores = subgroup * {{ side * score_row }}u;
  // A lane's row within a fragment, and its place among the lanes of that row.
  let lane_row = lane / LANES_A_ROW;
  let part = lane % LANES_A_ROW;
  let score_at = subgroup_scores + lane_row * SCORE_ROW + part;
  let subgroup_p = subgroup * {{ row_fragments * side * p_row }}u;
  let p_at = subgroup_p + lane_row * P_ROW + part;
# for r in range(row_fragments)
  var fallback_{{ r }} = false;
  let row_{{ r }} = row0 + subgroup * {{ row_fragments * side }}u + {{ r * side }}u + lane_row;
# endfor
# endmacro

{#- Begins the n-th part of what a lane does for its quads of a fragment's row; a fragment may have fewer quads than lanes. -#}
{%- macro each_quad(n) %}{
    let quad = part + {{ n * lanes // side }}u;
    {% if lanes // side > side // 4 %}if (quad < {{ side // 4 }}u) {% endif %}
# endmacro

{#- What was loaded as halves, times `factor`. -#}
{%- macro halves(x, factor) %}{% if dtype == "f16" and factor == "1.0" %}halves4({{ x }}){% else %}half4({{ x }}, {{ factor }}){% endif %}{% endmacro -%}

{#- The subgroup's rows of an operand as fragments; zeros beyond its end. In bf16 times their token scales. The sign of the scale
    goes with the rows of scores. All is on its way before the first is waited for. -#}
# macro resident(a)
# set sign = "params.scale_sign" if a == signed else "1.0"
# for r in range(row_fragments)
# for f in range(fragments[a])
# for n in range(fragment_quads)
  var {{ a }}_raw_{{ r }}_{{ f }}_{{ n }} = Raw();
  {{ each_quad(n) }} {
    if (row_{{ r }} < row_limit{% if (f + 1) * side // 4 > operand_quads[a] %} && {{ f * side // 4 }}u + quad < {{ operand_quads[a] }}u{% endif %}) {
      {{ a }}_raw_{{ r }}_{{ f }}_{{ n }} = raw_{{ a }}({{ a }}_base, row_{{ r }} * params.{{ a }}.seq, {{ f * side // 4 }}u + quad);
    }
  } }
# endfor
# endfor
# endfor
# if column_scales
# for r in range(row_fragments)
  var {{ a }}_size_{{ r }} = 0.0;
# for f, n in pairs(fragments[a], fragment_quads)
  {{ a }}_size_{{ r }} = max({{ a }}_size_{{ r }}, finite_size(widened4({{ a }}_raw_{{ r }}_{{ f }}_{{ n }})));
# endfor
{{ reduce_row(a ~ "_size_" ~ r, "max") }}
  let {{ a }}_scale_{{ r }} = token_scale({{ a }}_size_{{ r }});
  let {{ a }}_inverse_{{ r }} = 1.0 / {{ a }}_scale_{{ r }};
# endfor
# endif
# for f in range(fragments[a])
# for r, n in pairs(row_fragments, fragment_quads)
  {{ each_quad(n) }} {
    let raw = {{ a }}_raw_{{ r }}_{{ f }}_{{ n }};
    p_tile[p_at - part + {{ r * side * p_row }}u + quad] = {{ halves("raw", a ~ "_scale_" ~ r ~ " * " ~ sign if column_scales else sign) }};
  } }
# endfor
  {{ sync() }}
# for r in range(row_fragments)
  let {{ a }}_{{ r }}_{{ f }} = coopLoadT<coop_mat{{ side }}x{{ side }}<f16, A>>(&p_tile[subgroup_p + {{ r * side * p_row }}u], P_ROW);
# endfor
  {{ sync() }}
# endfor
# endmacro

# macro accumulator(x, operand)
# for r, f in pairs(row_fragments, fragments[operand])
  var {{ x }}_{{ r }}_{{ f }} = coop_mat{{ side }}x{{ side }}<f32, C>();
# endfor
# endmacro

{#- The scales of rows' products, once their operand is resident. -#}
# macro row_scales(a)
# if column_scales
# for r in range(row_fragments)
  let {{ product_scale(r) }} = {{ "cap_scale" if softcap else "scale" }}{{ inverse(a, r) }};
# endfor
# endif
# endmacro

{#- A term of the columns of a lane's n-th quad: of queries what lse (0) and delta (1) add; then what takes the scales of the first
    and of the second staged operand out. -#}
{%- macro column_stat(n, which) %}column_stats[stage * {{ stats_per_column * tile_columns // 4 }}u + part + {{ n * lanes // side + which * tile_columns // 4 }}u]{% endmacro -%}

{%- macro column_inverse(n, which) %}{{ column_stat(n, which + (2 if rows_are_keys else 0)) }}{% endmacro -%}

{#- First column of a lane's n-th quad of a strip. -#}
{%- macro quad_column(n) %}column0 + 4u * ({{ n * lanes // side }}u + part){% endmacro -%}

{#- s[row, column] = a[row] . b[column]. -#}
# macro product(s, a, b, stage)
# for c in range(column_fragments)
# for r in range(row_fragments)
    var {{ s }}_{{ r }}_{{ c }} = coop_mat{{ side }}x{{ side }}<f32, C>();
# endfor
# for f in range(fragments[a])
    {
      let column = coopLoad<coop_mat{{ side }}x{{ side }}<f16, B>>(&{{ b }}_stage[{{ stage }} * {{ b | upper }}_TILE + {{ c * side }}u * {{ b | upper }}_ROW + {{ f * side // 4 }}u], {{ b | upper }}_ROW);
# for r in range(row_fragments)
      {{ s }}_{{ r }}_{{ c }} = coopMultiplyAdd({{ a }}_{{ r }}_{{ f }}, column, {{ s }}_{{ r }}_{{ c }});
# endfor
    }
# endfor
# endfor
# endmacro

{#- Leaves a row of fragments in the strip, and waits for it. -#}
# macro store_rows(s, r)
# for c in range(column_fragments)
    coopStoreT({{ s }}_{{ r }}_{{ c }}, &score_rows[subgroup_scores + {{ c * side // 4 }}u], SCORE_ROW);
# endfor
    {{ sync() }}
# endmacro

{#- Reads a row of fragments back by rows, without the scales of the columns' first (0) or second (1) operand. -#}
# macro load_rows(x, r, which)
# for n in range(lane_quads)
    var {{ x }}_{{ r }}_{{ n }} = score_rows[score_at + {{ n * lanes // side }}u]{% if column_scales %} * {{ column_inverse(n, which) }}{% endif %};
# endfor
    {{ sync() }}
# endmacro

{#- Leaves what was taken and changed as weights for `accumulate`, and waits for it. -#}
# macro store_p(x)
# for r, n in pairs(row_fragments, lane_quads)
    p_tile[p_at + {{ r * side * p_row + n * lanes // side }}u] = vec4<f16>({{ x }}_{{ r }}_{{ n }});
# endfor
    {{ sync() }}
# endmacro

{#- Combines what the lanes of a row hold. -#}
# macro reduce_row(x, op)
# for n in [1, 2]
# if n < lanes // side
  {{ x }} = {{ "max(%s, subgroupShuffleXor(%s, %su))" | format(x, x, n) if op == "max" else "%s + subgroupShuffleXor(%s, %su)" | format(x, x, n) }};
# endif
# endfor
# endmacro

{#- x[row] += sum over columns of p_tile[row, column] * b[column]. -#}
# macro accumulate(x, b, stage)
# for c in range(column_fragments)
    {
# for r in range(row_fragments)
      let left_{{ r }} = coopLoadT<coop_mat{{ side }}x{{ side }}<f16, A>>(&p_tile[subgroup_p + {{ r * side * p_row + c * side // 4 }}u], P_ROW);
# endfor
# for f in range(fragments[b])
      {
        let column = coopLoadT<coop_mat{{ side }}x{{ side }}<f16, B>>(&{{ b }}_stage[{{ stage }} * {{ b | upper }}_TILE + {{ c * side }}u * {{ b | upper }}_ROW + {{ f * side // 4 }}u], {{ b | upper }}_ROW);
# for r in range(row_fragments)
        {{ x }}_{{ r }}_{{ f }} = coopMultiplyAdd(left_{{ r }}, column, {{ x }}_{{ r }}_{{ f }});
# endfor
      }
# endfor
    }
# endfor
# endmacro

{#- Leaves one fragment of an accumulator in the strip. -#}
# macro store_fragment(x)
    {{ sync() }}
    coopStoreT({{ x }}, &score_rows[subgroup_scores], SCORE_ROW);
    {{ sync() }}
# endmacro

{#- Multiplies the rows of an accumulator, which few tiles do: through the strip. -#}
# macro rescale(x, operand, factor)
# for r, f in pairs(row_fragments, fragments[operand])
{{ store_fragment(x ~ "_" ~ r ~ "_" ~ f) }}
# for n in range(fragment_quads)
      {{ each_quad(n) }} { score_rows[score_at - part + quad] *= {{ factor ~ r }}; } }
# endfor
      {{ sync() }}
      {{ x }}_{{ r }}_{{ f }} = coopLoadT<coop_mat{{ side }}x{{ side }}<f32, C>>(&score_rows[subgroup_scores], SCORE_ROW);
# endfor
      {{ sync() }}
# endmacro

{#- Writes an accumulator times `factor`, which may name a value of each row by its stem and "_"; of o also what rounding
    takes, where that is wanted. -#}
# macro store(x, operand, factor)
# for r in range(row_fragments)
  {
    let base = {{ operand }}_base + row_{{ r }} * params.{{ operand }}.seq;
# if o_rest
    let rest_base = o_rest_base + row_{{ r }} * params.o_rest.seq;
# endif
# for f in range(fragments[operand])
{{ store_fragment(x ~ "_" ~ r ~ "_" ~ f) }}
# for n in range(fragment_quads)
    {{ each_quad(n) }} {
      if (row_{{ r }} < row_limit{% if (f + 1) * side // 4 > operand_quads[operand] %} && {{ f * side // 4 }}u + quad < {{ operand_quads[operand] }}u{% endif %}) {
        let result = score_rows[score_at - part + quad] * {{ factor ~ r if factor is endingwith("_") else factor }};
        fallback_{{ r }} = fallback_{{ r }} || !is_finite4(result);
        store_{{ operand }}(base, {{ f * side // 4 }}u + quad, result);
# if o_rest
        store_o_rest(rest_base, {{ f * side // 4 }}u + quad, result);
# endif
      } }
    }
# endfor
# endfor
  }
# endfor
# endmacro

{#- Whether `flag`, the same in a subgroup, holds in any of them. All have read their columns then, and score_rows are free. -#}
# macro any_subgroup(name, flag)
    workgroupBarrier();
    if (lane == 0u) { score_rows[subgroup] = vec4<f32>(select(0.0, 1.0, {{ flag }})); }
    workgroupBarrier();
    {{ name }} = false;
    for (var n = 0u; n < {{ subgroups }}u; n += 1u) { {{ name }} = {{ name }} || score_rows[n].x > 0.0; }
# endmacro
