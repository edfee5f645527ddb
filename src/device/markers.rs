//! Arithmetic on the elements of fragments, which WGSL lacks: calls of marker functions become instructions of SPIR-V.
//!
//! A marker is a function of WGSL. Its name is one of these, then an underscore and the role of a matrix. Its body is never run.
//!
//!   component(matrix, i) -> scalar              the i-th component of the lane; i is a constant
//!   matrix_of(scalars) -> matrix                a matrix whose components these are
//!   bits_as(x) -> another type                  the same bits
//!
//! WGSL has no bf16 either. Where operands of matrices are bf16, the text says f16: arrays of f16 hold the bits, which nothing but loads of
//! fragments reads as numbers, and `matrix_of_a` takes f32. [`Operands::Bf16`] makes matrices of bf16 from those of f16, and converts what
//! `matrix_of_a` takes.

use std::collections::{BTreeMap, HashMap, HashSet};

/// Words in front of the first instruction.
pub(crate) const HEADER: usize = 5;
/// Opcodes, from the section "Instructions" of the SPIR-V specification.
const OP_NAME: u32 = 5;
const OP_MEMBER_NAME: u32 = 6;
const OP_EXTENSION: u32 = 10;
const OP_CAPABILITY: u32 = 17;
const OP_TYPE_FLOAT: u32 = 22;
const OP_CONSTANT: u32 = 43;
const OP_CONSTANT_NULL: u32 = 46;
const OP_FUNCTION: u32 = 54;
const OP_FUNCTION_END: u32 = 56;
const OP_FUNCTION_CALL: u32 = 57;
const OP_COMPOSITE_EXTRACT: u32 = 81;
const OP_COMPOSITE_INSERT: u32 = 82;
const OP_F_CONVERT: u32 = 115;
const OP_BITCAST: u32 = 124;
const OP_TYPE_COOPERATIVE_MATRIX: u32 = 4456;
/// Of SPV_KHR_bfloat16: two capabilities, and the encoding of a type of 16 bits.
const BFLOAT16_TYPE: u32 = 5116;
const BFLOAT16_COOPERATIVE_MATRIX: u32 = 5118;
const BFLOAT16_ENCODING: u32 = 0;

/// The numbers that a module's matrices multiply, which the text calls f16.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Operands {
    F16,
    Bf16,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Marker {
    Component,
    MatrixOf,
    BitsAs,
}

impl Marker {
    /// naga may append digits to a name.
    fn of(name: &str) -> Option<Self> {
        let markers =
            [("component_", Marker::Component), ("matrix_of_", Marker::MatrixOf), ("bits_as_", Marker::BitsAs)];
        markers.into_iter().find(|(start, _)| name.starts_with(start)).map(|(_, marker)| marker)
    }
}

/// An instruction: its opcode and its words, of which the first has the opcode and the number of words.
pub(crate) struct Instruction<'a> {
    pub(crate) op: u32,
    pub(crate) words: &'a [u32],
}

/// The instructions of a module.
///
/// # Errors
/// An instruction that ends beyond the module, or has no words.
pub(crate) fn instructions(module: &[u32]) -> Result<Vec<Instruction<'_>>, String> {
    let mut found = Vec::new();
    let mut at = HEADER;
    while at < module.len() {
        let (op, len) = (module[at] & 0xffff, (module[at] >> 16) as usize);
        let words = module.get(at..at + len).filter(|words| !words.is_empty());
        let words = words.ok_or_else(|| format!("an instruction of {len} words at word {at} of {}", module.len()))?;
        found.push(Instruction { op, words });
        at += len;
    }
    Ok(found)
}

/// The text of a name, in words of four bytes each, up to a zero.
fn text(words: &[u32]) -> String {
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).take_while(|byte| *byte != 0).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The words of a text, with the zero that ends it.
fn words_of(text: &str) -> Vec<u32> {
    let mut bytes = text.as_bytes().to_vec();
    bytes.resize(text.len() / 4 * 4 + 4, 0);
    bytes.chunks_exact(4).map(|word| u32::from_le_bytes([word[0], word[1], word[2], word[3]])).collect()
}

/// An instruction by its opcode and operands.
fn write(out: &mut Vec<u32>, op: u32, operands: &[u32]) {
    out.push(((operands.len() as u32 + 1) << 16) | op);
    out.extend_from_slice(operands);
}

/// A module without its marker functions, with instructions in place of their calls, and without names. It needs the names of its
/// functions.
///
/// # Errors
/// A call whose arguments do not fit the marker.
pub(crate) fn rewrite(module: &[u32], operands: Operands) -> Result<Vec<u32>, String> {
    let all = instructions(module)?;
    let mut markers: HashMap<u32, Marker> = HashMap::new();
    let mut constants: HashMap<u32, u32> = HashMap::new();
    let mut functions: HashSet<u32> = HashSet::new();
    let mut half = None;
    for Instruction { op, words } in &all {
        match (*op, *words) {
            (OP_NAME, [_, id, name @ ..]) => {
                if let Some(marker) = Marker::of(&text(name)) {
                    markers.insert(*id, marker);
                }
            }
            (OP_CONSTANT, [_, _, id, value]) => {
                constants.insert(*id, *value);
            }
            (OP_FUNCTION, [_, _, id, ..]) => {
                functions.insert(*id);
            }
            (OP_TYPE_FLOAT, [_, id, 16]) => half = Some(*id),
            _ => {}
        }
    }
    // A variable may be called like a marker.
    markers.retain(|id, _| functions.contains(id));

    let Some((header, _)) = module.split_at_checked(HEADER) else { return Err("the module has no header".into()) };
    let mut bound = header[3];
    let mut fresh = || {
        bound += 1;
        bound - 1
    };
    // Types and constants, up to the first function, and what follows.
    let (mut globals, mut bodies) = (header.to_vec(), Vec::with_capacity(module.len()));
    let mut zeros: BTreeMap<u32, u32> = BTreeMap::new();
    let mut in_marker = false;
    // The type of bf16, and those of the matrices of it.
    let (mut bfloat, mut of_bfloat): (Option<u32>, HashSet<u32>) = (None, HashSet::new());
    let mut declares = operands == Operands::Bf16;
    for Instruction { op, words } in &all {
        match (*op, *words) {
            (OP_NAME | OP_MEMBER_NAME, _) => continue,
            // Extensions follow the last capability.
            (OP_CAPABILITY, _) => {}
            _ if declares => {
                declares = false;
                write(&mut globals, OP_CAPABILITY, &[BFLOAT16_TYPE]);
                write(&mut globals, OP_CAPABILITY, &[BFLOAT16_COOPERATIVE_MATRIX]);
                write(&mut globals, OP_EXTENSION, &words_of("SPV_KHR_bfloat16"));
            }
            _ => {}
        }
        match (*op, *words) {
            (OP_TYPE_COOPERATIVE_MATRIX, [_, id, scalar, size @ ..])
                if operands == Operands::Bf16 && half == Some(*scalar) =>
            {
                let bfloat = *bfloat.get_or_insert_with(|| {
                    let id = fresh();
                    write(&mut globals, OP_TYPE_FLOAT, &[id, 16, BFLOAT16_ENCODING]);
                    id
                });
                write(&mut globals, *op, &[&[*id, bfloat], size].concat());
                of_bfloat.insert(*id);
                continue;
            }
            (OP_FUNCTION, [_, _, id, ..]) => in_marker = markers.contains_key(id),
            _ => {}
        }
        if in_marker {
            in_marker = *op != OP_FUNCTION_END;
            continue;
        }
        let call = match (*op, *words) {
            (OP_FUNCTION_CALL, [_, kind, id, function, arguments @ ..]) => {
                markers.get(function).map(|marker| (*marker, *kind, *id, arguments))
            }
            _ => None,
        };
        let Some((marker, kind, id, arguments)) = call else {
            let out = if bodies.is_empty() && *op != OP_FUNCTION { &mut globals } else { &mut bodies };
            out.extend_from_slice(words);
            continue;
        };
        let mut write = |op: u32, operands: &[u32]| write(&mut bodies, op, operands);
        match (marker, arguments) {
            (Marker::Component, [matrix, index]) => {
                let index = constants.get(index).ok_or("the index of a component is no constant")?;
                write(OP_COMPOSITE_EXTRACT, &[kind, id, *matrix, *index]);
            }
            (Marker::MatrixOf, [_, ..]) => {
                let mut components = arguments.to_vec();
                if let Some(bfloat) = bfloat.filter(|_| of_bfloat.contains(&kind)) {
                    for component in &mut components {
                        let single = std::mem::replace(component, fresh());
                        write(OP_F_CONVERT, &[bfloat, *component, single]);
                    }
                }
                let mut matrix = *zeros.entry(kind).or_insert_with(&mut fresh);
                let last = components.len() - 1;
                for (index, component) in components.into_iter().enumerate() {
                    let next = if index == last { id } else { fresh() };
                    write(OP_COMPOSITE_INSERT, &[kind, next, component, matrix, index as u32]);
                    matrix = next;
                }
            }
            (Marker::BitsAs, [bits]) => write(OP_BITCAST, &[kind, id, *bits]),
            (marker, arguments) => return Err(format!("{marker:?} with {} arguments", arguments.len())),
        }
    }
    for (kind, id) in zeros {
        globals.extend([(3 << 16) | OP_CONSTANT_NULL, kind, id]);
    }
    globals[3] = bound;
    Ok([globals, bodies].concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn instruction(op: u32, operands: &[u32]) -> Vec<u32> {
        [&[((operands.len() as u32 + 1) << 16) | op], operands].concat()
    }

    fn named(id: u32, name: &str) -> Vec<u32> {
        instruction(OP_NAME, &[&[id][..], &words_of(name)].concat())
    }

    fn function(id: u32) -> Vec<u32> {
        instruction(OP_FUNCTION, &[1, id, 0, 2])
    }

    fn module(bound: u32, instructions: &[Vec<u32>]) -> Vec<u32> {
        [&[0x0723_0203, 0x0001_0600, 0, bound, 0][..], &instructions.concat()].concat()
    }

    #[test]
    fn calls_become_instructions() {
        let [end, constant] = [instruction(OP_FUNCTION_END, &[]), instruction(OP_CONSTANT, &[1, 5, 7])];
        let call = |operands: &[u32]| instruction(OP_FUNCTION_CALL, operands);
        let names =
            [named(10, "component_c"), named(11, "matrix_of_a_1"), named(12, "bits_as_halves"), named(13, "main")];
        let markers = [10, 11, 12].map(|id| [function(id), vec![1 << 16], end.clone()].concat());
        let other = call(&[3, 40, 14, 41]);
        let calls = [
            call(&[2, 20, 10, 30, 5]),
            call(&[3, 21, 11, 20, 20, 20]),
            call(&[3, 22, 11, 20, 20, 20]),
            call(&[4, 23, 12, 31]),
        ];
        let text = [
            &names[..],
            std::slice::from_ref(&constant),
            &markers,
            &[function(13), other.clone()],
            &calls,
            std::slice::from_ref(&end),
        ];
        let rewritten = rewrite(&module(50, &text.concat()), Operands::F16).unwrap();
        let insert = |id, part, matrix, index| instruction(OP_COMPOSITE_INSERT, &[3, id, part, matrix, index]);
        let expected = [
            constant,
            instruction(OP_CONSTANT_NULL, &[3, 50]),
            function(13),
            other,
            instruction(OP_COMPOSITE_EXTRACT, &[2, 20, 30, 7]),
            insert(51, 20, 50, 0),
            insert(52, 20, 51, 1),
            insert(21, 20, 52, 2),
            insert(53, 20, 50, 0),
            insert(54, 20, 53, 1),
            insert(22, 20, 54, 2),
            instruction(OP_BITCAST, &[4, 23, 31]),
            end,
        ];
        assert_eq!(rewritten, module(55, &expected));
    }

    /// Matrices of f16 become matrices of bf16, and their components are converted from f32. Other types stay.
    #[test]
    fn operands_in_bf16() {
        let end = instruction(OP_FUNCTION_END, &[]);
        let [half, single] = [instruction(OP_TYPE_FLOAT, &[2, 16]), instruction(OP_TYPE_FLOAT, &[3, 32])];
        let matrix = |id, scalar, role| instruction(OP_TYPE_COOPERATIVE_MATRIX, &[id, scalar, 40, 41, 41, role]);
        let start = |added: &[Vec<u32>]| {
            let [first, last] = [1, 9].map(|capability| instruction(OP_CAPABILITY, &[capability]));
            [vec![first, last], added.to_vec(), vec![instruction(OP_EXTENSION, &words_of("SPV_KHR_other"))]].concat()
        };
        let make = |id, kind, components: [u32; 2]| {
            instruction(OP_FUNCTION_CALL, &[kind, id, if kind == 6 { 11 } else { 10 }, components[0], components[1]])
        };
        let text = [
            start(&[]),
            vec![named(10, "matrix_of_a"), named(11, "matrix_of_c")],
            vec![half.clone(), single.clone(), matrix(4, 2, 0), matrix(5, 2, 1), matrix(6, 3, 2)],
            vec![function(10), end.clone(), function(11), end.clone()],
            vec![function(13), make(20, 4, [30, 31]), make(21, 6, [30, 31]), end.clone()],
        ];
        let rewritten = rewrite(&module(50, &text.concat()), Operands::Bf16).unwrap();
        let declared = [
            instruction(OP_CAPABILITY, &[BFLOAT16_TYPE]),
            instruction(OP_CAPABILITY, &[BFLOAT16_COOPERATIVE_MATRIX]),
            instruction(OP_EXTENSION, &words_of("SPV_KHR_bfloat16")),
        ];
        let convert = |id, single| instruction(OP_F_CONVERT, &[50, id, single]);
        let insert = |kind, id, part, matrix, index| instruction(OP_COMPOSITE_INSERT, &[kind, id, part, matrix, index]);
        let expected = [
            start(&declared),
            vec![half, single, instruction(OP_TYPE_FLOAT, &[50, 16, BFLOAT16_ENCODING])],
            vec![matrix(4, 50, 0), matrix(5, 50, 1), matrix(6, 3, 2)],
            vec![instruction(OP_CONSTANT_NULL, &[4, 53]), instruction(OP_CONSTANT_NULL, &[6, 55])],
            vec![function(13), convert(51, 30), convert(52, 31), insert(4, 54, 51, 53, 0), insert(4, 20, 52, 54, 1)],
            vec![insert(6, 56, 30, 55, 0), insert(6, 21, 31, 56, 1), end],
        ];
        assert_eq!(rewritten, module(57, &expected.concat()));
    }

    #[test]
    fn what_does_not_fit_is_told() {
        let start = [named(10, "component_c"), function(10), instruction(OP_FUNCTION_END, &[]), function(13)].concat();
        let told = |rest: Vec<u32>| rewrite(&module(50, &[start.clone(), rest]), Operands::F16).unwrap_err();
        assert_eq!(told(instruction(OP_FUNCTION_CALL, &[2, 20, 10, 30, 5])), "the index of a component is no constant");
        assert_eq!(told(instruction(OP_FUNCTION_CALL, &[2, 20, 10, 30])), "Component with 1 arguments");
        assert_eq!(told(vec![9 << 16 | 43]), "an instruction of 9 words at word 21 of 22");
        assert_eq!(rewrite(&[1, 2, 3], Operands::Bf16).unwrap_err(), "the module has no header");
    }
}
