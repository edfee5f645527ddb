// Tells the size of the subgroups that a driver gives a kernel like those on matrices: with matrices in workgroup memory, and with lanes that
// exchange numbers.
enable f16;
enable wgpu_cooperative_matrix;

@group(0) @binding(0) var<storage, read_write> found: array<u32>;
var<workgroup> halves: array<vec4<f16>, QUADS>;
var<workgroup> sums: array<vec4<f32>, QUADS>;

@compute @workgroup_size(THREADS)
fn main(
  @builtin(local_invocation_index) thread: u32,
  @builtin(subgroup_size) size: u32,
  @builtin(subgroup_invocation_id) lane: u32,
) {
  let left = coopLoadT<coop_matSIDExSIDE<f16, A>>(&halves[0], PITCH);
  let right = coopLoadT<coop_matSIDExSIDE<f16, B>>(&halves[0], PITCH);
  coopStoreT(coopMultiplyAdd(left, right, coop_matSIDExSIDE<f32, C>()), &sums[0], PITCH);
  workgroupBarrier();
  let zero = subgroupShuffleXor(sums[lane % QUADS].x, 1u);
  if (thread == 0u) { found[0] = size + u32(zero); }
}
