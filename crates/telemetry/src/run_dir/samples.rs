//! Log of sampled pairs and their labels for inspection: `samples.jsonl`.
//!
//! One flat row per labelled pair: texts, lengths, summed log-probabilities, and the completions' tokens as text
//! with their log-probabilities; no token ids and no tensors.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

use messages::{Completion, Dialogue, Finish, GOLD, LabelledPair, Pair, Prompt, Purpose};
use serde::{Deserialize, Serialize};

use crate::error::TelemetryError;
use crate::run_dir::lines::{LineFile, read_lines};

/// Appender of `samples.jsonl`; one process appends, any process may read.
#[derive(Debug)]
pub struct SampleLog {
    lines: LineFile,
}

/// A row of `samples.jsonl`. Lists have one entry per completion: those of the first label, then the others in the pair's
/// order; log-probabilities are natural logarithms, null where not finite.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct SampleRow {
    /// Learner step that received the pair.
    pub step: u64,
    /// Index of the prompt in the run's order.
    pub prompt_id: u64,
    /// `train`, `evaluate` or `apo`.
    pub purpose: String,
    /// Weights version that sampled the completions.
    pub version: u64,
    /// The prompt's text: as given, or for a dialogue the decoded prompt tokens without special tokens.
    pub prompt: String,
    /// Text that is encoded as the prompt's tokens, where [`Self::prompt`] is not: what a file of pairs must hold. Absent
    /// where the two agree, and for dialogues.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub encoded_prompt: Option<String>,
    /// The prompt's dialogue; absent for text prompts and in rows of older builds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dialogue: Option<Dialogue>,
    /// The completions' texts, including leading white space.
    pub completions: Vec<String>,
    /// The completions' lengths in tokens, including end-of-text.
    pub lengths: Vec<usize>,
    /// `end_of_text` or `length`: why each completion ended.
    pub finish: Vec<String>,
    /// Probability of the first label that the first completion is preferred to the second; null without a label.
    pub p: Option<f32>,
    /// The judge's own probability that the first completion is preferred to the second, before penalties; absent if no
    /// judge gave the label, and in rows of older builds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub judge_p: Option<f32>,
    /// Known probability that the first completion is preferred to the second, if there is one.
    pub gold: Option<f32>,
    /// Probabilities of the other evaluation judges that the first completion is preferred to the second.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub verdicts: BTreeMap<String, f32>,
    /// The judge's name.
    pub judge: String,
    /// The judge's version.
    pub judge_version: u64,
    /// The judge's score of each completion; empty for judges without scores.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub scores: Vec<f32>,
    /// log π(y|x) of each completion, summed over its tokens.
    pub sum_logp: Vec<Option<f64>>,
    /// log ref(y|x) of each completion, summed over its tokens.
    pub sum_ref_logp: Vec<Option<f64>>,
    /// Tokens of each completion as text; their concatenation is the text with special tokens. Empty in rows of
    /// older builds and where the tokenizer was not available.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tokens: Vec<Vec<String>>,
    /// log π of each token, rounded to thousandths.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub logp: Vec<Vec<Option<f32>>>,
    /// log ref of each token, rounded to thousandths.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ref_logp: Vec<Vec<Option<f32>>>,
    /// Name of the actor that sampled the completions.
    #[serde(default)]
    pub actor: String,
}

/// Decodes completion tokens one by one: takes prompt ids and completion ids, returns one text per completion id.
pub type TokenTexts<'a> = &'a dyn Fn(&[u32], &[u32]) -> Vec<String>;

/// Texts that a tokenizer adds to a row.
#[derive(Clone, Copy)]
pub struct SampleTexts<'a> {
    /// Texts of completion tokens.
    pub tokens: TokenTexts<'a>,
    /// Text that is encoded as the prompt's ids, if the prompt's own text is not.
    pub encoded_prompt: &'a dyn Fn(&Prompt) -> Option<String>,
}

impl SampleLog {
    /// Opens the log at `path` for appending; a last line truncated by a crash is removed.
    ///
    /// # Errors
    /// When the file cannot be created, read or repaired.
    pub fn open(path: &Path) -> Result<Self, TelemetryError> {
        Ok(Self {
            lines: LineFile::open(path)?,
        })
    }

    /// Appends the row of a pair that the learner received at `step`.
    ///
    /// # Errors
    /// When the write fails.
    pub fn append(&mut self, step: u64, labelled: &LabelledPair) -> Result<(), TelemetryError> {
        self.lines.append(&SampleRow::of(step, labelled))
    }

    /// Appends the row with the completions' tokens, decoded by `texts`, and the prompt as it is encoded.
    ///
    /// # Errors
    /// When the write fails.
    pub fn append_with_tokens(
        &mut self,
        step: u64,
        labelled: &LabelledPair,
        texts: SampleTexts<'_>,
    ) -> Result<(), TelemetryError> {
        let row = SampleRow::of(step, labelled).with_tokens(labelled, texts);
        self.lines.append(&row)
    }

    /// Removes the rows of steps after `step`, which a resumed run repeats; returns their number.
    ///
    /// # Errors
    /// When the file cannot be read or replaced; it is then unchanged.
    pub fn truncate_after(&mut self, step: u64) -> Result<usize, TelemetryError> {
        self.lines.truncate_after(step)
    }

    /// All rows of the log at `path`; an incomplete last line is ignored.
    ///
    /// # Errors
    /// When the file cannot be read, or a line is not a row.
    pub fn read(path: &Path) -> Result<Vec<SampleRow>, TelemetryError> {
        read_lines(path)
    }
}

impl SampleRow {
    /// The row of a pair that the learner received at `step`.
    #[must_use]
    pub fn of(step: u64, labelled: &LabelledPair) -> Self {
        let labelled = &*in_order_of_the_row(labelled);
        let LabelledPair {
            pair,
            labels,
            judge,
            judge_version,
            scores,
            verdicts,
        } = labelled;
        let others = verdicts.iter().filter(|verdict| verdict.judge != GOLD);
        Self {
            step,
            prompt_id: pair.id().0,
            purpose: purpose_name(pair.prompt.purpose).into(),
            version: pair.version.step,
            prompt: pair.prompt.text.clone(),
            dialogue: pair.prompt.dialogue.clone(),
            completions: each(&pair.completions, |c| c.text.clone()),
            lengths: each(&pair.completions, |c| c.ids.len()),
            finish: each(&pair.completions, |c| finish_name(c.finish).into()),
            p: labels.first().map(|label| label.p.get()),
            judge_p: labels
                .first()
                .and_then(|label| label.judged)
                .map(messages::Probability::get),
            gold: labelled.gold().map(messages::Probability::get),
            verdicts: others
                .map(|verdict| (verdict.judge.clone(), verdict.p.get()))
                .collect(),
            judge: judge.clone(),
            judge_version: judge_version.0,
            scores: scores.clone().unwrap_or_default(),
            sum_logp: each(&pair.completions, |c| recorded(c, c.sum_logp())),
            sum_ref_logp: each(&pair.completions, |c| {
                c.sum_ref_logp().filter(|sum| sum.is_finite())
            }),
            actor: pair.actor.clone(),
            ..Self::default()
        }
    }

    /// Human-readable prompt: the dialogue's transcript, or the prompt's text.
    #[must_use]
    pub fn prompt_transcript(&self) -> Cow<'_, str> {
        match &self.dialogue {
            Some(dialogue) => dialogue.transcript().into(),
            None => self.prompt.as_str().into(),
        }
    }

    /// Adds the tokens of the pair's completions, and the prompt as it is encoded.
    #[must_use]
    pub fn with_tokens(self, labelled: &LabelledPair, texts: SampleTexts<'_>) -> Self {
        let labelled = &*in_order_of_the_row(labelled);
        let Pair {
            prompt,
            completions,
            ..
        } = &labelled.pair;
        Self {
            encoded_prompt: (texts.encoded_prompt)(prompt),
            tokens: each(completions, |c| (texts.tokens)(&prompt.ids, &c.ids)),
            logp: each(completions, |c| round_to_thousandths(&c.logp)),
            ref_logp: each(completions, |c| round_to_thousandths(&c.ref_logp)),
            ..self
        }
    }
}

/// The pair with the completions of its first label in front: a learner that selects labels may have left out that of the
/// first two. The labels still name the indices that they did.
fn in_order_of_the_row(labelled: &LabelledPair) -> Cow<'_, LabelledPair> {
    let first = labelled.labels.first();
    let compared = first.map_or([0, 1], |label| [label.first, label.second].map(usize::from));
    if compared == [0, 1] {
        return Cow::Borrowed(labelled);
    }
    let rank = |index: usize| compared.iter().position(|&i| i == index).unwrap_or(2);
    let mut order: Vec<usize> = (0..labelled.pair.completions.len()).collect();
    order.sort_by_key(|&index| rank(index));
    let mut arranged = labelled.clone();
    arranged.pair.completions = permuted(&labelled.pair.completions, &order);
    arranged.scores = (labelled.scores.as_ref()).map(|scores| permuted(scores, &order));
    Cow::Owned(arranged)
}

fn permuted<T: Clone>(values: &[T], order: &[usize]) -> Vec<T> {
    order
        .iter()
        .filter_map(|&i| values.get(i))
        .cloned()
        .collect()
}

/// Rounds to thousandths; negative zero becomes zero, non-finite values `None`.
fn round_to_thousandths(values: &[f32]) -> Vec<Option<f32>> {
    let rounded = |value: &f32| {
        value
            .is_finite()
            .then(|| (value * 1000.0).round() / 1000.0 + 0.0)
    };
    values.iter().map(rounded).collect()
}

fn each<T>(completions: &[Completion], of: impl Fn(&Completion) -> T) -> Vec<T> {
    completions.iter().map(of).collect()
}

/// A finite sum of recorded log-probabilities; `None` for a completion from a file.
fn recorded(completion: &Completion, sum: f64) -> Option<f64> {
    (completion.is_recorded() && sum.is_finite()).then_some(sum)
}

fn purpose_name(purpose: Purpose) -> &'static str {
    match purpose {
        Purpose::Train => "train",
        Purpose::Evaluate => "evaluate",
        Purpose::Apo => "apo",
        Purpose::File => "file",
        Purpose::EvaluateAverage => "evaluate_average",
        Purpose::EvaluateReference => "evaluate_reference",
    }
}

fn finish_name(finish: Finish) -> &'static str {
    match finish {
        Finish::EndOfText => "end_of_text",
        Finish::Length => "length",
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use messages::{
        JudgeVersion, Label, Probability, Prompt, PromptBatch, PromptId, Seed, WeightsVersion,
    };

    use super::*;

    fn completion(text: &str, logp: &[f32], finish: Finish) -> Completion {
        Completion {
            ids: vec![5; logp.len()],
            finish,
            mixture_coef: 0.0,
            logp: logp.to_vec(),
            ref_logp: vec![-2.0; logp.len()],
            behaviour_logp: logp.to_vec(),
            text: text.into(),
        }
    }

    fn labelled(id: u64) -> LabelledPair {
        let prompt = Prompt {
            id: PromptId(id),
            prompt_batch: PromptBatch::single(PromptId(id)),
            purpose: Purpose::Evaluate,
            version: WeightsVersion::at(3),
            seed: Seed(11),
            ids: vec![1, 2],
            text: "sum up:\n\"a\"".into(),
            dialogue: None,
            golden: None,
            answer: None,
            route: None,
        };
        let completions = vec![
            completion("short", &[-0.5, -0.25], Finish::EndOfText),
            completion("long", &[-1.0, f32::NAN, -1.0], Finish::Length),
        ];
        let pair = Pair {
            prompt,
            version: WeightsVersion::at(4),
            completions,
            actor: "actor-0".into(),
        };
        LabelledPair {
            pair,
            labels: vec![Label {
                first: 0,
                second: 1,
                p: Probability::new(0.75).unwrap(),
                judged: None,
            }],
            judge: "gold".into(),
            judge_version: JudgeVersion(2),
            scores: None,
            verdicts: Vec::new(),
        }
    }

    #[test]
    fn a_row_has_texts_labels_and_judge() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("samples.jsonl");
        SampleLog::open(&path)
            .unwrap()
            .append(9, &labelled(7))
            .unwrap();
        assert_eq!(
            fs::read_to_string(&path).unwrap(),
            "{\"step\":9,\"prompt_id\":7,\"purpose\":\"evaluate\",\"version\":4,\
             \"prompt\":\"sum up:\\n\\\"a\\\"\",\"completions\":[\"short\",\"long\"],\
             \"lengths\":[2,3],\"finish\":[\"end_of_text\",\"length\"],\"p\":0.75,\"gold\":null,\
             \"judge\":\"gold\",\"judge_version\":2,\"sum_logp\":[-0.75,null],\
             \"sum_ref_logp\":[-4.0,-6.0],\"actor\":\"actor-0\"}\n"
        );
        assert_eq!(
            SampleLog::read(&path).unwrap(),
            [SampleRow::of(9, &labelled(7))]
        );
    }

    #[test]
    fn the_completions_of_the_first_label_come_first() {
        let mut selected = labelled(7);
        let third = completion("third", &[-0.125], Finish::EndOfText);
        selected.pair.completions.push(third);
        selected.scores = Some(vec![1.0, 2.0, 3.0]);
        let label = selected.labels[0];
        selected.labels = vec![Label {
            first: 1,
            second: 2,
            ..label
        }];
        let texts = SampleTexts {
            tokens: &|_, ids| vec![ids.len().to_string()],
            encoded_prompt: &|_| None,
        };
        let row = SampleRow::of(9, &selected).with_tokens(&selected, texts);
        assert_eq!(row.completions, ["long", "third", "short"]);
        assert_eq!(
            (row.lengths, row.scores),
            (vec![3, 1, 2], vec![2.0, 3.0, 1.0])
        );
        assert_eq!(row.tokens, [["3"], ["1"], ["2"]]);
        assert_eq!(row.p, Some(0.75));
    }

    #[test]
    fn a_row_keeps_the_dialogue_of_the_prompt() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("samples.jsonl");
        let mut with_dialogue = labelled(7);
        let dialogue = Dialogue::of_user("sum up");
        with_dialogue.pair.prompt.dialogue = Some(dialogue.clone());
        SampleLog::open(&path)
            .unwrap()
            .append(9, &with_dialogue)
            .unwrap();
        let line = fs::read_to_string(&path).unwrap();
        let messages = "\"dialogue\":{\"messages\":[{\"role\":\"user\",\"content\":\"sum up\"}]}";
        assert!(line.contains(messages), "{line}");
        assert_eq!(SampleLog::read(&path).unwrap()[0].dialogue, Some(dialogue));
    }

    #[test]
    fn tokens_are_logged_with_their_texts_and_log_probabilities() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("samples.jsonl");
        let texts = SampleTexts {
            tokens: &|_, ids| ids.iter().map(|id| format!("<{id}>")).collect(),
            encoded_prompt: &|prompt| Some(format!("<bos> {}", prompt.text)),
        };
        let mut log = SampleLog::open(&path).unwrap();
        log.append_with_tokens(9, &labelled(7), texts).unwrap();
        let row = SampleLog::read(&path).unwrap().remove(0);
        assert_eq!(row.encoded_prompt, Some(format!("<bos> {}", row.prompt)));
        let expected = [vec!["<5>"; 2], vec!["<5>"; 3]];
        assert_eq!(row.tokens, expected);
        let logp = [
            vec![Some(-0.5), Some(-0.25)],
            vec![Some(-1.0), None, Some(-1.0)],
        ];
        assert_eq!(row.logp, logp);
        assert_eq!(row.ref_logp, [vec![Some(-2.0); 2], vec![Some(-2.0); 3]]);
        assert_eq!(round_to_thousandths(&[-0.123_456]), [Some(-0.123)]);
    }

    #[test]
    fn a_resumed_run_repeats_its_later_samples() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("samples.jsonl");
        let mut log = SampleLog::open(&path).unwrap();
        for step in [1, 2, 2, 3] {
            log.append(step, &labelled(step)).unwrap();
        }
        assert_eq!(log.truncate_after(2).unwrap(), 1);
        log.append(3, &labelled(8)).unwrap();
        let rows = SampleLog::read(&path).unwrap();
        let ids: Vec<_> = rows.iter().map(|row| (row.step, row.prompt_id)).collect();
        assert_eq!(ids, [(1, 1), (2, 2), (2, 2), (3, 8)]);
    }
}
