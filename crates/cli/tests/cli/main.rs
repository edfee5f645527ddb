//! Tests of the built binary, in one program. A file by itself: `cargo test -p sink-attention-cli --test cli run::`.

mod binary;
mod files;

mod bench;
mod device;
mod options;
mod run;
#[cfg(unix)]
mod saved_files;
