//! A decoder preference model as a judge: Bradley–Terry or pairwise, fitted or ready-made.

use std::collections::HashMap;

use messages::{Completion, JudgeVersion, Prompt, PromptText};
use model::{RewardKind, RewardModel, Sequence, Tokenizer};

use super::{Comparison, Judge, Verdict};
use crate::{JudgeError, fit};

/// Sequences that are scored at once.
const SEQUENCES: usize = 256;

/// A preference model that judges.
pub struct Learned {
    model: RewardModel,
    version: JudgeVersion,
    reads: Reads,
}

/// What a preference model reads.
pub enum Reads {
    /// The policy's tokens: its vocabulary is the policy's.
    Tokens,
    /// Text, through a tokenizer and a chat template of its own.
    Text(Box<Tokenizer>),
}

impl Learned {
    /// A judge of this version.
    #[must_use]
    pub fn new(model: RewardModel, version: JudgeVersion, reads: Reads) -> Self {
        Self {
            model,
            version,
            reads,
        }
    }

    /// The tokens of a prompt and of a response to it, or why the model cannot read them.
    fn read(&self, prompt: &Prompt, completion: &Completion) -> Result<Ids, String> {
        let ids = match &self.reads {
            Reads::Tokens => (prompt.ids.clone(), completion.ids.clone()),
            Reads::Text(tokenizer) => {
                let text = PromptText::Text(prompt.text.clone());
                let ids = tokenizer.encode_prompt(&text).map_err(|e| e.to_string())?;
                let response = tokenizer
                    .encode_completion(&text, &ids, &completion.text)
                    .map_err(|e| e.to_string())?;
                let eos = self.model.trunk_config().eos.first().copied();
                (ids, response.into_iter().chain(eos).collect())
            }
        };
        let (length, most) = (
            ids.0.len() + ids.1.len(),
            self.model.trunk_config().max_positions,
        );
        if ids.1.is_empty() {
            return Err("the response is empty".into());
        }
        if length > most {
            return Err(format!(
                "prompt and response have {length} tokens, the model reads {most}"
            ));
        }
        Ok(ids)
    }

    fn scores(&self, ids: &[Ids]) -> Result<Vec<Vec<f32>>, JudgeError> {
        let mut rows = Vec::with_capacity(ids.len());
        for part in ids.chunks(SEQUENCES) {
            let sequences: Vec<_> = part
                .iter()
                .map(|(prompt, completion)| Sequence { prompt, completion })
                .collect();
            let scored = fit::features(&self.model, &sequences);
            rows.extend(scored.map_err(|error| JudgeError::new(error.to_string()))?);
        }
        Ok(rows)
    }
}

type Ids = (Vec<u32>, Vec<u32>);

impl Judge for Learned {
    fn name(&self) -> &str {
        match self.model.config().kind {
            RewardKind::BradleyTerry => "bradley-terry",
            RewardKind::Pairwise { .. } => "pairwise",
        }
    }

    fn version(&self) -> JudgeVersion {
        self.version
    }

    fn is_antisymmetric(&self) -> bool {
        true
    }

    fn judge(&mut self, batch: &[Comparison<'_>]) -> Result<Vec<Verdict>, JudgeError> {
        // Every response is read once, in however many comparisons it stands.
        let mut places = HashMap::new();
        let mut ids: Vec<Ids> = Vec::new();
        let mut place = |prompt: &Prompt, completion: &Completion| {
            let read = self.read(prompt, completion)?;
            Ok::<usize, String>(*places.entry(read.clone()).or_insert_with(|| {
                ids.push(read);
                ids.len() - 1
            }))
        };
        let asked: Vec<Result<(usize, usize), String>> = batch
            .iter()
            .map(|c| Ok((place(c.prompt, c.first)?, place(c.prompt, c.second)?)))
            .collect();
        let rows = self.scores(&ids)?;
        let kind = self.model.config().kind;
        let verdict = |asked: Result<(usize, usize), String>| {
            let answer = asked.and_then(|(first, second)| {
                kind.probability(&rows[first], &rows[second])
                    .map_err(|_| "the model's scores are not finite".to_owned())
            });
            match answer {
                Ok(p) => Verdict::Preference(p),
                Err(reason) => Verdict::Abstained { reason },
            }
        };
        Ok(asked.into_iter().map(verdict).collect())
    }
}
