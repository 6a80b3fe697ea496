//! Pairs of files as tokens.
//!
//! Promises that what is left out is counted by reason and logged. Does not know what the pairs are for: the policy and
//! reward models are trained on them.

use std::path::Path;

use dataset::{Columns, DatasetError, PairLabel, ParsedRow, PreferencePair};
use messages::{Dialogue, PromptText};
use model::{AnswerBoundary, Tokenizer};

use crate::{
    boundary_counts::BoundaryCounts, file_pairs::unusual_pairs::UnusualPairs, prompts::TemplateUse,
};

/// A pair of a file, as tokens and as text.
#[derive(Debug, Clone, PartialEq)]
pub struct PairRow {
    /// Prompt tokens, special tokens included.
    pub prompt: Vec<u32>,
    /// Prompt text for display: the given text, or for a dialogue the decoded tokens.
    pub text: String,
    /// Dialogue that the prompt was rendered from; none if it was text.
    pub dialogue: Option<Dialogue>,
    /// The preferred response.
    pub chosen: PairAnswer,
    /// The rejected response.
    pub rejected: PairAnswer,
    /// The label, if the columns name one.
    pub label: Option<PairLabel>,
    /// The golden answer, if the columns name one.
    pub golden: Option<String>,
    /// Value by which a judge is chosen, if the columns name one.
    pub route: Option<String>,
}

/// A response of a pair.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PairAnswer {
    /// Tokens, end-of-text included.
    pub ids: Vec<u32>,
    /// Text.
    pub text: String,
}

/// Number of rows of a file, and of those that were left out, by reason.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PairCounts {
    /// All rows.
    pub read: usize,
    /// Longer than the limit.
    pub too_long: usize,
    /// With an empty response.
    pub empty: usize,
    /// With two equal responses.
    pub equal: usize,
    /// With further turns in a response, where texts are read as turns.
    pub later_turns: usize,
}

/// Longest pair, and what happens to a longer one.
#[derive(Debug, Clone, Copy)]
pub struct PairLimit {
    /// Maximum tokens of prompt and response together.
    pub tokens: usize,
    /// Key of the setting with the limit.
    pub setting: &'static str,
    /// Whether a longer pair is an error; otherwise it is left out and counted.
    pub refuses: bool,
}

/// Reads the pairs of a path row after row, as tokens of `tokenizer`, and calls `each` with every one that is not left
/// out.
///
/// # Errors
/// If a file cannot be read, or a row is malformed, does not tokenise, or is longer than a limit that refuses it: with
/// file and line.
pub fn visit_pairs(
    path: &Path,
    columns: &Columns,
    limit: PairLimit,
    tokenizer: &Tokenizer,
    mut each: impl FnMut(PairRow),
) -> Result<PairCounts, DatasetError> {
    let mut reader = PairReader {
        limit,
        tokenizer,
        counts: PairCounts::default(),
        boundaries: BoundaryCounts::default(),
        template: TemplateUse::default(),
        unusual: UnusualPairs::default(),
    };
    dataset::visit(path, columns, |source, row| {
        let kept = reader.kept(row).map_err(|reason| source.refuse(reason))?;
        kept.into_iter().for_each(&mut each);
        Ok(())
    })?;
    reader.template.log(path, columns, tokenizer);
    reader.boundaries.log(path);
    reader.unusual.log(path);
    Ok(reader.counts)
}

struct PairReader<'a> {
    limit: PairLimit,
    tokenizer: &'a Tokenizer,
    counts: PairCounts,
    boundaries: BoundaryCounts,
    template: TemplateUse,
    unusual: UnusualPairs,
}

/// What stands beside the texts of a pair in its row, where the columns name it.
struct BesidePair {
    label: Option<PairLabel>,
    golden: Option<String>,
    route: Option<String>,
}

impl BesidePair {
    fn of(row: &ParsedRow<'_>) -> Result<Self, String> {
        Ok(Self {
            label: row.label()?,
            golden: row.golden()?,
            route: row.route()?,
        })
    }
}

impl PairReader<'_> {
    /// The pair of a row, unless it is left out.
    fn kept(&mut self, row: &ParsedRow<'_>) -> Result<Option<PairRow>, String> {
        let (pair, beside) = (row.pair()?, BesidePair::of(row)?);
        self.counts.read += 1;
        self.template.count(&pair.prompt);
        if pair.has_later_turns {
            if let PromptText::Dialogue(_) = pair.prompt {
                self.counts.later_turns += 1;
                return Ok(None);
            }
            self.unusual.count_later_turns();
        }
        let (row, boundary) = self.encode(pair, beside)?;
        self.boundaries.count(boundary);
        let answers = [&row.chosen, &row.rejected];
        let texts = answers.map(|answer| answer.text.trim());
        if texts[0] == texts[1] || answers[0].ids == answers[1].ids {
            self.counts.equal += 1;
        } else if texts.contains(&"") {
            self.counts.empty += 1;
        } else if !self.is_short_enough(&row)? {
            self.counts.too_long += 1;
        } else {
            self.unusual.count(&row);
            return Ok(Some(row));
        }
        Ok(None)
    }

    fn is_short_enough(&self, row: &PairRow) -> Result<bool, String> {
        let PairLimit {
            tokens,
            setting,
            refuses,
        } = self.limit;
        let (prompt, answers) = (row.prompt.len(), [&row.chosen, &row.rejected]);
        let longest = answers.map(|answer| answer.ids.len());
        let longest = longest[0].max(longest[1]);
        match prompt + longest <= tokens {
            false if refuses => Err(format!(
                "the prompt and its longer response have {prompt} + {longest} tokens, more than {tokens} ({setting} or \
                 the model's positions); pairs.too_long = \"drop\" leaves such rows out"
            )),
            is_short => Ok(is_short),
        }
    }

    /// A pair as tokens, and how its responses follow the prompt.
    fn encode(
        &self,
        pair: PreferencePair,
        beside: BesidePair,
    ) -> Result<(PairRow, AnswerBoundary), String> {
        let texts = [pair.chosen.as_str(), pair.rejected.as_str()];
        let encoded = self.tokenizer.encode_answers(&pair.prompt, &texts);
        let encoded = encoded.map_err(|error| error.to_string())?;
        let mut answers = encoded.answers.into_iter();
        let mut answer = |text| PairAnswer {
            ids: answers.next().unwrap_or_default(),
            text,
        };
        let (chosen, rejected) = (answer(pair.chosen), answer(pair.rejected));
        let prompt = encoded.prompt;
        let (text, dialogue) = match pair.prompt {
            PromptText::Text(text) => (text, None),
            PromptText::Dialogue(dialogue) => (self.tokenizer.decode(&prompt), Some(dialogue)),
        };
        let BesidePair {
            label,
            golden,
            route,
        } = beside;
        let row = PairRow {
            prompt,
            text,
            dialogue,
            chosen,
            rejected,
            label,
            golden,
            route,
        };
        Ok((row, encoded.boundary))
    }
}
