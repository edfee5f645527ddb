//! `Params`, the numbers that change between calls. One list makes the host's struct, the struct in the shaders' texts and the bytes of a
//! uniform buffer. A text declares the fields that it reads, and no others.

use std::borrow::Cow;
use std::fmt::Write as _;

use bytemuck::{Pod, Zeroable, bytes_of};

use crate::kernel::binding::Binding;
use crate::problem::error::{Error, Result};

/// Place of an operand, counted in vectors of its load width from the start of its binding. Numbers may wrap around: only the index that is
/// their sum must be right.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Pod, Zeroable)]
pub(crate) struct Operand {
    pub(crate) offset: u32,
    pub(crate) batch: u32,
    pub(crate) head: u32,
    pub(crate) seq: u32,
}

/// The declaration of [`Operand`] in a text. Its length is a multiple of 16 bytes, as uniform buffers align a struct.
const OPERAND: &str = "struct Operand { offset: u32, batch: u32, head: u32, seq: u32 }\n";

/// The line of a template that the declaration of the parameters replaces.
pub(crate) const PLACE: &str = "// PARAMS";

/// A field of [`Params`].
#[derive(Debug)]
pub(crate) struct Field {
    name: &'static str,
    /// Name in Rust and in WGSL.
    type_name: &'static str,
    docs: &'static [&'static str],
    size: usize,
    write: fn(&Params, &mut Vec<u8>),
}

macro_rules! params {
    (
        operands { $($(#[doc = $operand_doc:literal])* $operand:ident: $binding:ident,)* }
        numbers { $($(#[doc = $doc:literal])* $field:ident: $type:ident,)* }
    ) => {
        /// The numbers that change between calls.
        #[derive(Debug, Clone, Copy, Default)]
        pub(crate) struct Params {
            $($(#[doc = $operand_doc])* pub(crate) $operand: Operand,)*
            $($(#[doc = $doc])* pub(crate) $field: $type,)*
        }

        /// Operands come first: in uniform buffers a struct begins at a multiple of 16 bytes.
        const FIELDS: &[Field] = &[
            $(field!($operand, Operand, [$($operand_doc),*]),)*
            $(field!($field, $type, [$($doc),*]),)*
        ];

        impl Params {
            /// Parameters with the places of all operands.
            pub(crate) fn of_operands(place: impl Fn(Binding) -> Operand) -> Self {
                Params { $($operand: place(Binding::$binding),)* ..Params::default() }
            }
        }
    };
}

macro_rules! field {
    ($name:ident, $type:ident, [$($doc:literal),*]) => {
        Field {
            name: stringify!($name),
            type_name: stringify!($type),
            docs: &[$($doc),*],
            size: size_of::<$type>(),
            write: |params, bytes| bytes.extend_from_slice(bytes_of(&params.$name)),
        }
    };
}

params! {
    operands {
        q: Q,
        k: K,
        v: V,
        o: O,
        d_o: DO,
        d_q: DQ,
        d_k: DK,
        d_v: DV,
        o_lo: OLo,
        lse: Lse,
        d_lse: DLse,
        /// lse and delta of each row, in half precision also its unit. The ALiBi slope of a head follows its last row.
        row_stats: RowStats,
        d_slope_rows: DSlopeRows,
        sink_partials: SinkPartials,
        key_scales: KeyScales,
        query_scales: QueryScales,
        bias: Bias,
        d_bias: DBias,
        /// The caller's boolean mask, in bytes or words.
        mask: Mask,
        /// The bits of the mask in words, by rows of queries.
        mask_bits: MaskBits,
        /// The bits of the mask by rows of keys, unless one row is for all queries.
        mask_key_bits: MaskBits,
        /// The classes of the mask's blocks.
        mask_classes: MaskBits,
        /// Partial states, one behind the other along the batch axis.
        states: States,
        states_lo: StatesLo,
        states_lse: StatesLse,
        row_max: RowMax,
        states_row_max: StatesRowMax,
    }
    numbers {
        heads: u32,
        kv_heads: u32,
        seq_q: u32,
        seq_k: u32,
        lower: i32,
        upper: i32,
        /// Position of query 0.
        offset: i32,
        sink_tokens: u32,
        /// Workgroups of this dispatch. The grid is folded into two dimensions and may be larger.
        workgroups: u32,
        /// The slice of the pass that this dispatch does: first sequence, head and tile, and how many of each. Heads are key
        /// heads if a group is kept together.
        slice_batch: u32,
        slice_batches: u32,
        slice_head: u32,
        slice_heads: u32,
        slice_tile: u32,
        slice_tiles: u32,
        /// Workgroups of each of these.
        slice_cells: u32,
        sink_offset: u32,
        d_sink_offset: u32,
        slope_offset: u32,
        d_slope_offset: u32,
        /// A slope's place behind the first row of its head.
        slope_row: u32,
        /// First word of the list of tiles, if sequences differ in length.
        work_at: u32,
        batch: u32,
        /// Sequences of the problem.
        sequence_count: u32,
        /// Rows and keys of the mask.
        mask_rows: u32,
        mask_keys: u32,
        /// Queries and keys of the longest sequence.
        pair_rows: u32,
        pair_keys: u32,
        /// Queries of a sequence of a decoding step.
        queries: u32,
        /// Sequences of the cache.
        sequences: u32,
        /// First word in `state` of the lengths that hold now, and of the lengths after this append.
        current: u32,
        next: u32,
        /// First word of the block tables in `state`, and words of the table of a sequence.
        table: u32,
        table_row: u32,
        /// Rows of a block: a page, or all that a sequence has.
        block_rows: u32,
        block_shift: u32,
        /// Rows of a rolling cache that are never given up, and rows of the ring behind them.
        sink_rows: u32,
        window_rows: u32,
        /// Rows of a head among the gathered keys of all sequences.
        gathered_rows: u32,
        /// Appended tokens of all sequences.
        tokens: u32,
        /// Keys that a query sees to either side of itself.
        left: i32,
        right: i32,
        /// First word of the tree mask, and words from one sequence's to the next.
        tree_offset: u32,
        tree_batch: u32,
        /// Row tiles of the query heads of a key head.
        row_tiles: u32,
        /// Key heads of all sequences of a decoding step.
        groups: u32,
        /// Splits of the keys, the most splits if a split would have more tiles than `long_tiles`, and the fewest tiles of a split.
        splits: u32,
        most_splits: u32,
        long_tiles: u32,
        least_tiles: u32,
        lse_offset: u32,
        softcap: f32,
        scale: f32,
        /// The factor of scores in the softmax: the scale, or 1 if scores are formed beforehand.
        score_scale: f32,
        /// `score_scale` is `scale_sign` (1 or -1) times `scale_size`.
        scale_sign: f32,
        scale_size: f32,
        /// -infinity, for which WGSL has no literal.
        negative_infinity: f32,
    }
}

/// The fields that a text reads, in the order of [`Params`].
#[derive(Debug)]
pub(crate) struct ParamsLayout(Vec<&'static Field>);

impl ParamsLayout {
    /// The fields that a text reads as `params.field` outside of comments.
    ///
    /// # Errors
    /// [`Error::Gpu`] for a field that does not exist, which would be a mistake of this crate.
    pub(crate) fn of(text: &str) -> Result<Self> {
        let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
        let code = text.lines().map(|line| line.split_once("//").map_or(line, |(code, _)| code));
        let mut read = Vec::new();
        for line in code {
            for (at, found) in line.match_indices("params.") {
                if !line[..at].ends_with(is_name) {
                    let rest = &line[at + found.len()..];
                    read.push(&rest[..rest.find(|c| !is_name(c)).unwrap_or(rest.len())]);
                }
            }
        }
        if let Some(unknown) = read.iter().find(|name| FIELDS.iter().all(|field| field.name != **name)) {
            let message = format!("there is no parameter \"{unknown}\"");
            return Err(Error::Gpu { during: "composing a shader", message });
        }
        Ok(ParamsLayout(FIELDS.iter().filter(|field| read.contains(&field.name)).collect()))
    }

    /// The declaration in WGSL.
    fn wgsl(&self) -> String {
        let mut text = String::from(OPERAND);
        text.push_str("\nstruct Params {\n");
        for Field { name, type_name, docs, .. } in &self.0 {
            for line in *docs {
                // Writing into a String cannot fail.
                let _ = writeln!(text, "  //{line}");
            }
            let _ = writeln!(text, "  {name}: {type_name},");
        }
        text.push('}');
        text
    }

    /// Bytes of a uniform buffer, which are a multiple of 16.
    pub(crate) fn len(&self) -> usize {
        self.0.iter().map(|field| field.size).sum::<usize>().next_multiple_of(16)
    }

    /// The bytes of the fields.
    pub(crate) fn bytes(&self, params: &Params) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.len());
        self.0.iter().for_each(|field| (field.write)(params, &mut bytes));
        bytes.resize(self.len(), 0);
        bytes
    }
}

/// Replaces the mark in a text by the declaration of the parameters that the text reads.
pub(crate) fn declare(text: &str) -> Result<Cow<'_, str>> {
    match text.split_once(PLACE) {
        Some((head, rest)) => Ok(format!("{head}{}{rest}", ParamsLayout::of(rest)?.wgsl()).into()),
        None => Ok(text.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_declares_what_it_reads() {
        let text = "enable f16;\n// PARAMS\nlet a = params.scale; // not params.softcap\nlet b = my_params.heads + params.q.seq + params.seq_k;";
        let layout = ParamsLayout::of(text).unwrap();
        let names: Vec<_> = layout.0.iter().map(|field| field.name).collect();
        assert_eq!(names, ["q", "seq_k", "scale"]);
        let declared = declare(text).unwrap();
        assert!(declared.starts_with("enable f16;\nstruct Operand {"), "{declared}");
        assert!(declared.contains("struct Params {\n  q: Operand,\n  seq_k: u32,\n  scale: f32,\n}"), "{declared}");
        let again = ParamsLayout::of(&declared).unwrap();
        assert_eq!(again.len(), layout.len(), "a declaration reads nothing");

        let q = Operand { offset: 1, batch: 2, head: 3, seq: 4 };
        let bytes = layout.bytes(&Params { q, seq_k: 5, scale: 0.5, softcap: 9.0, ..Params::default() });
        let words: &[u32] = bytemuck::cast_slice(&bytes);
        assert_eq!(words, [1, 2, 3, 4, 5, 0.5f32.to_bits(), 0, 0]);

        let error = ParamsLayout::of("params.sclae").unwrap_err().to_string();
        assert!(error.contains("there is no parameter \"sclae\""), "{error}");
    }
}
