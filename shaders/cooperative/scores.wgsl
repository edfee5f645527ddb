# from "cooperative/fragments.wgsl" import product_scale, score_scale, quad_column
# from "cooperative/mask.wgsl" import hide

{#- exp of scores less a row's shift, in powers of two both. -#}
{%- macro exponential(x, shift, r) %}{% if formed %}exp2({{ x }} - vec4<f32>({{ shift }})){% else %}exp2(fma({{ x }}, vec4<f32>({{ score_scale(r) }}), vec4<f32>(-{{ shift }}))){% endif %}{% endmacro -%}

{#- Where ALiBi's distances of a tile have one sign, and what they are multiplied with. Elsewhere, and where the band leaves both
    signs visible, `make_scores` mends those of the other. -#}
# macro begin_scores()
# if alibi
    let slope2 = slope * LOG2_E;
# if rows_are_keys
    let before = i32(min(column0 + TILE_COLUMNS, column_limit)) - 1 + seq.offset <= i32(row0);
    let crosses = !before && i32(column0) + seq.offset < i32(row_end) - 1 && seq.upper > seq.offset;
# else
    let before = i32(column0) >= i32(row_end) - 1 + seq.offset;
    let crosses = !before && i32(column0 + TILE_COLUMNS) - 1 > i32(row0) + seq.offset && seq.upper > seq.offset;
# endif
    // The query comes before the key: p - j is negative.
    let lean = select(slope2, -slope2, before);
    let leans = vec4<f32>(0.0, 1.0, 2.0, 3.0) * {{ "-lean" if rows_are_keys else "lean" }};
# endif
# endmacro

{#- j - p of the first column of a lane's n-th quad. -#}
{%- macro ahead(r, n) %}f32({% if rows_are_keys %}i32(row_{{ r }}) - i32({{ quad_column(n) }}){% else %}i32({{ quad_column(n) }}) - i32(row_{{ r }}){% endif %} - seq.offset){% endmacro -%}

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
    {{ name }} = biased4({{ name }}, bias4(seq, row_{{ r }}, {{ quad_column(n) }}));
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
