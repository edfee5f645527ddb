{#- The gradient by q on fragments: rows are queries, columns are keys. -#}
# import "cooperative/blocks.wgsl" as blocks

{%- macro declare() %}{{ blocks.declare() }}{% endmacro -%}

# macro begin()
{{ blocks.begin() }}
{{ blocks.begin_columns() }}
# if units
{{ blocks.begin_walk() }}
# else
{{ blocks.fetch_first() }}
# endif
{{ blocks.resident("q") }}
{{ blocks.resident("d_o") }}
{{ blocks.row_scales("q") }}
{{ blocks.begin_units() }}
{{ blocks.row_stats() }}
# endmacro

# macro find_units()
{{ blocks.put_columns() }}
{{ blocks.product("s", "q", "k", "stage") }}
{{ blocks.product("d_p", "d_o", "v", "stage") }}
{{ weigh(false) }}
{{ blocks.set_units("d_s", "d_q") }}
{{ blocks.next_units() }}
# endmacro

# macro begin_tiles()
{{ blocks.accumulator("d_q", "k") }}
# if moments
# for r in range(row_fragments)
  var moment_{{ r }} = 0.0;
# endfor
# endif
# if units
{{ blocks.restart() }}
# endif
{{ blocks.put_columns() }}
# endmacro

# macro scores()
{{ blocks.clean_columns() }}
{{ blocks.fetch_next() }}
{{ blocks.product("s", "q", "k", "stage") }}
# endmacro

# macro probability_gradients()
{{ blocks.product("d_p", "d_o", "v", "stage") }}
# endmacro

{#- d_s = p (d_p - delta), in the unit of d_q; the moments, too, where this `counts`. -#}
# macro weigh(counts)
{{ blocks.begin_scores() }}
# for r in range(row_fragments)
{{ blocks.store_rows("s", r) }}
{{ blocks.load_rows("x", r, 0) }}
# endfor
{{ blocks.make_scores("x", "derivative") }}
# for r in range(row_fragments)
{{ blocks.store_rows("d_p", r) }}
{{ blocks.load_rows("y", r, 1) }}
# endfor
# for r in range(row_fragments)
# for n in range(lane_quads)
    var d_s_{{ r }}_{{ n }} = {{ blocks.exponential("x_" ~ r ~ "_" ~ n, "shift_" ~ r, r) }} * fma(y_{{ r }}_{{ n }}, vec4<f32>(d_q_unit_{{ r }}{{ blocks.inverse("d_o", r) }}), vec4<f32>(-delta_{{ r }} * d_q_unit_{{ r }}));
# endfor
# endfor
# if softcap and not (moments and counts)
# for r, n in pairs(row_fragments, lane_quads)
    d_s_{{ r }}_{{ n }} *= derivative_{{ r }}_{{ n }};
# endfor
# endif
{{ blocks.hide("d_s", "0.0") }}
# if moments and counts
# for r, n in pairs(row_fragments, lane_quads)
    {
      let moment = d_s_{{ r }}_{{ n }} * distance4(row_{{ r }}, {{ blocks.quad_column(n) }});
      moment_{{ r }} += (moment.x + moment.y) + (moment.z + moment.w);
    }
# endfor
# endif
# if softcap and moments and counts
# for r, n in pairs(row_fragments, lane_quads)
    d_s_{{ r }}_{{ n }} *= derivative_{{ r }}_{{ n }};
# endfor
# endif
# if column_scales
# for r, n in pairs(row_fragments, lane_quads)
    d_s_{{ r }}_{{ n }} *= {{ blocks.column_inverse(n, 0) }};
# endfor
# endif
# endmacro

{#- Leaves d_s as weights. -#}
# macro score_gradients()
{{ weigh(true) }}
{{ blocks.keep_in_unit("d_s", "d_q", "k", ["moment"] if moments else []) }}
{{ blocks.find_fallback() }}
# endmacro

# macro accumulate()
{{ blocks.accumulate("d_q", "k", "stage") }}
{{ blocks.next_stage() }}
# endmacro

# macro finish()
# for r in range(row_fragments)
  let factor_{{ r }} = params.scale / d_q_unit_{{ r }};
# endfor
{{ blocks.store("d_q", "d_q", "factor_") }}
# if moments
# for r in range(row_fragments)
{{ blocks.reduce_row("moment_" ~ r, "sum") }}
  if (row_{{ r }} < row_limit && part == 0u) {
    let total = moment_{{ r }} / d_q_unit_{{ r }};
    fallback_{{ r }} = fallback_{{ r }} || !is_finite4(vec4<f32>(total));
    alibi_moments[moments_base + row_{{ r }}] = total;
  }
# endfor
# endif
{{ blocks.report_fallback() }}
# endmacro
