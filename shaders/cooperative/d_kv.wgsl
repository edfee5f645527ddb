{#- The gradients by k and v on fragments: rows are keys, columns are queries. -#}
{% import "cooperative/blocks.wgsl" as blocks %}

{%- macro declare() %}{{ blocks.declare() }}{% endmacro -%}

{%- macro begin() %}
{{ blocks.begin() }}
{{ blocks.d_s_range() }}
{{ blocks.resident("k", blocks.factor("k")) }}
{{ blocks.resident("v", blocks.factor("v")) }}
{{ blocks.accumulator("d_k", "q") }}
{{ blocks.accumulator("d_v", "d_o") }}
{{ blocks.begin_columns() }}
{% endmacro -%}

{#- The first tile of a head. -#}
{%- macro begin_head() %}
{{ blocks.first_columns() }}
{% endmacro -%}

{%- macro scores() %}
{{ blocks.fetch_next() }}
{{ blocks.product("s", "k", "q", "stage") }}
{% endmacro -%}

{#- Leaves p as weights, up to 2^15: that is within the range of halves, and a small p is not rounded away. -#}
{%- macro probabilities() %}
{{ blocks.begin_scores() }}
{% for r in range(row_fragments) %}
{{ blocks.park("s", r) }}
{{ blocks.take("x", r) }}
{% endfor %}
{{ blocks.make_scores("x", "derivative") }}
    let statistic_at = stage * {{ tile_columns // 2 }}u + part;
{% for r in range(row_fragments) %}{% for n in range(lane_quads) %}
    var p_{{ r }}_{{ n }} = exp2({% if formed %}x_{{ r }}_{{ n }} + {{ blocks.statistic(n, 0) }}{% else %}fma(x_{{ r }}_{{ n }}, vec4<f32>(scale), {{ blocks.statistic(n, 0) }}){% endif %});
{% endfor %}{% endfor %}
{#- Hidden by name, too, the derivative is computed before: what it is made of would take more registers. -#}
{{ blocks.hide("p", "0.0", "derivative" if softcap else "") }}
{{ blocks.keep_weights("p") }}
{% if softcap %}
    // What d_s needs of p.
{% for r in range(row_fragments) %}{% for n in range(lane_quads) %}
    p_{{ r }}_{{ n }} *= derivative_{{ r }}_{{ n }};
{% endfor %}{% endfor %}
{% endif %}
{% endmacro -%}

{%- macro accumulate_d_v() %}{{ blocks.accumulate("d_v", "d_o", "stage") }}{% endmacro -%}

{%- macro probability_gradients() %}
{{ blocks.product("d_p", "v", "d_o", "stage") }}
{% endmacro -%}

{#- Leaves d_s = p (d_p - delta) as weights, within the range of halves. -#}
{%- macro score_gradients() %}
{% for r in range(row_fragments) %}
{{ blocks.park("d_p", r) }}
{{ blocks.take("y", r) }}
{% for n in range(lane_quads) %}
    let d_s_{{ r }}_{{ n }} = p_{{ r }}_{{ n }} * fma(y_{{ r }}_{{ n }}, vec4<f32>(d_p_range), {{ blocks.statistic(n, 1) }});
{% endfor %}
{% endfor %}
{{ blocks.keep_weights("d_s") }}
{% endmacro -%}

{%- macro accumulate_d_k() %}
{{ blocks.accumulate("d_k", "q", "stage") }}
{{ blocks.next_stage() }}
{% endmacro -%}

{%- macro finish() %}
  let d_k_factor = {{ blocks.d_s_inverse("q") }};
  let d_v_factor = {{ 1 / 32768 }} * {{ blocks.inverse("d_o") }};
{{ blocks.store("d_k", "d_k", "d_k_factor") }}
{{ blocks.store("d_v", "d_v", "d_v_factor") }}
{{ blocks.report() }}
{% endmacro -%}
