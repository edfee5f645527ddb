{#- For each token (a row of a head) the powers of two that bring the largest numbers of two operands to 1 .. 2, within the range of
    halves: of k and v, or of q and d_o. A token's own numbers decide, so that no other one has a say in its results. -#}
# include "params.wgsl"
# include "operands.wgsl"
# include "scale.wgsl"
# from "entry.wgsl" import main

const ROWS: u32 = {{ delta_rows }}u;
// Threads that share a row.
const LANES: u32 = {{ lanes }}u;
var<workgroup> sizes: array<vec2<f32>, {{ threads }}>;

# call main()
  let at = decode_work(index);
  let batch = at.batch;
  let head = at.head;
  let row = at.tile * ROWS + thread / LANES;
  let is_row = row < params.{{ "seq_k" if rows_are_keys else "seq_q" }};
  let lane = thread % LANES;
  var size = vec2<f32>();
  if (is_row) {
# for operand in loads
    {
      let base = operand_base(params.{{ operand.name }}, batch, head) + row * params.{{ operand.name }}.seq;
      for (var quad = lane; quad < {{ operand_quads[operand.name] }}u; quad += LANES) {
        size.{{ xyzw[loop.index0] }} = max(size.{{ xyzw[loop.index0] }}, finite_size(load_{{ operand.name }}(base, quad)));
      }
    }
# endfor
  }
  sizes[thread] = size;
  workgroupBarrier();
  if (is_row && lane == 0u) {
    for (var other = 1u; other < LANES; other += 1u) { size = max(size, sizes[thread + other]); }
    {{ kernel }}[operand_base(params.{{ kernel }}, batch, head) + row] = vec2<f32>(token_scale(size.x), token_scale(size.y));
  }
# endcall
