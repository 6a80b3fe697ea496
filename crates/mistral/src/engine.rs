//! A model loaded by mistral.rs; the only file that uses the mistral.rs API.
//!
//! mistral.rs runs on the CPU, from local files, without its prefix cache. It decodes greedily: a logits processor sets
//! every logit except that of the selected token to minus infinity, so mistral.rs draws no random numbers.

use std::{
    num::NonZeroUsize,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, Once, PoisonError, mpsc},
    thread::{self, JoinHandle},
    time::Duration,
};

use either::Either;
use messages::{Message, PromptText};
use mistralrs::{
    CustomLogitsProcessor, DefaultSchedulerMethod, Device, DeviceMapSetting, IsqType, MistralRs,
    ModelDType, NormalRequest, Request, RequestLike, RequestMessage, Response, SamplingParams,
    SchedulerConfig, Tensor, TextMessageRole, TextMessages,
    core::{
        AdapterPaths, GGUFLoaderBuilder, GGUFSpecificConfig, Loader, LocalModelPaths,
        MistralRsBuilder, ModelPaths, NormalLoaderBuilder, NormalSpecificConfig, Pipeline,
        TokenizationRequest,
    },
    parse_isq_value,
};
use tokio::{runtime::Runtime, sync::mpsc::Sender, time::timeout};

use crate::{
    error::MistralError,
    model_files::ModelFiles,
    request::{EngineRequest, LoadDtype, TokenSelector},
};

/// Timeout of loading a model, ample for any model that fits into memory.
const LOAD_TIMEOUT: Duration = Duration::from_secs(3600);

/// Name of the thread that loads a model.
const LOAD_THREAD: &str = "mistral-load";

/// Timeout of tokenizing a prompt, which queues behind running completions.
const ENCODE_TIMEOUT: Duration = Duration::from_secs(600);

/// A model loaded by mistral.rs. Dropping it unloads the model.
pub struct Engine {
    path: PathBuf,
    requests: Sender<Request>,
    decode: Decode,
    end_tokens: Vec<u32>,
    has_chat_template: bool,
    /// Awaits responses; `None` only during [`Drop`].
    runtime: Option<Runtime>,
    /// Keeps the thread of mistral.rs alive as long as the engine.
    _mistral: Arc<MistralRs>,
}

/// Decodes tokens into text; the flag skips special tokens.
type Decode = Box<dyn Fn(&[u32], bool) -> String + Send + Sync>;

/// The loaded pipeline of mistral.rs.
type SharedPipeline = Arc<tokio::sync::Mutex<dyn Pipeline + Send + Sync>>;

impl Engine {
    /// Loads a model. Panics of mistral.rs are returned as errors.
    ///
    /// # Errors
    /// If a file is missing or mistral.rs cannot load it; the error names the file and a remedy.
    pub fn load(files: &ModelFiles, dtype: LoadDtype) -> Result<Self, MistralError> {
        files.check()?;
        let isq = isq(files)?;
        let load_error = |reason: String| MistralError::Load {
            path: files.path.clone(),
            remedy: remedy(files),
            reason,
        };
        let (sender, receiver) = mpsc::channel();
        silence_panics_of_the_load_thread();
        let thread = thread::Builder::new().name(LOAD_THREAD.into());
        let files = files.clone();
        let thread = thread.spawn(move || {
            // The receiver is gone after a timeout.
            drop(sender.send(open(&files, dtype, isq)));
        });
        let thread = thread.map_err(|error| load_error(error.to_string()))?;
        match receiver.recv_timeout(LOAD_TIMEOUT) {
            Ok(engine) => engine?.map_err(load_error),
            Err(mpsc::RecvTimeoutError::Timeout) => Err(MistralError::Timeout(LOAD_TIMEOUT)),
            Err(mpsc::RecvTimeoutError::Disconnected) => Err(load_error(panic_message(thread))),
        }
    }

    /// Whether the model has a chat template, which dialogues need.
    #[must_use]
    pub fn has_chat_template(&self) -> bool {
        self.has_chat_template
    }

    /// Tokens that end a completion in mistral.rs.
    #[must_use]
    pub fn end_tokens(&self) -> &[u32] {
        &self.end_tokens
    }

    /// Tokenizes a prompt: plain text, or a dialogue rendered by the chat template.
    ///
    /// # Errors
    /// If there is no chat template or it rejects the dialogue.
    pub fn encode(&self, prompt: &PromptText) -> Result<Vec<u32>, MistralError> {
        let text = match prompt {
            PromptText::Text(text) => Either::Right(text.clone()),
            PromptText::Dialogue(_) if !self.has_chat_template => {
                return Err(MistralError::Prompt {
                    reason: format!("{} has no chat template", self.path.display()),
                });
            }
            PromptText::Dialogue(prompt) => {
                Either::Left(dialogue(&prompt.messages)?.messages_ref().to_vec())
            }
        };
        let (response, mut ids) = tokio::sync::mpsc::channel(1);
        let request = Request::Tokenize(TokenizationRequest {
            text,
            tools: None,
            add_generation_prompt: true,
            add_special_tokens: true,
            enable_thinking: None,
            reasoning_effort: None,
            response,
        });
        let response = async {
            self.requests.send(request).await.ok()?;
            ids.recv().await
        };
        // A timeout must be created inside the runtime.
        let response = self
            .runtime()
            .block_on(async { timeout(ENCODE_TIMEOUT, response).await });
        let response = response.map_err(|_| MistralError::Timeout(ENCODE_TIMEOUT))?;
        let ids = response.ok_or(MistralError::ThreadEnded)?;
        ids.map_err(|error| MistralError::Prompt {
            reason: error.to_string(),
        })
    }

    /// Decodes tokens without the special ones.
    #[must_use]
    pub fn decode(&self, ids: &[u32]) -> String {
        (self.decode)(ids, true)
    }

    /// Decodes tokens, special ones included.
    #[must_use]
    pub fn decode_all(&self, ids: &[u32]) -> String {
        (self.decode)(ids, false)
    }

    /// Queues a completion whose tokens are chosen by `selector`; calls `on_end` on another thread when it has ended.
    /// Completions run one after the other, and the time spent in the queue counts towards the timeout.
    pub fn start<S: TokenSelector>(
        &self,
        request: EngineRequest,
        selector: S,
        on_end: impl FnOnce(S, Result<(), MistralError>) + Send + 'static,
    ) {
        let selector = Arc::new(SharedSelector(Mutex::new(Some(selector))));
        let (response, mut responses) = tokio::sync::mpsc::channel(1);
        let processor = SelectedToken {
            selector: Arc::clone(&selector),
            end_token: self.end_tokens.first().copied().unwrap_or(0),
        };
        let messages = RequestMessage::CompletionTokens(request.ids);
        // Temperature 0 is greedy; without a temperature mistral.rs uses 1.
        let sampling = SamplingParams {
            temperature: Some(0.0),
            max_len: Some(request.max_new_tokens),
            ..SamplingParams::neutral()
        };
        let limit = request.timeout;
        let mut request = NormalRequest::new_simple(messages, sampling, response, 0, None, None);
        request.logits_processors =
            Some(vec![Arc::new(processor) as Arc<dyn CustomLogitsProcessor>]);
        let requests = self.requests.clone();
        self.runtime().spawn(async move {
            let response = timeout(limit, async {
                let request = Request::Normal(Box::new(request));
                requests.send(request).await.ok()?;
                responses.recv().await
            });
            let result = match response.await {
                Ok(Some(response)) => completion_result(response),
                Ok(None) => Err(MistralError::ThreadEnded),
                Err(_) => Err(MistralError::Timeout(limit)),
            };
            // Without its selector, a completion that is still running ends at its next token.
            if let Some(selector) = selector.take() {
                on_end(selector, result);
            }
        });
    }

    fn runtime(&self) -> &Runtime {
        self.runtime
            .as_ref()
            .expect("the runtime is taken only on drop")
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            // Dropping must not block: it may happen in an async context.
            runtime.shutdown_background();
        }
    }
}

/// The selector of a running completion; empty once the completion has ended.
struct SharedSelector<S>(Mutex<Option<S>>);

impl<S> SharedSelector<S> {
    fn take(&self) -> Option<S> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// Logits processor that forces the token chosen by a selector.
struct SelectedToken<S> {
    selector: Arc<SharedSelector<S>>,
    /// Token that ends a completion whose selector is gone or returns `None`.
    end_token: u32,
}

impl<S: TokenSelector> CustomLogitsProcessor for SelectedToken<S> {
    fn apply(&self, logits: &Tensor, context: &[u32]) -> mistralrs::Result<Tensor> {
        let mut row: Vec<f32> = logits.to_vec1()?;
        let mut selector = self
            .selector
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let token = selector
            .as_mut()
            .and_then(|selector| selector.select(&row, context));
        let token = token.unwrap_or(self.end_token) as usize;
        row.fill(f32::NEG_INFINITY);
        if let Some(logit) = row.get_mut(token) {
            *logit = 0.0;
        }
        let width = row.len();
        Tensor::from_vec(row, width, logits.device())
    }
}

/// The result of a completion.
fn completion_result(response: Response) -> Result<(), MistralError> {
    match response {
        Response::CompletionDone(_) => Ok(()),
        Response::InternalError(error) | Response::ValidationError(error) => {
            Err(MistralError::Failed(error.to_string()))
        }
        Response::CompletionModelError(error, _) => Err(MistralError::Failed(error)),
        _ => Err(MistralError::Failed(
            "the response is not a completion".into(),
        )),
    }
}

/// Converts a dialogue to mistral.rs messages; messages with anything but a role and a text are rejected.
fn dialogue(messages: &[Message]) -> Result<TextMessages, MistralError> {
    let mut turns = TextMessages::new();
    for message in messages {
        let has_more = message.fields().len() > 2;
        let text = message.content().as_str().filter(|_| !has_more);
        let text = text.ok_or_else(|| MistralError::Prompt {
            reason:
                "a message has more than a role and a text, which is not supported with mistral.rs"
                    .into(),
        })?;
        turns = turns.add_message(TextMessageRole::Custom(message.role().to_owned()), text);
    }
    Ok(turns)
}

/// Parses the type of in-situ quantisation.
fn isq(files: &ModelFiles) -> Result<Option<IsqType>, MistralError> {
    let name = files.isq.as_deref();
    let isq = name.map(|name| parse_isq_value(name, Some(&Device::Cpu)));
    isq.transpose().map_err(|reason| MistralError::Unusable {
        path: files.path.clone(),
        reason,
    })
}

/// Loads the model on the calling thread. The inner error is the message of mistral.rs.
fn open(
    files: &ModelFiles,
    dtype: LoadDtype,
    isq: Option<IsqType>,
) -> Result<Result<Engine, String>, MistralError> {
    let (weights, config) = (files.weights()?, files.config()?);
    let config = config.as_ref().map(|file| file.path());
    let pipeline = pipeline(files, weights, config, dtype, isq);
    Ok(pipeline.and_then(|pipeline| engine(files, &pipeline)))
}

fn pipeline(
    files: &ModelFiles,
    weights: Vec<PathBuf>,
    config: Option<&Path>,
    dtype: LoadDtype,
    isq: Option<IsqType>,
) -> Result<SharedPipeline, String> {
    let text = |path: &Path| path.to_string_lossy().into_owned();
    let template = files.chat_template.as_deref().map(text);
    let model = text(&files.path);
    let loader: Box<dyn Loader> = if files.is_gguf() {
        let config = GGUFSpecificConfig::default();
        let names = vec![model.clone()];
        GGUFLoaderBuilder::new(None, None, model, names, config, false, template).build()
    } else {
        let config = NormalSpecificConfig::default();
        NormalLoaderBuilder::new(config, None, None, Some(model), false, template)
            .build(None)
            .map_err(|error| format!("{error:#}"))?
    };
    let dtype = match dtype {
        LoadDtype::F32 => ModelDType::F32,
        LoadDtype::Auto => ModelDType::Auto,
    };
    loader
        .load_model_from_path(
            &model_paths(files, weights, config),
            &dtype,
            &Device::Cpu,
            true,
            DeviceMapSetting::dummy(),
            isq,
            None,
        )
        .map_err(|error| format!("{error:#}"))
}

/// Paths of the model's files, so that mistral.rs searches for none.
fn model_paths(
    files: &ModelFiles,
    weights: Vec<PathBuf>,
    config: Option<&Path>,
) -> Box<dyn ModelPaths> {
    let default_tokenizer = if files.is_gguf() {
        PathBuf::new()
    } else {
        files.path.join("tokenizer.json")
    };
    Box::new(LocalModelPaths {
        tokenizer_filename: files.tokenizer.clone().unwrap_or(default_tokenizer),
        config_filename: config.map_or_else(|| files.path.join("config.json"), Path::to_owned),
        template_filename: files
            .optional("chat_template.jinja")
            .or_else(|| files.optional("tokenizer_config.json")),
        filenames: weights,
        adapter_paths: AdapterPaths::None,
        gen_conf: files.optional("generation_config.json"),
        preprocessor_config: None,
        processor_config: None,
        chat_template_json_filename: files.optional("chat_template.json"),
    })
}

fn engine(files: &ModelFiles, pipeline: &SharedPipeline) -> Result<Engine, String> {
    let (tokenizer, end_tokens, has_chat_template) = {
        let pipeline = pipeline.blocking_lock();
        let template = pipeline.get_chat_template();
        (
            pipeline.tokenizer().ok_or("the model has no tokenizer")?,
            pipeline.get_metadata().eos_tok.clone(),
            template.is_some_and(|template| template.has_chat_template()),
        )
    };
    // Batch size 1: in a batch on the CPU, mistral.rs 0.8.1 gives every sequence the attention of the last one.
    let method = SchedulerConfig::DefaultScheduler {
        method: DefaultSchedulerMethod::Fixed(NonZeroUsize::MIN),
    };
    let mistral = MistralRsBuilder::new(pipeline.clone(), method, false, None);
    let mistral = mistral.with_no_prefix_cache(true);
    // In a single-threaded runtime mistral.rs skips its warm-up run.
    let build_runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let mistral = build_runtime
        .map_err(|error| error.to_string())?
        .block_on(mistral.build());
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .thread_name("mistral-wait")
        .enable_time()
        .build()
        .map_err(|error| error.to_string())?;
    Ok(Engine {
        path: files.path.clone(),
        requests: mistral
            .get_sender(None)
            .map_err(|error| error.to_string())?,
        decode: Box::new(move |ids, skip_special| {
            tokenizer.decode(ids, skip_special).unwrap_or_default()
        }),
        end_tokens,
        has_chat_template,
        runtime: Some(runtime),
        _mistral: mistral,
    })
}

/// Suppresses the panic message of the load thread: mistral.rs panics on malformed files, and the panic is returned as
/// an error.
fn silence_panics_of_the_load_thread() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let previous_hook = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            if thread::current().name() != Some(LOAD_THREAD) {
                previous_hook(panic);
            }
        }));
    });
}

/// Panic message of a thread.
fn panic_message(thread: JoinHandle<()>) -> String {
    let Err(payload) = thread.join() else {
        return "the load thread ended without a result".into();
    };
    let text = payload.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| payload.downcast_ref::<&str>().copied());
    text.unwrap_or("it panicked").to_owned()
}

/// Suggested remedy for a load error.
fn remedy(files: &ModelFiles) -> &'static str {
    if files.is_gguf() {
        "download or convert the file again, from an architecture that mistral.rs supports"
    } else {
        "use a complete folder of an architecture that mistral.rs supports, such as Llama, Mistral, Qwen2 or Qwen3"
    }
}
