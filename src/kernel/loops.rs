//! The loops of kernels by name, and the hints that a driver gets for them.

use std::fmt;
use std::str::FromStr;

use crate::device::capabilities::Capabilities;
use crate::kernel::Kernel;
use crate::kernel::micro_kernel::MicroKernel;

/// A loop of a kernel's `main`. Loops that do the same have one name. In WGSL the comment `// Loop: NAME` stands in front of each, and a
/// loop that no tile speaks of has none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum LoopName {
    /// Over the query heads of a group.
    Heads,
    /// Over the tiles of the other side.
    Tiles,
    /// Over the features of a product, a `k_step` at a time.
    KSteps,
    /// Over the columns of an accumulation, an `n_step` at a time.
    NSteps,
    /// Over what a step has staged.
    Inner,
}

impl LoopName {
    /// All names, from the outermost loop inwards.
    pub const ALL: [LoopName; 5] =
        [LoopName::Heads, LoopName::Tiles, LoopName::KSteps, LoopName::NSteps, LoopName::Inner];

    /// The loops of a kernel, as one micro-kernel computes it, that have names; none where the kernel has no tiles.
    pub fn of(kernel: Kernel, micro_kernel: MicroKernel) -> Vec<LoopName> {
        let Some(tiled) = kernel.tiled() else { return Vec::new() };
        // Cooperative products are unrolled in the text.
        let has_steps = !micro_kernel.properties().needs_matrices;
        let is_there = |name: &LoopName| match name {
            LoopName::Heads => kernel.spec().work.rows_are_keys() || tiled.sums_pairs,
            LoopName::Tiles => true,
            LoopName::KSteps | LoopName::Inner => has_steps,
            LoopName::NSteps => has_steps && !tiled.accumulators.is_empty(),
        };
        LoopName::ALL.into_iter().filter(is_there).collect()
    }
}

impl fmt::Display for LoopName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            LoopName::Heads => "heads",
            LoopName::Tiles => "tiles",
            LoopName::KSteps => "k_steps",
            LoopName::NSteps => "n_steps",
            LoopName::Inner => "inner",
        })
    }
}

/// A hint for a loop. The driver may ignore it. Results have the same bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum LoopHint {
    /// Leave it a loop: `DontUnroll` of SPIR-V.
    Keep,
    /// Write its body several times: `Unroll` of SPIR-V.
    Unroll,
}

impl LoopHint {
    /// Both.
    pub const ALL: [LoopHint; 2] = [LoopHint::Keep, LoopHint::Unroll];
}

impl fmt::Display for LoopHint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            LoopHint::Keep => "keep",
            LoopHint::Unroll => "unroll",
        })
    }
}

/// Hints for the loops of a kernel: one for every loop of its `main`, with a name or without, and others for the loops of some names,
/// which go before it.
///
/// As text ([`FromStr`] and [`Display`](fmt::Display)) it is `loops keep`, `loops inner unroll`, or
/// `loops keep k_steps unroll inner unroll`.
///
/// ```
/// use sink_attention::plan::{LoopHint, LoopHints, LoopName};
/// let hints: LoopHints = "loops keep inner unroll".parse()?;
/// assert_eq!(hints, LoopHints::every(LoopHint::Keep).with(LoopName::Inner, LoopHint::Unroll));
/// assert_eq!(hints.of(Some(LoopName::Tiles)), Some(LoopHint::Keep));
/// # Ok::<(), String>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct LoopHints {
    every: Option<LoopHint>,
    named: [Option<LoopHint>; LoopName::ALL.len()],
}

impl LoopHints {
    /// None: the driver decides.
    pub const NONE: LoopHints = LoopHints { every: None, named: [None; LoopName::ALL.len()] };

    /// One for every loop.
    pub fn every(hint: LoopHint) -> Self {
        LoopHints { every: Some(hint), ..LoopHints::NONE }
    }

    /// Adds one for the loops of a name.
    pub fn with(mut self, name: LoopName, hint: LoopHint) -> Self {
        self.named[name as usize] = Some(hint);
        self
    }

    /// Whether there are none.
    pub fn is_none(&self) -> bool {
        *self == LoopHints::NONE
    }

    /// The hint for a loop, which may have a name.
    pub fn of(&self, name: Option<LoopName>) -> Option<LoopHint> {
        name.and_then(|name| self.named[name as usize]).or(self.every)
    }

    /// The names that have a hint of their own.
    pub fn names(&self) -> impl Iterator<Item = LoopName> {
        LoopName::ALL.into_iter().filter(|name| self.named[*name as usize].is_some())
    }

    /// Why they would say nothing of a kernel to the driver of a device.
    pub(crate) fn check(
        &self,
        kernel: Kernel,
        micro_kernel: MicroKernel,
        capabilities: &Capabilities,
    ) -> Result<(), String> {
        if !self.is_none() && capabilities.spirv.is_none() {
            let name = &capabilities.name;
            return Err(format!("\"{self}\": hints for loops go to the driver as SPIR-V, which {name} does not take"));
        }
        let there = LoopName::of(kernel, micro_kernel);
        let Some(missing) = self.names().find(|name| !there.contains(name)) else { return Ok(()) };
        let there: Vec<String> = there.iter().map(ToString::to_string).collect();
        let (kernel, there) = (kernel.name(), there.join(", "));
        Err(format!("\"{self}\": as {micro_kernel} {kernel} has no loops {missing}, it has {there}"))
    }

    /// The end of a kernel's name.
    pub(crate) fn suffix(&self) -> String {
        if self.is_none() { String::new() } else { format!("_{self}").replace(' ', "_") }
    }

    /// Text that may end with `, loops ...`, without that, and the hints.
    pub(crate) fn split_from(text: &str) -> Result<(&str, LoopHints), String> {
        match text.rfind(", loops") {
            Some(at) => Ok((&text[..at], text[at + 2..].parse()?)),
            None => Ok((text, LoopHints::NONE)),
        }
    }

    /// What [`split_from`](Self::split_from) takes away.
    pub(crate) fn write_after(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_none() { Ok(()) } else { write!(f, ", {self}") }
    }
}

impl fmt::Display for LoopHints {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("loops")?;
        self.every.iter().try_for_each(|hint| write!(f, " {hint}"))?;
        self.names().zip(self.named.iter().flatten()).try_for_each(|(name, hint)| write!(f, " {name} {hint}"))
    }
}

/// From what [`Display`](fmt::Display) writes, in any order of the names.
impl FromStr for LoopHints {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = |word: Option<&str>| {
            let names: Vec<String> = LoopName::ALL.iter().map(ToString::to_string).collect();
            format!(
                "{text:?}: want a form like \"loops keep\" or \"loops keep inner unroll\" of keep, unroll and the loops {}, each once; \
                 found {}",
                names.join(", "),
                word.map_or("the end".into(), |word| format!("{word:?}"))
            )
        };
        let hint = |word: &str| LoopHint::ALL.into_iter().find(|hint| hint.to_string() == word);
        let mut words = text.split_whitespace();
        if words.next() != Some("loops") {
            return Err(wrong(text.split_whitespace().next()));
        }
        let mut hints = LoopHints::NONE;
        let mut next = words.next();
        if let Some(every) = next.and_then(hint) {
            (hints.every, next) = (Some(every), words.next());
        } else if next.is_none() {
            return Err(wrong(None));
        }
        while let Some(word) = next {
            let name = LoopName::ALL.into_iter().find(|name| name.to_string() == word);
            let name = name.filter(|name| hints.named[*name as usize].is_none()).ok_or_else(|| wrong(Some(word)))?;
            let word = words.next();
            hints = hints.with(name, word.and_then(hint).ok_or_else(|| wrong(word))?);
            next = words.next();
        }
        Ok(hints)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_and_back() {
        for text in
            ["loops keep", "loops unroll", "loops heads unroll inner keep", "loops keep k_steps unroll n_steps keep"]
        {
            assert_eq!(text.parse::<LoopHints>().unwrap().to_string(), text);
        }
        assert_eq!("loops inner keep heads unroll".parse(), "loops heads unroll inner keep".parse::<LoopHints>());
        for (text, found) in [
            ("", "the end"),
            ("loops", "the end"),
            ("loops inner", "the end"),
            ("loop keep", "\"loop\""),
            ("loops keep unroll", "\"unroll\""),
            ("loops inner keep inner keep", "\"inner\""),
            ("loops inner maybe", "\"maybe\""),
            ("loops other keep", "\"other\""),
        ] {
            let error = text.parse::<LoopHints>().unwrap_err();
            assert!(error.ends_with(&format!("found {found}")), "{error}");
        }
    }
}
