{#- Opens the work on a query head of a group: where its operands lie, and the tiles of queries. -#}
# for operand in ["q", "d_o"]
    let {{ operand }}_base = operand_base(params.{{ operand }}, work.batch, head){% if lengths %} + here.q_start * params.{{ operand }}.seq{% endif %};
# endfor
    let stats_base = operand_base(params.row_terms, work.batch, head){% if lengths %} + here.q_start{% endif %};
# if column_scales
    let scales_base = operand_base(params.query_scales, work.batch, head){% if lengths %} + here.q_start{% endif %};
# endif
# if modified or hides
    begin_pairs(work.sequence, work.batch, head);
# endif
# if mask
    let class_base = operand_base(params.mask_classes, work.sequence, head);
# include "first_tile.wgsl"
# else
    let first_tile = tiles.first;
# endif
