//! Files that are there whole, or not at all.

use std::path::Path;
use std::{fs, io, process};

/// Writes a file whole, or leaves the one that is there.
pub(crate) fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    // Beside the file, so that the rename stays within a file system; of this process, so that none shares it.
    let mut beside = path.as_os_str().to_owned();
    beside.push(format!(".{}", process::id()));
    fs::write(&beside, bytes).and_then(|()| fs::rename(&beside, path)).inspect_err(|_| {
        // Whatever was written is of no use.
        let _ = fs::remove_file(&beside);
    })
}

/// FNV-1a in 64 bits: against accidents, not against malice, which could write kernels too.
pub(crate) fn checksum(data: &[u8]) -> u64 {
    data.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The published test vectors.
    #[test]
    fn checksum_is_fnv_1a() {
        assert_eq!(checksum(b""), 0xcbf2_9ce4_8422_2325);
        assert_eq!(checksum(b"a"), 0xaf63_dc4c_8601_ec8c);
        assert_eq!(checksum(b"foobar"), 0x8594_4171_f739_67e8);
    }
}
