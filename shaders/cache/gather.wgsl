{#- Rows of chosen sequences, wherever the cache has them, one after the other: what the ordinary passes take. A workgroup copies
    one run of rows of one key head; where they are quantised they become the element type's. -#}
{% include "params.wgsl" %}
# from "entry.wgsl" import main
{% if quantised %}
{% if dtype != "f32" %}
{% include dtype ~ ".wgsl" %}

{% endif %}
{% include "cache/scales.wgsl" %}
{% for name, cache in [("k", "keys"), ("v", "values")] %}

// Four numbers of a row that begins at a word.
fn quad_{{ name }}(row: u32, quad: u32) -> vec4<f32> {
  // Two scales in a word, one for eight quads.
  let scales = {{ cache }}[row + {{ data_quads[name] }}u + quad / 16u];
  let scale = widen_scale(select(scales & 0xffffu, scales >> 16u, (quad & 8u) != 0u));
  return quad_of_bytes({{ cache }}[row + quad]) * scale;
}
{% endfor %}
{% endif %}

const THREADS: u32 = {{ threads }}u;

# call main()
  // A run: its block (where pages are, the place of its number in the table), first row there, first row here, and rows.
  let run = index / params.kv_heads * 4u;
  let head = index % params.kv_heads;
  let block = {{ "state[tokens[run]]" if paged else "tokens[run]" }};
  let source = (block * params.kv_heads + head) * params.block_rows + tokens[run + 1u];
  let destination = head * params.gathered_rows + tokens[run + 2u];
  let rows = tokens[run + 3u];
{% for name, cache in [("k", "keys"), ("v", "values")] %}
{% set vectors = gathered_vectors[name] %}
  for (var n = thread; n < rows * {{ vectors }}u; n += THREADS) {
{% if quantised %}
    let row = (source + n / {{ vectors }}u) * {{ row_vectors[name] * 4 }}u;
    let vector = n % {{ vectors }}u;
{% if dtype == "f32" %}
    let x = bitcast<vec4<u32>>(quad_{{ name }}(row, vector));
{% else %}
    let low = narrow4(quad_{{ name }}(row, 2u * vector));
    let high = narrow4(quad_{{ name }}(row, 2u * vector + 1u));
    let x = vec4<u32>(low.xz | (low.yw << vec2<u32>(16u)), high.xz | (high.yw << vec2<u32>(16u)));
{% endif %}
{% else %}
    let x = {{ cache }}[source * {{ vectors }}u + n];
{% endif %}
    gathered_{{ cache }}[destination * {{ vectors }}u + n] = x;
  }
{% endfor %}
# endcall
