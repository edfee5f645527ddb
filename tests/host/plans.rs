//! Decisions: the planner's choices for named devices in a reviewed file, and a plan for every width.
//!
//! After a change that is meant, `UPDATE_PLANS=1 cargo test --test suites plans::` rewrites tests/plans.txt;
//! the difference belongs into the review.

use std::collections::HashSet;
use std::fmt::Write as _;
use std::path::Path;

use sink_attention::cache::{CacheConfig, CacheKind, Decode, DecodeTiles, DecodeTiling, Quantisation, TreeMask};
use sink_attention::plan::MicroKernel;
use sink_attention::plan::{
    Capabilities, DeviceClass, Kernel, LoopHint, LoopHints, LoopName, OptionalOperands, Pass, Plan, PortableTile,
    Precision, Preference, Tiling, Variant,
};
use sink_attention::testing::operands::problem;
use sink_attention::tuning::{Tuning, TuningKey};
use sink_attention::{Axes, DType, Error, Options, Problem, SinkLogits, Window};

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
        ("GPT-OSS prefill in bf16", problem([1, 64, 8], [4096, 4096], [64, 64], sinks.dtype(DType::Bf16))),
        ("GPT-OSS prefill in f16", problem([1, 64, 8], [4096, 4096], [64, 64], sinks.dtype(DType::F16))),
        ("Llama 3 8B prefill in f16", problem([1, 32, 8], [8192, 8192], [128, 128], causal.dtype(DType::F16))),
        ("odd widths in f16", problem([2, 6, 3], [113, 203], [33, 77], sinks.dtype(DType::F16))),
        ("16 wide", problem([1, 4, 4], [1000, 1000], [16, 16], causal)),
        ("wider than any model's", problem([1, 4, 4], [1000, 1000], [512, 512], causal)),
        ("tiny", problem([1, 1, 1], [1, 1], [1, 1], Options::new())),
        ("odd widths", problem([2, 6, 3], [113, 203], [33, 77], sinks)),
        ("widest value, narrow key", problem([1, 2, 1], [300, 300], [3, 255], sinks)),
        ("more workgroups than a dimension holds", problem([512, 64, 8], [256, 256], [64, 64], causal)),
    ]
}

/// Caches that people decode from, with the query heads, the queries of a step, and options.
fn decodings() -> Vec<(&'static str, CacheConfig, Decode)> {
    let sinks = Options::new().causal(true).sink_logits(SinkLogits::PerHead);
    let contiguous = |capacity, sequences, kv_heads, head_dim| {
        CacheConfig::new(CacheKind::Contiguous { capacity }, sequences, kv_heads, head_dim)
    };
    let paged = CacheKind::Paged { page_size: 16, pages: 1 << 14, sequence_pages: 512 };
    let rolling = CacheKind::Rolling { sink_tokens: 4, window: 1024, queries: 1 };
    let f16 = |options: Options| options.dtype(DType::F16);
    vec![
        ("GPT-OSS, one sequence", contiguous(8192, 1, 8, 64).dtype(DType::F16), Decode::new(64, f16(sinks))),
        (
            "GPT-OSS, 32 sequences in pages",
            contiguous(1, 32, 8, 64).kind(paged).dtype(DType::F16),
            Decode::new(64, f16(sinks)),
        ),
        ("GPT-OSS in f32", contiguous(8192, 1, 8, 64), Decode::new(64, sinks)),
        (
            "GPT-OSS in 8 bits",
            contiguous(8192, 1, 8, 64).dtype(DType::F16).quantisation(Quantisation::Q8_0),
            Decode::new(64, f16(sinks)),
        ),
        ("Llama 3 8B", contiguous(8192, 1, 8, 128).dtype(DType::F16), Decode::new(32, f16(sinks))),
        (
            "Llama 3 8B, 4 queries",
            contiguous(8192, 1, 8, 128).dtype(DType::Bf16),
            Decode::new(32, sinks.dtype(DType::Bf16)).queries(4),
        ),
        (
            "a tree of 8 tokens with ALiBi",
            contiguous(8192, 1, 8, 128).dtype(DType::F16),
            Decode::new(32, f16(sinks.alibi(true))).queries(8).tree_mask(TreeMask::PerSequence),
        ),
        ("one token with ALiBi", contiguous(8192, 1, 8, 64).dtype(DType::F16), Decode::new(32, f16(sinks.alibi(true)))),
        ("StreamingLLM", contiguous(1, 1, 32, 128).kind(rolling), Decode::new(32, sinks)),
        ("wide heads of a query each", contiguous(4096, 4, 16, 192).value_dim(128), Decode::new(16, sinks)),
        ("tiny", contiguous(1, 1, 1, 1), Decode::new(1, Options::new())),
    ]
}

/// The planner's choices as text; devices with the same plan share a line.
fn plans() -> String {
    let mut text = String::from("# Written and checked by tests/plans.rs.\n");
    for (name, problem) in problems() {
        writeln!(text, "\n{name}: {problem}").unwrap();
        // As the operands of a packed problem would be read.
        let vec4 = [problem.shape().head_dim, problem.shape().value_dim].iter().all(|width| width % 4 == 0);
        let mut plans: Vec<(Vec<Pass>, Vec<String>)> = Vec::new();
        for device in Capabilities::samples() {
            let forward = Plan::forward_with(
                &problem,
                OptionalOperands::default().scalar(!vec4),
                &device,
                &Preference::default(),
            )
            .unwrap();
            let backward = Plan::backward_with(
                &problem,
                OptionalOperands::default().scalar(!vec4),
                &device,
                &Preference::default(),
            )
            .unwrap();
            let passes = [forward.passes, backward.passes].concat();
            match plans.iter_mut().find(|(other, _)| *other == passes) {
                Some((_, devices)) => devices.push(device.name),
                None => plans.push((passes, vec![device.name])),
            }
        }
        write_plans(&mut text, plans);
    }
    let split = ["GPT-OSS prefill, full layer", "GPT-OSS prefill, sliding layer", "Llama 3 8B prefill", "odd widths"];
    for (name, problem) in problems().into_iter().filter(|(name, _)| split.contains(name)) {
        let vec4 = [problem.shape().head_dim, problem.shape().value_dim].iter().all(|width| width % 4 == 0);
        let (optional, split) =
            (OptionalOperands::default().scalar(!vec4), Preference::default().precision(Precision::Split));
        let mut plans: Vec<(Vec<Pass>, Vec<String>)> = Vec::new();
        for device in Capabilities::samples() {
            let forward = Plan::forward_with(&problem, optional, &device, &split);
            let backward = Plan::backward_with(&problem, optional, &device, &split);
            let (Ok(forward), Ok(backward)) = (forward, backward) else { continue };
            let passes = [forward.passes, backward.passes].concat();
            match plans.iter_mut().find(|(other, _)| *other == passes) {
                Some((_, devices)) => devices.push(device.name),
                None => plans.push((passes, vec![device.name])),
            }
        }
        if !plans.is_empty() {
            writeln!(text, "\nIn split precision, {name}: {problem}").unwrap();
            write_plans(&mut text, plans);
        }
    }
    for (name, config, decode) in decodings() {
        let CacheConfig { kind, sequences, kv_heads, head_dim, value_dim, dtype, .. } = config;
        let Decode { heads, queries, .. } = decode;
        writeln!(
            text,
            "\nDecoding, {name}: B={sequences} H={heads} G={kv_heads} M={queries} D={head_dim} E={value_dim} {dtype}, {kind:?}"
        )
        .unwrap();
        let mut plans: Vec<(Vec<Pass>, Vec<String>)> = Vec::new();
        for device in Capabilities::samples() {
            let passes = Plan::decode(&config, &decode, &device, MicroKernel::Auto).unwrap().passes;
            match plans.iter_mut().find(|(other, _)| *other == passes) {
                Some((_, devices)) => devices.push(device.name),
                None => plans.push((passes, vec![device.name])),
            }
        }
        write_plans(&mut text, plans);
    }
    text
}

fn write_plans(text: &mut String, plans: Vec<(Vec<Pass>, Vec<String>)>) {
    for (passes, devices) in plans {
        writeln!(text, "- {}", devices.join(", ")).unwrap();
        passes.iter().for_each(|pass| writeln!(text, "  {pass}").unwrap());
    }
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

/// Every width works on the least device that WebGPU allows, for decoding as for long prompts, both ways.
#[test]
fn every_width_has_a_plan() {
    let least = Capabilities::webgpu_defaults();
    for head_dim in 1..=512 {
        // All of them in turns.
        for value_dim in (1 + head_dim % 8..=512).step_by(8) {
            for seq_q in [1, 1000] {
                let dtype = [DType::F32, DType::F16, DType::Bf16][(head_dim + value_dim) % 3];
                let options = Options::new().sink_logits(SinkLogits::PerHead).dtype(dtype);
                let problem = problem([1, 1, 1], [seq_q, 1000], [head_dim, value_dim], options);
                let forward = Plan::forward_with(
                    &problem,
                    OptionalOperands::default().scalar(true),
                    &least,
                    &Preference::default(),
                )
                .unwrap();
                let backward = Plan::backward_with(
                    &problem,
                    OptionalOperands::default().scalar(true).d_lse(true),
                    &least,
                    &Preference::default(),
                )
                .unwrap();
                assert_eq!((forward.passes.len(), backward.passes.len()), (1, 4));
                let mut passes = [forward.passes, backward.passes].concat();
                if dtype.has_rounding_error() {
                    let optional = OptionalOperands::default().d_lse(true).o_lo(true);
                    let preference = Preference::default();
                    passes.extend(
                        Plan::forward_with(&problem, optional.scalar(true), &least, &preference).unwrap().passes,
                    );
                    passes.extend(
                        Plan::backward_with(&problem, optional.scalar(true), &least, &preference).unwrap().passes,
                    );
                }
                for pass in passes {
                    assert!(pass.variant.workgroup_bytes() <= 16 << 10, "{problem}: {pass}");
                    assert!(pass.variant.threads() <= 256, "{problem}: {pass}");
                    if let Some([tile_rows, _]) = pass.variant.tile() {
                        let rows = if pass.variant.kernel == Kernel::D_KV { 1000 } else { seq_q as u64 };
                        assert!(pass.workgroups * u64::from(tile_rows) >= rows, "{problem}: {pass}");
                    }
                }
            }
        }
    }
}

/// o in half precision is never read without what rounding took from it.
#[test]
fn delta_is_never_from_rounded_o() {
    for dtype in [DType::F32, DType::F16, DType::Bf16] {
        for sink_logits in [SinkLogits::None, SinkLogits::OffByOne, SinkLogits::PerHead] {
            let options = Options::new().dtype(dtype).sink_logits(sink_logits);
            let problem = problem([1, 2, 1], [100, 100], [64, 64], options);
            for device in Capabilities::samples() {
                for [d_lse, o_lo] in [[false, false], [true, false], [false, true], [true, true]] {
                    let (optional, preference) =
                        (OptionalOperands::default().d_lse(d_lse).o_lo(o_lo), Preference::default());
                    let plans = [
                        Plan::forward_with(&problem, optional, &device, &preference),
                        Plan::backward_with(&problem, optional, &device, &preference),
                    ];
                    if o_lo && !dtype.has_rounding_error() {
                        for error in plans.map(|plan| plan.unwrap_err()) {
                            assert!(matches!(error, Error::UnexpectedOperand { operand: "o_lo", .. }), "{error}");
                        }
                        continue;
                    }
                    let [forward, backward] = plans.map(|plan| plan.unwrap().passes);
                    let of = |passes: &[Pass], kernels: &[Kernel]| -> Vec<Variant> {
                        passes.iter().map(|pass| pass.variant).filter(|v| kernels.contains(&v.kernel)).collect()
                    };
                    assert!(of(&forward, &[Kernel::FORWARD]).iter().all(|variant| variant.o_lo == o_lo));
                    let whole = !dtype.has_rounding_error() || o_lo;
                    let deltas = of(&backward, &[Kernel::DELTA, Kernel::EXACT_DELTA]);
                    assert!(!deltas.is_empty());
                    for delta in deltas {
                        assert_eq!(delta.kernel, if whole { Kernel::DELTA } else { Kernel::EXACT_DELTA });
                        assert_eq!((delta.o_lo, delta.d_lse), (o_lo, d_lse));
                    }
                }
            }
        }
    }
}

/// A micro-kernel that was asked for is the one that is planned, or an error that says why not.
#[test]
fn micro_kernels_are_as_asked_for() {
    for dtype in [DType::F32, DType::F16, DType::Bf16] {
        let problem = problem([1, 2, 2], [100, 100], [64, 64], Options::new().dtype(dtype));
        for device in Capabilities::samples() {
            let plans = |micro_kernel| {
                let preference = Preference::default().micro_kernel(micro_kernel);
                [
                    Plan::forward_with(&problem, OptionalOperands::default(), &device, &preference),
                    Plan::backward_with(&problem, OptionalOperands::default(), &device, &preference),
                ]
            };
            for pass in plans(MicroKernel::Portable).into_iter().flat_map(|plan| plan.unwrap().passes) {
                assert_eq!((pass.variant.micro_kernel, pass.variant.dtype), (MicroKernel::Portable, dtype));
                let name = format!("portable_{dtype}");
                assert!(pass.variant.name().contains(&name) && pass.to_string().contains(&name.replace('_', " ")));
            }
            for pass in plans(MicroKernel::Auto).into_iter().flat_map(|plan| plan.unwrap().passes) {
                assert_ne!(pass.variant.micro_kernel, MicroKernel::Auto);
            }
            let on_matrices = [MicroKernel::Cooperative, MicroKernel::Fragments]
                .into_iter()
                .flat_map(|micro_kernel| plans(micro_kernel).map(|plan| (micro_kernel, plan)));
            for (micro_kernel, plan) in on_matrices {
                let has_elements = device.spirv.is_some() && device.cooperative.is_some_and(|c| c.elements.is_some());
                let reason = match (dtype, device.cooperative) {
                    (DType::F32, _) => "f32 operands need the portable micro-kernel",
                    (_, None) => "has no cooperative matrices",
                    (_, Some(_)) if micro_kernel == MicroKernel::Fragments && !has_elements => "elements of fragments",
                    (_, Some(_)) => {
                        // Each is followed by what computes again: itself, where a column could spoil others, and the portable one.
                        let all = &plan.as_ref().unwrap().passes;
                        for pass in all.iter().filter(|pass| pass.variant.sanitize) {
                            let mut first = pass.variant;
                            (first.sanitize, first.batch) = (false, 1);
                            assert!(all.iter().any(|pass| pass.variant == first), "{pass}");
                            assert_ne!(pass.variant.kernel, Kernel::EXACT_DELTA);
                        }
                        let tiled = |pass: &Pass| pass.variant.tiling.is_some() && !pass.variant.sanitize;
                        let passes: Vec<Pass> = plan.unwrap().passes.into_iter().filter(tiled).collect();
                        for pair in passes.chunks(2) {
                            let [first, second] = pair else { panic!("{pair:?}") };
                            assert_eq!(first.variant.micro_kernel, micro_kernel, "{first}");
                            assert_eq!(second.variant.fallback, first.variant.tile().map(|[rows, _]| rows), "{second}");
                            assert_eq!(second.variant.kernel, first.variant.kernel);
                        }
                        continue;
                    }
                };
                let error = plan.unwrap_err();
                assert!(matches!(error, Error::NoKernel { .. }), "{error:?}");
                assert!(error.to_string().contains(reason), "{error}");
            }
        }
    }
}

/// Whichever kernel alone is cooperative, the token scales that it reads have been found before it.
#[test]
fn token_scales_are_found_before_they_are_read() {
    // Of a class whose cooperative kernels have to be asked for.
    let native = &Capabilities::samples().swap_remove(0).class(DeviceClass::Other);
    let device = &native.clone().cooperative(native.cooperative.map(|matrices| matrices.bf16(None)));
    let loops = LoopHints::NONE;
    let tilings = [
        Tiling::Cooperative { subgroups: 4, rows: 1, columns: 1, stages: 2, loops },
        Tiling::Fragments { subgroups: 4, rows: 1, columns: 1, chunk: 1, loops },
    ];
    let of_dtypes = [(DType::F16, device), (DType::Bf16, device), (DType::Bf16, native)];
    for ((dtype, device), tiling) in of_dtypes.into_iter().flat_map(|dtype| tilings.map(|tiling| (dtype, tiling))) {
        let multiplies_bf16 =
            device.cooperative.unwrap().bf16.is_some() && tiling.micro_kernel() == MicroKernel::Fragments;
        let problem = problem([1, 2, 1], [100, 100], [64, 64], Options::new().dtype(dtype));
        for kernel in [Kernel::FORWARD, Kernel::EXACT_DELTA, Kernel::D_Q, Kernel::D_KV] {
            let tiles = [(kernel, tiling)];
            let preference = Preference::default().tiles(&tiles);
            let (optional, plan) = (OptionalOperands::default(), if kernel == Kernel::FORWARD { 0 } else { 1 });
            let plans = [
                Plan::forward_with(&problem, optional, device, &preference),
                Plan::backward_with(&problem, optional, device, &preference),
            ];
            let kernels: Vec<_> = plans[plan].as_ref().unwrap().passes.iter().map(|pass| pass.variant.kernel).collect();
            let place = |kernel| kernels.iter().position(|other| *other == kernel);
            // f16 has all the range that its operands have, and so has bf16 where it is multiplied as itself.
            let scales = if kernel == Kernel::D_KV { Kernel::QUERY_SCALES } else { Kernel::KEY_SCALES };
            let needs_scales = dtype == DType::Bf16 && !multiplies_bf16;
            assert_eq!(place(scales).is_some(), needs_scales, "{kernel:?} in {dtype}");
            assert!(place(scales) < place(kernel), "{kernels:?}");
        }
    }
}

/// Hints for loops reach the driver as SPIR-V. Where they would not, and where there is no such loop, tiles that have them are an error,
/// be they the caller's or measured ones: passed over, they would change a plan without a word.
#[test]
fn hints_for_loops_are_refused_where_they_say_nothing() {
    let samples = Capabilities::samples();
    let with = &samples[0];
    let without = &with.clone().spirv(None);
    let options = Options::new().causal(true).bias(Axes::ALL);
    let problem = problem([1, 2, 1], [100, 100], [64, 64], options);
    let optional = OptionalOperands::default().d_bias(true);
    let plan = Plan::backward_with(&problem, optional, with, &Preference::default()).unwrap();
    let mut seen = 0;
    for pass in plan.passes.iter().chain(&Plan::forward(&problem, with).unwrap().passes) {
        let (Some(tiling), kernel) = (pass.variant.tiling, pass.variant.kernel) else { continue };
        let there = LoopName::of(kernel, MicroKernel::Portable);
        for name in LoopName::ALL {
            let hinted = tiling.with_loops(LoopHints::NONE.with(name, LoopHint::Keep));
            let found = Pass::with_tiles(kernel, &problem, with, hinted);
            assert_eq!(found.is_ok(), there.contains(&name), "{kernel:?} {name}");
            if let Err(error) = found {
                let reason =
                    format!("\"loops {name} keep\": as portable {} has no loops {name}, it has ", kernel.name());
                assert!(error.to_string().contains(&reason), "{error}");
                seen += 1;
            }
        }
        let hinted = tiling.with_loops(LoopHints::every(LoopHint::Unroll));
        let with_hints = Pass::with_tiles(kernel, &problem, with, hinted).unwrap().variant;
        assert!(with_hints.name().contains("_loops_unroll") && with_hints.name() != pass.variant.name());
        let own = [(kernel, hinted)];
        let mut tuning = Tuning::new("", "");
        tuning.insert(TuningKey::of(kernel, &problem).unwrap(), hinted);
        for preference in [Preference::default().tiles(&own), Preference::default().tuning(&tuning)] {
            let passes = |device| -> Result<Vec<Pass>, Error> {
                let mut passes = Plan::forward_with(&problem, optional, device, &preference)?.passes;
                passes.extend(Plan::backward_with(&problem, optional, device, &preference)?.passes);
                Ok(passes)
            };
            let planned = passes(with).unwrap();
            assert_eq!(planned.iter().filter(|pass| pass.variant.tiling == Some(hinted)).count(), 1);
            let error = passes(without).unwrap_err();
            let reason =
                "\"loops unroll\": hints for loops go to the driver as SPIR-V, which NVIDIA H200 does not take";
            assert!(error.to_string().contains(reason), "{error}");
        }
    }
    // Of d_bias, which accumulates no columns; of forward and d_q, which have no heads.
    assert_eq!(seen, 3);
}

/// Where they have been measured, kernels on cooperative matrices are the choice for halves, with elements in registers where these have
/// been measured and the device has them; of other devices, of f32 and of widths that have none, portable ones.
#[test]
fn auto_is_cooperative_where_that_is_known_to_be_faster() {
    let nvidia = Capabilities::samples().swap_remove(0);
    let other = nvidia.clone().class(DeviceClass::Other);
    let without_elements = nvidia.clone().cooperative(nvidia.cooperative.map(|matrices| matrices.elements(None)));
    let without_bf16 = nvidia.clone().cooperative(nvidia.cooperative.map(|matrices| matrices.bf16(None)));
    let without_spirv = nvidia.clone().spirv(None);
    let (fragments, cooperative) = (Some(MicroKernel::Fragments), Some(MicroKernel::Cooperative));
    let f16 = Options::new().dtype(DType::F16);
    for (device, options, width, expected) in [
        (&nvidia, f16, 64, fragments),
        (&nvidia, f16.causal(true).window(Window::keys(9)).sink_logits(SinkLogits::PerHead), 128, fragments),
        (&nvidia, f16, 160, cooperative),
        (&nvidia, f16.softcap(9.0), 64, fragments),
        (&nvidia, f16.alibi(true), 64, fragments),
        (&nvidia, f16.mask(Axes::KEYS), 64, fragments),
        (&nvidia, f16.bias(Axes::KEYS), 64, fragments),
        (&nvidia, f16.dtype(DType::Bf16), 128, fragments),
        (&nvidia, f16.dtype(DType::Bf16).softcap(9.0), 128, fragments),
        (&without_bf16, f16.dtype(DType::Bf16), 128, cooperative),
        (&without_bf16, f16, 128, fragments),
        (&without_elements, f16, 64, cooperative),
        (&without_spirv, f16, 128, cooperative),
        (&nvidia, f16, 300, None),
        (&nvidia, Options::new(), 64, None),
        (&other, f16, 64, None),
    ] {
        let problem = problem([1, 2, 1], [100, 100], [width, width], options);
        let plans = [Plan::forward(&problem, device), Plan::backward(&problem, device)];
        for plan in plans {
            let passes = plan.unwrap().passes;
            let found: HashSet<_> = passes
                .iter()
                .filter(|pass| pass.variant.tiling.is_some() && pass.variant.fallback.is_none())
                .map(|pass| pass.variant.micro_kernel)
                .collect();
            assert_eq!(found, HashSet::from([expected.unwrap_or(MicroKernel::Portable)]), "{} {problem}", device.name);
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
        let pass = Plan::forward(&problem, &device).unwrap().passes[0];
        let bytes = pass.variant.workgroup_bytes();
        assert!(bytes <= kib << 10 && bytes <= last, "{pass}");
        last = bytes;
    }
    device.workgroup_bytes = 1 << 10;
    let error = Plan::forward(&problem, &device).unwrap_err();
    assert!(matches!(error, Error::NoKernel { .. }) && error.to_string().contains("1024"), "{error}");
}

/// Tiles that do not fit together are refused, whatever their numbers; nothing overflows on the way.
#[test]
fn strange_tiles_are_refused() {
    let problem = problem([1, 1, 1], [100, 100], [64, 64], Options::new());
    let device = &Capabilities::samples()[0];
    let good =
        PortableTile { threads_r: 8, threads_c: 8, rows: 4, quads: 1, k_step: 4, n_step: 32, loops: LoopHints::NONE };
    let huge = u32::MAX;
    for kernel in [Kernel::FORWARD, Kernel::D_Q, Kernel::D_KV] {
        Pass::with_tiles(kernel, &problem, device, good).unwrap();
        for (why, tiles) in [
            ("no threads", PortableTile { threads_r: 0, ..good }),
            ("threads_r no multiple of 2", PortableTile { threads_r: 5, ..good }),
            ("threads_c no multiple of 4", PortableTile { threads_c: 6, n_step: 24, ..good }),
            ("n_step does not divide the tile", PortableTile { n_step: 12, ..good }),
            ("n_step no multiple of 4", PortableTile { n_step: 2, ..good }),
            ("n_step above the tile", PortableTile { n_step: 64, ..good }),
            ("k_step of nothing", PortableTile { k_step: 0, ..good }),
            ("too many threads", PortableTile { threads_r: 256, ..good }),
            ("too much memory", PortableTile { rows: 64, ..good }),
            ("long k_step", PortableTile { k_step: 64, quads: 64, ..good }),
            (
                "each number at its most",
                PortableTile {
                    threads_r: 1024,
                    threads_c: 1024,
                    rows: 1024,
                    quads: 1024,
                    k_step: 1024,
                    n_step: 1024,
                    loops: LoopHints::NONE,
                },
            ),
            (
                "huge",
                PortableTile {
                    threads_r: huge,
                    threads_c: huge,
                    rows: huge,
                    quads: huge,
                    k_step: huge,
                    n_step: huge,
                    loops: LoopHints::NONE,
                },
            ),
        ] {
            let pass = Pass::with_tiles(kernel, &problem, device, tiles);
            assert!(matches!(pass, Err(Error::NoKernel { .. })), "{why}: {pass:?}");
        }
    }
}

/// Tiles of decoding that nobody should ask for are errors, before anything is computed from their numbers.
#[test]
fn strange_decode_tiles_are_refused() {
    let device = &Capabilities::samples()[0];
    let config = CacheConfig::new(CacheKind::Contiguous { capacity: 300 }, 1, 2, 64).dtype(DType::F16);
    let portable =
        |threads, lanes, rows, steps, exchanged| DecodeTiles::Portable { threads, lanes, rows, steps, exchanged };
    let cooperative = |rows, columns, ahead| DecodeTiles::Cooperative { rows, columns, ahead };
    let fragments = |key_parts, row_parts, rows, columns, ahead| DecodeTiles::Fragments {
        key_parts,
        row_parts,
        rows,
        columns,
        ahead,
    };
    for (tiles, splits) in [
        (portable(32, 0, 1, 2, 2), 8),
        (portable(0, 4, 1, 2, 2), 8),
        (portable(32, 4, 0, 2, 2), 8),
        (portable(32, 4, 1, 0, 2), 8),
        (portable(32, 4, 1, 2, 0), 8),
        (portable(32, 4, 1, 2, 2), 0),
        (portable(u32::MAX, u32::MAX, u32::MAX, u32::MAX, u32::MAX), u32::MAX),
        (cooperative(0, 1, 1), 8),
        (cooperative(8, 0, 1), 8),
        (cooperative(8, 1, 0), 8),
        (cooperative(8, 1, 1), 0),
        (cooperative(u32::MAX, u32::MAX, u32::MAX), u32::MAX),
        (fragments(0, 1, 8, 1, 1), 8),
        (fragments(1, 0, 8, 1, 1), 8),
        (fragments(3, 1, 8, 1, 1), 8),
        (fragments(8, 4, 8, 1, 1), 8),
        (fragments(1, 1, 0, 1, 1), 8),
        (fragments(1, 1, 24, 1, 1), 8),
        (fragments(1, 1, 80, 1, 1), 8),
        (fragments(1, 1, 8, 0, 1), 8),
        (fragments(1, 1, 8, 1, 0), 8),
        (fragments(1, 1, 8, 1, 1), 0),
        (fragments(u32::MAX, u32::MAX, u32::MAX, u32::MAX, u32::MAX), u32::MAX),
    ] {
        let mut decode = Decode::new(4, Options::new().dtype(DType::F16));
        decode.tiling = Some(DecodeTiling { tiles, splits });
        let plan = Plan::decode(&config, &decode, device, MicroKernel::Auto);
        assert!(matches!(plan, Err(Error::NoKernel { .. })), "{tiles:?}, {splits}: {plan:?}");
    }
}

/// Devices that offer none of something: plans of them are errors, or do without; and so it is with a plan for a better one.
#[test]
fn nothing_is_divided_by_what_a_device_does_not_offer() {
    let zero: [fn(&mut Capabilities); 14] = [
        |device| device.workgroup_bytes = 0,
        |device| device.workgroup_threads = 0,
        |device| device.grid_dimension = 0,
        |device| device.storage_buffers = 0,
        |device| device.binding_bytes = 0,
        |device| device.buffer_bytes = 0,
        |device| device.offset_alignment = 0,
        |device| device.loop_iterations = Some(0),
        |device| device.multiprocessor = device.multiprocessor.map(|m| m.workgroup_bytes(0)),
        |device| device.multiprocessor = device.multiprocessor.map(|m| m.registers(0)),
        |device| device.multiprocessor = device.multiprocessor.map(|m| m.count(0)),
        |device| device.cooperative = device.cooperative.map(|c| c.side(0)),
        |device| device.cooperative = device.cooperative.map(|c| c.lanes(0)),
        |device| device.cooperative = device.cooperative.map(|c| c.side(0).lanes(0)),
    ];
    let options = Options::new().causal(true).sink_logits(SinkLogits::PerHead);
    let mut refused = 0;
    for device in Capabilities::samples() {
        for dtype in [DType::F32, DType::F16] {
            let problem = problem([1, 4, 2], [300, 300], [64, 64], options.dtype(dtype));
            for zero in zero {
                let mut lacking = device.clone();
                zero(&mut lacking);
                for micro_kernel in [&[MicroKernel::Auto][..], &MicroKernel::ALL].concat() {
                    let preference = Preference::default().micro_kernel(micro_kernel);
                    let optional = OptionalOperands::default();
                    let plans = [
                        Plan::forward_with(&problem, optional, &lacking, &preference),
                        Plan::backward_with(&problem, optional, &lacking, &preference),
                        Plan::merge(&problem, 3, true, optional, &lacking),
                    ];
                    for plan in plans {
                        let dispatches = plan.and_then(|plan| plan.dispatches(&problem, &lacking, None));
                        refused += usize::from(dispatches.is_err());
                        let gridless = lacking.grid_dimension == 0;
                        assert!(!gridless || dispatches.is_err(), "{}: {dispatches:?}", lacking.name);
                    }
                    let config = CacheConfig::new(CacheKind::Contiguous { capacity: 300 }, 1, 2, 64).dtype(dtype);
                    let decode = Decode::new(4, options.dtype(dtype));
                    let plan = Plan::decode(&config, &decode, &lacking, micro_kernel);
                    assert!(lacking.grid_dimension > 0 || plan.is_err(), "{}: {plan:?}", lacking.name);
                }
                for tiling in Tiling::candidates(Kernel::FORWARD, &problem, &device, MicroKernel::Auto) {
                    let _ = Pass::with_tiles(Kernel::FORWARD, &problem, &lacking, tiling);
                }
                let _ = Tiling::candidates(Kernel::FORWARD, &problem, &lacking, MicroKernel::Auto);
                let plan = Plan::forward(&problem, &device).unwrap();
                let _ = plan.dispatches(&problem, &lacking, Some(std::time::Duration::ZERO));
                let resident = plan.passes.iter().filter_map(|pass| pass.resident_workgroups(&lacking));
                assert!(resident.min() != Some(0));
            }
        }
    }
    assert!(refused > 100, "{refused}");
    let none = Capabilities::samples()[0].clone().grid_dimension(0);
    let problem = problem([1, 4, 2], [300, 300], [64, 64], options);
    let error = Plan::forward(&problem, &none).unwrap_err();
    assert!(matches!(error, Error::TooManyWorkgroups { most: 0, .. }), "{error}");
}

/// Tiles with a side of 0 are refused, whatever else they are.
/// A measured device is not cut by the rate of the slowest one of its class: dispatches of a long sequence fill it.
#[test]
fn long_sequences_fill_a_measured_device() {
    let problem = problem([1, 32, 8], [65_536, 65_536], [128, 128], Options::new().causal(true).dtype(DType::F16));
    let optional = OptionalOperands::for_training(&problem);
    let measured = Capabilities::samples().swap_remove(0);
    assert!(measured.name.contains("H200"));
    let other = measured.clone().name("NVIDIA of no name");
    let most = |device: &Capabilities| {
        let plans = [Plan::forward_with, Plan::backward_with].map(|plan| {
            let plan = plan(&problem, optional, device, &Preference::default()).unwrap();
            let dispatches = plan.dispatches(&problem, device, None).unwrap();
            // The fallback has hardly ever anything to do.
            let passes = plan.passes.iter().zip(dispatches).filter(|(pass, _)| pass.variant.fallback.is_none());
            passes.map(|(_, dispatches)| dispatches).collect::<Vec<_>>()
        });
        plans.concat().into_iter().max().unwrap()
    };
    let part = measured.clone().name("NVIDIA H200 MIG 1g.18gb");
    let [measured, other, part] = [measured, other, part].map(|device| most(&device));
    assert!(measured <= 8 && other >= 5 * measured, "{measured} dispatches, {other} on another device");
    assert_eq!(other, part, "a seventh of the device has not its rate");
}

#[test]
fn tiles_without_a_side_are_refused() {
    let device = &Capabilities::samples()[0];
    let good =
        PortableTile { threads_r: 16, threads_c: 8, rows: 4, quads: 1, k_step: 8, n_step: 16, loops: LoopHints::NONE };
    let problem = problem([1, 4, 2], [300, 300], [64, 64], Options::new().dtype(DType::F16));
    let zero: [fn(&mut PortableTile); 6] = [
        |tiles| tiles.threads_r = 0,
        |tiles| tiles.threads_c = 0,
        |tiles| tiles.rows = 0,
        |tiles| tiles.quads = 0,
        |tiles| tiles.k_step = 0,
        |tiles| tiles.n_step = 0,
    ];
    let cooperative = |[subgroups, rows, columns, stages]: [u32; 4]| Tiling::Cooperative {
        subgroups,
        rows,
        columns,
        stages,
        loops: LoopHints::NONE,
    };
    let fragments = |[subgroups, rows, columns, chunk]: [u32; 4]| Tiling::Fragments {
        subgroups,
        rows,
        columns,
        chunk,
        loops: LoopHints::NONE,
    };
    let mut all: Vec<Tiling> = (0..4)
        .flat_map(|axis| {
            let mut numbers = [4, 1, 1, 1];
            numbers[axis] = 0;
            [cooperative(numbers), fragments(numbers)]
        })
        .collect();
    all.extend(zero.map(|zero| {
        let mut tiles = good;
        zero(&mut tiles);
        Tiling::Portable(tiles)
    }));
    for tiling in all {
        for kernel in [Kernel::FORWARD, Kernel::D_Q, Kernel::D_KV] {
            assert!(Pass::with_tiles(kernel, &problem, device, tiling).is_err(), "{tiling}");
        }
    }
}
