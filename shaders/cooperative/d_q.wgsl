{#- The gradient by q on fragments: rows are queries, columns are keys.
    Needs: the cooperative macros, probability.wgsl, `main` of tile_main.wgsl. Declares: the macros that d_q.wgsl calls. -#}
# import "cooperative/fragments.wgsl" as matrix
# import "cooperative/mask.wgsl" as masking
# import "cooperative/columns.wgsl" as columns
# import "cooperative/scores.wgsl" as score
# import "cooperative/units.wgsl" as unit
# import "cooperative/fallback.wgsl" as fallback

{%- macro declare() %}{{ matrix.declare() }}{% endmacro -%}

# macro begin()
{{ matrix.begin() }}
{{ columns.begin_columns() }}
# if units
{{ unit.begin_walk() }}
# else
{{ columns.fetch_first() }}
# endif
{{ matrix.resident("q") }}
{{ matrix.resident("d_o") }}
{{ matrix.row_scales("q") }}
{{ unit.begin_units() }}
{{ columns.row_stats() }}
# endmacro

{#- A tile of the walk: dS sets the units of rows that wait for one. -#}
# macro find_units()
{{ columns.put_columns() }}
{{ matrix.product("s", "q", "k", "stage") }}
{{ matrix.product("d_p", "d_o", "v", "stage") }}
{{ make_d_s(false, "some") }}
{{ unit.set_units("d_s", "d_q") }}
{{ unit.next_units() }}
# endmacro

# macro begin_tiles()
{{ matrix.accumulator("d_q", "k") }}
# if slope_rows
# for r in range(lane_rows)
  var d_slope_{{ r }} = 0.0;
# endfor
# endif
# if units
{{ unit.restart() }}
# endif
{{ columns.put_columns() }}
# endmacro

# macro scores()
    // S = Q K^T.
{{ fallback.clean_columns(staged) }}
{{ columns.fetch_next() }}
{{ score.fetch_bias("bias") }}
{{ matrix.product("s", "q", "k", "stage") }}
# endmacro

# macro probability_gradients()
    // dP = dO V^T.
{{ matrix.product("d_p", "d_o", "v", "stage") }}
# endmacro

{#- dP - delta, in the unit of d_q. -#}
{%- macro in_unit(r, n) -%}
{%- if multiplies_bf16 -%}
  (y_{{ r }}_{{ n }} - vec4<f32>(delta_{{ r }}))
{%- else -%}
  fma(y_{{ r }}_{{ n }}, vec4<f32>(d_q_unit_{{ r }}{{ matrix.inverse("d_o", r) }}), vec4<f32>(-delta_{{ r }} * d_q_unit_{{ r }}))
{%- endif -%}
{%- endmacro -%}

{#- dS = exp(S - lse) (dP - delta), in the unit of d_q. Unless the tile belongs to the walk, it `counts` for the gradient by the slopes. -#}
# macro make_d_s(counts, masked)
{{ score.begin_scores() }}
{{ matrix.rows_of("x", "s", 0) }}
{{ score.make_scores("x", "derivative", masked, joins_bias) }}
{{ matrix.rows_of("y", "d_p", 1) }}
# for r in range(lane_rows)
# for n in range(lane_quads)
# set x = "x_" ~ r ~ "_" ~ n
# set joined = score.joined_exponential(x, "bias_" ~ r ~ "_" ~ n, "vec4<f32>(-shift_" ~ r ~ ")", r)
    var d_s_{{ r }}_{{ n }} = {{ joined if joins_bias else score.exponential(x, "shift_" ~ r, r) }} * {{ in_unit(r, n) }};
# endfor
# endfor
# if softcap and not (slope_rows and counts)
# for r, n in pairs(lane_rows, lane_quads)
    d_s_{{ r }}_{{ n }} *= derivative_{{ r }}_{{ n }};
# endfor
# endif
{{ masking.hide("d_s", "0.0", masked) }}
# if slope_rows and counts
# for r, n in pairs(lane_rows, lane_quads)
    {
      let terms = d_s_{{ r }}_{{ n }} * distance4(seq, row_{{ r }}, {{ matrix.quad_column(n) }});
      d_slope_{{ r }} += (terms.x + terms.y) + (terms.z + terms.w);
    }
# endfor
# endif
# if softcap and slope_rows and counts
# for r, n in pairs(lane_rows, lane_quads)
    d_s_{{ r }}_{{ n }} *= derivative_{{ r }}_{{ n }};
# endfor
# endif
# if column_scales
# for r, n in pairs(lane_rows, lane_quads)
    d_s_{{ r }}_{{ n }} *= {{ matrix.column_inverse(n, 0) }};
# endfor
# endif
# endmacro

# macro score_gradients(masked)
    // dS, stored as the P tile.
{{ make_d_s(true, masked) }}
{{ unit.keep_in_unit("d_s", "d_q", "k", ["d_slope"] if slope_rows else []) }}
{{ fallback.find_fallback(masked) }}
# endmacro

# macro accumulate()
    // dQ += dS K.
{{ matrix.accumulate("d_q", "d_s", "k", "stage") }}
{{ columns.next_stage() }}
# endmacro

# macro finish()
# for r in range(lane_rows)
  let factor_{{ r }} = params.scale{{ " / d_q_unit_" ~ r if not multiplies_bf16 }};
# endfor
{{ matrix.store("d_q", "d_q", "factor_") }}
# if slope_rows
# for r in range(lane_rows)
{{ matrix.reduce_row("d_slope_" ~ r, "sum") }}
  if (row_{{ r }} < row_limit && lane_column == 0u) {
    let total = d_slope_{{ r }}{{ " / d_q_unit_" ~ r if not multiplies_bf16 }};
    fallback_{{ r }} = fallback_{{ r }} || !is_finite4(vec4<f32>(total));
    d_slope_rows[slope_rows_base + row_{{ r }}] = total;
  }
# endfor
# endif
{{ fallback.report_fallback() }}
# endmacro
