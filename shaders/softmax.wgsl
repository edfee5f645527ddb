{#- The end of a row's softmax. Needs: exp.wgsl, params.wgsl; `sinks`. Declares: natural_log, RowEnd, finish_row; with row_max
    largest_score. -#}
// 1 / row_sum, and lse. The sink logit enters the denominator here, exactly once.
struct RowEnd { factor: f32, lse: f32 }

// log(x) for x >= 1: one Newton step after the driver's log, which may be coarse near 1.
fn natural_log(x: f32) -> f32 {
  let y = log(x);
  return y + fma(x, exp1(-y), -1.0);
}

// `row_max` times the size of the scale is the row's maximum score, and `row_sum` is the sum of exp(score - maximum score). If the score
// exceeds f32, lse is infinite. If `row_max` exceeds f32, `row_sum` and the factor are NaN. An infinite sink logit takes all.
fn finish_row(row_max: f32, row_sum: f32, head: u32) -> RowEnd {
  let infinity = -params.negative_infinity;
  let score = row_max * {{ score_size }};
# if sinks == "none"
  if (row_sum == 0.0) { return RowEnd(0.0, params.negative_infinity); }
  return RowEnd(1.0 / row_sum, select(fma(row_max, {{ score_size }}, natural_log(row_sum)), infinity, score == infinity));
# else
  let sink = {{ "sink_logits[params.sink_offset + head]" if sinks == "per_head" else "0.0" }};
  if (row_sum == 0.0) { return RowEnd(0.0, sink); }
  // The rounding error of the score. With it lse fits the unrounded scores of the backward pass.
  let rest = select(0.0, fma(row_max, {{ score_size }}, -score), score > sink && score < infinity);
  let top = max(score, sink);
  // Equal terms give exp(0), even where they exceed f32.
  let keys = select(select(exp1(score - top), 1.0, score == top), 0.0, sink == infinity);
  let total = fma(row_sum, keys, select(exp1(sink - top), 1.0, sink == top && (sink == infinity || score < infinity)));
  return RowEnd(keys / total, select(top + (natural_log(total) + rest), infinity, score == infinity));
# endif
}
# if has_row_max

// The largest score of a row, by its maximum and its sum as `finish_row` has them, but the maximum is that of now. NaN where a score is,
// and -infinity where nothing was seen. Bits are compared: compilers may assume that a float comparison meets no NaN.
fn largest_score(row_max: f32, row_sum: f32) -> f32 {
  let score = row_max * {{ score_size }};
  if (score == -params.negative_infinity) { return score; }
  if ((bitcast<u32>(row_sum) & 0x7fffffffu) > 0x7f800000u) { return row_sum; }
  return select(score, params.negative_infinity, row_sum == 0.0);
}
# endif
