//! Continuous batching: a fixed number of slots, filled again as soon as completions end.
//!
//! A prompt's completions share one reading of the prompt and hold neighbouring slots; policy and
//! reference step together. Each completion draws from a stream of its own, seeded by its
//! message, so that neither slots nor batches decide what is written.

use std::collections::VecDeque;

use rayon::prelude::*;

use super::{
    CompletionWriter, Continuation, Finished, Groups, Precision, Request, SamplingSettings, Scratch,
};
use crate::{
    LanguageModel, ModelError,
    decode::{Decoder, Logits, Prefill},
};

/// A policy and its reference, writing.
pub struct Sampler {
    policy: Decoder,
    /// None: the policy is its own.
    reference: Option<Decoder>,
    settings: SamplingSettings,
    /// The longest sequence of either model.
    longest: usize,
    slots: Vec<Option<Stream>>,
    groups: Groups,
    waiting: VecDeque<Request>,
}

/// Numbers of rows of logits that are worth a thread.
const DRAWN: usize = 16 * 1024;

/// What the models say of the tokens that come next, row by row.
struct Both {
    policy: Logits,
    reference: Option<Logits>,
}

impl Both {
    fn rows(&self, index: usize) -> (&[f32], &[f32]) {
        let reference = self.reference.as_ref().unwrap_or(&self.policy);
        (self.policy.row(index), reference.row(index))
    }
}

/// One completion in the making.
struct Stream {
    key: u64,
    index: usize,
    continuation: Continuation,
}

impl Sampler {
    /// A sampler with so many slots, each with room for `capacity` tokens of prompt and completion. Without
    /// a reference the policy is its own, and is asked once.
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
        let mut longest = policy.config().max_positions;
        if let Some(reference) = &reference {
            super::share_vocabulary(&policy, reference)?;
            longest = longest.min(reference.config().max_positions);
        }
        let decoder = |model| Decoder::new(model, settings.precision, slots, capacity);
        Ok(Self {
            policy: decoder(policy)?,
            reference: reference.map(decoder).transpose()?,
            settings,
            longest,
            slots: (0..slots).map(|_| None).collect(),
            groups: Groups::default(),
            waiting: VecDeque::new(),
        })
    }

    /// How many prompts are being answered or wait for slots.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.groups.len() + self.waiting.len()
    }

    /// How many slots are free beyond those that waiting prompts will take.
    #[must_use]
    pub fn free_slots(&self) -> usize {
        let promised: usize = self.waiting.iter().map(|r| r.mixture_coefs.len()).sum();
        self.slots
            .iter()
            .filter(|slot| slot.is_none())
            .count()
            .saturating_sub(promised)
    }

    /// Reads as many waiting prompts as have free slots and writes their first tokens.
    fn read_prompts(&mut self) -> Result<(), ModelError> {
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
        let logits = self.logits(|model| model.prefill(&prompts))?;
        let mut rows = Vec::new();
        for (row, (request, slots)) in admitted.iter().enumerate() {
            self.groups.begin(request);
            for (index, &slot) in slots.iter().enumerate() {
                self.slots[slot] = Some(Stream::new(request, index));
                rows.push((row, slot));
            }
        }
        rows.sort_unstable_by_key(|&(_, slot)| slot);
        self.write(&rows, &logits)
    }

    /// The logits of the policy, and of the reference where it is another model. Both are asked at once: what
    /// one does on a single thread leaves the others to the other.
    fn logits(
        &mut self,
        forward: impl Fn(&mut Decoder) -> Result<Logits, ModelError> + Sync,
    ) -> Result<Both, ModelError> {
        let (policy, reference) = (&mut self.policy, self.reference.as_mut());
        let (policy, reference) =
            rayon::join(|| forward(policy), || reference.map(&forward).transpose());
        Ok(Both {
            policy: policy?,
            reference: reference?,
        })
    }

    /// Draws the next token of streams: of each the row of its logits and its slot, slots ascending.
    fn write(&mut self, rows: &[(usize, usize)], logits: &Both) -> Result<(), ModelError> {
        let mut rest = rows;
        let mut streams = Vec::with_capacity(rows.len());
        for (slot, stream) in self.slots.iter_mut().enumerate() {
            if let (Some(stream), Some((&(row, _), later))) =
                (stream, rest.split_first().filter(|(row, _)| row.1 == slot))
            {
                streams.push((row, &mut stream.continuation));
                rest = later;
            }
        }
        let (settings, stops) = (&self.settings, &self.policy.model().config().stops);
        streams
            .into_par_iter()
            .with_min_len((DRAWN / logits.policy.width()).max(1))
            .try_for_each_init(Scratch::default, |scratch, (row, continuation)| {
                let drawn = continuation.write(logits.rows(row), settings, stops, scratch);
                drawn.map(drop)
            })?;
        for &(_, slot) in rows {
            self.end(slot);
        }
        Ok(())
    }

    /// Empties the slot if its completion has ended.
    fn end(&mut self, slot: usize) {
        let ended = self.slots[slot].take_if(|stream| stream.continuation.has_ended());
        if let Some(stream) = ended {
            let completion = stream.continuation.into_completion();
            self.groups.end(stream.key, stream.index, completion);
        }
    }
}

impl CompletionWriter for Sampler {
    fn admit(&mut self, request: Request) -> Result<(), ModelError> {
        request.fits(self.slots.len(), self.longest)?;
        self.waiting.push_back(request);
        Ok(())
    }

    /// Reads waiting prompts into free slots, then writes one token of every completion.
    fn step(&mut self) -> Result<Vec<Finished>, ModelError> {
        self.read_prompts()?;
        let last = |stream: &Stream| stream.continuation.ids().last().copied();
        let (slots, tokens): (Vec<usize>, Vec<u32>) = (0..self.slots.len())
            .filter_map(|slot| Some((slot, last(self.slots[slot].as_ref()?)?)))
            .unzip();
        if !slots.is_empty() {
            let logits = self.logits(|model| model.extend(&slots, &tokens))?;
            let rows: Vec<(usize, usize)> = slots.into_iter().enumerate().collect();
            self.write(&rows, &logits)?;
        }
        Ok(self.groups.take_finished())
    }

    fn is_idle(&self) -> bool {
        self.groups.is_empty() && self.waiting.is_empty()
    }

    fn set_policy(
        &mut self,
        policy: LanguageModel,
        precision: Precision,
    ) -> Result<(), ModelError> {
        super::only_idle(self)?;
        if let Some(reference) = &mut self.reference {
            reference.set_precision(precision)?;
        }
        self.policy.set_model(policy, precision)
    }
}

impl Stream {
    fn new(request: &Request, index: usize) -> Self {
        Self {
            key: request.key,
            index,
            continuation: Continuation::new(request, index),
        }
    }
}

#[cfg(test)]
mod tests {
    use messages::{Completion, Finish, Seed};

    use super::*;
    use crate::{
        Precision, Sequence,
        fixtures::tiny_model,
        sampling::{log_softmax_at, mix},
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
        }
    }

    fn sampler(policy: u64, reference: u64, slots: usize) -> Sampler {
        let (policy, reference) = (tiny_model(9, policy), tiny_model(9, reference));
        Sampler::new(
            policy,
            Some(reference),
            SamplingSettings::plain(12),
            slots,
            32,
        )
        .unwrap()
    }

    fn answers(mut sampler: Sampler, requests: &[Request]) -> Vec<Finished> {
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

    /// The last `exact` completions are drawn at temperature 1 from the whole distribution, whatever the
    /// settings: each token's behaviour log-probability is the policy's own.
    #[test]
    fn exact_completions_are_drawn_from_the_policy_itself() {
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
        let expected = answers(sampler(1, 2, 6), &plain);
        for (found, expected) in found.iter().zip(&expected) {
            let [of_policy, _, exact] = &found.completions[..] else {
                panic!("three completions")
            };
            assert_eq!(
                exact, &expected.completions[2],
                "as a plain sampler writes it"
            );
            assert_ne!(of_policy.behaviour_logp, of_policy.logp);
        }
    }

    fn scored(model: &LanguageModel, prompt: &[u32], completion: &Completion) -> Vec<f32> {
        let sequence = Sequence {
            prompt,
            completion: &completion.ids,
        };
        model.score(&[sequence]).unwrap().logp.to_vec1().unwrap()
    }

    fn close(found: &[f32], expected: &[f32]) {
        assert_eq!(found.len(), expected.len());
        for (f, e) in found.iter().zip(expected) {
            assert!((f - e).abs() < 1e-4, "{found:?} is not {expected:?}");
        }
    }

    #[test]
    fn what_is_recorded_is_what_the_uncached_models_say() {
        let requests: Vec<Request> = (0..6)
            .map(|key| request(key, &[0, 2, 3 + key as u32 % 5], &[0.25, 0.25, 1.0], 12))
            .collect();
        for finished in answers(sampler(1, 2, 7), &requests) {
            let prompt = &requests[finished.key as usize].ids;
            for completion in &finished.completions {
                close(
                    &completion.logp,
                    &scored(&tiny_model(9, 1), prompt, completion),
                );
                close(
                    &completion.ref_logp,
                    &scored(&tiny_model(9, 2), prompt, completion),
                );
                assert!(completion.is_sound());
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
    fn the_ends_of_the_mixture_are_the_policy_and_the_reference() {
        let requests: Vec<Request> = (0..8)
            .map(|key| request(key, &[0, 4], &[0.0, 1.0], 12))
            .collect();
        for finished in answers(sampler(1, 2, 16), &requests) {
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
        // The same seed gives the reference's completion whatever the policy is, and the other way round.
        let ids = |policy, reference, m: f32| {
            let finished = answers(
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
    fn a_completion_depends_on_its_seed_not_on_its_slot_or_its_company() {
        let requests: Vec<Request> = (0..9)
            .map(|key| request(key, &[0, 2 + key as u32 % 6], &[0.5, 0.5], 12))
            .collect();
        let crowded = answers(sampler(1, 2, 18), &requests);
        let cramped = answers(sampler(1, 2, 4), &requests);
        let reversed: Vec<Request> = requests.iter().rev().cloned().collect();
        let backwards = answers(sampler(1, 2, 7), &reversed);
        let ids = |finished: &[Finished]| -> Vec<Vec<u32>> {
            finished
                .iter()
                .flat_map(|f| f.completions.iter().map(|c| c.ids.clone()))
                .collect()
        };
        assert_eq!(ids(&crowded), ids(&cramped));
        assert_eq!(ids(&crowded), ids(&backwards));
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
        let mut room = Vec::new();
        let (policy, reference) = (logits(&policy), logits(&reference));
        let mixed = mix(&policy, &reference, m, &mut room);
        let expected: Vec<f64> = (0..9)
            .map(|id| f64::from(log_softmax_at(mixed, id)).exp())
            .collect();
        let draws = 4000;
        let requests: Vec<Request> = (0..draws / 40)
            .map(|key| request(key, &[0, 5], &[m; 40], 1))
            .collect();
        let mut counts = [0f64; 9];
        for finished in answers(sampler(1, 2, 80), &requests) {
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
        // 8 degrees of freedom: 26.1 is passed once in a thousand; the seed is fixed.
        assert!(
            chi_square < 26.1,
            "{chi_square}: {counts:?} against {expected:?}"
        );
    }

    #[test]
    fn what_cannot_be_answered_is_refused_and_a_busy_sampler_keeps_its_policy() {
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
