{#- The split, the key head and the sequence of a workgroup that decodes.
    Needs: cache/range.wgsl; `workgroup` and `grid` of the entry point. Declares: the macros below. -#}

# macro begin_group()
  let split = workgroup.x / params.row_tiles;
  // Key heads of sequences are numbered along both of the other axes.
  let group = workgroup.y + workgroup.z * grid.y;
  if (group >= params.groups) { return; }
  let kv_head = group % params.kv_heads;
  let entry = group / params.kv_heads;
  let sequence = {{ "entries[entry]" if indexed else "entry" }};
  let range = key_range(sequence);
  let heads_per_kv = params.heads / params.kv_heads;
# endmacro

{#- The position of the first query, and where its tree mask and the rows of a ring begin. -#}
# macro begin_sequence()
  // Position of query 0.
  let offset = i32(range.keys) - i32(params.queries);
# if tree
  let tree = params.tree_offset + entry * params.tree_batch;
# endif
# if rolling
  let total = state[params.current + sequence];
  let oldest = select((total - params.sink_rows) % params.window_rows, 0u, total <= params.sink_rows + params.window_rows);
# if alibi
  // Keys that the ring has given up: sink tokens are so much further from all others than their places say.
  let given_up = i32(total - range.keys);
# endif
# endif
# endmacro
