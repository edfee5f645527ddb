// Four neighbours of a row, zero beyond the width. With vec4 loads the width is a multiple of four.
{% for operand in loads %}

fn load_{{ operand.name }}(base: u32, quad: u32) -> vec4<f32> {
{% if vec4 %}
  return {{ operand.name }}[base + quad];
{% else %}
  let at = base + quad * 4u;
  var x = vec4<f32>({{ operand.name }}[at], 0.0, 0.0, 0.0);
{% for e in range(1, 4) %}
  if (quad * 4u + {{ e }}u < {{ operand.width }}u) { x.{{ xyzw[e] }} = {{ operand.name }}[at + {{ e }}u]; }
{% endfor %}
  return x;
{% endif %}
}
{% endfor %}
{% for operand in stores %}

fn store_{{ operand.name }}(base: u32, quad: u32, x: vec4<f32>) {
{% if vec4 %}
  {{ operand.name }}[base + quad] = x;
{% else %}
  let at = base + quad * 4u;
  {{ operand.name }}[at] = x.x;
{% for e in range(1, 4) %}
  if (quad * 4u + {{ e }}u < {{ operand.width }}u) { {{ operand.name }}[at + {{ e }}u] = x.{{ xyzw[e] }}; }
{% endfor %}
{% endif %}
}
{% endfor %}
