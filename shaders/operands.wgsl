// Four neighbours of a row, zero beyond the width. With vec4 loads the width is a multiple of four.
{% for name, width in [("q", "HEAD_DIM"), ("k", "HEAD_DIM"), ("v", "VALUE_DIM")] %}
fn load_{{ name }}(base: u32, column: u32) -> vec4<f32> {
{% if vec4 %}
  return {{ name }}[base + column];
{% else %}
  let at = base + column * 4u;
  var x = vec4<f32>({{ name }}[at], 0.0, 0.0, 0.0);
  if (column * 4u + 1u < {{ width }}) { x.y = {{ name }}[at + 1u]; }
  if (column * 4u + 2u < {{ width }}) { x.z = {{ name }}[at + 2u]; }
  if (column * 4u + 3u < {{ width }}) { x.w = {{ name }}[at + 3u]; }
  return x;
{% endif %}
}
{% endfor %}

fn store_o(base: u32, column: u32, x: vec4<f32>) {
{% if vec4 %}
  o[base + column] = x;
{% else %}
  let at = base + column * 4u;
  o[at] = x.x;
  if (column * 4u + 1u < VALUE_DIM) { o[at + 1u] = x.y; }
  if (column * 4u + 2u < VALUE_DIM) { o[at + 2u] = x.z; }
  if (column * 4u + 3u < VALUE_DIM) { o[at + 3u] = x.w; }
{% endif %}
}
