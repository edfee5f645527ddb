//! Tests without a GPU, in one program, to run while writing: `cargo test -p sink-attention --test host`.

#[path = "../common/mod.rs"]
mod common;
#[path = "../both/extremes.rs"]
mod extremes;
#[path = "../both/laws.rs"]
mod laws;
#[path = "../both/users.rs"]
mod users;

mod api;
mod conformance;
mod cpu;
mod layers;
mod plans;
mod properties;
mod readme;
mod saved_files;
mod shaders;
mod unseen;
mod vendors;

/// Where the suites of both programs run in this one.
fn paths() -> Vec<sink_attention::Attention> {
    vec![sink_attention::Attention::cpu()]
}

/// Cooperative matrices are the other program's.
fn cooperative() -> Option<sink_attention::Attention> {
    None
}
