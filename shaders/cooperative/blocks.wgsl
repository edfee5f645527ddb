{#- The cooperative micro-kernel: matrix products by subgroups on square fragments, f16 in and f32 out (tensor cores).

    As in the portable one, a kernel keeps a tile of rows (queries, or keys in the d_k/d_v kernel) and walks over tiles of
    columns. A subgroup has ROW_FRAGMENTS x SIDE rows to itself. Their operands and accumulators are fragments in its registers,
    each with a name of its own: drivers do not keep indexed arrays there. Two kinds of product:

      product(s, a, b)        s[row, column] = sum over features of a[row] * b[column]
      accumulate(x, b)        x[row] += sum over columns of weights[row, column] * b[column]

    Columns are staged in workgroup memory for all subgroups; twice, so that one tile is in use while the next one is written,
    and one barrier a tile is enough, or once, where the memory is better spent on more workgroups. WGSL has no arithmetic on a fragment's elements, so scores go through workgroup memory to
    become weights: `park` leaves a row of fragments in the subgroup's strip, `take` reads them back by rows, LANES_A_ROW
    lanes to a row. Only the subgroup's own lanes stand between; a strip's second use waits for all of them.

    Fragments have no hidden elements: where a hidden column is NaN or infinite, its zero weight makes a NaN of the results.
    `finish` reports a tile that holds one, and the portable kernel computes that tile again.

    Workgroup memory is what decides how many workgroups run at a time, and what the driver has left for registers that it
    cannot keep: rows of fragments take turns in one strip, p and d_s in one place for weights, and flags use the strips. Every
    array's size is a multiple of 16 bytes, in whatever order a driver lays them out: NVIDIA's loads a fragment from an address
    that is none as if it were rounded down. -#}

{#- Waits for the other lanes of the subgroup, where they do not run in step. Subgroups that rescale at different tiles do not
    reach such a barrier together. -#}
{%- macro sync() %}{% if not in_step %}subgroupBarrier();{% endif %}{% endmacro -%}

{%- macro declare() %}
const LANES_A_ROW: u32 = {{ lanes // side }}u;
// Rows are padded so that neighbours start in different banks; fragment loads want multiples of 16 bytes.
const STRIP_ROW: u32 = {{ strip_row }}u;
const WEIGHT_ROW: u32 = {{ weight_row }}u;
{% for b in staged %}
const {{ b | upper }}_ROW: u32 = {{ staged_rows[b] }}u;
const {{ b | upper }}_TILE: u32 = {{ staged_rows[b] * tile_columns }}u;
var<workgroup> {{ b }}_stage: array<vec4<f16>, {{ stages * staged_rows[b] * tile_columns }}>;
{% endfor %}
var<workgroup> strips: array<vec4<f32>, {{ subgroups * side * strip_row }}>;
var<workgroup> weights: array<vec4<f16>, {{ subgroups * row_fragments * side * weight_row }}>;
{% if rows_are_keys %}
// What the columns' lse and delta add.
var<workgroup> statistics: array<vec4<f32>, {{ stages * tile_columns // 2 }}>;
{% endif %}

// By the bits: compilers may take for granted that a float comparison meets no NaN.
fn is_finite4(x: vec4<f32>) -> bool {
  return all((bitcast<vec4<u32>>(x) & vec4<u32>(0x7f800000u)) < vec4<u32>(0x7f800000u));
}
{% endmacro -%}

{#- What an lse takes from scores, in powers of two. -#}
{%- macro shift(lse) %}{{ "(" ~ lse ~ " - params.softcap)" if softcap and not formed else lse }} * LOG2_E{% endmacro -%}

{#- What an operand is multiplied with as it is loaded. bf16 has more range than f16: a power of two for each operand brings
    its largest number to 2^14, and is taken out of the results. The sign of the scale goes with the rows of scores. -#}
{%- macro factor(b) %}{{ b ~ "_range" if dtype == "bf16" else "1.0" }}{{ " * params.scale_sign" if b == signed }}{% endmacro -%}

{#- What takes an operand's power of two out of a result. -#}
{%- macro inverse(b) %}{{ "(1.0 / " ~ b ~ "_range)" if dtype == "bf16" else "1.0" }}{% endmacro -%}

{%- macro begin() %}
  // Of an empty sequence, whose rows lie at the start, there is nothing but a first row that is never used.
  let last_column = {{ "max(column_limit, 1u)" if lengths else "column_limit" }} - 1u;
{% for b in ranged %}
  let {{ b }}_range = ranges[{{ range_slots[b] }}];
{% endfor %}
  let strip = subgroup * {{ side * strip_row }}u;
  // A lane's row within a fragment, and its place among the lanes of that row.
  let lane_row = lane / LANES_A_ROW;
  let part = lane % LANES_A_ROW;
  let strip_at = strip + lane_row * STRIP_ROW + part;
  let subgroup_weights = subgroup * {{ row_fragments * side * weight_row }}u;
  let weight_at = subgroup_weights + lane_row * WEIGHT_ROW + part;
  var broken = false;
{% for r in range(row_fragments) %}
  let row_{{ r }} = row0 + subgroup * {{ row_fragments * side }}u + {{ r * side }}u + lane_row;
{% endfor %}
{% endmacro -%}

{#- d_s is kept as halves: |d_p - delta| is at most 2^31 E once both operands are in their ranges. Their powers of two are applied
    one after the other: the product of both may be out of range. -#}
{%- macro d_s_range() %}
  let v_bound = v_range * {{ d_s_bound }};
  let d_p_range = {{ d_s_bound if dtype == "bf16" else "d_o_range * v_bound" }}{{ " * " ~ (1 / 32768) if rows_are_keys }};
{% endmacro -%}

{#- What takes the range of d_s, and the scale that d_s lacks, out of a gradient that it was multiplied into with `b`. -#}
{%- macro d_s_inverse(b) %}params.scale / v_bound / d_o_range * {{ inverse(b) }}{% endmacro -%}

{#- Begins the n-th part of what a lane does for its quads of a fragment's row; a fragment may have fewer quads than lanes. -#}
{%- macro each_quad(n) %}{
    let quad = part + {{ n * lanes // side }}u;
    {% if lanes // side > side // 4 %}if (quad < {{ side // 4 }}u) {% endif %}
{%- endmacro -%}

{#- The subgroup's rows of an operand as fragments, times `factor`; zeros beyond its end. All is on its way before the first is
    waited for. -#}
{%- macro resident(a, factor) %}
{% for r in range(row_fragments) %}{% for f in range(fragments[a]) %}{% for n in range(fragment_quads) %}
  var {{ a }}_raw_{{ r }}_{{ f }}_{{ n }} = Raw();
  {{ each_quad(n) }} {
    if (row_{{ r }} < row_limit{% if (f + 1) * side // 4 > operand_quads[a] %} && {{ f * side // 4 }}u + quad < {{ operand_quads[a] }}u{% endif %}) {
      {{ a }}_raw_{{ r }}_{{ f }}_{{ n }} = raw_{{ a }}({{ a }}_base, row_{{ r }} * params.{{ a }}.seq, {{ f * side // 4 }}u + quad);
    }
  } }
{% endfor %}{% endfor %}{% endfor %}
{% for f in range(fragments[a]) %}
{% for r in range(row_fragments) %}{% for n in range(fragment_quads) %}
  {{ each_quad(n) }} {
    let raw = {{ a }}_raw_{{ r }}_{{ f }}_{{ n }};
    weights[weight_at - part + {{ r * side * weight_row }}u + quad] = {{ halves("raw", factor) }};
  } }
{% endfor %}{% endfor %}
  {{ sync() }}
{% for r in range(row_fragments) %}
  let {{ a }}_{{ r }}_{{ f }} = coopLoadT<coop_mat{{ side }}x{{ side }}<f16, A>>(&weights[subgroup_weights + {{ r * side * weight_row }}u], WEIGHT_ROW);
{% endfor %}
  {{ sync() }}
{% endfor %}
{% endmacro -%}

{%- macro accumulator(x, operand) %}
{% for r in range(row_fragments) %}{% for f in range(fragments[operand]) %}
  var {{ x }}_{{ r }}_{{ f }} = coop_mat{{ side }}x{{ side }}<f32, C>();
{% endfor %}{% endfor %}
{% endmacro -%}

{#- What was loaded as halves, times `factor`. -#}
{%- macro halves(x, factor) %}{% if dtype == "f16" and factor == "1.0" %}halves4({{ x }}){% else %}half4({{ x }}, {{ factor }}){% endif %}{% endmacro -%}

{#- A thread's share of a staged tile, as it was loaded; `put` makes halves of it, and leaves them in workgroup memory, when
    it has arrived. -#}
{%- macro shares(b) %}
{% if threads % staged_quads[b] == 0 %}
  let {{ b }}_row = thread / {{ staged_quads[b] }}u;
  let {{ b }}_quad = thread % {{ staged_quads[b] }}u;
{% endif %}
{% for n in range(staged_shares[b]) %}
  var {{ b }}_share_{{ n }} = Raw();
{% endfor %}
{% endmacro -%}

{#- Row and quad of a thread's n-th share within the tile. -#}
{%- macro share_row(b, n) %}{% if threads % staged_quads[b] == 0 %}{{ b }}_row + {{ n * threads // staged_quads[b] }}u{% else %}(thread + {{ n * threads }}u) / {{ staged_quads[b] }}u{% endif %}{% endmacro -%}
{%- macro share_quad(b, n) %}{% if threads % staged_quads[b] == 0 %}{{ b }}_quad{% else %}(thread + {{ n * threads }}u) % {{ staged_quads[b] }}u{% endif %}{% endmacro -%}

{#- Where a thread has an n-th share. -#}
{%- macro if_share(b, n) %}{% set total = tile_columns * staged_quads[b] %}{% if (n + 1) * threads > total %}if (thread < {{ total - n * threads }}u) {% endif %}{% endmacro -%}

{#- Reads a thread's share of the tile of columns from `column` on. Columns beyond the end are the last one again: they are
    hidden, but must be finite where the others are. -#}
{%- macro fetch(b, column) %}
{% for n in range(staged_shares[b]) %}
    {{ if_share(b, n) }}{
      let quad = {{ share_quad(b, n) }};
      let source = min({{ column }} + {{ share_row(b, n) }}, last_column);
      {% if staged_quads[b] > operand_quads[b] %}if (quad < {{ operand_quads[b] }}u) {% endif %}{ {{ b }}_share_{{ n }} = raw_{{ b }}({{ b }}_base, source * params.{{ b }}.seq, quad); }
    }
{% endfor %}
{% endmacro -%}

{%- macro put(b, stage) %}
{% for n in range(staged_shares[b]) %}
    {{ if_share(b, n) }}{
      {{ b }}_stage[{{ stage }} * {{ b | upper }}_TILE + ({{ share_row(b, n) }}) * {{ b | upper }}_ROW + {{ share_quad(b, n) }}] = {{ halves(b ~ "_share_" ~ n, factor(b)) }};
    }
{% endfor %}
{% endmacro -%}

{#- Before the first tile: the scale of scores in powers of two; and, where there is one range of tiles, the first is on its way:
    `put_columns` follows when other operands are, too. -#}
{%- macro begin_columns() %}
{% if softcap %}
  // cap tanh(x) = cap - 2 cap / (1 + e^(2 x)): what e is raised to, in powers of two and without its sign; and what `capped4`
  // gives is multiplied with. Never zero, so that hidden scores stay hidden.
  let cap = params.softcap * LOG2_E;
  let cap_scale = 2.0 * params.scale / params.softcap * LOG2_E * {{ inverse("q") }} * {{ inverse("k") }};
  let scale = max(1.7347234759768071e-18 * cap, 1e-33);
{% elif formed %}
  let scale = params.scale * LOG2_E * {{ inverse("q") }} * {{ inverse("k") }};
{% else %}
  // Never zero, so that hidden scores stay hidden.
  let scale = max(params.scale_size * LOG2_E * {{ inverse("q") }} * {{ inverse("k") }}, 1e-25);
{% endif %}
  var stage = 0u;
{% for b in staged %}
{{ shares(b) }}
{% endfor %}
{% if mask_words %}
{% for r in range(row_fragments) %}
  var mask_words_{{ r }} = vec2<u32>();
{% endfor %}
{% endif %}
{% if rows_are_keys %}
{% for n in range(statistic_shares) %}
  var statistic_share_{{ n }} = vec2<f32>();
{% endfor %}
{% else %}
  {
{{ fetch_columns("first_column(tiles, " ~ ("first_tile" if mask else "tiles.first") ~ ")") }}
  }
{{ fetch_mask("first_tile") }}
{% endif %}
{% endmacro -%}

{%- macro if_statistic(n) %}{% if (n + 1) * threads > tile_columns %}if (thread < {{ tile_columns - n * threads }}u) {% endif %}{% endmacro -%}

{#- Reads what the mask says of each of a lane's rows and the 64 columns around a tile, where the tile's span is mixed. -#}
{%- macro fetch_mask(tile) %}
{% if mask_words %}
  if (span.kind != 1u) {
    let first_word = {{ "(" ~ tile ~ " * TILE_COLUMNS)" if rows_are_keys else "first_column(tiles, " ~ tile ~ ")" }} / 64u * 2u;
{% for r in range(row_fragments) %}
    mask_words_{{ r }} = vec2<u32>(mask_word(row_{{ r }}, first_word), mask_word(row_{{ r }}, first_word + 1u));
{% endfor %}
  }
{% endif %}
{% endmacro -%}

{#- The 32 columns around a tile, before those of the next span come. -#}
{%- macro take_mask() %}
{% if mask_words %}
{% for r in range(row_fragments) %}
    let mask_{{ r }} = select(mask_words_{{ r }}.x, mask_words_{{ r }}.y, (column0 & 32u) != 0u) >> (column0 % 32u);
{% endfor %}
{% endif %}
{% endmacro -%}

{%- macro fetch_columns(column) %}
{% for b in staged %}
{{ fetch(b, column) }}
{% endfor %}
{% if rows_are_keys %}
{% for n in range(statistic_shares) %}
    {{ if_statistic(n) }}{ statistic_share_{{ n }} = row_terms[terms_base + min({{ column }} + thread + {{ n * threads }}u, last_column)]; }
{% endfor %}
{% endif %}
{% endmacro -%}

{%- macro put_columns() %}
{% for b in staged %}
{{ put(b, "stage") }}
{% endfor %}
{% if rows_are_keys %}
{% for n in range(statistic_shares) %}
    {{ if_statistic(n) }}{
      let item = thread + {{ n * threads }}u;
      let at = stage * {{ tile_columns // 2 }}u + item / 4u;
      statistics[at][item % 4u] = 15.0 - {{ shift("statistic_share_" ~ n ~ ".x") }};
      statistics[at + {{ tile_columns // 4 }}u][item % 4u] = -statistic_share_{{ n }}.y * v_bound * d_o_range * {{ 1 / 32768 }};
    }
{% endfor %}
{% endif %}
    workgroupBarrier();
{% endmacro -%}

{#- The first tile of a range, where there are several. -#}
{%- macro first_columns() %}
  {
{{ fetch_columns("first_tile * TILE_COLUMNS") }}
  }
{{ fetch_mask("first_tile") }}
{{ put_columns() }}
{% endmacro -%}

{#- The next tile has until the end of this one. -#}
{%- macro fetch_next() %}
    let next = {% set next_tile = "next_shown" if mask else following %}{% if rows_are_keys %}({{ next_tile }}) * TILE_COLUMNS{% else %}first_column(tiles, {{ next_tile }}){% endif %};
{{ fetch_columns("next") }}
{% endmacro -%}

{%- macro next_stage() %}
{% if stages == 2 %}
    stage = 1u - stage;
{% else %}
    workgroupBarrier();
{% endif %}
{{ put_columns() }}
{% endmacro -%}

{#- What lse (0) or delta (1) adds for a lane's n-th quad of columns. -#}
{%- macro statistic(n, which) %}statistics[statistic_at + {{ n * lanes // side + which * tile_columns // 4 }}u]{% endmacro -%}

{#- What lse and delta add in the subgroup's rows. -#}
{%- macro row_statistics() %}
{% for r in range(row_fragments) %}
  var shift_{{ r }} = 0.0;
  var delta_{{ r }} = 0.0;
  if (row_{{ r }} < row_limit) {
    let terms = row_terms[terms_base + row_{{ r }}];
    shift_{{ r }} = {{ shift("terms.x") }};
    delta_{{ r }} = terms.y * v_bound * d_o_range;
  }
{% endfor %}
{% endmacro -%}

{#- s[row, column] = a[row] . b[column]. -#}
{%- macro product(s, a, b, stage) %}
{% for c in range(column_fragments) %}
{% for r in range(row_fragments) %}
    var {{ s }}_{{ r }}_{{ c }} = coop_mat{{ side }}x{{ side }}<f32, C>();
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

{#- Leaves a row of fragments in the strip, and waits for it. -#}
{%- macro park(s, r) %}
{% for c in range(column_fragments) %}
    coopStoreT({{ s }}_{{ r }}_{{ c }}, &strips[strip + {{ c * side // 4 }}u], STRIP_ROW);
{% endfor %}
    {{ sync() }}
{% endmacro -%}

{#- First column of a lane's n-th quad of a strip. -#}
{%- macro quad_column(n) %}column0 + 4u * ({{ n * lanes // side }}u + part){% endmacro -%}

{%- macro take(x, r) %}
{% for n in range(lane_quads) %}
    var {{ x }}_{{ r }}_{{ n }} = strips[strip_at + {{ n * lanes // side }}u];
{% endfor %}
    {{ sync() }}
{% endmacro -%}

{#- Which of the columns of a lane's n-th quad its r-th row sees. -#}
{%- macro visible(r, n) %}visible4(row_{{ r }}, {{ quad_column(n) }}){% endmacro -%}

{#- `value` instead of what is hidden, whatever was computed there, and zeros in what `also` names. What happens rarely is a loop that runs once, not an if:
    NVIDIA's compiler leaves the registers of fragments where they are. -#}
{%- macro hide(x, value, also="") %}
    var hides_{{ x }} = masked{{ " || mixed" if mask }};
    loop {
      if (!hides_{{ x }}) { break; }
      hides_{{ x }} = false;
{% for r in range(row_fragments) %}
{% if mask_words %}
      // A bit for each column.
      var seen_{{ r }} = select(0xffffffffu, mask_{{ r }}, mixed);
      if (masked) { seen_{{ r }} &= visible_bits(row_{{ r }}, column0); }
      seen_{{ r }} >>= 4u * part;
{% endif %}
{% for n in range(lane_quads) %}
      {{ x }}_{{ r }}_{{ n }} = select(vec4<f32>({{ value }}), {{ x }}_{{ r }}_{{ n }}, {% if mask_words %}(vec4<u32>(seen_{{ r }}) & {{ quad_bits(n) }}) != vec4<u32>(){% else %}{{ visible(r, n) }}{% if mask %} & mask4(row_{{ r }}, {{ quad_column(n) }}){% endif %}{% endif %});
{% if also %}
      {{ also }}_{{ r }}_{{ n }} = select(vec4<f32>(), {{ also }}_{{ r }}_{{ n }}, {{ x }}_{{ r }}_{{ n }} != vec4<f32>());
{% endif %}
{% endfor %}
{% endfor %}
    }
{% endmacro -%}

{#- Bits of a lane's n-th quad, but for its place among the lanes of its row. -#}
{%- macro quad_bits(n) %}vec4<u32>({% for e in [1, 2, 4, 8] %}{{ ", " if e > 1 }}{{ e * 2 ** (4 * n * lanes // side) }}u{% endfor %}){% endmacro -%}

{#- exp of scores less a row's shift, in powers of two both. -#}
{%- macro exponential(x, shift) %}{% if formed %}exp2({{ x }} - vec4<f32>({{ shift }})){% else %}exp2(fma({{ x }}, vec4<f32>(scale), vec4<f32>(-{{ shift }}))){% endif %}{% endmacro -%}

{#- Where ALiBi's distances of a tile have one sign, and what they are multiplied with. Elsewhere, and where the band leaves both
    signs visible, `make_scores` mends those of the other. -#}
{%- macro begin_scores() %}
{% if alibi %}
    let slope2 = slope * LOG2_E;
{% if rows_are_keys %}
    let before = i32(min(column0 + TILE_COLUMNS, column_limit)) - 1 + {{ bounds }}.offset <= i32(row0);
    let crosses = !before && i32(column0) + {{ bounds }}.offset < i32(row_end) - 1 && {{ bounds }}.upper > {{ bounds }}.offset;
{% else %}
    let before = i32(column0) >= i32(row_end) - 1 + {{ bounds }}.offset;
    let crosses = !before && i32(column0 + TILE_COLUMNS) - 1 > i32(row0) + {{ bounds }}.offset && {{ bounds }}.upper > {{ bounds }}.offset;
{% endif %}
    // The query comes before the key: p - j is negative.
    let lean = select(slope2, -slope2, before);
    let leans = vec4<f32>(0.0, 1.0, 2.0, 3.0) * {{ "-lean" if rows_are_keys else "lean" }};
{% endif %}
{% endmacro -%}

{#- j - p of the first column of a lane's n-th quad. -#}
{%- macro ahead(r, n) %}f32({% if rows_are_keys %}i32(row_{{ r }}) - i32({{ quad_column(n) }}){% else %}i32({{ quad_column(n) }}) - i32(row_{{ r }}){% endif %} - {{ bounds }}.offset){% endmacro -%}

{#- Makes scores of products that were taken, in powers of two where they are `formed`; else they lack the scale, and capped ones
    the cap. Of softcap also the derivative, where `derivative` names it. -#}
{%- macro make_scores(x, derivative) %}
{% if softcap or formed %}
{% for r in range(row_fragments) %}{% for n in range(lane_quads) %}
{% set name = x ~ "_" ~ r ~ "_" ~ n %}
{% if softcap %}
    let e_{{ name }} = exp2(fma({{ name }}, vec4<f32>(cap_scale), vec4<f32>(-60.0)));
    {{ name }} = capped4(e_{{ name }});
{% if derivative %}
    var {{ derivative }}_{{ r }}_{{ n }} = cap_derivative4({{ name }}, e_{{ name }});
{% endif %}
{% if alibi %}
    {{ name }} = fma({{ name }}, vec4<f32>(scale), vec4<f32>(fma(lean, {{ ahead(r, n) }}, cap)) + leans);
{% elif formed %}
    {{ name }} = fma({{ name }}, vec4<f32>(scale), vec4<f32>(cap));
{% endif %}
{% elif alibi %}
    {{ name }} = fma({{ name }}, vec4<f32>(scale), vec4<f32>(lean * {{ ahead(r, n) }}) + leans);
{% else %}
    {{ name }} *= scale;
{% endif %}
{% if bias %}
    {{ name }} = biased4({{ name }}, bias4(row_{{ r }}, {{ quad_column(n) }}));
{% endif %}
{% endfor %}{% endfor %}
{% if alibi %}
    var mend_{{ x }} = crosses;
    loop {
      if (!mend_{{ x }}) { break; }
      mend_{{ x }} = false;
{% for r in range(row_fragments) %}{% for n in range(lane_quads) %}
      {{ x }}_{{ r }}_{{ n }} -= 2.0 * slope2 * max(vec4<f32>({{ ahead(r, n) }}) {{ "-" if rows_are_keys else "+" }} vec4<f32>(0.0, 1.0, 2.0, 3.0), vec4<f32>());
{% endfor %}{% endfor %}
    }
{% endif %}
{% endif %}
{% endmacro -%}

{#- Leaves what was taken and changed as weights for `accumulate`, and waits for it. -#}
{%- macro keep_weights(x) %}
{% for r in range(row_fragments) %}{% for n in range(lane_quads) %}
    weights[weight_at + {{ r * side * weight_row + n * lanes // side }}u] = vec4<f16>({{ x }}_{{ r }}_{{ n }});
{% endfor %}{% endfor %}
    {{ sync() }}
{% endmacro -%}

{#- Combines what the lanes of a row hold. -#}
{%- macro reduce_row(x, op) %}
{% for n in [1, 2] %}{% if n < lanes // side %}
  {{ x }} = {{ "max(%s, subgroupShuffleXor(%s, %su))" | format(x, x, n) if op == "max" else "%s + subgroupShuffleXor(%s, %su)" | format(x, x, n) }};
{% endif %}{% endfor %}
{% endmacro -%}

{#- x[row] += sum over columns of weights[row, column] * b[column]. -#}
{%- macro accumulate(x, b, stage) %}
{% for c in range(column_fragments) %}
    {
{% for r in range(row_fragments) %}
      let weight_{{ r }} = coopLoadT<coop_mat{{ side }}x{{ side }}<f16, A>>(&weights[subgroup_weights + {{ r * side * weight_row + c * side // 4 }}u], WEIGHT_ROW);
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

{#- Leaves one fragment of an accumulator in the strip. -#}
{%- macro park_fragment(x) %}
    {{ sync() }}
    coopStoreT({{ x }}, &strips[strip], STRIP_ROW);
    {{ sync() }}
{% endmacro -%}

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
{{ park_fragment(x ~ "_" ~ r ~ "_" ~ f) }}
{% for n in range(fragment_quads) %}
    {{ each_quad(n) }} {
      if (row_{{ r }} < row_limit{% if (f + 1) * side // 4 > operand_quads[operand] %} && {{ f * side // 4 }}u + quad < {{ operand_quads[operand] }}u{% endif %}) {
        let result = strips[strip_at - part + quad] * {{ factor ~ r if factor is endingwith("_") else factor }};
        broken = broken || !is_finite4(result);
        store_{{ operand }}(base, {{ f * side // 4 }}u + quad, result);
{% if o_rest %}
        store_o_rest(rest_base, {{ f * side // 4 }}u + quad, result);
{% endif %}
      } }
    }
{% endfor %}
{% endfor %}
  }
{% endfor %}
{% endmacro -%}

{#- Reports whether the tile is to be computed again. -#}
{%- macro report() %}
  let subgroup_broken = subgroupAny(broken);
  // The strips are free.
  workgroupBarrier();
  if (lane == 0u) { strips[subgroup] = vec4<f32>(select(0.0, 1.0, subgroup_broken)); }
  workgroupBarrier();
  if (thread == 0u) {
    var total = 0.0;
    for (var n = 0u; n < {{ subgroups }}u; n += 1u) { total += strips[n].x; }
    repairs[repair_slot({{ here_argument }}work, work.tile)] = u32(total);
  }
{% endmacro -%}
