{#- delta, the term that every dS of a row subtracts. One workgroup computes 32 rows of a head, 8 threads a row:

      delta = d_o . o - d_lse                            half precision: o with its rounding error
      row statistics = (lse, delta)                      half precision: also the unit of d_q
      partial sum = sum over the rows of -exp(sink - lse) delta

    The product is summed quad by quad, as the other kernels sum d_o . v. In a row that one key dominates the two cancel, and then they
    cancel exactly. -#}
# include "params.wgsl"
# include "operands.wgsl"
# include "exp.wgsl"
# include "probability.wgsl"
# if stats_have_units
# include "unit.wgsl"
# endif
# from "entry.wgsl" import main

const ROWS: u32 = {{ delta_rows }}u;
// Threads of a row. Each has every LANES-th feature quad.
const LANES: u32 = {{ lanes }}u;
// Padding lets neighbouring rows start in different banks.
const STEP_ROW: u32 = {{ lanes * steps + 1 }}u;
const PART_ROW: u32 = LANES + 1u;
var<workgroup> products: array<f32, {{ delta_rows * (lanes * steps + 1) }}>;
# if sinks == "per_head" or stats_have_units
// Of each thread: its share of the exact sum, and the sum of |d_o| and the largest |o| of its features.
var<workgroup> parts: array<vec4<f32>, {{ delta_rows * (lanes + 1) }}>;
# endif
# if sinks == "per_head"
var<workgroup> partials: array<f32, {{ delta_rows }}>;
# endif

# if sinks == "per_head"
// sum + a b. The second number keeps the rounding errors of the product and of the sum (Dot2 of Ogita, Rump and Oishi). The gradient of
// sink logits sums delta over all rows, where the rounding of a plain product would show.
fn add_product(sum: vec2<f32>, a: f32, b: f32) -> vec2<f32> {
  let product = a * b;
  let next = sum.x + product;
  let kept = next - sum.x;
  return vec2<f32>(next, sum.y + (fma(a, b, -product) + ((sum.x - (next - kept)) + (product - kept))));
}

// sum + other, both of this kind.
fn add_sum(sum: vec2<f32>, other: vec2<f32>) -> vec2<f32> {
  let next = sum.x + other.x;
  let kept = next - sum.x;
  return vec2<f32>(next, sum.y + (other.y + ((sum.x - (next - kept)) + (other.x - kept))));
}
# endif

// Whether a row holds zeros only. Few rows are checked.
# for operand in ["o", "d_o"] if operand == "d_o" or sinks == "per_head"
fn is_zero_{{ operand }}(batch: u32, head: u32, row: u32) -> bool {
  var bits = vec4<u32>();
  for (var quad = 0u; quad < {{ operand_quads[operand] }}u; quad += 1u) {
    bits |= bitcast<vec4<u32>>(load_{{ operand }}(operand_base(params.{{ operand }}, batch, head) + row * params.{{ operand }}.seq, quad));
# if o_lo and operand == "o"
    bits |= bitcast<vec4<u32>>(load_o_lo(operand_base(params.o_lo, batch, head) + row * params.o_lo.seq, quad));
# endif
  }
  return all((bits & vec4<u32>(0x7fffffffu)) == vec4<u32>());
}
# endfor

# call main()
  let at = decode_work(index);
  let batch = at.batch;
  let head = at.head;
  let row0 = at.tile * ROWS;
# if alibi

  // Later kernels read the slope here and need no binding for it.
  if (thread == 0u && row0 == 0u) { row_stats[operand_base(params.row_stats, batch, head) + params.slope_row] = {{ "vec4" if stats_have_units else "vec2" }}<f32>(alibi_slopes[params.slope_offset + head]); }
# endif

  // Neighbouring threads load a row together. Then thread r sums the products of row r.
  let loaded = row0 + thread / LANES;
  let part = thread % LANES;
  let o_base = operand_base(params.o, batch, head) + loaded * params.o.seq;
  let d_o_base = operand_base(params.d_o, batch, head) + loaded * params.d_o.seq;
# if o_lo
  let o_lo_base = operand_base(params.o_lo, batch, head) + loaded * params.o_lo.seq;
# endif
  // The loads of a row's numbers are under way, too.
  let row = row0 + thread;
  let has_row = thread < ROWS && row < params.seq_q;
  var row_lse = 0.0;
# if d_lse
  var row_d_lse = 0.0;
# endif
  if (has_row) {
    row_lse = lse[operand_base(params.lse, batch, head) + row];
# if d_lse
    row_d_lse = d_lse[operand_base(params.d_lse, batch, head) + row];
# endif
  }
# if sinks == "per_head"
  let sink = sink_logits[params.sink_offset + head];
# endif
  var row_delta = 0.0;
# if sinks == "per_head"
  var exact = vec2<f32>();
# endif
# if stats_have_units
  // A rough bound of d_o . v is the sum of |d_o| times the largest |o|.
  var d_o_sum = 0.0;
  var o_max = 0.0;
# endif
# for first in range(0, operand_quads.o, lanes * steps)
# set count = ([operand_quads.o - first, lanes * steps] | min + lanes - 1) // lanes
  {
# for n in range(count)
    var o_{{ n }} = vec4<f32>();
    var d_o_{{ n }} = vec4<f32>();
# endfor
    // All loads are under way before the first is needed.
# for n in range(count)
# set quad = "part + " ~ (first + n * lanes) ~ "u"
    if (loaded < params.seq_q{% if first + (n + 1) * lanes > operand_quads.o %} && {{ quad }} < {{ operand_quads.o }}u{% endif %}) {
# if o_lo
      o_{{ n }} = with_lo4(load_o(o_base, {{ quad }}), load_o_lo(o_lo_base, {{ quad }}));
# else
      o_{{ n }} = load_o(o_base, {{ quad }});
# endif
      d_o_{{ n }} = load_d_o(d_o_base, {{ quad }});
    }
# endfor
# if first > 0
    workgroupBarrier();
# endif
# for n in range(count)
    {
      let a = d_o_{{ n }};
      let b = o_{{ n }};
      products[thread / LANES * STEP_ROW + part + {{ n * lanes }}u] = fma(a.w, b.w, fma(a.z, b.z, fma(a.y, b.y, a.x * b.x)));
# if sinks == "per_head"
# for e in xyzw
      exact = add_product(exact, a.{{ e }}, b.{{ e }});
# endfor
# endif
# if stats_have_units
      let sizes = abs(a);
      d_o_sum += (sizes.x + sizes.y) + (sizes.z + sizes.w);
      let o_sizes = abs(b);
      o_max = max(o_max, max(max(o_sizes.x, o_sizes.y), max(o_sizes.z, o_sizes.w)));
# endif
    }
# endfor
    workgroupBarrier();
    if (thread < ROWS) {
      for (var quad = 0u; quad < {{ [operand_quads.o - first, lanes * steps] | min }}u; quad += 1u) { row_delta += products[thread * STEP_ROW + quad]; }
    }
  }
# endfor
# if sinks == "per_head" or stats_have_units
  parts[thread / LANES * PART_ROW + part] = vec4<f32>({{ "exact" if sinks == "per_head" else "0.0, 0.0" }}, {{ "d_o_sum, o_max" if stats_have_units else "0.0, 0.0" }});
  workgroupBarrier();
# endif

  var sink_share = 0.0;
  if (has_row) {
# if sinks == "per_head"
    exact = vec2<f32>();
    for (var lane = 0u; lane < LANES; lane += 1u) { exact = add_sum(exact, parts[thread * PART_ROW + lane].xy); }
# endif
    if (row_lse == params.negative_infinity) {
      // The row sees nothing, and its lse depends on nothing.
      row_delta = 0.0;
    } else {
# if d_lse
      row_delta -= row_d_lse;
# endif
# if sinks == "per_head"
      if (sink == row_lse && is_zero_o(batch, head, row)) {
        // The row saw nothing, so its d_o has no effect, even if it is NaN. Its results decide, because the keys may be a shard of those
        // that the row saw.
        exact = vec2<f32>();
        row_delta = {{ "-row_d_lse" if d_lse else "0.0" }};
      }
      // Equal terms give exp(0), even where both are infinite.
      let p_sink = select(exp1(sink - row_lse), 1.0, sink == row_lse);
      var sink_delta = exact.x + exact.y;
# if d_lse
      sink_delta -= row_d_lse;
# endif
      sink_share = -p_sink * sink_delta;
# endif
    }
    // Probabilities of a row of the lowest biases need a count of its keys. Where no gradient flows into the row, 0 serves as well.
    let idle = row_lse <= ABSORBING && row_delta == 0.0 && is_zero_d_o(batch, head, row);
    let term = select(probability_lse(row_lse), -params.negative_infinity, idle);
# if not stats_have_units
    let terms = vec2<f32>(term, row_delta);
# else
    var sizes = vec2<f32>();
    for (var lane = 0u; lane < LANES; lane += 1u) {
      let of_lane = parts[thread * PART_ROW + lane];
      sizes = vec2<f32>(sizes.x + of_lane.z, max(sizes.y, of_lane.w));
    }
    // A number that rounds to 0 in o may still be as large as 2^-24.
    let exponent = exponent_of(sizes.x) + exponent_of(max(sizes.y, {{ 2 ** -24 }})) + 1;
    let terms = vec4<f32>(term, row_delta, query_unit(max(exponent, exponent_of(row_delta))), 0.0);
# endif
    row_stats[operand_base(params.row_stats, batch, head) + row] = terms;
  }
# if sinks == "per_head"
  if (thread < ROWS) { partials[thread] = sink_share; }
  workgroupBarrier();
  // Pairwise: the error grows with the logarithm of the rows.
  for (var half = ROWS / 2u; half > 0u; half /= 2u) {
    if (thread < half) { partials[thread] += partials[thread + half]; }
    workgroupBarrier();
  }
  if (thread == 0u) { sink_partials[operand_base(params.sink_partials, batch, head) + at.tile] = partials[0]; }
# endif
# endcall
