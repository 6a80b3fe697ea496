//! Answers that files give to a dialogue, as its chat template prints them.
//!
//! As TRL's `apply_chat_template`: what the template prints of the dialogue with the answer, less what it prints of
//! the prompt; but where that is the answer itself with white space around it, the answer as it was given, as a sample
//! follows its prompt. An answer ends with what closes its turn, as a sample does; what the template prints behind that, such
//! as a new line, is never generated and so never learned.

/// Where a model's thoughts end; templates may print them otherwise than they are given.
const THOUGHT_END: &str = "</think>";

/// A prompt and answers to it, as tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AnsweredIds {
    /// What the model reads.
    pub prompt: Vec<u32>,
    /// What it would write for each of the answers, end included.
    pub answers: Vec<Vec<u32>>,
    /// How the chat template came by them.
    pub seam: Seam,
}

/// How the answers to a dialogue follow its prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Seam {
    /// They go on with the prompt as it is given for an answer.
    Asked,
    /// The template prints the prompt otherwise when an answer follows: the prompt is what both begin with.
    Shared,
    /// The template does not print the answers as they are: they follow the prompt as they were given.
    Given,
}

/// The bytes with which all texts begin, in whole characters.
pub(crate) fn shared(prompt: &str, wholes: &[String]) -> usize {
    let with = |whole: &String| {
        let pairs = prompt.char_indices().zip(whole.chars());
        let mut same = pairs.take_while(|((_, a), b)| a == b);
        let last = same.by_ref().last();
        last.map_or(0, |((at, c), _)| at + c.len_utf8())
    };
    wholes.iter().map(with).min().unwrap_or(prompt.len())
}

/// The part of `rest`, which a template prints of an answer, that ends with what closes the turn; none when the
/// answer does not stand in it.
pub(crate) fn closed<'a>(rest: &'a str, answer: &str, closing: Option<&str>) -> Option<&'a str> {
    let said = answer.trim();
    let spoken = said.rsplit(THOUGHT_END).next().unwrap_or(said).trim();
    let (place, shown) = [said, spoken]
        .into_iter()
        .find_map(|shown| Some((rest.rfind(shown)?, shown)))?;
    let end = place + shown.len();
    let Some(closing) = closing.filter(|closing| !closing.is_empty()) else {
        return Some(rest);
    };
    if shown.ends_with(closing) {
        return Some(&rest[..end]);
    }
    let closed = rest[end..].find(closing);
    Some(closed.map_or(rest, |at| &rest[..end + at + closing.len()]))
}

/// Whether a template prints nothing but this answer, what closes it, and white space.
pub(crate) fn is_plain(printed: &str, answer: &str, closing: Option<&str>) -> bool {
    let printed = printed.trim();
    let printed = closing
        .and_then(|closing| printed.strip_suffix(closing))
        .unwrap_or(printed);
    printed.trim() == answer.trim()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_shared_is_whole_characters() {
        let wholes = |texts: &[&str]| {
            texts
                .iter()
                .map(|&text| text.to_owned())
                .collect::<Vec<_>>()
        };
        for (prompt, texts, expected) in [
            ("ab", &["abc", "abd"][..], 2),
            ("ab<think>", &["abc", "ab<x"], 2),
            ("aé", &["aè"], 1),
            ("ab", &[], 2),
        ] {
            assert_eq!(shared(prompt, &wholes(texts)), expected, "{prompt}");
        }
    }

    #[test]
    fn white_space_around_an_answer_is_the_templates() {
        for (printed, plain) in [
            ("x<|end|>", true),
            (" x <|end|>\n", true),
            ("\n\nx", true),
            ("<think>\n\n</think>\n\nx<|end|>", false),
            ("<assistant>x<|end|>", false),
        ] {
            assert_eq!(is_plain(printed, " x", Some("<|end|>")), plain, "{printed}");
        }
    }

    #[test]
    fn an_answer_ends_where_its_turn_is_closed() {
        let end = Some("<|end|>");
        for (rest, answer, closing, expected) in [
            (" x <|end|>\n", "x", end, Some(" x <|end|>")),
            ("x<|end|>\n<|eos|>", " x ", end, Some("x<|end|>")),
            ("x\n", "x", end, Some("x\n")),
            ("x<|end|><|end|>", "x<|end|>", end, Some("x<|end|>")),
            ("<|end|>x", "x", end, Some("<|end|>x")),
            ("x<|end|>", "x", None, Some("x<|end|>")),
            ("4<|end|>", "<think>2 + 2</think>\n4", end, Some("4<|end|>")),
            ("X<|end|>", "x", end, None),
        ] {
            assert_eq!(closed(rest, answer, closing), expected, "{rest}");
        }
    }
}
