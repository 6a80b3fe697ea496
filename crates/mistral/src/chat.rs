//! Answers to prompts, with the log-probabilities of every token.

use std::{sync::mpsc, time::Duration};

use messages::{Finish, PromptText, Seed};
use model::{
    SamplingSettings,
    sampling::{Scratch, draw},
};
use rand::Rng;
use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};

use crate::{Asked, Engine, MistralError, Numbers, Source, TokenWriter};

/// How much longer than a completion's own patience its end is waited for.
const MARGIN: Duration = Duration::from_secs(10);

/// A model that answers.
pub struct Chat {
    engine: Engine,
    /// How long one answer may take.
    patience: Duration,
}

/// One answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    /// The text, without special tokens.
    pub text: String,
    /// Its tokens, special ones included.
    pub tokens: Vec<SaidToken>,
    /// Why it ended.
    pub finish: Finish,
}

/// A token of an answer and what might have stood in its place.
#[derive(Debug, Clone, PartialEq)]
pub struct SaidToken {
    /// Its text.
    pub text: String,
    /// Its natural log-probability.
    pub logprob: f64,
    /// The likeliest tokens in its place, the likeliest first.
    pub likeliest: Vec<Alternative>,
}

/// What might have stood in a token's place.
#[derive(Debug, Clone, PartialEq)]
pub struct Alternative {
    /// Its text.
    pub text: String,
    /// Its natural log-probability.
    pub logprob: f64,
}

impl Chat {
    /// Loads a model whose answers may take so long each.
    ///
    /// # Errors
    /// When it cannot be loaded.
    pub fn open(source: &Source, patience: Duration) -> Result<Self, MistralError> {
        Ok(Self {
            engine: Engine::load(source, Numbers::Fitting)?,
            patience,
        })
    }

    /// Whether it can be sent dialogues.
    #[must_use]
    pub fn has_chat_template(&self) -> bool {
        self.engine.has_chat_template()
    }

    /// The answer to a prompt, drawn with `seed`, each token with so many `alternatives`; `sampling` with
    /// `top_k = 1` always takes the likeliest token.
    ///
    /// # Errors
    /// When the prompt cannot be put into tokens, or the answer does not come.
    pub fn answer(
        &self,
        prompt: &PromptText,
        (sampling, seed): (&SamplingSettings, Seed),
        alternatives: usize,
    ) -> Result<Answer, MistralError> {
        let (told, ended) = mpsc::channel();
        let ids = self.engine.encode(prompt)?;
        let asked = Asked {
            ids: ids.clone(),
            max_new_tokens: sampling.max_new_tokens,
            patience: self.patience,
        };
        let writer = Drawing::new(*sampling, seed, alternatives);
        self.engine.start(asked, writer, move |writer, result| {
            // Nobody listens any more when it came too late.
            drop(told.send((writer, result)));
        });
        let late = |_| MistralError::Late(self.patience);
        let (writer, result) = ended.recv_timeout(self.patience + MARGIN).map_err(late)?;
        result?;
        self.words(&ids, &writer)
    }

    /// What was drawn after the tokens of `prompt`, as text.
    fn words(&self, prompt: &[u32], drawing: &Drawing) -> Result<Answer, MistralError> {
        if drawing.has_failed {
            let reason = "its logits are not finite; the weights may be damaged";
            return Err(MistralError::Failed(reason.into()));
        }
        let ids: Vec<u32> = drawing.drawn.iter().map(|token| token.id).collect();
        let ends = |id: &u32| self.engine.end_tokens().contains(id);
        let before = prompt.last().into_iter().chain(&ids).copied();
        let said = |(before, token): (u32, &DrawnToken)| {
            let text = |id| following(&[before], &[id], |ids| self.engine.decode_all(ids));
            let likeliest = token.likeliest.iter();
            SaidToken {
                text: text(token.id),
                logprob: token.logprob,
                likeliest: likeliest
                    .map(|&(id, logprob)| Alternative {
                        text: text(id),
                        logprob,
                    })
                    .collect(),
            }
        };
        Ok(Answer {
            text: following(prompt, &ids, |ids| self.engine.decode(ids)),
            tokens: before.zip(&drawing.drawn).map(said).collect(),
            finish: match ids.last().is_some_and(ends) {
                true => Finish::EndOfText,
                false => Finish::Length,
            },
        })
    }
}

/// The text of `ids` where they follow `before`: some decoders drop the first space of a text.
fn following(before: &[u32], ids: &[u32], decode: impl Fn(&[u32]) -> String) -> String {
    let whole = decode(&[before, ids].concat());
    match whole.strip_prefix(&decode(before)) {
        Some(text) => text.to_owned(),
        None => decode(ids),
    }
}

/// Draws an answer, and records what was likely.
struct Drawing {
    sampling: SamplingSettings,
    random: ChaCha8Rng,
    alternatives: usize,
    scratch: Scratch,
    drawn: Vec<DrawnToken>,
    has_failed: bool,
}

struct DrawnToken {
    id: u32,
    logprob: f64,
    likeliest: Vec<(u32, f64)>,
}

impl Drawing {
    fn new(sampling: SamplingSettings, seed: Seed, alternatives: usize) -> Self {
        Self {
            sampling,
            random: ChaCha8Rng::seed_from_u64(seed.0),
            alternatives,
            scratch: Scratch::default(),
            drawn: Vec::new(),
            has_failed: false,
        }
    }
}

impl TokenWriter for Drawing {
    fn next(&mut self, logits: &[f32], _context: &[u32]) -> Option<u32> {
        let uniform = self.random.random();
        let drawn = draw(logits, &self.sampling, uniform, &mut self.scratch);
        let Some(drawn) = drawn else {
            self.has_failed = true;
            return None;
        };
        let normaliser = log_sum_exp(logits);
        let logprob = |id: u32| f64::from(logits[id as usize]) - normaliser;
        let likeliest = likeliest(logits, self.alternatives);
        self.drawn.push(DrawnToken {
            id: drawn.token,
            logprob: logprob(drawn.token),
            likeliest: likeliest.into_iter().map(|id| (id, logprob(id))).collect(),
        });
        Some(drawn.token)
    }
}

/// ln Σ exp z, in f64.
fn log_sum_exp(logits: &[f32]) -> f64 {
    let most = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let sum: f64 = logits.iter().map(|&z| (f64::from(z) - most).exp()).sum();
    most + sum.ln()
}

/// The `count` tokens with the highest logits, the highest first, of equal ones the first.
fn likeliest(logits: &[f32], count: usize) -> Vec<u32> {
    let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
    let descending = |a: &u32, b: &u32| {
        let [a_logit, b_logit] = [a, b].map(|&id| logits[id as usize]);
        b_logit.total_cmp(&a_logit).then(a.cmp(b))
    };
    if count > 0 && count < ids.len() {
        ids.select_nth_unstable_by(count - 1, descending);
    }
    ids.truncate(count);
    ids.sort_unstable_by(descending);
    ids
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_keeps_the_space_that_parts_it_from_the_prompt() {
        let decode = |ids: &[u32]| {
            let words: String = ids.iter().map(|id| format!(" w{id}")).collect();
            words.strip_prefix(' ').unwrap_or_default().to_owned()
        };
        assert_eq!(following(&[1, 2], &[3, 4], decode), " w3 w4");
        assert_eq!(following(&[], &[3], decode), "w3");
    }

    #[test]
    fn the_likeliest_tokens_come_first_and_their_probabilities_add_up() {
        let logits = [0.0f32, 2.0, -1.0, 2.0, 1.0];
        assert_eq!(likeliest(&logits, 3), [1, 3, 4]);
        assert_eq!(likeliest(&logits, 9), [1, 3, 4, 0, 2]);
        assert_eq!(likeliest(&logits, 0), [0u32; 0]);
        let normaliser = log_sum_exp(&logits);
        let sum: f64 = logits
            .iter()
            .map(|&z| (f64::from(z) - normaliser).exp())
            .sum();
        assert!((sum - 1.0).abs() < 1e-12, "{sum}");
    }

    #[test]
    fn a_drawing_takes_the_likeliest_and_fails_on_no_number() {
        let greedy = SamplingSettings {
            top_k: 1,
            ..SamplingSettings::plain(4)
        };
        let mut drawing = Drawing::new(greedy, Seed(1), 2);
        assert_eq!(drawing.next(&[0.0, 1.0, 0.5], &[7]), Some(1));
        let token = &drawing.drawn[0];
        assert_eq!(token.likeliest[0], (1, token.logprob));
        assert_eq!(token.likeliest[1].0, 2);
        assert_eq!(drawing.next(&[0.0, f32::NAN], &[7, 1]), None);
        assert!(drawing.has_failed);
    }
}
