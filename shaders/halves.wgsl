{#- Four neighbours of a row as halves, for fragments; zero beyond the width. f16 operands are bound as what they are. -#}
{% for operand in loads %}

fn half_{{ operand.name }}(base: u32, quad: u32, factor: f32) -> vec4<f16> {
{% if dtype != "f16" %}
  return vec4<f16>(load_{{ operand.name }}(base, quad) * factor);
{% elif vec4 %}
  return {{ operand.name }}[base + quad] * f16(factor);
{% else %}
  let at = base + quad * 4u;
  var x = vec4<f16>({{ operand.name }}[at], 0.0h, 0.0h, 0.0h);
{% for e in range(1, 4) %}
  if (quad * 4u + {{ e }}u < {{ operand.width }}u) { x.{{ xyzw[e] }} = {{ operand.name }}[at + {{ e }}u]; }
{% endfor %}
  return x * f16(factor);
{% endif %}
}
{% endfor %}
