//! Continuous batching: a fixed number of slots, refilled as soon as completions end.
//!
//! The completions of a request share one prefill of the prompt; policy and reference step together. Each completion
//! has its own random stream, seeded by its request, so that results do not depend on slots or batching.

use std::collections::VecDeque;

use rayon::prelude::*;

use crate::sampling::{
    ActiveRequests, CompletionSampler, Finished, Precision, Request, Sampler, SamplingSettings,
    Scratch, TokenLogits,
};
use crate::{
    decode::{MixtureDecoder, MixtureLogits, NextToken, Prefill, SlotLimits},
    error::ModelError,
    transformer::LanguageModel,
};

/// Samples from the mixture of a policy and its reference with Agon's own decoder.
pub struct MixtureSampler {
    models: MixtureDecoder,
    settings: SamplingSettings,
    /// Maximum sequence length that both models support.
    max_positions: usize,
    slots: Vec<Option<ActiveCompletion>>,
    requests: ActiveRequests,
    waiting: VecDeque<Request>,
}

/// Minimum number of logits per thread when tokens are sampled.
const LOGITS_PER_THREAD: usize = 16 * 1024;

/// A completion in progress in a slot.
struct ActiveCompletion {
    key: u64,
    index: usize,
    needs_reference: bool,
    sampler: CompletionSampler,
}

impl MixtureSampler {
    /// Creates a sampler with `slots` slots, each with room for `capacity` tokens of prompt and completion. Without a
    /// reference the policy is its own, and each step runs one forward pass only.
    ///
    /// # Errors
    /// When the models' vocabularies differ or the device cannot hold the caches.
    pub fn new(
        policy: LanguageModel,
        reference: Option<LanguageModel>,
        settings: SamplingSettings,
        slots: usize,
        capacity: usize,
    ) -> Result<Self, ModelError> {
        let mut max_positions = policy.config().max_positions;
        if let Some(reference) = &reference {
            crate::sampling::ensure_shared_vocabulary(&policy, reference)?;
            max_positions = max_positions.min(reference.config().max_positions);
        }
        let limits = SlotLimits { slots, capacity };
        Ok(Self {
            models: MixtureDecoder::new(policy, reference, settings.precision, limits)?,
            settings,
            max_positions,
            slots: (0..slots).map(|_| None).collect(),
            requests: ActiveRequests::default(),
            waiting: VecDeque::new(),
        })
    }

    /// Number of requests in progress or waiting for slots.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.requests.len() + self.waiting.len()
    }

    /// Number of free slots, less those that waiting requests will occupy.
    #[must_use]
    pub fn free_slots(&self) -> usize {
        let reserved: usize = self.waiting.iter().map(|r| r.mixture_coefs.len()).sum();
        self.slots
            .iter()
            .filter(|slot| slot.is_none())
            .count()
            .saturating_sub(reserved)
    }

    /// Prefills as many waiting requests as fit the free slots and samples their first tokens.
    fn admit_waiting(&mut self) -> Result<(), ModelError> {
        let mut free: VecDeque<usize> = (0..self.slots.len())
            .filter(|&s| self.slots[s].is_none())
            .collect();
        let mut admitted: Vec<(Request, Vec<usize>)> = Vec::new();
        while let Some(request) = self.waiting.front() {
            let count = request.mixture_coefs.len();
            if count > free.len() {
                break;
            }
            let Some(request) = self.waiting.pop_front() else {
                break;
            };
            admitted.push((request, free.drain(..count).collect()));
        }
        if admitted.is_empty() {
            return Ok(());
        }
        let prompts: Vec<Prefill<'_>> = admitted
            .iter()
            .map(|(request, slots)| Prefill {
                ids: &request.ids,
                slots,
            })
            .collect();
        let scored: Vec<bool> = admitted
            .iter()
            .map(|(request, _)| request.needs_reference())
            .collect();
        let logits = self.models.prefill(&prompts, &scored)?;
        let mut rows = Vec::new();
        for (row, (request, slots)) in admitted.iter().enumerate() {
            self.requests.begin(request);
            for (index, &slot) in slots.iter().enumerate() {
                self.slots[slot] = Some(ActiveCompletion::new(request, index));
                rows.push((row, slot));
            }
        }
        rows.sort_unstable_by_key(|&(_, slot)| slot);
        self.sample(&rows, &logits)
    }

    /// Samples the next token of several slots, given as pairs of logits row and slot in ascending order of slots.
    fn sample(
        &mut self,
        rows: &[(usize, usize)],
        logits: &MixtureLogits,
    ) -> Result<(), ModelError> {
        let mut rest = rows;
        let mut completions = Vec::with_capacity(rows.len());
        for (slot, active) in self.slots.iter_mut().enumerate() {
            if let (Some(active), Some((&(row, _), later))) =
                (active, rest.split_first().filter(|(row, _)| row.1 == slot))
            {
                completions.push((row, &mut active.sampler));
                rest = later;
            }
        }
        let (settings, stops) = (&self.settings, &self.models.policy().config().stops);
        completions
            .into_par_iter()
            .with_min_len((LOGITS_PER_THREAD / logits.width()).max(1))
            .try_for_each_init(Scratch::default, |scratch, (row, sampler)| {
                let logits = TokenLogits {
                    policy: logits.policy(row),
                    reference: logits.reference(row),
                };
                let drawn = sampler.sample(logits, settings, stops, scratch);
                drawn.map(drop)
            })?;
        for &(_, slot) in rows {
            self.release_if_ended(slot);
        }
        Ok(())
    }

    /// Frees a slot whose completion has ended.
    fn release_if_ended(&mut self, slot: usize) {
        let ended = self.slots[slot].take_if(|active| active.sampler.has_ended());
        if let Some(active) = ended {
            let completion = active.sampler.into_completion();
            self.requests.end(active.key, active.index, completion);
        }
    }
}

impl Sampler for MixtureSampler {
    fn admit(&mut self, request: Request) -> Result<(), ModelError> {
        request.check_capacity(self.slots.len(), self.max_positions)?;
        self.waiting.push_back(request);
        Ok(())
    }

    /// Prefills waiting requests into free slots, then samples one token of every completion.
    fn step(&mut self) -> Result<Vec<Finished>, ModelError> {
        self.admit_waiting()?;
        let next: Vec<NextToken> = self
            .slots
            .iter()
            .enumerate()
            .filter_map(|(slot, active)| {
                let active = active.as_ref()?;
                Some(NextToken {
                    slot,
                    token: *active.sampler.ids().last()?,
                    is_scored: active.needs_reference,
                })
            })
            .collect();
        if !next.is_empty() {
            let logits = self.models.extend(&next)?;
            let rows: Vec<(usize, usize)> = next.iter().map(|next| next.slot).enumerate().collect();
            self.sample(&rows, &logits)?;
        }
        Ok(self.requests.take_finished())
    }

    fn is_idle(&self) -> bool {
        self.requests.is_empty() && self.waiting.is_empty()
    }

    fn set_policy(
        &mut self,
        policy: LanguageModel,
        precision: Precision,
    ) -> Result<(), ModelError> {
        crate::sampling::ensure_idle(self)?;
        self.models.set_policy(policy, precision)
    }

    fn set_reference(
        &mut self,
        reference: LanguageModel,
        precision: Precision,
    ) -> Result<(), ModelError> {
        crate::sampling::ensure_idle(self)?;
        crate::sampling::ensure_shared_vocabulary(self.models.policy(), &reference)?;
        self.models.set_reference(reference, precision)
    }
}

impl ActiveCompletion {
    fn new(request: &Request, index: usize) -> Self {
        Self {
            key: request.key,
            index,
            needs_reference: request.needs_reference(),
            sampler: CompletionSampler::new(request, index),
        }
    }
}

#[cfg(test)]
mod tests {
    use messages::{Completion, Finish, Seed};

    use super::*;
    use crate::{
        decode::Decoder,
        fixtures::tiny_model,
        ragged::Sequence,
        sampling::{Precision, log_softmax_at, mix},
    };

    fn request(key: u64, ids: &[u32], mixture_coefs: &[f32], max_new_tokens: usize) -> Request {
        let seed = Seed(77).derive(key);
        Request {
            key,
            ids: ids.to_vec(),
            seed,
            mixture_coefs: mixture_coefs.to_vec(),
            exact: 0,
            max_new_tokens,
            records_reference: true,
        }
    }

    fn sampler(policy: u64, reference: u64, slots: usize) -> MixtureSampler {
        let (policy, reference) = (tiny_model(9, policy), tiny_model(9, reference));
        MixtureSampler::new(
            policy,
            Some(reference),
            SamplingSettings::plain(12),
            slots,
            32,
        )
        .unwrap()
    }

    fn sample_all(mut sampler: MixtureSampler, requests: &[Request]) -> Vec<Finished> {
        for request in requests {
            sampler.admit(request.clone()).unwrap();
        }
        let mut finished = Vec::new();
        while !sampler.is_idle() {
            finished.extend(sampler.step().unwrap());
        }
        finished.sort_by_key(|f| f.key);
        finished
    }

    /// The last `exact` completions are sampled from the full distribution at temperature 1, regardless of the
    /// settings.
    #[test]
    fn exact_completions_are_sampled_from_the_untempered_policy() {
        let mut altered = sampler(1, 2, 6);
        altered.settings.temperature = 0.5;
        altered.settings.top_k = 3;
        let mut plain = Vec::new();
        for key in 0..4 {
            let mut request = request(key, &[2, 3], &[0.0, 1.0, 0.0], 12);
            plain.push(request.clone());
            request.exact = 1;
            altered.admit(request).unwrap();
        }
        let mut found = Vec::new();
        while !altered.is_idle() {
            found.extend(altered.step().unwrap());
        }
        found.sort_by_key(|f| f.key);
        let expected = sample_all(sampler(1, 2, 6), &plain);
        for (found, expected) in found.iter().zip(&expected) {
            let [tempered, _, exact] = &found.completions[..] else {
                panic!("three completions")
            };
            assert_eq!(
                exact, &expected.completions[2],
                "equal to a plain sampler's"
            );
            assert_ne!(tempered.behaviour_logp, tempered.logp);
        }
    }

    /// Completions of the policy alone are the same whether or not the reference reads them, beside others that it reads.
    #[test]
    fn a_reference_that_is_not_recorded_changes_no_completion() {
        let requests: Vec<Request> = (0..6)
            .map(|key| {
                let coefs: &[f32] = if key == 2 { &[0.0, 0.5] } else { &[0.0, 0.0] };
                request(key, &[0, 2, 3 + key as u32 % 5], coefs, 12)
            })
            .collect();
        let recorded = sample_all(sampler(1, 2, 7), &requests);
        let without = requests.iter().cloned().map(|request| Request {
            records_reference: request.key == 3,
            ..request
        });
        let found = sample_all(sampler(1, 2, 7), &without.collect::<Vec<_>>());
        assert_eq!(found.len(), 6);
        for (found, recorded) in found.iter().zip(recorded) {
            let mut expected = recorded.completions;
            if ![2, 3].contains(&found.key) {
                expected.iter_mut().for_each(|c| c.ref_logp.clear());
            }
            assert_eq!(found.completions, expected);
        }
    }

    fn uncached_logprobs(
        model: &LanguageModel,
        prompt: &[u32],
        completion: &Completion,
    ) -> Vec<f32> {
        let sequence = Sequence {
            prompt,
            completion: &completion.ids,
        };
        model.logprobs(&[sequence]).unwrap().logp.to_vec1().unwrap()
    }

    fn close(found: &[f32], expected: &[f32]) {
        assert_eq!(found.len(), expected.len());
        for (f, e) in found.iter().zip(expected) {
            assert!((f - e).abs() < 1e-4, "{found:?} is not {expected:?}");
        }
    }

    #[test]
    fn recorded_logprobs_match_the_uncached_models() {
        let requests: Vec<Request> = (0..6)
            .map(|key| request(key, &[0, 2, 3 + key as u32 % 5], &[0.25, 0.25, 1.0], 12))
            .collect();
        for finished in sample_all(sampler(1, 2, 7), &requests) {
            let prompt = &requests[finished.key as usize].ids;
            for completion in &finished.completions {
                close(
                    &completion.logp,
                    &uncached_logprobs(&tiny_model(9, 1), prompt, completion),
                );
                close(
                    &completion.ref_logp,
                    &uncached_logprobs(&tiny_model(9, 2), prompt, completion),
                );
                assert!(completion.is_valid());
                let ended = completion.ids.last() == Some(&1);
                assert_eq!(completion.finish == Finish::EndOfText, ended);
                assert!(
                    completion.ids[..completion.ids.len() - 1]
                        .iter()
                        .all(|&id| id != 1)
                );
                assert!(ended || completion.ids.len() == 12);
            }
        }
    }

    #[test]
    fn mixture_coefficients_0_and_1_are_the_policy_and_the_reference() {
        let requests: Vec<Request> = (0..8)
            .map(|key| request(key, &[0, 4], &[0.0, 1.0], 12))
            .collect();
        for finished in sample_all(sampler(1, 2, 16), &requests) {
            let [policy, reference] = &finished.completions[..] else {
                panic!("two completions")
            };
            close(&policy.behaviour_logp, &policy.logp);
            close(&reference.behaviour_logp, &reference.ref_logp);
            assert!(
                policy
                    .logp
                    .iter()
                    .zip(&policy.ref_logp)
                    .any(|(a, b)| (a - b).abs() > 1e-2)
            );
        }
        // With the same seed the reference's completion does not depend on the policy, nor the policy's on the
        // reference.
        let ids = |policy, reference, m: f32| {
            let finished = sample_all(
                sampler(policy, reference, 4),
                &[request(3, &[0, 4], &[m], 12)],
            );
            finished[0].completions[0].ids.clone()
        };
        assert_eq!(ids(1, 2, 1.0), ids(5, 2, 1.0));
        assert_eq!(ids(1, 2, 0.0), ids(1, 5, 0.0));
        assert_ne!(ids(1, 2, 0.0), ids(1, 2, 1.0));
    }

    #[test]
    fn a_completion_depends_on_its_seed_only() {
        let requests: Vec<Request> = (0..9)
            .map(|key| request(key, &[0, 2 + key as u32 % 6], &[0.5, 0.5], 12))
            .collect();
        let wide = sample_all(sampler(1, 2, 18), &requests);
        let narrow = sample_all(sampler(1, 2, 4), &requests);
        let reversed: Vec<Request> = requests.iter().rev().cloned().collect();
        let backward = sample_all(sampler(1, 2, 7), &reversed);
        let ids = |finished: &[Finished]| -> Vec<Vec<u32>> {
            finished
                .iter()
                .flat_map(|f| f.completions.iter().map(|c| c.ids.clone()))
                .collect()
        };
        assert_eq!(ids(&wide), ids(&narrow));
        assert_eq!(ids(&wide), ids(&backward));
    }

    #[test]
    fn frequencies_match_the_mixture() {
        let (policy, reference, m) = (tiny_model(9, 1), tiny_model(9, 2), 0.3);
        let logits = |model: &LanguageModel| -> Vec<f32> {
            let mut decoder = Decoder::new(model.clone(), Precision::F32, 1, 4).unwrap();
            let prompt = Prefill {
                ids: &[0, 5],
                slots: &[0],
            };
            decoder.prefill(&[prompt]).unwrap().row(0).to_vec()
        };
        let mut buffer = Vec::new();
        let (policy, reference) = (logits(&policy), logits(&reference));
        let mixed = mix(&policy, &reference, m, &mut buffer);
        let expected: Vec<f64> = (0..9)
            .map(|id| f64::from(log_softmax_at(mixed, id)).exp())
            .collect();
        let draws = 4000;
        let requests: Vec<Request> = (0..draws / 40)
            .map(|key| request(key, &[0, 5], &[m; 40], 1))
            .collect();
        let mut counts = [0f64; 9];
        for finished in sample_all(sampler(1, 2, 80), &requests) {
            finished
                .completions
                .iter()
                .for_each(|c| counts[c.ids[0] as usize] += 1.0);
        }
        let squares = counts
            .iter()
            .zip(&expected)
            .map(|(n, p)| (n - p * draws as f64).powi(2) / (p * draws as f64));
        let chi_square: f64 = squares.sum();
        // 8 degrees of freedom: the 99.9th percentile is 26.1; the seed is fixed.
        assert!(
            chi_square < 26.1,
            "{chi_square}: {counts:?} against {expected:?}"
        );
    }

    #[test]
    fn invalid_requests_are_refused_and_a_busy_sampler_keeps_its_policy() {
        let mut sampler = sampler(1, 2, 4);
        for bad in [
            request(0, &[0], &[], 4),
            request(0, &[0], &[0.0; 5], 4),
            request(0, &[], &[0.0], 4),
            request(0, &[0], &[0.0], 64),
        ] {
            assert!(sampler.admit(bad).is_err());
        }
        sampler.admit(request(0, &[0], &[0.0], 4)).unwrap();
        assert!(
            sampler
                .set_policy(tiny_model(9, 3), Precision::F32)
                .is_err()
        );
        assert_eq!((sampler.free_slots(), sampler.in_flight()), (3, 1));
    }
}
