//! Conformance files: one attention problem, its operands and options, in a safetensors file.
//!
//! Tensors `q`, `k`, `v`, and as present `sinks`, `dout`, `dlse`; tensors named `expected.*` are for
//! tests and ignored here. q, k, v and dout are f32, f16 or bf16, all of one type; sinks and dlse are f32.
//! String metadata holds the options, an absent key means the default:
//!
//! | key | value |
//! |---|---|
//! | `layout` | `bshd` (default), `bhsd` |
//! | `causal` | `true`, `false` (default) |
//! | `align` | `bottom-right` (default), `top-left` |
//! | `window_left`, `window_right` | inclusive bounds, from 0 up; absent: unbounded |
//! | `sink_tokens` | first keys exempt from the left bound |
//! | `scale` | factor on q.k; absent: 1 / sqrt(D) |
//! | `q_offset` | position of query 0 among the keys |
//! | `format` | ignored; other tools write it |
//!
//! Reading is strict: an unknown key or tensor is an error, since a misspelt name would otherwise
//! change a result silently. What the format knows and this version does not compute is
//! [`FormatError::Unsupported`].

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::fs::{self, File};
use std::io::Write as _;
use std::marker::PhantomData;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use half::{bf16, f16};
use safetensors::tensor::{Metadata, TensorView};
use safetensors::{Dtype, SafeTensorError};
use serde::Deserialize;
use serde::de::{IgnoredAny, MapAccess, Visitor};

use crate::attention::Attention;
use crate::element::{DType, Element};
use crate::problem::{Alignment, Inputs, Layout, Options, Problem, Shape, SinkLogits, Upstream};

/// Metadata keys of the format, for messages.
const KEYS: &str = "layout, causal, align, window_left, window_right, sink_tokens, scale, softcap, q_offset";
/// Tensors of the format, for messages.
const TENSORS: &str = "q, k, v, sinks, bias, mask, alibi_slopes, cu_seqlens_q, cu_seqlens_k, dout, dlse, expected.*";
/// Tensors of the format that this version does not compute with.
const UNSUPPORTED_TENSORS: [&str; 5] = ["bias", "mask", "alibi_slopes", "cu_seqlens_q", "cu_seqlens_k"];

/// What can go wrong with a file.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file could not be read.
    #[error("cannot read {}: {source}", .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file was read, but its content is wrong.
    #[error("{}: {source}", .path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: FormatError,
    },
    /// The file could not be written; nothing was left behind.
    #[error("cannot write {}: {source}", .path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Results would replace the file they are computed from.
    #[error("cannot write {}: it is the input file", .path.display())]
    OutputIsInput {
        /// The file.
        path: PathBuf,
    },
    /// Results would replace a folder or a device.
    #[error("cannot write {}: it exists and is not a regular file", .path.display())]
    NotAFile {
        /// What stands in the way.
        path: PathBuf,
    },
}

/// What can be wrong with the content of a conformance file.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum FormatError {
    /// Too short for the length of the header, the first thing in the file.
    #[error("not a safetensors file: {actual} bytes, the length of the header alone takes 8")]
    TooShort {
        /// Bytes in the file.
        actual: usize,
    },
    /// The header does not fit into the file.
    #[error("not a safetensors file, or truncated: the header claims {header} bytes, {actual} follow its length")]
    HeaderLength {
        /// Bytes the header claims.
        header: u64,
        /// Bytes there are.
        actual: usize,
    },
    /// The header is not the JSON it should be, or names something twice.
    #[error("malformed header: {0}")]
    Header(#[from] serde_json::Error),
    /// The file is shorter or longer than the header says.
    #[error("truncated or overlong: the tensors take {expected} bytes, {actual} follow the header")]
    DataLength {
        /// Bytes the tensors take.
        expected: usize,
        /// Bytes there are.
        actual: usize,
    },
    /// A metadata key that the format does not know.
    #[error("unknown metadata key {key:?}; known: {KEYS}")]
    UnknownKey {
        /// The key.
        key: String,
    },
    /// A metadata value that means nothing.
    #[error("metadata {key} is {value:?}; it must be {expected}")]
    BadValue {
        /// The key.
        key: String,
        /// Its value.
        value: String,
        /// What the key accepts.
        expected: &'static str,
    },
    /// A tensor that the format does not know.
    #[error("unknown tensor {name:?}; known: {TENSORS}")]
    UnknownTensor {
        /// Its name.
        name: String,
    },
    /// A tensor that every file must have.
    #[error("tensor {name} is missing")]
    MissingTensor {
        /// Its name.
        name: &'static str,
    },
    /// A tensor of the wrong element type.
    #[error("tensor {name} has element type {actual}; it must be {expected}")]
    ElementType {
        /// Its name.
        name: &'static str,
        /// Its element type.
        actual: Dtype,
        /// What it must be.
        expected: &'static str,
    },
    /// An operand whose element type is not that of q.
    #[error("tensor {name} has element type {actual}, q has {q}; they must be the same")]
    MixedElementTypes {
        /// The operand.
        name: &'static str,
        /// Its element type.
        actual: Dtype,
        /// The element type of q.
        q: Dtype,
    },
    /// A tensor with the wrong number of axes.
    #[error("tensor {name} has shape {shape:?}; layout {layout} needs 4 axes")]
    Rank {
        /// Its name.
        name: &'static str,
        /// Its shape.
        shape: Vec<usize>,
        /// The file's layout.
        layout: Layout,
    },
    /// Two of q, k and v disagree about a dimension.
    #[error("{dimension} differs: {left} of {left_name}, {right} of {right_name} (in layout {layout})")]
    Mismatch {
        /// The dimension.
        dimension: &'static str,
        /// One tensor.
        left_name: &'static str,
        /// Its size.
        left: usize,
        /// The other tensor.
        right_name: &'static str,
        /// Its size.
        right: usize,
        /// The file's layout.
        layout: Layout,
    },
    /// A tensor whose shape does not follow from q, k and v.
    #[error("tensor {name} has shape {actual:?}; q, k and v call for {expected:?}")]
    Shape {
        /// Its name.
        name: &'static str,
        /// Its shape.
        actual: Vec<usize>,
        /// What it must be.
        expected: Vec<usize>,
    },
    /// Something of the format that this version does not compute.
    #[error("{feature} is not supported in this version")]
    Unsupported {
        /// What the file asks for.
        feature: String,
    },
    /// The file is well formed, but the problem in it is not.
    #[error(transparent)]
    Problem(#[from] crate::Error),
    /// The safetensors format cannot hold the results.
    #[error("{0}")]
    Serialize(#[from] SafeTensorError),
}

/// Elements of a tensor, each type kept as its own.
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

    fn decode(name: &'static str, tensor: &Raw<'_>) -> Result<Self, FormatError> {
        match tensor.dtype {
            Dtype::F32 => Ok(Values::F32(decode(tensor.bytes, f32::from_le_bytes))),
            Dtype::F16 => Ok(Values::F16(decode(tensor.bytes, f16::from_le_bytes))),
            Dtype::BF16 => Ok(Values::Bf16(decode(tensor.bytes, bf16::from_le_bytes))),
            actual => Err(FormatError::ElementType { name, actual, expected: "F32, F16 or BF16" }),
        }
    }

    fn encode(&self) -> (Dtype, Vec<u8>) {
        match self {
            Values::F32(values) => (Dtype::F32, values.iter().flat_map(|x| x.to_le_bytes()).collect()),
            Values::F16(values) => (Dtype::F16, values.iter().flat_map(|x| x.to_le_bytes()).collect()),
            Values::Bf16(values) => (Dtype::BF16, values.iter().flat_map(|x| x.to_le_bytes()).collect()),
        }
    }
}

/// Elements from little-endian bytes, which lie at any address: the format promises no alignment.
fn decode<T, const SIZE: usize>(bytes: &[u8], element: impl Fn([u8; SIZE]) -> T) -> Vec<T> {
    bytes.as_chunks().0.iter().map(|&chunk| element(chunk)).collect()
}

/// A conformance file: a validated problem with operands that fit it.
#[derive(Debug, Clone, PartialEq)]
pub struct Case {
    /// Shape and options.
    pub problem: Problem,
    /// Queries.
    pub q: Values,
    /// Keys.
    pub k: Values,
    /// Values.
    pub v: Values,
    /// Sink logits, one per query head: the tensor `sinks`.
    pub sink_logits: Option<Vec<f32>>,
    /// Gradient of the outputs: the tensor `dout`.
    pub d_o: Option<Values>,
    /// Gradient of lse: the tensor `dlse`.
    pub d_lse: Option<Vec<f32>>,
}

impl Case {
    /// Reads a file.
    ///
    /// # Errors
    /// [`Error::Read`] and [`Error::Format`].
    pub fn read(path: impl AsRef<Path>) -> Result<Self, Error> {
        let path = path.as_ref();
        let bytes = fs::read(path).map_err(|source| Error::Read { path: path.into(), source })?;
        Case::parse(&bytes).map_err(|source| Error::Format { path: path.into(), source })
    }

    /// Reads the content of a file.
    ///
    /// # Errors
    /// [`FormatError`]; never panics, whatever the bytes are.
    pub fn parse(bytes: &[u8]) -> Result<Self, FormatError> {
        let Container { metadata, mut tensors } = Container::parse(bytes)?;
        let mut options = parse_options(&metadata)?;
        check_names(tensors.keys())?;

        let mut operand = |name| tensors.remove(name).ok_or(FormatError::MissingTensor { name });
        let (q, k, v) = (operand("q")?, operand("k")?, operand("v")?);
        let (sinks, d_o, d_lse) = (tensors.remove("sinks"), tensors.remove("dout"), tensors.remove("dlse"));
        if sinks.is_some() {
            options.sink_logits = SinkLogits::PerHead;
        }
        // The element types first: where the type is the mistake, the shapes say little.
        let operand = |name, tensor: &Raw<'_>| {
            tensor.check_same_dtype(name, &q)?;
            Values::decode(name, tensor)
        };
        let (q_values, k_values, v_values) = (operand("q", &q)?, operand("k", &k)?, operand("v", &v)?);
        options.dtype = q_values.dtype();
        let problem = Problem::new(problem_shape(options.layout, &q, &k, &v)?, options)?;

        let gradient = |name, tensor: Raw<'_>| {
            tensor.check_shape(name, &problem.o_shape())?;
            operand(name, &tensor)
        };
        let floats = |name, tensor: Raw<'_>, shape: &[usize]| {
            tensor.check_shape(name, shape)?;
            tensor.floats(name)
        };
        let case = Case {
            q: q_values,
            k: k_values,
            v: v_values,
            sink_logits: sinks.map(|tensor| floats("sinks", tensor, &[problem.shape().heads])).transpose()?,
            d_o: d_o.map(|tensor| gradient("dout", tensor)).transpose()?,
            d_lse: d_lse.map(|tensor| floats("dlse", tensor, &problem.lse_shape())).transpose()?,
            problem,
        };
        match (&case.d_o, &case.d_lse) {
            // The backward pass runs where there is dout; a gradient must not be dropped in silence.
            (None, Some(_)) => Err(FormatError::MissingTensor { name: "dout" }),
            _ => Ok(case),
        }
    }

    /// The operands of the forward pass.
    ///
    /// # Errors
    /// [`WrongElementType`](crate::Error::WrongElementType) where `T` is not the type of the file's operands.
    pub fn inputs<T: Element>(&self) -> crate::Result<Inputs<'_, T>> {
        Ok(Inputs::new(typed(&self.q)?, typed(&self.k)?, typed(&self.v)?).sink_logits(self.sink_logits.as_deref()))
    }

    /// The gradients that flow into the results; `None` where the file asks for the forward pass only.
    ///
    /// # Errors
    /// As [`inputs`](Self::inputs).
    pub fn upstream<T: Element>(&self) -> crate::Result<Option<Upstream<'_, T>>> {
        let upstream = |d_o| Ok(Upstream { d_o: typed(d_o)?, d_lse: self.d_lse.as_deref() });
        self.d_o.as_ref().map(upstream).transpose()
    }

    /// Computes what the file asks for, forward and, where there is dout, backward: the results under the names and
    /// shapes of the format, out and the gradients of q, k and v in the operands' element type, all else f32.
    ///
    /// # Errors
    /// Those of [`Attention::forward`] and [`Attention::backward`].
    pub fn compute(&self, attention: &Attention) -> crate::Result<Vec<Tensor>> {
        match self.q.dtype() {
            DType::F32 => self.compute_in::<f32>(attention),
            DType::F16 => self.compute_in::<f16>(attention),
            DType::Bf16 => self.compute_in::<bf16>(attention),
        }
    }

    fn compute_in<T: Element>(&self, attention: &Attention) -> crate::Result<Vec<Tensor>> {
        let (problem, inputs) = (&self.problem, self.inputs::<T>()?);
        let output = attention.forward(problem, &inputs)?;
        let gradients = match self.upstream()? {
            Some(upstream) => Some(attention.backward(problem, &inputs, &output, &upstream)?),
            None => None,
        };
        let mut results = vec![
            Tensor::new("out", &problem.o_shape(), output.o),
            Tensor::new("lse", &problem.lse_shape(), output.lse),
        ];
        if let Some(gradients) = gradients {
            results.push(Tensor::new("dq", &problem.q_shape(), gradients.d_q));
            results.push(Tensor::new("dk", &problem.k_shape(), gradients.d_k));
            results.push(Tensor::new("dv", &problem.v_shape(), gradients.d_v));
            let heads = problem.shape().heads;
            results.extend(gradients.d_sink_logits.map(|d_sink| Tensor::new("dsinks", &[heads], d_sink)));
        }
        Ok(results)
    }
}

/// An operand in the type that the caller computes with.
fn typed<T: Element>(values: &Values) -> crate::Result<&[T]> {
    values.as_slice().ok_or(crate::Error::WrongElementType { operands: values.dtype(), options: T::DTYPE })
}

/// A named result.
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor {
    /// Its name in the file.
    pub name: &'static str,
    /// Its shape, slowest axis first.
    pub shape: Vec<usize>,
    /// Its elements.
    pub values: Values,
}

impl Tensor {
    fn new<T: Element>(name: &'static str, shape: &[usize], values: Vec<T>) -> Self {
        Tensor { name, shape: shape.into(), values: Values::new(values) }
    }
}

/// Refuses an output path that [`write()`] should not replace: the input itself, or anything but a
/// regular file. Worth asking before a long computation.
///
/// # Errors
/// [`Error::OutputIsInput`], [`Error::NotAFile`], and [`Error::Write`] where the folder is missing.
pub fn check_output(input: &Path, output: &Path) -> Result<(), Error> {
    // Canonical paths see through `./x`, links and, where the system has them, upper and lower case.
    if let (Ok(from), Ok(to)) = (fs::canonicalize(input), fs::canonicalize(output))
        && from == to
    {
        return Err(Error::OutputIsInput { path: output.into() });
    }
    match fs::metadata(output) {
        Ok(found) if !found.is_file() => Err(Error::NotAFile { path: output.into() }),
        Ok(_) => Ok(()),
        Err(_) => match fs::metadata(folder_of(output)) {
            Ok(_) => Ok(()),
            Err(source) => Err(Error::Write { path: output.into(), source }),
        },
    }
}

/// Writes results: all of the file, or nothing.
///
/// # Errors
/// [`Error::Write`], and [`Error::Format`] if a shape does not fit its elements.
pub fn write(path: impl AsRef<Path>, layout: Layout, tensors: &[Tensor]) -> Result<(), Error> {
    let path = path.as_ref();
    let bytes = serialize(layout, tensors).map_err(|source| Error::Format { path: path.into(), source })?;
    replace(path, &bytes).map_err(|source| Error::Write { path: path.into(), source })
}

/// The content of a result file: the tensors, and the layout as metadata.
fn serialize(layout: Layout, tensors: &[Tensor]) -> Result<Vec<u8>, FormatError> {
    let encoded: Vec<(Dtype, Vec<u8>)> = tensors.iter().map(|tensor| tensor.values.encode()).collect();
    let views: Vec<(&str, TensorView<'_>)> = tensors
        .iter()
        .zip(&encoded)
        .map(|(tensor, (dtype, bytes))| Ok((tensor.name, TensorView::new(*dtype, tensor.shape.clone(), bytes)?)))
        .collect::<Result<_, SafeTensorError>>()?;
    let metadata = HashMap::from([("layout".to_string(), layout.to_string())]);
    Ok(safetensors::serialize(views, Some(metadata))?)
}

/// Writes beside `path` and renames, so that a failure leaves neither half a file nor a stray one.
fn replace(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let (mut file, temporary) = create_temporary(folder_of(path))?;
    let written = file.write_all(bytes).and_then(|()| file.sync_all());
    drop(file); // some systems do not rename an open file
    let renamed = written.and_then(|()| fs::rename(&temporary, path));
    if renamed.is_err() {
        // The first error is the one to report.
        let _ = fs::remove_file(&temporary);
    }
    renamed
}

fn create_temporary(folder: &Path) -> std::io::Result<(File, PathBuf)> {
    let mut attempt = 0;
    loop {
        let path = folder.join(format!(".sink-attention-{}-{attempt}.tmp", std::process::id()));
        match File::create_new(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists && attempt < 1000 => attempt += 1,
            created => return created.map(|file| (file, path)),
        }
    }
}

fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    }
}

/// A tensor as it lies in the file.
struct Raw<'a> {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: &'a [u8],
}

impl Raw<'_> {
    /// The elements of a tensor that is f32 whatever the operands are.
    fn floats(&self, name: &'static str) -> Result<Vec<f32>, FormatError> {
        match self.dtype {
            Dtype::F32 => Ok(decode(self.bytes, f32::from_le_bytes)),
            actual => Err(FormatError::ElementType { name, actual, expected: "F32" }),
        }
    }

    fn check_same_dtype(&self, name: &'static str, q: &Raw<'_>) -> Result<(), FormatError> {
        if self.dtype == q.dtype {
            return Ok(());
        }
        Err(FormatError::MixedElementTypes { name, actual: self.dtype, q: q.dtype })
    }

    fn check_shape(&self, name: &'static str, expected: &[usize]) -> Result<(), FormatError> {
        if self.shape == expected {
            return Ok(());
        }
        Err(FormatError::Shape { name, actual: self.shape.clone(), expected: expected.to_vec() })
    }
}

/// A safetensors file, taken apart.
struct Container<'a> {
    metadata: BTreeMap<String, String>,
    tensors: BTreeMap<String, Raw<'a>>,
}

impl<'a> Container<'a> {
    /// As `SafeTensors::deserialize`, but what is named twice is an error, sizes are in the messages, and
    /// offsets near 2^64 are an error too: added to the header's length, they overflow there (0.8.0).
    fn parse(bytes: &'a [u8]) -> Result<Self, FormatError> {
        let Some((&length, rest)) = bytes.split_first_chunk() else {
            return Err(FormatError::TooShort { actual: bytes.len() });
        };
        let length = u64::from_le_bytes(length);
        let Some((header, data)) = usize::try_from(length).ok().and_then(|n| rest.split_at_checked(n)) else {
            return Err(FormatError::HeaderLength { header: length, actual: rest.len() });
        };

        #[derive(Deserialize)]
        struct Strings {
            #[serde(rename = "__metadata__")]
            metadata: Option<Unique<String>>,
        }
        let Unique::<IgnoredAny>(_) = serde_json::from_slice(header)?;
        let Strings { metadata } = serde_json::from_slice(header)?;
        // Checks shapes against offsets, and that the offsets leave no gap.
        let index: Metadata = serde_json::from_slice(header)?;
        if index.data_len() != data.len() {
            return Err(FormatError::DataLength { expected: index.data_len(), actual: data.len() });
        }
        let tensors = index.tensors().into_iter().map(|(name, info)| {
            let (start, end) = info.data_offsets;
            (name, Raw { dtype: info.dtype, shape: info.shape.clone(), bytes: &data[start..end] })
        });
        Ok(Container { metadata: metadata.map(|unique| unique.0).unwrap_or_default(), tensors: tensors.collect() })
    }
}

/// A JSON object that names no key twice; maps of the standard library keep the last value silently.
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

fn parse_options(metadata: &BTreeMap<String, String>) -> Result<Options, FormatError> {
    const COUNT: &str = "a whole number from 0 up";
    let mut options = Options::new();
    for (key, value) in metadata {
        let bad = |expected| FormatError::BadValue { key: key.clone(), value: value.clone(), expected };
        match key.as_str() {
            "format" => {}
            "layout" => {
                options.layout = match value.as_str() {
                    "bshd" => Layout::Bshd,
                    "bhsd" => Layout::Bhsd,
                    "thd" => return Err(unsupported("layout thd (sequences of varying length)")),
                    _ => return Err(bad("bshd, bhsd or thd")),
                }
            }
            "align" => {
                options.alignment = match value.as_str() {
                    "bottom-right" => Alignment::BottomRight,
                    "top-left" => Alignment::TopLeft,
                    _ => return Err(bad("bottom-right or top-left")),
                }
            }
            "causal" => options.causal = number(value).ok_or_else(|| bad("true or false"))?,
            "window_left" => options.window.left = Some(number(value).ok_or_else(|| bad(COUNT))?),
            "window_right" => options.window.right = Some(number(value).ok_or_else(|| bad(COUNT))?),
            "sink_tokens" => options.sink_tokens = number(value).ok_or_else(|| bad(COUNT))?,
            "q_offset" => options.query_offset = Some(number(value).ok_or_else(|| bad("a whole number"))?),
            "scale" => {
                let scale = number(value).filter(|scale: &f32| scale.is_finite());
                options.scale = Some(scale.ok_or_else(|| bad("a finite number"))?);
            }
            "softcap" => return Err(unsupported("softcap")),
            _ => return Err(FormatError::UnknownKey { key: key.clone() }),
        }
    }
    Ok(options)
}

fn number<T: FromStr>(text: &str) -> Option<T> {
    text.parse().ok()
}

fn unsupported(feature: impl Into<String>) -> FormatError {
    FormatError::Unsupported { feature: feature.into() }
}

fn check_names<'a>(names: impl Iterator<Item = &'a String>) -> Result<(), FormatError> {
    for name in names {
        match name.as_str() {
            "q" | "k" | "v" | "sinks" | "dout" | "dlse" => {}
            name if name.starts_with("expected.") => {}
            name if UNSUPPORTED_TENSORS.contains(&name) => return Err(unsupported(format!("tensor {name}"))),
            name => return Err(FormatError::UnknownTensor { name: name.into() }),
        }
    }
    Ok(())
}

/// The sizes, once q, k and v agree about them.
fn problem_shape(layout: Layout, q: &Raw<'_>, k: &Raw<'_>, v: &Raw<'_>) -> Result<Shape, FormatError> {
    let sizes = |name, tensor: &Raw<'_>| match (layout, tensor.shape.as_slice()) {
        (Layout::Bshd, &[batch, seq, heads, width]) => Ok([batch, heads, seq, width]),
        (Layout::Bhsd, &[batch, heads, seq, width]) => Ok([batch, heads, seq, width]),
        (_, shape) => Err(FormatError::Rank { name, shape: shape.to_vec(), layout }),
    };
    let [batch, heads, seq_q, head_dim] = sizes("q", q)?;
    let [k_batch, kv_heads, seq_k, k_width] = sizes("k", k)?;
    let [v_batch, v_heads, v_seq, value_dim] = sizes("v", v)?;
    for (dimension, left_name, left, right_name, right) in [
        ("batch", "q", batch, "k", k_batch),
        ("batch", "q", batch, "v", v_batch),
        ("heads", "k", kv_heads, "v", v_heads),
        ("sequence length", "k", seq_k, "v", v_seq),
        ("width", "q", head_dim, "k", k_width),
    ] {
        if left != right {
            return Err(FormatError::Mismatch { dimension, left_name, left, right_name, right, layout });
        }
    }
    Ok(Shape { batch, heads, kv_heads, seq_q, seq_k, head_dim, value_dim })
}
