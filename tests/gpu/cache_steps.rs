//! What was recorded and never ran has not happened: steps that are dropped, refused, or open.

use crate::common::caches::{config, decode_on, filled, read, step_on, submit};
use crate::common::gpu;
use sink_attention::cache::{
    AppendBuffers, CacheConfig, CacheKind, Decode, DecodeBuffers, DecodeOperands, KvCache, Prefill, PrefillBuffers,
    PreparedAppend, PreparedDecode, Rotary, RotaryPositions, RotaryStyle, Step,
};
use sink_attention::wgpu;
use sink_attention::{Attention, Device, Error, Options, Result, cpu};

const SEQUENCES: usize = 2;
const WIDTH: usize = 16;
const CONTIGUOUS: CacheKind = CacheKind::Contiguous { capacity: 40 };
const PAGED: CacheKind = CacheKind::Paged { page_size: 16, pages: 8, sequence_pages: 4 };
const KINDS: [CacheKind; 3] = [CONTIGUOUS, PAGED, CacheKind::Rolling { sink_tokens: 2, window: 8, queries: 2 }];

/// A cache of which keys are 0, so that o is the mean of the values.
struct Rig {
    attention: Attention,
    device: Device,
    cache: KvCache,
    v: wgpu::Buffer,
    o: wgpu::Buffer,
    append: PreparedAppend,
    decode: PreparedDecode,
}

fn of_rig(kind: CacheKind) -> CacheConfig {
    config::<f32>(kind, 1, [WIDTH; 2]).sequences(SEQUENCES)
}

impl Rig {
    fn new(attention: &Attention, kind: CacheKind) -> Self {
        let device = attention.device().unwrap().clone();
        let cache = attention.create_cache(&of_rig(kind)).unwrap();
        let [q, k, v, o, lse] = [0; 5].map(|_| filled(&device, &[0f32; SEQUENCES * WIDTH]));
        let append = cache.prepare_append(&[1; SEQUENCES], &AppendBuffers::new(&k, &v)).unwrap();
        let decode = cache.prepare_decode(&Decode::new(1, Options::new()), &DecodeBuffers::new(&q, &o, &lse)).unwrap();
        Rig { attention: attention.clone(), device, cache, v, o, append, decode }
    }

    fn step(&self) -> Step {
        self.attention.step().unwrap()
    }

    /// For what is submitted from now on.
    fn set(&self, value: f32) {
        self.device.queue().write_buffer(&self.v, 0, bytemuck::cast_slice(&[value; SEQUENCES * WIDTH]));
    }

    fn token(&mut self, value: f32) -> Result<()> {
        self.set(value);
        let mut step = self.step();
        self.append.encode(&mut self.cache, &mut step)?;
        step.submit().map(|_| ())
    }

    /// Of all sequences, which have the same tokens.
    #[track_caller]
    fn has(&self, tokens: &[f32]) {
        let mut step = self.step();
        self.decode.encode(&self.cache, &mut step).unwrap();
        step.submit().unwrap();
        let mean = if tokens.is_empty() { 0.0 } else { tokens.iter().sum::<f32>() / tokens.len() as f32 };
        for (sequence, row) in read::<f32>(&self.device, &self.o, SEQUENCES * WIDTH).chunks(WIDTH).enumerate() {
            assert!(row.iter().all(|x| (x - mean).abs() < 1e-5), "sequence {sequence}: {row:?}, wanted {mean}");
        }
        assert_eq!(self.cache.lengths(), [tokens.len(); SEQUENCES]);
    }

    fn pages(&self) -> (Vec<u32>, Vec<u32>, usize) {
        (self.cache.pages(0).to_vec(), self.cache.pages(1).to_vec(), self.cache.free_pages())
    }
}

#[track_caller]
fn says<T>(result: Result<T>, text: &str) {
    match result {
        Ok(_) => panic!("is accepted, wanted {text:?}"),
        Err(error) => assert!(error.to_string().contains(text), "{error}, wanted {text:?}"),
    }
}

#[test]
fn a_dropped_step_has_not_happened() {
    let Some(attention) = gpu() else { return };
    for kind in KINDS {
        let mut rig = Rig::new(attention, kind);
        for n in 0..5 {
            rig.token(n as f32).unwrap();
        }
        let pages = rig.pages();
        let mut step = rig.step();
        for n in 0..3 {
            rig.append.encode(&mut rig.cache, &mut step).unwrap();
            assert_eq!(rig.cache.lengths(), [6 + n; 2], "as recorded so far");
        }
        drop(step);
        assert_eq!(rig.cache.lengths(), [5; 2]);
        assert_eq!(rig.pages(), pages);
        rig.has(&[0.0, 1.0, 2.0, 3.0, 4.0]);
        rig.token(5.0).unwrap();
        rig.has(&[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
        // An operation of a future that is never polled is dropped with it.
        let mut step = rig.step();
        rig.append.encode(&mut rig.cache, &mut step).unwrap();
        drop(step.submit_async());
        rig.has(&[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
    }
}

/// The README's loop, where the second call fails now and then.
#[test]
fn a_loop_whose_decoding_fails() {
    let Some(attention) = gpu() else { return };
    for kind in KINDS {
        let mut rig = Rig::new(attention, kind);
        let other = Rig::new(attention, kind);
        let mut token = |value: f32, fails: bool| -> Result<()> {
            rig.set(value);
            let mut step = rig.attention.step()?;
            rig.append.encode(&mut rig.cache, &mut step)?;
            (if fails { &other.decode } else { &rig.decode }).encode(&rig.cache, &mut step)?;
            step.submit()?;
            Ok(())
        };
        for n in 0..6 {
            let value = n as f32;
            if n % 2 == 1 {
                assert!(matches!(token(value, true), Err(Error::OtherCache)));
            }
            token(value, false).unwrap();
        }
        rig.has(&[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
    }
}

#[test]
fn one_open_step_at_a_time() {
    let Some(attention) = gpu() else { return };
    for kind in KINDS {
        let mut rig = Rig::new(attention, kind);
        rig.token(1.0).unwrap();
        let (mut first, mut second) = (rig.step().label("first"), rig.step().label("second"));
        rig.append.encode(&mut rig.cache, &mut first).unwrap();
        let busy = "(first), which is open: submit or drop it first";
        says(rig.append.encode(&mut rig.cache, &mut second), busy);
        says(rig.decode.encode(&rig.cache, &mut second), busy);
        let mut pass = second.begin_compute_pass(&Default::default());
        says(rig.append.encode_in(&mut rig.cache, &mut pass), busy);
        says(rig.decode.encode_in(&rig.cache, &mut pass), busy);
        drop(pass);
        says(rig.cache.truncate(&mut second, 0, 0), busy);
        says(rig.cache.fork(&mut second, 0, 1), busy);
        says(rig.cache.reserve(&mut second, &[1, 1]), busy);
        assert_eq!(rig.cache.lengths(), [2; 2]);
        rig.set(3.0);
        first.submit().unwrap();
        rig.has(&[1.0, 3.0]);
        // The other one has touched nothing so far.
        rig.append.encode(&mut rig.cache, &mut second).unwrap();
        rig.set(5.0);
        second.submit().unwrap();
        rig.has(&[1.0, 3.0, 5.0]);
        // A step that only reads is open as well: a later append would be in front of it.
        let mut reads = rig.step().label("reads");
        rig.decode.encode(&rig.cache, &mut reads).unwrap();
        says(rig.token(7.0), "(reads), which is open");
        drop(reads);
        rig.token(7.0).unwrap();
        rig.has(&[1.0, 3.0, 5.0, 7.0]);
    }
}

#[test]
fn a_step_of_another_device() {
    let Some(attention) = crate::common::buffers::gpu_with(|_| ()) else { return };
    let mut rig = Rig::new(gpu().unwrap(), PAGED);
    let mut foreign = attention.step().unwrap().label("foreign");
    says(rig.append.encode(&mut rig.cache, &mut foreign), "(foreign) and the cache are of different devices");
    says(rig.decode.encode(&rig.cache, &mut foreign), "different devices");
    says(rig.cache.truncate(&mut foreign, 0, 0), "different devices");
    foreign.submit().unwrap();
    rig.token(2.0).unwrap();
    rig.has(&[2.0]);
    says(Attention::cpu().step(), "step needs a GPU");
}

/// wgpu refuses a submission with a buffer that was destroyed.
#[test]
fn a_refused_submission_has_not_happened() {
    let Some(attention) = gpu() else { return };
    for kind in KINDS {
        let mut rig = Rig::new(attention, kind);
        rig.token(4.0).unwrap();
        let [k, v] = [0; 2].map(|_| filled(&rig.device, &[9f32; SEQUENCES * WIDTH]));
        let append = rig.cache.prepare_append(&[1; 2], &AppendBuffers::new(&k, &v)).unwrap();
        v.destroy();
        let mut step = rig.step();
        append.encode(&mut rig.cache, &mut step).unwrap();
        let error = step.submit().unwrap_err();
        assert!(matches!(error, Error::Gpu { during: "submitting a step", .. }), "{error}");
        rig.has(&[4.0]);
        // A mistake of the caller's in the same encoder.
        let mut step = rig.step();
        rig.append.encode(&mut rig.cache, &mut step).unwrap();
        step.encoder().copy_buffer_to_buffer(&rig.v, 0, &rig.v, 0, 1 << 20);
        says(step.submit(), "submitting a step");
        rig.has(&[4.0]);
        rig.token(6.0).unwrap();
        rig.has(&[4.0, 6.0]);
    }
}

/// All layers of a model, and passes of the caller's in between.
#[test]
fn many_caches_in_one_step() {
    let Some(attention) = gpu() else { return };
    let mut rigs: Vec<Rig> = KINDS.iter().cycle().take(9).map(|kind| Rig::new(attention, *kind)).collect();
    let mut tokens = Vec::new();
    for n in 0..8 {
        let mut step = attention.step().unwrap();
        let value = filled(&rigs[0].device, &[n as f32; SEQUENCES * WIDTH]);
        for rig in &mut rigs {
            step.encoder().copy_buffer_to_buffer(&value, 0, &rig.v, 0, value.size());
            rig.append.encode(&mut rig.cache, &mut step).unwrap();
        }
        if n % 3 == 1 {
            drop(step);
        } else {
            step.submit().unwrap();
            tokens.push(n as f32);
        }
    }
    rigs.iter().for_each(|rig| rig.has(&tokens));
    // A cache may be gone before its step.
    let mut step = attention.step().unwrap();
    let mut gone = rigs.pop().unwrap();
    gone.append.encode(&mut gone.cache, &mut step).unwrap();
    drop(gone);
    let rig = &mut rigs[0];
    rig.set(1.0);
    rig.append.encode(&mut rig.cache, &mut step).unwrap();
    step.submit().unwrap();
    tokens.push(1.0);
    rig.has(&tokens);
}

type Change<'a> = &'a dyn Fn(&mut Rig, &mut Step) -> Result<()>;

/// Whatever changes lengths and pages.
#[test]
fn every_change_is_taken_back() {
    let Some(attention) = gpu() else { return };
    let device = attention.device().unwrap();
    for kind in KINDS {
        let mut rig = Rig::new(attention, kind);
        for n in 0..20 {
            rig.token(n as f32).unwrap();
        }
        let decode = Decode::new(1, Options::new());
        let output = |cache: &KvCache| {
            decode_on(device, cache, &decode, &[0f32; 32], [32, 2], &DecodeOperands::default()).unwrap()
        };
        let (pages, before) = (rig.pages(), output(&rig.cache));
        let [q, k, v, o] = [0; 4].map(|_| filled(device, &[7f32; 4 * WIDTH]));
        let lse = filled(device, &[0f32; 4]);
        let prefill = Prefill::new(1, [4, 0], Options::new().causal(true));
        let prefill = rig.cache.prepare_prefill(&prefill, &PrefillBuffers::new(&q, &k, &v, &o, &lse)).unwrap();
        let changes: [Change<'_>; 6] = [
            &|rig, step| rig.cache.truncate(step, 0, rig.cache.lengths()[0] - 1),
            &|rig, step| rig.cache.truncate(step, 1, 0),
            &|rig, step| rig.cache.fork(step, 0, 1).and_then(|()| rig.append.encode(&mut rig.cache, step)),
            &|rig, step| rig.cache.reserve(step, &[13, 0]),
            &|rig, step| prefill.encode(&mut rig.cache, step),
            &|rig, step| match kind {
                PAGED => rig.cache.assign(step, 0, &[5, 6], 30).and_then(|()| rig.append.encode(&mut rig.cache, step)),
                _ => rig.append.encode(&mut rig.cache, step),
            },
        ];
        for (n, change) in changes.iter().enumerate() {
            let mut step = rig.step();
            change(&mut rig, &mut step).unwrap();
            drop(step);
            assert_eq!((rig.cache.lengths(), rig.pages()), (&[20; 2][..], pages.clone()), "change {n} of {kind:?}");
            assert!(output(&rig.cache) == before, "change {n} of {kind:?}");
        }
        // All of them, one after the other in one step.
        let mut step = rig.step();
        for change in [4, 0, 2, 3, 1, 5] {
            changes[change](&mut rig, &mut step).unwrap();
        }
        drop(step);
        assert_eq!((rig.cache.lengths(), rig.pages()), (&[20; 2][..], pages), "{kind:?}");
        assert!(output(&rig.cache) == before, "{kind:?}");
        // And once for good: a prefill that was prepared before is for these lengths.
        submit(device, |step| prefill.encode(&mut rig.cache, step).unwrap());
        assert_eq!(rig.cache.lengths(), [24, 20]);
        let mut step = rig.step();
        says(prefill.encode(&mut rig.cache, &mut step), "it had 20 tokens, it has 24");
    }
}

#[test]
fn files_and_open_steps() {
    let Some(attention) = gpu() else { return };
    for kind in KINDS {
        let mut rig = Rig::new(attention, kind);
        rig.token(1.0).unwrap();
        let file = rig.cache.to_safetensors().unwrap();
        let mut step = rig.step().label("open");
        // Reading changes nothing, but was recorded for what is there.
        rig.decode.encode(&rig.cache, &mut step).unwrap();
        assert!(rig.cache.to_safetensors().unwrap() == file);
        says(rig.cache.restore(&file), "(open), which is open");
        rig.append.encode(&mut rig.cache, &mut step).unwrap();
        says(rig.cache.to_safetensors(), "(open), which is open");
        says(rig.cache.save(std::env::temp_dir().join("none.safetensors")), "(open), which is open");
        says(rig.cache.restore(&file), "(open), which is open");
        drop(step);
        assert!(rig.cache.to_safetensors().unwrap() == file);
        rig.token(3.0).unwrap();
        assert!(rig.cache.to_safetensors().unwrap() != file);
        rig.cache.restore(&file).unwrap();
        rig.has(&[1.0]);
    }
}

/// Queries that were not rotated with their tokens, or not all heads of them, on both devices.
#[test]
fn queries_that_were_not_rotated() {
    let rotary = Rotary { dim: 8, style: RotaryStyle::HalfSplit, positions: RotaryPositions::Absolute };
    let config = of_rig(CONTIGUOUS).rotary(rotary);
    let table = [0.5f32; 40 * 8];
    let token = [1f32; SEQUENCES * WIDTH];
    let decode = |heads| Decode::new(heads, Options::new().causal(true));
    let q_of = |heads: usize, queries: usize| vec![1f32; SEQUENCES * heads * queries * WIDTH];
    let text = |queries, heads, tokens, rotated| {
        format!(
            "the rotated queries of the last {queries} tokens of sequence 0 with {heads} heads; appends have rotated \
             those of {tokens} tokens with {rotated} heads"
        )
    };
    let mut on_cpu = cpu::KvCache::new(&config).unwrap();
    let mut on_gpu = gpu().map(|attention| (attention.device().unwrap(), attention.create_cache(&config).unwrap()));
    // Heads whose queries come with a token, then queries and heads that are decoded, and what both say.
    for (given, queries, heads, wanted) in [
        (None, 1, 4, Some(text(1, 4, 0, 0))),
        (Some(2), 1, 4, Some(text(1, 4, 1, 2))),
        (Some(4), 1, 4, None),
        (Some(4), 2, 4, None),
        (Some(4), 4, 4, Some(text(4, 4, 3, 4))),
        (None, 1, 4, Some(text(1, 4, 0, 0))),
    ] {
        let mut q = q_of(given.unwrap_or(0), 1);
        on_cpu.append(&[1; 2], &token, &token, given.map(|_| &mut q[..]), Some(&table)).unwrap();
        let decode = decode(heads).queries(queries);
        let found = on_cpu
            .decode(&decode, &q_of(heads, queries), &DecodeOperands::default())
            .err()
            .map(|error| error.to_string());
        assert_eq!(found.is_some(), wanted.is_some(), "{found:?}, wanted {wanted:?}");
        assert!(found.iter().zip(&wanted).all(|(found, wanted)| found.contains(wanted)), "{found:?}, {wanted:?}");
        on_cpu.decode(&decode.clone().q_rotated(true), &q_of(heads, queries), &DecodeOperands::default()).unwrap();
        let Some((device, cache)) = &mut on_gpu else { continue };
        let [k, v, cos_sin] = [&token[..], &token, &table].map(|x| filled(device, x));
        let q = filled(device, &q_of(given.unwrap_or(1), 1));
        let buffers = AppendBuffers::new(&k, &v).q(given.map(|heads| ((&q).into(), heads))).cos_sin(&cos_sin);
        let append = cache.prepare_append(&[1; 2], &buffers).unwrap();
        submit(device, |step| append.encode(cache, step).unwrap());
        let lens = [SEQUENCES * heads * queries * WIDTH, SEQUENCES * heads * queries];
        let on = |decode| decode_on(device, cache, decode, &q_of(heads, queries), lens, &DecodeOperands::default());
        assert_eq!(on(&decode).err().map(|error| error.to_string()), found);
        on(&decode.clone().q_rotated(true)).unwrap();
    }
    // What was taken back counts no more.
    let mut q = q_of(4, 1);
    on_cpu.append(&[1; 2], &token, &token, Some(&mut q), Some(&table)).unwrap();
    on_cpu.decode(&decode(4), &q_of(4, 1), &DecodeOperands::default()).unwrap();
    (0..2).for_each(|sequence| on_cpu.truncate(sequence, 6).unwrap());
    says(on_cpu.decode(&decode(4), &q_of(4, 1), &DecodeOperands::default()), &text(1, 4, 0, 0));
}

/// More sequences, key heads and rows than a dimension of a grid has workgroups, whatever the device says that is.
#[test]
fn more_sequences_than_a_grid_is_long() {
    fn run(attention: &Attention, sequences: usize, kv_heads: usize, kind: CacheKind) {
        let device = attention.device().unwrap();
        let config = CacheConfig::new(kind, sequences, kv_heads, 4).value_dim(1);
        let mut cache = attention.create_cache(&config).unwrap();
        let heads = 2 * kv_heads;
        let tokens = sequences * kv_heads;
        let values: Vec<f32> = (0..tokens).map(|n| n as f32).collect();
        let [k, v] = [&vec![0.0; 4 * tokens][..], &values].map(|x| filled(device, x));
        let append = cache.prepare_append(&vec![1; sequences], &AppendBuffers::new(&k, &v)).unwrap();
        submit(device, |step| append.encode(&mut cache, step).unwrap());
        let decode = Decode::new(heads, Options::new());
        let q = vec![0f32; sequences * heads * 4];
        let lens = [sequences * heads; 2];
        let output = decode_on(device, &cache, &decode, &q, lens, &DecodeOperands::default()).unwrap();
        assert!(output.o.iter().enumerate().all(|(n, o)| *o == (n / 2) as f32), "{:?}", &output.o[..16]);
        assert!(output.lse.iter().all(|lse| *lse == 0.0));
    }
    let Some(attention) = gpu() else { return };
    run(attention, 70_000, 1, CacheKind::Contiguous { capacity: 1 });
    let Some(small) = crate::common::buffers::gpu_with(|limits| limits.max_compute_workgroups_per_dimension = 16)
    else {
        return;
    };
    let paged = CacheKind::Paged { page_size: 16, pages: 40, sequence_pages: 1 };
    for (sequences, kv_heads, kind) in [(40, 2, paged), (5, 20, CacheKind::Contiguous { capacity: 3 })] {
        run(&small, sequences, kv_heads, kind);
    }
    // Rows of one key head are the first dimension alone.
    let cache = small.create_cache(&CacheConfig::new(CacheKind::Contiguous { capacity: 1 }, 1, 1, 4)).unwrap();
    let device = small.device().unwrap();
    let [q, o, lse] = [0; 3].map(|_| filled(device, &[0f32; 1200]));
    let buffers = DecodeBuffers::new(&q, &o, &lse);
    says(cache.prepare_decode(&Decode::new(300, Options::new()), &buffers), "workgroups, a dispatch numbers at most");
    says(
        small
            .create_cache(&CacheConfig::new(CacheKind::Contiguous { capacity: 1 }, 300, 1, 4))
            .unwrap()
            .prepare_decode(&Decode::new(1, Options::new()), &buffers),
        "needs 300 workgroups, a dispatch numbers at most 256",
    );
}

/// Chunks of many sequences are gathered run by run.
#[test]
fn more_runs_than_a_grid_is_long() {
    let Some(small) = crate::common::buffers::gpu_with(|limits| limits.max_compute_workgroups_per_dimension = 24)
    else {
        return;
    };
    let device = small.device().unwrap();
    let kind = CacheKind::Paged { page_size: 16, pages: 60, sequence_pages: 1 };
    let mut cache = small.create_cache(&CacheConfig::new(kind, 60, 1, 4)).unwrap();
    let values: Vec<f32> = (0..240).map(|n| (n / 4) as f32).collect();
    let [q, k, v, o, lse] = [&[0.0; 240][..], &[0.0; 240], &values, &[0.0; 240], &[0.0; 60]].map(|x| filled(device, x));
    let append = cache.prepare_append(&[1; 60], &AppendBuffers::new(&k, &v)).unwrap();
    submit(device, |step| append.encode(&mut cache, step).unwrap());
    let prefill = Prefill::new(1, [1; 60], Options::new().causal(true));
    let prefill = cache.prepare_prefill(&prefill, &PrefillBuffers::new(&q, &k, &v, &o, &lse)).unwrap();
    let mut step = step_on(device);
    prefill.encode(&mut cache, &mut step).unwrap();
    step.submit().unwrap();
    assert_eq!(read::<f32>(device, &o, 240), values);
}
