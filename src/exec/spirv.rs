//! Kernels in SPIR-V: what wgpu would hand to the driver, made here so that it can say more than WGSL.

use crate::device::capabilities::SpirvVersion;
use crate::device::markers::{HEADER, Operands};
use crate::device::spirv::Translation;
use crate::kernel::Variant;
use crate::kernel::loops::{LoopHint, LoopHints, LoopName};
use crate::kernel::tile::decode::DecodeTiles;
use crate::problem::error::{Error, Result};

impl Variant {
    /// The SPIR-V of this variant: the words that wgpu makes of its [WGSL](Self::wgsl) where it compiles without names for debuggers, with
    /// arithmetic on the elements of fragments in place of the calls that stand for it, and with the variant's hints for loops. Where it
    /// multiplies cooperative matrices, barriers of subgroups order workgroup memory, and scopes of the device are declared, which naga
    /// leaves out. Bindings are numbered as wgpu does, one after the other in the order of their slots.
    ///
    /// # Errors
    /// [`Error::Gpu`] where a hint is for loops that are not there; and if naga refuses the text, which would be a mistake of this crate.
    pub fn spirv(&self, version: SpirvVersion) -> Result<Vec<u32>> {
        let failed = |message: String| Error::Gpu {
            during: "composing a shader",
            message: format!("{} in SPIR-V: {message}", self.name()),
        };
        let text = self.wgsl()?;
        let mut words = translate(self, &text, version).map_err(failed)?;
        if !self.hints().is_none() {
            let hints = hints_for(self.hints(), &text).map_err(failed)?;
            set_loop_controls(&mut words, &hints).map_err(failed)?;
        }
        Ok(words)
    }

    /// Whether it says more than WGSL can, so that it has to reach the driver as SPIR-V.
    pub(crate) fn needs_spirv(&self) -> bool {
        self.micro_kernel.properties().needs_elements || !self.hints().is_none()
    }

    /// The hints for its loops. Decoding on elements keeps all: unrolled by the driver, its loop took 94 us where it takes 82 (H200,
    /// benches/results/2026-11-30-h200-decode.md).
    pub(crate) fn hints(&self) -> LoopHints {
        match self.decode_tiles() {
            Some(DecodeTiles::Fragments { .. }) => LoopHints::every(LoopHint::Keep),
            _ => self.tiling.map_or(LoopHints::NONE, |tiling| tiling.loops()),
        }
    }
}

/// The words of a variant's text, without hints for loops.
fn translate(variant: &Variant, text: &str, version: SpirvVersion) -> Result<Vec<u32>, String> {
    let mut slots: Vec<u32> = variant.bindings().iter().map(|(binding, _)| binding.slot()).collect();
    slots.sort_unstable();
    // Decoding has tiles of its own.
    let needs = variant.micro_kernel.properties();
    let operands = if variant.multiplies_bf16() { Operands::Bf16 } else { Operands::F16 };
    let markers = needs.needs_elements.then_some(operands);
    Translation { slots: &slots, needs_matrices: needs.needs_matrices, markers }.of(text, version)
}

/// In front of a loop in WGSL: the rest of the line is its [`LoopName`].
const MARKER: &str = "// Loop: ";

/// The hint for each loop of `main` of a composed text, in the order of the text.
///
/// # Errors
/// Names with hints whose loops are not there; marks that stand in front of no loop.
fn hints_for(hints: LoopHints, wgsl: &str) -> Result<Vec<Option<LoopHint>>, String> {
    let loops = loops_of_main(wgsl)?;
    match hints.names().find(|name| !loops.contains(&Some(*name))) {
        Some(name) => Err(format!("a hint for loops \"{name}\", of which main has none among {}", loops.len())),
        None => Ok(loops.into_iter().map(|name| hints.of(name)).collect()),
    }
}

/// The loops of `main`, in the order of the text, each with its name where it has one.
fn loops_of_main(wgsl: &str) -> Result<Vec<Option<LoopName>>, String> {
    let mut lines = wgsl.lines().enumerate().skip_while(|(_, line)| !line.starts_with("fn main(")).peekable();
    if lines.peek().is_none() {
        return Err("the text has no main".into());
    }
    let mut loops = Vec::new();
    let mut marked: Option<LoopName> = None;
    for (number, line) in lines.take_while(|(_, line)| !line.starts_with('}')) {
        let failed = |reason: &str| Err(format!("line {}, {:?}: {reason}", number + 1, line.trim()));
        if let Some(name) = line.trim().strip_prefix(MARKER) {
            let known = LoopName::ALL.into_iter().find(|known| known.to_string() == name);
            let (Some(name), None) = (known, marked) else { return failed("not one name of a loop") };
            marked = Some(name);
            continue;
        }
        let code = line.split("//").next().unwrap_or_default();
        let mut words = code.split(|c: char| !c.is_alphanumeric() && c != '_').filter(|word| !word.is_empty());
        let is_loop = |word: &str| ["for", "loop", "while"].contains(&word);
        if let Some(name) = marked.take() {
            if !words.next().is_some_and(is_loop) {
                return failed("no loop behind its name");
            }
            loops.push(Some(name));
        }
        loops.extend(words.filter(|word| is_loop(word)).map(|_| None));
    }
    Ok(loops)
}

/// Opcodes, from the section "Instructions" of the SPIR-V specification.
const OP_ENTRY_POINT: u32 = 15;
const OP_FUNCTION: u32 = 54;
const OP_LOOP_MERGE: u32 = 246;
/// Bits of a loop's control.
const UNROLL: u32 = 1;
const DONT_UNROLL: u32 = 2;

/// Sets the control of each loop of the entry point that has a hint. naga writes the loops of a function in the order of the text, a loop
/// before those within it.
fn set_loop_controls(words: &mut [u32], hints: &[Option<LoopHint>]) -> Result<(), String> {
    let mut entry = None;
    let mut is_entry = false;
    let mut found = 0;
    let mut at = HEADER;
    while at < words.len() {
        let (op, len) = (words[at] & 0xffff, (words[at] >> 16) as usize);
        let (all, end) = (words.len(), at + len);
        let instruction = words.get_mut(at..end).filter(|instruction| !instruction.is_empty());
        let Some(instruction) = instruction else {
            return Err(format!("an instruction of {len} words at word {at} of {all}"));
        };
        match (op, instruction) {
            (OP_ENTRY_POINT, [_, _, _, ..]) if entry.is_some() => return Err("more than one entry point".into()),
            (OP_ENTRY_POINT, [_, _, function, ..]) => entry = Some(*function),
            (OP_FUNCTION, [_, _, function, ..]) => is_entry = entry == Some(*function),
            (OP_LOOP_MERGE, [_, _, _, control, ..]) if is_entry => {
                *control = match hints.get(found) {
                    Some(Some(LoopHint::Keep)) => DONT_UNROLL,
                    Some(Some(LoopHint::Unroll)) => UNROLL,
                    Some(None) | None => *control,
                };
                found += 1;
            }
            _ => {}
        }
        at = end;
    }
    if found == hints.len() {
        Ok(())
    } else {
        Err(format!("main has {} loops in WGSL and {found} in SPIR-V", hints.len()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::Kernel;
    use crate::plan::{Capabilities, Pass, Tiling};
    use crate::problem::{Options, Problem, Shape};

    const TEXT: &str = "fn other() {
  for (;;) { break; }
}

@compute @workgroup_size(1)
fn main(
  @builtin(local_invocation_index) thread: u32,
) {
  // Loop: tiles
  for (var tile = 0u; tile < 4u; tile += 1u) {
    // A loop for nothing.
    loop { while (thread > looped) { } }
    // Loop: inner
    while (true) { break; }
  }
}

fn last() {
  loop { break; }
}
";

    #[test]
    fn loops_have_the_names_in_front_of_them() {
        use LoopName::{Inner, Tiles};
        assert_eq!(loops_of_main(TEXT), Ok(vec![Some(Tiles), None, None, Some(Inner)]));
        let hints: LoopHints = "loops tiles unroll inner keep".parse().unwrap();
        let [keep, unroll] = LoopHint::ALL.map(Some);
        assert_eq!(hints_for(hints, TEXT), Ok(vec![unroll, None, None, keep]));
        let hints = LoopHints::every(LoopHint::Unroll).with(Inner, LoopHint::Keep);
        assert_eq!(hints_for(hints, TEXT), Ok(vec![unroll, unroll, unroll, keep]));
        for (text, message) in [
            (TEXT.replace("Loop: inner", "Loop: innner"), "line 13, \"// Loop: innner\""),
            (TEXT.replace("// A loop for nothing.", "// Loop: heads\nlet x = 1u;"), "no loop behind"),
            (TEXT.replace("// A loop for nothing.", "// Loop: heads\n// Loop: heads"), "not one name"),
            (TEXT.replace("fn main", "fn mine"), "no main"),
        ] {
            let error = hints_for(hints, &text).unwrap_err();
            assert!(error.contains(message), "no {message:?} in {error}");
        }
        let error = hints_for(hints.with(LoopName::Heads, LoopHint::Keep), TEXT).unwrap_err();
        assert_eq!(error, "a hint for loops \"heads\", of which main has none among 4");
    }

    fn instruction(op: u32, operands: &[u32]) -> Vec<u32> {
        [&[((operands.len() as u32 + 1) << 16) | op], operands].concat()
    }

    fn module(instructions: &[Vec<u32>]) -> Vec<u32> {
        [&[0x0723_0203, 0x0001_0600, 0, 99, 0][..], &instructions.concat()].concat()
    }

    /// Loops of the entry point alone, in their order.
    #[test]
    fn loops_of_the_entry_point_get_their_hints() {
        let entry = instruction(OP_ENTRY_POINT, &[5, 7, 0x6e69_616d, 0]);
        let function = |id| instruction(OP_FUNCTION, &[1, id, 0, 2]);
        let merge = |control| instruction(OP_LOOP_MERGE, &[10, 11, control]);
        let with = |controls: [u32; 4]| {
            let [other, first, second, third] = controls.map(merge);
            // A constant whose words look like a loop.
            let constant = instruction(43, &[1, 3, merge(0)[0]]);
            module(&[entry.clone(), constant, function(6), other, function(7), first, second, third])
        };
        let mut words = with([0; 4]);
        set_loop_controls(&mut words, &[Some(LoopHint::Unroll), None, Some(LoopHint::Keep)]).unwrap();
        assert_eq!(words, with([0, UNROLL, 0, DONT_UNROLL]));

        for hints in [&[None; 2][..], &[None; 4]] {
            let error = set_loop_controls(&mut words, hints).unwrap_err();
            assert_eq!(error, format!("main has {} loops in WGSL and 3 in SPIR-V", hints.len()));
        }
        let spoiled = |words: Vec<u32>| set_loop_controls(&mut { words }, &[]).unwrap_err();
        assert_eq!(spoiled(module(&[vec![9 << 16 | 43]])), "an instruction of 9 words at word 5 of 6");
        assert_eq!(spoiled(module(&[vec![43]])), "an instruction of 0 words at word 5 of 6");
        assert_eq!(spoiled(module(&[entry.clone(), entry])), "more than one entry point");
    }

    /// Word by word, so that a hint changes nothing else.
    #[test]
    fn hints_change_the_controls_of_loops_alone() {
        let h200 = &Capabilities::samples()[0];
        let shape = Shape { batch: 1, heads: 4, kv_heads: 2, seq_q: 256, seq_k: 256, head_dim: 64, value_dim: 64 };
        let problem = Problem::new(shape, Options::new().causal(true)).unwrap();
        let spirv = |text: &str| {
            let tiling: Tiling = text.parse().unwrap();
            let pass = Pass::with_tiles(Kernel::FORWARD, &problem, h200, tiling).unwrap();
            pass.variant.spirv(SpirvVersion { major: 1, minor: 6 }).unwrap()
        };
        let tiles = "portable 64x32 (16x8 threads of 4x4), k_step 32, n_step 16";
        let plain = spirv(tiles);
        let changed = |loops: &str| -> Vec<u32> {
            let words = spirv(&format!("{tiles}, {loops}"));
            assert_eq!(words.len(), plain.len());
            words.iter().zip(&plain).filter(|(new, old)| new != old).map(|(new, _)| *new).collect()
        };
        // The tiles, a product, its inner loop, an accumulation, its two inner loops, of which one is for columns that are not finite.
        assert_eq!(changed("loops keep"), [DONT_UNROLL; 6]);
        assert_eq!(changed("loops inner unroll"), [UNROLL; 2]);
        assert_eq!(changed("loops keep inner unroll").iter().sum::<u32>(), 4 * DONT_UNROLL + 2 * UNROLL);
    }

    /// A variant that the planner did not make gets an error, not other words.
    #[test]
    fn hints_for_loops_that_are_not_there_are_errors() {
        let h200 = &Capabilities::samples()[0];
        let shape = Shape { batch: 1, heads: 4, kv_heads: 2, seq_q: 256, seq_k: 256, head_dim: 64, value_dim: 64 };
        let problem = Problem::new(shape, Options::new()).unwrap();
        let tiling = Tiling::candidates(Kernel::FORWARD, &problem, h200, crate::plan::MicroKernel::Portable)[0];
        let variant = Pass::with_tiles(Kernel::FORWARD, &problem, h200, tiling).unwrap().variant;
        let hints: LoopHints = "loops heads keep".parse().unwrap();
        let variant = Variant { tiling: Some(tiling.with_loops(hints)), ..variant };
        let error = variant.spirv(SpirvVersion { major: 1, minor: 6 }).unwrap_err().to_string();
        assert!(error.contains("a hint for loops \"heads\""), "{error}");
    }
}
