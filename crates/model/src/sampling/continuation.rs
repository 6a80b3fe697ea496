//! One completion in the making, whoever computes the policy's logits.

use messages::{Completion, Finish};
use rand::Rng;
use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};

use super::{Request, SamplingSettings, Scratch, draw, mix};
use crate::{ModelError, StopTokens, ops::log_sum_exp};

/// A completion that grows by a token at a time, drawn from a random stream of its own: neither slots nor
/// batches nor engines decide what is written.
#[derive(Debug)]
pub struct Continuation {
    random: ChaCha8Rng,
    max_new_tokens: usize,
    is_exact: bool,
    has_ended: bool,
    completion: Completion,
}

impl Continuation {
    /// The beginning of the completion of `request` at `index` in its `mixture_coefs`.
    #[must_use]
    pub fn new(request: &Request, index: usize) -> Self {
        Self {
            random: ChaCha8Rng::seed_from_u64(request.seed.derive(index as u64).0),
            max_new_tokens: request.max_new_tokens,
            is_exact: index + request.exact >= request.mixture_coefs.len(),
            has_ended: false,
            completion: Completion {
                ids: Vec::new(),
                finish: Finish::Length,
                mixture_coef: request.mixture_coefs[index],
                logp: Vec::new(),
                ref_logp: Vec::new(),
                behaviour_logp: Vec::new(),
                text: String::new(),
            },
        }
    }

    /// The tokens so far.
    #[must_use]
    pub fn ids(&self) -> &[u32] {
        &self.completion.ids
    }

    /// Whether it ended, with a token that ends texts or because it is long enough.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.has_ended
    }

    /// The completion, without text.
    #[must_use]
    pub fn into_completion(self) -> Completion {
        self.completion
    }

    /// Draws the next token from the mixture of both rows of logits and records what is known of it. A
    /// token of `stops` ends it.
    ///
    /// # Errors
    /// When the logits are no distribution: the weights hold a NaN.
    pub fn write(
        &mut self,
        (policy, reference): (&[f32], &[f32]),
        settings: &SamplingSettings,
        stops: &StopTokens,
        scratch: &mut Scratch,
    ) -> Result<u32, ModelError> {
        let exact;
        let settings = if self.is_exact {
            exact = settings.exact();
            &exact
        } else {
            settings
        };
        let mut room = std::mem::take(&mut scratch.mixed);
        let mixed = mix(policy, reference, self.completion.mixture_coef, &mut room);
        let drawn = draw(mixed, settings, self.random.random(), scratch);
        let drawn = drawn.ok_or_else(|| ModelError::Weights {
            reason: "the logits of a token are not finite".into(),
        })?;
        let logp = |logits: &[f32]| {
            let known = drawn.log_sum.filter(|_| std::ptr::eq(logits, mixed));
            let log_sum = known.unwrap_or_else(|| log_sum_exp(logits));
            (f64::from(logits[drawn.token as usize]) - log_sum) as f32
        };
        let of_policy = logp(policy);
        // Without a reference the policy is its own.
        let of_reference = if std::ptr::eq(policy, reference) {
            of_policy
        } else {
            logp(reference)
        };
        scratch.mixed = room;
        let completion = &mut self.completion;
        completion.ids.push(drawn.token);
        completion.behaviour_logp.push(drawn.behaviour_logp);
        completion.logp.push(of_policy);
        completion.ref_logp.push(of_reference);
        if stops.contains(drawn.token) {
            completion.finish = Finish::EndOfText;
        }
        self.has_ended =
            completion.finish == Finish::EndOfText || completion.ids.len() == self.max_new_tokens;
        Ok(drawn.token)
    }
}
