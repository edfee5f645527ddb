{#- The gradients by k and v on fragments: rows are keys, columns are queries. -#}
# import "cooperative/blocks.wgsl" as blocks

{%- macro declare() %}{{ blocks.declare() }}{% endmacro -%}

# macro begin()
{{ blocks.begin() }}
{{ blocks.resident("k") }}
{{ blocks.resident("v") }}
{{ blocks.begin_units() }}
{{ blocks.begin_columns() }}
{{ blocks.row_scales("k") }}
# endmacro

{%- macro begin_walk() %}{{ blocks.begin_walk() }}{% endmacro -%}

# macro find_units()
{{ blocks.put_columns() }}
{{ blocks.product("s", "k", "q", "stage") }}
{{ weigh_values() }}
# if column_scales
{{ blocks.set_units("w", "d_v") }}
# endif
{{ cap_probabilities() }}
{{ blocks.product("d_p", "v", "d_o", "stage") }}
{{ weigh() }}
{{ blocks.set_units("d_s", "d_k") }}
{{ blocks.next_units() }}
# endmacro

# macro begin_tiles()
{{ blocks.accumulator("d_k", "q") }}
{{ blocks.accumulator("d_v", "d_o") }}
# endmacro

{#- The first tile of a head. -#}
# macro begin_head()
{{ blocks.fetch_first() }}
{{ blocks.put_columns() }}
# endmacro

# macro scores()
{{ blocks.clean_columns() }}
{{ blocks.fetch_next() }}
{{ blocks.product("s", "k", "q", "stage") }}
# endmacro

{#- p times 2^15: that is within the range of halves, and a small p is not rounded away. In bf16 also w, which takes the scale of d_o
    out, in the unit of d_v. -#}
# macro weigh_values()
{{ blocks.begin_scores() }}
# for r in range(row_fragments)
{{ blocks.store_rows("s", r) }}
{{ blocks.load_rows("x", r, 0) }}
# endfor
{{ blocks.make_scores("x", "derivative") }}
# for r, n in pairs(row_fragments, lane_quads)
    var p_{{ r }}_{{ n }} = exp2({% if formed %}x_{{ r }}_{{ n }} + {{ blocks.column_stat(n, 0) }}{% else %}fma(x_{{ r }}_{{ n }}, vec4<f32>({{ blocks.score_scale(r) }}), {{ blocks.column_stat(n, 0) }}){% endif %});
# endfor
# if bias
    // A key that the bias hides keeps weight 0, where the lse of a reported query makes its score a NaN.
# for r, n in pairs(row_fragments, lane_quads)
    p_{{ r }}_{{ n }} = select(p_{{ r }}_{{ n }}, vec4<f32>(), bitcast<vec4<u32>>(x_{{ r }}_{{ n }}) == vec4<u32>(0xff800000u));
# endfor
# endif
{#- Hidden by name, too, the derivative is computed before: what it is made of would take more registers. -#}
{{ blocks.hide("p", "0.0", "derivative" if softcap else "") }}
# if column_scales
# for r, n in pairs(row_fragments, lane_quads)
    var w_{{ r }}_{{ n }} = p_{{ r }}_{{ n }} * {{ blocks.column_inverse(n, 1) }} * d_v_unit_{{ r }};
# endfor
# endif
# endmacro

{#- Leaves p as weights. -#}
# macro probabilities()
{{ weigh_values() }}
# if column_scales
{{ blocks.keep_in_unit("w", "d_v", "d_o") }}
# else
{{ blocks.store_p("p") }}
# endif
{{ cap_probabilities() }}
# endmacro

# macro cap_probabilities()
# if softcap
    // What d_s needs of p.
# for r, n in pairs(row_fragments, lane_quads)
    p_{{ r }}_{{ n }} *= derivative_{{ r }}_{{ n }};
# endfor
# endif
# endmacro

{%- macro accumulate_d_v() %}{{ blocks.accumulate("d_v", "d_o", "stage") }}{% endmacro -%}

# macro probability_gradients()
{{ blocks.product("d_p", "v", "d_o", "stage") }}
# endmacro

{#- d_s = p (d_p - delta), in the unit of d_k. -#}
# macro weigh()
# for r in range(row_fragments)
{{ blocks.store_rows("d_p", r) }}
{{ blocks.load_rows("y", r, 1) }}
# for n in range(lane_quads)
# if column_scales
    var d_s_{{ r }}_{{ n }} = p_{{ r }}_{{ n }} * d_k_unit_{{ r }} * fma(y_{{ r }}_{{ n }}, vec4<f32>(v_inverse_{{ r }}), {{ blocks.column_stat(n, 1) }});
# else
    var d_s_{{ r }}_{{ n }} = p_{{ r }}_{{ n }} * d_k_unit_{{ r }} * (y_{{ r }}_{{ n }} + {{ blocks.column_stat(n, 1) }});
# endif
# endfor
# endfor
# if sanitize
    // A query's delta may not be finite, where what it sees is not.
# for r, n in pairs(row_fragments, lane_quads)
    d_s_{{ r }}_{{ n }} = select(d_s_{{ r }}_{{ n }}, vec4<f32>(), p_{{ r }}_{{ n }} == vec4<f32>());
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
{{ weigh() }}
{{ blocks.keep_in_unit("d_s", "d_k", "q") }}
{{ blocks.find_fallback() }}
# endmacro

# macro accumulate_d_k()
{{ blocks.accumulate("d_k", "q", "stage") }}
{{ blocks.next_stage() }}
# endmacro

# macro finish()
# for r in range(row_fragments)
  let d_k_factor_{{ r }} = params.scale * {{ 1 / 32768 }} / d_k_unit_{{ r }};
  let d_v_factor_{{ r }} = {{ 1 / 32768 }}{{ " / d_v_unit_" ~ r if column_scales }};
# endfor
{{ blocks.store("d_k", "d_k", "d_k_factor_") }}
{{ blocks.store("d_v", "d_v", "d_v_factor_") }}
{{ blocks.report_fallback() }}
# endmacro
