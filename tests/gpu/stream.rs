//! Streams in chunks of any size against the definition of the whole sequence in f64, saved and resumed.

use crate::common::gpu;
use crate::common::shards::rows;
use proptest::prelude::*;
use proptest::test_runner::{Config, RngSeed, TestRunner};
use sink_attention::cpu::reference;
use sink_attention::half::{bf16, f16};
use sink_attention::stream::{Stream, StreamShape};
use sink_attention::testing::operands::{Operands, agree, problem};
use sink_attention::{
    Attention, Axes, DType, Element, Error, Inputs, Layout, Options, Output, Problem, SinkLogits, Window,
};

const TOKENS: usize = 61;
const SHAPE: StreamShape = StreamShape { batch: 2, heads: 4, kv_heads: 2, head_dim: 8, value_dim: 12 };

/// A whole sequence of which a stream gets chunk after chunk.
struct Whole<T> {
    problem: Problem,
    operands: Operands<T>,
}

impl<T: Element> Whole<T> {
    fn new(options: Options) -> Self {
        let problem = problem([2, 4, 2], [TOKENS, TOKENS], [8, 12], options.dtype(T::DTYPE));
        let operands = Operands::random(&problem, 5).cast();
        Whole { problem, operands }
    }

    fn options(&self) -> Options {
        *self.problem.options()
    }

    fn stream(&self) -> Stream<T> {
        Stream::new(SHAPE, self.options()).unwrap()
    }

    /// The tokens of a chunk. q has twice the heads of k, and in bhsd so many more parts.
    fn chunk(&self, tokens: std::ops::Range<usize>) -> Operands<T> {
        let all = &self.operands;
        let groups = if self.options().layout == Layout::Bhsd { 1 } else { self.problem.heads_per_kv() };
        Operands {
            q: rows(&self.problem, &all.q, groups * SHAPE.head_dim, &tokens),
            k: rows(&self.problem, &all.k, SHAPE.head_dim, &tokens),
            v: rows(&self.problem, &all.v, SHAPE.value_dim, &tokens),
            ..all.clone()
        }
    }

    fn update(&self, stream: &mut Stream<T>, attention: &Attention, tokens: usize) -> Output<T> {
        let start = stream.position() as usize;
        let chunk = self.chunk(start..start + tokens);
        let output = stream.update(attention, &chunk.inputs()).unwrap();
        assert_eq!(stream.position() as usize, start + tokens);
        output
    }

    /// Rows of the definition's results.
    fn expected(&self, tokens: std::ops::Range<usize>) -> Output<f64, f64> {
        let whole = reference::forward(&self.problem, &self.operands.inputs()).unwrap();
        let groups = if self.options().layout == Layout::Bhsd { 1 } else { self.problem.heads_per_kv() };
        let o = rows(&self.problem, &whole.o, groups * SHAPE.value_dim, &tokens);
        let lse = whole.lse.chunks(TOKENS).flat_map(|row| row[tokens.clone()].to_vec()).collect();
        Output { o, o_lo: None, lse }
    }

    fn check(&self, tokens: std::ops::Range<usize>, output: &Output<T>) {
        assert_eq!(output.o_lo.is_some(), T::DTYPE.has_rounding_error());
        agree(output, &self.expected(tokens.clone())).unwrap_or_else(|error| panic!("{tokens:?}: {error}"));
    }
}

fn options() -> Vec<Options> {
    let per_head = Options::new().sink_logits(SinkLogits::PerHead);
    vec![
        per_head.window(Window::keys(9)).sink_tokens(3),
        per_head.window(Window::keys(17)).layout(Layout::Bhsd),
        Options::new().causal(true).window(Window::left(0)).sink_tokens(2).sink_logits(SinkLogits::OffByOne),
        // Longer than the stream.
        Options::new().window(Window::keys(200)).sink_tokens(100).layout(Layout::Bhsd),
        per_head.window(Window::keys(5)).sink_tokens(10).alibi(true).softcap(2.0).scale(0.5),
    ]
}

fn follows_the_definition<T: Element>(turn: usize) {
    for (n, options) in options().into_iter().enumerate() {
        let whole = Whole::<T>::new(options);
        let paths = [Some(Attention::cpu()), gpu().cloned().filter(|_| n % 3 == turn)];
        for attention in paths.iter().flatten() {
            for chunks in [&[61][..], &[1, 1, 1, 7, 0, 20, 1, 30], &[2, 2, 2, 55]] {
                let mut stream = whole.stream();
                for &tokens in chunks {
                    let start = stream.position() as usize;
                    let output = whole.update(&mut stream, attention, tokens);
                    if tokens > 0 {
                        whole.check(start..start + tokens, &output);
                    }
                }
                assert_eq!(stream.position(), 61);
            }
        }
    }
}

#[test]
fn f32_streams_follow_the_definition() {
    follows_the_definition::<f32>(0);
}

#[test]
fn f16_streams_follow_the_definition() {
    follows_the_definition::<f16>(1);
}

#[test]
fn bf16_streams_follow_the_definition() {
    follows_the_definition::<bf16>(2);
}

#[test]
fn any_chunks() {
    let config = Config { rng_seed: RngSeed::Fixed(9), failure_persistence: None, ..Config::with_cases(60) };
    let cases = (1..70usize, 0..70usize, any::<bool>(), prop::collection::vec(0..20usize, 1..12));
    let run = |(keys, sink_tokens, bhsd, chunks): (usize, usize, bool, Vec<usize>)| {
        let layout = if bhsd { Layout::Bhsd } else { Layout::Bshd };
        let whole =
            Whole::<f32>::new(Options::new().window(Window::keys(keys)).sink_tokens(sink_tokens).layout(layout));
        let mut stream = whole.stream();
        for tokens in chunks {
            let start = stream.position() as usize;
            let tokens = tokens.min(TOKENS - start);
            let output = whole.update(&mut stream, &Attention::cpu(), tokens);
            if tokens > 0 {
                agree(&output, &whole.expected(start..start + tokens)).map_err(TestCaseError::fail)?;
            }
        }
        Ok(())
    };
    TestRunner::new(config).run(&cases, run).unwrap_or_else(|error| panic!("{error}"));
}

#[test]
fn a_failed_update_loses_nothing() {
    let whole = Whole::<f16>::new(options()[0]);
    let mut stream = whole.stream();
    whole.update(&mut stream, &Attention::cpu(), 20);
    let before = stream.clone();
    let chunk = whole.chunk(20..25);
    let attempts: [(&str, Inputs<'_, f16>); 7] = [
        ("q", Inputs { q: &chunk.q[1..], ..chunk.inputs() }),
        ("k", Inputs { k: &chunk.k[1..], ..chunk.inputs() }),
        ("v", Inputs { v: &[], ..chunk.inputs() }),
        ("k", Inputs { q: &[], ..chunk.inputs() }),
        ("sink_logits", Inputs { sink_logits: None, ..chunk.inputs() }),
        ("sink_logits", Inputs { sink_logits: Some(&[0.0]), ..chunk.inputs() }),
        ("alibi_slopes", Inputs { alibi_slopes: Some(&[0.0; 4]), ..chunk.inputs() }),
    ];
    let no_kernel = Attention::cpu().with_micro_kernel(sink_attention::plan::MicroKernel::Portable);
    for attention in [Attention::cpu(), no_kernel.clone()].iter().chain(gpu()) {
        for (operand, inputs) in &attempts {
            let error = stream.update(attention, inputs).unwrap_err().to_string();
            assert!(error.contains(operand), "{error}");
            assert_eq!(stream, before);
        }
    }
    let error = stream.update(&no_kernel, &chunk.inputs()).unwrap_err();
    assert!(matches!(error, Error::NeedsGpu { .. }), "{error}");
    assert_eq!(stream, before);
    let mut other = before;
    let [a, b] = [&mut stream, &mut other].map(|stream| whole.update(stream, &Attention::cpu(), 5));
    assert_eq!(a, b);
}

#[test]
fn options_that_no_stream_can_have() {
    let good = options()[0];
    let new = |options: Options| Stream::<f32>::new(SHAPE, options).map(|_| ()).unwrap_err();
    for (options, option) in [
        (good.window(Window::FULL).causal(true), "window"),
        (good.window(Window::left(4)), "causal"),
        (good.window(Window::new(4, 1)), "causal"),
        (good.layout(Layout::Thd), "layout"),
        (good.query_offset(0), "query_offset"),
        (good.bias(Axes::KEYS), "bias"),
        (good.mask(Axes::KEYS), "mask"),
        (good.softcap(-1.0), "softcap"),
    ] {
        let error = new(options);
        assert!(matches!(error, Error::InvalidOption { option: o, .. } if o == option), "{error}");
    }
    assert!(matches!(new(good.dtype(DType::F16)), Error::WrongElementType { .. }));
    for window in [Window::new(usize::MAX, 0), Window::new(1 << 29, 0)] {
        assert!(matches!(new(good.window(window)), Error::DimensionTooLarge { most: 0x2000_0000, .. }));
    }
    let shape = StreamShape { heads: 3, ..SHAPE };
    assert!(matches!(Stream::<f32>::new(shape, good), Err(Error::HeadsNotMultiple { heads: 3, kv_heads: 2 })));
    let shape = StreamShape { batch: 0, ..SHAPE };
    assert!(matches!(Stream::<f32>::new(shape, good), Err(Error::ZeroDimension { dimension: "batch" })));
}

#[cfg(feature = "safetensors")]
mod files {
    use super::*;

    fn resume<T: Element>(whole: &Whole<T>, file: &[u8]) -> Stream<T> {
        Stream::from_safetensors(file, SHAPE, whole.options()).unwrap()
    }

    /// Saved anywhere, it goes on with the same bits on the same path, and within the bounds on another.
    fn goes_on<T: Element>() {
        for options in [options()[0], options()[1], options()[3]] {
            let whole = Whole::<T>::new(options);
            for attention in [Attention::cpu()].iter().chain(gpu()) {
                let mut stream = whole.stream();
                let mut sizes = vec![stream.to_safetensors().unwrap().len()];
                for tokens in [1, 2, 13, 20] {
                    whole.update(&mut stream, attention, tokens);
                    let file = stream.to_safetensors().unwrap();
                    let mut resumed = resume(&whole, &file);
                    assert_eq!(resumed, stream);
                    let start = stream.position() as usize;
                    let [expected, actual] =
                        [&mut stream.clone(), &mut resumed].map(|stream| whole.update(stream, attention, 5));
                    assert_eq!(actual, expected, "the same bits");
                    let elsewhere = gpu().cloned().filter(|_| !attention.is_gpu()).unwrap_or(Attention::cpu());
                    let output = whole.update(&mut resume(&whole, &file), &elsewhere, 5);
                    whole.check(start..start + 5, &output);
                    sizes.push(file.len());
                }
                assert!(sizes.iter().all(|size| *size == sizes[0]), "{sizes:?}");
                let header = sizes[0] as u64 - stream.bytes();
                assert!((300..2000).contains(&header), "{header} bytes beside keys and values");
            }
        }
    }

    #[test]
    fn streams_go_on_elsewhere() {
        goes_on::<f32>();
        goes_on::<f16>();
        goes_on::<bf16>();
    }

    #[test]
    fn other_tools_read_it() {
        let whole = Whole::<f16>::new(options()[0]);
        let mut stream = whole.stream();
        whole.update(&mut stream, &Attention::cpu(), 6);
        let file = stream.to_safetensors().unwrap();
        let read = safetensors::SafeTensors::deserialize(&file).unwrap();
        let k = read.tensor("k.sinks").unwrap();
        assert_eq!((k.shape(), k.dtype()), (&[2, 3, 2, 8][..], safetensors::Dtype::F16));
        let first: Vec<f16> = bytemuck::pod_collect_to_vec(&k.data()[..96]);
        assert_eq!(first, whole.chunk(0..3).k[..48]);
        let v = read.tensor("v.window").unwrap();
        assert_eq!(v.shape(), [2, 8, 2, 12]);
        let rest: Vec<f16> = bytemuck::pod_collect_to_vec(&v.data()[..v.data().len() / 2]);
        assert_eq!(rest[..72], whole.chunk(3..6).v[..72]);
        assert!(rest[72..].iter().all(|x| x.to_bits() == 0));
    }

    #[test]
    fn damage_is_an_error() {
        let whole = Whole::<f16>::new(options()[0]);
        let mut stream = whole.stream();
        whole.update(&mut stream, &Attention::cpu(), 6);
        let file = stream.to_safetensors().unwrap();
        let load = |bytes: &[u8]| Stream::<f16>::from_safetensors(bytes, SHAPE, whole.options());
        assert_eq!(load(&file).unwrap(), stream);
        for end in 0..file.len() {
            assert!(matches!(load(&file[..end]), Err(Error::SavedDamaged { .. })), "cut after {end} bytes");
        }
        for at in 0..file.len() {
            for flip in [1, 0x80] {
                let mut spoiled = file.clone();
                spoiled[at] ^= flip;
                let error = load(&spoiled).unwrap_err();
                // A number of the options may have become another one.
                let typed = matches!(error, Error::SavedDamaged { .. } | Error::SavedMismatch { .. });
                assert!(typed, "byte {at}: {error}");
            }
        }
        let header = u64::from_le_bytes(*file.first_chunk().unwrap()) as usize;
        let text = std::str::from_utf8(&file[8..8 + header]).unwrap();
        let with_header =
            |text: &str| [&(text.len() as u64).to_le_bytes()[..], text.as_bytes(), &file[8 + header..]].concat();
        assert_eq!(load(&with_header(text)).unwrap(), stream);
        // Sound by itself, but no stream that was written so: a position, a tensor's name, offsets near 2^64.
        for (from, to, message) in [
            ("position=00000000000000000006", "position=00000000000000000007", "checksum"),
            ("position=00000000000000000006", "position=18446744073709551615", "checksum"),
            ("position=00000000000000000006", "position=-0000000000000000006", "the position is"),
            (" position=00000000000000000006", "", "no position"),
            ("k.sinks", "k.skins", "k.sinks is missing"),
            ("\"stream\"", "\"steam\"", "no key \"stream\""),
            ("[0,", "[18446744073709551615,", "the header"),
        ] {
            assert!(text.contains(from), "{from} in {text}");
            let error = load(&with_header(&text.replace(from, to))).unwrap_err().to_string();
            assert!(error.starts_with("not a saved stream, or damaged: ") && error.contains(message), "{to}: {error}");
        }
        let empty = r#"{"__metadata__":{}}"#;
        assert!(matches!(
            load(&[&19u64.to_le_bytes()[..], empty.as_bytes()].concat()),
            Err(Error::SavedDamaged { .. })
        ));
        assert!(matches!(load(&u64::MAX.to_le_bytes()), Err(Error::SavedDamaged { .. })));
    }

    #[test]
    fn streams_of_another_kind_are_errors() {
        let options = options()[0].softcap(3.0).scale(0.25);
        let whole = Whole::<f32>::new(options);
        let mut stream = whole.stream();
        whole.update(&mut stream, &Attention::cpu(), 30);
        let file = stream.to_safetensors().unwrap();
        let load = |shape, options| Stream::<f32>::from_safetensors(&file, shape, options).map(|_| ());
        // Another way to say the same.
        load(SHAPE, options.causal(true).window(Window::left(8))).unwrap();
        for (shape, options, message) in [
            (StreamShape { batch: 1, ..SHAPE }, options, "batch 2, wanted is 1"),
            (StreamShape { heads: 2, ..SHAPE }, options, "heads 4, wanted is 2"),
            (StreamShape { kv_heads: 4, ..SHAPE }, options, "kv_heads 2, wanted is 4"),
            (StreamShape { head_dim: 12, ..SHAPE }, options, "head_dim 8, wanted is 12"),
            (StreamShape { value_dim: 8, ..SHAPE }, options, "value_dim 12, wanted is 8"),
            (SHAPE, options.layout(Layout::Bhsd), "layout bshd, wanted is bhsd"),
            (SHAPE, options.window(Window::keys(8)), "window_left 8, wanted is 7"),
            (SHAPE, options.sink_tokens(4), "sink_tokens 3, wanted is 4"),
            (SHAPE, options.sink_logits(SinkLogits::None), "sink_logits per-head, wanted is none"),
            (SHAPE, options.scale(0.5), "scale 0.25, wanted is 0.5"),
            (SHAPE, options.softcap(2.0), "softcap 3, wanted is 2"),
            (SHAPE, options.alibi(true), "alibi false, wanted is true"),
        ] {
            let error = load(shape, options).unwrap_err();
            assert!(matches!(error, Error::SavedMismatch { .. }), "{error}");
            assert_eq!(error.to_string(), format!("the saved stream has {message}"));
        }
        let error = Stream::<bf16>::from_safetensors(&file, SHAPE, options.dtype(DType::Bf16)).unwrap_err();
        assert_eq!(error.to_string(), "the saved stream has dtype f32, wanted is bf16");
    }

    #[test]
    fn files_are_whole_or_untouched() {
        let folder = std::env::temp_dir().join(format!("sink-attention-stream-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let path = folder.join("stream.safetensors");
        let whole = Whole::<bf16>::new(options()[0]);
        let mut stream = whole.stream();
        for _ in 0..2 {
            whole.update(&mut stream, &Attention::cpu(), 6);
            stream.save(&path).unwrap();
            assert_eq!(Stream::load(&path, SHAPE, whole.options()).unwrap(), stream);
        }
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 1, "nothing is left beside it");
        let error = stream.save(folder.join("none").join("stream")).unwrap_err();
        assert!(matches!(&error, Error::SavedFile { .. }) && error.to_string().contains("none"), "{error}");
        let error = Stream::<bf16>::load(folder.join("none"), SHAPE, whole.options()).unwrap_err();
        assert!(matches!(error, Error::SavedFile { .. }), "{error}");
        std::fs::write(&path, b"nothing").unwrap();
        let error = Stream::<bf16>::load(&path, SHAPE, whole.options()).unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, Error::SavedFile { .. }) && text.contains("7 bytes"), "{text}");
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
