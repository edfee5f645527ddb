//! Hints for loops: kernels that go to the driver as SPIR-V of this crate, past wgpu.

use crate::common;
use crate::common::with_others;
use sink_attention::plan::{Kernel, LoopHints, MicroKernel, OptionalOperands, Pass, Plan, Preference, SpirvVersion};
use sink_attention::testing::gradients::Backward;
use sink_attention::testing::operands::problem;
use sink_attention::testing::spirv::mended;
use sink_attention::tuning::{Tuning, TuningKey};
use sink_attention::{Attention, Axes, DType, Error, Options, Problem, SinkLogits, Window, device, wgpu};

const KERNELS: [Kernel; 5] = [Kernel::FORWARD, Kernel::EXACT_DELTA, Kernel::D_Q, Kernel::D_KV, Kernel::D_BIAS];

/// The planned tiles of both passes, each with hints as far as its kernel has these loops.
fn hinted(attention: &Attention, problem: &Problem, hints: LoopHints) -> Tuning {
    let passes = [attention.plan_forward(problem), attention.plan_backward(problem)].map(|plan| plan.unwrap().passes);
    let mut tuning = Tuning::new(&attention.device().unwrap().capabilities().name, "");
    for pass in passes.concat().iter().filter(|pass| KERNELS.contains(&pass.variant.kernel)) {
        let key = TuningKey::of(pass.variant.kernel, problem);
        if let (Some(key), Some(tiling)) = (key, pass.variant.tiling)
            && tuning.get(&key).is_none()
        {
            tuning.insert(key, tiling.with_loops(hints));
        }
    }
    tuning
}

/// The version of SPIR-V that the device takes. Every Vulkan driver takes some, unless wgpu's checks are asked for.
fn version(attention: &Attention) -> Option<SpirvVersion> {
    let device = attention.device().unwrap();
    let expected =
        device.wgpu().adapter_info().backend == wgpu::Backend::Vulkan && cfg!(not(feature = "checked-shaders"));
    assert_eq!(device.capabilities().spirv.is_some(), expected, "{}", device.capabilities().name);
    device.capabilities().spirv
}

fn loops(pass: &Pass) -> LoopHints {
    pass.variant.tiling.map_or(LoopHints::NONE, |tiling| tiling.loops())
}

fn same_bits(attention: &Attention, problem: &Problem, seed: u64, hints: &[&str]) {
    let case = Backward::random(problem, seed);
    let plain = attention.forward(problem, &case.operands.inputs()).unwrap();
    let gradients = case.run_with(attention, problem, &plain);
    for text in hints {
        let hints: LoopHints = text.parse().unwrap();
        let tuned = attention.clone().with_tuning(hinted(attention, problem, hints)).unwrap();
        let plans = [tuned.plan_forward(problem), tuned.plan_backward(problem)].map(|plan| plan.unwrap().passes);
        let with_hints = plans.concat().iter().filter(|pass| loops(pass) == hints).count();
        assert!(with_hints >= 3, "{with_hints} kernels with {text}");
        let output = tuned.forward(problem, &case.operands.inputs()).unwrap();
        assert_eq!((&output.o, &output.lse), (&plain.o, &plain.lse), "{problem}, {text}");
        let found = case.run_with(&tuned, problem, &plain);
        let [found, expected] = [&found, &gradients].map(|x| (&x.d_q, &x.d_k, &x.d_v, &x.d_sink_logits, &x.d_bias));
        assert_eq!(found, expected, "{problem}, {text}");
    }
}

#[test]
fn hints_change_no_bit() {
    let Some(attention) = common::gpu() else { return };
    if version(attention).is_none() {
        return;
    }
    let causal = Options::new().causal(true).sink_logits(SinkLogits::PerHead);
    let plain = problem([1, 4, 2], [70, 90], [20, 20], causal);
    same_bits(
        attention,
        &plain,
        5,
        &with_others(["loops unroll"], ["loops keep", "loops inner unroll", "loops tiles keep"]),
    );
    let window = problem([1, 2, 1], [100, 140], [12, 12], causal.window(Window::keys(40)));
    same_bits(attention, &window, 6, &["loops keep inner unroll"]);
    // A kernel more, and a loop in another place.
    same_bits(attention, &problem([1, 2, 1], [70, 70], [16, 16], causal.bias(Axes::ALL)), 7, &["loops keep"]);
}

/// The cooperative kernels, their second runs among them.
#[test]
fn hints_change_no_bit_of_cooperative_kernels() {
    let Some(attention) = &common::cooperative() else { return };
    if version(attention).is_none() {
        return;
    }
    let options = Options::new().causal(true).sink_logits(SinkLogits::PerHead).dtype(DType::F16);
    let problem = problem([1, 4, 2], [90, 90], [16, 16], options);
    let case = Backward::random(&problem, 8).cast::<sink_attention::half::f16>();
    let compute = |attention: &Attention| {
        let output = attention.forward(&problem, &case.operands.inputs()).unwrap();
        let gradients = case.run_with(attention, &problem, &output);
        (output.o, output.lse, gradients.d_q, gradients.d_k, gradients.d_v)
    };
    let plain = compute(attention);
    for text in ["loops keep", "loops tiles unroll"] {
        let hints: LoopHints = text.parse().unwrap();
        let tuned = attention.clone().with_tuning(hinted(attention, &problem, hints)).unwrap();
        let plan = tuned.plan_forward(&problem).unwrap();
        let with_hints = plan.passes.iter().filter(|pass| loops(pass) == hints).count();
        assert_eq!(with_hints, 2, "{plan:?}");
        assert!(compute(&tuned) == plain, "{text}");
    }
}

/// Nothing is left out in silence: neither by a plan nor by what compiles one that was made for another device.
#[test]
fn a_device_that_takes_no_spirv_refuses_hints() {
    let Some(attention) = common::gpu() else { return };
    let problem = problem([1, 2, 1], [70, 70], [16, 16], Options::new());
    let opened = attention.device().unwrap().capabilities();
    let name = &opened.name;
    let (with, without) = (opened.clone().spirv(SpirvVersion { major: 1, minor: 3 }), opened.clone().spirv(None));
    let tiles = Plan::forward(&problem, &without).unwrap().passes[0].variant.tiling.unwrap();
    let hinted = tiles.with_loops("loops keep".parse().unwrap());
    let error = Pass::with_tiles(Kernel::FORWARD, &problem, &without, hinted).unwrap_err();
    assert!(error.to_string().contains(&format!("SPIR-V, which {name} does not take")), "{error}");
    let foreign: Plan = [Pass::with_tiles(Kernel::FORWARD, &problem, &with, hinted).unwrap()].into_iter().collect();
    let compiled = attention.precompile(&foreign);
    match version(attention) {
        Some(_) => compiled.unwrap(),
        None => assert!(matches!(compiled, Err(Error::Gpu { .. })), "{compiled:?}"),
    }
}

/// Without hints the words are those that wgpu makes, up to what naga leaves out of them. Mesa tells what it gets: from version 25 on it writes each module into the folder that
/// `MESA_SPIRV_DUMP_PATH` names, as tests/core.sh has it.
#[test]
fn the_driver_gets_what_wgpu_makes() {
    let Some(attention) = common::gpu() else { return };
    let (Some(version), Some(folder)) = (version(attention), std::env::var_os("MESA_SPIRV_DUMP_PATH")) else { return };
    // Without names for debuggers, which wgpu has where it is compiled with debug assertions.
    let flags = wgpu::InstanceFlags::empty();
    let descriptor = wgpu::InstanceDescriptor { flags, ..wgpu::InstanceDescriptor::new_without_display_handle() };
    let adapters = pollster::block_on(wgpu::Instance::new(descriptor).enumerate_adapters(wgpu::Backends::VULKAN));
    let capabilities = attention.device().unwrap().capabilities();
    let adapter = adapters.iter().find(|adapter| adapter.get_info().name == capabilities.name).unwrap();
    let (gpu, _queue) = pollster::block_on(adapter.request_device(&device::device_descriptor(adapter))).unwrap();

    let options = Options::new().causal(true).sink_logits(SinkLogits::PerHead);
    for (micro_kernel, dtype) in [(MicroKernel::Portable, DType::F32), (MicroKernel::Cooperative, DType::F16)] {
        if micro_kernel == MicroKernel::Cooperative && capabilities.cooperative.is_none() {
            continue;
        }
        let problem = problem([1, 2, 1], [100, 100], [64, 64], options.dtype(dtype));
        let preference = Preference::default().micro_kernel(micro_kernel);
        let plan = Plan::forward_with(&problem, OptionalOperands::default(), capabilities, &preference).unwrap();
        let variant = plan.passes[0].variant;
        let source = wgpu::ShaderSource::Wgsl(variant.wgsl().unwrap().into());
        let descriptor = wgpu::ShaderModuleDescriptor { label: None, source };
        // SAFETY: a text of the crate's, which never runs.
        let module = unsafe { gpu.create_shader_module_trusted(descriptor, wgpu::ShaderRuntimeChecks::unchecked()) };
        let options =
            wgpu::PipelineCompilationOptions { zero_initialize_workgroup_memory: false, ..Default::default() };
        let _pipeline = gpu.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label: None,
            layout: None,
            module: &module,
            entry_point: Some("main"),
            compilation_options: options,
            cache: None,
        });
        let words = variant.spirv(version).unwrap();
        let written = std::fs::read_dir(&folder).unwrap().map(|entry| std::fs::read(entry.unwrap().path()).unwrap());
        // wgpu's lack what naga leaves out under the memory model that matrices want.
        let is_same = |bytes: &Vec<u8>| mended(&bytemuck::pod_collect_to_vec(bytes)).as_ref() == Ok(&words);
        assert_eq!(written.filter(is_same).count(), 1, "{} words of {}", words.len(), variant.name());
    }
}
