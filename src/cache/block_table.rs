//! The block table of a cache: how long each sequence is, and which pages it has. Pure; the caches on the GPU and on the CPU
//! both keep one.

use std::collections::HashMap;
use std::sync::Arc;

use crate::problem::cache::{CacheConfig, CacheKind};
use crate::problem::error::{Error, Result};

/// Longest sequence, so that shaders can count positions in 32 bits with a sign.
const MOST_TOKENS: usize = 1 << 30;

/// Lengths and pages of all sequences.
#[derive(Debug, Clone)]
pub(crate) struct BlockTable {
    kind: CacheKind,
    lengths: Vec<usize>,
    /// Tokens that were ever written to a rolling sequence since it was empty: those beyond the ring are gone.
    written: Vec<usize>,
    /// The last tokens of each sequence whose queries appends have rotated; `None` where tokens came without their queries.
    rotated: Vec<Option<Rotated>>,
    /// Pages of each sequence, in the order of its tokens. These and what follows are shared with clones until they change: a
    /// step keeps one.
    tables: Vec<Arc<Vec<u32>>>,
    /// Sequences that hold each page.
    holders: Arc<Vec<u32>>,
    free: Arc<Vec<u32>>,
}

/// A run of tokens whose queries were rotated, and of how many heads.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Rotated {
    heads: usize,
    tokens: usize,
}

/// Changes that have to follow on the device.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Changes {
    /// Whole pages to copy, from and to, before anything else.
    pub(crate) copies: Vec<[u32; 2]>,
    /// Sequence, number of the page in it, and the page.
    pub(crate) tables: Vec<(usize, usize, u32)>,
}

/// A row that moves: block and row of its old place and of its new one.
pub(crate) type Move = [[usize; 2]; 2];

impl BlockTable {
    pub(crate) fn new(config: &CacheConfig) -> Self {
        let pages = match config.kind {
            CacheKind::Paged { pages, .. } => pages as u32,
            _ => 0,
        };
        BlockTable {
            kind: config.kind,
            lengths: vec![0; config.sequences],
            written: vec![0; config.sequences],
            rotated: vec![Some(Rotated::default()); config.sequences],
            tables: vec![Arc::default(); config.sequences],
            holders: Arc::new(vec![0; pages as usize]),
            free: Arc::new((0..pages).rev().collect()),
        }
    }

    /// As it was: `lengths`, `written` and a table for each sequence.
    ///
    /// # Errors
    /// A message about a state that cannot have existed, with its numbers.
    #[cfg(feature = "safetensors")]
    pub(crate) fn restored(
        config: &CacheConfig,
        lengths: Vec<usize>,
        written: Vec<usize>,
        tables: Vec<Vec<u32>>,
    ) -> Result<Self, String> {
        let mut block_table = BlockTable::new(config);
        let capacity = block_table.capacity();
        for (sequence, (&length, &written)) in lengths.iter().zip(&written).enumerate() {
            if length > capacity {
                return Err(format!("sequence {sequence} has {length} tokens and room for {capacity}"));
            }
            if written < length || written > capacity {
                return Err(format!("{written} tokens were written to sequence {sequence}, which has {length}"));
            }
            let least = least_length(config.kind, written);
            if length > 0 && length < least {
                return Err(format!(
                    "sequence {sequence} has {length} tokens; of {written} its ring keeps {least} or more"
                ));
            }
        }
        for (sequence, table) in tables.iter().enumerate() {
            if let Err(error) = block_table.assign(sequence, table, lengths.get(sequence).copied().unwrap_or(0)) {
                return Err(error.to_string());
            }
        }
        Arc::make_mut(&mut block_table.free).sort_unstable_by(|a, b| b.cmp(a));
        block_table.rotated = lengths.iter().map(|length| (*length == 0).then(Rotated::default)).collect();
        (block_table.lengths, block_table.written) = (lengths, written);
        Ok(block_table)
    }

    pub(crate) fn lengths(&self) -> &[usize] {
        &self.lengths
    }

    /// Tokens that were ever written to each sequence, since it was empty.
    #[cfg(feature = "safetensors")]
    pub(crate) fn written(&self) -> &[usize] {
        &self.written
    }

    pub(crate) fn table(&self, sequence: usize) -> &[u32] {
        self.tables.get(sequence).map_or(&[], |table| table.as_slice())
    }

    pub(crate) fn free_pages(&self) -> usize {
        self.free.len()
    }

    /// Rows of a block.
    pub(crate) fn rows(&self) -> usize {
        self.kind.rows()
    }

    /// Keys of a sequence that the cache holds: all but those that a ring has given up.
    pub(crate) fn keys(&self, sequence: usize) -> usize {
        match self.kind {
            CacheKind::Rolling { .. } => self.lengths[sequence].min(self.kind.rows()),
            _ => self.lengths[sequence],
        }
    }

    /// Block and row in it of the key at a place, see shaders/cache/range.wgsl.
    pub(crate) fn row(&self, sequence: usize, place: usize) -> [usize; 2] {
        let [number, row, _] = self.stretch(self.lengths[sequence], place);
        [self.block(sequence, number), row]
    }

    /// The block of a sequence's page, by the page's number. In other caches a sequence has one block, number 0.
    pub(crate) fn block(&self, sequence: usize, number: usize) -> usize {
        match self.kind {
            CacheKind::Paged { .. } => self.tables[sequence][number] as usize,
            _ => sequence,
        }
    }

    /// The number of a key's block among those of its sequence, the row in that block, and how many keys from there on are in consecutive
    /// rows, for a sequence of `length` tokens.
    pub(crate) fn stretch(&self, length: usize, place: usize) -> [usize; 3] {
        let rows = self.kind.rows();
        match self.kind {
            CacheKind::Contiguous { .. } => [0, place, rows - place],
            CacheKind::Paged { .. } => [place / rows, place % rows, rows - place % rows],
            CacheKind::Rolling { sink_tokens, .. } if place < sink_tokens => [0, place, sink_tokens - place],
            CacheKind::Rolling { sink_tokens, .. } => {
                let ring = rows - sink_tokens;
                let row = (place - sink_tokens + length.saturating_sub(rows)) % ring;
                [0, sink_tokens + row, ring - row]
            }
        }
    }

    pub(crate) fn check_sequence(&self, sequence: usize) -> Result<()> {
        let sequences = self.lengths.len();
        if sequence < sequences { Ok(()) } else { Err(Error::SequenceOutOfRange { sequence, sequences }) }
    }

    /// Checks that tokens can be written without a change of pages.
    pub(crate) fn check_reserved(&self, added: &[usize]) -> Result<()> {
        let capacity = self.capacity();
        for (sequence, (&length, &added)) in self.lengths.iter().zip(added).enumerate().filter(|(_, (_, n))| **n > 0) {
            if added > capacity - length {
                return Err(Error::CacheFull { sequence, length, added, capacity });
            }
            let CacheKind::Paged { page_size, .. } = self.kind else { continue };
            let table = &self.tables[sequence];
            let own = |page: &&u32| self.holders[**page as usize] == 1;
            let first = length / page_size;
            let reserved = (first + table.iter().skip(first).take_while(own).count()) * page_size;
            if length + added > reserved {
                let reserved = reserved.saturating_sub(length);
                return Err(Error::PagesNotReserved { sequence, length, added, reserved });
            }
        }
        Ok(())
    }

    fn capacity(&self) -> usize {
        match self.kind {
            CacheKind::Contiguous { capacity } => capacity,
            CacheKind::Paged { page_size, sequence_pages, .. } => sequence_pages * page_size,
            CacheKind::Rolling { .. } => MOST_TOKENS,
        }
    }

    /// Checks that sequences have room for more tokens.
    pub(crate) fn check_capacity(&self, added: &[usize]) -> Result<()> {
        let capacity = self.capacity();
        let full = |&(_, (&length, &added)): &(usize, (&usize, &usize))| added > capacity - length;
        match self.lengths.iter().zip(added).enumerate().find(full) {
            Some((sequence, (&length, &added))) => Err(Error::CacheFull { sequence, length, added, capacity }),
            None => Ok(()),
        }
    }

    /// Makes room for `added` more tokens of each sequence, with pages of its own for the tokens to be written. It does all of this or
    /// nothing.
    pub(crate) fn reserve(&mut self, added: &[usize]) -> Result<Changes> {
        self.check_capacity(added)?;
        let CacheKind::Paged { page_size, pages, .. } = self.kind else { return Ok(Changes::default()) };
        // The needed pages are counted first, page by page: sequences that share a page give it up one after the other.
        let mut shared: HashMap<u32, u32> = HashMap::new();
        let mut copied = Vec::new();
        let mut fresh = 0;
        for (sequence, &added) in added.iter().enumerate().filter(|(_, added)| **added > 0) {
            let (length, table) = (self.lengths[sequence], &self.tables[sequence]);
            let end = length + added;
            fresh += end.div_ceil(page_size).saturating_sub(table.len());
            for (number, &page) in table.iter().enumerate().take(end.div_ceil(page_size)).skip(length / page_size) {
                let holders = shared.entry(page).or_insert(self.holders[page as usize]);
                if *holders > 1 {
                    *holders -= 1;
                    copied.push((sequence, number, page));
                }
            }
        }
        let (needed, free) = (fresh + copied.len(), self.free.len());
        if needed > free {
            return Err(Error::PagesExhausted { needed, free, pages });
        }
        let mut changes = Changes::default();
        for (sequence, number, page) in copied {
            let Some(own) = self.take() else { continue };
            Arc::make_mut(&mut self.holders)[page as usize] -= 1;
            Arc::make_mut(&mut self.tables[sequence])[number] = own;
            // A page behind the last token holds nothing to keep.
            if number * page_size < self.lengths[sequence] {
                changes.copies.push([page, own]);
            }
            changes.tables.push((sequence, number, own));
        }
        for (sequence, &added) in added.iter().enumerate().filter(|(_, added)| **added > 0) {
            while self.tables[sequence].len() * page_size < self.lengths[sequence] + added {
                let Some(page) = self.take() else { break };
                changes.tables.push((sequence, self.tables[sequence].len(), page));
                Arc::make_mut(&mut self.tables[sequence]).push(page);
            }
        }
        Ok(changes)
    }

    fn take(&mut self) -> Option<u32> {
        let page = Arc::make_mut(&mut self.free).pop()?;
        Arc::make_mut(&mut self.holders)[page as usize] = 1;
        Some(page)
    }

    fn give_back(&mut self, pages: &[u32]) {
        if pages.is_empty() {
            return;
        }
        let (holders, free) = (Arc::make_mut(&mut self.holders), Arc::make_mut(&mut self.free));
        for &page in pages {
            holders[page as usize] -= 1;
            if holders[page as usize] == 0 {
                free.push(page);
            }
        }
    }

    /// Counts tokens that were written to reserved rows. `q_heads` is the number of heads whose queries were rotated with them, if any.
    pub(crate) fn advance(&mut self, added: &[usize], q_heads: Option<usize>) {
        for (sequence, &added) in added.iter().enumerate().filter(|(_, added)| **added > 0) {
            self.lengths[sequence] += added;
            self.written[sequence] = self.written[sequence].max(self.lengths[sequence]);
            let run = match (self.rotated[sequence], q_heads) {
                (Some(run), Some(heads)) if run.heads == heads => Rotated { tokens: run.tokens + added, heads },
                (_, Some(heads)) => Rotated { tokens: added, heads },
                (_, None) => Rotated::default(),
            };
            self.rotated[sequence] = Some(run);
        }
    }

    /// Checks that appends have rotated the queries of the last tokens, of `heads` heads. Nobody knows that of tokens that came from
    /// elsewhere.
    pub(crate) fn check_rotated(&self, sequence: usize, queries: usize, heads: usize) -> Result<()> {
        // Queries before the first token see nothing.
        let queries = queries.min(self.lengths[sequence]);
        match self.rotated[sequence] {
            Some(run) if queries > 0 && (run.tokens < queries || run.heads != heads) => Err(Error::QueriesNotRotated {
                sequence,
                queries,
                heads,
                rotated_tokens: run.tokens,
                rotated_heads: run.heads,
            }),
            _ => Ok(()),
        }
    }

    /// Checks that the first of `queries` queries finds its window whole, with `left` keys before its own. Tokens that were written to a
    /// ring and taken back have overwritten the oldest keys.
    pub(crate) fn check_queries(&self, sequence: usize, queries: usize, left: usize) -> Result<()> {
        let CacheKind::Rolling { window, queries: most, .. } = self.kind else { return Ok(()) };
        let (length, written) = (self.lengths[sequence], self.written[sequence]);
        if written <= self.kind.rows() || length == 0 {
            return Ok(());
        }
        // The length as if all queries but the first were taken back.
        let length = (length + 1).saturating_sub(queries);
        let least = (written + left + 2).saturating_sub(most + window);
        if length < least { Err(Error::CacheEvicted { sequence, length, least }) } else { Ok(()) }
    }

    /// Forgets all tokens from `length` on.
    pub(crate) fn truncate(&mut self, sequence: usize, length: usize) -> Result<()> {
        self.check_sequence(sequence)?;
        let most = self.lengths[sequence];
        if length > most {
            return Err(Error::CacheLength { sequence, length, most });
        }
        if let CacheKind::Rolling { .. } = self.kind {
            let least = least_length(self.kind, self.written[sequence]);
            if length < least && length > 0 {
                return Err(Error::CacheEvicted { sequence, length, least });
            }
            if length == 0 {
                self.written[sequence] = 0;
            }
        }
        if let CacheKind::Paged { page_size, .. } = self.kind {
            let kept = length.div_ceil(page_size);
            if kept < self.tables[sequence].len() {
                let gone = Arc::make_mut(&mut self.tables[sequence]).split_off(kept);
                self.give_back(&gone);
            }
        }
        if let Some(run) = &mut self.rotated[sequence] {
            run.tokens = run.tokens.saturating_sub(most - length);
        }
        if length == 0 || self.rotated[sequence].is_some_and(|run| run.tokens == 0) {
            self.rotated[sequence] = Some(Rotated::default());
        }
        self.lengths[sequence] = length;
        Ok(())
    }

    /// Of the tokens from `first` on, keeps those with these ascending numbers, one behind the other, and forgets the others. The moves are
    /// to be made in their order, after the changes: no row is written before it has been read.
    pub(crate) fn keep(&mut self, sequence: usize, first: usize, numbers: &[usize]) -> Result<(Changes, Vec<Move>)> {
        self.check_sequence(sequence)?;
        let most = self.lengths[sequence];
        if first > most {
            return Err(Error::CacheLength { sequence, length: first, most });
        }
        let invalid = |reason: String| Err(Error::InvalidOption { option: "kept tokens", reason });
        if let Some(pair) = numbers.windows(2).find(|pair| pair[0] >= pair[1]) {
            return invalid(format!("{} before {}; their numbers ascend", pair[0], pair[1]));
        }
        if let Some(&last) = numbers.last().filter(|last| **last >= most - first) {
            return invalid(format!("{last}; sequence {sequence} has {} tokens from {first} on", most - first));
        }
        if let CacheKind::Rolling { sink_tokens, .. } = self.kind {
            // The first token that no later one has overwritten.
            let (written, rows) = (self.written[sequence], self.kind.rows());
            let least = if written > rows { written - (rows - sink_tokens) } else { 0 };
            if first < least && numbers.iter().enumerate().any(|(to, from)| to != *from) {
                return Err(Error::CacheEvicted { sequence, length: first, least });
            }
        }
        let mut kept = self.clone();
        kept.lengths[sequence] = first;
        let mut added = vec![0; self.lengths.len()];
        added[sequence] = numbers.len();
        let changes = kept.reserve(&added)?;
        let moves = numbers
            .iter()
            .enumerate()
            .map(|(to, from)| [self.row_of_token(sequence, first + from), kept.row_of_token(sequence, first + to)]);
        let moves = moves.filter(|[from, to]| from != to).collect();
        kept.lengths[sequence] = most;
        kept.truncate(sequence, first + numbers.len())?;
        *self = kept;
        Ok((changes, moves))
    }

    /// Block and row in it of a token that the cache holds.
    fn row_of_token(&self, sequence: usize, token: usize) -> [usize; 2] {
        match self.kind {
            CacheKind::Rolling { sink_tokens, .. } if token >= sink_tokens => {
                [sequence, sink_tokens + (token - sink_tokens) % (self.kind.rows() - sink_tokens)]
            }
            CacheKind::Rolling { .. } => [sequence, token],
            _ => self.row(sequence, token),
        }
    }

    /// Makes `to` the same sequence as `from`. They share pages.
    pub(crate) fn fork(&mut self, from: usize, to: usize) -> Result<()> {
        self.check_sequence(from)?;
        self.check_sequence(to)?;
        if from == to {
            return Ok(());
        }
        self.lengths[to] = self.lengths[from];
        self.written[to] = self.written[from];
        self.rotated[to] = self.rotated[from];
        if let CacheKind::Paged { page_size, .. } = self.kind {
            let mut pages = self.tables[from].to_vec();
            pages.truncate(self.lengths[from].div_ceil(page_size));
            self.hold(to, pages);
        }
        Ok(())
    }

    /// Gives a sequence pages of the caller's choice, which other sequences may also hold.
    pub(crate) fn assign(&mut self, sequence: usize, table: &[u32], length: usize) -> Result<()> {
        self.check_sequence(sequence)?;
        let CacheKind::Paged { page_size, pages, sequence_pages } = self.kind else {
            let reason = format!("{:?}; only a paged cache has block tables", self.kind);
            return Err(Error::InvalidOption { option: "cache kind", reason });
        };
        if let Some(&page) = table.iter().find(|page| **page as usize >= pages) {
            return Err(Error::PageOutOfRange { page, pages });
        }
        let most = table.len().min(sequence_pages) * page_size;
        if table.len() > sequence_pages || length > most {
            return Err(Error::CacheLength { sequence, length: length.max(table.len() * page_size), most });
        }
        self.hold(sequence, table.to_vec());
        self.lengths[sequence] = length;
        self.rotated[sequence] = (length == 0).then(Rotated::default);
        Ok(())
    }

    fn hold(&mut self, sequence: usize, pages: Vec<u32>) {
        let holders = Arc::make_mut(&mut self.holders);
        for &page in &pages {
            holders[page as usize] += 1;
        }
        Arc::make_mut(&mut self.free).retain(|page| holders[*page as usize] == 0);
        let before = std::mem::replace(&mut self.tables[sequence], Arc::new(pages));
        self.give_back(&before);
    }
}
/// Fewest tokens that a sequence can go back to (except to none at all), after `written` tokens were written.
fn least_length(kind: CacheKind, written: usize) -> usize {
    match kind {
        CacheKind::Rolling { queries, .. } if written > kind.rows() => written - (queries - 1),
        _ => 0,
    }
}
