//! Seeded mutations of valid inputs: what a hostile or broken sender makes of them.

use rand::{Rng, RngCore, SeedableRng, seq::IndexedRandom};
use rand_chacha::ChaCha8Rng;
use serde_json::{Map, Value, json};

/// Numbers at which arithmetic, conversions and allocations fail.
const NUMBERS: [&str; 18] = [
    "0",
    "-1",
    "1",
    "255",
    "65536",
    "2147483648",
    "4294967296",
    "9223372036854775807",
    "9223372036854775808",
    "18446744073709551615",
    "18446744073709551616",
    "1e19",
    "1e308",
    "1e999",
    "-1e308",
    "5e-324",
    "0.1",
    "1000000007",
];

/// Bytes that end, begin or extend something in most encodings.
const BYTES: [u8; 12] = [
    0, 1, 0x7f, 0x80, 0xc0, 0xfe, 0xff, b'"', b'\\', b'{', b'[', b'\n',
];

/// Texts that break what handles names, paths, lines or terminals.
const TEXTS: [&str; 14] = [
    "",
    " ",
    "\0",
    "\u{1b}[2J\u{1b}]0;x\u{7}",
    "../../../../etc/passwd",
    "/etc/passwd",
    "/dev/zero",
    "a\nb\r\nc",
    "\u{202e}abc",
    "\u{feff}",
    "é\u{301}\u{10ffff}",
    "{{ 1 }}{% x %}",
    "nan",
    "\u{d7ff}\u{e000}",
];

/// Maximum length of a mutant in bytes; what repeats itself stays below.
const MAX_BYTES: usize = 1 << 20;

/// Nesting depth of a value that is nested too deeply.
const DEPTH: usize = 500;

/// A seeded source of mutations.
///
/// A target, a seed and an index determine every mutant, so that a failure is repeated without those before it.
#[derive(Debug)]
pub struct Mutator {
    random: ChaCha8Rng,
}

impl Mutator {
    /// The mutations of input number `index` of a target.
    #[must_use]
    pub fn new(target: &str, seed: u64, index: u64) -> Self {
        // FNV-1a of the name.
        let name = target
            .bytes()
            .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
                (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
            });
        let mixed = name
            ^ seed.wrapping_mul(0x9e37_79b9_7f4a_7c15)
            ^ index.wrapping_mul(0xd1b5_4a32_d192_ed03);
        Self {
            random: ChaCha8Rng::seed_from_u64(mixed),
        }
    }

    /// A number below `end`, which is above 0.
    pub fn below(&mut self, end: usize) -> usize {
        self.random.random_range(0..end)
    }

    /// One of `items`.
    ///
    /// # Panics
    /// If there is none.
    pub fn pick<'a, T>(&mut self, items: &'a [T]) -> &'a T {
        items.choose(&mut self.random).expect("there are items")
    }

    /// `valid` after one to four mutations of its bytes.
    pub fn bytes(&mut self, valid: &[u8]) -> Vec<u8> {
        let mut bytes = valid.to_vec();
        for _ in 0..=self.below(4) {
            self.mutate(&mut bytes);
            bytes.truncate(MAX_BYTES);
        }
        bytes
    }

    /// `valid` after one to four mutations that leave it UTF-8: of its bytes, its numbers and its lines, with
    /// `fragments` of its language inserted.
    pub fn text(&mut self, valid: &str, fragments: &[&str]) -> String {
        let mut text = valid.to_owned();
        for _ in 0..=self.below(4) {
            text = match self.below(6) {
                0 => self.with_number(&text),
                1 => self.with_lines_moved(&text),
                2 => self.with_insertion(&text, TEXTS.as_slice()),
                3 | 4 if !fragments.is_empty() => self.with_insertion(&text, fragments),
                _ => {
                    let mut bytes = text.into_bytes();
                    self.mutate(&mut bytes);
                    bytes.truncate(MAX_BYTES);
                    String::from_utf8_lossy(&bytes).into_owned()
                }
            };
        }
        text
    }

    /// `valid` after one to three replacements, removals or additions in its tree.
    pub fn json(&mut self, valid: &Value) -> Value {
        let mut value = valid.clone();
        for _ in 0..=self.below(3) {
            let at = self.below(nodes(&value));
            self.mutate_node(&mut value, at);
        }
        value
    }

    /// Text of [`Self::json`], or of [`Self::text`] of `valid`: half of each.
    pub fn json_text(&mut self, valid: &Value) -> String {
        match self.below(2) {
            0 => self.json(valid).to_string(),
            _ => {
                let fragments = [
                    "[", "{", "\"", "null", ",", ":", "1e999", "\\u0000", "\\ud800",
                ];
                self.text(&valid.to_string(), &fragments)
            }
        }
    }

    fn mutate(&mut self, bytes: &mut Vec<u8>) {
        if bytes.is_empty() {
            bytes.push(self.random.random());
            return;
        }
        let at = self.below(bytes.len());
        let end = (at + 1 + self.below(64)).min(bytes.len());
        match self.below(9) {
            0 => bytes[at] ^= 1 << self.below(8),
            1 => bytes[at] = *self.pick(&BYTES),
            2 => bytes.truncate(at),
            3 => drop(bytes.drain(at..end)),
            4 => {
                let piece = bytes[at..end].to_vec();
                let to = self.below(bytes.len());
                bytes.splice(to..to, piece);
            }
            5 => {
                let times = 1 << self.below(12);
                let piece = bytes[at..end].repeat(times);
                bytes.splice(at..at, piece.into_iter().take(MAX_BYTES));
            }
            6 => {
                let mut noise = vec![0; 1 + self.below(16)];
                self.random.fill_bytes(&mut noise);
                bytes.splice(at..at, noise);
            }
            7 => {
                // A varint or little-endian length that is far too long.
                let long = self.below(10);
                bytes.splice(at..at, vec![0xff; long + 1]);
            }
            _ => bytes[at..end].reverse(),
        }
    }

    /// `text` with one of its numbers replaced.
    fn with_number(&mut self, text: &str) -> String {
        let is_digit = |c: char| c.is_ascii_digit();
        let starts: Vec<usize> = text
            .char_indices()
            .filter(|&(at, c)| is_digit(c) && !text[..at].ends_with(is_digit))
            .map(|(at, _)| at)
            .collect();
        let Some(&start) = starts.choose(&mut self.random) else {
            return text.to_owned();
        };
        let rest = &text[start..];
        let end = start + rest.find(|c| !is_digit(c)).unwrap_or(rest.len());
        let number = self.pick(&NUMBERS);
        format!("{}{number}{}", &text[..start], &text[end..])
    }

    /// `text` with a line removed, repeated or moved.
    fn with_lines_moved(&mut self, text: &str) -> String {
        let mut lines: Vec<&str> = text.split('\n').collect();
        let at = self.below(lines.len());
        let to = self.below(lines.len());
        let line = lines[at];
        match self.below(3) {
            0 => drop(lines.remove(at)),
            1 => lines.insert(to, line),
            _ => lines.swap(at, to),
        }
        lines.join("\n")
    }

    fn with_insertion(&mut self, text: &str, fragments: &[&str]) -> String {
        let mut at = self.below(text.len() + 1);
        while !text.is_char_boundary(at) {
            at -= 1;
        }
        let fragment = *self.pick(fragments);
        let times = if self.below(8) == 0 { 300 } else { 1 };
        format!("{}{}{}", &text[..at], fragment.repeat(times), &text[at..])
    }

    /// Mutates node number `at` of a tree, in the order in which [`nodes`] counts.
    fn mutate_node(&mut self, value: &mut Value, mut at: usize) {
        if at == 0 {
            self.mutate_value(value);
            return;
        }
        at -= 1;
        let children: Vec<&mut Value> = match value {
            Value::Array(items) => items.iter_mut().collect(),
            Value::Object(fields) => fields.values_mut().collect(),
            _ => Vec::new(),
        };
        for child in children {
            let below = nodes(child);
            if at < below {
                return self.mutate_node(child, at);
            }
            at -= below;
        }
    }

    fn mutate_value(&mut self, value: &mut Value) {
        let choice = self.below(10);
        match value {
            Value::Object(fields) if choice < 5 => return self.mutate_fields(fields),
            Value::Array(items) if choice < 5 && !items.is_empty() => {
                return self.mutate_items(items);
            }
            _ => {}
        }
        *value = match choice {
            0 => Value::Null,
            1 => json!(self.below(2) == 0),
            2..=4 => self.number(),
            5 | 6 => (*self.pick(&TEXTS)).into(),
            7 => json!([]),
            8 => json!({}),
            _ => (0..self.below(DEPTH)).fold(value.take(), |inner, _| json!([inner])),
        };
    }

    fn mutate_fields(&mut self, fields: &mut Map<String, Value>) {
        let keys: Vec<String> = fields.keys().cloned().collect();
        let Some(key) = keys.choose(&mut self.random) else {
            let name = (*self.pick(&TEXTS)).to_owned();
            fields.insert(name, Value::Null);
            return;
        };
        let value = fields.remove(key).unwrap_or_default();
        match self.below(3) {
            0 => {}
            1 => drop(fields.insert((*self.pick(&TEXTS)).to_owned(), value)),
            _ => {
                let other = self.pick(&keys).clone();
                fields.insert(other, value);
            }
        }
    }

    fn mutate_items(&mut self, items: &mut Vec<Value>) {
        let at = self.below(items.len());
        let item = items[at].clone();
        match self.below(3) {
            0 => drop(items.remove(at)),
            1 => items.insert(0, item),
            _ => items.extend(vec![item; 1000]),
        }
    }

    /// A number as JSON can hold it; those that it cannot are text.
    fn number(&mut self) -> Value {
        let text = *self.pick(&NUMBERS);
        serde_json::from_str(text).unwrap_or_else(|_| text.into())
    }
}

/// Number of nodes of a tree.
fn nodes(value: &Value) -> usize {
    1 + match value {
        Value::Array(items) => items.iter().map(nodes).sum(),
        Value::Object(fields) => fields.values().map(nodes).sum::<usize>(),
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn mutants_are_determined_by_target_seed_and_index() {
        let valid = "{\"a\": [1, 2, {\"b\": \"text\"}]}\n";
        let mutant =
            |target: &str, seed, index| Mutator::new(target, seed, index).bytes(valid.as_bytes());
        assert_eq!(mutant("a", 0, 7), mutant("a", 0, 7));
        let all: BTreeSet<_> = (0..500).map(|index| mutant("a", 0, index)).collect();
        assert!(all.len() > 400, "only {} mutants are distinct", all.len());
        assert_ne!(mutant("a", 0, 7), mutant("b", 0, 7));
        assert_ne!(mutant("a", 0, 7), mutant("a", 1, 7));
    }

    #[test]
    fn mutants_of_text_are_bounded_and_mostly_differ() {
        let valid = json!({"a": [1, 2, {"b": "text"}], "c": 3});
        let (original, mut same) = (valid.to_string(), 0);
        for index in 0..500 {
            let mut mutator = Mutator::new("text", 0, index);
            let text = mutator.json_text(&valid);
            assert!(text.len() < 2 * MAX_BYTES);
            same += usize::from(text == original);
        }
        assert!(same < 50, "{same} of 500 mutants are the original");
    }
}
