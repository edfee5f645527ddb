{#- The entry point of every kernel. The workgroups of a dispatch are numbered along both axes of its grid.
    Needs: `threads`, `has_subgroups`, `guarded_lanes`, `batch`; with a batch `has_fallback` of tile_main.wgsl.
    Declares: `main`, around the caller's text, with `thread`, where it has subgroups `subgroup` and `lane`, and `index`; where their size has
    to be checked `has_lanes`. -#}
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
# if guarded_lanes
  @builtin(subgroup_size) subgroup_size: u32,
  @builtin(num_subgroups) subgroup_count: u32,
# endif
) {
# if guarded_lanes
  // Subgroups are those that the kernel is built for.
  if (thread == 0u) {
    {{ flags }}[0] = vec4<f32>(select(0.0, 1.0, subgroup_size == {{ guarded_lanes }}u && subgroup_count == {{ threads // guarded_lanes }}u));
  }
  let has_lanes = workgroupUniformLoad(&{{ flags }}[0]).x != 0.0;
# if sanitize
  // Reports are left to the portable kernel.
  if (!has_lanes) { return; }
# endif
# endif
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
