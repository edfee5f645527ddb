{#- The largest finite size of each operand, in parts: the first of two steps to their ranges. -#}
{% include "params.wgsl" %}
{% include "operands.wgsl" %}

const THREADS: u32 = {{ threads }}u;
const PARTS: u32 = {{ maxima_parts }}u;
var<workgroup> partials: array<f32, {{ threads }}>;

@compute @workgroup_size({{ threads }})
fn main(
  @builtin(workgroup_id) workgroup: vec3<u32>,
  @builtin(num_workgroups) grid: vec3<u32>,
  @builtin(local_invocation_index) thread: u32,
) {
  let index = workgroup.x + workgroup.y * grid.x;
  if (index >= params.workgroups) { return; }
  var most = 0.0;
  var slot = 0u;
{% for operand in loads %}
  if (index / PARTS == {{ loop.index0 }}u) {
    let heads = params.{{ "kv_heads" if operand.name in ["k", "v"] else "heads" }};
    let seq = params.{{ "seq_k" if operand.name in ["k", "v"] else "seq_q" }};
    slot = {{ range_slots[operand.name] }}u;
    let quads = params.batch * heads * seq * {{ operand_quads[operand.name] }}u;
    for (var item = index % PARTS * THREADS + thread; item < quads; item += PARTS * THREADS) {
      let row = item / {{ operand_quads[operand.name] }}u;
{% if lengths %}
      // What lies beyond the end of a padded sequence is of any size.
      if (row % seq >= sequences[row / seq / heads * {{ sequence_words }}u + {{ 6 if operand.name in ["k", "v"] else 3 }}u]) { continue; }
{% endif %}
      let base = operand_base(params.{{ operand.name }}, row / seq / heads, row / seq % heads) + row % seq * params.{{ operand.name }}.seq;
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
  if (thread == 0u) { maxima[slot * PARTS + index % PARTS] = partials[0]; }
}
