{#- The splits of a row put together, in their order, and the sink logit with them. One workgroup a row. -#}
{% include "params.wgsl" %}
{% include "operands.wgsl" %}
{% include "exp.wgsl" %}
{% include "softmax.wgsl" %}
{% include "cache/range.wgsl" %}

const THREADS: u32 = {{ threads }}u;
// Threads that share a split, each with four numbers of it; and splits at a time.
const LANES: u32 = {{ lanes }}u;
const SLOTS: u32 = {{ threads // lanes }}u;
const QUADS: u32 = {{ operand_quads.o }}u;
var<workgroup> maxima: array<f32, {{ threads }}>;
var<workgroup> sums: array<f32, {{ threads // lanes }}>;
{% if has_row_max %}
var<workgroup> largest_scores: array<f32, {{ threads // lanes }}>;
{% endif %}
var<workgroup> parts: array<vec4<f32>, {{ threads }}>;

@compute @workgroup_size({{ threads }})
fn main(
  @builtin(workgroup_id) workgroup: vec3<u32>,
  @builtin(num_workgroups) grid: vec3<u32>,
  @builtin(local_invocation_index) thread: u32,
) {
  let index = workgroup.x + workgroup.y * grid.x;
  if (index >= params.workgroups) { return; }
  let at = decode_work(index);
  let query = at.tile;
  let head = at.head;
  let entry = at.batch;
  let range = key_range({{ "entries[entry]" if indexed else "entry" }});
  let first = index * params.most_splits;
  var most = LOWEST;
  for (var n = thread; n < range.splits; n += THREADS) { most = max(most, partials[(first + n) * (QUADS + 1u) + QUADS].x); }
  maxima[thread] = most;
  workgroupBarrier();
  for (var half = THREADS / 2u; half > 0u; half /= 2u) {
    if (thread < half) { maxima[thread] = max(maxima[thread], maxima[thread + half]); }
    workgroupBarrier();
  }
  most = maxima[0];
  let slot = thread / LANES;
  let lane = thread % LANES;
  var sum = 0.0;
  var x = vec4<f32>();
{% if has_row_max %}
  // The maxima of splits may be stale.
  var largest = LOWEST;
{% endif %}
  // Loads of several splits at a time are under way; those beyond the last one count nothing.
  for (var n = slot; n < range.splits; n += {{ ahead }}u * SLOTS) {
{% for a in range(ahead) %}
    let at_{{ a }} = (first + min(n + {{ a }}u * SLOTS, range.splits - 1u)) * (QUADS + 1u);
    let state_{{ a }} = partials[at_{{ a }} + QUADS];
    let part_{{ a }} = partials[at_{{ a }} + min(lane, QUADS - 1u)];
{% endfor %}
{% for a in range(ahead) %}
    if (n + {{ a }}u * SLOTS < range.splits) {
      let factor = exp1(state_{{ a }}.x - most);
      sum = fma(factor, state_{{ a }}.y, sum);
      x = fma(vec4<f32>(factor), part_{{ a }}, x);
{% if has_row_max %}
      largest = max(largest, state_{{ a }}.z);
{% endif %}
    }
{% endfor %}
  }
  parts[thread] = x;
  if (lane == 0u) { sums[slot] = sum; }
{% if has_row_max %}
  if (lane == 0u) { largest_scores[slot] = largest; }
{% endif %}
  workgroupBarrier();
  if (slot > 0u) { return; }
  for (var n = 1u; n < SLOTS; n++) {
    x += parts[n * LANES + lane];
  }
  sum = 0.0;
  for (var n = 0u; n < SLOTS; n++) { sum += sums[n]; }
  let end = finish_row(most, sum, head);
  if (lane == 0u) { lse[params.lse_offset + index] = end.lse; }
{% if has_row_max %}
  for (var n = 0u; n < SLOTS; n++) { largest = max(largest, largest_scores[n]); }
  if (lane == 0u) { row_max[params.row_max.offset + index] = largest_score(largest, sum); }
{% endif %}
  // A row that has seen nothing is zero, whatever its keys were.
  if (lane < QUADS) {
    store_o(operand_base(params.o, entry, head) + query * params.o.seq, lane, select(x * end.factor, vec4<f32>(), sum == 0.0));
  }
}
