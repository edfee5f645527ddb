//! Typed numbers of safetensors tensors.

use half::{bf16, f16};
use safetensors::Dtype;
use safetensors::tensor::TensorView;

use crate::problem::element::{DType, Element};
use crate::problem::error::{Error, Result};

/// Elements of a tensor, each type kept as its own.
///
/// ```
/// use safetensors::SafeTensors;
/// use sink_attention::file::Values;
/// use sink_attention::{Error, Inputs, Problem};
///
/// fn sinks(file: &SafeTensors<'_>, problem: &Problem) -> Result<Vec<f32>, Box<dyn std::error::Error>> {
///     let tensor = file.tensor("model.layers.0.self_attn.sinks")?;
///     // Of whatever type it is, but of this shape.
///     Ok(Values::from_safetensors("sinks", &tensor, &[problem.shape().heads])?.into_f32())
/// }
/// ```
#[non_exhaustive]
#[derive(Debug, Clone, PartialEq)]
pub enum Values {
    /// Single precision.
    F32(Vec<f32>),
    /// Half precision.
    F16(Vec<f16>),
    /// bfloat16.
    Bf16(Vec<bf16>),
}

impl Values {
    /// Takes elements of any type.
    pub fn new<T: Element>(values: Vec<T>) -> Self {
        match T::DTYPE {
            DType::F32 => Values::F32(bytemuck::cast_vec(values)),
            DType::F16 => Values::F16(bytemuck::cast_vec(values)),
            DType::Bf16 => Values::Bf16(bytemuck::cast_vec(values)),
        }
    }

    /// The numbers of a tensor of a file, wherever its bytes lie: an operand of this shape, such as
    /// [`Problem::q_shape`](crate::Problem::q_shape). `name` is for errors.
    ///
    /// # Errors
    /// [`Error::TensorShape`], and [`Error::TensorType`] if the type is not F32, F16 or BF16.
    pub fn from_safetensors(name: &str, tensor: &TensorView<'_>, shape: &[usize]) -> Result<Self> {
        if tensor.shape() != shape {
            let (actual, expected) = (tensor.shape().to_vec(), shape.to_vec());
            return Err(Error::TensorShape { name: name.into(), actual, expected });
        }
        let values = Values::decode(tensor.dtype(), tensor.data());
        values.ok_or_else(|| Error::TensorType { name: name.into(), actual: tensor.dtype().to_string() })
    }

    /// Elements from little-endian bytes. `None` for another element type.
    pub(crate) fn decode(dtype: Dtype, bytes: &[u8]) -> Option<Self> {
        match dtype {
            Dtype::F32 => Some(Values::F32(decode(bytes, f32::from_le_bytes))),
            Dtype::F16 => Some(Values::F16(decode(bytes, f16::from_le_bytes))),
            Dtype::BF16 => Some(Values::Bf16(decode(bytes, bf16::from_le_bytes))),
            _ => None,
        }
    }

    /// The element type.
    pub fn dtype(&self) -> DType {
        match self {
            Values::F32(_) => DType::F32,
            Values::F16(_) => DType::F16,
            Values::Bf16(_) => DType::Bf16,
        }
    }

    /// The elements, if they are of this type.
    pub fn as_slice<T: Element>(&self) -> Option<&[T]> {
        let bytes = match self {
            Values::F32(values) => bytemuck::cast_slice(values),
            Values::F16(values) => bytemuck::cast_slice(values),
            Values::Bf16(values) => bytemuck::cast_slice::<_, u8>(values),
        };
        (T::DTYPE == self.dtype()).then(|| bytemuck::cast_slice(bytes))
    }

    /// The same numbers in f32, exactly.
    pub fn into_f32(self) -> Vec<f32> {
        match self {
            Values::F32(values) => values,
            Values::F16(values) => f16::widen(&values).into_owned(),
            Values::Bf16(values) => bf16::widen(&values).into_owned(),
        }
    }
}

/// Elements from little-endian bytes, which may lie at any address: the format promises no alignment.
pub(crate) fn decode<T, const SIZE: usize>(bytes: &[u8], element: impl Fn([u8; SIZE]) -> T) -> Vec<T> {
    bytes.as_chunks().0.iter().map(|&chunk| element(chunk)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_each_type_at_any_address() {
        // 1.5 and -2 in each type, after a byte that takes them off any alignment.
        let bytes = |words: &[&[u8]]| [&[7], words.concat().as_slice()].concat();
        for (dtype, known, file) in [
            (Dtype::F32, Some(DType::F32), bytes(&[&1.5f32.to_le_bytes(), &(-2f32).to_le_bytes()])),
            (
                Dtype::F16,
                Some(DType::F16),
                bytes(&[&f16::from_f32(1.5).to_le_bytes(), &f16::from_f32(-2.0).to_le_bytes()]),
            ),
            (
                Dtype::BF16,
                Some(DType::Bf16),
                bytes(&[&bf16::from_f32(1.5).to_le_bytes(), &bf16::from_f32(-2.0).to_le_bytes()]),
            ),
            (Dtype::I16, None, bytes(&[&[1, 2, 3, 4]])),
        ] {
            let tensor = TensorView::new(dtype, vec![1, 2], &file[1..]).unwrap();
            let error = Values::from_safetensors("w", &tensor, &[2, 1]).unwrap_err().to_string();
            assert_eq!(error, "tensor w has shape [1, 2], [2, 1] is needed");
            match (known, Values::from_safetensors("w", &tensor, &[1, 2])) {
                (Some(known), Ok(values)) => {
                    assert_eq!(values.dtype(), known);
                    assert_eq!(values.as_slice::<f32>().is_some(), known == DType::F32);
                    assert_eq!(values.into_f32(), [1.5, -2.0]);
                }
                (None, Err(error)) => {
                    assert_eq!(error.to_string(), "tensor w has element type I16; known: BF16, F16, F32");
                }
                (known, values) => panic!("{known:?}: {values:?}"),
            }
        }
    }
}
