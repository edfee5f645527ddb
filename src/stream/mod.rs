//! Endless sequences, chunk by chunk, in constant memory.

use std::ops::Range;

use crate::attention::Attention;
use crate::problem::element::Element;
use crate::problem::error::{Error, Result};
use crate::problem::mask::shard_options;
use crate::problem::{Inputs, Layout, MAX_SEQ, Options, Output, Problem, Shape, Window, check_length};

#[cfg(feature = "safetensors")]
mod file;

/// The sizes of a [`Stream`]: those of [`Shape`], without lengths.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct StreamShape {
    /// B, streams side by side.
    pub batch: usize,
    /// H, query heads.
    pub heads: usize,
    /// G, key/value heads.
    pub kv_heads: usize,
    /// D, width of q and k.
    pub head_dim: usize,
    /// E, width of v and o.
    pub value_dim: usize,
}

impl StreamShape {
    fn with_lengths(self, seq_q: usize, seq_k: usize) -> Shape {
        let StreamShape { batch, heads, kv_heads, head_dim, value_dim } = self;
        Shape { batch, heads, kv_heads, seq_q, seq_k, head_dim, value_dim }
    }
}

/// A sequence that arrives in chunks and has no end: causal attention with a window, sink tokens and sink logits,
/// exactly as over the whole sequence at once.
///
/// It keeps what later queries can see, the keys and values of the sink tokens and of the window before the next
/// token: its [size](Self::bytes) is constant. A chunk's queries attend to the sink tokens and to the window with the
/// chunk, two [partial states](crate::PartialState), which are merged. Nothing of it lies on a device: any operator
/// continues it.
///
/// ```
/// use sink_attention::stream::{Stream, StreamShape};
/// use sink_attention::{Attention, Inputs, Options, SinkLogits, Window};
///
/// let shape = StreamShape { batch: 1, heads: 2, kv_heads: 1, head_dim: 4, value_dim: 4 };
/// let options = Options::new().window(Window::keys(16)).sink_tokens(4).sink_logits(SinkLogits::PerHead);
/// let mut stream = Stream::<f32>::new(shape, options)?;
/// let attention = Attention::cpu();
/// let (q, k, v) = (vec![0.1; 5 * 2 * 4], vec![0.2; 5 * 4], vec![0.3; 5 * 4]);
/// for _ in 0..100 {
///     let inputs = Inputs::new(&q, &k, &v).sink_logits(&[0.5, -1.0][..]);
///     let output = stream.update(&attention, &inputs)?; // five tokens
///     assert_eq!(output.o.len(), q.len());
/// }
/// assert_eq!(stream.position(), 500);
/// # Ok::<(), sink_attention::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct Stream<T = f32> {
    shape: StreamShape,
    options: Options,
    /// Tokens before the next one.
    position: u64,
    /// The first tokens, as many as there are of them.
    sinks: Kept<T>,
    /// The last tokens behind these, as far as the window reaches.
    recent: Kept<T>,
}

/// Keys and values of some tokens, in the layout of the options.
#[derive(Debug, Clone, PartialEq)]
struct Kept<T> {
    tokens: usize,
    k: Vec<T>,
    v: Vec<T>,
}

impl<T: Element> Kept<T> {
    fn none() -> Self {
        Kept { tokens: 0, k: Vec::new(), v: Vec::new() }
    }
}

impl<T: Element> Stream<T> {
    /// A stream before its first token. The options are those of the whole sequence: [`causal`](Options::causal) or a
    /// window with a right bound of 0, and a left bound, which is what makes its size constant.
    ///
    /// # Errors
    /// Those of [`Problem::new`]; [`Error::WrongElementType`]; [`Error::InvalidOption`] for options that a stream
    /// cannot have: no left bound, keys behind the query, a bias, a mask, a query_offset, or [`Layout::Thd`];
    /// [`Error::DimensionTooLarge`] for a window and sink tokens that together exceed 2^29 keys.
    pub fn new(shape: StreamShape, options: Options) -> Result<Self> {
        let invalid = |option, reason: &str| Err(Error::InvalidOption { option, reason: reason.into() });
        // Sink logits, scale, softcap and ALiBi are those of every pass of the stream. A stream aligns its queries by itself.
        let Options {
            causal,
            window,
            sink_tokens,
            sink_logits: _,
            scale: _,
            softcap: _,
            alibi: _,
            bias,
            bias_dtype: _,
            mask,
            mask_packing: _,
            alignment: _,
            query_offset,
            layout,
            dtype,
        } = options;
        if T::DTYPE != dtype {
            return Err(Error::WrongElementType { operands: T::DTYPE, options: dtype });
        }
        let Some(left) = window.left else {
            return invalid("window", "a stream needs a left bound: without one it would have to keep every key");
        };
        if !causal && window.right != Some(0) {
            return invalid("causal", "false, with no right bound of 0; a stream's queries come before later keys do");
        }
        if layout == Layout::Thd {
            return invalid("layout", "a stream is in bshd or bhsd, thd has no batch of streams side by side");
        }
        if query_offset.is_some() {
            return invalid("query_offset", "a stream counts positions by itself");
        }
        for (option, axes) in [("bias", bias), ("mask", mask)] {
            if axes.is_some() {
                return invalid(option, "a stream has none; it would belong to pairs of tokens without end");
            }
        }
        let kept = (left as u64).saturating_add(sink_tokens as u64);
        if kept > MAX_SEQ as u64 {
            let dimension = "window and sink tokens of a stream";
            return Err(Error::DimensionTooLarge { dimension, value: kept, most: MAX_SEQ as u64 });
        }
        Problem::new(shape.with_lengths(1, kept.max(1) as usize), options)?;
        // One way to say it, for the file.
        let options = options.causal(false).window(Window::new(left, 0));
        Ok(Stream { shape, options, position: 0, sinks: Kept::none(), recent: Kept::none() })
    }

    /// The sizes.
    pub fn shape(&self) -> &StreamShape {
        &self.shape
    }

    /// Tokens so far, the position of the next one.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// Bytes of the keys and values that it keeps at most: `B * G * (left + sink_tokens) * (D + E)` elements.
    pub fn bytes(&self) -> u64 {
        let StreamShape { batch, kv_heads, head_dim, value_dim, .. } = self.shape;
        let tokens = self.left() + self.options.sink_tokens;
        let elements = ((batch * kv_heads * tokens) as u64).saturating_mul((head_dim + value_dim) as u64);
        elements.saturating_mul(size_of::<T>() as u64)
    }

    fn left(&self) -> usize {
        self.options.window.left.unwrap_or(0)
    }

    /// Attends the next tokens, any number of them, and moves on behind them. q, k and v are theirs, `[B, tokens,
    /// heads, width]` in the options' layout; sink logits and ALiBi slopes are parameters of the model, the same in
    /// each call. The results are those of these tokens. The same stream gives the same bits on the same device;
    /// blocks until they are there.
    ///
    /// # Errors
    /// Those of [`Attention::attend_partial`], [`Attention::merge`] and [`Attention::finish`]; with ALiBi and sink
    /// tokens [`Error::InvalidOption`] beyond position 2^30. After an error the stream is as it was.
    #[cfg(not(target_family = "wasm"))]
    pub fn update(&mut self, attention: &Attention, inputs: &Inputs<'_, T>) -> Result<Output<T>> {
        pollster::block_on(self.update_async(attention, inputs))
    }

    /// As [`update`](Self::update), for browsers and async hosts. Dropped before its end, it leaves the stream as it
    /// was.
    ///
    /// # Errors
    /// As [`update`](Self::update).
    pub async fn update_async(&mut self, attention: &Attention, inputs: &Inputs<'_, T>) -> Result<Output<T>> {
        let (shape, options) = (self.shape, self.options);
        let tokens = inputs.q.len() / (shape.batch * shape.heads * shape.head_dim);
        let next = self.position.checked_add(tokens as u64);
        let next = next.ok_or(Error::DimensionTooLarge {
            dimension: "position",
            value: u64::MAX,
            most: u64::MAX - tokens as u64,
        })?;
        if tokens == 0 {
            return self.no_tokens(inputs);
        }
        // Against the chunk's own shapes, before they are lost in what is kept beside it.
        Problem::new(shape.with_lengths(tokens, tokens), options)?.check_inputs(inputs)?;
        let k = join(self.outer(), &self.recent.k, inputs.k);
        let v = join(self.outer(), &self.recent.v, inputs.v);
        let keys = self.recent.tokens + tokens;
        // Query 0 stands at `before` among the keys from `start` on.
        let part = |start: u64, before: u64, keys: usize| {
            let start = usize::try_from(start).unwrap_or(usize::MAX);
            let offset = i64::try_from(before).unwrap_or(i64::MAX);
            let local = shard_options(&options, 0, start).query_offset(offset);
            Problem::new(shape.with_lengths(tokens, keys), local)
        };
        let before = self.recent.tokens as u64;
        let problem = part(self.position - before, before, keys)?;
        let chunk = Inputs { k: &k, v: &v, ..*inputs };
        let output = if self.sinks.tokens == 0 {
            attention.forward_async(&problem, &chunk).await?
        } else {
            let seen = part(0, self.position, self.sinks.tokens)?;
            let sinks = Inputs { k: &self.sinks.k, v: &self.sinks.v, sink_logits: None, ..*inputs };
            let sinks = attention.attend_partial_async(&seen, 0..self.sinks.tokens, &sinks).await?;
            let chunk = Inputs { sink_logits: None, ..chunk };
            let recent = attention.attend_partial_async(&problem, 0..keys, &chunk).await?;
            let state = attention.merge_async(&problem, &[&sinks, &recent]).await?;
            attention.finish_async(&problem, &state, inputs.sink_logits).await?
        };
        // Nothing fails from here on.
        let missing = (options.sink_tokens - self.sinks.tokens).min(tokens);
        if missing > 0 {
            let first =
                |kept: &[T], chunk: &[T]| join(self.outer(), kept, &cut(self.outer(), chunk, tokens, 0..missing));
            let (k, v) = (first(&self.sinks.k, inputs.k), first(&self.sinks.v, inputs.v));
            self.sinks = Kept { tokens: self.sinks.tokens + missing, k, v };
        }
        let behind_sinks = usize::try_from(next - self.sinks.tokens as u64).unwrap_or(usize::MAX);
        let kept = behind_sinks.min(self.left());
        let last = |x: &[T]| cut(self.outer(), x, keys, keys - kept..keys);
        self.recent = Kept { tokens: kept, k: last(&k), v: last(&v) };
        self.position = next;
        Ok(output)
    }

    /// What an update without tokens gives.
    fn no_tokens(&self, inputs: &Inputs<'_, T>) -> Result<Output<T>> {
        let StreamShape { batch, heads, kv_heads, head_dim, value_dim } = self.shape;
        let layout = self.options.layout;
        for (operand, slice, heads, width) in [
            ("q", inputs.q, heads, head_dim),
            ("k", inputs.k, kv_heads, head_dim),
            ("v", inputs.v, kv_heads, value_dim),
        ] {
            check_length(operand, slice.len(), &layout.shape(batch, heads, 0, width))?;
        }
        let o_lo = T::DTYPE.has_rounding_error().then(Vec::new);
        Ok(Output { o: Vec::new(), o_lo, lse: Vec::new() })
    }

    /// Parts of an operand of keys in which the tokens lie one behind the other.
    fn outer(&self) -> usize {
        match self.options.layout {
            Layout::Bhsd => self.shape.batch * self.shape.kv_heads,
            Layout::Bshd | Layout::Thd => self.shape.batch,
        }
    }
}

/// Joins operands along the sequence, each in `outer` parts.
fn join<T: Copy>(outer: usize, a: &[T], b: &[T]) -> Vec<T> {
    let [len_a, len_b] = [a.len() / outer, b.len() / outer];
    let parts = (0..outer).flat_map(|n| [&a[n * len_a..(n + 1) * len_a], &b[n * len_b..(n + 1) * len_b]]);
    parts.collect::<Vec<_>>().concat()
}

/// Some of the tokens of an operand.
fn cut<T: Copy>(outer: usize, x: &[T], tokens: usize, range: Range<usize>) -> Vec<T> {
    if tokens == 0 {
        return Vec::new();
    }
    let inner = x.len() / outer / tokens;
    let parts = x.chunks_exact(tokens * inner).map(|part| &part[range.start * inner..range.end * inner]);
    parts.collect::<Vec<_>>().concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: StreamShape = StreamShape { batch: 1, heads: 2, kv_heads: 1, head_dim: 4, value_dim: 4 };

    /// A stream with so many tokens behind it, all but the first and the last of them skipped.
    fn far(options: Options, skipped: u64) -> (Stream, Vec<f32>, Vec<f32>) {
        let numbers = |n: usize| (0..n).map(|n| (n as f32).sin()).collect::<Vec<_>>();
        let (q, k) = (numbers(12 * 2 * 4), numbers(12 * 4));
        let mut stream = Stream::new(SHAPE, options).unwrap();
        let slopes = [0.1, 0.2];
        let inputs = Inputs::new(&q, &k, &k).alibi_slopes(options.alibi.then_some(&slopes[..]));
        stream.update(&Attention::cpu(), &inputs).unwrap();
        stream.position += skipped;
        (stream, q, k)
    }

    #[test]
    fn positions_have_no_end() {
        let options = Options::new().window(Window::keys(4)).sink_tokens(2);
        let [near, middle, end] = [0, 1 << 40, u64::MAX - 24].map(|skipped| {
            let (mut stream, q, k) = far(options, skipped);
            stream.update(&Attention::cpu(), &Inputs::new(&q, &k, &k)).unwrap()
        });
        assert!(near == middle && near == end);
        // But that of 64 bits.
        let (mut stream, q, k) = far(options, u64::MAX - 23);
        let before = stream.clone();
        let error = stream.update(&Attention::cpu(), &Inputs::new(&q, &k, &k)).unwrap_err();
        assert!(matches!(error, Error::DimensionTooLarge { dimension: "position", .. }), "{error}");
        assert_eq!(stream, before);
    }

    #[test]
    fn distances_to_sink_tokens_have_an_end() {
        let options = Options::new().window(Window::keys(4)).alibi(true);
        let update = |options: Options, skipped| {
            let (mut stream, q, k) = far(options, skipped);
            let before = stream.clone();
            let updated = stream.update(&Attention::cpu(), &Inputs::new(&q, &k, &k).alibi_slopes(&[0.1, 0.2][..]));
            assert_eq!(stream == before, updated.is_err());
            updated
        };
        update(options.sink_tokens(2), 1 << 29).unwrap();
        let error = update(options.sink_tokens(2), 1 << 40).unwrap_err();
        assert!(matches!(error, Error::InvalidOption { option: "query_offset", .. }), "{error}");
        // Without any, the window is all there is.
        assert_eq!(update(options, 1 << 40).unwrap(), update(options, 0).unwrap());
    }
}
