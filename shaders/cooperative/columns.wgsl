{#- Tiles of columns in workgroup memory, staged for all subgroups. With two stages one tile is in use while the next is written, and one
    barrier a tile is enough. With one stage more workgroups fit.
    Needs: cooperative/fragments.wgsl, `main` of tile_main.wgsl, in d_kv head_loop of tile_loops.wgsl for the bases of its columns.
    Declares: the macros below; `stage`, a thread's shares of a tile, `scale`; in d_q `shift_R`, `delta_R` and d_q's units. -#}
# from "cooperative/fragments.wgsl" import shift, halves, stat_place
# from "cooperative/mask.wgsl" import fetch_mask

{#- A thread's share of a staged tile, as it was loaded: parts of rows, of four neighbours or of eight. `put` waits for it, rounds it to halves
    and stores them. -#}
# macro shares(b)
# if threads % share_parts[b] == 0
  let {{ b }}_row = thread / {{ share_parts[b] }}u;
  let {{ b }}_part = thread % {{ share_parts[b] }}u;
# if reorders and share_columns[b]
  let {{ b }}_column = {{ share_columns[b] }};
# endif
# endif
# for n in range(staged_shares[b])
  var {{ b }}_share_{{ n }} = {{ "vec4<u32>" if loads_eight else "Raw" }}();
# if column_scales and not stages_scales
  var {{ b }}_scale_{{ n }} = 1.0;
# endif
# endfor
# endmacro

{#- The row and the part of it of a thread's n-th share within the tile. -#}
{%- macro share_row(b, n) %}{% if threads % share_parts[b] == 0 %}{{ b }}_row + {{ n * threads // share_parts[b] }}u{% else %}(thread + {{ n * threads }}u) / {{ share_parts[b] }}u{% endif %}{% endmacro -%}

{#- The column of the tile that comes to that row. Bits of the thread's row and of those before it are apart, unless rows are shared by other
    numbers than powers of two. -#}
{%- macro share_column(b, n) -%}
{%- if not reorders -%}
  {{ share_row(b, n) }}
{%- elif share_columns[b] -%}
  {{ b }}_column + {{ columns_at[n * threads // share_parts[b]] }}u
{%- else -%}
  column_at({{ share_row(b, n) }})
{%- endif -%}
{%- endmacro -%}

{%- macro share_part(b, n) %}{% if threads % share_parts[b] == 0 %}{{ b }}_part{% else %}(thread + {{ n * threads }}u) % {{ share_parts[b] }}u{% endif %}{% endmacro -%}

{#- The condition under which a thread has an n-th share. -#}
{%- macro if_share(b, n) %}{% set total = tile_columns * share_parts[b] %}{% if (n + 1) * threads > total %}if (thread < {{ total - n * threads }}u) {% endif %}{% endmacro -%}

{#- Loads a thread's share of the tile of columns from `column` on. Columns beyond the end repeat the last one. They are hidden, but must
    be finite if the visible columns are. -#}
# macro fetch(b, column)
# for n in range(staged_shares[b])
    {{ if_share(b, n) }}{
      let part = {{ share_part(b, n) }};
      let source = min({{ column }} + {{ share_column(b, n) }}, last_column);
      {% if staged_quads[b] > operand_quads[b] %}if (part < {{ operand_parts[b] }}u) {% endif %}{ {{ b }}_share_{{ n }} = raw_{{ b }}({{ b }}_base, source * params.{{ b }}.seq, part); }
# if column_scales and not stages_scales
      {{ b }}_scale_{{ n }} = {{ column_scales }}[scales_base + source].{{ "x" if b == staged[0] else "y" }};
# endif
    }
# endfor
# endmacro

{#- Stores a thread's share of a tile as halves. The lower halves of split numbers have a place behind all stages. -#}
# macro put(b, stage)
# for n in range(staged_shares[b])
    {{ if_share(b, n) }}{
# if stages_scales
      let item = {{ share_column(b, n) }};
      let {{ b }}_scale_{{ n }} = {{ stat_place(4 if b == staged[0] else 5) }};
# endif
# if splits
      let at = {{ stage }} * {{ b | upper }}_TILE + ({{ share_row(b, n) }}) * {{ b | upper }}_ROW + {{ share_part(b, n) }};
      let x = {{ b }}_share_{{ n }} * {{ b }}_scale_{{ n }};
      let hi = hi4(x);
      {{ b }}_stage[at] = vec4<f16>(hi);
      {{ b }}_stage[at + {{ b | upper }}_LO] = vec4<f16>(x - hi);
# elif loads_eight
      let at = {{ stage }} * {{ b | upper }}_TILE + ({{ share_row(b, n) }}) * {{ b | upper }}_ROW + 2u * ({{ share_part(b, n) }});
      {{ b }}_stage[at] = bits_as_halves({{ b }}_share_{{ n }}.xy);
      {{ b }}_stage[at + 1u] = bits_as_halves({{ b }}_share_{{ n }}.zw);
# else
      {{ b }}_stage[{{ stage }} * {{ b | upper }}_TILE + ({{ share_row(b, n) }}) * {{ b | upper }}_ROW + {{ share_part(b, n) }}] = {{ halves(b ~ "_share_" ~ n, b ~ "_scale_" ~ n if column_scales else "1.0") }};
# endif
    }
# endfor
# endmacro

{#- Before the first tile: the scale of scores in powers of two, and the variables that `fetch_columns` fills. -#}
# macro begin_columns()
# if softcap
  // cap tanh(x) = cap - 2 cap / (1 + e^(2 x)). `cap_scale` makes the power of two from a product, and `scale` multiplies the result of
  // `capped4`. It is never zero, so hidden scores stay hidden.
  let cap = params.softcap * LOG2_E;
  let cap_scale = 2.0 * params.scale / params.softcap * LOG2_E;
  let scale = max(1.7347234759768071e-18 * cap, 1e-33);
# elif joins_bias
  // The scale is never zero, so hidden scores stay hidden.
  let signed_scale = params.scale * params.scale_sign * LOG2_E;
  let scale = select(signed_scale, 1.2e-38, signed_scale == 0.0);
# elif formed
  let scale = params.scale * params.scale_sign * LOG2_E;
# else
  // The scale is never zero, so hidden scores stay hidden.
  let scale = max(params.scale_size * LOG2_E, {{ "1.2e-38" if wide_products else "1e-25" }});
# endif
  var stage = 0u;
# for b in staged
{{ shares(b) }}
# endfor
# if mask_words
# for r in range(lane_rows)
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

{#- The condition under which a thread has an n-th column. -#}
{%- macro if_column(n) %}{% if (n + 1) * threads > tile_columns %}if (thread < {{ tile_columns - n * threads }}u) {% endif %}{% endmacro -%}

{#- Loads a thread's shares of all staged operands, and the statistics of its columns. -#}
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
      lse_delta_{{ n }} = vec2<f32>(row_stats[stats_base + source].x, row_stats[stats_base + source].y);
# else
      lse_delta_{{ n }} = row_stats[stats_base + source].xy;
# endif
# endif
# if column_scales
      token_scale_{{ n }} = {{ column_scales }}[scales_base + source];
# endif
    }
# endfor
# endif
# endmacro

{#- Leaves the token scales of the next tile where `put` finds them behind a barrier: all threads have read those of this tile. -#}
# macro put_scales()
# if stages_scales
# for n in range(column_shares)
    {{ if_column(n) }}{
      let item = thread + {{ n * threads }}u;
      {{ stat_place(4) }} = token_scale_{{ n }}.x;
      {{ stat_place(5) }} = token_scale_{{ n }}.y;
    }
# endfor
# endif
# endmacro

{#- Stores the loaded shares and statistics in the stage. `has_scales` says that `put_scales` and a barrier have been. -#}
# macro put_columns(has_scales=false)
# if stages_scales and not has_scales
{{ put_scales() }}
    workgroupBarrier();
# endif
# for b in staged
{{ put(b, "stage") }}
# endfor
{{ put_stats() }}
    workgroupBarrier();
# endmacro

{#- The logarithm of what P is multiplied with in d_kv. -#}
{%- macro log2_of_p_factor() %}{{ "LOG2_GAIN" if lifts_p else p_exponent ~ ".0" }}{% endmacro -%}

# macro put_stats()
# if stats_per_column > 0
# for n in range(column_shares)
    {{ if_column(n) }}{
      let item = thread + {{ n * threads }}u;
# if rows_are_keys
# set lse = "lse_delta_" ~ n ~ ".x"
# if bias
{#- With a bias of -infinity it adds up to -infinity, and with another one to so much that the row is reported. -#}
      {{ stat_place(0) }} = select({{ log2_of_p_factor() }} - {{ shift(lse) }}, {{ "1e38" if joins_bias else "-params.negative_infinity" }}, {{ lse }} <= ABSORBING);
# else
      {{ stat_place(0) }} = {{ log2_of_p_factor() }} - {{ shift(lse) }};
# endif
      {{ stat_place(1) }} = -lse_delta_{{ n }}.y;
# endif
# if column_scales
      // A token without finite numbers has no scale to take out.
      let powers = select(token_scale_{{ n }}, vec2<f32>(1.0), token_scale_{{ n }} > vec2<f32>(1e30));
# set first = 2 if rows_are_keys else 0
      {{ stat_place(first) }} = 1.0 / powers.x;
# if softmax
      // The powers of values are added to the scores, and taken out of the sum of probabilities.
      {{ stat_place(1) }} = f32(127 - i32(bitcast<u32>(powers.y) >> 23u));
      {{ stat_place(2) }} = powers.y;
# else
      {{ stat_place(first + 1) }} = 1.0 / powers.y;
# endif
# endif
    }
# endfor
# endif
# endmacro

{#- The first column of a tile. -#}
{%- macro column_of(tile) %}{% if rows_are_keys %}({{ tile }}) * TILE_COLUMNS{% else %}first_column(tiles, {{ tile }}){% endif %}{% endmacro -%}

{#- Starts to load the first tile. `put_first` follows once the other operands are under way, too. -#}
# macro fetch_first(tile="first_of_all" if peels else "tiles.first")
  {
{{ fetch_columns(column_of("first_tile" if mask else tile)) }}
  }
{{ fetch_mask("first_tile") }}
# endmacro

{#- Stores what the first product of a tile needs: all columns, or those of the first operand, as long as the second waits. -#}
# macro put_first()
# if phased
{{ put(staged[0], "stage") }}
{{ put_stats() }}
    workgroupBarrier();
# else
{{ put_columns() }}
# endif
# endmacro

{#- Starts to load the next tile, which is needed at the end of this one. -#}
# macro fetch_next()
    let next = {{ column_of("next_visible" if mask else ("following" if peels else following)) }};
{{ fetch_columns("next") }}
# endmacro

{#- The next tile takes the other stage, or the only one when all subgroups have used it. -#}
# macro next_stage()
# if stages == 2
    stage = 1u - stage;
# else
    workgroupBarrier();
# endif
{{ put_columns(has_scales=true) }}
# endmacro

{#- The statistics of the subgroup's rows: the shift by lse, delta, and in f16 the unit of d_q. -#}
# macro row_stats()
# for r in range(lane_rows)
  var shift_{{ r }} = 0.0;
  var delta_{{ r }} = 0.0;
# if has_query_unit
  var d_q_unit_{{ r }} = 1.0;
# endif
  if (row_{{ r }} < row_limit) {
    let own = row_stats[stats_base + row_{{ r }}];
    shift_{{ r }} = {{ shift("own.x") }}{{ " - LOG2_GAIN" if lifts_p }};
    delta_{{ r }} = own.y;
# if has_query_unit
    d_q_unit_{{ r }} = own.z;
# endif
# if bias
    // The probabilities of this row need a count of its keys.
    fallback_{{ r }} = own.x <= ABSORBING;
# endif
  }
# endfor
# endmacro
