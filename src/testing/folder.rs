//! Folders for tests that write files.

use std::fs;
use std::path::{Path, PathBuf};

/// A folder for one test, empty at first.
#[derive(Debug)]
pub struct Folder(PathBuf);

impl Folder {
    /// Creates the folder in `parent`, which is the folder that cargo has for a program of tests, `env!("CARGO_TARGET_TMPDIR")`.
    pub fn new(parent: &str, test: &str) -> Self {
        let path = Path::new(parent).join(test);
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).unwrap();
        Folder(path)
    }

    pub fn write(&self, name: &str, bytes: &[u8]) -> String {
        let path = self.path(name);
        fs::write(&path, bytes).unwrap();
        path
    }

    pub fn path(&self, name: &str) -> String {
        self.0.join(name).to_str().unwrap().into()
    }

    pub fn names(&self) -> Vec<String> {
        let mut names: Vec<_> =
            fs::read_dir(&self.0).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}
