{#- Combines the splits of a row, in their order, and the sink logit. One workgroup computes a row:

      m = max over splits of row_max_n                   combined_max
      row_sum = 0;  O = 0
      for each split:
        row_sum += exp(row_max_n - m) row_sum_n          add_split
        O += exp(row_max_n - m) O_n
      add up the slots                                   add_slots
      row_sum += exp(sink - m)                           finish_row of softmax.wgsl
      o = O / row_sum;  lse = m + log(row_sum)           finish

    LANES threads, a slot, share a split, each with four numbers of it. The slots take splits in turn. `decode` leaves O_n and behind it
    (row_max_n, row_sum_n, largest score). -#}
# include "params.wgsl"
# include "operands.wgsl"
# include "exp.wgsl"
# include "softmax.wgsl"
# include "cache/range.wgsl"
# from "entry.wgsl" import main

const THREADS: u32 = {{ threads }}u;
const LANES: u32 = {{ lanes }}u;
const SLOTS: u32 = {{ threads // lanes }}u;
const QUADS: u32 = {{ operand_quads.o }}u;
var<workgroup> thread_max: array<f32, {{ threads }}>;
var<workgroup> slot_sum: array<f32, {{ threads // lanes }}>;
# if has_row_max
var<workgroup> slot_largest: array<f32, {{ threads // lanes }}>;
# endif
var<workgroup> thread_o: array<vec4<f32>, {{ threads }}>;

{#- m = max over splits of row_max_n. -#}
# macro combined_max()
  var m = LOWEST;
  for (var n = thread; n < range.splits; n += THREADS) { m = max(m, partials[(first + n) * (QUADS + 1u) + QUADS].x); }
  thread_max[thread] = m;
  workgroupBarrier();
  for (var half = THREADS / 2u; half > 0u; half /= 2u) {
    if (thread < half) { thread_max[thread] = max(thread_max[thread], thread_max[thread + half]); }
    workgroupBarrier();
  }
  m = thread_max[0];
# endmacro

{#- Begins the loads of the a-th split of several: they are under way together. Those beyond the last split load the last one. -#}
# macro load_split(a)
    {
      let at = (first + min(n + {{ a }}u * SLOTS, last)) * (QUADS + 1u);
      state_{{ a }} = partials[at + QUADS];
      o_{{ a }} = partials[at + min(lane, QUADS - 1u)];
    }
# endmacro

{#- row_sum += exp(row_max_n - m) row_sum_n, and the same of O. -#}
# macro add_split(a)
    if (n + {{ a }}u * SLOTS < range.splits) {
      let rescale = exp1(state_{{ a }}.x - m);
      row_sum = fma(rescale, state_{{ a }}.y, row_sum);
      o_sum = fma(vec4<f32>(rescale), o_{{ a }}, o_sum);
# if has_row_max
      largest = max(largest, state_{{ a }}.z);
# endif
    }
# endmacro

{#- The sums of the slots, in their order, in the first slot. -#}
# macro add_slots()
  thread_o[thread] = o_sum;
  if (lane == 0u) { slot_sum[slot] = row_sum; }
# if has_row_max
  if (lane == 0u) { slot_largest[slot] = largest; }
# endif
  workgroupBarrier();
  if (slot > 0u) { return; }
  for (var n = 1u; n < SLOTS; n++) {
    o_sum += thread_o[n * LANES + lane];
  }
  row_sum = 0.0;
  for (var n = 0u; n < SLOTS; n++) { row_sum += slot_sum[n]; }
# endmacro

{#- The denominator takes in the sink logit. Then o = O / row_sum and lse are written. -#}
# macro finish()
  let end = finish_row(m, row_sum, head);
  if (lane == 0u) { lse[params.lse_offset + index] = end.lse; }
# if has_row_max
  for (var n = 0u; n < SLOTS; n++) { largest = max(largest, slot_largest[n]); }
  if (lane == 0u) { row_max[params.row_max.offset + index] = largest_score(largest, row_sum); }
# endif
  // A row that has seen nothing is zero, whatever its keys were.
  if (lane < QUADS) {
    store_o(operand_base(params.o, entry, head) + query * params.o.seq, lane, select(o_sum * end.factor, vec4<f32>(), row_sum == 0.0));
  }
# endmacro

# call main()
  let at = decode_work(index);
  let query = at.tile;
  let head = at.head;
  let entry = at.batch;
  let range = key_range({{ "entries[entry]" if indexed else "entry" }});
  let first = index * params.most_splits;
  let last = max(range.splits, 1u) - 1u;
  let slot = thread / LANES;
  let lane = thread % LANES;
  // The loads of the first splits are under way while the maximum is found.
  var n = slot;
# for a in range(ahead)
  var state_{{ a }} = vec4<f32>();
  var o_{{ a }} = vec4<f32>();
# endfor
# for a in range(ahead)
{{ load_split(a) }}
# endfor
{{ combined_max() }}
  var row_sum = 0.0;
  var o_sum = vec4<f32>();
# if has_row_max
  // row_max_n may lag behind the largest score of its split.
  var largest = LOWEST;
# endif
  loop {
# for a in range(ahead)
{{ add_split(a) }}
# endfor
    n += {{ ahead }}u * SLOTS;
    if (n >= range.splits) { break; }
# for a in range(ahead)
{{ load_split(a) }}
# endfor
  }
{{ add_slots() }}
{{ finish() }}
# endcall
