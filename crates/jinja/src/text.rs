//! Python's string semantics: whitespace, printable characters, `repr`, case.

/// Python's `str.isspace` of a character.
pub(crate) fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\x1c'..='\x1f').contains(&c)
}

/// Python's `str.isprintable` of a character.
pub(crate) fn is_printable(c: char) -> bool {
    match c {
        ' '..='~' => true,
        '\0'..='\x7f' => false,
        // The table of the standard library has the same categories. It also escapes combining characters, except
        // after another character.
        c => !format!("a{c}").escape_debug().any(|escaped| escaped == '{'),
    }
}

/// Python's `repr` of a string.
pub(crate) fn repr(text: &str) -> String {
    let quote = if text.contains('\'') && !text.contains('"') {
        '"'
    } else {
        '\''
    };
    let mut written = String::from(quote);
    for c in text.chars() {
        match c {
            '\\' => written.push_str("\\\\"),
            '\n' => written.push_str("\\n"),
            '\r' => written.push_str("\\r"),
            '\t' => written.push_str("\\t"),
            c if c == quote => written.extend(['\\', c]),
            c if is_printable(c) => written.push(c),
            c => written.push_str(&escape(c)),
        }
    }
    written.push(quote);
    written
}

fn escape(c: char) -> String {
    match u32::from(c) {
        code @ 0..=0xff => format!("\\x{code:02x}"),
        code @ 0x100..=0xffff => format!("\\u{code:04x}"),
        code => format!("\\U{code:08x}"),
    }
}

/// Python's `str.splitlines`.
pub(crate) fn lines(text: &str, keeps_ends: bool) -> impl Iterator<Item = &str> {
    let is_end = |c: char| {
        matches!(
            c,
            '\n' | '\r' | '\x0b' | '\x0c' | '\x1c'..='\x1e' | '\u{85}' | '\u{2028}' | '\u{2029}'
        )
    };
    let mut rest = text;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let Some(position) = rest.find(is_end) else {
            return Some(std::mem::take(&mut rest));
        };
        let ending = if rest[position..].starts_with("\r\n") {
            2
        } else {
            rest[position..].chars().next().map_or(1, char::len_utf8)
        };
        let kept = if keeps_ends {
            position + ending
        } else {
            position
        };
        let line = &rest[..kept];
        rest = &rest[position + ending..];
        Some(line)
    })
}

/// A name for messages: its beginning if it is long.
pub(crate) fn shortened(name: &str) -> String {
    let mut short: String = name.chars().take(MAX_NAME_CHARS).collect();
    if short.len() < name.len() {
        short.push('…');
    }
    short
}

/// Length at which a name is cut in messages.
const MAX_NAME_CHARS: usize = 100;

/// Title case of a character; of a digraph, only the first letter is upper case.
fn title_case(c: char) -> String {
    match c {
        'Ǆ' | 'ǅ' | 'ǆ' => "ǅ".into(),
        'Ǉ' | 'ǈ' | 'ǉ' => "ǈ".into(),
        'Ǌ' | 'ǋ' | 'ǌ' => "ǋ".into(),
        'Ǳ' | 'ǲ' | 'ǳ' => "ǲ".into(),
        c => {
            let mut upper = c.to_uppercase();
            let first = upper.next().into_iter();
            first.chain(upper.flat_map(char::to_lowercase)).collect()
        }
    }
}

/// Python's `str.capitalize`.
pub(crate) fn capitalize(text: &str) -> String {
    let mut chars = text.chars();
    let first = chars.next().map(title_case).unwrap_or_default();
    first + &chars.as_str().to_lowercase()
}

/// Python's `str.title`: every run of letters capitalised.
pub(crate) fn title(text: &str) -> String {
    let mut written = String::new();
    let mut follows_letter = false;
    for c in text.chars() {
        if follows_letter {
            written.extend(c.to_lowercase());
        } else {
            written.push_str(&title_case(c));
        }
        follows_letter = c.is_lowercase() || c.is_uppercase() || is_title_case(c);
    }
    written
}

fn is_title_case(c: char) -> bool {
    matches!(c, 'ǅ' | 'ǈ' | 'ǋ' | 'ǲ')
}

/// Python's `str.istitle`.
pub(crate) fn is_title(text: &str) -> bool {
    let (mut follows_letter, mut has_letters) = (false, false);
    for c in text.chars() {
        if c.is_uppercase() || is_title_case(c) {
            if follows_letter {
                return false;
            }
            (follows_letter, has_letters) = (true, true);
        } else if c.is_lowercase() {
            if !follows_letter {
                return false;
            }
            has_letters = true;
        } else {
            follows_letter = false;
        }
    }
    has_letters
}
