//! JSON that comes from outside.

use serde::de::DeserializeOwned;
use thiserror::Error;

/// Why a text is not the JSON that was expected. Never repeats a value, which may be a key.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{what}, at line {line} column {column}")]
pub struct JsonError {
    what: String,
    line: usize,
    column: usize,
}

/// The longest name out of the text that an error repeats; a key in base64 is longer.
const NAME_MAX: usize = 20;

/// Reads a value, with an error that can be logged and sent.
pub fn parse<T: DeserializeOwned>(text: &[u8]) -> Result<T, JsonError> {
    serde_json::from_slice(text).map_err(|error| JsonError::new(&error))
}

impl JsonError {
    fn new(error: &serde_json::Error) -> Self {
        let text = error.to_string();
        let position = format!(" at line {} column {}", error.line(), error.column());
        let text = text.strip_suffix(&position).unwrap_or(&text);
        Self { what: without_values(text), line: error.line(), column: error.column() }
    }
}

/// What serde says of an error, less the part of the input that it quotes.
fn without_values(text: &str) -> String {
    if text.starts_with("invalid type: ") || text.starts_with("invalid value: ") {
        let expected = text.rsplit_once(", expected ").map_or("something else", |(_, expected)| expected);
        return format!("expected {}", crate::link::cut(expected, 100));
    }
    // Names of fields stand between backticks.
    let quotes_much = text.split('`').skip(1).step_by(2).take(1).any(|name| name.len() > NAME_MAX);
    if quotes_much { "unknown name".to_owned() } else { crate::link::cut(text, 300).to_owned() }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    #[expect(dead_code, reason = "only whether it can be read matters")]
    struct Example {
        keys: Vec<String>,
        #[serde(default)]
        count: u8,
    }

    #[test]
    fn values_are_not_repeated() {
        for (text, error) in [
            (r#"{"keys": "U0VDUkVU"}"#, "expected a sequence, at line 1 column 19"),
            (r#"{"keys": [], "count": "U0VDUkVU"}"#, "expected u8, at line 1 column 32"),
            (r#"{"U0VDUkVUU0VDUkVUU0VDUkVU": 1}"#, "unknown name, at line 1 column 27"),
            (r#"{"key": []}"#, "unknown field `key`, expected `keys` or `count`, at line 1 column 6"),
            (r"{}", "missing field `keys`, at line 1 column 2"),
        ] {
            assert_eq!(parse::<Example>(text.as_bytes()).unwrap_err().to_string(), error);
        }
    }
}
