{#- The second level of the sink logits' gradient: one workgroup sums a head's partial sums over the batch and
    the row tiles, in a fixed order. -#}
{% include "params.wgsl" %}

const THREADS: u32 = {{ threads }}u;
const ROWS: u32 = {{ delta_rows }}u;
var<workgroup> partials: array<f32, {{ threads }}>;

@compute @workgroup_size({{ threads }})
fn main(
  @builtin(workgroup_id) workgroup: vec3<u32>,
  @builtin(num_workgroups) grid: vec3<u32>,
  @builtin(local_invocation_index) thread: u32,
) {
  let head = workgroup.x + workgroup.y * grid.x;
  if (head >= params.workgroups) { return; }
  let tiles = (params.seq_q + ROWS - 1u) / ROWS;
  let count = params.batch * tiles;
  var sum = 0.0;
  // Kahan's compensation: what the last addition rounded away.
  var lost = 0.0;
  for (var n = thread; n < count; n += THREADS) {
    let x = sink_partials[(n / tiles * params.heads + head) * tiles + n % tiles] - lost;
    let next = sum + x;
    lost = (next - sum) - x;
    sum = next;
  }
  partials[thread] = sum;
  workgroupBarrier();
  for (var half = THREADS / 2u; half > 0u; half /= 2u) {
    if (thread < half) { partials[thread] += partials[thread + half]; }
    workgroupBarrier();
  }
  if (thread == 0u) { d_sink_logits[params.d_sink_offset + head] = partials[0]; }
}
