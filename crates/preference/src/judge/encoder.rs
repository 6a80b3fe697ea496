//! An encoder classifier as a judge: p = σ(r − r′), with r the classifier's score.

use std::sync::Arc;

use messages::{Completion, JudgeVersion, Probability, Prompt};
use model::Encoder;

use crate::dedup::Deduplicated;
use crate::error::JudgeError;
use crate::judge::{Comparison, Judge, ScoredVerdict, Verdict};

/// An encoder reward model as a judge; reads text with its own tokenizer.
pub struct EncoderJudge {
    encoder: Arc<Encoder>,
    template: String,
}

impl EncoderJudge {
    /// A judge by `encoder`. Its input is `template` with `{prompt}` and `{response}` replaced; the prompt of a
    /// dialogue is its transcript.
    #[must_use]
    pub fn new(encoder: Arc<Encoder>, template: String) -> Self {
        Self { encoder, template }
    }

    /// Token ids of the filled template.
    ///
    /// # Errors
    /// When the encoder cannot read them: a reason for an abstention.
    fn encode(&self, prompt: &Prompt, completion: &Completion) -> Result<Vec<u32>, String> {
        let text = fill(&self.template, &prompt.transcript(), &completion.text);
        let ids = self.encoder.encode(&text).map_err(|e| e.to_string())?;
        let (length, max_length) = (ids.len(), self.encoder.max_positions());
        if ids.is_empty() {
            return Err("prompt and response have no tokens".into());
        }
        if length > max_length {
            return Err(format!(
                "prompt and response have {length} tokens, the encoder reads {max_length}"
            ));
        }
        Ok(ids)
    }
}

/// The filled template. Placeholders within a prompt or a response are not replaced.
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

    fn judge_scored(&mut self, batch: &[Comparison<'_>]) -> Result<Vec<ScoredVerdict>, JudgeError> {
        let mut ids = Deduplicated::default();
        let mut index = |prompt: &Prompt, completion: &Completion| {
            Ok::<usize, String>(ids.insert(self.encode(prompt, completion)?))
        };
        let pairs: Vec<Result<[usize; 2], String>> = batch
            .iter()
            .map(|c| Ok([index(c.prompt, c.first)?, index(c.prompt, c.second)?]))
            .collect();
        let scores = self.encoder.score_ids(ids.items());
        let scores = scores.map_err(|error| JudgeError::new(error.to_string()))?;
        let verdict = |pair: Result<[usize; 2], String>| {
            let [first, second] = match pair {
                Ok(pair) => pair.map(|index| scores[index]),
                Err(reason) => {
                    return ScoredVerdict {
                        verdict: Verdict::Abstained { reason },
                        scores: None,
                    };
                }
            };
            let log_odds = f64::from(first) - f64::from(second);
            let verdict = match Probability::from_log_odds(log_odds) {
                Ok(p) => Verdict::Preference(p),
                Err(_) => Verdict::Abstained {
                    reason: "the encoder's scores are not finite".into(),
                },
            };
            ScoredVerdict {
                verdict,
                scores: Some([first, second]),
            }
        };
        Ok(pairs.into_iter().map(verdict).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn placeholders_in_texts_are_not_replaced() {
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
