//! Given answers to a dialogue, as its chat template renders them.
//!
//! As in TRL's `apply_chat_template`, an answer is the rendered dialogue with the answer minus the rendered prompt.
//! Where that is the answer surrounded by white space, the answer is used verbatim, as samples follow the prompt
//! directly. An answer ends with the end-of-turn token, as a sample does; text that the template prints after it, such
//! as a newline, is never generated and therefore not trained on.

/// End of reasoning, which templates may render differently or omit.
const REASONING_END: &str = "</think>";

/// Token ids of a prompt and of given answers to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EncodedAnswers {
    /// Token ids of the prompt.
    pub prompt: Vec<u32>,
    /// Token ids of each answer, including the stop token.
    pub answers: Vec<Vec<u32>>,
    /// Boundary between prompt and answers.
    pub boundary: AnswerBoundary,
}

/// Boundary between a prompt and its given answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AnswerBoundary {
    /// The answers follow the generation prompt, as samples do.
    GenerationPrompt,
    /// The template renders the prompt differently when an answer follows: the prompt is the common prefix of both
    /// renderings.
    CommonPrefix,
    /// The template does not render the answers verbatim: they are appended to the generation prompt unrendered.
    Verbatim,
}

/// Length in bytes of the longest prefix of `prompt` that all texts share, at a character boundary.
pub(crate) fn common_prefix_length(prompt: &str, texts: &[String]) -> usize {
    let length = |text: &String| {
        let pairs = prompt.char_indices().zip(text.chars());
        let mut same = pairs.take_while(|((_, a), b)| a == b);
        let last = same.by_ref().last();
        last.map_or(0, |((at, c), _)| at + c.len_utf8())
    };
    texts.iter().map(length).min().unwrap_or(prompt.len())
}

/// The rendered answer `rest` up to and including the end-of-turn token `closing`; `None` when it does not contain the
/// answer.
pub(crate) fn closed<'a>(rest: &'a str, answer: &str, closing: Option<&str>) -> Option<&'a str> {
    let answer = answer.trim();
    let visible = answer.rsplit(REASONING_END).next().unwrap_or(answer).trim();
    let closing = closing.filter(|closing| !closing.is_empty());
    let (place, printed) = [answer, visible]
        .into_iter()
        .find_map(|printed| Some((place_of(printed, rest, closing)?, printed)))?;
    let end = place + printed.len();
    let Some(closing) = closing else {
        return Some(rest);
    };
    if printed.ends_with(closing) {
        return Some(&rest[..end]);
    }
    let closed = rest[end..].find(closing);
    Some(closed.map_or(rest, |at| &rest[..end + at + closing.len()]))
}

/// Place of the answer `printed` in its rendering `rest`: the last one before the first closing token that follows any. A
/// short answer may also stand in the text of that token, or of others after it.
fn place_of(printed: &str, rest: &str, closing: Option<&str>) -> Option<usize> {
    let mut ends = closing
        .into_iter()
        .flat_map(|closing| rest.match_indices(closing));
    let closed = ends.find_map(|(end, _)| rest[..end].rfind(printed));
    closed.or_else(|| rest.rfind(printed))
}

/// Whether a rendered answer consists of the answer, the end-of-turn token and white space only.
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
    fn the_common_prefix_ends_at_a_character_boundary() {
        let owned = |texts: &[&str]| {
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
            assert_eq!(
                common_prefix_length(prompt, &owned(texts)),
                expected,
                "{prompt}"
            );
        }
    }

    #[test]
    fn white_space_around_an_answer_is_ignored() {
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
    fn an_answer_ends_with_the_end_of_turn_token() {
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
            (
                "<think>\n\n</think>\n\nd<|end|>\n",
                "d",
                end,
                Some("<think>\n\n</think>\n\nd<|end|>"),
            ),
            ("end<|end|>\n<|endoftext|>", "end", end, Some("end<|end|>")),
            (
                "<think>e</think>\n\ne<|end|>\n",
                "<think>e</think>e",
                end,
                Some("<think>e</think>\n\ne<|end|>"),
            ),
            (
                "a<|end|>b<|end|>\n",
                "a<|end|>b",
                end,
                Some("a<|end|>b<|end|>"),
            ),
        ] {
            assert_eq!(closed(rest, answer, closing), expected, "{rest}");
        }
    }
}
