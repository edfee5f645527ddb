{#- Scores of a tile in powers of two, and their exponentials.
    Needs: cooperative/fragments.wgsl, cooperative/mask.wgsl; with options alibi.wgsl, bias.wgsl, softcap.wgsl.
    Declares: the macros below; with ALiBi `slope2`, `signed_slope`, `column_slopes` and `both_signs`. -#}
# from "cooperative/fragments.wgsl" import product_scale, score_scale, quad_column
# from "cooperative/mask.wgsl" import hide

{#- exp(S - shift of the row), both in powers of two. -#}
{%- macro exponential(x, shift, r) %}{% if formed %}exp2({{ x }} - vec4<f32>({{ shift }})){% else %}exp2(fma({{ x }}, vec4<f32>({{ score_scale(r) }}), vec4<f32>(-{{ shift }}))){% endif %}{% endmacro -%}

{#- The same of a product and of the bias of its pair, where the exponential takes it in. -#}
{%- macro joined_exponential(x, bias, shift, r) %}exp2(fma({{ x }}, vec4<f32>(scale), fma(bias_of({{ bias }}), vec4<f32>(LOG2_E), {{ shift }}))){% endmacro -%}

{#- Loads the bias of a lane's pairs with the columns from `column` on, where the exponential takes it in. -#}
# macro fetch_bias(stem, column="column0")
# if joins_bias
# for r, n in pairs(lane_rows, lane_quads)
    let {{ stem }}_{{ r }}_{{ n }} = bias_quad(seq, row_{{ r }}, {{ column }} + {{ quad_offsets[n] }}u + lane_column);
# endfor
# endif
# endmacro

{#- The slope of ALiBi times the sign of p - j. Most tiles have one sign. In a tile with both, `make_scores` corrects the pairs of the
    other sign, where the band leaves them visible. -#}
# macro begin_scores()
# if alibi
    let slope2 = slope * LOG2_E;
# if rows_are_keys
    let before_keys = i32(min(column0 + TILE_COLUMNS, column_limit)) - 1 + seq.offset <= i32(row0);
    let both_signs = !before_keys && i32(column0) + seq.offset < i32(row_end) - 1 && seq.upper > seq.offset;
# else
    let before_keys = i32(column0) >= i32(row_end) - 1 + seq.offset;
    let both_signs = !before_keys && i32(column0 + TILE_COLUMNS) - 1 > i32(row0) + seq.offset && seq.upper > seq.offset;
# endif
    // A query before its key has a negative p - j.
    let signed_slope = select(slope2, -slope2, before_keys);
    let column_slopes = vec4<f32>({{ quad_steps | join(".0, ") }}.0) * {{ "-signed_slope" if rows_are_keys else "signed_slope" }};
# endif
# endmacro

{#- j - p of the first column of a lane's n-th quad. -#}
{%- macro distance(r, n) %}f32({% if rows_are_keys %}i32(row_{{ r }}) - i32({{ quad_column(n) }}){% else %}i32({{ quad_column(n) }}) - i32(row_{{ r }}){% endif %} - seq.offset){% endmacro -%}

{#- Turns products into scores. With ALiBi, bias or token scales they are `formed`, in powers of two. Otherwise the exponential applies
    the scale, or the cap of capped scores. With `joined` it also takes in the bias, and nothing is formed. `derivative` names the derivative
    of softcap, where it is needed. -#}
# macro make_scores(x, derivative, masked, joined=false)
# if softcap and not bias
{#- Two scores share a reciprocal, so hidden ones are replaced before. -#}
{{ hide(x, "0.0", masked, before="capped_") }}
# endif
# if (softcap or formed) and not joined
# for r, n in pairs(lane_rows, lane_quads)
# set name = x ~ "_" ~ r ~ "_" ~ n
# if softcap
    let e_{{ name }} = exp2(fma({{ name }}, vec4<f32>({{ product_scale(r) }}), vec4<f32>(-60.0)));
    {{ name }} = capped4(e_{{ name }});
# if derivative
    var {{ derivative }}_{{ r }}_{{ n }} = cap_derivative4({{ name }}, e_{{ name }});
# endif
# if alibi
    {{ name }} = fma({{ name }}, vec4<f32>(scale), vec4<f32>(fma(signed_slope, {{ distance(r, n) }}, cap)) + column_slopes);
# elif formed
    {{ name }} = fma({{ name }}, vec4<f32>(scale), vec4<f32>(cap));
# endif
# elif alibi
    {{ name }} = fma({{ name }}, vec4<f32>({{ product_scale(r) }}), vec4<f32>(signed_slope * {{ distance(r, n) }}) + column_slopes);
# else
    {{ name }} *= {{ product_scale(r) }};
# endif
# if joins_bias
    {{ name }} = fma(bias4(seq, row_{{ r }}, {{ quad_column(n) }}), vec4<f32>(LOG2_E), {{ name }});
# elif bias
    {{ name }} = biased4({{ name }}, bias4(seq, row_{{ r }}, {{ quad_column(n) }}));
# endif
# endfor
# if alibi
    var correct_{{ x }} = both_signs;
    loop {
      if (!correct_{{ x }}) { break; }
      correct_{{ x }} = false;
# for r, n in pairs(lane_rows, lane_quads)
      {{ x }}_{{ r }}_{{ n }} -= 2.0 * slope2 * max(vec4<f32>({{ distance(r, n) }}) {{ "-" if rows_are_keys else "+" }} vec4<f32>({{ quad_steps | join(".0, ") }}.0), vec4<f32>());
# endfor
    }
# endif
# endif
# endmacro
