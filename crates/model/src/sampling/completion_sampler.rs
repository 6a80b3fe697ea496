//! Token-by-token sampling of one completion, independent of the engine that computes the logits.

use messages::{Completion, Finish};
use rand::Rng;
use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};

use crate::sampling::{Request, SamplingSettings, Scratch, draw, mix};
use crate::{error::ModelError, stop_tokens::StopTokens};
use kernels::log_sum_exp;

/// Samples one completion token by token from its own random stream, so that the result does not depend on slots,
/// batching or the engine.
#[derive(Debug)]
pub struct CompletionSampler {
    random: ChaCha8Rng,
    max_new_tokens: usize,
    is_exact: bool,
    has_ended: bool,
    completion: Completion,
}

/// Next-token logits of the policy and the reference.
#[derive(Debug, Clone, Copy)]
pub struct TokenLogits<'a> {
    /// Logits of the policy.
    pub policy: &'a [f32],
    /// Logits of the reference; the same slice as `policy` when the policy is its own reference; `None` for a completion
    /// of the policy alone whose log ref is not recorded.
    pub reference: Option<&'a [f32]>,
}

impl CompletionSampler {
    /// Creates an empty completion of `request`, the one at `index` in its `mixture_coefs`.
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

    /// The tokens sampled so far.
    #[must_use]
    pub fn ids(&self) -> &[u32] {
        &self.completion.ids
    }

    /// Whether it ended, by a stop token or the maximum length.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.has_ended
    }

    /// The completion, without text.
    #[must_use]
    pub fn into_completion(self) -> Completion {
        self.completion
    }

    /// Samples the next token from the mixture of policy and reference, and records its log-probabilities. A token of
    /// `stops` ends the completion.
    ///
    /// # Errors
    /// When a logit is NaN.
    pub fn sample(
        &mut self,
        logits: TokenLogits<'_>,
        settings: &SamplingSettings,
        stops: &StopTokens,
        scratch: &mut Scratch,
    ) -> Result<u32, ModelError> {
        let TokenLogits { policy, reference } = logits;
        let exact;
        let settings = if self.is_exact {
            exact = settings.exact();
            &exact
        } else {
            settings
        };
        let mut buffer = std::mem::take(&mut scratch.mixed);
        // Without a reference the coefficient is 0.
        let other = reference.unwrap_or(policy);
        let mixed = mix(policy, other, self.completion.mixture_coef, &mut buffer);
        let drawn = draw(mixed, settings, self.random.random(), scratch);
        let drawn = drawn.ok_or_else(|| ModelError::Weights {
            reason: "the logits of a token are not finite".into(),
        })?;
        let logp = |logits: &[f32]| {
            let known = drawn.log_sum.filter(|_| std::ptr::eq(logits, mixed));
            let log_sum = known.unwrap_or_else(|| log_sum_exp(logits));
            (f64::from(logits[drawn.token as usize]) - log_sum) as f32
        };
        let policy_logp = logp(policy);
        // Without a reference model the policy is its own reference.
        let reference_logp = reference.map(|reference| match std::ptr::eq(policy, reference) {
            true => policy_logp,
            false => logp(reference),
        });
        scratch.mixed = buffer;
        let completion = &mut self.completion;
        completion.ids.push(drawn.token);
        completion.behaviour_logp.push(drawn.behaviour_logp);
        completion.logp.push(policy_logp);
        completion.ref_logp.extend(reference_logp);
        if stops.contains(drawn.token) {
            completion.finish = Finish::EndOfText;
        }
        self.has_ended =
            completion.finish == Finish::EndOfText || completion.ids.len() == self.max_new_tokens;
        Ok(drawn.token)
    }
}
