//! A model that mistral.rs has loaded: the one file that knows mistral.rs.
//!
//! mistral.rs computes on the CPU, from local files, without its prefix cache and without random numbers:
//! the token writer's choice is laid into the logits, all others at minus infinity, and the likeliest is
//! taken.

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

use crate::{Asked, MistralError, Numbers, Source, TokenWriter};

/// How long loading may take: far more than any disk needs for what fits into memory.
const LOADING: Duration = Duration::from_secs(3600);

/// The thread on which a model is loaded.
const LOADER: &str = "mistral-load";

/// How long a prompt may wait to be put into tokens: behind all that is being written.
const ENCODING: Duration = Duration::from_secs(600);

/// A model that mistral.rs has loaded. When it is dropped, the model is.
pub struct Engine {
    path: PathBuf,
    requests: Sender<Request>,
    decode: Decode,
    end_tokens: Vec<u32>,
    has_chat_template: bool,
    /// Waits for answers; none in a moment of [`Drop`] only.
    runtime: Option<Runtime>,
    /// Ends mistral.rs's thread with the engine.
    _mistral: Arc<MistralRs>,
}

/// Puts tokens into text, without special ones if so told.
type Decode = Box<dyn Fn(&[u32], bool) -> String + Send + Sync>;

/// What loading leaves.
type SharedPipeline = Arc<tokio::sync::Mutex<dyn Pipeline + Send + Sync>>;

impl Engine {
    /// Loads `source`. What panics in mistral.rs is an error here.
    ///
    /// # Errors
    /// When a file is missing or mistral.rs does not load it, with the file and what may help.
    pub fn load(source: &Source, numbers: Numbers) -> Result<Self, MistralError> {
        source.check()?;
        let isq = isq(source)?;
        let refused = |reason: String| MistralError::Load {
            path: source.path.clone(),
            remedy: remedy(source),
            reason,
        };
        let (done, loaded) = mpsc::channel();
        tell_no_panics_of_the_loader();
        let thread = thread::Builder::new().name(LOADER.into());
        let loading = source.clone();
        let thread = thread.spawn(move || {
            // Nobody listens any more when loading took too long.
            drop(done.send(open(&loading, (numbers, isq))));
        });
        let thread = thread.map_err(|error| refused(error.to_string()))?;
        match loaded.recv_timeout(LOADING) {
            Ok(engine) => engine?.map_err(refused),
            Err(mpsc::RecvTimeoutError::Timeout) => Err(MistralError::Late(LOADING)),
            Err(mpsc::RecvTimeoutError::Disconnected) => Err(refused(panic_of(thread))),
        }
    }

    /// Whether it can be sent dialogues.
    #[must_use]
    pub fn has_chat_template(&self) -> bool {
        self.has_chat_template
    }

    /// The tokens after which mistral.rs ends a completion.
    #[must_use]
    pub fn end_tokens(&self) -> &[u32] {
        &self.end_tokens
    }

    /// The tokens of a prompt: text as it stands, or a dialogue through the chat template.
    ///
    /// # Errors
    /// When there is no template, or it refuses the dialogue.
    pub fn encode(&self, prompt: &PromptText) -> Result<Vec<u32>, MistralError> {
        let text = match prompt {
            PromptText::Text(text) => Either::Right(text.clone()),
            PromptText::Dialogue(_) if !self.has_chat_template => {
                return Err(MistralError::Prompt {
                    reason: format!("{} has no chat template", self.path.display()),
                });
            }
            PromptText::Dialogue(asked) => {
                Either::Left(dialogue(&asked.messages)?.messages_ref().to_vec())
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
        let answer = async {
            self.requests.send(request).await.ok()?;
            ids.recv().await
        };
        // A clock can only be set inside the runtime.
        let answered = self
            .runtime()
            .block_on(async { timeout(ENCODING, answer).await });
        let answered = answered.map_err(|_| MistralError::Late(ENCODING))?;
        let ids = answered.ok_or(MistralError::Gone)?;
        ids.map_err(|error| MistralError::Prompt {
            reason: error.to_string(),
        })
    }

    /// The text of these tokens without special ones.
    #[must_use]
    pub fn decode(&self, ids: &[u32]) -> String {
        (self.decode)(ids, true)
    }

    /// The text of these tokens, special ones too.
    #[must_use]
    pub fn decode_all(&self, ids: &[u32]) -> String {
        (self.decode)(ids, false)
    }

    /// Has `writer` write a completion, and tells `then` when it has ended, on another thread. Completions are
    /// written one after the other, and one that waits for another uses up its patience.
    pub fn start<W: TokenWriter>(
        &self,
        asked: Asked,
        writer: W,
        then: impl FnOnce(W, Result<(), MistralError>) + Send + 'static,
    ) {
        let seat = Arc::new(Seat(Mutex::new(Some(writer))));
        let (response, mut responses) = tokio::sync::mpsc::channel(1);
        let processor = Writing {
            seat: Arc::clone(&seat),
            end_token: self.end_tokens.first().copied().unwrap_or(0),
        };
        let messages = RequestMessage::CompletionTokens(asked.ids);
        // A temperature of 0 takes the likeliest; none would be 1.
        let sampling = SamplingParams {
            temperature: Some(0.0),
            max_len: Some(asked.max_new_tokens),
            ..SamplingParams::neutral()
        };
        let mut request = NormalRequest::new_simple(messages, sampling, response, 0, None, None);
        request.logits_processors =
            Some(vec![Arc::new(processor) as Arc<dyn CustomLogitsProcessor>]);
        let requests = self.requests.clone();
        self.runtime().spawn(async move {
            let answered = timeout(asked.patience, async {
                let request = Request::Normal(Box::new(request));
                requests.send(request).await.ok()?;
                responses.recv().await
            });
            let ended = match answered.await {
                Ok(Some(response)) => outcome(response),
                Ok(None) => Err(MistralError::Gone),
                Err(_) => Err(MistralError::Late(asked.patience)),
            };
            // From here on the completion, if it goes on, ends at its next token.
            if let Some(writer) = seat.leave() {
                then(writer, ended);
            }
        });
    }

    fn runtime(&self) -> &Runtime {
        self.runtime
            .as_ref()
            .expect("it is taken when the engine is dropped")
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            // An engine may be dropped where nothing may block.
            runtime.shutdown_background();
        }
    }
}

/// Where the writer of a completion sits while it writes.
struct Seat<W>(Mutex<Option<W>>);

impl<W> Seat<W> {
    fn leave(&self) -> Option<W> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// Lays a writer's choice into the logits.
struct Writing<W> {
    seat: Arc<Seat<W>>,
    /// What ends a completion whose writer is gone or cannot go on.
    end_token: u32,
}

impl<W: TokenWriter> CustomLogitsProcessor for Writing<W> {
    fn apply(&self, logits: &Tensor, context: &[u32]) -> mistralrs::Result<Tensor> {
        let mut row: Vec<f32> = logits.to_vec1()?;
        let mut seat = self.seat.0.lock().unwrap_or_else(PoisonError::into_inner);
        let writer = seat.as_mut();
        let chosen = writer.and_then(|writer| writer.next(&row, context));
        let chosen = chosen.unwrap_or(self.end_token) as usize;
        row.fill(f32::NEG_INFINITY);
        if let Some(logit) = row.get_mut(chosen) {
            *logit = 0.0;
        }
        let width = row.len();
        Tensor::from_vec(row, width, logits.device())
    }
}

fn outcome(response: Response) -> Result<(), MistralError> {
    match response {
        Response::CompletionDone(_) => Ok(()),
        Response::InternalError(error) | Response::ValidationError(error) => {
            Err(MistralError::Failed(error.to_string()))
        }
        Response::CompletionModelError(error, _) => Err(MistralError::Failed(error)),
        _ => Err(MistralError::Failed(
            "it gave something else than a completion".into(),
        )),
    }
}

/// A dialogue as mistral.rs takes it: turns that only say something.
fn dialogue(messages: &[Message]) -> Result<TextMessages, MistralError> {
    let mut turns = TextMessages::new();
    for message in messages {
        let said = message
            .content
            .as_str()
            .filter(|_| message.extra.is_empty());
        let said = said.ok_or_else(|| MistralError::Prompt {
            reason: "a turn is more than a role and a text, which mistral.rs is not given here"
                .into(),
        })?;
        turns = turns.add_message(TextMessageRole::Custom(message.role.clone()), said);
    }
    Ok(turns)
}

/// How the weights are to be quantised.
fn isq(source: &Source) -> Result<Option<IsqType>, MistralError> {
    let named = source.isq.as_deref();
    let read = named.map(|name| parse_isq_value(name, Some(&Device::Cpu)));
    read.transpose().map_err(|reason| MistralError::Unusable {
        path: source.path.clone(),
        reason,
    })
}

/// Loads on a thread of its own. The inner error is what mistral.rs says.
fn open(
    source: &Source,
    numbers: (Numbers, Option<IsqType>),
) -> Result<Result<Engine, String>, MistralError> {
    let (weights, config) = (source.weights()?, source.config()?);
    let config = config.as_ref().map(|file| file.path());
    Ok(pipeline(source, (weights, config), numbers).and_then(|pipeline| engine(source, &pipeline)))
}

fn pipeline(
    source: &Source,
    files: (Vec<PathBuf>, Option<&Path>),
    (numbers, isq): (Numbers, Option<IsqType>),
) -> Result<SharedPipeline, String> {
    let text = |path: &Path| path.to_string_lossy().into_owned();
    let template = source.chat_template.as_deref().map(text);
    let model = text(&source.path);
    let loader: Box<dyn Loader> = if source.is_gguf() {
        let config = GGUFSpecificConfig::default();
        let files = vec![model.clone()];
        GGUFLoaderBuilder::new(None, None, model, files, config, false, template).build()
    } else {
        let config = NormalSpecificConfig::default();
        NormalLoaderBuilder::new(config, None, None, Some(model), false, template)
            .build(None)
            .map_err(|error| format!("{error:#}"))?
    };
    let dtype = match numbers {
        Numbers::F32 => ModelDType::F32,
        Numbers::Fitting => ModelDType::Auto,
    };
    loader
        .load_model_from_path(
            &paths(source, files),
            &dtype,
            &Device::Cpu,
            true,
            DeviceMapSetting::dummy(),
            isq,
            None,
        )
        .map_err(|error| format!("{error:#}"))
}

/// The model's files, so that mistral.rs looks for none.
fn paths(
    source: &Source,
    (filenames, config): (Vec<PathBuf>, Option<&Path>),
) -> Box<dyn ModelPaths> {
    let own = if source.is_gguf() {
        PathBuf::new()
    } else {
        source.path.join("tokenizer.json")
    };
    Box::new(LocalModelPaths {
        tokenizer_filename: source.tokenizer.clone().unwrap_or(own),
        config_filename: config.map_or_else(|| source.path.join("config.json"), Path::to_owned),
        template_filename: source
            .optional("chat_template.jinja")
            .or_else(|| source.optional("tokenizer_config.json")),
        filenames,
        adapter_paths: AdapterPaths::None,
        gen_conf: source.optional("generation_config.json"),
        preprocessor_config: None,
        processor_config: None,
        chat_template_json_filename: source.optional("chat_template.json"),
    })
}

fn engine(source: &Source, pipeline: &SharedPipeline) -> Result<Engine, String> {
    let (tokenizer, end_tokens, has_chat_template) = {
        let pipeline = pipeline.blocking_lock();
        let template = pipeline.get_chat_template();
        (
            pipeline.tokenizer().ok_or("it has no tokenizer")?,
            pipeline.get_metadata().eos_tok.clone(),
            template.is_some_and(|template| template.has_chat_template()),
        )
    };
    // One completion after the other: on the CPU mistral.rs 0.8.1 gives every member of a batch the attention
    // of its last one.
    let method = SchedulerConfig::DefaultScheduler {
        method: DefaultSchedulerMethod::Fixed(NonZeroUsize::MIN),
    };
    let mistral = MistralRsBuilder::new(pipeline.clone(), method, false, None);
    let mistral = mistral.with_no_prefix_cache(true);
    // In a runtime of one thread mistral.rs does without its trial run.
    let building = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let mistral = building
        .map_err(|error| error.to_string())?
        .block_on(mistral.build());
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .thread_name("mistral-wait")
        .enable_time()
        .build()
        .map_err(|error| error.to_string())?;
    Ok(Engine {
        path: source.path.clone(),
        requests: mistral
            .get_sender(None)
            .map_err(|error| error.to_string())?,
        decode: Box::new(move |ids, plain| tokenizer.decode(ids, plain).unwrap_or_default()),
        end_tokens,
        has_chat_template,
        runtime: Some(runtime),
        _mistral: mistral,
    })
}

/// mistral.rs panics on files that are not what it expects. Such a panic becomes an error, told once.
fn tell_no_panics_of_the_loader() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let told_before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            if thread::current().name() != Some(LOADER) {
                told_before(panic);
            }
        }));
    });
}

/// What a thread that panicked said.
fn panic_of(thread: JoinHandle<()>) -> String {
    let Err(said) = thread.join() else {
        return "its thread ended without an answer".into();
    };
    let text = said.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| said.downcast_ref::<&str>().copied());
    text.unwrap_or("it panicked").to_owned()
}

/// What may help.
fn remedy(source: &Source) -> &'static str {
    if source.is_gguf() {
        "fetch or convert the file again, from a model of an architecture that mistral.rs knows"
    } else {
        "take a folder whose files are whole, of an architecture that mistral.rs knows, such as Llama, Mistral, Qwen2 or Qwen3"
    }
}
