//! What naga 30 leaves out of SPIR-V under Vulkan's memory model, which cooperative matrices want.

use std::collections::{HashMap, HashSet};

use crate::device::markers::{HEADER, Instruction, instructions};

/// Opcodes, from the section "Instructions" of the SPIR-V specification.
const OP_MEMORY_MODEL: u32 = 14;
const OP_CAPABILITY: u32 = 17;
const OP_CONSTANT: u32 = 43;
const OP_FUNCTION: u32 = 54;
const OP_CONTROL_BARRIER: u32 = 224;
const OP_MEMORY_BARRIER: u32 = 225;
const OP_ATOMIC_LOAD: u32 = 227;
const OP_ATOMIC_STORE: u32 = 228;
const OP_ATOMIC_XOR: u32 = 242;

const VULKAN_MEMORY_MODEL: u32 = 3;
const VULKAN_MEMORY_MODEL_DEVICE_SCOPE: u32 = 5346;
const SCOPE_DEVICE: u32 = 1;
/// Classes of memory that a barrier orders, in its semantics.
const UNIFORM_MEMORY: u32 = 0x40;
const SUBGROUP_MEMORY: u32 = 0x80;
const WORKGROUP_MEMORY: u32 = 0x100;
const IMAGE_MEMORY: u32 = 0x800;

/// The operands of an instruction that are a scope of memory and its semantics.
fn scope_and_semantics(Instruction { op, words }: &Instruction<'_>) -> Option<[usize; 2]> {
    let [scope, semantics] = match *op {
        OP_CONTROL_BARRIER => [2, 3],
        OP_MEMORY_BARRIER => [1, 2],
        OP_ATOMIC_STORE => [2, 3],
        OP_ATOMIC_LOAD..=OP_ATOMIC_XOR => [4, 5],
        _ => return None,
    };
    (words.len() > semantics).then_some([scope, semantics])
}

/// The module with what it lacks; a module under another memory model as it is.
///
/// - A barrier of a subgroup orders workgroup memory. naga names memory of subgroups, a class that Vulkan does not have, so that the
///   barrier would order nothing.
/// - Scopes of the device are declared, as atomics on buffers have them. wgpu asks for the feature wherever it offers the matrices.
///
/// # Errors
/// An instruction that ends beyond the module, or has no words.
pub(crate) fn mend(module: &[u32]) -> Result<Vec<u32>, String> {
    let all = instructions(module)?;
    let is_vulkan = |i: &Instruction<'_>| i.op == OP_MEMORY_MODEL && i.words.get(2) == Some(&VULKAN_MEMORY_MODEL);
    if !all.iter().any(is_vulkan) {
        return Ok(module.to_vec());
    }
    // Type and value by number, and the other way round.
    let constant = |i: &Instruction<'_>| match (i.op, i.words) {
        (OP_CONSTANT, &[_, kind, id, value]) => Some((id, (kind, value))),
        _ => None,
    };
    let values: HashMap<u32, (u32, u32)> = all.iter().filter_map(constant).collect();
    let mut ids: HashMap<(u32, u32), u32> = values.iter().map(|(id, value)| (*value, *id)).collect();
    let operands = || all.iter().filter_map(|i| Some((i, scope_and_semantics(i)?)));
    let value_of = |i: &Instruction<'_>, place: usize| values.get(&i.words[place]).copied();

    let mut bound = module[3];
    let mut constants = Vec::new();
    let mut mended: HashMap<u32, u32> = HashMap::new();
    for (instruction, [_, place]) in operands() {
        let Some((kind, semantics)) = value_of(instruction, place) else { continue };
        let classes = UNIFORM_MEMORY | WORKGROUP_MEMORY | IMAGE_MEMORY;
        if semantics & SUBGROUP_MEMORY == 0 || semantics & classes != 0 {
            continue;
        }
        let wanted = (kind, (semantics & !SUBGROUP_MEMORY) | WORKGROUP_MEMORY);
        let id = *ids.entry(wanted).or_insert_with(|| {
            constants.extend([(4 << 16) | OP_CONSTANT, wanted.0, bound, wanted.1]);
            bound += 1;
            bound - 1
        });
        mended.insert(instruction.words[place], id);
    }
    let declared: HashSet<u32> =
        all.iter().filter(|i| i.op == OP_CAPABILITY).filter_map(|i| i.words.get(1).copied()).collect();
    let is_of_device =
        operands().any(|(i, [place, _])| value_of(i, place).is_some_and(|(_, scope)| scope == SCOPE_DEVICE));
    let mut lacks = is_of_device && !declared.contains(&VULKAN_MEMORY_MODEL_DEVICE_SCOPE);

    let mut words = module[..HEADER].to_vec();
    words[3] = bound;
    for instruction in &all {
        // Capabilities come first.
        if std::mem::take(&mut lacks) {
            words.extend([(2 << 16) | OP_CAPABILITY, VULKAN_MEMORY_MODEL_DEVICE_SCOPE]);
        }
        if instruction.op == OP_FUNCTION {
            words.append(&mut constants);
        }
        let start = words.len();
        words.extend_from_slice(instruction.words);
        if let Some([_, place]) = scope_and_semantics(instruction)
            && let Some(id) = mended.get(&instruction.words[place])
        {
            words[start + place] = *id;
        }
    }
    Ok(words)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn module(bound: u32, instructions: &[&[u32]]) -> Vec<u32> {
        let words = |operands: &&[u32]| {
            let first = ((operands.len() as u32) << 16) | operands[0];
            [&[first], &operands[1..]].concat()
        };
        let words: Vec<u32> = instructions.iter().flat_map(words).collect();
        [&[0x0723_0203, 0x0001_0600, 0, bound, 0][..], &words].concat()
    }

    const VULKAN: &[u32] = &[OP_MEMORY_MODEL, 0, VULKAN_MEMORY_MODEL];
    const FUNCTION: &[u32] = &[OP_FUNCTION, 1, 20, 0, 2];
    /// Numbers 10 to 12: subgroups, acquire and release, with the class that naga writes.
    const SUBGROUPS: &[u32] = &[OP_CONSTANT, 7, 10, 3];
    const OF_SUBGROUPS: &[u32] = &[OP_CONSTANT, 7, 11, 0x88];
    const OF_WORKGROUPS: &[u32] = &[OP_CONSTANT, 7, 12, 0x108];
    const DEVICE: &[u32] = &[OP_CONSTANT, 7, 13, SCOPE_DEVICE];

    fn barrier(semantics: u32) -> [u32; 4] {
        [OP_CONTROL_BARRIER, 10, 10, semantics]
    }

    #[test]
    fn barriers_of_subgroups_order_workgroup_memory() {
        // A constant with the value is there already, or not; the function's own number 11 elsewhere remains.
        let other = [OP_ATOMIC_XOR, 11, 11, 11, 10, 12, 11];
        let with =
            |barrier: &[u32]| module(30, &[VULKAN, SUBGROUPS, OF_SUBGROUPS, OF_WORKGROUPS, FUNCTION, barrier, &other]);
        assert_eq!(mend(&with(&barrier(11))), Ok(with(&barrier(12))));
        assert_eq!(mend(&with(&barrier(12))), Ok(with(&barrier(12))));
        let text = module(30, &[VULKAN, SUBGROUPS, OF_SUBGROUPS, FUNCTION, &barrier(11), FUNCTION, &barrier(11)]);
        let added = [OP_CONSTANT, 7, 30, 0x108];
        let mended =
            module(31, &[VULKAN, SUBGROUPS, OF_SUBGROUPS, &added, FUNCTION, &barrier(30), FUNCTION, &barrier(30)]);
        assert_eq!(mend(&text), Ok(mended));
        let memory = [OP_MEMORY_BARRIER, 10, 11];
        let mended = module(31, &[VULKAN, SUBGROUPS, OF_SUBGROUPS, &added, FUNCTION, &[OP_MEMORY_BARRIER, 10, 30]]);
        assert_eq!(mend(&module(30, &[VULKAN, SUBGROUPS, OF_SUBGROUPS, FUNCTION, &memory])), Ok(mended));
    }

    #[test]
    fn scopes_of_the_device_are_declared() {
        let capability = [OP_CAPABILITY, VULKAN_MEMORY_MODEL_DEVICE_SCOPE];
        let shader = [OP_CAPABILITY, 1];
        for atomic in [
            &[OP_ATOMIC_STORE, 9, 13, 12, 9][..],
            &[OP_ATOMIC_LOAD, 7, 21, 9, 13, 12],
            &[239, 7, 21, 9, 13, 12, 9],
            &[OP_CONTROL_BARRIER, 10, 13, 12],
        ] {
            let text = module(30, &[&shader, VULKAN, DEVICE, OF_WORKGROUPS, FUNCTION, atomic]);
            let declared = module(30, &[&capability, &shader, VULKAN, DEVICE, OF_WORKGROUPS, FUNCTION, atomic]);
            assert_eq!(mend(&text).as_ref(), Ok(&declared));
            assert_eq!(mend(&declared).as_ref(), Ok(&declared));
        }
        let of_workgroups =
            module(30, &[&shader, VULKAN, DEVICE, SUBGROUPS, FUNCTION, &[OP_ATOMIC_STORE, 13, 10, 13, 13]]);
        assert_eq!(mend(&of_workgroups).as_ref(), Ok(&of_workgroups));
    }

    #[test]
    fn other_memory_models_are_left_alone() {
        let simple = [OP_MEMORY_MODEL, 0, 1];
        let text = module(30, &[&simple, SUBGROUPS, OF_SUBGROUPS, DEVICE, FUNCTION, &barrier(11)]);
        assert_eq!(mend(&text).as_ref(), Ok(&text));
        let spoiled = [&text[..], &[9 << 16 | 43]].concat();
        assert!(mend(&spoiled).unwrap_err().contains("an instruction of 9 words"));
    }
}
