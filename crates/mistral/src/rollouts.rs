//! Completions of a policy that mistral.rs computes, mixed with Agon's own reference beside it.
//!
//! Each completion has a cached reference of its own, which reads the prompt when the completion begins and
//! one token after the other: so nothing is locked while it computes. What is drawn, and what is recorded of
//! a token, is `model`'s own [`Continuation`]: the same seed draws the same tokens as Agon's own sampler
//! wherever the two agree on the policy's logits, which they do up to rounding. The policy lies in a temporary
//! folder and is loaded anew with every version.

use std::{
    collections::VecDeque,
    fs,
    sync::{Arc, mpsc},
    time::Duration,
};

use messages::Completion;
use model::{
    CompletionWriter, Continuation, DType, Finished, LanguageModel, ModelError, ModelFolder,
    Precision, Request, SamplingSettings, StopTokens,
    decode::{Decoder, Logits, Prefill},
    sampling::{Groups, Scratch, only_idle, share_vocabulary},
    save_folder,
};
use serde_json::json;
use tempfile::TempDir;

use crate::{Asked, Engine, MistralError, Numbers, Source, TokenWriter};

/// How long [`Rollouts::step`] waits for a completion to end, so that new prompts find their way in.
const MOMENT: Duration = Duration::from_millis(10);

/// Files that would give mistral.rs other ends of text than `model` knows.
const OF_THE_TOKENIZER: [&str; 3] = [
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
];

/// What [`Rollouts`] are made of.
pub struct RolloutsParts {
    /// The folder with the tokenizer and the configuration of both models.
    pub folder: ModelFolder,
    /// The policy at the start.
    pub policy: LanguageModel,
    /// The fixed reference, unless it is the policy itself.
    pub reference: Option<LanguageModel>,
    /// How tokens are drawn.
    pub sampling: SamplingSettings,
    /// Completions of one prompt at most.
    pub slots: usize,
    /// How long one completion may take.
    pub patience: Duration,
}

/// A policy that mistral.rs computes and its reference, writing.
pub struct Rollouts {
    folder: ModelFolder,
    /// Without slots: every completion has one of its own. None: the reference is the policy.
    reference: Option<Decoder>,
    sampling: SamplingSettings,
    slots: usize,
    patience: Duration,
    /// None only while another policy is being loaded, or after one could not be.
    policy: Option<Loaded>,
    positions: usize,
    /// The tokens that end completions.
    stops: StopTokens,
    /// Completions to be written: of which request, and which of its completions.
    waiting: VecDeque<(Arc<Request>, usize)>,
    groups: Groups,
    /// Whether a completion is being written.
    is_writing: bool,
    told: mpsc::Sender<Ended>,
    ended: mpsc::Receiver<Ended>,
}

/// A policy in mistral.rs, and where it was read from.
struct Loaded {
    engine: Engine,
    _folder: TempDir,
}

/// A completion that has ended.
struct Ended {
    key: u64,
    index: usize,
    mixing: Mixing,
    result: Result<(), MistralError>,
}

impl Rollouts {
    /// Loads the policy.
    ///
    /// # Errors
    /// When mistral.rs cannot have it, or the models' vocabularies differ.
    pub fn new(parts: RolloutsParts) -> Result<Self, ModelError> {
        let mut positions = parts.policy.config().max_positions;
        if let Some(reference) = &parts.reference {
            share_vocabulary(&parts.policy, reference)?;
            positions = positions.min(reference.config().max_positions);
        }
        let precision = parts.sampling.precision;
        let decoder = |model| Decoder::new(model, precision, 0, positions);
        let (told, ended) = mpsc::channel();
        let loaded = load(&parts.folder, &parts.policy)?;
        Ok(Self {
            stops: parts.policy.config().stops.clone(),
            folder: parts.folder,
            reference: parts.reference.map(decoder).transpose()?,
            sampling: parts.sampling,
            slots: parts.slots,
            patience: parts.patience,
            policy: Some(loaded),
            positions,
            waiting: VecDeque::new(),
            groups: Groups::default(),
            is_writing: false,
            told,
            ended,
        })
    }

    /// Starts on the next completion when none is being written.
    fn start(&mut self) -> Result<(), ModelError> {
        let policy = self.policy.as_ref().ok_or_else(|| {
            ModelError::Engine("write completions: the policy was not loaded".into())
        })?;
        if self.is_writing {
            return Ok(());
        }
        let Some((request, index)) = self.waiting.pop_front() else {
            return Ok(());
        };
        let mixing = self.mixing(&request, index)?;
        let asked = Asked {
            ids: request.ids.clone(),
            max_new_tokens: request.max_new_tokens,
            patience: self.patience,
        };
        let (told, key) = (self.told.clone(), request.key);
        policy.engine.start(asked, mixing, move |mixing, result| {
            let ended = Ended {
                key,
                index,
                mixing,
                result,
            };
            // Nobody listens any more when the rollouts are gone.
            drop(told.send(ended));
        });
        self.is_writing = true;
        Ok(())
    }

    fn mixing(&self, request: &Request, index: usize) -> Result<Mixing, ModelError> {
        let capacity = request.ids.len() + request.max_new_tokens;
        let beside = |reference: &Decoder| reference.with_slots(1, capacity);
        Ok(Mixing {
            prompt: request.ids.clone(),
            continuation: Continuation::new(request, index),
            reference: self.reference.as_ref().map(beside).transpose()?,
            sampling: self.sampling,
            stops: self.stops.clone(),
            scratch: Scratch::default(),
            failure: None,
        })
    }

    fn end(&mut self, ended: Ended) -> Result<(), ModelError> {
        self.is_writing = false;
        let (key, index) = (ended.key, ended.index);
        self.groups.end(key, index, ended.completion()?);
        Ok(())
    }
}

impl CompletionWriter for Rollouts {
    fn admit(&mut self, request: Request) -> Result<(), ModelError> {
        request.fits(self.slots, self.positions)?;
        self.groups.begin(&request);
        let request = Arc::new(request);
        for index in 0..request.mixture_coefs.len() {
            self.waiting.push_back((Arc::clone(&request), index));
        }
        Ok(())
    }

    /// Starts on the next completion, then waits a moment for it to end.
    fn step(&mut self) -> Result<Vec<Finished>, ModelError> {
        self.start()?;
        if let Ok(ended) = self.ended.recv_timeout(MOMENT) {
            self.end(ended)?;
        }
        Ok(self.groups.take_finished())
    }

    fn is_idle(&self) -> bool {
        self.groups.is_empty()
    }

    fn set_policy(
        &mut self,
        policy: LanguageModel,
        precision: Precision,
    ) -> Result<(), ModelError> {
        only_idle(self)?;
        if let Some(reference) = &mut self.reference {
            reference.set_precision(precision)?;
        }
        // The former is let go first: there may be room for one.
        self.policy = None;
        self.policy = Some(load(&self.folder, &policy)?);
        Ok(())
    }
}

impl Ended {
    /// The completion, when all went well.
    fn completion(self) -> Result<Completion, ModelError> {
        let Mixing {
            failure,
            continuation,
            ..
        } = self.mixing;
        if let Some(failure) = failure {
            return Err(failure);
        }
        let failed = |reason: String| ModelError::Engine(format!("write a completion: {reason}"));
        self.result.map_err(|error| failed(error.to_string()))?;
        if !continuation.has_ended() {
            let reason = format!(
                "mistral.rs ended it after token {:?}, which ends no text by the model's config.json and generation_config.json",
                continuation.ids().last()
            );
            return Err(failed(reason));
        }
        Ok(continuation.into_completion())
    }
}

/// Has mistral.rs load this policy, an adapter merged into it, from a folder made for it.
fn load(folder: &ModelFolder, policy: &LanguageModel) -> Result<Loaded, ModelError> {
    let temporary = tempfile::Builder::new().prefix("agon-policy-").tempdir();
    let temporary = temporary.map_err(|source| ModelError::Unwritable {
        path: std::env::temp_dir(),
        source,
    })?;
    let path = temporary.path();
    save_folder(path, folder, &policy.merged()?.to_dtype(DType::F32)?)?;
    let stops: Vec<u32> = policy.config().stops.ids().collect();
    let ends = json!({"eos_token_id": stops}).to_string();
    let unwritable = |source| ModelError::Unwritable {
        path: path.to_owned(),
        source,
    };
    fs::write(path.join("generation_config.json"), ends).map_err(unwritable)?;
    for name in OF_THE_TOKENIZER {
        if path.join(name).exists() {
            fs::remove_file(path.join(name)).map_err(unwritable)?;
        }
    }
    let engine = Engine::load(&Source::folder(path), Numbers::F32);
    Ok(Loaded {
        engine: engine.map_err(|error| ModelError::Engine(format!("load the policy: {error}")))?,
        _folder: temporary,
    })
}

/// Mixes the policy's logits with the reference's, draws, and records.
struct Mixing {
    prompt: Vec<u32>,
    continuation: Continuation,
    /// One slot.
    reference: Option<Decoder>,
    sampling: SamplingSettings,
    stops: StopTokens,
    scratch: Scratch,
    failure: Option<ModelError>,
}

impl Mixing {
    fn write(&mut self, policy: &[f32], context: &[u32]) -> Result<u32, ModelError> {
        let written = self.continuation.ids();
        let (prompt, since) = context.split_at(self.prompt.len().min(context.len()));
        if prompt != self.prompt || since != written {
            let reason = "write a completion: mistral.rs continues other tokens than were written";
            return Err(ModelError::Engine(reason.into()));
        }
        let reference = self.reference_logits()?;
        let reference = reference.as_ref().map_or(policy, |logits| logits.row(0));
        if reference.len() != policy.len() {
            let reason = format!(
                "write a completion: mistral.rs gives {} logits, the vocabulary has {}",
                policy.len(),
                reference.len()
            );
            return Err(ModelError::Engine(reason));
        }
        self.continuation.write(
            (policy, reference),
            &self.sampling,
            &self.stops,
            &mut self.scratch,
        )
    }

    /// The reference's logits of the next token.
    fn reference_logits(&mut self) -> Result<Option<Logits>, ModelError> {
        let Some(reference) = &mut self.reference else {
            return Ok(None);
        };
        let logits = match self.continuation.ids().last() {
            Some(&last) => reference.extend(&[0], &[last])?,
            None => reference.prefill(&[Prefill {
                ids: &self.prompt,
                slots: &[0],
            }])?,
        };
        Ok(Some(logits))
    }
}

impl TokenWriter for Mixing {
    fn next(&mut self, logits: &[f32], context: &[u32]) -> Option<u32> {
        match self.write(logits, context) {
            Ok(token) => Some(token),
            Err(failure) => {
                self.failure.get_or_insert(failure);
                None
            }
        }
    }
}
