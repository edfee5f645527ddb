{#- The gradient by the bias. One workgroup computes a tile of the bias, in f32 and in a fixed order:

      for each sequence, head and tile of queries that share this tile of the bias:
        S, dP, dS as in d_q;  d_bias += dS               add

    Where all queries share a row of the bias, the tile has one row. Softcap's derivative is no factor here, since the bias is added
    after it. -#}
# include "tiled.wgsl"
# import templates ~ "/d_bias.wgsl" as micro
# from "entry.wgsl" import main
{{ micro.declare() }}

# call main()
  let at = decode_work(index);
# if axes.seq_q
  let tile = at.cell;
  let own_row_tile = at.tile;
# else
  let tile = at.tile;
# endif
  let column0 = tile * TILE_COLUMNS;
  // Head and sequence are 0 where the bias does not have that axis.
  let own_head = at.head;
  let own_number = at.batch;

  {{ micro.begin() }}
  for (var number = own_number; number < {{ "own_number + 1u" if axes.batch else "params.sequence_count" }}; number += 1u) {
    let seq = load_sequence(number);
    let batch = seq.entry;
    let row_limit = seq.seq_q;
    let column_limit = seq.seq_k;
    // Loop: heads
    for (var head = own_head; head < {{ "own_head + 1u" if axes.heads else "params.heads" }}; head += 1u) {
      let kv_head = head / (params.heads / params.kv_heads);
# for operand in loads
# set head, start = ("kv_head", "k_start") if operand.name in ["k", "v"] else ("head", "q_start")
# set place = "params." ~ operand.name
      let {{ operand.name }}_base = operand_base({{ place }}, batch, {{ head }}) + seq.{{ start }} * {{ place }}.seq;
# endfor
      let stats_base = operand_base(params.row_stats, batch, head) + seq.q_start;
      begin_pairs(number, batch, head);
# if mask
      let class_base = operand_base(params.mask_classes, number, head);
# endif
# set first_row_tile = "own_row_tile" if axes.seq_q else "0u"
# set is_row_tile = "row_tile < own_row_tile + 1u" if axes.seq_q else "row_tile * TILE_ROWS < row_limit"
      // Loop: tiles
      for (var row_tile = {{ first_row_tile }}; {{ is_row_tile }}; row_tile += 1u) {
        let row0 = row_tile * TILE_ROWS;
        let row_end = min(row0 + TILE_ROWS, row_limit);
        // The sequence ends before the tile, or no query of the tile sees a key of the tile of the bias.
        if (row0 >= row_limit) { continue; }
        let tiles = key_tiles(seq, row0, row_end);
        if (!((tile >= tiles.first && tile < tiles.sink_end) || (tile >= tiles.window && tile < tiles.end))) { continue; }
# if mask
        if ((tile_class(seq, class_base, row0, row_end, column0, column0 + TILE_COLUMNS) & 1u) == 0u) { continue; }
# endif
        // Any number of the bias may be -infinity.
        let is_partial = true;
        {{ micro.add() }}
      }
    }
  }
  {{ micro.finish() }}
# endcall
