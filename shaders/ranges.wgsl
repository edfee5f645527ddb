{#- For each operand the power of two that brings its largest number to 2^14 .. 2^15, within the range of halves: the second
    step. One workgroup an operand. -#}
{% include "params.wgsl" %}

const PARTS: u32 = {{ maxima_parts }}u;
var<workgroup> partials: array<f32, {{ maxima_parts }}>;

@compute @workgroup_size({{ maxima_parts }})
fn main(
  @builtin(workgroup_id) workgroup: vec3<u32>,
  @builtin(num_workgroups) grid: vec3<u32>,
  @builtin(local_invocation_index) thread: u32,
) {
  let operand = workgroup.x + workgroup.y * grid.x;
  if (operand >= params.workgroups) { return; }
  partials[thread] = maxima[operand * PARTS + thread];
  workgroupBarrier();
  for (var half = PARTS / 2u; half > 0u; half /= 2u) {
    if (thread < half) { partials[thread] = max(partials[thread], partials[thread + half]); }
    workgroupBarrier();
  }
  if (thread == 0u) {
    let exponent = i32(bitcast<u32>(partials[0]) >> 23u) - 127;
    // At most 2^100: its inverse times a row's 1 / sum must not be subnormal.
    ranges[operand] = bitcast<f32>(u32(127 + clamp(14 - exponent, -126, 100)) << 23u);
  }
}
