// Loads a fragment whose elements are numbered row by row, and tells which of them each component of each lane is. Then the same
// fragment comes back from its components, and as the left and as the right operand of a product with the identity. A second fragment,
// of numbers that operands do not hold, becomes a left operand, too.
enable f16;
enable wgpu_cooperative_matrix;

const AREA: u32 = SIDE * SIDE;

@group(0) @binding(0) var<storage, read> singles: array<f32>;
@group(0) @binding(1) var<storage, read> halves: array<f16>;
@group(0) @binding(2) var<storage, read_write> found: array<f32>;

fn component_c(m: coop_matSIDExSIDE<f32, C>, i: u32) -> f32 { return 0.0; }
fn matrix_of_a(OPERANDS) -> coop_matSIDExSIDE<f16, A> { return coop_matSIDExSIDE<f16, A>(); }
fn matrix_of_b(OPERANDS) -> coop_matSIDExSIDE<f16, B> { return coop_matSIDExSIDE<f16, B>(); }
fn matrix_of_c(SINGLES) -> coop_matSIDExSIDE<f32, C> { return coop_matSIDExSIDE<f32, C>(); }

@compute @workgroup_size(LANES)
fn main(@builtin(subgroup_invocation_id) lane: u32) {
  let numbers = coopLoadT<coop_matSIDExSIDE<f32, C>>(&singles[0], SIDE);
  let identity = coopLoadT<coop_matSIDExSIDE<f16, B>>(&halves[0], SIDE);
  let at = lane * COMPONENTS;
  TELL
  coopStoreT(matrix_of_c(BACK), &found[AREA], SIDE);
  let operand = matrix_of_a(OPERAND);
  let product = coopMultiplyAdd(operand, identity, coop_matSIDExSIDE<f32, C>());
  coopStoreT(product, &found[2u * AREA], SIDE);
  let left_identity = coopLoadT<coop_matSIDExSIDE<f16, A>>(&halves[0], SIDE);
  let right = matrix_of_b(OPERAND);
  let other_product = coopMultiplyAdd(left_identity, right, coop_matSIDExSIDE<f32, C>());
  coopStoreT(other_product, &found[3u * AREA], SIDE);
  let samples = coopLoadT<coop_matSIDExSIDE<f32, C>>(&singles[AREA], SIDE);
  let rounded = coopMultiplyAdd(matrix_of_a(SAMPLE), identity, coop_matSIDExSIDE<f32, C>());
  coopStoreT(rounded, &found[4u * AREA], SIDE);
}
