{#- The largest finite size of each operand, in parts: the first of two steps to their ranges. -#}
{% include "params.wgsl" %}
{% include "operands.wgsl" %}

const THREADS: u32 = {{ threads }}u;
const ROWS: u32 = {{ maxima_rows }}u;
const PARTS: u32 = {{ maxima_parts }}u;
var<workgroup> partials: array<f32, {{ threads }}>;

{% include "main.wgsl" %}
  var most = 0.0;
  var slot = 0u;
{% for operand in loads %}
  if (index / PARTS == {{ loop.index0 }}u) {
{% set of_keys = operand.name in ["k", "v"] %}
    let group = {{ "1u" if of_keys else "params.heads / params.kv_heads" }};
    let heads = params.region_heads * group;
    let end = min((params.region_tile + params.region_tiles) * ROWS, params.{{ "seq_k" if of_keys else "seq_q" }});
    // Of the shorter side there may be nothing.
    let first = min(params.region_tile * ROWS, end);
    let seq = end - first;
    slot = {{ range_slots[operand.name] }}u;
    let quads = params.region_batches * heads * seq * {{ operand_quads[operand.name] }}u;
    for (var item = index % PARTS * THREADS + thread; item < quads; item += PARTS * THREADS) {
      let row = item / {{ operand_quads[operand.name] }}u;
{% if lengths %}
      // What lies beyond the end of a padded sequence is of any size.
      if (first + row % seq >= sequences[(params.region_batch + row / seq / heads) * {{ sequence_words }}u + {{ 6 if of_keys else 3 }}u]) { continue; }
{% endif %}
      let base = operand_base(params.{{ operand.name }}, params.region_batch + row / seq / heads, params.region_head * group + row / seq % heads)
        + (first + row % seq) * params.{{ operand.name }}.seq;
      let size = abs(load_{{ operand.name }}(base, item % {{ operand_quads[operand.name] }}u));
      let finite = select(vec4<f32>(), size, (bitcast<vec4<u32>>(size) & vec4<u32>(0x7f800000u)) < vec4<u32>(0x7f800000u));
      most = max(most, max(max(finite.x, finite.y), max(finite.z, finite.w)));
    }
  }
{% endfor %}
  partials[thread] = most;
  workgroupBarrier();
  for (var half = THREADS / 2u; half > 0u; half /= 2u) {
    if (thread < half) { partials[thread] = max(partials[thread], partials[thread + half]); }
    workgroupBarrier();
  }
  if (thread == 0u) {
    let place = slot * PARTS + index % PARTS;
    if (params.continues != 0u) { partials[0] = max(partials[0], maxima[place]); }
    maxima[place] = partials[0];
  }
}
