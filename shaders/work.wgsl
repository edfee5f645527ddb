{#- Where the work of a workgroup lies, by its index: the digits and their order are the host's, see `Work` in src/kernel/spec.rs.
    Needs: bindings.wgsl; `order`. Declares: WorkIndex, decode_work. -#}

// `head` is a key head if a group of query heads is kept together. `cell` numbers the workgroups of one head and tile.
struct WorkIndex { batch: u32, head: u32, tile: u32, cell: u32 }

fn decode_work(index: u32) -> WorkIndex {
  var at = WorkIndex(params.slice_batch, params.slice_head, params.slice_tile, 0u);
  var rest = index;
# for digit in order
  at.{{ digit.name }} = {{ digit.first }}{{ "rest" if loop.last else "rest % " ~ digit.count }};
# if not loop.last
  rest /= {{ digit.count }};
# endif
# endfor
  return at;
}
