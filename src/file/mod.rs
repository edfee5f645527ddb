//! Files that are written whole or not at all, and reads that end.
//!
//! [`replace`] writes everything that this crate saves: results, caches, pipeline caches, tunings. [`read`] reads files without a header
//! that states their length.

#[cfg(feature = "safetensors")]
pub mod case;
#[cfg(feature = "safetensors")]
pub(crate) mod saved;
#[cfg(feature = "safetensors")]
mod values;

#[cfg(feature = "safetensors")]
pub use self::values::Values;

use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

/// Most symbolic links that are followed one after the other. Linux has the same limit.
const MOST_LINKS: usize = 40;

/// Writes a file whole, or leaves the file that is there. Readers see the old content or the new one, never a part.
///
/// The bytes go into a temporary file of a unique name in the same folder, which is synced and renamed. Then the folder is synced, if the
/// system can do that. So any number of threads and processes may save to one path, and the last one's file stays. A new file has the mode
/// that a plain create would give it, and an existing file keeps its mode. A symbolic link stays, and its target is written. Other hard
/// links keep the old content.
///
/// A failure leaves nothing behind. A process that is killed while it writes leaves its temporary file, named `.sink-attention-*.tmp`.
/// Nothing reads or removes that file, and it may be deleted once no process saves into the folder.
///
/// # Errors
/// The system's error, or a reason if the path leads to something other than a regular file, or to a file that may not be written.
pub fn replace(path: impl AsRef<Path>, bytes: &[u8]) -> io::Result<()> {
    let (target, existing) = resolve(path.as_ref())?;
    write_and_rename(&target, existing, bytes)
}

/// Whether [`replace`] can write this file, as far as this shows before it does. A caller can check before a long computation. An existing
/// file is not touched, and no new one is left.
///
/// # Errors
/// As [`replace`].
pub fn check_writable(path: impl AsRef<Path>) -> io::Result<()> {
    let (target, _) = resolve(path.as_ref())?;
    temporary(&target).map(drop)
}

/// Reads a regular file of at most `most` bytes. Devices and pipes, which may have no end, are refused unread.
///
/// # Errors
/// The system's error, or a reason, with the numbers, if the path is no regular file or the file is longer.
pub fn read(path: impl AsRef<Path>, most: u64) -> io::Result<Vec<u8>> {
    let (mut file, len) = open(path.as_ref())?;
    let too_long = |len| Err(invalid(format!("it has {len} bytes, the most is {most}")));
    if len > most {
        return too_long(len);
    }
    let mut bytes = Vec::new();
    // Files that grow, and those of /proc, hold more bytes than their metadata say.
    (&mut file).take(most.saturating_add(1)).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > most { too_long(bytes.len() as u64) } else { Ok(bytes) }
}

/// A regular file, opened for reading, and its length.
///
/// # Errors
/// The system's error, or a reason if the path is no regular file.
pub fn open(path: impl AsRef<Path>) -> io::Result<(File, u64)> {
    let path = path.as_ref();
    // The path is checked before it is opened, because a pipe would wait for a writer.
    check_regular(&fs::metadata(path)?)?;
    let file = File::open(path)?;
    let metadata = file.metadata()?;
    check_regular(&metadata)?;
    Ok((file, metadata.len()))
}

fn check_regular(metadata: &Metadata) -> io::Result<()> {
    if metadata.is_file() { Ok(()) } else { Err(invalid("it is not a regular file".into())) }
}

fn invalid(reason: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, reason)
}

/// The target of a path, through symbolic links, and the regular file there if there is one. The file may be written.
fn resolve(path: &Path) -> io::Result<(PathBuf, Option<Metadata>)> {
    let mut target = path.to_path_buf();
    for _ in 0..MOST_LINKS {
        match fs::symlink_metadata(&target) {
            // The target of a link is relative to the folder that the link is in.
            Ok(found) if found.is_symlink() => target = folder_of(&target).join(fs::read_link(&target)?),
            Ok(found) => {
                check_regular(&found)?;
                // Without this check a rename would replace a file that its owner has protected.
                OpenOptions::new().write(true).open(&target)?;
                return Ok((target, Some(found)));
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok((target, None)),
            Err(error) => return Err(error),
        }
    }
    Err(invalid(format!("it leads through more than {MOST_LINKS} symbolic links")))
}

fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    }
}

/// An empty file in the target's folder, which is removed when it is dropped.
#[cfg(not(target_family = "wasm"))]
fn temporary(target: &Path) -> io::Result<tempfile::NamedTempFile> {
    // `create_new` gives the file the mode of a plain create, and errors the system's own words: tempfile would give access to the owner
    // alone, and adds the temporary name to errors.
    tempfile::Builder::new()
        .prefix(".sink-attention-")
        .suffix(".tmp")
        .make_in(folder_of(target), |path| File::create_new(path))
}

#[cfg(not(target_family = "wasm"))]
fn write_and_rename(target: &Path, existing: Option<Metadata>, bytes: &[u8]) -> io::Result<()> {
    let mut file = temporary(target)?;
    if let Some(existing) = existing {
        file.as_file().set_permissions(existing.permissions())?;
    }
    io::Write::write_all(file.as_file_mut(), bytes)?;
    // Without a sync, a crash could leave the new name on a file without its content.
    file.as_file().sync_all()?;
    file.persist(target).map_err(|error| error.error)?;
    // The file is in its place. A system that cannot sync folders has done what it can.
    #[cfg(unix)]
    let _ = File::open(folder_of(target)).and_then(|folder| folder.sync_all());
    Ok(())
}

/// Browsers have no files.
#[cfg(target_family = "wasm")]
fn temporary(_target: &Path) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

#[cfg(target_family = "wasm")]
fn write_and_rename(target: &Path, _existing: Option<Metadata>, _bytes: &[u8]) -> io::Result<()> {
    temporary(target)
}

/// FNV-1a in 64 bits. It detects accidents but not malice: whoever can write the file could write kernels, too.
pub(crate) fn checksum(data: &[u8]) -> u64 {
    data.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(feature = "safetensors")]
pub(crate) use container::{Container, Malformed, read_container};

#[cfg(feature = "safetensors")]
mod container {
    //! The frame of a safetensors file: the length of the header, the header, the tensors.

    use std::collections::BTreeMap;
    use std::fmt;
    use std::io::{self, Read as _};
    use std::marker::PhantomData;
    use std::path::Path;

    use safetensors::tensor::Metadata;
    use serde::Deserialize;
    use serde::de::{IgnoredAny, MapAccess, Visitor};

    /// The longest header that the safetensors library reads.
    const MOST_HEADER: u64 = 100_000_000;

    /// The reason why bytes are no safetensors file.
    #[derive(Debug, thiserror::Error)]
    pub(crate) enum Malformed {
        #[error("{actual} bytes, the length of the header alone takes 8")]
        TooShort { actual: u64 },
        #[error("the header claims {header} bytes, {actual} follow its length")]
        HeaderLength { header: u64, actual: u64 },
        #[error("the header claims {header} bytes, the most is {MOST_HEADER}")]
        HeaderTooLong { header: u64 },
        #[error("the header: {0}")]
        Header(serde_json::Error),
        #[error("the tensors take {expected} bytes, {actual} are there")]
        DataLength { expected: u64, actual: u64 },
    }

    /// A file in memory, split into its parts.
    pub(crate) struct Container<'a> {
        /// The strings of the header.
        pub(crate) strings: BTreeMap<String, String>,
        pub(crate) index: Metadata,
        pub(crate) data: &'a [u8],
    }

    impl<'a> Container<'a> {
        /// No name occurs twice, shapes fit their offsets, offsets leave no gap, and the tensors end where the bytes do.
        pub(crate) fn parse(bytes: &'a [u8]) -> Result<Self, Malformed> {
            let (&length, rest) =
                bytes.split_first_chunk().ok_or(Malformed::TooShort { actual: bytes.len() as u64 })?;
            let (header, data) = rest.split_at(header_len(length, rest.len() as u64)?);
            let (strings, index) = read_header(header, data.len() as u64)?;
            Ok(Container { strings, index, data })
        }
    }

    fn header_len(length: [u8; 8], actual: u64) -> Result<usize, Malformed> {
        let header = u64::from_le_bytes(length);
        match header {
            _ if header > actual => Err(Malformed::HeaderLength { header, actual }),
            MOST_HEADER.. => Err(Malformed::HeaderTooLong { header }),
            // The length is below 10^8 and fits a usize.
            _ => Ok(header as usize),
        }
    }

    /// SafeTensors::deserialize (0.8.0) is not used: it takes the last of two tensors with one name, and offsets near 2^64 overflow in it.
    fn read_header(header: &[u8], actual: u64) -> Result<(BTreeMap<String, String>, Metadata), Malformed> {
        #[derive(Deserialize)]
        struct Strings {
            #[serde(rename = "__metadata__")]
            metadata: Option<Unique<String>>,
        }
        let Unique::<IgnoredAny>(_) = serde_json::from_slice(header).map_err(Malformed::Header)?;
        let Strings { metadata } = serde_json::from_slice(header).map_err(Malformed::Header)?;
        let index: Metadata = serde_json::from_slice(header).map_err(Malformed::Header)?;
        let expected = index.data_len() as u64;
        if expected != actual {
            return Err(Malformed::DataLength { expected, actual });
        }
        Ok((metadata.map(|unique| unique.0).unwrap_or_default(), index))
    }

    /// Reads a safetensors file. It reads the tensors only if the header and the file agree about their length.
    pub(crate) fn read_container(path: &Path) -> io::Result<Result<Vec<u8>, Malformed>> {
        let (mut file, len) = super::open(path)?;
        let mut bytes = Vec::new();
        let mut more = |bytes: &mut Vec<u8>, count: u64| -> io::Result<()> {
            if (&mut file).take(count).read_to_end(bytes)? as u64 == count {
                return Ok(());
            }
            Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it became shorter while it was read"))
        };
        more(&mut bytes, len.min(8))?;
        let Some(&length) = bytes.first_chunk() else { return Ok(Err(Malformed::TooShort { actual: len })) };
        let header = match header_len(length, len - 8) {
            Ok(header) => header as u64,
            Err(malformed) => return Ok(Err(malformed)),
        };
        more(&mut bytes, header)?;
        let data = len - 8 - header;
        if let Err(malformed) = read_header(&bytes[8..], data) {
            return Ok(Err(malformed));
        }
        more(&mut bytes, data)?;
        Ok(Ok(bytes))
    }

    /// A JSON object that names no key twice. Maps of the standard library keep the last value silently.
    struct Unique<V>(BTreeMap<String, V>);

    impl<'de, V: Deserialize<'de>> Deserialize<'de> for Unique<V> {
        fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
            struct Object<V>(PhantomData<V>);

            impl<'de, V: Deserialize<'de>> Visitor<'de> for Object<V> {
                type Value = Unique<V>;

                fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                    f.write_str("an object")
                }

                fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                    let mut entries = BTreeMap::new();
                    while let Some((key, value)) = map.next_entry::<String, V>()? {
                        if entries.contains_key(&key) {
                            return Err(serde::de::Error::custom(format_args!("{key:?} is there twice")));
                        }
                        entries.insert(key, value);
                    }
                    Ok(Unique(entries))
                }
            }
            deserializer.deserialize_map(Object(PhantomData))
        }
    }
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
