//! Decisions: the planner's choices for named devices in a reviewed file, and a plan for every width.
//!
//! After a change that is meant, `UPDATE_PLANS=1 cargo test --test plans` rewrites tests/plans.txt;
//! the difference belongs into the review.

mod common;

use std::fmt::Write as _;
use std::path::Path;

use common::operands::problem;
use sink_attention::{Capabilities, Error, Options, Plan, Problem, SinkLogits, Tiles, Window};

/// Problems that people have, and some that they should not.
fn problems() -> Vec<(&'static str, Problem)> {
    let causal = Options::new().causal(true);
    let sinks = causal.sink_logits(SinkLogits::PerHead);
    let gpt_oss = sinks.window(Window::keys(128));
    vec![
        ("GPT-OSS prefill, full layer", problem([1, 64, 8], [4096, 4096], [64, 64], sinks)),
        ("GPT-OSS prefill, sliding layer", problem([1, 64, 8], [4096, 4096], [64, 64], gpt_oss)),
        ("GPT-OSS decode", problem([1, 64, 8], [1, 4096], [64, 64], sinks)),
        ("GPT-OSS decode, batch of 32", problem([32, 64, 8], [1, 4096], [64, 64], gpt_oss)),
        ("Llama 3 8B prefill", problem([1, 32, 8], [8192, 8192], [128, 128], causal)),
        ("Llama 3 8B decode", problem([1, 32, 8], [1, 8192], [128, 128], causal)),
        ("Llama 3 8B speculative decode", problem([1, 32, 8], [8, 8192], [128, 128], causal)),
        ("Gemma, wide heads", problem([1, 8, 4], [2048, 2048], [256, 256], causal)),
        ("Gemma decode", problem([1, 8, 4], [1, 2048], [256, 256], causal)),
        ("DeepSeek, D 192 and E 128", problem([1, 16, 16], [1024, 1024], [192, 128], causal)),
        (
            "StreamingLLM",
            problem([1, 32, 32], [512, 4096], [128, 128], causal.window(Window::keys(1024)).sink_tokens(4)),
        ),
        ("vision, no mask", problem([8, 16, 16], [577, 577], [64, 64], Options::new())),
        ("phi, D 80", problem([1, 32, 32], [2048, 2048], [80, 80], causal)),
        ("50 queries", problem([1, 8, 8], [50, 50], [64, 64], causal)),
        ("16 wide", problem([1, 4, 4], [1000, 1000], [16, 16], causal)),
        ("tiny", problem([1, 1, 1], [1, 1], [1, 1], Options::new())),
        ("odd widths", problem([2, 6, 3], [113, 203], [33, 77], sinks)),
        ("widest value, narrow key", problem([1, 2, 1], [300, 300], [3, 255], sinks)),
        ("more workgroups than a dimension holds", problem([512, 64, 8], [256, 256], [64, 64], causal)),
    ]
}

/// The planner's choices as text; devices with the same plan share a line.
fn plans() -> String {
    let mut text = String::from("# Written and checked by tests/plans.rs.\n");
    for (name, problem) in problems() {
        writeln!(text, "\n{name}: {problem}").unwrap();
        // As the operands of a packed problem would be read.
        let vec4 = [problem.shape().head_dim, problem.shape().value_dim].iter().all(|width| width % 4 == 0);
        let mut plans: Vec<(Plan, Vec<String>)> = Vec::new();
        for device in Capabilities::samples() {
            let plan = Plan::forward(&problem, vec4, &device).unwrap();
            match plans.iter_mut().find(|(other, _)| *other == plan) {
                Some((_, devices)) => devices.push(device.name),
                None => plans.push((plan, vec![device.name])),
            }
        }
        for (plan, devices) in plans {
            writeln!(text, "- {}\n  {plan}", devices.join(", ")).unwrap();
        }
    }
    text
}

#[test]
fn plans_are_the_reviewed_ones() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/plans.txt");
    let actual = plans();
    if std::env::var_os("UPDATE_PLANS").is_some() {
        std::fs::write(&path, &actual).unwrap();
    }
    let reviewed = std::fs::read_to_string(&path).unwrap().replace("\r\n", "\n");
    let changed = reviewed.lines().zip(actual.lines()).find(|(reviewed, actual)| reviewed != actual);
    assert!(reviewed == actual, "plans have changed, first at {changed:#?}; if that is meant: UPDATE_PLANS=1");
}

/// Every width works on the least device that WebGPU allows, for decoding as for long prompts.
#[test]
fn every_width_has_a_plan() {
    let least = Capabilities::webgpu_defaults();
    for head_dim in 1..=256 {
        for value_dim in 1..=256 {
            for seq_q in [1, 1000] {
                let problem = problem([1, 1, 1], [seq_q, 1000], [head_dim, value_dim], Options::new());
                let plan = Plan::forward(&problem, false, &least).unwrap();
                let tiles = plan.variant.tiles;
                let bytes = tiles.workgroup_bytes(head_dim as u32, value_dim as u32);
                assert!(bytes <= 16 << 10, "{problem}: {plan}");
                assert!(tiles.threads() <= 256, "{problem}: {plan}");
                assert!(plan.workgroups * tiles.tile_q() >= seq_q as u32, "{problem}: {plan}");
            }
        }
    }
}

/// A device that cannot run the first choice falls back instead of failing.
#[test]
fn less_memory_means_smaller_tiles() {
    let problem = problem([1, 8, 8], [1024, 1024], [128, 128], Options::new());
    let mut device = Capabilities::samples().swap_remove(0);
    let mut last = u32::MAX;
    for kib in [48, 32, 16, 12] {
        device.workgroup_bytes = kib << 10;
        let plan = Plan::forward(&problem, true, &device).unwrap();
        let bytes = plan.variant.tiles.workgroup_bytes(128, 128);
        assert!(bytes <= kib << 10 && bytes <= last, "{plan}");
        last = bytes;
    }
    device.workgroup_bytes = 1 << 10;
    let error = Plan::forward(&problem, true, &device).unwrap_err();
    assert!(matches!(error, Error::NoKernel { .. }) && error.to_string().contains("1024"), "{error}");
}

/// Tiles that do not fit together are refused, whatever their numbers; nothing overflows on the way.
#[test]
fn strange_tiles_are_refused() {
    let problem = problem([1, 1, 1], [100, 100], [64, 64], Options::new());
    let device = &Capabilities::samples()[0];
    let good = Tiles {
        threads_q: 8,
        threads_k: 8,
        rows: 4,
        quads: 1,
        chunk: 4,
        v_chunk: 32,
        q_resident: false,
        v_apart: false,
    };
    Plan::with_tiles(&problem, true, device, good).unwrap();
    let huge = u32::MAX;
    for (why, tiles) in [
        ("no threads", Tiles { threads_q: 0, ..good }),
        ("threads_k no multiple of 4", Tiles { threads_k: 6, v_chunk: 24, ..good }),
        ("v_chunk does not divide the tile", Tiles { v_chunk: 12, ..good }),
        ("v_chunk no multiple of 4", Tiles { v_chunk: 2, ..good }),
        ("v_chunk above the tile", Tiles { v_chunk: 64, ..good }),
        ("chunk of nothing", Tiles { chunk: 0, ..good }),
        ("chunk does not divide a resident q", Tiles { chunk: 5, q_resident: true, ..good }),
        ("too many threads", Tiles { threads_q: 256, ..good }),
        ("too much memory", Tiles { rows: 64, ..good }),
        ("each number at its most", Tiles { threads_q: 1024, threads_k: 1024, rows: 1024, quads: 1024, ..good }),
        (
            "huge",
            Tiles { threads_q: huge, threads_k: huge, rows: huge, quads: huge, chunk: huge, v_chunk: huge, ..good },
        ),
        ("long chunk", Tiles { chunk: 1024, quads: 1024, ..good }),
    ] {
        let plan = Plan::with_tiles(&problem, true, device, tiles);
        assert!(matches!(plan, Err(Error::NoKernel { .. })), "{why}: {plan:?}");
    }
}
