//! Rollout sampler with the policy in mistral.rs and the reference in Agon's own decoder.
//!
//! Each completion has its own reference decoder with one KV-cache slot, prefilled when the completion starts, so no
//! lock is held while the reference computes. Sampling and recording are those of `model`'s [`CompletionSampler`]: the
//! same seed samples the same tokens as Agon's own sampler wherever the policy logits agree, which they do up to
//! rounding. Every policy version is saved to a temporary folder and loaded from there.

use std::{
    collections::VecDeque,
    fs,
    sync::{Arc, mpsc},
    time::Duration,
};

use messages::Completion;
use model::{
    CompletionSampler, DType, Finished, LanguageModel, ModelError, ModelFolder, Precision, Request,
    Sampler, SamplingSettings, StopTokens,
    decode::{Decoder, Logits, Prefill},
    sampling::{ActiveRequests, Scratch, TokenLogits, ensure_idle, ensure_shared_vocabulary},
    save_folder,
};
use serde_json::json;
use tempfile::TempDir;

use crate::{
    engine::Engine,
    error::MistralError,
    model_files::ModelFiles,
    request::{EngineRequest, LoadDtype, TokenSelector},
};

/// Maximum wait of [`Rollouts::step`] for a completion, so that new requests are admitted in between.
const STEP_TIMEOUT: Duration = Duration::from_millis(10);

/// Files that could give mistral.rs other stop tokens than those of `model`; they are removed.
const TOKENIZER_FILES: [&str; 3] = [
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
];

/// Constituents of [`Rollouts`].
pub struct RolloutsParts {
    /// Folder with the tokenizer and the configuration of both models.
    pub folder: ModelFolder,
    /// Initial policy.
    pub policy: LanguageModel,
    /// Reference model; `None` if it is the policy itself.
    pub reference: Option<LanguageModel>,
    /// Sampling settings.
    pub sampling: SamplingSettings,
    /// Maximum completions per prompt.
    pub slots: usize,
    /// Timeout of one completion.
    pub timeout: Duration,
}

/// Sampler with the policy in mistral.rs and the reference in Agon's decoder.
pub struct Rollouts {
    folder: ModelFolder,
    /// Reference decoder without slots, from which each completion derives its own. `None`: the reference is the
    /// policy.
    reference: Option<Decoder>,
    sampling: SamplingSettings,
    slots: usize,
    timeout: Duration,
    /// `None` while a policy is being loaded and after loading failed.
    policy: Option<LoadedPolicy>,
    /// Maximum sequence length of both models.
    positions: usize,
    /// Tokens that end a completion.
    stops: StopTokens,
    /// Queued completions: the request and the index among its completions.
    queue: VecDeque<(Arc<Request>, usize)>,
    active: ActiveRequests,
    /// Whether a completion is running.
    is_running: bool,
    sender: mpsc::Sender<EndedCompletion>,
    ended: mpsc::Receiver<EndedCompletion>,
}

/// A policy loaded in mistral.rs and its temporary folder.
struct LoadedPolicy {
    engine: Engine,
    _folder: TempDir,
}

/// A completion that has ended, successfully or not.
struct EndedCompletion {
    key: u64,
    index: usize,
    selector: MixtureSelector,
    result: Result<(), MistralError>,
}

impl Rollouts {
    /// Loads the policy.
    ///
    /// # Errors
    /// If mistral.rs cannot load the policy, or the vocabularies of the models differ.
    pub fn new(parts: RolloutsParts) -> Result<Self, ModelError> {
        let mut positions = parts.policy.config().max_positions;
        if let Some(reference) = &parts.reference {
            ensure_shared_vocabulary(&parts.policy, reference)?;
            positions = positions.min(reference.config().max_positions);
        }
        let precision = parts.sampling.precision;
        let decoder = |model| Decoder::new(model, precision, 0, positions);
        let (sender, ended) = mpsc::channel();
        let loaded = load(&parts.folder, &parts.policy)?;
        Ok(Self {
            stops: parts.policy.config().stops.clone(),
            folder: parts.folder,
            reference: parts.reference.map(decoder).transpose()?,
            sampling: parts.sampling,
            slots: parts.slots,
            timeout: parts.timeout,
            policy: Some(loaded),
            positions,
            queue: VecDeque::new(),
            active: ActiveRequests::default(),
            is_running: false,
            sender,
            ended,
        })
    }

    /// Starts the next queued completion unless one is running.
    fn start(&mut self) -> Result<(), ModelError> {
        let policy = self
            .policy
            .as_ref()
            .ok_or_else(|| ModelError::Engine("sample completions: no policy is loaded".into()))?;
        if self.is_running {
            return Ok(());
        }
        let Some((request, index)) = self.queue.pop_front() else {
            return Ok(());
        };
        let selector = self.selector(&request, index)?;
        let engine_request = EngineRequest {
            ids: request.ids.clone(),
            max_new_tokens: request.max_new_tokens,
            timeout: self.timeout,
        };
        let (sender, key) = (self.sender.clone(), request.key);
        policy
            .engine
            .start(engine_request, selector, move |selector, result| {
                let ended = EndedCompletion {
                    key,
                    index,
                    selector,
                    result,
                };
                // The receiver is gone once the sampler is dropped.
                drop(sender.send(ended));
            });
        self.is_running = true;
        Ok(())
    }

    fn selector(&self, request: &Request, index: usize) -> Result<MixtureSelector, ModelError> {
        let capacity = request.ids.len() + request.max_new_tokens;
        let with_slot = |reference: &Decoder| reference.with_slots(1, capacity);
        let reference = match &self.reference {
            None => TokenReference::Policy,
            Some(_) if !request.needs_reference() => TokenReference::Unrecorded,
            Some(reference) => TokenReference::Decoder(with_slot(reference)?),
        };
        Ok(MixtureSelector {
            prompt: request.ids.clone(),
            vocabulary: self.folder.config.vocab_size,
            completion_sampler: CompletionSampler::new(request, index),
            reference,
            sampling: self.sampling,
            stops: self.stops.clone(),
            scratch: Scratch::default(),
            failure: None,
        })
    }

    fn end(&mut self, ended: EndedCompletion) -> Result<(), ModelError> {
        self.is_running = false;
        let (key, index) = (ended.key, ended.index);
        self.active.end(key, index, ended.completion()?);
        Ok(())
    }
}

impl Sampler for Rollouts {
    fn admit(&mut self, request: Request) -> Result<(), ModelError> {
        request.check_capacity(self.slots, self.positions)?;
        self.active.begin(&request);
        let request = Arc::new(request);
        for index in 0..request.mixture_coefs.len() {
            self.queue.push_back((Arc::clone(&request), index));
        }
        Ok(())
    }

    /// Starts the next completion, then waits up to `STEP_TIMEOUT` for it to end.
    fn step(&mut self) -> Result<Vec<Finished>, ModelError> {
        self.start()?;
        if let Ok(ended) = self.ended.recv_timeout(STEP_TIMEOUT) {
            self.end(ended)?;
        }
        Ok(self.active.take_finished())
    }

    fn is_idle(&self) -> bool {
        self.active.is_empty()
    }

    fn set_policy(
        &mut self,
        policy: LanguageModel,
        precision: Precision,
    ) -> Result<(), ModelError> {
        ensure_idle(self)?;
        if let Some(reference) = &mut self.reference {
            reference.set_precision(precision)?;
        }
        // The previous policy is dropped first: memory may suffice for one only.
        self.policy = None;
        self.policy = Some(load(&self.folder, &policy)?);
        Ok(())
    }
}

impl EndedCompletion {
    /// The completion, or why it failed.
    fn completion(self) -> Result<Completion, ModelError> {
        let MixtureSelector {
            failure,
            completion_sampler,
            ..
        } = self.selector;
        if let Some(failure) = failure {
            return Err(failure);
        }
        let failed = |reason: String| ModelError::Engine(format!("sample a completion: {reason}"));
        self.result.map_err(|error| failed(error.to_string()))?;
        if !completion_sampler.has_ended() {
            let reason = format!(
                "mistral.rs ended it after token {:?}, which is no end-of-text token in the model's config.json and generation_config.json",
                completion_sampler.ids().last()
            );
            return Err(failed(reason));
        }
        Ok(completion_sampler.into_completion())
    }
}

/// Saves the policy, its adapter merged, to a temporary folder and loads it in mistral.rs.
fn load(folder: &ModelFolder, policy: &LanguageModel) -> Result<LoadedPolicy, ModelError> {
    let temporary = tempfile::Builder::new().prefix("agon-policy-").tempdir();
    let temporary = temporary.map_err(|source| ModelError::Unwritable {
        path: std::env::temp_dir(),
        source,
    })?;
    let path = temporary.path();
    save_folder(path, folder, &policy.merged()?.to_dtype(DType::F32)?)?;
    let stops: Vec<u32> = policy.config().stops.ids().collect();
    let generation_config = json!({"eos_token_id": stops}).to_string();
    let unwritable = |source| ModelError::Unwritable {
        path: path.to_owned(),
        source,
    };
    fs::write(path.join("generation_config.json"), generation_config).map_err(unwritable)?;
    for name in TOKENIZER_FILES {
        if path.join(name).exists() {
            fs::remove_file(path.join(name)).map_err(unwritable)?;
        }
    }
    let engine = Engine::load(&ModelFiles::folder(path), LoadDtype::F32);
    Ok(LoadedPolicy {
        engine: engine.map_err(|error| ModelError::Engine(format!("load the policy: {error}")))?,
        _folder: temporary,
    })
}

/// Reference of a completion.
enum TokenReference {
    /// The policy is its own reference.
    Policy,
    /// log ref is not recorded.
    Unrecorded,
    /// A decoder with one slot.
    Decoder(Decoder),
}

/// Samples tokens from the mixture of policy and reference and records their log-probabilities.
struct MixtureSelector {
    prompt: Vec<u32>,
    /// Number of logits that a token has.
    vocabulary: usize,
    completion_sampler: CompletionSampler,
    reference: TokenReference,
    sampling: SamplingSettings,
    stops: StopTokens,
    scratch: Scratch,
    failure: Option<ModelError>,
}

impl MixtureSelector {
    fn sample(&mut self, policy: &[f32], context: &[u32]) -> Result<u32, ModelError> {
        let sampled = self.completion_sampler.ids();
        let (prompt, generated) = context.split_at(self.prompt.len().min(context.len()));
        if prompt != self.prompt || generated != sampled {
            let reason =
                "sample a completion: the context of mistral.rs differs from the sampled tokens";
            return Err(ModelError::Engine(reason.into()));
        }
        if policy.len() != self.vocabulary {
            let reason = format!(
                "sample a completion: mistral.rs returned {} logits for a vocabulary of {}",
                policy.len(),
                self.vocabulary
            );
            return Err(ModelError::Engine(reason));
        }
        let logits = self.reference_logits()?;
        let reference = match &self.reference {
            TokenReference::Policy => Some(policy),
            TokenReference::Unrecorded | TokenReference::Decoder(_) => {
                logits.as_ref().map(|logits| logits.row(0))
            }
        };
        self.completion_sampler.sample(
            TokenLogits { policy, reference },
            &self.sampling,
            &self.stops,
            &mut self.scratch,
        )
    }

    /// Logits of the reference for the next token; `None` without a decoder.
    fn reference_logits(&mut self) -> Result<Option<Logits>, ModelError> {
        let TokenReference::Decoder(reference) = &mut self.reference else {
            return Ok(None);
        };
        let logits = match self.completion_sampler.ids().last() {
            Some(&last) => reference.extend(&[0], &[last])?,
            None => reference.prefill(&[Prefill {
                ids: &self.prompt,
                slots: &[0],
            }])?,
        };
        Ok(Some(logits))
    }
}

impl TokenSelector for MixtureSelector {
    fn select(&mut self, logits: &[f32], context: &[u32]) -> Option<u32> {
        match self.sample(logits, context) {
            Ok(token) => Some(token),
            Err(failure) => {
                self.failure.get_or_insert(failure);
                None
            }
        }
    }
}
