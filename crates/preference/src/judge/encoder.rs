//! A ready-made encoder classifier as a judge: p = σ(r − r′) of its scores.

use std::sync::Arc;

use messages::{Completion, JudgeVersion, Probability, Prompt};
use model::Encoder;

use super::{Comparison, Judge, Scored, Verdict};
use crate::{JudgeError, distinct::Distinct};

/// An encoder reward model that judges, reading text through its own tokenizer.
pub struct EncoderJudge {
    encoder: Arc<Encoder>,
    template: String,
}

impl EncoderJudge {
    /// `template` says what is read, with `{prompt}` and `{response}`; of a dialogue the prompt is its
    /// transcript.
    #[must_use]
    pub fn new(encoder: Arc<Encoder>, template: String) -> Self {
        Self { encoder, template }
    }

    fn text(&self, prompt: &Prompt, completion: &Completion) -> String {
        fill(&self.template, &prompt.transcript(), &completion.text)
    }
}

/// The template with both in their places. What a prompt or a response says is never taken for a place.
fn fill(template: &str, prompt: &str, response: &str) -> String {
    let parts = template.split("{response}");
    let parts: Vec<String> = parts.map(|part| part.replace("{prompt}", prompt)).collect();
    parts.join(response)
}

impl Judge for EncoderJudge {
    fn name(&self) -> &'static str {
        "encoder"
    }

    fn version(&self) -> JudgeVersion {
        JudgeVersion(1)
    }

    fn is_antisymmetric(&self) -> bool {
        true
    }

    fn judge(&mut self, batch: &[Comparison<'_>]) -> Result<Vec<Verdict>, JudgeError> {
        let scored = self.judge_scored(batch)?.into_iter();
        Ok(scored.map(|scored| scored.verdict).collect())
    }

    fn judge_scored(&mut self, batch: &[Comparison<'_>]) -> Result<Vec<Scored>, JudgeError> {
        let mut texts = Distinct::default();
        let mut place =
            |prompt: &Prompt, completion: &Completion| texts.place(self.text(prompt, completion));
        let asked: Vec<_> = batch
            .iter()
            .map(|c| (place(c.prompt, c.first), place(c.prompt, c.second)))
            .collect();
        let scores = self.encoder.score_texts(texts.items());
        let scores = scores.map_err(|error| JudgeError::new(error.to_string()))?;
        let verdict = |(first, second): (usize, usize)| {
            let odds = f64::from(scores[first]) - f64::from(scores[second]);
            let verdict = match Probability::from_log_odds(odds) {
                Ok(p) => Verdict::Preference(p),
                Err(_) => Verdict::Abstained {
                    reason: "the encoder's scores are not finite".into(),
                },
            };
            Scored {
                verdict,
                scores: Some([scores[first], scores[second]]),
            }
        };
        Ok(asked.into_iter().map(verdict).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_template_is_filled_once() {
        for (template, expected) in [
            ("{prompt}\n{response}", "a {response} b\nc {prompt}"),
            (
                "[{response}] to [{prompt}]",
                "[c {prompt}] to [a {response} b]",
            ),
            ("{response}{response}", "c {prompt}c {prompt}"),
        ] {
            assert_eq!(fill(template, "a {response} b", "c {prompt}"), expected);
        }
    }
}
