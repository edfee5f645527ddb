{#- Merges the partial states of rows, in their order, and in the last merge the sink logit:

      lse = log(sum over states of exp(lse_n) + exp(sink))
      o = sum over states of exp(lse_n - lse) o_n
      row_max = max over states of row_max_n                  where it is wanted

    One workgroup merges 32 rows, 8 threads a row. The states follow one another along the batch axis, and the key axis of the problem
    counts them. Twin of src/cpu/merge.rs. -#}
# include "params.wgsl"
# include "operands.wgsl"
# include "exp.wgsl"
# include "softmax.wgsl"
# from "entry.wgsl" import main

const ROWS: u32 = {{ delta_rows }}u;
// Threads that share a row.
const LANES: u32 = {{ lanes }}u;

// Made of bits: a NaN constant is an error in WGSL, and compilers may assume that arithmetic meets no infinity.
fn not_a_number() -> f32 {
  return bitcast<f32>(bitcast<u32>(params.negative_infinity) | 0x400000u);
}

// Equal terms give exp(0), even where both are infinite.
fn exp_below(x: f32, top: f32) -> f32 {
  return select(exp1(x - top), 1.0, x == top);
}

# call main()
  let at = decode_work(index);
  let batch = at.batch;
  let head = at.head;
  let row = at.tile * ROWS + thread / LANES;
  if (row >= params.seq_q) { return; }
  let lane = thread % LANES;
  let states = params.seq_k;

  let lse_base = operand_base(params.states_lse, batch, head) + row;
  let lse_step = params.batch * params.states_lse.batch;
# if sinks == "none"
  var top = params.negative_infinity;
# else
  var sink = {{ "sink_logits[params.sink_offset + head]" if sinks == "per_head" else "0.0" }};
# if lengths
  // Rows beyond the end of a padded sequence have no sink logit.
  if (row >= sequences[batch * {{ sequence_words }}u + 3u]) { sink = params.negative_infinity; }
# endif
  var top = sink;
# endif
  for (var n = 0u; n < states; n += 1u) { top = max(top, states_lse[lse_base + n * lse_step]); }
  var total = 0.0;
# if has_row_max
  let max_base = operand_base(params.states_row_max, batch, head) + row;
  let max_step = params.batch * params.states_row_max.batch;
  var largest = params.negative_infinity;
  var has_nan = false;
# endif
  for (var n = 0u; n < states; n += 1u) {
    let state_lse = states_lse[lse_base + n * lse_step];
    // A state that has seen nothing has no share, whatever its o holds. A NaN is not equal to -infinity and has a share.
    if (state_lse == params.negative_infinity) { continue; }
    total += exp_below(state_lse, top);
# if has_row_max
    // A maximum may lose a NaN.
    let state_max = states_row_max[max_base + n * max_step];
    has_nan = has_nan || (bitcast<u32>(state_max) & 0x7fffffffu) > 0x7f800000u;
    largest = max(largest, state_max);
# endif
  }
# if sinks != "none"
  total += select(exp_below(sink, top), 0.0, sink == params.negative_infinity);
# endif

  let states_base = operand_base(params.states, batch, head) + row * params.states.seq;
  let states_step = params.batch * params.states.batch;
  let o_base = operand_base(params.o, batch, head) + row * params.o.seq;
# if o_lo
  let states_lo_base = operand_base(params.states_lo, batch, head) + row * params.states_lo.seq;
  let states_lo_step = params.batch * params.states_lo.batch;
  let o_lo_base = operand_base(params.o_lo, batch, head) + row * params.o_lo.seq;
# endif
  for (var quad = lane; quad < {{ operand_quads.o }}u; quad += LANES) {
    var sum = vec4<f32>();
    for (var n = 0u; n < states; n += 1u) {
      let state_lse = states_lse[lse_base + n * lse_step];
      if (state_lse == params.negative_infinity) { continue; }
      // The division comes first: shares add up to 1, and nothing overflows. The share of a state with an infinite lse is not known.
      let share = select(exp_below(state_lse, top) / total, not_a_number(), state_lse == -params.negative_infinity);
# if o_lo
      let lo = load_states_lo(states_lo_base + n * states_lo_step, quad);
      let x = with_lo4(load_states(states_base + n * states_step, quad), lo);
# else
      let x = load_states(states_base + n * states_step, quad);
# endif
      sum = fma(vec4<f32>(share), x, sum);
    }
    store_o(o_base, quad, sum);
# if o_lo
    store_o_lo(o_lo_base, quad, sum);
# endif
  }
  if (lane == 0u) {
    // The total is 0, or a sum of terms of which the largest is 1.
    let whole = select(top + natural_log(total), params.negative_infinity, total == 0.0);
    lse[operand_base(params.lse, batch, head) + row] = whole;
# if has_row_max
    row_max[operand_base(params.row_max, batch, head) + row] = select(largest, not_a_number(), has_nan);
# endif
  }
# endcall
