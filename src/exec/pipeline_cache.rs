//! Compiled pipelines in a file, so that the next process need not compile them again.

use std::io::Read as _;
use std::path::{Path, PathBuf};

use crate::device::Device;
use crate::file::{self, checksum, replace};
use crate::problem::error::{Error, Result};

/// The line in front of wgpu's data. It detects spoiled data, which drivers are not made for and which wgpu does not look for.
const FIRST_LINE: &str = "sink-attention pipeline cache 1";
/// A limit above the length of the first three lines.
const MOST_HEAD: u64 = 4096;

/// wgpu's cache, and the file that it is read from and written to.
#[derive(Debug)]
pub(crate) struct PipelineCache {
    path: PathBuf,
    /// Vendor and device, by which wgpu distinguishes caches.
    key: String,
    cache: wgpu::PipelineCache,
}

impl PipelineCache {
    /// A cache with the content of the file, if that is whole and of this device. Otherwise an empty cache.
    pub(crate) async fn open(device: &Device, path: &Path) -> Result<Self> {
        let failed = |reason: String| Error::PipelineCache { path: path.into(), reason };
        let gpu = device.wgpu();
        let key = wgpu::util::pipeline_cache_key(&gpu.adapter_info());
        let (Some(key), true) = (key, gpu.features().contains(wgpu::Features::PIPELINE_CACHE)) else {
            let reason = "the device was opened without Features::PIPELINE_CACHE, which only Vulkan has; \
                          other drivers keep caches of their own";
            return Err(failed(reason.into()));
        };
        let data = match read(path) {
            Ok(file) => unpack(&file, &key).map(<[u8]>::to_vec),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
            Err(error) => return Err(failed(error.to_string())),
        };
        let cache = match create(device, data.as_deref()).await {
            // Data that wgpu refuses is treated as missing.
            Err(Error::Gpu { .. }) if data.is_some() => create(device, None).await?,
            created => created?,
        };
        Ok(PipelineCache { path: path.into(), key, cache })
    }

    pub(crate) fn wgpu(&self) -> &wgpu::PipelineCache {
        &self.cache
    }

    /// Writes the file whole, or leaves the old file. Returns the number of bytes.
    pub(crate) fn save(&self) -> Result<usize> {
        let failed = |reason: String| Error::PipelineCache { path: self.path.clone(), reason };
        let data = self.cache.get_data().ok_or_else(|| failed("the driver gives no data".into()))?;
        let packed = pack(&data, &self.key);
        replace(&self.path, &packed).map_err(|error| failed(error.to_string()))?;
        Ok(packed.len())
    }
}

async fn create(device: &Device, data: Option<&[u8]>) -> Result<wgpu::PipelineCache> {
    let descriptor = wgpu::PipelineCacheDescriptor { label: Some("sink-attention"), data, fallback: true };
    let create = || {
        // SAFETY: data must come from `wgpu::PipelineCache::get_data`. It comes from a file that `save` wrote so, with the
        // key of this device and a checksum, and `unpack` has found both right: neither another program's file nor a
        // spoiled one gets here. wgpu checks the versions of driver and format.
        unsafe { device.wgpu().create_pipeline_cache(&descriptor) }
    };
    device.scoped_async("creating a pipeline cache", create).await
}

/// The bytes of a file that is as long as it says, and only the beginning of another file, which [`unpack`] refuses.
fn read(path: &Path) -> std::io::Result<Vec<u8>> {
    let (mut file, len) = file::open(path)?;
    let mut bytes = Vec::new();
    (&mut file).take(MOST_HEAD).read_to_end(&mut bytes)?;
    if claimed_len(&bytes).is_some_and(|claimed| claimed == len) {
        file.take(len - bytes.len() as u64).read_to_end(&mut bytes)?;
    }
    Ok(bytes)
}

/// Number of bytes that the beginning of a file claims.
fn claimed_len(start: &[u8]) -> Option<u64> {
    let head = start.get(..head_end(start)?)?;
    let last = str::from_utf8(head).ok()?.lines().nth(2)?;
    last.split(' ').next()?.parse::<u64>().ok()?.checked_add(head.len() as u64)
}

/// The end of the third line.
fn head_end(file: &[u8]) -> Option<usize> {
    file.iter().enumerate().filter(|(_, byte)| **byte == b'\n').nth(2).map(|(at, _)| at + 1)
}

fn head(data: &[u8], key: &str) -> String {
    format!("{FIRST_LINE}\n{key}\n{} {:016x}\n", data.len(), checksum(data))
}

fn pack(data: &[u8], key: &str) -> Vec<u8> {
    [head(data, key).as_bytes(), data].concat()
}

/// The packed data, if the file is whole and of this key.
fn unpack<'a>(file: &'a [u8], key: &str) -> Option<&'a [u8]> {
    let (found, data) = file.split_at(head_end(file)?);
    (found == head(data, key).as_bytes()).then_some(data)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_files_of_the_same_key_are_used() {
        let data = b"some\ndata\n\n";
        let packed = pack(data, "key");
        assert_eq!(unpack(&packed, "key"), Some(&data[..]));
        assert_eq!(unpack(&pack(b"", "key"), "key"), Some(&b""[..]));
        assert_eq!(unpack(&packed, "other"), None);
        for end in 0..packed.len() {
            assert_eq!(unpack(&packed[..end], "key"), None, "cut after {end} bytes");
        }
        for index in 0..packed.len() {
            let mut spoiled = packed.clone();
            spoiled[index] ^= 1;
            assert_eq!(unpack(&spoiled, "key"), None, "byte {index} spoiled");
        }
        assert_eq!(unpack(&[&packed[..], b"x"].concat(), "key"), None);
        assert_eq!(unpack(data, "key"), None);
        assert_eq!(claimed_len(&packed), Some(packed.len() as u64));
        assert_eq!(claimed_len(data), None);
    }
}
