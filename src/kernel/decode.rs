//! Decoding: a few queries against the keys of a cache, in splits. The combine kernel then combines the splits of each row.

use minijinja::{Value, context};

use crate::device::capabilities::CooperativeMatrices;
use crate::device::elements::Shares;
use crate::kernel::binding::Binding::{
    AlibiSlopes, CacheState, CachedKeys, CachedValues, CosSin, Entries, Lse, O, Params, Partials, Q, RowMax,
    SinkLogits as Sinks, TreeMask,
};
use crate::kernel::cache::{Access, CacheOptions, named};
use crate::kernel::spec::{Body, Cached, KernelSpec, Work, adjusts_nothing, always, binds_all};
use crate::kernel::tile::decode::{
    DecodeTiles, FragmentShares, cooperative_bytes, exchange, fragments_bytes, lane_vectors, merged_fragments, tile_row,
};
use crate::problem::SinkLogits;

/// Threads of a workgroup of the combine kernel.
const COMBINE_THREADS: u32 = 256;

/// Splits that a thread of the combine kernel loads at a time.
const COMBINE_AHEAD: u32 = 8;

pub(crate) const DECODE: KernelSpec = KernelSpec {
    name: "decode",
    template: include_str!("../../shaders/cache/decode_main.wgsl"),
    wanted: always,
    reads: &[Params, Q, AlibiSlopes, TreeMask, CachedKeys, CachedValues, CacheState, Entries, CosSin],
    writes: &[Partials],
    binds: binds_all,
    adjust: adjusts_nothing,
    work: Work::Listed,
    body: Body::Cached(Cached {
        threads: |options| match (options.tiles, options.matrices) {
            (Some(DecodeTiles::Portable { threads, .. }), _) => threads,
            (Some(DecodeTiles::Fragments { key_parts, row_parts, .. }), Some(matrices)) => {
                matrices.lanes * key_parts * row_parts
            }
            (_, Some(matrices)) => matrices.lanes,
            _ => 0,
        },
        workgroup_bytes: |options| match options.tiles {
            Some(DecodeTiles::Portable { threads, lanes, rows, exchanged, .. }) => {
                let [_, _, len, _] = exchange(threads, lanes, rows, exchanged, value_quads(options, lanes));
                let p_tile = [0, 8, 16, 0, 16 + 4][exchanged as usize];
                16 * len + threads / lanes * rows * (p_tile + 8)
            }
            Some(DecodeTiles::Cooperative { .. }) => {
                let side = options.matrices.map_or(16, |matrices| matrices.side);
                cooperative_bytes([options.head_dim, options.value_dim], options.tile, side)
            }
            Some(DecodeTiles::Fragments { key_parts, row_parts, rows, .. }) => {
                let side = options.matrices.map_or(16, |matrices| matrices.side);
                fragments_bytes(key_parts, row_parts, rows, options.value_dim, side)
            }
            None => 0,
        },
        access: |_| Access::Vectors,
        depends: |options| CacheOptions {
            sink_logits: SinkLogits::None,
            matrices: options.matrices.filter(|_| options.tiles.is_some_and(needs_matrices)),
            ..options
        },
        binds: |options, binding| match binding {
            CosSin => options.is_relative(),
            TreeMask => options.tree,
            Entries => options.indexed,
            _ => true,
        },
        context: decode_context,
    }),
};

fn needs_matrices(tiles: DecodeTiles) -> bool {
    tiles.micro_kernel().properties().needs_matrices
}

/// Quads of a row of values that a thread of the portable kernel holds.
fn value_quads(options: &CacheOptions, lanes: u32) -> u32 {
    lane_vectors(options.data_vectors(), lanes)[1] * options.vector_quads()
}

fn decode_context(options: &CacheOptions) -> Value {
    let common = options.context(options.is_relative());
    let (CacheOptions { tile, softcap, .. }, vectors) = (*options, options.data_vectors());
    match (options.tiles, options.matrices) {
        (Some(DecodeTiles::Portable { threads, lanes, rows, steps, exchanged }), _) => {
            let lane_vectors = lane_vectors(vectors, lanes);
            let [row_pitch, slot_pitch, exchange_len, merged_rows] =
                exchange(threads, lanes, rows, exchanged, value_quads(options, lanes));
            context! {
                decode => "portable",
                lanes, rows, steps, exchanged, row_pitch, slot_pitch, exchange_len, merged_rows, softcap,
                slots => threads / lanes,
                queries => if options.several { "several" } else { "one" },
                tree => options.tree,
                relative => options.is_relative(),
                vector_quads => options.vector_quads(),
                lane_vectors => named(lane_vectors),
                lane_quads => named(lane_vectors.map(|n| n * options.vector_quads())),
                data_vectors => named(vectors),
                ..common
            }
        }
        (Some(DecodeTiles::Cooperative { rows, columns, ahead }), Some(matrices)) => {
            let (side, lanes) = (matrices.side, matrices.lanes);
            let widths = [options.head_dim, options.value_dim];
            context! {
                decode => "cooperative",
                rows, columns, ahead, softcap, side, lanes,
                in_step => matrices.in_step,
                relative => false,
                tile_row => tile_row(tile),
                pitches => named(widths.map(|width| width / 4 + 2)),
                data_vectors => named(vectors),
                tile_vectors => named(vectors.map(|n| n * tile / lanes)),
                features => named(widths.map(|width| width / side)),
                lane_quads => tile / 4 / (lanes / rows),
                ..common
            }
        }
        (Some(DecodeTiles::Fragments { key_parts, row_parts, rows, columns, ahead }), Some(matrices)) => {
            let own = context! {
                decode => "fragments",
                key_parts, row_parts, rows, columns, ahead, softcap,
                several => options.several,
                tree => options.tree,
                lanes => matrices.lanes,
                side => matrices.side,
            };
            let widths = [options.head_dim, options.value_dim];
            context! { ..own, ..lanes_context(matrices, widths, [key_parts, row_parts, rows, columns]), ..common }
        }
        _ => common,
    }
}

/// What the lanes of a subgroup have of fragments, for the kernel on fragments.
fn lanes_context(matrices: CooperativeMatrices, widths: [u32; 2], tile: [u32; 4]) -> Value {
    let [key_parts, row_parts, rows, columns] = tile;
    let side = matrices.side;
    let shares = FragmentShares::new(matrices, widths.map(|width| width as usize));
    let (Some(layout), Some(shares)) = (matrices.elements, shares) else { return context! {} };
    let of = |shares: &Shares| {
        let Shares { first, offsets, ranks, parts, part, part_of_place, rank_of_place } = shares.clone();
        context! { first, offsets, ranks, parts, part, part_of_place, rank_of_place }
    };
    let vectors = shares.vectors.unwrap_or_default();
    let k = context! { keys => of(&shares.columns), features => of(&shares.rows), vectors => vectors[0] };
    let v = context! { keys => of(&shares.rows), features => of(&shares.columns), vectors => vectors[1] };
    let (lane_rows, lane_columns) = (layout.rows(), layout.columns());
    let rank = |axis: usize, component: u32| {
        let [rows, columns] = [lane_rows.len(), lane_columns.len()];
        let places = (0..rows).flat_map(|row| (0..columns).map(move |column| [row, column]));
        places
            .into_iter()
            .find(|[row, column]| layout.component(*row, *column) == component)
            .map_or(0, |found| found[axis])
    };
    let components = 0..layout.components();
    let row_ranks: Vec<usize> = components.clone().map(|i| rank(0, i)).collect();
    let column_ranks: Vec<usize> = components.clone().map(|i| rank(1, i)).collect();
    // Of one fragment, 8 rows of 16 may be used.
    let used_ranks = lane_rows.iter().filter(|offset| **offset < rows).count();
    let row_fragments = rows.div_ceil(side);
    let used: Vec<(u32, u32, u32)> = (0..row_fragments)
        .flat_map(|r| (0..columns).map(move |c| (r, c)))
        .flat_map(|(r, c)| components.clone().map(move |i| (r, c, i)))
        .filter(|(.., i)| row_ranks[*i as usize] < used_ranks)
        .collect();
    let row_offsets: Vec<u32> = (0..row_fragments)
        .flat_map(|r| lane_rows.iter().take(used_ranks).map(move |offset| r * side + offset))
        .collect();
    let lane_rows_count = row_offsets.len();
    let across = widths[1] / side;
    let merged = merged_fragments(key_parts * row_parts, row_fragments * across, side);
    let fragments: Vec<(u32, u32)> = (0..row_fragments).flat_map(|r| (0..across).map(move |f| (r, f))).collect();
    let columns_a_lane = lane_columns.len();
    context! {
        k => k.clone(), v => v.clone(),
        shares => context! { k, v },
        components => layout.components(),
        row_fragments, row_offsets, used, used_ranks, row_ranks, column_ranks, merged, columns_a_lane,
        lane_rows => lane_rows_count,
        rows_a_lane => used_ranks,
        column_offsets => lane_columns,
        row_lanes => layout.row_lanes(),
        elements => context! { row => layout.expression(0), column => layout.expression(1) },
        // A lane's columns of Q are its features of K. Quads of them are quads of features.
        query_is_key => columns_a_lane.is_multiple_of(4),
        query_quads => columns_a_lane.div_ceil(4),
        features => named(widths.map(|width| width / side)),
        chunks => fragments.chunks(merged as usize).map(<[_]>::to_vec).collect::<Vec<_>>(),
    }
}

pub(crate) const COMBINE: KernelSpec = KernelSpec {
    name: "combine",
    template: include_str!("../../shaders/cache/combine.wgsl"),
    wanted: always,
    reads: &[Params, Sinks, CacheState, Entries, Partials],
    writes: &[O, Lse, RowMax],
    binds: binds_all,
    adjust: adjusts_nothing,
    work: Work::DecodedRows,
    body: Body::Cached(Cached {
        threads: |_| COMBINE_THREADS,
        workgroup_bytes: |options| {
            let splits = COMBINE_THREADS / options.value_dim.div_ceil(4).next_power_of_two();
            COMBINE_THREADS * (4 + 16) + 4 * splits * if options.row_max { 2 } else { 1 }
        },
        access: |_| Access::Vectors,
        // Splits have one format, whichever kernel has written them.
        depends: |options| CacheOptions {
            head_dim: 0,
            rotary: None,
            several: false,
            tree: false,
            softcap: false,
            alibi: false,
            tiles: None,
            matrices: None,
            ..options
        },
        binds: |options, binding| match binding {
            Sinks => options.sink_logits == SinkLogits::PerHead,
            Entries => options.indexed,
            _ => true,
        },
        context: |options| {
            context! {
                lanes => options.value_dim.div_ceil(4).next_power_of_two(),
                ahead => COMBINE_AHEAD,
                ..options.context(false)
            }
        },
    }),
};
