//! Lexer: source to tokens, with whitespace control of tags applied.

use crate::{error::TemplateError, text::is_space};

#[derive(Debug, Clone, PartialEq)]
pub(crate) enum TemplateToken {
    /// Text outside tags.
    Data(String),
    VariableBegin,
    VariableEnd,
    BlockBegin,
    BlockEnd,
    Name(String),
    Text(String),
    Int(i128),
    Float(f64),
    Operator(&'static str),
    End,
}

impl TemplateToken {
    /// Description for error messages.
    pub(crate) fn describe(&self) -> String {
        match self {
            Self::Data(_) => "template data".into(),
            Self::VariableBegin => "begin of print statement".into(),
            Self::VariableEnd => "end of print statement".into(),
            Self::BlockBegin => "begin of statement block".into(),
            Self::BlockEnd => "end of statement block".into(),
            Self::Name(name) => name.clone(),
            Self::Text(text) => format!("{text:?}"),
            Self::Int(number) => number.to_string(),
            Self::Float(number) => number.to_string(),
            Self::Operator(operator) => (*operator).to_owned(),
            Self::End => "end of template".into(),
        }
    }
}

/// A token with its line number.
#[derive(Debug, Clone)]
pub(crate) struct LocatedToken {
    pub(crate) token: TemplateToken,
    pub(crate) line: usize,
}

/// Operators, longer ones first.
const OPERATORS: [&str; 26] = [
    "//", "**", "==", "!=", ">=", "<=", "+", "-", "/", "*", "%", "~", "[", "]", "(", ")", "{", "}",
    ">", "<", "=", ".", ":", "|", ",", ";",
];

/// Kind of a tag, determined by its opening delimiter.
#[derive(Clone, Copy, PartialEq, Eq)]
enum TagKind {
    Variable,
    Block,
    Comment,
    Raw,
}

/// Tokenizes `source`; the last token is [`TemplateToken::End`].
pub(crate) fn tokens(source: &str) -> Result<Vec<LocatedToken>, TemplateError> {
    let source = source.replace("\r\n", "\n").replace('\r', "\n");
    let source = source.strip_suffix('\n').unwrap_or(&source);
    let mut lexer = Lexer {
        source: source.chars().collect(),
        position: 0,
        line: 1,
        starts_line: true,
        tokens: Vec::new(),
    };
    while lexer.position < lexer.source.len() {
        lexer.data()?;
    }
    lexer.push(TemplateToken::End);
    Ok(lexer.tokens)
}

struct Lexer {
    source: Vec<char>,
    position: usize,
    line: usize,
    /// Whether the current position is at the start of a line.
    starts_line: bool,
    tokens: Vec<LocatedToken>,
}

impl Lexer {
    fn push(&mut self, token: TemplateToken) {
        let line = self.line;
        self.tokens.push(LocatedToken { token, line });
    }

    fn failure(&self, message: impl Into<String>) -> TemplateError {
        TemplateError::new(message).at(self.line)
    }

    fn peek(&self, ahead: usize) -> Option<char> {
        self.source.get(self.position + ahead).copied()
    }

    fn is_at(&self, position: usize, text: &str) -> bool {
        let rest = self.source.get(position..).unwrap_or_default();
        let mut rest = rest.iter();
        text.chars().all(|c| rest.next() == Some(&c))
    }

    fn spaces(&self, position: usize) -> usize {
        let rest = self.source.get(position..).unwrap_or_default();
        rest.iter().take_while(|&&c| is_space(c)).count()
    }

    /// Advances to `position`, counting lines.
    fn advance(&mut self, position: usize) {
        let passed = &self.source[self.position..position];
        self.line += passed.iter().filter(|&&c| c == '\n').count();
        self.starts_line = passed.last() == Some(&'\n');
        self.position = position;
    }

    /// Reads the text up to the next tag, and that tag.
    fn data(&mut self) -> Result<(), TemplateError> {
        let next = (self.position..self.source.len())
            .find_map(|position| Some((position, self.tag(position)?)));
        let Some((position, (tag, after))) = next else {
            let text = self.source[self.position..].iter().collect();
            self.push(TemplateToken::Data(text));
            self.advance(self.source.len());
            return Ok(());
        };
        let sign = self.source.get(position + 2).copied();
        self.text_before(position, sign, tag != TagKind::Variable);
        self.advance(after);
        match tag {
            TagKind::Variable => {
                self.push(TemplateToken::VariableBegin);
                self.expression(TagKind::Variable)
            }
            TagKind::Block => {
                self.push(TemplateToken::BlockBegin);
                self.expression(TagKind::Block)
            }
            TagKind::Comment => self.comment(),
            TagKind::Raw => self.raw(),
        }
    }

    /// The tag that starts at `position`, with the position after its opening delimiter.
    fn tag(&self, position: usize) -> Option<(TagKind, usize)> {
        let tag = match (self.source[position], self.source.get(position + 1)?) {
            ('{', '{') => TagKind::Variable,
            ('{', '%') => TagKind::Block,
            ('{', '#') => TagKind::Comment,
            _ => return None,
        };
        let signs = usize::from(matches!(self.source.get(position + 2), Some('-' | '+')));
        let inside = position + 2 + signs;
        if tag == TagKind::Block {
            let word = inside + self.spaces(inside);
            if self.is_at(word, "raw") {
                let end = word + 3 + self.spaces(word + 3);
                if self.is_at(end, "-%}") {
                    return Some((TagKind::Raw, end + 3 + self.spaces(end + 3)));
                }
                if self.is_at(end, "%}") {
                    return Some((TagKind::Raw, end + 2));
                }
            }
        }
        Some((tag, inside))
    }

    /// Emits the text before a tag without the whitespace that the tag strips: all trailing whitespace with `-`,
    /// otherwise the indentation of the line before block and comment tags (`lstrip_blocks`).
    fn text_before(&mut self, position: usize, sign: Option<char>, strips_indentation: bool) {
        let mut text = &self.source[self.position..position];
        if sign == Some('-') {
            let end = text
                .iter()
                .rposition(|&c| !is_space(c))
                .map_or(0, |last| last + 1);
            text = &text[..end];
        } else if sign != Some('+') && strips_indentation {
            let line = text
                .iter()
                .rposition(|&c| c == '\n')
                .map_or(0, |last| last + 1);
            let is_blank = text[line..].iter().all(|&c| is_space(c));
            if (line > 0 || self.starts_line) && line < text.len() && is_blank {
                text = &text[..line];
            }
        }
        if !text.is_empty() {
            let text = text.iter().collect();
            self.push(TemplateToken::Data(text));
        }
    }

    /// The position where text continues after a tag that ends with `end` at `position`: `-` strips all whitespace; a
    /// newline is stripped (`trim_blocks`) unless there is a `+`.
    fn after_end(&self, position: usize, end: &str) -> Option<usize> {
        if self.is_at(position, &format!("-{end}")) {
            let after = position + 1 + end.len();
            return Some(after + self.spaces(after));
        }
        if end != "}}" && self.is_at(position, &format!("+{end}")) {
            return Some(position + 1 + end.len());
        }
        if !self.is_at(position, end) {
            return None;
        }
        let after = position + end.len();
        let newline = end != "}}" && self.source.get(after) == Some(&'\n');
        Some(after + usize::from(newline))
    }

    fn comment(&mut self) -> Result<(), TemplateError> {
        let end =
            (self.position..self.source.len()).find_map(|position| self.after_end(position, "#}"));
        let end = end.ok_or_else(|| self.failure("Missing end of comment tag"))?;
        self.advance(end);
        Ok(())
    }

    fn raw(&mut self) -> Result<(), TemplateError> {
        let end = (self.position..self.source.len())
            .find_map(|position| Some((position, self.end_of_raw(position)?)));
        let (position, after) = end.ok_or_else(|| self.failure("Missing end of raw directive"))?;
        self.text_before(position, self.source.get(position + 2).copied(), true);
        self.advance(after);
        Ok(())
    }

    fn end_of_raw(&self, position: usize) -> Option<usize> {
        if !self.is_at(position, "{%") {
            return None;
        }
        let signs = usize::from(matches!(self.source.get(position + 2), Some('-' | '+')));
        let word = position + 2 + signs;
        let word = word + self.spaces(word);
        if !self.is_at(word, "endraw") {
            return None;
        }
        let end = word + "endraw".len();
        self.after_end(end + self.spaces(end), "%}")
    }

    /// Reads the tokens of a tag.
    fn expression(&mut self, tag: TagKind) -> Result<(), TemplateError> {
        let (end, token) = match tag {
            TagKind::Variable => ("}}", TemplateToken::VariableEnd),
            _ => ("%}", TemplateToken::BlockEnd),
        };
        let mut open = Vec::new();
        while self.position < self.source.len() {
            let ended = if open.is_empty() {
                self.after_end(self.position, end)
            } else {
                None
            };
            if let Some(after) = ended {
                self.push(token);
                self.advance(after);
                return Ok(());
            }
            let spaces = self.spaces(self.position);
            if spaces > 0 {
                self.advance(self.position + spaces);
            } else {
                self.token(&mut open)?;
            }
        }
        // The parser reports the missing token.
        Ok(())
    }

    fn token(&mut self, open: &mut Vec<char>) -> Result<(), TemplateError> {
        let Some(first) = self.peek(0) else {
            return Ok(());
        };
        if first.is_ascii_digit() {
            return self.number();
        }
        if first.is_alphanumeric() || first == '_' {
            let rest = &self.source[self.position..];
            let length = rest
                .iter()
                .take_while(|c| c.is_alphanumeric() || **c == '_')
                .count();
            let name = rest[..length].iter().collect();
            self.push(TemplateToken::Name(name));
            self.advance(self.position + length);
            return Ok(());
        }
        if first == '"' || first == '\'' {
            return self.string(first);
        }
        self.operator(open)
    }

    fn operator(&mut self, open: &mut Vec<char>) -> Result<(), TemplateError> {
        let found = OPERATORS
            .into_iter()
            .find(|operator| self.is_at(self.position, operator));
        let Some(operator) = found else {
            let c = self.peek(0).unwrap_or_default();
            return Err(self.failure(format!("unexpected char {c:?}")));
        };
        match operator {
            "{" => open.push('}'),
            "(" => open.push(')'),
            "[" => open.push(']'),
            "}" | ")" | "]" => {
                let expected = open.pop();
                if expected.map(String::from).as_deref() != Some(operator) {
                    let hint = expected
                        .map(|c| format!(", expected '{c}'"))
                        .unwrap_or_default();
                    return Err(self.failure(format!("unexpected '{operator}'{hint}")));
                }
            }
            _ => {}
        }
        self.push(TemplateToken::Operator(operator));
        self.advance(self.position + operator.len());
        Ok(())
    }

    /// The digits at `position` according to `is_digit`, with single underscores in between.
    fn digits(&self, position: usize, is_digit: impl Fn(char) -> bool) -> usize {
        let mut end = position;
        loop {
            let underscore = usize::from(end > position && self.source.get(end) == Some(&'_'));
            match self.source.get(end + underscore) {
                Some(&c) if is_digit(c) => end += underscore + 1,
                _ => return end,
            }
        }
    }

    fn number(&mut self) -> Result<(), TemplateError> {
        let written = |lexer: &Self, from: usize, to: usize| -> String {
            lexer.source[from..to]
                .iter()
                .filter(|&&c| c != '_')
                .collect()
        };
        let (start, decimal) = (self.position, |c: char| c.is_ascii_digit());
        if let Some(end) = self.end_of_float() {
            let number = written(self, start, end);
            let number = number.parse().map_err(|_| self.failure("invalid number"))?;
            self.push(TemplateToken::Float(number));
            self.advance(end);
            return Ok(());
        }
        let radix = match (self.peek(0), self.peek(1).map(|c| c.to_ascii_lowercase())) {
            (Some('0'), Some('x')) => 16,
            (Some('0'), Some('o')) => 8,
            (Some('0'), Some('b')) => 2,
            _ => 10,
        };
        let end = match (radix, self.peek(0)) {
            (10, Some('0')) => self.digits(start, |c| c == '0'),
            (10, _) => self.digits(start, decimal),
            _ => {
                let underscore = usize::from(self.peek(2) == Some('_'));
                self.digits(start + 2 + underscore, |c| c.is_digit(radix))
            }
        };
        let from = if radix == 10 { start } else { start + 2 };
        let number = i128::from_str_radix(&written(self, from, end), radix);
        let number = number.map_err(|_| self.failure("this integer is too large or not one"))?;
        self.push(TemplateToken::Int(number));
        self.advance(end);
        Ok(())
    }

    /// End of the float literal that starts here.
    fn end_of_float(&self) -> Option<usize> {
        let decimal = |c: char| c.is_ascii_digit();
        if self.position > 0 && self.source[self.position - 1] == '.' {
            return None;
        }
        let whole = self.digits(self.position, decimal);
        let fraction = match self.source.get(whole) {
            Some('.') => self.digits(whole + 1, decimal),
            _ => whole,
        };
        // A point without a following digit is an operator.
        let fraction = if fraction > whole + 1 {
            fraction
        } else {
            whole
        };
        let exponent = match self.source.get(fraction) {
            Some('e' | 'E') => {
                let sign = usize::from(matches!(self.source.get(fraction + 1), Some('+' | '-')));
                let digits = fraction + 1 + sign;
                Some(self.digits(digits, decimal)).filter(|&end| end > digits)
            }
            _ => None,
        };
        exponent.or((fraction > whole).then_some(fraction))
    }

    fn string(&mut self, quote: char) -> Result<(), TemplateError> {
        let mut end = self.position + 1;
        loop {
            match self.source.get(end) {
                Some('\\') => end += 2,
                Some(&c) if c == quote => break,
                Some(_) => end += 1,
                None => return Err(self.failure(format!("unexpected char {quote:?}"))),
            }
        }
        let inside: String = self.source[self.position + 1..end].iter().collect();
        let text = unescaped(&inside).map_err(|reason| self.failure(reason))?;
        self.push(TemplateToken::Text(text));
        self.advance(end + 1);
        Ok(())
    }
}

/// Resolves Python's escape sequences; unknown ones are kept.
fn unescaped(text: &str) -> Result<String, String> {
    let mut plain = String::new();
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        if c != '\\' {
            plain.push(c);
            continue;
        }
        let rest = chars.as_str();
        let mut code = |digits: usize| -> Result<char, String> {
            let written = rest.get(1..=digits).ok_or("truncated escape")?;
            chars.nth(digits);
            let code = u32::from_str_radix(written, 16).map_err(|_| "truncated escape")?;
            char::from_u32(code).ok_or_else(|| "surrogates are not supported in strings".to_owned())
        };
        let simple = match rest.chars().next() {
            Some('x') => {
                plain.push(code(2)?);
                continue;
            }
            Some('u') => {
                plain.push(code(4)?);
                continue;
            }
            Some('U') => {
                plain.push(code(8)?);
                continue;
            }
            Some('N') => return Err("\\N{...} is not supported in strings".into()),
            Some(digit @ '0'..='7') => {
                let digits: String = rest.chars().take(3).take_while(|c| c.is_digit(8)).collect();
                chars.nth(digits.len() - 1);
                let code = u32::from_str_radix(&digits, 8).unwrap_or(u32::from(digit));
                plain.extend(char::from_u32(code));
                continue;
            }
            Some('\n') => None,
            Some('n') => Some('\n'),
            Some('t') => Some('\t'),
            Some('r') => Some('\r'),
            Some('a') => Some('\x07'),
            Some('b') => Some('\x08'),
            Some('f') => Some('\x0c'),
            Some('v') => Some('\x0b'),
            Some(quoted @ ('\\' | '\'' | '"')) => Some(quoted),
            Some(other) => {
                plain.push('\\');
                Some(other)
            }
            None => return Err("\\ at end of string".into()),
        };
        chars.next();
        plain.extend(simple);
    }
    Ok(plain)
}
