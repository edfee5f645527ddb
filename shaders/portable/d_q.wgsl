{#- The gradient by q in portable blocks: rows are queries, columns are keys. -#}
{% import "portable/blocks.wgsl" as blocks %}

{%- macro declare() %}{{ blocks.declare() }}{% endmacro -%}

{%- macro begin() %}
{{ blocks.begin() }}
{% for i in range(rows) %}
  var lse_{{ i }} = 0.0;
  var delta_{{ i }} = 0.0;
  if (row_{{ i }} < row_limit) {
    lse_{{ i }} = probability_lse(lse[lse_base + row_{{ i }}]);
    delta_{{ i }} = delta[delta_base + row_{{ i }}];
  }
{% endfor %}
{{ blocks.accumulator("d_q", "k") }}
{% endmacro -%}

{%- macro scores() %}{{ blocks.product("s", "q", "k") }}{% endmacro -%}

{%- macro probability_gradients() %}{{ blocks.product("d_p", "d_o", "v") }}{% endmacro -%}

{#- Leaves d_s = p (d_p - delta) as weights. -#}
{%- macro score_gradients() %}
{% for i in range(rows) %}{% for c in range(quads) %}
    s_{{ i }}_{{ c }} = exp4(fma(s_{{ i }}_{{ c }}, vec4<f32>(params.scale), vec4<f32>(-lse_{{ i }}))) * (d_p_{{ i }}_{{ c }} - delta_{{ i }});
{% endfor %}{% endfor %}
{{ blocks.hide("s") }}
    workgroupBarrier();
{{ blocks.keep_weights("s") }}
{% endmacro -%}

{%- macro accumulate() %}{{ blocks.accumulate("d_q", "k") }}{% endmacro -%}

{%- macro finish() %}{{ blocks.store("d_q", "d_q", "params.scale") }}{% endmacro -%}
