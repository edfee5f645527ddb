//! Computes the results that a conformance file asks for.

use half::{bf16, f16};

use crate::attention::Attention;
use crate::file::case::{Case, Tensor, in_file};
use crate::problem::element::{DType, Element};
use crate::problem::error::Result;

impl Case {
    /// Computes what the file asks for, forward and, where there is dout, backward: the results under the names and
    /// shapes of the format, out and the gradients of q, k and v in the operands' element type, all else f32.
    ///
    /// # Errors
    /// Those of [`Attention::forward`] and [`Attention::backward`].
    pub fn compute(&self, attention: &Attention) -> Result<Vec<Tensor>> {
        match self.q.dtype() {
            DType::F32 => self.compute_in::<f32>(attention),
            DType::F16 => self.compute_in::<f16>(attention),
            DType::Bf16 => self.compute_in::<bf16>(attention),
        }
    }

    fn compute_in<T: Element>(&self, attention: &Attention) -> Result<Vec<Tensor>> {
        let (problem, inputs) = (&self.problem, self.inputs::<T>()?);
        let output = attention.forward(problem, &inputs)?;
        let gradients = match self.upstream()? {
            Some(upstream) => Some(attention.backward(problem, &inputs, &output, &upstream)?),
            None => None,
        };
        let of_rows =
            |name, shape: &[usize], values| Tensor::new::<T>(name, in_file(problem.options().layout, shape), values);
        let lse_shape = problem.lse_shape();
        let lse_shape = in_file(problem.options().layout, &lse_shape);
        let mut results = vec![of_rows("out", &problem.o_shape(), output.o), Tensor::new("lse", lse_shape, output.lse)];
        if let Some(gradients) = gradients {
            results.push(of_rows("dq", &problem.q_shape(), gradients.d_q));
            results.push(of_rows("dk", &problem.k_shape(), gradients.d_k));
            results.push(of_rows("dv", &problem.v_shape(), gradients.d_v));
            let heads = [problem.shape().heads];
            results.extend(gradients.d_sink_logits.map(|d_sink| Tensor::new("dsinks", &heads, d_sink)));
            results.extend(gradients.d_alibi_slopes.map(|slopes| Tensor::new("dalibi_slopes", &heads, slopes)));
            let d_bias = gradients.d_bias.zip(problem.bias_shape());
            results.extend(d_bias.map(|(d_bias, shape)| Tensor::new("dbias", &shape, d_bias)));
        }
        Ok(results)
    }
}
