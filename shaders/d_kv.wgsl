{#- Gradients by k and v: one workgroup computes a tile of keys of one key head against all query tiles that
    see them, of every query head of the group in turn, so that GQA needs no second pass.
    d_v = sum over queries of p d_o;  d_k = scale * sum over queries of d_s q. -#}
{% include "tiled.wgsl" %}
{% include "probability.wgsl" %}
{% import micro_kernel ~ "/d_kv.wgsl" as micro %}
{{ micro.declare() }}

{% include "tiled_main.wgsl" %}

{% if cooperative or not bias %}
  let open = open_tiles({{ here_argument }}row0, row_end);
{% endif %}
  {{ micro.begin() }}
  for (var head = work.head; head < work.head + params.heads / params.kv_heads; head += 1u) {
{% for operand in ["q", "d_o"] %}
    let {{ operand }}_base = operand_base(params.{{ operand }}, work.batch, head){% if lengths %} + here.q_start * params.{{ operand }}.seq{% endif %};
{% endfor %}
    let terms_base = operand_base(params.row_terms, work.batch, head){% if lengths %} + here.q_start{% endif %};
{% if column_scales %}
    let scales_base = operand_base(params.query_scales, work.batch, head){% if lengths %} + here.q_start{% endif %};
{% endif %}
{% if modified or hides %}
    begin_pairs(work.sequence, work.batch, head);
{% endif %}
{% if mask %}
    let class_base = operand_base(params.mask_classes, work.sequence, head);
{% include "first_tile.wgsl" %}
{% else %}
    let first_tile = tiles.first;
{% endif %}
    {{ micro.begin_head() }}
    for (var tile = first_tile; tile < tiles.end; tile = {{ "next_shown" if cooperative and mask else following }}) {
      let column0 = tile * TILE_COLUMNS;
{% if cooperative %}
      let masked = !is_open(open, column0);
{% if mask %}
{% include "next_shown.wgsl" %}
{% endif %}
{% elif bias %}
      // Any number of it may be -infinity.
      let masked = true;
{% else %}
      let masked = !is_open(open, column0){% if mask %} || tile_class({{ class_arguments }}, column0, column0 + TILE_COLUMNS, row0, row_end) != 1u{% endif %};
{% endif %}
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
