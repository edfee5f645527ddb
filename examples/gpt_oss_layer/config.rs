//! What config.json says of the attention layers.

use std::path::Path;

use serde_json::Value;
use sink_attention::cache::{RotaryFrequencies, RotaryScaling, Yarn};
use sink_attention::file;

/// What a layer attends to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LayerType {
    /// The window's last keys.
    Sliding { window: usize },
    /// Everything before.
    Full,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    pub hidden: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub layers: Vec<LayerType>,
    pub biases: bool,
    /// The rotary embedding.
    pub rope: RotaryFrequencies,
}

/// Bytes of the file, at most.
const MOST_BYTES: u64 = 1 << 20;

/// The largest number of any size that is believed.
const MOST: u64 = 1 << 24;

impl Config {
    pub fn load(path: &Path) -> Result<Self, String> {
        let text = file::read(path, MOST_BYTES).map_err(|error| format!("cannot read {}: {error}", path.display()))?;
        let text = String::from_utf8(text).map_err(|_| format!("{}: it is not text in UTF-8", path.display()))?;
        Config::parse(&text).map_err(|error| format!("{}: {error}", path.display()))
    }

    pub fn parse(text: &str) -> Result<Self, String> {
        let json: Value = serde_json::from_str(text).map_err(|error| error.to_string())?;
        let object = Object { json: &json, of: "" };
        match object.text("model_type")? {
            "gpt_oss" => {}
            other => return Err(format!("model_type is {other:?}; only gpt_oss is known")),
        }
        let [hidden, heads, kv_heads] =
            ["hidden_size", "num_attention_heads", "num_key_value_heads"].map(|name| object.size(name));
        let (hidden, heads, kv_heads) = (hidden?, heads?, kv_heads?);
        let head_dim = match json.get("head_dim") {
            Some(_) => object.size("head_dim")?,
            None => hidden / heads,
        };
        if heads % kv_heads != 0 {
            return Err(format!("num_attention_heads ({heads}) is no multiple of num_key_value_heads ({kv_heads})"));
        }
        if head_dim == 0 || head_dim % 2 == 1 {
            return Err(format!("head_dim is {head_dim}; a rotary embedding needs an even number from 2 up"));
        }
        let count = object.size("num_hidden_layers")?;
        let types = object.get("layer_types")?.as_array().ok_or("layer_types is no list")?;
        if types.len() != count {
            return Err(format!("layer_types has {} entries, num_hidden_layers is {count}", types.len()));
        }
        let of = |(layer, name): (usize, &Value)| match name.as_str() {
            Some("sliding_attention") => Ok(LayerType::Sliding { window: object.size("sliding_window")? }),
            Some("full_attention") => Ok(LayerType::Full),
            _ => Err(format!("layer_types[{layer}] is {name}; known: \"sliding_attention\", \"full_attention\"")),
        };
        let layers = types.iter().enumerate().map(of).collect::<Result<Vec<_>, _>>()?;
        let biases = match json.get("attention_bias") {
            None => true,
            Some(value) => value.as_bool().ok_or_else(|| format!("attention_bias is {value}; it must be a boolean"))?,
        };
        Ok(Config { hidden, heads, kv_heads, head_dim, layers, biases, rope: rope(&json)? })
    }
}

/// `rope_scaling` with `rope_theta` beside it, or all in one object, as later versions write it.
fn rope(json: &Value) -> Result<RotaryFrequencies, String> {
    let names = ["rope_scaling", "rope_parameters", "rope"];
    let found = names.into_iter().find_map(|name| Some((name, json.get(name).filter(|value| !value.is_null())?)));
    let whole = Object { json, of: "" };
    let Some((name, value)) = found else { return Ok(RotaryFrequencies::new(whole.number("rope_theta", 1.0)?)) };
    let object = Object { json: value, of: name };
    let theta = if value.get("rope_theta").is_some() { object } else { whole }.number("rope_theta", 1.0)?;
    match object.text("rope_type")? {
        "default" => Ok(RotaryFrequencies::new(theta)),
        "yarn" => {
            let optional = |name, default| match value.get(name).filter(|value| !value.is_null()) {
                Some(_) => object.number(name, 0.0).map(Some),
                None => Ok(default),
            };
            let truncate = match value.get("truncate") {
                None => true,
                Some(value) => {
                    value.as_bool().ok_or_else(|| format!("{name}.truncate is {value}; it must be a boolean"))?
                }
            };
            let known = ["mscale", "mscale_all_dim"].into_iter().find(|name| value.get(*name).is_some());
            if let Some(unknown) = known {
                return Err(format!("{name}.{unknown} is not known here; give attention_factor instead"));
            }
            let original_positions = object.number("original_max_position_embeddings", 1.0)?;
            let [beta_fast, beta_slow] = [optional("beta_fast", Some(32.0))?, optional("beta_slow", Some(1.0))?];
            let yarn = Yarn::new(object.number("factor", 1.0)?, original_positions)
                .betas(beta_fast.unwrap_or(32.0), beta_slow.unwrap_or(1.0))
                .attention_factor(optional("attention_factor", None)?)
                .truncate(truncate);
            Ok(RotaryFrequencies::new(theta).scaling(RotaryScaling::Yarn(yarn)))
        }
        other => Err(format!("{name}.rope_type is {other:?}; known: \"yarn\", \"default\"")),
    }
}

#[derive(Clone, Copy)]
struct Object<'a> {
    json: &'a Value,
    of: &'a str,
}

impl<'a> Object<'a> {
    fn name(&self, name: &str) -> String {
        if self.of.is_empty() { name.into() } else { format!("{}.{name}", self.of) }
    }

    fn get(&self, name: &str) -> Result<&'a Value, String> {
        self.json.get(name).ok_or_else(|| format!("{} is missing", self.name(name)))
    }

    fn text(&self, name: &str) -> Result<&'a str, String> {
        let value = self.get(name)?;
        value.as_str().ok_or_else(|| format!("{} is {value}; it must be a string", self.name(name)))
    }

    fn size(&self, name: &str) -> Result<usize, String> {
        let value = self.get(name)?;
        let size = value.as_u64().filter(|size| (1..=MOST).contains(size));
        size.map(|size| size as usize)
            .ok_or_else(|| format!("{} is {value}; it must be a whole number from 1 to {MOST}", self.name(name)))
    }

    fn number(&self, name: &str, least: f64) -> Result<f64, String> {
        let value = self.get(name)?;
        let number = value.as_f64().filter(|number| number.is_finite() && *number >= least);
        number.ok_or_else(|| format!("{} is {value}; it must be a number from {least} up", self.name(name)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = include_str!("../../tests/gpt_oss_tiny/config.json");

    #[test]
    fn the_fixture() {
        let config = Config::parse(TEXT).unwrap();
        assert_eq!([config.hidden, config.heads, config.kv_heads, config.head_dim], [96, 8, 2, 32]);
        assert_eq!(config.layers, [LayerType::Sliding { window: 16 }, LayerType::Full]);
        let RotaryScaling::Yarn(yarn) = config.rope.scaling else { panic!("{:?}", config.rope) };
        assert_eq!(
            (config.rope.theta, yarn.factor, yarn.truncate, yarn.original_positions),
            (150_000.0, 8.0, false, 512.0)
        );
    }

    /// As openai/gpt-oss-20b has it.
    #[test]
    fn theta_beside_the_scaling() {
        let mut json: Value = serde_json::from_str(TEXT).unwrap();
        let mut scaling = json["rope"].take();
        scaling.as_object_mut().unwrap().remove("rope_theta");
        json.as_object_mut().unwrap().remove("rope");
        json["rope_scaling"] = scaling;
        json["rope_theta"] = 150_000.into();
        assert_eq!(Config::parse(&json.to_string()).unwrap(), Config::parse(TEXT).unwrap());
        json.as_object_mut().unwrap().remove("rope_theta");
        assert_eq!(Config::parse(&json.to_string()).unwrap_err(), "rope_theta is missing");
    }

    #[test]
    fn what_is_not_known_is_an_error() {
        for (pointer, value, message) in [
            ("/model_type", Value::from("llama"), "model_type is \"llama\"; only gpt_oss is known"),
            ("/hidden_size", 0.into(), "hidden_size is 0; it must be a whole number from 1 to 16777216"),
            ("/num_attention_heads", 7.into(), "num_attention_heads (7) is no multiple of num_key_value_heads (2)"),
            ("/head_dim", 31.into(), "head_dim is 31;"),
            ("/num_hidden_layers", 3.into(), "layer_types has 2 entries, num_hidden_layers is 3"),
            ("/layer_types/1", "linear_attention".into(), "layer_types[1] is \"linear_attention\"; known:"),
            ("/sliding_window", Value::Null, "sliding_window is null;"),
            ("/attention_bias", 1.into(), "attention_bias is 1; it must be a boolean"),
            ("/rope/rope_type", "longrope".into(), "rope.rope_type is \"longrope\"; known: \"yarn\", \"default\""),
            ("/rope/factor", 0.5.into(), "rope.factor is 0.5; it must be a number from 1 up"),
            ("/rope/rope_theta", "big".into(), "rope.rope_theta is \"big\""),
        ] {
            let mut json: Value = serde_json::from_str(TEXT).unwrap();
            *json.pointer_mut(pointer).unwrap() = value;
            let error = Config::parse(&json.to_string()).unwrap_err();
            assert!(error.contains(message), "{pointer}: {error}");
        }
        assert!(Config::parse("{").is_err());
        assert_eq!(Config::parse("[]").unwrap_err(), "model_type is missing");
    }
}
