//! The reference of a trainer: its log-probabilities of a pass, some of them kept from earlier ones.
//!
//! Does not know what they are compared with.

use messages::Pair;
use model::{LanguageModel, Sequence, Tensor, TokenLogprobs};

use crate::{
    error::LearnerError,
    file_pairs::{index_of, is_from_file},
    trainer::{
        batch::MicroBatch,
        reference_logprobs::{ReferenceCache, ReferenceLogprobs},
    },
};

/// The reference model, and its log-probabilities of pairs from files.
pub(crate) struct Reference {
    model: LanguageModel,
    /// `None`: they are computed in every step.
    cache: Option<ReferenceCache>,
}

/// What is known of the reference in one pass.
pub(crate) enum ReferencePass {
    /// All of it, computed now.
    Computed(TokenLogprobs),
    /// log ref of the completions' tokens `[R]`, some of it kept from earlier passes.
    Logp(Tensor),
}

impl ReferencePass {
    /// log ref of the first `count` response tokens `[count]`, without gradient.
    pub(crate) fn logp(&self, count: usize) -> Result<Tensor, LearnerError> {
        let logp = match self {
            Self::Computed(reference) => &reference.logp,
            Self::Logp(logp) => logp,
        };
        Ok(logp.narrow(0, 0, count)?.detach())
    }
}

impl Reference {
    pub(crate) fn new(model: LanguageModel) -> Self {
        Self { model, cache: None }
    }

    /// Keeps log-probabilities of pairs from files.
    pub(crate) fn keep(&mut self, kept: ReferenceLogprobs) {
        self.cache = Some(ReferenceCache::open(kept));
    }

    /// Saves the kept log-probabilities.
    pub(crate) fn save(&self) {
        if let Some(cache) = &self.cache {
            cache.save();
        }
    }

    /// The reference on a pass, whose sequences are the completions and what follows them.
    ///
    /// # Errors
    /// If a sequence does not fit the model, or the device is out of memory.
    pub(crate) fn pass(
        &mut self,
        micro: &MicroBatch<'_>,
        sequences: &[Sequence<'_>],
    ) -> Result<ReferencePass, LearnerError> {
        Ok(match &mut self.cache {
            Some(cache) => ReferencePass::Logp(kept_logp(&self.model, cache, micro)?),
            None => ReferencePass::Computed(self.model.logprobs(sequences)?),
        })
    }
}

/// log ref of the completions' tokens `[R]`: of pairs from files as kept in `cache`, which gets those that it lacks.
fn kept_logp(
    reference: &LanguageModel,
    cache: &mut ReferenceCache,
    micro: &MicroBatch<'_>,
) -> Result<Tensor, LearnerError> {
    let pairs = || micro.pairs().iter().map(|labelled| &labelled.pair);
    let tokens = |pair: &Pair| pair.completions.iter().map(|c| c.ids.len()).sum::<usize>();
    // Decided before any is added: at the end of a pass a pair may be in a batch twice.
    let kept: Vec<Option<Box<[f32]>>> = pairs()
        .map(|pair| {
            let id = Some(pair.id()).filter(|&id| is_from_file(id))?;
            cache.get(index_of(id), tokens(pair)).map(Box::from)
        })
        .collect();
    let missing = pairs().zip(&kept).filter(|(_, kept)| kept.is_none());
    let sequences: Vec<Sequence<'_>> = missing
        .flat_map(|(pair, _)| {
            let prompt = pair.prompt.ids.as_slice();
            let completions = pair.completions.iter();
            completions.map(move |c| Sequence {
                prompt,
                completion: &c.ids,
            })
        })
        .collect();
    let computed: Vec<f32> = match sequences.is_empty() {
        true => Vec::new(),
        false => reference.logprobs(&sequences)?.logp.to_vec1()?,
    };
    let (mut rest, mut logp) = (computed.as_slice(), Vec::new());
    for (pair, kept) in pairs().zip(&kept) {
        let Some(kept) = kept else {
            let (own, after) = rest.split_at(tokens(pair));
            if is_from_file(pair.id()) {
                cache.insert(index_of(pair.id()), own);
            }
            logp.extend_from_slice(own);
            rest = after;
            continue;
        };
        logp.extend_from_slice(kept);
    }
    Ok(Tensor::new(logp, reference.device())?)
}
