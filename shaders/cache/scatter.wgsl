{#- Gradients by gathered keys and values into the cache's layout. A workgroup writes one run of rows of one key head, each the
    sum of the rows that stand for it in all sequences, in their order and in f32. -#}
{% include "params.wgsl" %}
# from "entry.wgsl" import main
{% if dtype != "f32" %}
{% include dtype ~ ".wgsl" %}
{% endif %}

const THREADS: u32 = {{ threads }}u;

# call main()
  // A run: its block, first row there, rows, and where its terms begin and end; a term is the first row that adds to it.
  let run = index / params.kv_heads * 5u;
  let head = index % params.kv_heads;
  let destination = (tokens[run] * params.kv_heads + head) * params.block_rows + tokens[run + 1u];
  let rows = tokens[run + 2u];
  let first = tokens[run + 3u];
  let end = tokens[run + 4u];
{% for name, cache in [("k", "keys"), ("v", "values")] %}
{% set vectors = gathered_vectors[name] %}
  for (var n = thread; n < rows * {{ vectors }}u; n += THREADS) {
{% for part in range(1 if dtype == "f32" else 2) %}
    var sum{{ part }} = vec4<f32>();
{% endfor %}
    for (var term = first; term < end; term++) {
      let x = gathered_{{ cache }}[(head * params.gathered_rows + tokens[term]) * {{ vectors }}u + n];
{% if dtype == "f32" %}
      sum0 += bitcast<vec4<f32>>(x);
{% else %}
      sum0 += vec4<f32>(widen2(x.x), widen2(x.y));
      sum1 += vec4<f32>(widen2(x.z), widen2(x.w));
{% endif %}
    }
{% if dtype == "f32" %}
    let x = bitcast<vec4<u32>>(sum0);
{% else %}
    let low = narrow4(sum0);
    let high = narrow4(sum1);
    let x = vec4<u32>(low.xz | (low.yw << vec2<u32>(16u)), high.xz | (high.yw << vec2<u32>(16u)));
{% endif %}
    {{ cache }}[destination * {{ vectors }}u + n] = x;
  }
{% endfor %}
# endcall
