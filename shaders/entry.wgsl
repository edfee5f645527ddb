{#- The entry point of every kernel. The workgroups of a dispatch are numbered along both axes of its grid.
    Needs: `threads`, `has_subgroups`, `batch`; with a batch `has_fallback` of tile_main.wgsl.
    Declares: `main`, around the caller's text, with `thread`, where it has subgroups `subgroup` and `lane`, and `index`. -#}
# macro main()
@compute @workgroup_size({{ threads }})
fn main(
  @builtin(workgroup_id) workgroup: vec3<u32>,
  @builtin(num_workgroups) grid: vec3<u32>,
  @builtin(local_invocation_index) thread: u32,
# if has_subgroups
  @builtin(subgroup_id) subgroup: u32,
  @builtin(subgroup_invocation_id) lane: u32,
# endif
) {
# if batch > 1
  // Hardly any tile is left to do. One workgroup checks the reports of several tiles.
  let first_index = (workgroup.x + workgroup.y * grid.x) * {{ batch }}u;
  if (thread < {{ batch }}u) { {{ flags }}[thread] = vec4<f32>(select(0.0, 1.0, has_fallback(first_index + thread))); }
  var left = 0u;
  for (var n = 0u; n < {{ batch }}u; n += 1u) {
    if (workgroupUniformLoad(&{{ flags }}[n]).x != 0.0) { left |= 1u << n; }
  }
  for (; left != 0u; left &= left - 1u) {
    let index = first_index + firstTrailingBit(left);
    workgroupBarrier();
{{ caller() }}
  }
# else
  let index = workgroup.x + workgroup.y * grid.x;
  if (index >= params.workgroups) { return; }
{{ caller() }}
# endif
}
# endmacro
