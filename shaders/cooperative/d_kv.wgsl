{#- The gradients by k and v on fragments: rows are keys, columns are queries.
    Needs: the cooperative macros, probability.wgsl, `main` of tile_main.wgsl. Declares: the macros that d_kv.wgsl calls. -#}
# import "cooperative/fragments.wgsl" as matrix
# import "cooperative/mask.wgsl" as masking
# import "cooperative/columns.wgsl" as columns
# import "cooperative/scores.wgsl" as score
# import "cooperative/units.wgsl" as unit
# import "cooperative/fallback.wgsl" as fallback

{%- macro declare() %}{{ matrix.declare() }}{% endmacro -%}

# macro begin()
{{ matrix.begin() }}
{{ matrix.resident("k") }}
{{ matrix.resident("v") }}
{{ unit.begin_units() }}
{{ columns.begin_columns() }}
{{ matrix.row_scales("k") }}
# endmacro

{%- macro begin_walk() %}{{ unit.begin_walk() }}{% endmacro -%}

{#- A tile of the walk: P and dS set the units of rows that wait for one. -#}
# macro find_units()
{{ columns.put_columns() }}
{{ matrix.product("s", "k", "q", "stage") }}
{{ make_p("some") }}
# if column_scales
{{ unit.set_units("w", "d_v") }}
# endif
{{ cap_probabilities() }}
{{ matrix.product("d_p", "v", "d_o", "stage") }}
{{ make_d_s() }}
{{ unit.set_units("d_s", "d_k") }}
{{ unit.next_units() }}
# endmacro

# macro begin_tiles()
{{ matrix.accumulator("d_k", "q") }}
{{ matrix.accumulator("d_v", "d_o") }}
# endmacro

{#- The first tile of a head. -#}
# macro begin_head()
{{ columns.fetch_first() }}
{{ columns.put_columns() }}
# endmacro

# macro scores()
    // S = K Q^T.
{{ fallback.clean_columns(staged) }}
{{ columns.fetch_next() }}
{{ matrix.product("s", "k", "q", "stage") }}
# endmacro

{#- P = exp(S - lse) times 2^15, which is within the range of f16 and keeps small probabilities; bf16 has the range of P. With token scales also w: P without the token
    scales of d_o, in the unit of d_v. -#}
# macro make_p(masked)
{{ score.begin_scores() }}
{{ matrix.rows_of("x", "s", 0) }}
{{ score.make_scores("x", "derivative", masked, joins_bias) }}
{{ score.fetch_bias("bias") }}
# for r, n in pairs(lane_rows, lane_quads)
# if joins_bias
    var p_{{ r }}_{{ n }} = {{ score.joined_exponential("x_" ~ r ~ "_" ~ n, "bias_" ~ r ~ "_" ~ n, matrix.column_stat(n, 0), r) }};
# elif formed
    var p_{{ r }}_{{ n }} = exp2(x_{{ r }}_{{ n }} + {{ matrix.column_stat(n, 0) }});
# else
    var p_{{ r }}_{{ n }} = exp2(fma(x_{{ r }}_{{ n }}, vec4<f32>({{ matrix.score_scale(r) }}), {{ matrix.column_stat(n, 0) }}));
# endif
# endfor
# if bias and not joins_bias
    // A key that the bias hides keeps probability 0, although the lse of a reported query makes its score NaN.
# for r, n in pairs(lane_rows, lane_quads)
    p_{{ r }}_{{ n }} = select(p_{{ r }}_{{ n }}, vec4<f32>(), bitcast<vec4<u32>>(x_{{ r }}_{{ n }}) == vec4<u32>(0xff800000u));
# endfor
# endif
{#- The derivative is hidden together with P. It is computed before, because its ingredients would take more registers. -#}
{{ masking.hide("p", "0.0", masked, "derivative" if softcap else "") }}
# if column_scales
# for r, n in pairs(lane_rows, lane_quads)
    var w_{{ r }}_{{ n }} = p_{{ r }}_{{ n }} * {{ matrix.column_inverse(n, 1) }} * d_v_unit_{{ r }};
# endfor
# endif
# endmacro

# macro probabilities(masked)
    // P, stored as the P tile and kept in registers.
{{ make_p(masked) }}
# if column_scales
{{ unit.keep_in_unit("w", "d_v", "d_o") }}
# else
{{ matrix.store_p("p") }}
# endif
{{ cap_probabilities() }}
# endmacro

# macro cap_probabilities()
# if softcap
    // dS needs P times the derivative of softcap.
# for r, n in pairs(lane_rows, lane_quads)
    p_{{ r }}_{{ n }} *= derivative_{{ r }}_{{ n }};
# endfor
# endif
# endmacro

# macro accumulate_d_v()
    // dV += P dO.
{{ matrix.accumulate("d_v", "w" if column_scales else "p", "d_o", "stage") }}
# endmacro

# macro probability_gradients()
    // dP = V dO^T.
{{ columns.put_scales() }}
{{ matrix.product("d_p", "v", "d_o", "stage") }}
# endmacro

{#- dS = P (dP - delta), in the unit of d_k. -#}
# macro make_d_s()
{{ matrix.rows_of("y", "d_p", 1) }}
# for r in range(lane_rows)
# for n in range(lane_quads)
# if column_scales
    var d_s_{{ r }}_{{ n }} = p_{{ r }}_{{ n }} * d_k_unit_{{ r }} * fma(y_{{ r }}_{{ n }}, vec4<f32>(v_inverse_{{ r }}), {{ matrix.column_stat(n, 1) }});
# else
    var d_s_{{ r }}_{{ n }} = p_{{ r }}_{{ n }}{{ " * d_k_unit_" ~ r if not multiplies_bf16 }} * (y_{{ r }}_{{ n }} + {{ matrix.column_stat(n, 1) }});
# endif
# endfor
# endfor
# if sanitize
    // The delta of a query that sees a nonfinite key may not be finite.
# for r, n in pairs(lane_rows, lane_quads)
    d_s_{{ r }}_{{ n }} = select(d_s_{{ r }}_{{ n }}, vec4<f32>(), p_{{ r }}_{{ n }} == vec4<f32>());
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
{{ make_d_s() }}
{{ unit.keep_in_unit("d_s", "d_k", "q") }}
{{ fallback.find_fallback(masked) }}
# endmacro

# macro accumulate_d_k()
    // dK += dS Q.
{{ matrix.accumulate("d_k", "d_s", "q", "stage") }}
{{ columns.next_stage() }}
# endmacro

# macro finish()
# for r in range(lane_rows)
  let d_k_factor_{{ r }} = params.scale * {{ 1 / 2 ** p_exponent }}{{ " / d_k_unit_" ~ r if not multiplies_bf16 }};
  let d_v_factor_{{ r }} = {{ 1 / 2 ** p_exponent }}{{ " / d_v_unit_" ~ r if column_scales }};
# endfor
{{ matrix.store("d_k", "d_k", "d_k_factor_") }}
{{ matrix.store("d_v", "d_v", "d_v_factor_") }}
{{ fallback.report_fallback() }}
# endmacro
