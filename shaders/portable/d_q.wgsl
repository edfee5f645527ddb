{#- The gradient by q in portable blocks: rows are queries, columns are keys. -#}
{% import "portable/blocks.wgsl" as blocks %}

{%- macro declare() %}{{ blocks.declare() }}{% endmacro -%}

{%- macro begin() %}
{{ blocks.begin() }}
{% for i in range(rows) %}
  var lse_{{ i }} = 0.0;
  var delta_{{ i }} = 0.0;
{% if writes_delta %}
  var total_{{ i }} = 0.0;
{% endif %}
  if (row_{{ i }} < row_limit) {
    lse_{{ i }} = probability_lse(lse[lse_base + row_{{ i }}]);
    delta_{{ i }} = delta[delta_base + row_{{ i }}];
  }
{% endfor %}
{{ blocks.accumulator("d_q", "k") }}
{% endmacro -%}

{%- macro scores() %}{{ blocks.product("s", "q", "k") }}{% endmacro -%}

{%- macro probability_gradients() %}{{ blocks.product("d_p", "d_o", "v") }}{% endmacro -%}

{#- Leaves d_s = p (d_p - delta) as weights; sums p d_p where that is to become delta. -#}
{%- macro score_gradients() %}
{% if writes_delta %}
{% for i in range(rows) %}{% for c in range(quads) %}
    {
      let p = exp4(fma(s_{{ i }}_{{ c }}, vec4<f32>(params.scale), vec4<f32>(-lse_{{ i }})));
      s_{{ i }}_{{ c }} = p * (d_p_{{ i }}_{{ c }} - delta_{{ i }});
      d_p_{{ i }}_{{ c }} = p * d_p_{{ i }}_{{ c }};
    }
{% endfor %}{% endfor %}
{{ blocks.hide("d_p") }}
{% for i in range(rows) %}
    {
      var total = d_p_{{ i }}_0;
{% for c in range(1, quads) %}
      total += d_p_{{ i }}_{{ c }};
{% endfor %}
      total_{{ i }} += (total.x + total.y) + (total.z + total.w);
    }
{% endfor %}
{% else %}
{% for i in range(rows) %}{% for c in range(quads) %}
    s_{{ i }}_{{ c }} = exp4(fma(s_{{ i }}_{{ c }}, vec4<f32>(params.scale), vec4<f32>(-lse_{{ i }}))) * (d_p_{{ i }}_{{ c }} - delta_{{ i }});
{% endfor %}{% endfor %}
{% endif %}
{{ blocks.hide("s") }}
    workgroupBarrier();
{{ blocks.keep_weights("s") }}
{% endmacro -%}

{%- macro accumulate() %}{{ blocks.accumulate("d_q", "k") }}{% endmacro -%}

{%- macro finish() %}
{{ blocks.store("d_q", "d_q", "params.scale") }}
{% if writes_delta %}
{{ blocks.sum_rows("row_total", "total") }}
{% for i in range(rows) %}
  if (row_{{ i }} < row_limit && tx == 0u) { write_delta(delta_base + row_{{ i }}, row_total_{{ i }}); }
{% endfor %}
{% endif %}
{% endmacro -%}
