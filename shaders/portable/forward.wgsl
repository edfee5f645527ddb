{#- The forward pass in portable blocks: rows are queries, columns are keys. -#}
{% import "portable/blocks.wgsl" as blocks %}

{%- macro declare() %}{{ blocks.declare() }}{% endmacro -%}

{%- macro begin() %}
{{ blocks.begin() }}
{% for i in range(rows) %}
  var max_{{ i }} = LOWEST;
  var sum_{{ i }} = 0.0;
{% endfor %}
{{ blocks.accumulator("o", "v") }}
{% endmacro -%}

{%- macro scores() %}{{ blocks.product("s", "q", "k") }}{% endmacro -%}

{#- Online softmax: updates each row's maximum and sum, rescales the output, leaves the probabilities
    as weights. -#}
{%- macro softmax() %}
    if (masked) {
{% for i in range(rows) %}{% for c in range(quads) %}
      s_{{ i }}_{{ c }} = select(vec4<f32>(LOWEST), s_{{ i }}_{{ c }}, visible4(row_{{ i }}, column0 + 4u * (tx + {{ c }}u * THREADS_C)));
{% endfor %}{% endfor %}
    }
{% for i in range(rows) %}
    var most_{{ i }} = 0.0;
    {
      var most = s_{{ i }}_0;
{% for c in range(1, quads) %}
      most = max(most, s_{{ i }}_{{ c }});
{% endfor %}
      most_{{ i }} = max(max(most.x, most.y), max(most.z, most.w));
    }
{% endfor %}
{{ blocks.reduce_rows("row_most", "most", "max") }}
{% for i in range(rows) %}
    {
      let before = max_{{ i }};
      max_{{ i }} = max(before, row_most_{{ i }});
      // A row that has seen nothing yet must give exp2(LOWEST - 0) = 0, not exp2(0).
      let shift = select(max_{{ i }}, 0.0, max_{{ i }} == LOWEST);
      let rescale = exp2(before - max_{{ i }});
{% for c in range(accumulator_quads.v) %}
      o_{{ i }}_{{ c }} *= rescale;
{% endfor %}
      var total = vec4<f32>();
{% for c in range(quads) %}
      s_{{ i }}_{{ c }} = exp2(s_{{ i }}_{{ c }} - shift);
      total += s_{{ i }}_{{ c }};
{% endfor %}
      sum_{{ i }} = fma(sum_{{ i }}, rescale, (total.x + total.y) + (total.z + total.w));
    }
{% endfor %}
{{ blocks.keep_weights("s") }}
{% endmacro -%}

{%- macro accumulate() %}{{ blocks.accumulate("o", "v") }}{% endmacro -%}

{#- Sums the rows' denominators, adds the sink logit once, and writes o and lse. -#}
{%- macro finish() %}
  workgroupBarrier();
{{ blocks.reduce_rows("total", "sum", "sum") }}
{% for i in range(rows) %}
  let end_{{ i }} = finish_row(max_{{ i }}, total_{{ i }}, head);
  let factor_{{ i }} = end_{{ i }}.factor;
  if (row_{{ i }} < row_limit && tx == 0u) { lse[lse_base + row_{{ i }}] = end_{{ i }}.lse; }
{% endfor %}
{{ blocks.store("o", "o", "factor_") }}
{% endmacro -%}
