{#- Gradients by k and v: one workgroup computes a tile of keys of one key head against all query tiles that
    see them, of every query head of the group in turn, so that GQA needs no second pass.
    d_v = sum over queries of p d_o;  d_k = scale * sum over queries of d_s q. -#}
{% include "tiled.wgsl" %}
{% include "probability.wgsl" %}
{% import micro_kernel ~ "/d_kv.wgsl" as micro %}
{{ micro.declare() }}

{% include "tiled_main.wgsl" %}

  {{ micro.begin() }}
  for (var head = work.head; head < work.head + params.heads / params.kv_heads; head += 1u) {
    let q_base = operand_base(params.q, work.batch, head);
    let d_o_base = operand_base(params.d_o, work.batch, head);
    let delta_base = (work.batch * params.heads + head) * params.seq_q;
    let lse_base = params.lse_offset + delta_base;
    {{ micro.begin_head() }}
    for (var tile = tiles.first; tile < tiles.end; tile += 1u) {
      let column0 = tile * TILE_COLUMNS;
      let masked = !all_visible(column0, column0 + TILE_COLUMNS, row0, row_end) || column0 + TILE_COLUMNS > column_limit;
      {{ micro.scores() }}
      {{ micro.probabilities() }}
      {{ micro.accumulate_d_v() }}
      {{ micro.probability_gradients() }}
      {{ micro.score_gradients() }}
      {{ micro.accumulate_d_k() }}
    }
  }
  {{ micro.finish() }}
}
