//! The kernels of caches, for tests of their texts.

use crate::device::capabilities::Capabilities;
use crate::kernel::cache::CacheOptions;
use crate::kernel::tile::decode::DecodeTiles;
use crate::kernel::{Kernel, Variant};
use crate::plan::pass::check_limits;
use crate::plan::splits::DecodeTiling;
use crate::problem::SinkLogits;
use crate::problem::cache::{CacheConfig, CacheKind, Rotary, RotaryPositions, RotaryStyle};
use crate::problem::element::DType;
use crate::problem::row_format::Quantisation;

const KINDS: [CacheKind; 3] = [
    CacheKind::Contiguous { capacity: 1000 },
    CacheKind::Paged { page_size: 16, pages: 64, sequence_pages: 64 },
    CacheKind::Rolling { sink_tokens: 4, window: 128, queries: 16 },
];

/// The planner's variants for widths, types, kinds and groups on any device. Every option occurs in one of them.
pub fn cache_variants() -> Vec<(Variant, Capabilities)> {
    let mut found = Vec::new();
    let widths = [[1, 1], [5, 33], [64, 64], [80, 16], [128, 128], [192, 128], [256, 256], [512, 1], [512, 512]];
    let mut turn = 0;
    for [head_dim, value_dim] in widths {
        for dtype in [DType::F32, DType::F16, DType::Bf16] {
            for kind in KINDS {
                for (rows, quantisation) in
                    [(1usize, None), (3, None), (8, None), (128, None), (4, Some(Quantisation::Q8_0))]
                {
                    turn += 1;
                    let devices = Capabilities::samples();
                    let device = devices[turn % devices.len()].clone();
                    let style = [RotaryStyle::HalfSplit, RotaryStyle::Interleaved][turn % 2];
                    let positions = match kind {
                        CacheKind::Rolling { .. } if turn % 4 > 1 && quantisation.is_none() => {
                            RotaryPositions::CacheRelative
                        }
                        _ => RotaryPositions::Absolute,
                    };
                    let dim = head_dim as u32 / 16 * 16;
                    let rotary = (dim > 0 && !turn.is_multiple_of(3)).then_some(Rotary { dim, style, positions });
                    let config = CacheConfig::new(kind, 2, 2, head_dim)
                        .value_dim(value_dim)
                        .dtype(dtype)
                        .rotary(rotary)
                        .quantisation(quantisation);
                    let several = rows > 8;
                    let cooperative = DecodeTiling::cooperative(&config, rows, 4, several, &device).ok();
                    let fragments = DecodeTiling::fragments(&config, rows, 4, &device).ok();
                    let tiling = fragments.filter(|_| !turn.is_multiple_of(4)).or(cooperative);
                    let tiling = tiling.filter(|_| !turn.is_multiple_of(3));
                    let tiling = tiling.unwrap_or_else(|| DecodeTiling::portable(&config, rows, 4, &device));
                    let matrices = device.cooperative;
                    let sink_logits = [SinkLogits::None, SinkLogits::OffByOne, SinkLogits::PerHead][turn % 3];
                    let softcap = turn.is_multiple_of(5);
                    let alibi = turn % 4 > 1;
                    let one = matches!(tiling.tiles, DecodeTiles::Cooperative { .. });
                    let tree = turn % 2 == 1 && !one && rotary.is_none();
                    let rotates_q = rotary.is_some() && !turn.is_multiple_of(5);
                    let vec4 = [head_dim, value_dim].iter().all(|n: &usize| n.is_multiple_of(4)) && turn % 7 > 0;
                    let moved = CacheOptions { rotary, ..CacheOptions::new(&config, vec4) };
                    let decoded = CacheOptions {
                        tiles: Some(tiling.tiles),
                        tile: tiling.tiles.keys(matrices),
                        matrices,
                        several: several || tree,
                        tree,
                        softcap,
                        alibi: alibi && !config.is_relative(),
                        sink_logits,
                        row_max: turn % 4 < 2,
                        rotary: rotary.filter(|_| config.is_relative()),
                        indexed: turn.is_multiple_of(2),
                        ..moved
                    };
                    let append = CacheOptions { rotates_q, ..moved };
                    // Keys that are rotated as they are read are not gathered and have no gradients, and neither are quantised ones.
                    let behind = CacheOptions { gathered: true, ..moved };
                    let unrotated = CacheOptions { rotary: None, ..moved };
                    let gathers = [(Kernel::APPEND, behind), (Kernel::GATHER, unrotated)];
                    let gathers = gathers.into_iter().filter(|_| !config.is_relative());
                    let scatters = quantisation.is_none().then_some((Kernel::SCATTER, unrotated));
                    let kernels = [(Kernel::DECODE, decoded), (Kernel::COMBINE, decoded), (Kernel::APPEND, append)];
                    for (kernel, options) in kernels.into_iter().chain(gathers).chain(scatters) {
                        let variant = Variant::of_cache(kernel, options);
                        check_limits(&variant, &device).unwrap();
                        found.push((variant, device.clone()));
                    }
                }
            }
        }
    }
    found
}
