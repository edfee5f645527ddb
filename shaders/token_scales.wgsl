{#- Token scales of two operands, k and v or q and d_o, for bf16 on cooperative matrices:

      for each token (a row of a head):
        size = largest finite number of the row, by several threads
        scale = 2^-exponent(size)

    A token's scale depends on its own numbers alone, so no other token changes its results. -#}
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
