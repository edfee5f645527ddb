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
  let last_column = {{ "max(column_limit, 1u)" if lengths else "column_limit" }} - 1u;
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

{#- What was loaded as halves, times `factor`. -#}
{%- macro halves(x, factor) %}{% if dtype == "f16" and factor == "1.0" %}halves4({{ x }}){% else %}half4({{ x }}, {{ factor }}){% endif %}{% endmacro -%}

{#- A thread's share of a staged tile, as it was loaded; `put` makes halves of it, and leaves them in workgroup memory, when
    it has arrived. -#}
# macro shares(b)
# if threads % staged_quads[b] == 0
  let {{ b }}_row = thread / {{ staged_quads[b] }}u;
  let {{ b }}_quad = thread % {{ staged_quads[b] }}u;
# endif
# for n in range(staged_shares[b])
  var {{ b }}_share_{{ n }} = Raw();
# if column_scales
  var {{ b }}_scale_{{ n }} = 1.0;
# endif
# endfor
# endmacro

{#- Row and quad of a thread's n-th share within the tile. -#}
{%- macro share_row(b, n) %}{% if threads % staged_quads[b] == 0 %}{{ b }}_row + {{ n * threads // staged_quads[b] }}u{% else %}(thread + {{ n * threads }}u) / {{ staged_quads[b] }}u{% endif %}{% endmacro -%}
{%- macro share_quad(b, n) %}{% if threads % staged_quads[b] == 0 %}{{ b }}_quad{% else %}(thread + {{ n * threads }}u) % {{ staged_quads[b] }}u{% endif %}{% endmacro -%}

{#- Where a thread has an n-th share. -#}
{%- macro if_share(b, n) %}{% set total = tile_columns * staged_quads[b] %}{% if (n + 1) * threads > total %}if (thread < {{ total - n * threads }}u) {% endif %}{% endmacro -%}

{#- Reads a thread's share of the tile of columns from `column` on. Columns beyond the end are the last one again: they are
    hidden, but must be finite where the others are. -#}
# macro fetch(b, column)
# for n in range(staged_shares[b])
    {{ if_share(b, n) }}{
      let quad = {{ share_quad(b, n) }};
      let source = min({{ column }} + {{ share_row(b, n) }}, last_column);
      {% if staged_quads[b] > operand_quads[b] %}if (quad < {{ operand_quads[b] }}u) {% endif %}{ {{ b }}_share_{{ n }} = raw_{{ b }}({{ b }}_base, source * params.{{ b }}.seq, quad); }
# if column_scales
      {{ b }}_scale_{{ n }} = {{ column_scales }}[scales_base + source].{{ "x" if b == staged[0] else "y" }};
# endif
    }
# endfor
# endmacro

# macro put(b, stage)
# for n in range(staged_shares[b])
    {{ if_share(b, n) }}{
      {{ b }}_stage[{{ stage }} * {{ b | upper }}_TILE + ({{ share_row(b, n) }}) * {{ b | upper }}_ROW + {{ share_quad(b, n) }}] = {{ halves(b ~ "_share_" ~ n, b ~ "_scale_" ~ n if column_scales else "1.0") }};
    }
# endfor
# endmacro

{#- Before the first tile: the scale of scores in powers of two, and what `fetch` keeps. -#}
# macro begin_columns()
# if softcap
  // cap tanh(x) = cap - 2 cap / (1 + e^(2 x)): what e is raised to, in powers of two and without its sign; and what `capped4`
  // gives is multiplied with. Never zero, so that hidden scores stay hidden.
  let cap = params.softcap * LOG2_E;
  let cap_scale = 2.0 * params.scale / params.softcap * LOG2_E;
  let scale = max(1.7347234759768071e-18 * cap, 1e-33);
# elif formed
  let scale = params.scale * params.scale_sign * LOG2_E;
# else
  // Never zero, so that hidden scores stay hidden.
  let scale = max(params.scale_size * LOG2_E, 1e-25);
# endif
  var stage = 0u;
# for b in staged
{{ shares(b) }}
# endfor
# if mask_words
# for r in range(row_fragments)
  var mask_words_{{ r }} = vec2<u32>();
# endfor
# endif
# for n in range(column_shares)
# if rows_are_keys
  var lse_delta_{{ n }} = vec2<f32>();
# endif
# if column_scales
  var token_scale_{{ n }} = vec2<f32>();
# endif
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

{#- Where a thread has an n-th column. -#}
{%- macro if_column(n) %}{% if (n + 1) * threads > tile_columns %}if (thread < {{ tile_columns - n * threads }}u) {% endif %}{% endmacro -%}

{#- Reads what the mask says of each of a lane's rows and the 64 columns around a tile, where the tile's span is mask_partial. -#}
# macro fetch_mask(tile)
# if mask_words
  if (span.kind != 1u) {
    let first_word = {{ "(" ~ tile ~ " * TILE_COLUMNS)" if rows_are_keys else "first_column(tiles, " ~ tile ~ ")" }} / 64u * 2u;
# for r in range(row_fragments)
    mask_words_{{ r }} = vec2<u32>(mask_word(row_{{ r }}, first_word), mask_word(row_{{ r }}, first_word + 1u));
# endfor
  }
# endif
# endmacro

{#- The 32 columns around a tile, before those of the next span come. -#}
# macro mask_of_tile()
# if mask_words
# for r in range(row_fragments)
    let mask_{{ r }} = select(mask_words_{{ r }}.x, mask_words_{{ r }}.y, (column0 & 32u) != 0u) >> (column0 % 32u);
# endfor
# endif
# endmacro

# macro fetch_columns(column)
# for b in staged
{{ fetch(b, column) }}
# endfor
# if stats_per_column > 0
# for n in range(column_shares)
    {{ if_column(n) }}{
      let source = min({{ column }} + thread + {{ n * threads }}u, last_column);
# if rows_are_keys
# if column_fragments > 1
{#- One by one is faster with tiles of 32 queries and slower with those of 16, on an NVIDIA H200: benches/results/2026-11-28-h200-unseen.md. -#}
      lse_delta_{{ n }} = vec2<f32>(row_terms[stats_base + source].x, row_terms[stats_base + source].y);
# else
      lse_delta_{{ n }} = row_terms[stats_base + source].xy;
# endif
# endif
# if column_scales
      token_scale_{{ n }} = {{ column_scales }}[scales_base + source];
# endif
    }
# endfor
# endif
# endmacro

# macro put_columns()
# for b in staged
{{ put(b, "stage") }}
# endfor
# if stats_per_column > 0
# for n in range(column_shares)
    {{ if_column(n) }}{
      let item = thread + {{ n * threads }}u;
      let at = stage * {{ stats_per_column * tile_columns // 4 }}u + item / 4u;
# if rows_are_keys
      column_stats[at][item % 4u] = {% if bias %}select(15.0 - {{ shift("lse_delta_" ~ n ~ ".x") }}, -params.negative_infinity, lse_delta_{{ n }}.x <= ABSORBING){% else %}15.0 - {{ shift("lse_delta_" ~ n ~ ".x") }}{% endif %};
      column_stats[at + {{ tile_columns // 4 }}u][item % 4u] = -lse_delta_{{ n }}.y;
# endif
# if column_scales
      // A token that is not finite has no scale to take out.
      let powers = select(token_scale_{{ n }}, vec2<f32>(1.0), token_scale_{{ n }} > vec2<f32>(1e30));
# set first = 2 if rows_are_keys else 0
      column_stats[at + {{ first * tile_columns // 4 }}u][item % 4u] = 1.0 / powers.x;
# if softmax
      // Values' powers go with the scores, and out of the sum of probabilities.
      column_stats[at + {{ tile_columns // 4 }}u][item % 4u] = f32(127 - i32(bitcast<u32>(powers.y) >> 23u));
      column_stats[at + {{ 2 * tile_columns // 4 }}u][item % 4u] = powers.y;
# else
      column_stats[at + {{ (first + 1) * tile_columns // 4 }}u][item % 4u] = 1.0 / powers.y;
# endif
# endif
    }
# endfor
# endif
    workgroupBarrier();
# endmacro

{#- The first column of a tile. -#}
{%- macro column_of(tile) %}{% if rows_are_keys %}({{ tile }}) * TILE_COLUMNS{% else %}first_column(tiles, {{ tile }}){% endif %}{% endmacro -%}

{#- Sets a range's first tile on its way: `put_columns` follows when other operands are, too. -#}
# macro fetch_first(tile="tiles.first")
  {
{{ fetch_columns(column_of("first_tile" if mask else tile)) }}
  }
{{ fetch_mask("first_tile") }}
# endmacro

{#- The next tile has until the end of this one. -#}
# macro fetch_next()
    let next = {{ column_of("next_visible" if mask else following) }};
{{ fetch_columns("next") }}
# endmacro

# macro next_stage()
# if stages == 2
    stage = 1u - stage;
# else
    workgroupBarrier();
# endif
{{ put_columns() }}
# endmacro

{#- A term of the columns of a lane's n-th quad: of queries what lse (0) and delta (1) add; then what takes the scales of the first
    and of the second staged operand out. -#}
{%- macro column_stat(n, which) %}column_stats[stage * {{ stats_per_column * tile_columns // 4 }}u + part + {{ n * lanes // side + which * tile_columns // 4 }}u]{% endmacro -%}
{%- macro column_inverse(n, which) %}{{ column_stat(n, which + (2 if rows_are_keys else 0)) }}{% endmacro -%}

{#- What lse and delta add in the subgroup's rows. -#}
# macro row_stats()
# for r in range(row_fragments)
  var shift_{{ r }} = 0.0;
  var delta_{{ r }} = 0.0;
# if not units
  var d_q_unit_{{ r }} = 1.0;
# endif
  if (row_{{ r }} < row_limit) {
    let own = row_terms[stats_base + row_{{ r }}];
    shift_{{ r }} = {{ shift("own.x") }};
    delta_{{ r }} = own.y;
# if not units
    d_q_unit_{{ r }} = own.z;
# endif
# if bias
    // Its probabilities take counting its keys.
    fallback_{{ r }} = own.x <= ABSORBING;
# endif
  }
# endfor
# endmacro

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

{#- First column of a lane's n-th quad of a strip. -#}
{%- macro quad_column(n) %}column0 + 4u * ({{ n * lanes // side }}u + part){% endmacro -%}

{#- Reads a row of fragments back by rows, without the scales of the columns' first (0) or second (1) operand. -#}
# macro load_rows(x, r, which)
# for n in range(lane_quads)
    var {{ x }}_{{ r }}_{{ n }} = score_rows[score_at + {{ n * lanes // side }}u]{% if column_scales %} * {{ column_inverse(n, which) }}{% endif %};
# endfor
    {{ sync() }}
# endmacro

{#- Which of the columns of a lane's n-th quad its r-th row sees. -#}
{%- macro visible(r, n) %}visible4(row_{{ r }}, {{ quad_column(n) }}){% endmacro -%}

{#- `value` instead of what is hidden, whatever was computed there, and zeros in what `also` names. What happens rarely is a loop that runs once, not an if:
    NVIDIA's compiler leaves the registers of fragments where they are. -#}
# macro hide(x, value, also="", before="")
    var hides_{{ before ~ x }} = is_partial{{ " || mask_partial" if mask }};
    loop {
      if (!hides_{{ before ~ x }}) { break; }
      hides_{{ before ~ x }} = false;
# for r in range(row_fragments)
# if mask_words
      // A bit for each column.
      var visible_{{ r }} = select(0xffffffffu, mask_{{ r }}, mask_partial);
      if (is_partial) { visible_{{ r }} &= visible_bits(row_{{ r }}, column0); }
      visible_{{ r }} >>= 4u * part;
# endif
# for n in range(lane_quads)
      {{ x }}_{{ r }}_{{ n }} = select(vec4<f32>({{ value }}), {{ x }}_{{ r }}_{{ n }}, {% if mask_words %}(vec4<u32>(visible_{{ r }}) & {{ quad_bits(n) }}) != vec4<u32>(){% else %}{{ visible(r, n) }}{% if mask %} & mask4(row_{{ r }}, {{ quad_column(n) }}){% endif %}{% endif %});
# if also
      {{ also }}_{{ r }}_{{ n }} = select(vec4<f32>(), {{ also }}_{{ r }}_{{ n }}, {{ x }}_{{ r }}_{{ n }} != vec4<f32>());
# endif
# endfor
# endfor
    }
# endmacro

{#- Bits of a lane's n-th quad, but for its place among the lanes of its row. -#}
{%- macro quad_bits(n) %}vec4<u32>({% for e in [1, 2, 4, 8] %}{{ ", " if e > 1 }}{{ e * 2 ** (4 * n * lanes // side) }}u{% endfor %}){% endmacro -%}

{#- exp of scores less a row's shift, in powers of two both. -#}
{%- macro exponential(x, shift, r) %}{% if formed %}exp2({{ x }} - vec4<f32>({{ shift }})){% else %}exp2(fma({{ x }}, vec4<f32>({{ score_scale(r) }}), vec4<f32>(-{{ shift }}))){% endif %}{% endmacro -%}

{#- Where ALiBi's distances of a tile have one sign, and what they are multiplied with. Elsewhere, and where the band leaves both
    signs visible, `make_scores` mends those of the other. -#}
# macro begin_scores()
# if alibi
    let slope2 = slope * LOG2_E;
# if rows_are_keys
    let before = i32(min(column0 + TILE_COLUMNS, column_limit)) - 1 + {{ bounds }}.offset <= i32(row0);
    let crosses = !before && i32(column0) + {{ bounds }}.offset < i32(row_end) - 1 && {{ bounds }}.upper > {{ bounds }}.offset;
# else
    let before = i32(column0) >= i32(row_end) - 1 + {{ bounds }}.offset;
    let crosses = !before && i32(column0 + TILE_COLUMNS) - 1 > i32(row0) + {{ bounds }}.offset && {{ bounds }}.upper > {{ bounds }}.offset;
# endif
    // The query comes before the key: p - j is negative.
    let lean = select(slope2, -slope2, before);
    let leans = vec4<f32>(0.0, 1.0, 2.0, 3.0) * {{ "-lean" if rows_are_keys else "lean" }};
# endif
# endmacro

{#- j - p of the first column of a lane's n-th quad. -#}
{%- macro ahead(r, n) %}f32({% if rows_are_keys %}i32(row_{{ r }}) - i32({{ quad_column(n) }}){% else %}i32({{ quad_column(n) }}) - i32(row_{{ r }}){% endif %} - {{ bounds }}.offset){% endmacro -%}

{#- Makes scores of products that were taken, in powers of two where they are `formed`; else they lack the scale, and capped ones
    the cap. Of softcap also the derivative, where `derivative` names it. -#}
# macro make_scores(x, derivative)
# if softcap and not bias
{#- Two share a reciprocal: none with what is hidden. -#}
{{ hide(x, "0.0", before="capped_") }}
# endif
# if softcap or formed
# for r, n in pairs(row_fragments, lane_quads)
# set name = x ~ "_" ~ r ~ "_" ~ n
# if softcap
    let e_{{ name }} = exp2(fma({{ name }}, vec4<f32>({{ product_scale(r) }}), vec4<f32>(-60.0)));
    {{ name }} = capped4(e_{{ name }});
# if derivative
    var {{ derivative }}_{{ r }}_{{ n }} = cap_derivative4({{ name }}, e_{{ name }});
# endif
# if alibi
    {{ name }} = fma({{ name }}, vec4<f32>(scale), vec4<f32>(fma(lean, {{ ahead(r, n) }}, cap)) + leans);
# elif formed
    {{ name }} = fma({{ name }}, vec4<f32>(scale), vec4<f32>(cap));
# endif
# elif alibi
    {{ name }} = fma({{ name }}, vec4<f32>({{ product_scale(r) }}), vec4<f32>(lean * {{ ahead(r, n) }}) + leans);
# else
    {{ name }} *= {{ product_scale(r) }};
# endif
# if bias
    {{ name }} = biased4({{ name }}, bias4(row_{{ r }}, {{ quad_column(n) }}));
# endif
# endfor
# if alibi
    var mend_{{ x }} = crosses;
    loop {
      if (!mend_{{ x }}) { break; }
      mend_{{ x }} = false;
# for r, n in pairs(row_fragments, lane_quads)
      {{ x }}_{{ r }}_{{ n }} -= 2.0 * slope2 * max(vec4<f32>({{ ahead(r, n) }}) {{ "-" if rows_are_keys else "+" }} vec4<f32>(0.0, 1.0, 2.0, 3.0), vec4<f32>());
# endfor
    }
# endif
# endif
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

{#- Before the walk: no row has a unit. -#}
# macro begin_units()
# if units
# for x in units
# for r in range(row_fragments)
  var {{ x }}_unit_{{ r }} = 1.0;
  var {{ x }}_waits_{{ r }} = row_{{ r }} < {{ ("min(row_limit, here." ~ ("seq_k" if rows_are_keys else "seq_q") ~ ")") if lengths else "row_limit" }};
# endfor
# endfor
  var waits = true;
# endif
# endmacro

{#- The largest weight of each row sets its unit, where that waits for the first weights, or where they go beyond halves: it comes to
    2^-6 .. 2^-5, so that weights down to 2^-8 of it are as precise as halves are, what is lost below is little beside it, and later ones
    may be 2^20 times as large. -#}
# macro follow(w, x, condition, then="")
# for r in range(row_fragments)
      var factor_{{ r }} = 1.0;
      {
        var largest4 = abs({{ w }}_{{ r }}_0);
# for n in range(1, lane_quads)
        largest4 = max(largest4, abs({{ w }}_{{ r }}_{{ n }}));
# endfor
        var largest = max(max(largest4.x, largest4.y), max(largest4.z, largest4.w));
{{ reduce_row("largest", "max") }}
        let exponent = i32(bitcast<u32>(largest) >> 23u) - 127;
        // No unit takes infinity or NaN: the row is reported.
        if (exponent < 128 && {{ condition | replace("ROW", r) }}) {
          factor_{{ r }} = bitcast<f32>(u32(127 + clamp(-6 - exponent, -100, 100)) << 23u);
# if then
          {{ then | replace("ROW", r) }}
# endif
        }
      }
      {{ x }}_unit_{{ r }} *= factor_{{ r }};
# endfor
# endmacro

{#- Sets units of rows that have none. -#}
# macro set_units(w, x)
    {
{{ follow(w, x, x ~ "_waits_ROW && largest > 0.0", x ~ "_waits_ROW = false;") }}
    }
# endmacro

{#- Leaves changed weights w, in the unit of the accumulator x, for `accumulate`. The unit is known before: setting it here costs the
    loop over tiles its registers, even where that hardly ever happens (8 to 25 % on an NVIDIA H200), and so does comparing weights
    with what halves hold (16 to 25 % of d_kv). A weight beyond that becomes infinite as a half, and so does its row, which is
    reported. In the second run the unit follows such weights. -#}
# macro keep_in_unit(w, x, operand, also=[])
# if sanitize
    var grows_{{ x }} = subgroupAny(any({% for r in range(row_fragments) %}{% for n in range(lane_quads) %}{{ " | " if r + n > 0 }}(abs({{ w }}_{{ r }}_{{ n }}) > vec4<f32>(UNIT_LIMIT)){% endfor %}{% endfor %}));
    loop {
      if (!grows_{{ x }}) { break; }
      grows_{{ x }} = false;
{{ follow(w, x, "largest > UNIT_LIMIT") }}
# for r in range(row_fragments)
# for n in range(lane_quads)
      {{ w }}_{{ r }}_{{ n }} *= factor_{{ r }};
# endfor
# for stem in also
      {{ stem }}_{{ r }} *= factor_{{ r }};
# endfor
# endfor
{{ rescale(x, operand, "factor_") }}
    }
# endif
{{ store_p(w) }}
# endmacro

{#- The walk begins at a tile of which all rows see something, if there is one, goes on from the first one, and ends when all rows
    have a unit. A row without weights has none to the end. -#}
# macro begin_walk()
# if not mask
  let walk_tile = clamp({{ "full.start" if rows_are_keys else "(max(full.end, 1u) - 1u)" }} / TILE_COLUMNS, tiles.first, max(tiles.end, 1u) - 1u);
  var next_of_walk = tiles.first;
  var is_first = true;
# endif
{{ fetch_first("walk_tile") }}
# endmacro

{#- Ends a tile: goes on where rows wait for their units. -#}
# macro next_units()
    let subgroup_waits = subgroupAny({% for x in units %}{% set first = loop.first %}{% for r in range(row_fragments) %}{{ " || " if r > 0 or not first }}{{ x }}_waits_{{ r }}{% endfor %}{% endfor %});
{{ any_subgroup("waits", "subgroup_waits") }}
    if (!waits) { break; }
# if not mask
    next_of_walk = select({{ following }}, tiles.first, is_first);
    is_first = false;
# endif
    let next = {{ column_of("next_visible" if mask else "next_of_walk") }};
{{ fetch_columns("next") }}
# endmacro

{#- After the walk: the first tile again. -#}
# macro restart()
# if mask
  classes = Classes(0u, 0xffffffffu);
  span = visible_span({{ class_arguments }}, tiles, row0, row_end, tiles.first);
  next_visible = first_tile;
# endif
{{ fetch_first() }}
# endmacro

{#- In the second run: replaces staged columns that are not finite by zeros, and marks them behind their features. -#}
# macro clean_columns()
# if sanitize
      for (var column = thread; column < {{ tile_columns }}u; column += {{ threads }}u) {
# for b in staged
        {
          let at = stage * {{ b | upper }}_TILE + column * {{ b | upper }}_ROW;
          var is_nonfinite = false;
          for (var quad = 0u; quad < {{ staged_quads[b] }}u; quad += 1u) {
            let x = vec4<f32>({{ b }}_stage[at + quad]);
            if (!is_finite4(x)) {
              {{ b }}_stage[at + quad] = vec4<f16>();
              is_nonfinite = true;
            }
          }
          {{ b }}_stage[at + {{ staged_quads[b] }}u] = vec4<f16>(select(0.0h, 1.0h, is_nonfinite));
        }
# endfor
      }
      workgroupBarrier();
# endif
# endmacro

{#- In the second run: finds the rows that see such a column. -#}
# macro find_fallback()
# if sanitize
# for r, n in pairs(row_fragments, lane_quads)
      var nonfinite_{{ r }}_{{ n }} = vec4<f32>();
      {
        let column = 4u * ({{ n * lanes // side }}u + part);
# for e in range(4)
# for b in staged
        nonfinite_{{ r }}_{{ n }}.{{ xyzw[e] }} += f32({{ b }}_stage[stage * {{ b | upper }}_TILE + (column + {{ e }}u) * {{ b | upper }}_ROW + {{ staged_quads[b] }}u].x);
# endfor
# endfor
# if bias
        nonfinite_{{ r }}_{{ n }} = select(nonfinite_{{ r }}_{{ n }}, vec4<f32>(), bitcast<vec4<u32>>(bias4(row_{{ r }}, column0 + column)) == vec4<u32>(0xff800000u));
# endif
      }
# endfor
{{ hide("nonfinite", "0.0") }}
# for r in range(row_fragments)
      fallback_{{ r }} = fallback_{{ r }}{% for n in range(lane_quads) %} || any(nonfinite_{{ r }}_{{ n }} != vec4<f32>()){% endfor %};
# endfor
# endif
# endmacro

{#- Leaves one fragment of an accumulator in the strip. -#}
# macro store_fragment(x)
    {{ sync() }}
    coopStoreT({{ x }}, &score_rows[subgroup_scores], SCORE_ROW);
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

{#- Reports whether rows of the tile are to be computed again, and, where there are any, which. -#}
# macro report_fallback()
  let subgroup_fallback = subgroupAny({% for r in range(row_fragments) %}{{ " || " if r > 0 }}(fallback_{{ r }} && row_{{ r }} < row_limit){% endfor %});
  var any_fallback = false;
{{ any_subgroup("any_fallback", "subgroup_fallback") }}
  let slot = fallback_slot({{ here_argument }}work, work.tile);
  if (thread == 0u) { repairs[slot] = u32(any_fallback); }
  var has_any = any_fallback;
  loop {
    if (!has_any) { break; }
    has_any = false;
    workgroupBarrier();
# for r in range(row_fragments)
    var reported_{{ r }} = select(0.0, 1.0, fallback_{{ r }});
{{ reduce_row("reported_" ~ r, "max") }}
    if (part == 0u) { score_rows[row_{{ r }} - row0] = vec4<f32>(reported_{{ r }}); }
# endfor
    workgroupBarrier();
    if (thread < {{ (tile_rows + 31) // 32 }}u) {
      var bits = 0u;
      for (var n = 0u; n < min({{ tile_rows }}u - thread * 32u, 32u); n += 1u) { bits |= u32(score_rows[thread * 32u + n].x) << n; }
      repairs[slot + 1u + thread] = bits;
    }
  }
# endmacro
