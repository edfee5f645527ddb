{#- Gradients by parameters that have one number a head. One workgroup sums a head over the batch and the rows, in a fixed order:

      d_sink_logit = -sum over rows of exp(sink - lse) delta
      d_alibi_slope = -sum over rows of the slope_rows that d_q has left
      each thread: its rows, with Kahan's compensation
      then the threads, pairwise

    After `delta` the kernel sums the partial sums of 32 rows, which have a more exact delta than the row statistics. -#}
# include "params.wgsl"
# if "row_stats" in names
# include "exp.wgsl"
# endif
# from "entry.wgsl" import main

const THREADS: u32 = {{ threads }}u;
# if "sink_partials" in names
const ROWS: u32 = {{ delta_rows }}u;
# endif
var<workgroup> partials: array<f32, {{ threads }}>;

# if "row_stats" in names
# set terms_of_rows = "row_stats"
# elif "d_slope_rows" in names
# set terms_of_rows = "d_slope_rows"
# else
# set terms_of_rows = "sink_partials"
# endif
# call main()
  let head = decode_work(index).head;
  let terms = {{ "(params.seq_q + ROWS - 1u) / ROWS" if "sink_partials" in names else "params.seq_q" }};
# if "row_stats" in names
  let sink = sink_logits[params.sink_offset + head];
# endif
  var sum = 0.0;
  // Kahan's compensation: the rounding error of the last addition.
  var lost = 0.0;
  for (var n = thread; n < params.batch * terms; n += THREADS) {
    let place = operand_base(params.{{ terms_of_rows }}, n / terms, head) + n % terms;
# if "row_stats" in names
    let row = row_stats[place];
    // Equal terms give exp(0), even where both are infinite.
    let x = -select(exp1(sink - row.x), 1.0, sink == row.x) * row.y - lost;
# elif "d_slope_rows" in names
    let x = -d_slope_rows[place] - lost;
# else
    let x = sink_partials[place] - lost;
# endif
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
  if (thread == 0u) { {{ "d_alibi_slopes[params.d_slope_offset" if "d_slope_rows" in names else "d_sink_logits[params.d_sink_offset" }} + head] = partials[0]; }
# endcall
